"""Procedural presenters: identities, liveliness controls, and the renderer (render/presenter.h) through ctypes."""
import colorsys
import ctypes
import os

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
IDENTITY, PARAMETERS = 56, 72
CONTROL_NAMES = ["yaw", "pitch", "roll", "dx", "dy", "blink", "gaze_x", "gaze_y", "brow", "smile"]
CONTROL_SCALE = [4.0, 5.0, 30.0, 60.0, 100.0, 2.0, 2.5, 2.5, 2.5, 2.5]
CONTROL_RANGE = [[-.6, .6], [-.55, .55], [-.07, .07], [-.045, .045], [-.03, .03], [0, 1], [-.9, .9], [-.6, .6], [-.5, .8], [0, .9]]
NEUTRAL = [0.0, 0, 0, 0, 0, 0, 0, 0, 0, .3]
REST_VISEMES = [0.0, 0.0, .12, 0.0, 0.0, 0.0]
# where things are in a 256 x 256 picture at rest: rows, columns
MOUTH_BOX, EYES_BOX = (slice(140, 192), slice(86, 170)), (slice(84, 128), slice(64, 192))

SKIN = np.array([[.985, .86, .77], [.96, .79, .67], [.91, .71, .56], [.80, .59, .44], [.66, .46, .33], [.50, .34, .25], [.40, .27, .20]])
HAIR = np.array([[.10, .08, .08], [.20, .13, .10], [.36, .22, .13], [.52, .32, .17], [.82, .64, .36], [.62, .26, .14], [.25, .18, .22]])
GREY = np.array([[.58, .57, .58], [.84, .82, .80], [.40, .39, .40]])
IRIS = np.array([[.30, .18, .10], [.27, .44, .62], [.30, .48, .34], [.45, .32, .16], [.38, .41, .45]])


def _hsv(h, s, v):
    return np.array(colorsys.hsv_to_rgb(h % 1, s, v))


def lip_colour(skin, amount):
    return np.clip(skin * (.80 - .50 * amount) + np.array([.78, .27, .31]) * (.21 + .46 * amount), 0, 1)


def identity(rng, n):
    """[n, 56] f32, everything drawn at random"""
    out = np.zeros((n, IDENTITY), np.float32)
    for p in out:
        female = rng.random() < .5
        old = rng.random() < .25
        tone = rng.random() * 6
        k = int(tone)
        p[0:3] = (SKIN[k] * (1 - tone + k) + SKIN[k + 1] * (tone - k)) * rng.uniform(.95, 1.03, 3)
        hair = GREY[rng.integers(3)] if old and rng.random() < .75 else HAIR[rng.choice(7, p=[.27, .24, .18, .11, .1, .06, .04])]
        p[3:6] = np.clip(hair * rng.uniform(.8, 1.2) + rng.normal(0, .012, 3), .04, .95)
        p[6:9] = IRIS[rng.integers(5) if rng.random() > tone / 5 else rng.choice([0, 3])] * rng.uniform(.85, 1.15)
        p[9:12] = _hsv(rng.random(), rng.uniform(.05, .65), rng.uniform(.2, .9))
        p[12:15] = lip_colour(p[0:3], rng.uniform(.35, 1.) if female else rng.uniform(0, .4))
        hue = rng.random()
        p[15:18], p[18:21] = _hsv(hue, rng.uniform(.04, .40), rng.uniform(.60, .97)), _hsv(hue + rng.uniform(-.10, .10), rng.uniform(.08, .5), rng.uniform(.3, .8))
        p[21], p[22] = rng.uniform(.33, .39), rng.uniform(.44, .495)
        p[23] = rng.uniform(.15, .42) if female else rng.uniform(.02, .28)
        p[24] = rng.uniform(1.0, 1.25) if female else rng.uniform(.90, 1.10)
        p[25], p[26] = rng.uniform(.150, .170) * p[21] / .36, rng.uniform(-.07, -.03)
        p[27] = rng.uniform(.010, .016) if female else rng.uniform(.014, .023)
        p[28], p[29], p[30] = rng.uniform(.130, .162), rng.uniform(.215, .245), rng.uniform(.85, 1.2)
        p[31] = rng.choice([2, 3, 4, 5, 7, 9, 1]) if female else rng.choice([0, 1, 1, 6, 6, 5] + ([8, 8, 8] if old else []))
        p[32] = rng.uniform(.95, 1.1)
        p[33] = rng.choice([0, 1, 2, 3], p=[.70, .10, .10, .10])
        p[34] = 0 if female else rng.choice([0, .30, .9], p=[.55, .2, .25])
        p[35], p[36] = rng.integers(4), rng.integers(6) if female else rng.integers(5)
        p[37], p[38] = rng.uniform(.85, 1.15), rng.uniform(.026, .038) if female else rng.uniform(.019, .028)
        p[39], p[40], p[41] = rng.random(), rng.uniform(.1, .9) if female else rng.uniform(0, .35), rng.choice([-1, 1])
        u = rng.random()
        p[42] = (1 if u < .12 else 3 if u < .15 else 4 if u < .17 else 0) if female else (2 if u < .10 else 3 if u < .14 else 4 if u < .17 else 0)
        p[43:46] = _hsv(rng.random(), rng.uniform(.05, .7), rng.uniform(.2, .9))
        p[46] = rng.uniform(.5, 1) if old else rng.uniform(0, .2)
        p[47] = (rng.choice([0, 1, 2]) if female and p[42] != 1 else 0)
        p[48:51] = _hsv(rng.random(), rng.uniform(0, .2), rng.uniform(.82, .98)) if rng.random() < .75 else _hsv(rng.random(), .5, .5)
        p[51], p[52] = rng.uniform(.4, 1) if female else rng.uniform(0, .3), 0 if female else rng.uniform(0, .7)
    return out


def smooth_noise(b, t, tau, g, device):
    """Gaussian-filtered noise of unit variance, [b, t]; tau [frames]"""
    k = int(tau * 3) | 1
    z = torch.randn(b, 1, t + 2 * (k // 2), generator=g, device=device)
    x = torch.arange(k, device=device).float() - k // 2
    w = torch.exp(-.5 * (x / (tau * .7)) ** 2)
    return F.conv1d(z, (w / w.pow(2).sum().sqrt())[None, None])[:, 0, :t]


def controls(b, t, g, device, energy=None, blinks=1 / 45):
    """[b, t, 10]: a wide liveliness process (25 fps): sway, nods, saccades, blinks of 120-250 ms (`blinks` a frame), brows, smiles, and stillness."""
    noise = lambda tau: smooth_noise(b, t, tau, g, device)
    uniform = lambda *s: torch.rand(*s, generator=g, device=device)
    e = torch.zeros(b, t, device=device) if energy is None else energy
    amount = uniform(b, 1) * 1.3 * (uniform(b, 1) > .08)               # per clip: from frozen to lively
    tempo = uniform(b, 1)
    mixed = lambda slow, fast: tempo * noise(slow) + (1 - tempo) * .8 * noise(fast)
    frame = torch.arange(t, device=device)[None]
    start = (uniform(b, 1) * t * 1.5 - t * .25)
    nod = torch.sin((frame - start) * (.25 + .35 * uniform(b, 1))) * torch.exp(-(frame - start).clamp(min=0) / 12) * (frame > start)
    nod = nod * (uniform(b, 1) < .35) * (uniform(b, 1) - .3) * .5
    yaw = amount * (.24 * mixed(24, 10) + .05 * noise(5))
    pitch = amount * (.17 * mixed(22, 9) + .05 * noise(5) + .16 * (e - .3)) + nod
    roll = amount * (.022 * noise(26) + .006 * noise(7))
    dx = amount * (.012 * noise(30) + .012 * yaw)
    dy = amount * (.007 * noise(24) + .008 * pitch)
    blink = torch.zeros(b, t, device=device)
    begin = (uniform(b, t) < blinks).float()
    length, depth = 3 + uniform(b, 1) * 3.5, torch.where(uniform(b, 1) < .8, torch.ones(b, 1, device=device), .5 + .5 * uniform(b, 1))
    for i in range(min(7, t)):
        phase = torch.tensor(float(i), device=device) + .3 + .5 * uniform(b, 1)
        shape = (1.7 * torch.minimum(phase / (.30 * length), (length + .6 - phase) / (.70 * length))).clamp(0, 1)
        blink[:, i:] = torch.maximum(blink[:, i:], begin[:, :t - i] * shape * depth)
    held = torch.round(noise(14) * 1.2) * .32 + .10 * noise(10)
    gaze_x = held - .30 * yaw * (uniform(b, 1) < .7)
    gaze_y = torch.round(noise(16) * .9) * .25 + .06 * noise(10)
    soft = lambda z: F.avg_pool1d(F.pad(z[:, None], (1, 0), mode="replicate"), 2, 1)[:, 0]
    gaze = amount.clamp(max=1)
    brow = .22 * noise(13) + .35 * (e - .35) * uniform(b, 1) * 2
    smile = .32 + .26 * noise(32) + .10 * noise(10)
    out = torch.stack([yaw, pitch, roll, dx, dy, blink, soft(gaze_x) * gaze, soft(gaze_y) * gaze, brow, smile], -1)
    low, high = torch.tensor(CONTROL_RANGE, device=device).T
    return torch.minimum(torch.maximum(out, low), high)


def assemble(ident, control, viseme):
    """ident [B, 56], control [B, T, 10], viseme [B, T, 6] -> [B, T, 72]"""
    return torch.cat([ident[:, None].expand(-1, control.shape[1], -1), control, viseme], -1)


def neutral(ident):
    """[B, 1, 72]: the pose of the built-in portraits"""
    at = lambda v: torch.tensor(v, device=ident.device).expand(len(ident), 1, -1)
    return assemble(ident, at(NEUTRAL), at(REST_VISEMES))


def mouth(visemes):
    """[..., 6] -> [..., 4]: opening, width, press, fv as the probe reads them.  The formulas are presenter.h's mouth()."""
    jaw, width, press, fv, tongue, upper = visemes.unbind(-1)
    rounded, spread, free = (-width).clamp(min=0), width.clamp(min=0), 1 - press
    h = .20 * jaw * free * (1 - .25 * rounded) + .012 * free * (jaw * 6).clamp(max=1) + .022 * upper * free
    h = h * (1 - .55 * fv) + .018 * fv + .012 * tongue * free
    w = 1 + .20 * spread - .42 * rounded - .06 * jaw
    return torch.stack([h * 10, w * 3, press, fv], -1)


def readings(p):
    """What the probe reads of [..., 72]: `mouth`, then ten scaled controls"""
    return torch.cat([mouth(p[..., 66:72]), p[..., 56:66] * torch.tensor(CONTROL_SCALE, device=p.device)], -1)


_library = {}


def _rendered(name, planes, p, size):
    p = p.reshape(-1, PARAMETERS).float().contiguous()
    out = torch.empty(p.shape[0], *planes, size, size, dtype=torch.uint8, device=p.device)
    kind = "gpu" if p.is_cuda else "cpu"
    if kind not in _library:
        _library[kind] = ctypes.CDLL(os.environ.get("POCKET_RENDER_" + kind.upper(), os.path.join(HERE, "..", "render", f"librender_{kind}.so")))
    run = getattr(_library[kind], name)
    for i in range(0, p.shape[0], 16384):
        q, o = p[i:i + 16384], out[i:i + 16384]
        arguments = [ctypes.c_void_p(q.data_ptr()), ctypes.c_void_p(o.data_ptr()), ctypes.c_int(q.shape[0]), ctypes.c_int(size)]
        if p.is_cuda:
            error = run(*arguments, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
            if error:
                raise RuntimeError(f"CUDA error {error} in the renderer")
        else:
            run(*arguments)
    return out


def render(p, size=256):
    """[N, 72] -> u8 [N, 3, size, size] on the same device"""
    return _rendered("render", (3,), p, size)


def render_matte(p, size=256):
    """[N, 72] -> u8 [N, size, size]: how much the presenter covers the background"""
    return _rendered("render_matte", (), p, size)
