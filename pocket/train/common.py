"""What the three training programs share: device, log, schedule, checkpoints."""
import math
import os
import time

import torch
from safetensors.torch import load_file, save_file

START = time.time()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL = int(os.environ.get("LOCAL_RANK", 0))
GPU = torch.cuda.is_available()
DEVICE = torch.device(f"cuda:{LOCAL}" if GPU else "cpu")
if GPU:
    torch.cuda.set_device(DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
else:
    torch.set_num_threads(1)


def log(*words):
    if RANK == 0:
        print(f"[{time.time() - START:6.1f}]", *words, flush=True)


def half_precision():
    return torch.autocast(DEVICE.type, torch.bfloat16)


def schedule(p, warm=.03, floor=.02):
    return min(1., p / warm) * (floor + (1 - floor) * .5 * (1 + math.cos(math.pi * min(1., p))))


def save(path, state, parts=1):
    """f16 safetensors, in `parts` files PATH.0, PATH.1, ... if more than one; running statistics stay f32"""
    state = {k: (v.detach().half() if v.is_floating_point() and "running" not in k else v.detach()).cpu().contiguous() for k, v in state.items()}
    keys = sorted(state)
    total, size, groups = sum(t.numel() for t in state.values()), 0, [[] for _ in range(parts)]
    for k in keys:
        groups[min(parts - 1, size * parts // total)].append(k)
        size += state[k].numel()
    for i, group in enumerate(groups):
        name = path if parts == 1 else f"{path}.{i}"
        save_file({k: state[k] for k in group}, name + ".tmp")
        os.replace(name + ".tmp", name)
    log("saved", path, [os.path.getsize(path if parts == 1 else f"{path}.{i}") for i in range(parts)])


def load(path):
    files = [path] if os.path.exists(path) else [f"{path}.{i}" for i in range(9) if os.path.exists(f"{path}.{i}")]
    out = {}
    for f in files:
        out.update(load_file(f))
    assert out, path
    return {k: v.float() if v.is_floating_point() else v for k, v in out.items()}
