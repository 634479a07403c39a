"""Held-out evaluation of the matte.   python matte.py POCKET.safetensors SPEECH.wav OUT_DIR [--faces 24] [--blocks 6] [--size 256]

Faces no training run has seen, streamed through the transformer as at run time; every matte is compared with the
renderer's own for the same controls.  Writes report.json and sheet.png: picture, true matte, the model's, and both laid
over stripes.
"""
import argparse
import json
import os
import sys

import cv2
import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "train"))
import presenters as ps                # noqa: E402
import weights                         # noqa: E402
from data import loudness              # noqa: E402
from audio import read_wave            # noqa: E402
from evaluate import FACES_SEED        # noqa: E402
from streaming import Pocket           # noqa: E402


def over_stripes(picture, matte):
    """[3, N, N] u8, [N, N] in 0..1 -> [N, N, 3] u8"""
    stripes = np.where((np.arange(len(matte)) // 16 % 2 == 0)[:, None, None], (40, 200, 60), (230, 40, 200)).astype(np.float32)
    return (picture.permute(1, 2, 0).numpy() * matte[..., None] + stripes * (1 - matte[..., None])).round().astype(np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("pocket", "speech", "out"):
        parser.add_argument(name)
    parser.add_argument("--faces", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.makedirs(args.out, exist_ok=True)
    net = Pocket(*weights.read(args.pocket))
    faces = torch.from_numpy(ps.identity(np.random.default_rng(FACES_SEED), args.faces))
    _, features, visemes = net.features(read_wave(args.speech)[0][:args.blocks * 2560 + 3200])
    visemes = visemes[:4 * args.blocks].clamp(0, 1)
    rows, sheet = [], []
    for i, face in enumerate(faces):
        g = torch.Generator().manual_seed(i)
        c = ps.controls(1, 4 * args.blocks, g, "cpu", loudness(visemes[None]))[0]
        stream = net.open(net.encode_picture(ps.render(ps.neutral(face[None]), args.size)[0]), 1, args.size)
        for b in range(args.blocks):
            at = slice(4 * b, 4 * b + 4)
            frames = stream.next(features[at], c[at], torch.randn(16, 32, 32, generator=g))
            if b < 2:
                continue
            frames, got = frames[:, :3], frames[:, 3].numpy() / 255.
            true = ps.render_matte(ps.assemble(face[None], c[None, at], visemes[None, at])[0], args.size).numpy() / 255.
            for f in range(4):
                soft = cv2.dilate(((true[f] > .02) & (true[f] < .98)).astype(np.uint8), np.ones((5, 5)))
                soft[170 * args.size // 256:] = 0                                       # head and hair, not shoulders
                error = np.abs(got[f] - true[f])
                rows.append((error.mean(), error[soft > 0].mean(), error[soft == 0].mean(), (error > .5).mean(),
                             ((got[f] > .5) & (true[f] > .5)).sum() / ((got[f] > .5) | (true[f] > .5)).sum()))
        if i < 10:
            grey = lambda m: np.repeat((m * 255).round().astype(np.uint8)[..., None], 3, 2)
            picture = frames[3]
            sheet.append(np.concatenate([picture.permute(1, 2, 0).numpy(), grey(true[3]), grey(got[3]), over_stripes(picture, true[3]), over_stripes(picture, got[3])], 0))
    mean = np.array(rows).mean(0)
    report = dict(zip(("mean_absolute_error", "at_the_edge_of_head_and_hair", "elsewhere", "share_of_pixels_wrong_by_more_than_half", "intersection_over_union"),
                      (round(float(v), 5) for v in mean)), frames=len(rows), faces=args.faces, worst_face_frame=round(float(max(r[0] for r in rows)), 4))
    print(json.dumps(report, indent=1))
    with open(os.path.join(args.out, "report.json"), "w") as f:
        json.dump(report, f, indent=1)
    cv2.imwrite(os.path.join(args.out, "sheet.png"), np.concatenate(sheet, 1)[..., ::-1])
