"""Audio net (log-mel -> visemes), then the evaluation probe.

    python train_audio.py DATA_DIR OUT_DIR AUDIO_SECONDS PROBE_SECONDS [--resume PATH] [options]

On a CPU it trains with one thread (a batch of 12); PROBE_SECONDS 0 leaves the probe out.
"""
import argparse
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import presenters as ps
from common import DEVICE, GPU, half_precision, load, log, save, schedule
from data import LEFT, RIGHT, Clips, Speech, augment
from model import AudioNet, Probe

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("out")
parser.add_argument("audio_seconds", type=float)
parser.add_argument("probe_seconds", type=float)
parser.add_argument("--resume")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--batch", type=int, default=192 if GPU else 12)
parser.add_argument("--max-steps", type=int, default=10 ** 9)
args = parser.parse_args()
out = args.out
WEIGHT = [1.2, 1.2, 1.5, .8, .6, .6]   # of the visemes' errors
SEEN = [.25, .35, .4, .4]              # of the errors of what is seen: opening, width, press, lip under teeth


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt().clamp(min=1e-9))


def main():
    torch.manual_seed(3)
    g = torch.Generator(device=DEVICE).manual_seed(3)
    speech = Speech(args.data, DEVICE)
    held = Speech(args.data, DEVICE, "held_out.npz")
    net = AudioNet().to(DEVICE)
    if args.resume:
        net.load_state_dict(load(args.resume), strict=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(.9, .98), weight_decay=.02, fused=GPU)
    batch, length = args.batch, 96
    weight, seen = torch.tensor(WEIGHT, device=DEVICE), torch.tensor(SEEN, device=DEVICE)
    start, step = time.time(), 0

    def evaluate():
        net.eval()
        with torch.no_grad():
            s = torch.arange(LEFT, held.frames - length - RIGHT, length, device=DEVICE)
            y, v = net.visemes(net(held.mels(s, length)))[:, LEFT:LEFT + length], held.visemes(s, length)
            net.train()
            return [round(correlation(a[..., k], b[..., k]), 3) for a, b in ((y, v), (ps.mouth(y), ps.mouth(v))) for k in range(a.shape[-1])][:8]
    while True:
        p = (time.time() - start) / args.audio_seconds
        if p >= 1 or step >= args.max_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(p)
        with torch.no_grad():
            s = speech.starts(batch, length, g)
            u = torch.rand(2, batch, device=DEVICE, generator=g)
            m, v = speech.hurried(s, length, torch.where(u[0] < .6, .82 + .4 * u[1], 1.))
            m = augment(m, g)
        with half_precision():
            y = net.visemes(net(m))[:, LEFT:LEFT + length]
        y = y.float()
        loss = ((y - v).pow(2) * weight).mean() + .5 * ((y.diff(dim=1) - v.diff(dim=1)).pow(2) * weight).mean()
        loss = loss + ((ps.mouth(y) - ps.mouth(v)).pow(2) * seen).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        step += 1
        if step % (500 if GPU else 50) == 0:
            log("audio", step, f"p {p:.2f} loss {loss.item():.5f}", evaluate())
            if step % (1000 if GPU else 100) == 0:
                save(os.path.join(out, "audio.safetensors"), net.state_dict())
    save(os.path.join(out, "audio.safetensors"), net.state_dict())
    log("audio net: held-out correlation of jaw, width, press, fv, tongue, upper; of opening and width as seen", evaluate(), "steps", step)

    if not args.probe_seconds:
        return
    clips = Clips(speech, torch.from_numpy(ps.identity(np.random.default_rng(21), 8000 if GPU else 8)).to(DEVICE), g)
    probe = Probe().to(DEVICE)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=.01, fused=GPU)
    start, step, n = time.time(), 0, 32 if GPU else 1
    while True:
        p = (time.time() - start) / max(args.probe_seconds, 1e-3)
        if p >= 1 or step >= args.max_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(p)
        with torch.no_grad():
            params = clips.draw(n, 48)[3][:, ::6].flatten(0, 1)
            x = ps.render(params).float() / 127.5 - 1
            k = torch.arange(-3, 4, device=DEVICE).float()
            blur = torch.exp(-.5 * (k / (.2 + 1.2 * float(torch.rand(1)))) ** 2)
            blur = (blur / blur.sum()).view(1, 1, -1).expand(3, 1, -1)
            x = F.conv2d(F.conv2d(x, blur[:, :, None], padding=(0, 3), groups=3), blur[..., None], padding=(3, 0), groups=3)
            x = x + .04 * torch.rand(1, device=DEVICE) * torch.randn_like(x)
            target = ps.readings(params)
        with half_precision():
            y = probe(x)
        loss = F.smooth_l1_loss(y.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 300 == 0:
            log("probe", step, f"loss {loss.item():.4f} opening r {correlation(y[:, 0].detach().float(), target[:, 0]):.3f}")
    save(os.path.join(out, "probe.safetensors"), probe.state_dict())
    log("probe steps", step)


if __name__ == "__main__":
    main()
