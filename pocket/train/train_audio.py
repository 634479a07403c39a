"""Audio net (log-mel -> visemes), then the evaluation probe.

    python train_audio.py DATA_DIR OUT_DIR AUDIO_SECONDS PROBE_SECONDS [--resume PATH] [options]

--resume takes a checkpoint, or a weights file whose audio net goes on learning.  PROBE_SECONDS 0 leaves the probe out.
A CPU is enough to go on with the audio net (--batch 32 --length 128 --lr 6e-4: 0.8 s a step on one core with AMX).
"""
import argparse
import copy
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import presenters as ps
import weights
from common import DEVICE, GPU, half_precision, load, log, save, schedule
from data import LEFT, Clips, Speech, augment, viseme_loss
from model import AudioNet, Probe

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("out")
parser.add_argument("audio_seconds", type=float)
parser.add_argument("probe_seconds", type=float)
parser.add_argument("--resume")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--batch", type=int, default=192 if GPU else 12)
parser.add_argument("--length", type=int, default=96, help="video frames of a window")
parser.add_argument("--shut", type=float, default=0, help="errors count so many times more while the lips are to be shut")
parser.add_argument("--hold", type=float, default=0, help="weight of what features lose of --resume's; a transformer that stays as it is needs this")
parser.add_argument("--threads", type=int, default=1, help="on a CPU")
parser.add_argument("--seed", type=int, default=3)
parser.add_argument("--dropout", type=float, default=.1)
parser.add_argument("--weight-decay", type=float, default=.02)
parser.add_argument("--max-steps", type=int, default=10 ** 9)
args = parser.parse_args()
out = args.out
REST = [0., 0., .12, 0., 0., 0.]       # visemes of a mouth that says nothing


COLD, QUIET = .3, .25                  # of the windows: how many are heard from nothing; how many begin after silence


def begun(m, v, g):
    """Windows as a live session hears them: some from the very first frame, some silent up to a moment.  The net must know a voice
    after a word, not after two seconds.  m [B, 2(LEFT+T+RIGHT), 64], v [B, T, 6] -> the same, and how many frames were left out."""
    u = torch.rand(3, len(m), device=m.device, generator=g)
    first = (u[0] * (LEFT + v.shape[1] // 2)).long()[:, None] * (u[1] < QUIET)[:, None]           # frames of silence
    at = torch.arange(m.shape[1] // 2, device=m.device)
    quiet = (at[None] < first)
    noise = 1.5 * u[2][:, None, None] + .4 * torch.rand(m.shape, device=m.device, generator=g)
    m = torch.where(quiet.repeat_interleave(2, 1)[..., None], noise, m)
    v = torch.where(quiet[:, LEFT:LEFT + v.shape[1], None], torch.tensor(REST, device=v.device), v)
    cut = LEFT // 8 * int(torch.randint(1, 9, (1,))) if float(torch.rand(1)) < COLD else 0            # few lengths: a convolution is tuned for each
    return m[:, 2 * cut:], v, cut


def audio_net(path):
    """The state of the audio net in a checkpoint, or in a weights file"""
    if os.path.exists(path):
        state = load(path)
        if "visemes.weight" in state:
            return state
    return {k[len("audio."):]: v for k, v in weights.read(path)[0].items() if k.startswith("audio.") and k != "audio.mel_filters"}


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt().clamp(min=1e-9))


def main():
    if not GPU:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    g = torch.Generator(device=DEVICE).manual_seed(args.seed)
    speech = Speech(args.data, DEVICE)
    held = Speech(args.data, DEVICE, "held_out.npz")
    net = AudioNet(drop=args.dropout).to(DEVICE)
    if args.resume:
        net.load_state_dict(audio_net(args.resume))
    # The transformer reads more from a feature than the visemes do. Held are all directions but theirs, to those of the clean sound.
    first = copy.deepcopy(net).requires_grad_(False).eval()
    read, written = first.visemes.weight, torch.linalg.pinv(first.visemes.weight)
    net.visemes.requires_grad_(not args.hold)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=args.lr, betas=(.9, .98), weight_decay=args.weight_decay, fused=GPU)
    mean = copy.deepcopy(net).requires_grad_(False).eval()                    # of the weights, over the last steps
    batch, length = args.batch, args.length
    start, step = time.time(), 0

    lengths = held.utterances
    size = max(lengths)
    heard, true = torch.zeros(len(lengths), 2 * size, 64, device=DEVICE), torch.zeros(len(lengths), size, 6, device=DEVICE)
    for i, (n, end) in enumerate(zip(lengths, np.cumsum(lengths))):
        heard[i, :2 * n], true[i, :n] = held.mel[2 * (end - n):2 * end].float() * (11 / 255), held.vis[end - n:end].float() / 100 - 1
    inside = torch.arange(size, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]

    def evaluate():
        """r of the six visemes, of opening and width as seen; opening and width in the first three seconds of a clip"""
        with torch.no_grad():
            y = mean.visemes(mean(heard))
        r = lambda a, b, where, k: round(correlation(a[where][:, k], b[where][:, k]), 3)
        early = inside & (torch.arange(size, device=DEVICE) < 75)
        return [r(y, true, inside, k) for k in range(6)] + [r(ps.mouth(y), ps.mouth(true), w, k) for w in (inside, early) for k in (0, 1)]
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
            known = first(m)[:, LEFT:LEFT + length] if args.hold else None
            m, v, cut = begun(augment(m, g), v, g)
        with half_precision():
            f = net(m)[:, LEFT - cut:LEFT - cut + length]
            y = net.visemes(f)
        loss = viseme_loss(y.float(), v, args.shut)
        if args.hold:
            apart = f.float() - known
            loss = loss + args.hold * (apart - apart @ read.T @ written.T).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1 - min(.999, step / (step + 10.)))
        if step % (500 if GPU else 50) == 0:
            log("audio", step, f"p {p:.2f} loss {loss.item():.5f}", evaluate())
            if step % (1000 if GPU else 100) == 0:
                save(os.path.join(out, "audio.safetensors"), mean.state_dict())
    save(os.path.join(out, "audio.safetensors"), mean.state_dict())
    log("audio net: held-out correlation of jaw, width, press, fv, tongue, upper; of opening and width as seen, and in the first 3 s", evaluate(), "steps", step)

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
            log("probe", step, f"loss {loss.item():.4f} r of opening, width, press", [round(correlation(y[:, k].detach().float(), target[:, k]), 3) for k in range(3)])
    save(os.path.join(out, "probe.safetensors"), probe.state_dict())
    log("probe steps", step)


if __name__ == "__main__":
    main()
