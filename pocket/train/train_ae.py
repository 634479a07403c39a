"""Autoencoder of all sizes, with the matte.   [torchrun ...] train_ae.py DATA_DIR OUT_DIR SECONDS [--resume PATH] [options]

The encoder sees 384 x 384; the decoder's coarse part is shared, its fine part belongs to a size, and each step trains one
size.  The loss: L1, L1 of differences, a little MSE, mouth and eyes weighted; the matte's absolute error, more at edges.
"""
import argparse
import math
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

import presenters as ps
from common import DEVICE, GPU, RANK, START, agreed, alike, averaged, averaged_statistics, begin, end, flat_gradients, half_precision, load, log, save, schedule
from data import Clips, Speech
from model import REFERENCE, SIZES, Decoder, Encoder

SHARE = {256: .3, 384: .5, 512: .2}    # of the steps


def scaled(box, size):
    return tuple(slice(s.start * size // 256, s.stop * size // 256) for s in box)


def pixel_weights(size=256, eyes=2.2, mouth=3.5):
    w = torch.ones(size, size)
    w[scaled(ps.EYES_BOX, size)] = eyes
    w[scaled(ps.MOUTH_BOX, size)] = mouth
    return (w / w.mean()).to(DEVICE)


def picture_loss(y, x, weight, square=2.):
    """L1, L1 of differences, `square` times MSE; all weighted"""
    d = y - x
    gx, gy = d[..., 1:] - d[..., :-1], d[..., 1:, :] - d[..., :-1, :]
    return (d.abs() * weight).mean() + .6 * ((gx.abs() * weight[:, 1:]).mean() + (gy.abs() * weight[1:]).mean()) + square * (d * d * weight).mean()


def matte_loss(y, x):
    """Absolute error, five times where the truth changes"""
    x = x.float() / 255
    wide = F.max_pool2d(x.flatten(0, -3)[:, None], 7, 1, 3) + F.max_pool2d(-x.flatten(0, -3)[:, None], 7, 1, 3)
    return ((y.flatten(0, -3)[:, None] - x.flatten(0, -3)[:, None]).abs() * (1 + 4 * wide)).mean()


def psnr(d):
    return 10 * math.log10(4 / max(1e-9, d.float().pow(2).mean().item()))


def parts(d, size):
    """PSNR of whole picture, mouth, eyes"""
    inside = lambda box: psnr(d[(..., *scaled(box, size))])
    return f"psnr {psnr(d):.2f} mouth {inside(ps.MOUTH_BOX):.2f} eyes {inside(ps.EYES_BOX):.2f}"


def parts_of(state):
    return [{k[len(n):]: v for k, v in state.items() if k.startswith(n)} for n in ("encoder.", "decoder.")]


def pictures(params, size):
    """[N, 72] -> [N, 3, size, size] in -1..1"""
    return ps.render(params, size).float() / 127.5 - 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--resume", help="ae.safetensors to begin with (of warm.py, or an earlier run)")
    parser.add_argument("--batch", type=int, default=16 if GPU else 1, help="clips a step and GPU; of 12 frames")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--identities", type=int, default=16000 if GPU else 16)
    parser.add_argument("--max-steps", type=int, default=10 ** 9)
    args = parser.parse_args()
    begin()
    length = 3 if GPU else 2
    torch.manual_seed(11 + RANK)
    g, same = torch.Generator(device=DEVICE).manual_seed(11 + RANK), random.Random(7)
    speech = Speech(args.data, DEVICE)
    clips = Clips(speech, torch.from_numpy(ps.identity(np.random.default_rng(11 + RANK), args.identities)).to(DEVICE), g, 1 / 25)
    held = Clips(speech, torch.from_numpy(ps.identity(np.random.default_rng(777), 64 if GPU else 2)).to(DEVICE), torch.Generator(device=DEVICE).manual_seed(5))
    encoder, decoder = (m.to(DEVICE).to(memory_format=torch.channels_last) for m in (Encoder(), Decoder()))
    if args.resume:
        for m, state in zip((encoder, decoder), parts_of(load(args.resume))):
            m.load_state_dict(state)
    alike((encoder, decoder))
    fast_e, fast_d = (torch.compile(encoder, dynamic=False), torch.compile(decoder, dynamic=False)) if GPU and not os.environ.get("NO_COMPILE") else (encoder, decoder)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    flat = flat_gradients(parameters)
    # a trained encoder moves little, so that the transformer knows its latents again
    pace = .25 if args.resume else 1.
    optimizer = torch.optim.AdamW([{"params": list(encoder.parameters()), "pace": pace}, {"params": list(decoder.parameters()), "pace": 1.}],
                                  lr=args.lr, betas=(.9, .98), weight_decay=1e-4, fused=GPU)
    weight = {size: pixel_weights(size) for size in SIZES}

    def checkpoint():
        averaged_statistics((encoder, decoder))
        if RANK == 0:
            save(os.path.join(args.out, "ae.safetensors"), {f"{n}.{k}": v for n, m in (("encoder", encoder), ("decoder", decoder)) for k, v in m.state_dict().items()})
    log("ready, compiling")
    start, step, saved, held_params = None, 0, 0, held.draw(16 if GPU else 1, 4 * 4)[3]
    while True:
        if start is None and step == 6:
            start = time.time()                # compilation of the sizes is not counted
            left = max(1., args.seconds - (start - START))     # a compiler that took all the time must not turn it round
        p = agreed(.002 if start is None else (time.time() - start) / left, step)
        if p >= 1 or step >= args.max_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["pace"] * schedule(p)
        size = SIZES[step % 3] if step < 6 else same.choices(list(SHARE), list(SHARE.values()))[0]
        batch = max(1, args.batch * REFERENCE // size) if size > REFERENCE else args.batch
        params = clips.draw(batch, 4 * length)[3].flatten(0, 1)
        seen = pictures(params, REFERENCE)
        x = seen if size == REFERENCE else pictures(params, size)
        with half_precision():
            z = fast_e(seen.view(-1, 4, 3, REFERENCE, REFERENCE))
            z = z + torch.randn_like(z) * .30 * torch.rand(z.shape[0], 1, 1, 1, device=DEVICE) ** 2
            y = fast_d(z.view(batch, length, *z.shape[1:]), size)
        y = y.float().flatten(0, 1)
        loss = picture_loss(y[:, :3], x, weight[size])
        alpha = matte_loss(y[:, 3], ps.render_matte(params, size))
        flat.zero_()
        (loss + .5 * alpha).backward()
        averaged(flat)
        optimizer.step()
        step += 1
        if step % 500 == 0 or step in (1, 3, 6) or not GPU:
            log("ae", step, f"p {p:.2f} size {size} loss {loss.item():.4f} matte {alpha.item():.4f}", parts((y[:, :3] - x).detach(), size))
        if p > .25 * (saved + 1):
            saved += 1
            checkpoint()
    checkpoint()
    encoder.eval(), decoder.eval()
    with torch.no_grad():
        n = len(held_params)
        z = encoder(pictures(held_params.flatten(0, 1), REFERENCE).view(-1, 4, 3, REFERENCE, REFERENCE)).view(n, -1, 16, 32, 32)
        for size in SIZES:
            y = torch.cat([decoder(q, size) for q in z.split(4)]).flatten(0, 1)
            p = held_params.flatten(0, 1)
            log(f"held-out identities at {size}:", parts(y[:, :3].clamp(-1, 1) - pictures(p, size), size), f"matte {(y[:, 3].clamp(0, 1) - ps.render_matte(p, size) / 255).abs().mean().item():.4f}")
    log("latent deviation", round(z.std().item(), 3), "steps", step)
    end()


if __name__ == "__main__":
    main()
