"""Autoencoder.   python train_ae.py DATA_DIR OUT_DIR SECONDS [RESUME]"""
import math
import os
import sys
import time

import numpy as np
import torch

import presenters as ps
from common import DEVICE, GPU, half_precision, load, log, save, schedule
from data import Clips, Speech
from model import Decoder, Encoder


BATCH, LENGTH = (16, 3) if GPU else (1, 2)


def pixel_weights(eyes=2.2):
    w = torch.ones(256, 256)
    w[84:126, 64:192] = eyes
    w[ps.MOUTH_BOX] = 3.5
    return (w / w.mean()).to(DEVICE)


def picture_loss(y, x, weight):
    """L1, L1 of differences, a little MSE; all weighted"""
    d = y - x
    gx, gy = d[..., 1:] - d[..., :-1], d[..., 1:, :] - d[..., :-1, :]
    return (d.abs() * weight).mean() + .6 * ((gx.abs() * weight[:, 1:]).mean() + (gy.abs() * weight[1:]).mean()) + 2 * (d * d * weight).mean()


def psnr(d):
    return 10 * math.log10(4 / max(1e-9, d.float().pow(2).mean().item()))


def main():
    data, out, budget = sys.argv[1], sys.argv[2], float(sys.argv[3])
    torch.manual_seed(11)
    g = torch.Generator(device=DEVICE).manual_seed(11)
    speech = Speech(data, DEVICE)
    clips = Clips(speech, torch.from_numpy(ps.identity(np.random.default_rng(11), 12000 if GPU else 16)).to(DEVICE), g)
    held = Clips(speech, torch.from_numpy(ps.identity(np.random.default_rng(777), 64 if GPU else 2)).to(DEVICE), torch.Generator(device=DEVICE).manual_seed(5))
    encoder, decoder = (m.to(DEVICE).to(memory_format=torch.channels_last) for m in (Encoder(), Decoder()))
    if len(sys.argv) > 4:
        state = load(sys.argv[4])
        for name, m in (("encoder.", encoder), ("decoder.", decoder)):
            m.load_state_dict({k[len(name):]: v for k, v in state.items() if k.startswith(name)})
    fast_e, fast_d = (torch.compile(encoder), torch.compile(decoder)) if GPU and not os.environ.get("NO_COMPILE") else (encoder, decoder)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    base = 2e-3
    optimizer = torch.optim.AdamW(parameters, lr=base, betas=(.9, .98), weight_decay=1e-4, fused=GPU)
    weight = pixel_weights()
    checkpoint = lambda: save(os.path.join(out, "ae.safetensors"), {f"{n}.{k}": v for n, m in (("encoder", encoder), ("decoder", decoder)) for k, v in m.state_dict().items()})
    log("ready, compiling")
    start, step, saved, held_params = None, 0, False, held.draw(32 if GPU else 1, 4 * 4)[3]
    while True:
        if start is None and step == 3:
            start = time.time()                # compilation is not counted
            budget_left = budget - (time.time() - T0)
        p = 0.002 if start is None else (time.time() - start) / budget_left
        if p >= 1 or (not GPU and step >= 5):
            break
        for group in optimizer.param_groups:
            group["lr"] = base * schedule(p)
        _, _, _, params = clips.draw(BATCH, 4 * LENGTH)
        x = (ps.render(params).view(BATCH, LENGTH * 4, 3, 256, 256).float() / 127.5 - 1)
        with half_precision():
            z = fast_e(x.view(-1, 4, 3, 256, 256))
            z = z + torch.randn_like(z) * .30 * torch.rand(z.shape[0], 1, 1, 1, device=DEVICE) ** 2
            y = fast_d(z.view(BATCH, LENGTH, *z.shape[1:]))
        y = y.float()
        loss = picture_loss(y, x, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        optimizer.step()
        step += 1
        if step % 500 == 0 or step in (1, 3):
            d = (y - x).detach()
            log("ae", step, f"p {p:.2f} loss {loss.item():.4f} psnr {psnr(d):.2f} mouth {psnr(d[..., ps.MOUTH_BOX[0], ps.MOUTH_BOX[1]]):.2f} eyes {psnr(d[..., ps.EYES_BOX[0], ps.EYES_BOX[1]]):.2f}")
        if p > .5 and not saved:
            saved = True
            checkpoint()
    checkpoint()
    encoder.eval(), decoder.eval()
    with torch.no_grad():
        x = ps.render(held_params).view(len(held_params), -1, 3, 256, 256).float() / 127.5 - 1
        z = encoder(x.view(-1, 4, 3, 256, 256)).view(len(held_params), -1, 16, 32, 32)
        d = decoder(z).clamp(-1, 1) - x
    log(f"held-out identities: psnr {psnr(d):.2f} mouth {psnr(d[..., ps.MOUTH_BOX[0], ps.MOUTH_BOX[1]]):.2f} eyes {psnr(d[..., ps.EYES_BOX[0], ps.EYES_BOX[1]]):.2f} latent std {z.std().item():.3f}; steps {step}")


T0 = time.time()
if __name__ == "__main__":
    main()
