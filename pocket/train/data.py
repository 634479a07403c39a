"""Training data on the device: speech windows, mel augmentation, random clips of random presenters."""
import glob
import os

import numpy as np
import torch
import torch.nn.functional as F

import presenters as ps

LEFT, RIGHT = 80, 4            # video frames of audio context given before and after a window (the net looks 3 frames ahead, 72 back)


# how often a second of these voices is heard: those nearest to people, and those that differ most
OFTEN = {"kokoro": 3, "festival": 2, "joe": 2, "throat": 2}


class Speech:
    def __init__(self, folder, device, pattern="speech_*.npz"):
        names = sorted(glob.glob(os.path.join(folder, pattern)))
        if not names:
            raise SystemExit(f"no {pattern} in {folder}: make them with speech.py")
        files = [np.load(f) for f in names]
        self.mel = torch.from_numpy(np.concatenate([f["mel"] for f in files])).to(device)       # u8 [2N, 64]
        self.vis = torch.from_numpy(np.concatenate([f["vis"] for f in files])).to(device)       # u8 [N, 6]
        self.frames = len(self.vis)
        self.utterances = [int(n) for f in files if "utterances" in f for n in f["utterances"]]
        ends = np.cumsum([len(f["vis"]) for f in files])
        spans = [np.arange(end - len(f["vis"]), end) for f, end in zip(files, ends)]
        often = [max([1] + [n for family, n in OFTEN.items() if family in os.path.basename(name)]) for name in names]
        self.heard = torch.from_numpy(np.concatenate([s for s, n in zip(spans, often) for _ in range(n)])).to(device)

    def starts(self, n, length, g):
        i = torch.randint(len(self.heard), (n,), generator=g, device=self.vis.device)
        return self.heard[i].clamp(LEFT, self.frames - length - RIGHT - 1)

    def mels(self, s, length):
        """log-mels of frames s-LEFT .. s+length+RIGHT, [B, 2(LEFT+length+RIGHT), 64]"""
        i = 2 * s[:, None] + torch.arange(-2 * LEFT, 2 * (length + RIGHT), device=s.device)
        return self.mel[i].float() * (11 / 255)

    def hurried(self, s, length, rate):
        """mels and visemes like those below, spoken `rate` [B] times as fast"""
        at = lambda x, first, count: (x * s[:, None] - .5 + rate[:, None].double() * (torch.arange(first, first + count, device=s.device) + .5)).clamp(0, x * self.frames - 1.001)

        def between(table, position):
            low = position.long()
            return torch.lerp(table[low].float(), table[low + 1].float(), (position - low).float()[..., None])
        return between(self.mel, at(2, -2 * LEFT, 2 * (LEFT + length + RIGHT))) * (11 / 255), between(self.vis, at(1, 0, length)) / 100 - 1

    def visemes(self, s, length):
        return self.vis[s[:, None] + torch.arange(length, device=s.device)].float() / 100 - 1


WEIGHT = (1.2, 1.2, 1.5, .8, .6, .6)   # of the visemes' errors
SEEN = (.25, .35, .4, .4)              # of the errors of what is seen: opening, width, press, lip under teeth


def viseme_loss(y, v, shut=0.):
    """y, v [B, T, 6]: of values, of their changes, and of what is seen; `shut` more where the lips are to be closed"""
    weight, more = torch.tensor(WEIGHT, device=y.device), 1 + shut * (v[..., 2:3] > .5).float()
    seen = (ps.mouth(y) - ps.mouth(v)).pow(2) * torch.tensor(SEEN, device=y.device)
    return ((y - v).pow(2) * weight * more).mean() + .5 * ((y.diff(dim=1) - v.diff(dim=1)).pow(2) * weight).mean() + (seen * more).mean()


def loudness(visemes):
    """a slow 0..1 measure of how much is being said, for nods and brows"""
    k = torch.ones(1, 1, 9, device=visemes.device) / 9
    return F.conv1d(F.pad(visemes[:, None, :, 0] * 1.4, (8, 0), mode="replicate"), k)[:, 0].clamp(0, 1)


def augment(m, g):
    """m [B, T, 64] clamped log-mel.  Voice (warp, sharpness, equaliser, gain), room, noise, babble, floor, telephone band."""
    b, t, n = m.shape
    device = m.device
    uniform = lambda *s: torch.rand(*s, generator=g, device=device)
    normal = lambda *s: torch.randn(*s, generator=g, device=device)
    chance = lambda p: (uniform(b, 1, 1) < p).float()
    stretch = childlike(m, g, device)
    position = (torch.arange(n, device=device) * stretch + (uniform(b, 1) - .5) * 3 * (uniform(b, 1) < .4)).clamp(0, n - 1.001)
    low, fraction = position.long(), (position - position.floor())[:, None]
    index = low[:, None].expand(b, t, n)
    m = m.gather(2, index) * (1 - fraction) + m.gather(2, index + 1) * fraction
    blurred = F.avg_pool1d(F.pad(m.reshape(b * t, 1, n), (1, 1), mode="replicate"), 3, 1).view(b, t, n)
    m = m + (blurred - m) * (1.4 * uniform(b, 1, 1) - .3) * chance(.6)
    curve = F.interpolate(normal(b, 1, 7) * .5 * uniform(b, 1, 1), size=n, mode="linear", align_corners=True)
    m = m + curve + 2.6 * uniform(b, 1, 1) - 1.8
    p = 10 ** m
    decay = .8 * uniform(b, 1, 1) * chance(.35)
    wet = p.clone()
    for k in range(1, 10):
        wet[:, k:] += decay ** k * p[:, :-k]
    p = wet
    peak = p.mean(-1).amax(1).clamp(min=1e-3).log10()[:, None, None]
    colour = F.interpolate(normal(b, 1, 6) * .5, size=n, mode="linear", align_corners=True)
    snr = torch.where(uniform(b, 1, 1) < .45, .5 + 1.7 * uniform(b, 1, 1), torch.where(uniform(b, 1, 1) < .6, 2 + 3 * uniform(b, 1, 1), torch.full((b, 1, 1), 9., device=device)))
    sway = 1 + .5 * torch.sin(torch.arange(t, device=device)[None, :, None] * .12 * uniform(b, 1, 1) + 6 * uniform(b, 1, 1)) * chance(.5)
    p = p + 10 ** (peak - snr + colour) * sway * -(1 - .999 * uniform(b, t, n)).log()
    p = p + p.roll(1, 0) * 10 ** (-1.0 - 1.6 * uniform(b, 1, 1)) * chance(.2)
    floor = 1.5 * uniform(b, 1, 1)
    m = torch.maximum(torch.log10(p + 1e-8), floor)
    telephone = (uniform(b, 1, 1) < .12) & (torch.arange(n, device=device) > 40 + 24 * uniform(b, 1, 1))
    return torch.where(telephone, floor, m).clamp(0, 11)


def childlike(m, g, device):
    """how far the bands are stretched: most voices a little; one in six by what a child's throat does"""
    b = len(m)
    u = lambda: torch.rand(b, 1, generator=g, device=device)
    small = u() < .17
    return torch.where(small, .76 + .12 * u(), torch.where(u() < .7, .86 + .28 * u(), torch.ones(b, 1, device=device)))


class Clips:
    """Random clips: speech window, identity, controls -> renderer parameters"""

    def __init__(self, speech, identities, g, blinks=1 / 45):
        self.speech, self.ids, self.g, self.blinks = speech, identities, g, blinks
        self.device = identities.device

    def draw(self, n, length):
        """start [n], identity index [n], controls [n, T, 10], parameters [n, T, 72]"""
        s = self.speech.starts(n, length, self.g)
        v = self.speech.visemes(s, length)
        c = ps.controls(n, length, self.g, self.device, loudness(v), self.blinks)
        i = torch.randint(0, len(self.ids), (n,), generator=self.g, device=self.device)
        return s, i, c, ps.assemble(self.ids[i], c, v)

    def references(self, i):
        """[n, 2, 72]: the neutral pose, and the same face at some other moment"""
        n = len(i)
        v = self.speech.visemes(self.speech.starts(n, 12, self.g), 12)
        c = ps.controls(n, 12, self.g, self.device, loudness(v))
        j = torch.randint(0, 12, (n,), generator=self.g, device=self.device)
        k = torch.arange(n, device=self.device)
        other = ps.assemble(self.ids[i], c[k, j][:, None], v[k, j][:, None])
        return torch.cat([ps.neutral(self.ids[i]), other], 1)
