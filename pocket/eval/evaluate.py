"""Held-out evaluation of the pocket model, streamed as it runs.

    python evaluate.py AUDIO_DIR OUT_DIR [--engine torch | --engine path/to/loquent] [--steps N] [--drift SECONDS] [--human DIR]

AUDIO_DIR comes from `python ../train/speech.py eval 900 AUDIO_DIR` (held-out voices and texts; each clip has its
true visemes).  Faces are drawn from a seed no training run used.  Truth is rendered with the very controls the
engine used (torch: the training process with another seed; a binary: its --trace), so every pixel has an answer.
Writes OUT_DIR/report.json and contact sheets (truth above, generated below).
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
import wave

import cv2
import numpy as np
import torch
from safetensors.torch import load_file

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "train"))
import presenters as ps                # noqa: E402
import weights                         # noqa: E402
from data import loudness              # noqa: E402
from model import Probe                # noqa: E402
from streaming import Pocket           # noqa: E402

FACES_SEED = 4242
MOUTH, EYES = ps.MOUTH_BOX, ps.EYES_BOX
OPEN, SHUT = .70, .22                  # readings of the opening (10 H): clearly open; lips together


def read_wav(path):
    with wave.open(path) as w:
        assert w.getframerate() == 16000 and w.getnchannels() == 1, path
        return np.frombuffer(w.readframes(w.getnframes()), np.int16).astype(np.float32) / 32767


def write_wav(path, x):
    with wave.open(path, "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(16000)
        w.writeframes((np.clip(x, -1, 1) * 32767).astype(np.int16).tobytes())


class TorchEngine:
    name = "torch"

    def __init__(self, net, steps):
        self.net, self.steps = net, steps

    def run(self, portrait, audio, seed, every=1):
        """yields (first frame, controls [4, 10], frames u8 [4, 3, 256, 256]) of every `every`-th block"""
        n = len(audio) // 2560
        _, features, visemes = self.net.features(audio)
        g = torch.Generator().manual_seed(seed)
        c = ps.controls(1, 4 * n, g, "cpu", loudness(visemes[None, :4 * n].clamp(0, 1)))[0]
        stream = self.net.open(self.net.encode_picture(portrait), self.steps)
        for b in range(n):
            at = slice(4 * b, 4 * b + 4)
            frames = stream.next(features[at], c[at], torch.randn(16, 32, 32, generator=g), show=b % every == 0)
            if frames is not None:
                yield 4 * b, c[at], frames


class BinaryEngine:
    def __init__(self, path, steps):
        self.path, self.name = path, os.path.basename(path)

    def run(self, portrait, audio, seed, every=1):
        with tempfile.TemporaryDirectory() as folder:
            at = lambda n: os.path.join(folder, n)
            cv2.imwrite(at("p.png"), portrait.permute(1, 2, 0).numpy()[..., ::-1])
            write_wav(at("a.wav"), audio)
            subprocess.run([self.path, "generate", "--image", at("p.png"), "--audio", at("a.wav"), "--out", at("v.mp4"), "--seed", str(seed),
                            "--trace", at("t.jsonl"), "--raw-frames", at("f.rgb")], check=True, stdout=subprocess.DEVNULL)
            with open(at("t.jsonl")) as f:
                lines = [json.loads(line) for line in f if line.strip()]
            c = torch.tensor([line["controls"] for line in sorted((x for x in lines if "controls" in x), key=lambda x: x["frame"])])
            frames = np.memmap(at("f.rgb"), np.uint8, "r").reshape(-1, 256, 256, 3)
            for i in range(0, min(len(c), len(frames)) // 4 * 4, 4 * every):
                yield i, c[i:i + 4], torch.from_numpy(frames[i:i + 4].copy()).permute(0, 3, 1, 2)


# ------------------------------------------------------------------ measures
def correlation(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt().clamp(min=1e-12))


def best_lag(got, want, most=6):
    """positive: the generated mouth is late"""
    r = {l: correlation(got[most + l:len(got) - most + l], want[most:len(want) - most]) for l in range(-most, most + 1)}
    return max(r, key=r.get)


class Errors:
    """Squared errors of whole pictures, mouths and eyes; and SSIM of some frames."""

    def __init__(self):
        self.sums, self.n, self.ssims = np.zeros(3), 0, []

    def add(self, x, y):
        d = (x.float() - y.float()).pow(2)
        self.sums += [d.mean().item() * len(x), d[..., MOUTH[0], MOUTH[1]].mean().item() * len(x), d[..., EYES[0], EYES[1]].mean().item() * len(x)]
        self.n += len(x)
        pool = lambda t: torch.nn.functional.avg_pool2d(t, 8, 4)
        a, b = x[:1].float(), y[:1].float()
        ma, mb = pool(a), pool(b)
        va, vb, cv = pool(a * a) - ma ** 2, pool(b * b) - mb ** 2, pool(a * b) - ma * mb
        self.ssims.append(float((((2 * ma * mb + 6.5) * (2 * cv + 58.5)) / ((ma ** 2 + mb ** 2 + 6.5) * (va + vb + 58.5))).mean()))

    def report(self):
        p = 10 * np.log10(255 ** 2 / (self.sums / max(1, self.n)))
        return {"psnr": round(float(p[0]), 2), "mouth_psnr": round(float(p[1]), 2), "eyes_psnr": round(float(p[2]), 2), "ssim": round(float(np.mean(self.ssims)), 4)}


def runs(mask, shortest=1):
    out, start = [], None
    for i, m in enumerate([*mask.tolist(), False]):
        if m and start is None:
            start = i
        if not m and start is not None:
            if i - start >= shortest:
                out.append((start, i))
            start = None
    return out


def speech_measures(read, true, visemes):
    """read, true [F, 14] probe readings and truth; visemes [F, 6] truth"""
    events = runs(visemes[:, 2] > .6)
    caught = [bool(read[max(0, a - 1):b + 1, 0].min() < SHUT) for a, b in events]
    still = torch.zeros(len(visemes), dtype=torch.bool)
    for a, b in runs((visemes[:, 0] < .03) & (visemes[:, 2] < .2) & (visemes[:, 5] < .05), 10):
        still[a + 4:b - 2] = True
    wide = true[:, 0] > OPEN
    out = {"opening_r": correlation(read[:, 0], true[:, 0]), "opening_lag": best_lag(read[:, 0], true[:, 0]), "opening_gain": float(read[:, 0].std() / true[:, 0].std()),
           "width_r": correlation(read[:, 1], true[:, 1]), "closures": len(events), "closures_caught": sum(caught),
           "open_called_shut": float((read[wide, 0] < SHUT).float().mean()) if wide.any() else 0.}
    if still.any():
        out.update(silent_frames=int(still.sum()), silent_opening_mean=float(read[still, 0].mean()), silent_opening_p95=float(read[still, 0].quantile(.95)))
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in out.items()}


def read_probe(probe, frames):
    return torch.cat([probe(q.float() / 127.5 - 1) for q in frames.split(32)])


def sheet(path, truth, got, first, every, count=10, width=144):
    rows = []
    for z in (truth, got):
        rows.append(np.concatenate([cv2.resize(z[i].permute(1, 2, 0).numpy()[..., ::-1], (width, width), interpolation=cv2.INTER_AREA)
                                    for i in range(first, min(len(z), first + every * count), every)], 1))
    cv2.imwrite(path, np.concatenate(rows, 0))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("audio")
    parser.add_argument("out")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--weights", default=os.path.join(HERE, "..", "pocket.safetensors"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, default=12, help="of each clip")
    parser.add_argument("--clips", help="comma-separated names; default all")
    parser.add_argument("--drift", type=float, default=0, help="seconds of one long stream")
    parser.add_argument("--human", help="folder of 16 kHz recordings; only energy is compared")
    parser.add_argument("--noise", default="en-en-us,de-de,zh-cmn", help="clips that are also heard with noise at 10 dB; empty for none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.makedirs(args.out, exist_ok=True)
    tensors, config = weights.read(args.weights)
    net, steps = Pocket(tensors, config), args.steps or config["default_steps"]
    probe = Probe()
    probe.load_state_dict({k: v.float() for k, v in load_file(os.path.join(HERE, "probe.safetensors")).items()})
    probe.eval()
    engine = TorchEngine(net, steps) if args.engine == "torch" else BinaryEngine(args.engine, steps)
    with open(os.path.join(args.audio, "index.json")) as f:
        index = [e for e in json.load(f) if not args.clips or e["name"] in args.clips.split(",")]
    faces = torch.from_numpy(ps.identity(np.random.default_rng(FACES_SEED), 64))
    report = {"engine": engine.name, "steps": steps, "clips": {}}
    everything = {"read": [], "true": [], "vis": [], "audio": [], "probe": []}
    total, recon, noise_rows = Errors(), Errors(), []
    for k, entry in enumerate(index):
        audio = read_wav(os.path.join(args.audio, entry["name"] + ".wav"))[:int(args.seconds * 25) // 4 * 2560]
        visemes = torch.from_numpy(np.load(os.path.join(args.audio, entry["name"] + ".npz"))["visemes"])
        face = faces[k:k + 1]
        portrait = ps.render(ps.neutral(face))[0]
        errors, got, truth, params, started = Errors(), [], [], [], time.time()
        for i, c, frames in engine.run(portrait, audio, 1000 + k):
            p = ps.assemble(face, c[None], visemes[None, i:i + 4])
            true = ps.render(p)
            got.append(frames), truth.append(true), params.append(p[0])
            errors.add(frames, true), total.add(frames, true)
        got, truth, params = torch.cat(got), torch.cat(truth), torch.cat(params)
        n = len(got)
        memory, few = None, []
        for b in range(min(6, n // 4)):                                   # the autoencoder alone, a second of it
            frames, memory = net.decode(net.encode(truth[4 * b:4 * b + 4].float() / 127.5 - 1), memory)
            recon.add(((frames + 1) * 127.5).round().clamp(0, 255).byte(), truth[4 * b:4 * b + 4])
        read, want, v = read_probe(probe, got), ps.readings(params), visemes[:n]
        _, _, heard = net.features(audio)
        row = {**errors.report(), **speech_measures(read, want, v),
               "audio_net_r": {q: round(correlation(heard[:n, j], v[:, j]), 3) for j, q in ((0, "jaw"), (1, "width"), (2, "press"))},
               "controls_r": {q: round(correlation(read[:, 4 + j], want[:, 4 + j]), 3) for j, q in enumerate(ps.CONTROL_NAMES)}, "seconds": round(time.time() - started, 1)}
        report["clips"][entry["name"]] = row
        for q, t in (("read", read), ("true", want), ("vis", v), ("audio", heard[:n]), ("probe", read_probe(probe, truth[::4]))):
            everything[q].append(t)
        everything.setdefault("probe_true", []).append(want[::4])
        sheet(os.path.join(args.out, entry["name"] + ".png"), truth, got, min(30, n // 4), 5)
        print(entry["name"], {q: row[q] for q in ("psnr", "mouth_psnr", "eyes_psnr", "opening_r", "opening_lag", "closures", "closures_caught")}, flush=True)
        if entry["name"] in args.noise.split(","):
            g = np.random.default_rng(k)
            x = g.normal(size=len(audio)).astype(np.float32)
            if k % 2:                                                     # every other clip: brownish noise, as from a fan
                x = np.convolve(x, np.exp(-np.arange(64) / 12).astype(np.float32), "same")
            x *= np.sqrt((audio ** 2).mean() / (x ** 2).mean() / 10)
            read = read_probe(probe, torch.cat([f for _, _, f in engine.run(portrait, audio + x, 1000 + k)]))
            alone = read_probe(probe, torch.cat([f for _, _, f in engine.run(portrait, x[:2560 * 25], 1000 + k)]))
            noise_rows.append({**speech_measures(read, want[:len(read)], v[:len(read)]), "noise_alone_opening_mean": float(alone[8:, 0].mean()),
                               "noise_alone_opening_p95": float(alone[8:, 0].quantile(.95))})
    read, want, v, heard = (torch.cat(everything[q]) for q in ("read", "true", "vis", "audio"))
    lags = [r["opening_lag"] for r in report["clips"].values()]
    closures = sum(r["closures"] for r in report["clips"].values())
    silent = [(r["silent_frames"], r["silent_opening_mean"], r["silent_opening_p95"]) for r in report["clips"].values() if "silent_frames" in r]
    report["all"] = {**total.report(), "opening_r_mean_of_clips": round(float(np.mean([r["opening_r"] for r in report["clips"].values()])), 4),
                     "opening_r": round(correlation(read[:, 0], want[:, 0]), 4), "width_r": round(correlation(read[:, 1], want[:, 1]), 4), "worst_lag": max(lags, key=abs),
                     "closures": closures, "closures_caught": round(sum(r["closures_caught"] for r in report["clips"].values()) / max(1, closures), 4),
                     "open_called_shut": round(float(np.mean([r["open_called_shut"] for r in report["clips"].values()])), 4),
                     "silent_opening_mean": round(float(np.average([s[1] for s in silent], weights=[s[0] for s in silent])), 4) if silent else None,
                     "silent_opening_p95": round(float(np.mean([s[2] for s in silent])), 4) if silent else None,
                     "audio_net_r": {q: round(correlation(heard[:, j], v[:, j]), 3) for j, q in enumerate(("jaw", "width", "press", "fv", "tongue", "upper"))},
                     "controls_r": {q: round(correlation(read[:, 4 + j], want[:, 4 + j]), 3) for j, q in enumerate(ps.CONTROL_NAMES)},
                     "autoencoder_alone": recon.report(), "probe_on_truth_opening_r": round(correlation(torch.cat(everything["probe"])[:, 0], torch.cat(everything["probe_true"])[:, 0]), 4)}
    true_probe, true_want = torch.cat(everything["probe"]), torch.cat(everything["probe_true"])
    report["all"]["controls_r_probe_on_truth"] = {q: round(correlation(true_probe[:, 4 + j], true_want[:, 4 + j]), 3) for j, q in enumerate(ps.CONTROL_NAMES)}
    if noise_rows:
        report["noise_10db"] = {q: round(float(np.mean([r[q] for r in noise_rows if q in r])), 4) for q in ("opening_r", "silent_opening_mean", "silent_opening_p95", "noise_alone_opening_mean", "noise_alone_opening_p95")}
        report["noise_10db"]["closures_caught"] = round(sum(r["closures_caught"] for r in noise_rows) / max(1, sum(r["closures"] for r in noise_rows)), 4)
    if args.human:
        report["human"] = {}
        for path in sorted(glob.glob(os.path.join(args.human, "*.wav"))):
            raw = subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-ac", "1", "-ar", "16000", "-f", "f32le", "-"], capture_output=True, check=True).stdout
            x = np.frombuffer(raw, np.float32).copy()
            _, _, heard = net.features(x / np.abs(x).max() * .5)
            power = torch.from_numpy(x[:len(heard) * 640].reshape(-1, 640) ** 2).mean(1)
            level = torch.log10(power + 1e-6)
            quiet = level < level.max() - 3.5
            report["human"][os.path.basename(path)] = {"jaw_against_log_energy_r": round(correlation(heard[:, 0], level), 3), "press_p98": round(float(heard[:, 2].quantile(.98)), 2),
                                                       "quiet_frames": int(quiet.sum()), "jaw_in_quiet": round(float(heard[quiet, 0].mean()), 3) if quiet.any() else None}
    if args.drift:
        audio = np.concatenate([read_wav(os.path.join(args.audio, e["name"] + ".wav")) for e in index])
        visemes = torch.cat([torch.from_numpy(np.load(os.path.join(args.audio, e["name"] + ".npz"))["visemes"]) for e in index])
        n = int(args.drift * 25) // 4
        times = -(-4 * n // len(visemes))
        audio, visemes = np.tile(audio, times)[:n * 2560], visemes.repeat(times, 1)
        face = faces[41:42]
        portrait, tenths, strip = ps.render(ps.neutral(face))[0], [Errors() for _ in range(10)], []
        reads, wants = [], []
        for i, c, frames in engine.run(portrait, audio, 77, every=2):
            p = ps.assemble(face, c[None], visemes[None, i:i + 4])
            part = min(9, i * 10 // (4 * n))
            if i % 16 == 0:
                true = ps.render(p)
                tenths[part].add(frames, true)
                if i % (4 * n // 10 // 16 * 16) == 0:
                    strip.append((true[0], frames[0]))
            reads.append(torch.cat([read_probe(probe, frames[1:2])[:, 0], torch.tensor([float(part)])])), wants.append(ps.readings(p)[0, 1, 0])
        reads, wants = torch.stack(reads), torch.stack(wants)
        report["drift"] = [{**t.report(), "opening_r": round(correlation(reads[reads[:, 1] == k, 0], wants[reads[:, 1] == k]), 3)} for k, t in enumerate(tenths)]
        report["drift_db"] = round(report["drift"][0]["psnr"] - report["drift"][-1]["psnr"], 2)
        sheet(os.path.join(args.out, "drift.png"), torch.stack([a for a, _ in strip]), torch.stack([b for _, b in strip]), 0, 1, 11)
    with open(os.path.join(args.out, "report.json"), "w") as f:
        json.dump(report, f, indent=1)
    print(json.dumps({q: report[q] for q in ("all", "noise_10db", "human", "drift", "drift_db") if q in report}, indent=1))


if __name__ == "__main__":
    main()
