"""The weights file: fold BatchNorm, quantise, write shards; and read them back as f32 tensors."""
import glob
import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import CONFIG

MAX_SHARD = 9_500_000          # bytes; no file of the repository is over 10 MB


def folded(conv, norm=None):
    """A convolution and the BatchNorm after it as (weight, bias)."""
    weight, bias = conv.weight.detach().float(), conv.bias.detach().float() if conv.bias is not None else torch.zeros(conv.out_channels)
    if norm is None:
        return weight, bias
    scale = torch.rsqrt(norm.running_var.float() + norm.eps)
    shift = -norm.running_mean.float() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.detach().float(), shift * norm.weight.detach().float() + norm.bias.detach().float()
    return weight * scale.view(-1, 1, 1, 1), bias * scale + shift


def vae_tensors(encoder, decoder):
    out = {}

    def put(name, pair):
        out[f"vae.{name}.weight"], out[f"vae.{name}.bias"] = pair

    def walk(prefix, net, normalise=None):
        for name, module in net.named_children():
            full = f"{prefix}.{name}"
            if name == "normalise":
                continue
            if name == "fine":                             # one part per size, named by it
                for size, part in module.items():
                    walk(f"{prefix}.{size}", part)
            elif name == "conv_out":
                put(full, folded(module, normalise))
            elif hasattr(module, "a"):
                put(full + ".a", folded(*module.a))
                put(full + ".b", folded(*module.b))
            else:
                put(full, folded(*module))
    walk("encoder", encoder, encoder.normalise)
    walk("decoder", decoder)
    return out


def quantised(tensors, least=9000):
    """Matrices and convolutions: int8 with a scale per output row; the rest f16.  The decoder loses .02 dB by it."""
    out = {}
    for name, t in tensors.items():
        t = t.detach().float().cpu()
        big = name.endswith(".weight") and t.ndim >= 2 and t.numel() >= least
        if big:
            rows = t.flatten(1)
            scale = rows.abs().amax(1).clamp(min=1e-12) / 127
            out[name] = torch.round(rows / scale[:, None]).clamp(-127, 127).to(torch.int8).view(t.shape).contiguous()
            out[name + "_scale"] = scale.contiguous()
        else:
            out[name] = (t if name in ("control_range", "control_scale", "audio.mel_filters") else t.half()).contiguous()
    return out


def write(path, tensors, config=CONFIG, least=9000):
    """One file; returns its size.  Matrices of at least `least` elements become int8."""
    tensors = quantised(tensors, least)
    metadata = {"config": json.dumps(config), "format": "pt"}
    save_file(tensors, path, metadata)
    return os.path.getsize(path)


def write_shards(path, tensors, config=CONFIG):
    tensors = quantised(tensors)
    shards, size = [{}], 0
    for name, t in tensors.items():
        n = t.numel() * t.element_size()
        if size + n > MAX_SHARD and not name.endswith("_scale"):
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += n
    stem = path[:-len(".safetensors")]
    for old in glob.glob(stem + "-*-of-*.safetensors"):
        os.remove(old)
    files = []
    for i, shard in enumerate(shards):
        files.append(f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors")
        save_file(shard, files[-1], {"config": json.dumps(config), "format": "pt"})
    return files


def read(path):
    """(tensors in f32, config) of one file, of shards STEM-*-of-*.safetensors beside it, or of a folder holding them"""
    if os.path.isdir(path):
        path = os.path.join(path, "pocket.safetensors")
    files = [path] if os.path.exists(path) else sorted(glob.glob(path[:-len(".safetensors")] + "-*-of-*.safetensors"))
    raw, config = {}, None
    for file in files:
        with safe_open(file, "pt") as f:
            config = json.loads(f.metadata()["config"])
            for key in f.keys():
                raw[key] = f.get_tensor(key)
    out = {}
    for key, t in raw.items():
        if t.dtype == torch.int8:
            scale = raw[key + "_scale"]
            out[key] = t.float() * scale.view(-1, *[1] * (t.ndim - 1))
        elif not key.endswith("_scale") or key == "control_scale":
            out[key] = t.float()
    return out, config
