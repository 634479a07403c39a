"""The matte head.   python train_matte.py POCKET.safetensors OUT.safetensors [--minutes 15] [--seed 11]

Learns on one CPU core: draws presenters, lets the frozen autoencoder see and redraw them (with noise on the latents, as
the transformer leaves some), and reads the renderer's own matte from the decoder's features.  Nothing else is changed.
"""
import argparse
import time

import numpy as np
import torch

import presenters as ps
import weights
from common import log, schedule
from model import Matte
from streaming import Pocket

FIRST = 300                              # samples before the first step
MOST = 1600                              # samples kept, 1.5 MB each


def sample(net, rng, g):
    """One presenter in motion: features of its second latent, and the mattes [4, 256, 256]"""
    identity = torch.from_numpy(ps.identity(rng, 1))
    control = ps.controls(1, 4, g, "cpu")
    viseme = torch.rand(1, 4, 6, generator=g) * torch.tensor([.9, 1, .6, .3, .4, .4])
    moving = ps.assemble(identity, control, viseme)[0]
    frames = ps.render(torch.cat([moving[:1] if rng.random() < .7 else ps.neutral(identity)[0], moving]))
    noise = lambda: torch.randn(16, 32, 32, generator=g) * float(rng.choice([0, .1, .2, .35]))
    before, now = net.encode_picture(frames[0]) + noise(), net.encode(frames[1:].float() / 127.5 - 1) + noise()
    wide, fine, _ = net.features_of(now, net.conv("decoder.conv_in", before[None]))
    return wide.half(), fine.half(), ps.render_matte(moving)


def loss_of(out, true):
    """Absolute error, nothing for going beyond 0 or 1; pixels near an edge count four times more"""
    error = torch.where(true >= 1, (1 - out).clamp(min=0), torch.where(true <= 0, out.clamp(min=0), (out - true).abs()))
    soft = torch.nn.functional.avg_pool2d(true, 9, 1, 4)
    return (error * (1 + 4 * ((soft > .01) & (soft < .99)))).mean() + error.pow(2).mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("pocket")
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng, g = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    net, matte = Pocket(*weights.read(args.pocket)), Matte()
    log("parameters", sum(p.numel() for p in matte.parameters()))
    optimiser = torch.optim.AdamW(matte.parameters(), 1e-4, betas=(.9, .98), weight_decay=1e-3)
    pool, begun, end, step, mean = [], time.time(), args.minutes * 60, 0, 0.
    while time.time() - begun < end:
        with torch.no_grad():
            pool.append(sample(net, rng, g))
        if len(pool) > MOST:
            pool.pop(rng.integers(MOST // 2))
        if len(pool) < FIRST:
            start = time.time()
            continue
        p = (time.time() - start) / (begun + end - start)
        for _ in range(2):
            wide, fine, true = (torch.stack(t).float() for t in zip(*(pool[i] for i in rng.integers(0, len(pool), 6))))
            for group in optimiser.param_groups:
                group["lr"] = 4e-3 * schedule(p)
            loss = loss_of(matte(wide, fine), true / 255)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            mean = loss.item() if step == 0 else mean + .02 * (loss.item() - mean)
            step += 1
        if step % 50 < 2:
            log(step, len(pool), f"{mean:.4f}")
    matte.eval()
    tensors = {}
    for name, module in matte.named_children():
        tensors[f"matte.{name}.weight"], tensors[f"matte.{name}.bias"] = weights.folded(*module) if isinstance(module, torch.nn.Sequential) else weights.folded(module)
    print(args.out, weights.write(args.out, tensors, {"samples": len(pool), "steps": step}, least=2048), "bytes", step, "steps")
