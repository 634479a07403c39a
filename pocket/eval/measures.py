"""What the evaluation counts, from pictures and from what the probe reads of them."""
import numpy as np
import torch
import torch.nn.functional as F

OPEN, SHUT = .70, .22                  # readings of the opening (10 H): clearly open; lips together
BLINK = 4 + 5                          # column of the probe's blink, which reads 2 when the eyes are shut
SCALES = (.0448, .2856, .3001, .2363, .1333)    # multi-scale SSIM, Wang, Simoncelli and Bovik 2003


def correlation(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt().clamp(min=1e-12))


def best_lag(got, want, most=6):
    """positive: the generated mouth is late"""
    r = {l: correlation(got[most + l:len(got) - most + l], want[most:len(want) - most]) for l in range(-most, most + 1)}
    return max(r, key=r.get)


def runs(mask, shortest=1):
    """[(start, end)] of stretches where `mask` holds"""
    out, start = [], None
    for i, m in enumerate([*mask.tolist(), False]):
        if m and start is None:
            start = i
        if not m and start is not None:
            if i - start >= shortest:
                out.append((start, i))
            start = None
    return out


def similarity(x, y):
    """SSIM and multi-scale SSIM of u8 [N, 3, H, W], of grey values in windows of 11 pixels"""
    grey = torch.tensor([.299, .587, .114]).view(1, 3, 1, 1)
    a, b = (x.float() * grey).sum(1, keepdim=True), (y.float() * grey).sum(1, keepdim=True)
    k = torch.exp(-.5 * (torch.arange(-5, 6) / 1.5) ** 2)
    k = (k / k.sum()).view(1, 1, 1, 11)
    blur = lambda t: F.conv2d(F.conv2d(t, k), k.transpose(2, 3))
    product, first = 1., None
    for weight in SCALES:
        ma, mb = blur(a), blur(b)
        va, vb, cv = blur(a * a) - ma ** 2, blur(b * b) - mb ** 2, blur(a * b) - ma * mb
        contrast = (2 * cv + 58.5) / (va + vb + 58.5)
        whole = ((2 * ma * mb + 6.5) / (ma ** 2 + mb ** 2 + 6.5) * contrast).mean((1, 2, 3))
        first = whole if first is None else first
        product = product * (whole if weight == SCALES[-1] else contrast.mean((1, 2, 3))).clamp(min=1e-6) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return float(first.mean()), float(product.mean())


def scaled(box, size):
    return tuple(slice(s.start * size // 256, s.stop * size // 256) for s in box)


class Errors:
    """Squared errors of whole pictures, mouths and eyes; SSIM and multi-scale SSIM of every eighth frame."""

    def __init__(self, mouth, eyes):
        self.boxes, self.sums, self.n, self.alike, self.seen = (mouth, eyes), np.zeros(3), 0, [], 0

    def add(self, x, y):
        """u8 [N, 3, H, W]"""
        d = (x.float() - y.float()).pow(2)
        self.sums += [d.mean().item() * len(x)] + [d[(..., *scaled(box, x.shape[-1]))].mean().item() * len(x) for box in self.boxes]
        self.n += len(x)
        if self.seen % 2 == 0:
            self.alike.append(similarity(x[:1], y[:1]))
        self.seen += 1

    def report(self):
        p = 10 * np.log10(255 ** 2 / np.maximum(self.sums / max(1, self.n), 1e-3))
        s = np.mean(self.alike, 0)
        return {"psnr": round(float(p[0]), 2), "mouth_psnr": round(float(p[1]), 2), "eyes_psnr": round(float(p[2]), 2), "ssim": round(float(s[0]), 4), "ms_ssim": round(float(s[1]), 4)}


def resting(visemes):
    """[F] where the truth has been at rest for a while"""
    still = torch.zeros(len(visemes), dtype=torch.bool)
    for a, b in runs((visemes[:, 0] < .03) & (visemes[:, 2] < .2) & (visemes[:, 5] < .05), 10):
        still[a + 4:b - 2] = True
    return still


def speech_measures(read, true, visemes):
    """read, true [F, 14] probe readings and truth; visemes [F, 6] truth"""
    events = runs(visemes[:, 2] > .6)
    caught = [bool(read[max(0, a - 1):b + 1, 0].min() < SHUT) for a, b in events]
    still, wide = resting(visemes), true[:, 0] > OPEN
    out = {"opening_r": correlation(read[:, 0], true[:, 0]), "opening_lag": best_lag(read[:, 0], true[:, 0]), "opening_gain": float(read[:, 0].std() / true[:, 0].std()),
           "width_r": correlation(read[:, 1], true[:, 1]), "closures": len(events), "closures_caught": sum(caught),
           "open_called_shut": float((read[wide, 0] < SHUT).float().mean()) if wide.any() else 0.}
    if still.any():
        motion = read[:, 0].diff(prepend=read[:1, 0]).abs()
        out.update(silent_frames=int(still.sum()), silent_opening_mean=float(read[still, 0].mean()), silent_opening_p95=float(read[still, 0].quantile(.95)),
                   silent_motion=float(motion[still].mean() / motion[~still].mean()))
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in out.items()}


def life_measures(read, changes, controls, fps=25):
    """read [F, 14]; changes [F-1] mean absolute difference of neighbouring frames (of 255); controls [F, 10] that drove them"""
    shut = read[:, BLINK] > 1.
    frozen = max((b - a for a, b in runs(changes < .02)), default=0)
    c = controls
    return {"blinks": len(runs(shut)), "seconds": round(len(read) / fps, 1), "longest_frozen_s": round(frozen / fps, 2),
            "yaw_most": round(float(c[:, 0].abs().max()), 3), "pitch_most": round(float(c[:, 1].abs().max()), 3), "roll_most": round(float(c[:, 2].abs().max()), 3),
            "yaw_speed_p99": round(float(c[:, 0].diff().abs().quantile(.99)) * fps, 3)}


def loudness_r(opening, audio):
    """Correlation of a reading of the opening [F] with the logarithm of the loudness of its frames of 640 samples"""
    n = min(len(opening), len(audio) // 640)
    power = torch.from_numpy(audio[:n * 640].reshape(-1, 640) ** 2).mean(1)
    return round(correlation(opening[:n], torch.log10(power + 1e-6)), 3)
