"""Held-out evaluation of the pocket model, streamed as it runs.

    python evaluate.py AUDIO_DIR OUT_DIR [--engine torch | --engine path/to/loquent [--options "..."]] [--size 384] [--noise A,B]
                       [--human DIR] [--drift SECONDS] [--sheets]

AUDIO_DIR comes from `python ../train/speech.py eval 900 AUDIO_DIR` (held-out voices and texts; each clip has its
true visemes).  Faces are drawn from a seed no training run used.  Truth is rendered with the very controls the
engine used (torch: the training process with another seed; a binary: its --trace), so every pixel has an answer.
Writes OUT_DIR/report.json, contact sheets (truth above, generated below) and REPORT.md.
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np
import torch
from safetensors.torch import load_file

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "train"))
import presenters as ps                # noqa: E402
from audio import read_wave, write_wave    # noqa: E402
import weights                         # noqa: E402
from data import loudness              # noqa: E402
from measures import Errors, correlation, life_measures, loudness_r, speech_measures    # noqa: E402
from model import Probe                # noqa: E402
from report import write_report        # noqa: E402
from streaming import Pocket           # noqa: E402

FACES_SEED = 4242
VISEMES = ("jaw", "width", "press", "fv", "tongue", "upper")
SHEETS = ("en", "de", "zh", "ar")


class TorchEngine:
    name = "torch"

    def __init__(self, net, steps, size):
        self.net, self.steps, self.size = net, steps, size

    def run(self, portrait, audio, seed, every=1):
        """yields (first frame, controls [4, 10], frames u8 [4, 3, 256, 256]) of every `every`-th block"""
        n = len(audio) // 2560
        _, features, visemes = self.net.features(audio)
        g = torch.Generator().manual_seed(seed)
        c = ps.controls(1, 4 * n, g, "cpu", loudness(visemes[None, :4 * n].clamp(0, 1)))[0]
        stream = self.net.open(self.net.encode_picture(portrait), self.steps, self.size)
        for b in range(n):
            at = slice(4 * b, 4 * b + 4)
            frames = stream.next(features[at], c[at], torch.randn(16, 32, 32, generator=g), show=b % every == 0)
            if frames is not None:
                yield 4 * b, c[at], frames[:, :3]


class BinaryEngine:
    def __init__(self, path, options, size):
        self.path, self.options, self.name, self.size = path, options.split(), os.path.basename(path), size

    def run(self, portrait, audio, seed, every=1):
        with tempfile.TemporaryDirectory() as folder:
            at = lambda n: os.path.join(folder, n)
            cv2.imwrite(at("p.png"), portrait.permute(1, 2, 0).numpy()[..., ::-1])
            write_wave(at("a.wav"), audio)
            subprocess.run([self.path, "generate", "--image", at("p.png"), "--audio", at("a.wav"), "--out", at("v.mp4"), "--seed", str(seed),
                            "--trace", at("t.jsonl"), "--raw-frames", at("f.rgb"), *self.options], check=True, stdout=subprocess.DEVNULL)
            with open(at("t.jsonl")) as f:
                lines = [json.loads(line) for line in f if line.strip()]
            c = torch.tensor([line["controls"] for line in sorted((x for x in lines if "controls" in x), key=lambda x: x["frame"])])
            frames = np.memmap(at("f.rgb"), np.uint8, "r").reshape(-1, self.size, self.size, 3)
            for i in range(0, min(len(c), len(frames)) // 4 * 4, 4 * every):
                yield i, c[i:i + 4], torch.from_numpy(frames[i:i + 4].copy()).permute(0, 3, 1, 2)


def read_probe(probe, frames):
    shrink = lambda q: q if q.shape[-1] == 256 else torch.nn.functional.interpolate(q, (256, 256), mode="area")
    return torch.cat([probe(shrink(q.float()) / 127.5 - 1) for q in frames.split(32)])


def sheet(path, rows, width=144):
    """Rows of u8 pictures [3, H, W] as one file"""
    small = lambda x: cv2.resize(x.permute(1, 2, 0).numpy()[..., ::-1], (width, width), interpolation=cv2.INTER_AREA)
    cv2.imwrite(path, np.concatenate([np.concatenate([small(x) for x in row], 1) for row in rows], 0), [cv2.IMWRITE_JPEG_QUALITY, 85])


def rounded(x):
    return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else round(x, 4) if isinstance(x, float) else x


class Evaluation:
    def __init__(self, args):
        self.args, self.size = args, args.size
        tensors, config = weights.read(args.weights)
        self.net, steps = Pocket(tensors, config), args.steps or config["default_steps"]
        self.probe = Probe()
        self.probe.load_state_dict({k: v.float() for k, v in load_file(os.path.join(HERE, "probe.safetensors")).items()})
        self.probe.eval()
        self.engine = TorchEngine(self.net, steps, args.size) if args.engine == "torch" else BinaryEngine(args.engine, args.options, args.size)
        with open(os.path.join(args.audio, "index.json")) as f:
            self.index = [e for e in json.load(f) if not args.clips or e["name"] in args.clips.split(",")]
        self.faces = torch.from_numpy(ps.identity(np.random.default_rng(FACES_SEED), 64))
        self.report = {"engine": self.engine.name, "size": args.size, "clips": {}}
        self.pools = {}

    def portrait(self, face):
        return ps.render(ps.neutral(face), max(self.size, 256))[0]

    def errors(self):
        return Errors(ps.MOUTH_BOX, ps.EYES_BOX)

    def clip(self, name):
        """audio, visemes [F, 6]"""
        audio = read_wave(os.path.join(self.args.audio, name + ".wav"))[0][:int(self.args.seconds * 25) // 4 * 2560]
        return audio, torch.from_numpy(np.load(os.path.join(self.args.audio, name + ".npz"))["visemes"])[:len(audio) // 640]

    def streamed(self, face, audio, visemes, seed, errors=(), keep=()):
        """probe readings, truth, changes of neighbouring frames, controls, and (generated, truth) at the frames in `keep`"""
        read, want, changes, controls, kept, last = [], [], [], [], {}, None
        for i, c, frames in self.engine.run(self.portrait(face), audio, seed):
            p = ps.assemble(face, c[None], visemes[None, i:i + 4])
            read.append(read_probe(self.probe, frames)), want.append(ps.readings(p)[0]), controls.append(c)
            both = frames if last is None else torch.cat([last, frames])
            changes.append((both[1:].float() - both[:-1].float()).abs().mean((1, 2, 3)))
            last = frames[-1:]
            if errors or any(i <= k < i + 4 for k in keep):
                true = ps.render(p, self.size)
                for e in errors:
                    e.add(frames, true)
                kept.update({k: (frames[k - i].clone(), true[k - i]) for k in keep if i <= k < i + 4})
        return torch.cat(read), torch.cat(want), torch.cat(changes), torch.cat(controls), kept

    def autoencoder(self, face, controls, visemes, errors):
        """The autoencoder alone, a second of it"""
        memory = None
        for b in range(min(6, len(controls) // 4)):
            p = ps.assemble(face, controls[None, 4 * b:4 * b + 4], visemes[None, 4 * b:4 * b + 4])
            seen = ps.render(p, self.net.c.get("reference_size", 256)).float() / 127.5 - 1
            frames, memory = self.net.decode(self.net.encode(seen), memory, self.size)
            errors.add(((frames[:, :3] + 1) * 127.5).round().clamp(0, 255).byte(), ps.render(p, self.size))

    def pool(self, name, **tensors):
        for k, t in tensors.items():
            self.pools.setdefault(name, {}).setdefault(k, []).append(t)

    def clips(self):
        every, recon, groups = self.errors(), self.errors(), {}
        for k, entry in enumerate(self.index):
            name, started = entry["name"], time.time()
            audio, visemes = self.clip(name)
            face, errors, n = self.faces[k:k + 1], self.errors(), len(visemes)
            group = groups.setdefault(entry["language"], self.errors())
            keep = [30 + 5 * j for j in range(10) if 30 + 5 * j < n // 4 * 4]
            read, want, changes, controls, kept = self.streamed(face, audio, visemes, 1000 + k, (errors, every, group), keep)
            n = len(read)
            self.autoencoder(face, controls, visemes, recon)
            heard = self.net.features(audio)[2][:n]
            row = {"language": entry["language"], **errors.report(), **speech_measures(read, want, visemes[:n]), **life_measures(read, changes, controls),
                   "loudness_r": loudness_r(read[:, 0], audio), "audio_net_r": {q: correlation(heard[:, j], visemes[:n, j]) for j, q in enumerate(VISEMES)},
                   "controls_r": {q: correlation(read[:, 4 + j], want[:, 4 + j]) for j, q in enumerate(ps.CONTROL_NAMES)}, "seconds_spent": time.time() - started}
            self.report["clips"][name] = rounded(row)
            for group_name in ("all", entry["language"]):
                self.pool(group_name, read=read, want=want, visemes=visemes[:n], heard=heard, changes=changes, controls=controls)
            sheet(os.path.join(self.args.out, name + ".jpg"), [[kept[j][1] for j in keep], [kept[j][0] for j in keep]])
            print(name, {q: self.report["clips"][name][q] for q in ("psnr", "mouth_psnr", "opening_r", "width_r", "opening_lag", "closures", "closures_caught")}, flush=True)
        rows = self.report["clips"]
        joined = {}
        for group, tensors in self.pools.items():
            t = {k: torch.cat(v) for k, v in tensors.items()}
            mine = [r for r in rows.values() if group in ("all", r["language"])]
            lags = [r["opening_lag"] for r in mine]
            joined[group] = {**(every if group == "all" else groups[group]).report(), **speech_measures(t["read"], t["want"], t["visemes"]), **life_measures(t["read"], t["changes"], t["controls"]),
                             "opening_lag": max(lags, key=abs), "clips": len(mine), "longest_frozen_s": max(r["longest_frozen_s"] for r in mine),
                             "closures": sum(r["closures"] for r in mine), "closures_caught": sum(r["closures_caught"] for r in mine), "loudness_r": float(np.mean([r["loudness_r"] for r in mine])),
                             "audio_net_r": {q: correlation(t["heard"][:, j], t["visemes"][:, j]) for j, q in enumerate(VISEMES)},
                             "controls_r": {q: correlation(t["read"][:, 4 + j], t["want"][:, 4 + j]) for j, q in enumerate(ps.CONTROL_NAMES)}}
            joined[group]["closures_share"] = joined[group]["closures_caught"] / max(1, joined[group]["closures"])
            joined[group]["blinks_a_minute"] = joined[group]["blinks"] * 60 / joined[group]["seconds"]
        self.report["all"] = rounded({**joined.pop("all"), "autoencoder_alone": recon.report()})
        self.report["languages"] = rounded(joined)

    def noise(self):
        """The same clips with noise at 10 dB; and noise alone"""
        rows = []
        for k, entry in enumerate(self.index):
            if entry["name"] not in self.args.noise.split(","):
                continue
            audio, visemes = self.clip(entry["name"])
            x = np.random.default_rng(k).normal(size=len(audio)).astype(np.float32)
            if k % 2:                                                     # every other clip: brownish noise, as from a fan
                x = np.convolve(x, np.exp(-np.arange(64) / 12).astype(np.float32), "same")
            x *= np.sqrt((audio ** 2).mean() / (x ** 2).mean() / 10)
            read, want, *_ = self.streamed(self.faces[k:k + 1], audio + x, visemes, 1000 + k)
            alone = self.streamed(self.faces[k:k + 1], x[:2560 * 25], visemes * 0, 1000 + k)[0]
            row = speech_measures(read, want, visemes[:len(read)])
            rows.append({"clip": entry["name"], **row, "cost": self.report["clips"][entry["name"]]["opening_r"] - row["opening_r"],
                         "alone_opening_mean": float(alone[8:, 0].mean()), "alone_opening_p95": float(alone[8:, 0].quantile(.95))})
        if rows:
            mean = lambda q: float(np.mean([r[q] for r in rows if q in r]))
            self.report["noise_10db"] = rounded({"clips": [r["clip"] for r in rows], **{q: mean(q) for q in ("opening_r", "cost", "silent_opening_mean", "alone_opening_mean", "alone_opening_p95")},
                                                 "closures_share": sum(r["closures_caught"] for r in rows) / max(1, sum(r["closures"] for r in rows))})

    def human(self):
        """Recordings of people: what the picture's mouth does against loudness, beside the same of the synthetic clips"""
        self.report["human"] = {"synthetic": self.report["all"]["loudness_r"]}
        for k, path in enumerate(sorted(glob.glob(os.path.join(self.args.human, "*.wav")))):
            raw = subprocess.run(["ffmpeg", "-v", "error", "-i", path, "-t", str(self.args.seconds), "-ac", "1", "-ar", "16000", "-f", "f32le", "-"], capture_output=True, check=True).stdout
            x = np.frombuffer(raw, np.float32).copy()
            x = x[:len(x) // 2560 * 2560] / np.abs(x).max() * .5
            read = self.streamed(self.faces[50 + k:51 + k], x, torch.zeros(len(x) // 640, 6), 3000 + k)[0]
            self.report["human"][os.path.basename(path)] = {"loudness_r": loudness_r(read[:, 0], x), "heard_jaw_loudness_r": loudness_r(self.net.features(x)[2][:, 0], x)}

    def drift(self):
        """One long stream of everything, over and over"""
        pieces = [self.clip(e["name"]) for e in self.index]
        audio, visemes = np.concatenate([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])
        n = int(self.args.drift * 25) // 4
        times = -(-4 * n // len(visemes))
        audio, visemes = np.tile(audio, times)[:n * 2560], visemes.repeat(times, 1)
        face, window = self.faces[41:42], min(7500, 4 * n // 4)             # the first and the last five minutes
        ends = [(self.errors(), [], []), (self.errors(), [], [])]
        strip = []
        for i, c, frames in self.engine.run(self.portrait(face), audio, 77):
            k = 0 if i < window else 1 if i >= 4 * n - window else None
            shown = i % (4 * n // 10 // 4 * 4) == 0
            if k is None and not shown:
                continue
            p = ps.assemble(face, c[None], visemes[None, i:i + 4])
            if k is not None:
                ends[k][1].append(read_probe(self.probe, frames)), ends[k][2].append(ps.readings(p)[0])
            if i % 16 == 0 or shown:
                true = ps.render(p, self.size)
                if k is not None:
                    ends[k][0].add(frames, true)
                if shown:
                    strip.append((true[0], frames[0].clone()))
        parts = []
        for errors, read, want in ends:
            read, want = torch.cat(read), torch.cat(want)
            parts.append({**errors.report(), "opening_r": correlation(read[:, 0], want[:, 0]), "width_r": correlation(read[:, 1], want[:, 1]), "blink_r": correlation(read[:, 9], want[:, 9])})
        self.report["drift"] = rounded({"seconds": self.args.drift, "first": parts[0], "last": parts[1], "worst_loss": max((parts[0][q] - parts[1][q]) / parts[0][q] for q in parts[0])})
        sheet(os.path.join(self.args.out, "drift.jpg"), [[a for a, _ in strip], [b for _, b in strip]])

    def sheets(self):
        """The built-in presenters in four languages: truth and generated side by side"""
        with open(os.path.join(HERE, "..", "presenters", "presenters.json")) as f:
            cast = json.load(f)
        for language in SHEETS:
            name = next((e["name"] for e in self.index if e["language"] == language), None)
            if name is None:
                continue
            audio, visemes = self.clip(name)
            audio, visemes, keep, rows = audio[:2560 * 15], visemes[:60], (22, 34, 46, 58), []
            for k, who in enumerate(cast):
                kept = self.streamed(torch.tensor([who["identity"]]), audio, visemes, 500 + k, keep=keep)[-1]
                rows.append([x for j in keep for x in (kept[j][1], kept[j][0])])
            sheet(os.path.join(self.args.out, f"cast-{language}.jpg"), rows, 128)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("audio")
    parser.add_argument("out")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--options", default="", help="more words for the binary's command line")
    parser.add_argument("--size", type=int, default=256, help="of the pictures the engine gives")
    parser.add_argument("--weights", default=os.path.join(HERE, "..", "pocket.safetensors"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, default=12, help="of each clip")
    parser.add_argument("--clips", help="comma-separated names; default all")
    parser.add_argument("--drift", type=float, default=0, help="seconds of one long stream; 3600 is the requirement")
    parser.add_argument("--human", help="folder of recordings of people; the mouth is compared with their loudness")
    parser.add_argument("--noise", default="en-en-us,de-de,zh-cmn", help="clips that are also heard with noise at 10 dB; empty for none")
    parser.add_argument("--sheets", action="store_true", help="contact sheets of the cast in four languages")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.makedirs(args.out, exist_ok=True)
    run = Evaluation(args)
    for part, wanted in (("clips", True), ("noise", True), ("human", args.human), ("drift", args.drift), ("sheets", args.sheets)):
        if wanted:
            getattr(run, part)()
            with open(os.path.join(args.out, "report.json"), "w") as f:
                json.dump(run.report, f, indent=1)
            write_report(run.report, args.out)


if __name__ == "__main__":
    main()
