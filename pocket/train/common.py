"""What the three training programs share: device, log, schedule, checkpoints."""
import math
import os
import time

import torch
import torch.distributed as dist
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


def begin():
    """Join the other GPUs, if there are any."""
    if WORLD > 1:
        dist.init_process_group("nccl" if GPU else "gloo", device_id=DEVICE if GPU else None)


def end():
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def alike(modules):
    """Every GPU starts from the first one's parameters and statistics."""
    if WORLD > 1:
        for m in modules:
            for t in [*m.parameters(), *m.buffers()]:
                dist.broadcast(t.data, 0)


def averaged_statistics(modules):
    """Each GPU's norms have seen other pictures: their running statistics become the mean of all.  To be called by every GPU."""
    if WORLD > 1:
        for m in modules:
            for name, t in m.named_buffers():
                if "running" in name:
                    dist.all_reduce(t)
                    t.div_(WORLD)


def flat_gradients(parameters):
    """One vector of which every parameter's gradient is a view"""
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), device=DEVICE)
    for p, v in zip(parameters, flat.split(sizes)):
        rows = p.ndim == 4 and not p.is_contiguous()        # channels last: the gradient too
        p.grad = v.view(p.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) if rows else v.view_as(p)
    return flat


def averaged(flat, most=1.):
    """Gradients of all GPUs averaged and clipped; returns their norm"""
    if WORLD > 1:
        dist.all_reduce(flat)
        flat.div_(WORLD)
    norm = flat.norm()
    flat.mul_((most / (norm + 1e-6)).clamp(max=1.))
    return norm


def agreed(value, step, state={}):                        # noqa: B006  (remembers between calls)
    """The first GPU's value, asked every 16 steps"""
    if WORLD > 1:
        if step % 16 == 0 or "value" not in state:
            shared = torch.tensor([value], device=DEVICE)
            dist.broadcast(shared, 0)
            state["value"] = shared.item()
        return state["value"]
    return value


def save(path, state, parts=1):
    """f16 safetensors, in `parts` files PATH.0, PATH.1, ... if more than one; running statistics stay f32"""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
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
