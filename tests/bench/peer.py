#!/usr/bin/env python3
"""The same denoising step in PyTorch, tuned: what `step.rs` is compared with, in the same run on the same card.

python3 tests/bench/peer.py [SIZES [PRECISIONS]]    e.g. 704x384,480x832 fp8,bf16

LiveAvatar's block of the 14B transformer with random weights: 40 layers of self-attention over a full ring of 12 latent
frames and the conditioning, text attention with cached keys, feed-forward; audio attention after 12 of them. fp8: e4m3
products with a scale per row of activations and weights (torch._scaled_mm). Attention is cuDNN's in bf16, as PyTorch has no
other fast one. Everything between is torch.compile's, and the whole step is one CUDA graph. Prints JSON lines.
"""
import json
import statistics
import sys

import torch
import torch.nn.functional as F

DIM, HIDDEN, HEADS, HEAD, LAYERS, TEXT, FRAMES, RING = 5120, 13824, 40, 128, 40, 512, 3, 12
INJECTED = {0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39}
torch.set_grad_enabled(False)
torch.manual_seed(1)


def random(*shape, deviation=1.0, dtype=torch.bfloat16):
    return torch.empty(*shape, device="cuda", dtype=dtype).normal_(0, deviation)


def matrix(out, width, fp8):
    weight, bias = random(out, width, deviation=width**-0.5), random(out, deviation=0.01)
    if not fp8:
        return weight, None, bias
    unit = weight.abs().amax(1, keepdim=True).float() / 448
    return (weight.float() / unit).to(torch.float8_e4m3fn), unit.t().contiguous(), bias


def linear(x, m):
    weight, unit, bias = m
    if unit is None:
        return F.linear(x, weight, bias)
    own = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-9) / 448
    stored = (x.float() / own).to(torch.float8_e4m3fn)
    return torch._scaled_mm(stored, weight.t(), scale_a=own, scale_b=unit, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def modulated(x, scale, shift, eps=1e-6):
    return (F.layer_norm(x.float(), (DIM,), eps=eps) * (1 + scale) + shift).bfloat16()


def rms(x, weight):
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16() * weight


def turned(x, cos, sin):
    a, b = x.view(-1, HEADS, HEAD // 2, 2).float().unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).bfloat16()


def attend(q, k, v):
    """[batch, tokens, heads, width]"""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, False)[0].transpose(1, 2)


def before(x, m, cos, sin, p):
    q, k, v = linear(modulated(x, m[1], m[0]), p["qkv"]).split(DIM, -1)
    return turned(rms(q, p["nq"]), cos, sin), turned(rms(k, p["nk"]), cos, sin), v.reshape(-1, HEADS, HEAD)


def between(x, o, m, p):
    x = (x.float() + linear(o.reshape(-1, DIM), p["o"]).float() * m[2]).bfloat16()
    h = F.layer_norm(x, (DIM,), p["n3w"], p["n3b"], eps=1e-6)
    return x, rms(linear(h, p["cq"]), p["cnq"]).view(1, -1, HEADS, HEAD)


def after(x, o, m, p):
    x = x + linear(o.reshape(-1, DIM), p["co"])
    h = F.gelu(linear(modulated(x, m[4], m[3]), p["f1"]), approximate="tanh")
    return (x.float() + linear(h, p["f2"]).float() * m[5]).bfloat16()


def hear(x, scale, shift, keys, values, p):
    h = modulated(x.view(FRAMES, -1, DIM), scale, shift, 1e-5).view(-1, DIM)
    q = rms(linear(h, p["aq"]), p["anq"]).view(FRAMES, -1, HEADS, HEAD).transpose(1, 2)
    o = torch.ops.aten._scaled_dot_product_flash_attention(q, keys.transpose(1, 2), values.transpose(1, 2), 0.0, False)[0]
    return x + linear(o.transpose(1, 2).reshape(-1, DIM), p["ao"])


def layers(fp8):
    made = []
    for i in range(LAYERS):
        p = {"qkv": matrix(3 * DIM, DIM, fp8), "f1": matrix(HIDDEN, DIM, fp8), "f2": matrix(DIM, HIDDEN, fp8)}
        p |= {n: matrix(DIM, DIM, fp8) for n in ("o", "cq", "co")}
        p |= {n: 1 + random(DIM, deviation=0.1) for n in ("nq", "nk", "cnq", "n3w")}
        p |= {"n3b": random(DIM, deviation=0.1), "m": random(6, DIM, deviation=0.3, dtype=torch.float32)}
        if i in INJECTED:
            p |= {"aq": matrix(DIM, DIM, fp8), "ao": matrix(DIM, DIM, fp8), "anq": 1 + random(DIM, deviation=0.1)}
        made.append(p)
    return made


def measure(height, width, precision, made):
    frame = (height // 16) * (width // 16)
    tokens, keys = FRAMES * frame, frame * 29 // 2
    conditioning = keys - RING * frame
    ring = [(random(1, keys, HEADS, HEAD), random(1, keys, HEADS, HEAD)) for _ in made]
    text = [(random(1, TEXT, HEADS, HEAD), random(1, TEXT, HEADS, HEAD)) for _ in made]
    heard = [random(FRAMES, 5, HEADS, HEAD), random(FRAMES, 5, HEADS, HEAD)]
    affine = [random(FRAMES, 1, DIM, deviation=0.1, dtype=torch.float32) for _ in range(2)]
    angle = torch.rand(tokens, 1, HEAD // 2, device="cuda") * 6.3
    cos, sin, start = angle.cos(), angle.sin(), random(tokens, DIM)
    parts = [torch.compile(f, dynamic=False) for f in (before, between, after, hear)]

    def step():
        x = start
        for i, p in enumerate(made):
            q, k, v = parts[0](x, p["m"], cos, sin, p)
            own = slice(conditioning, conditioning + tokens)
            ring[i][0][0, own].copy_(k)
            ring[i][1][0, own].copy_(v)
            x, q = parts[1](x, attend(q[None], *ring[i]), p["m"], p)
            x = parts[2](x, attend(q, *text[i]), p["m"], p)
            if i in INJECTED:
                x = parts[3](x, *affine, *heard, p)
        return x

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    times = []
    for i in range(11):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    times = sorted(times[2:])
    print(json.dumps({
        "what": "PyTorch step by graph", "size": f"{height}x{width}", "precision": precision,
        "ms": statistics.median(times), "least": times[0], "most": times[-1], "finite": bool(torch.isfinite(out).all()),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30, "torch": torch.__version__,
        "card": torch.cuda.get_device_name(),
    }), flush=True)
    torch._dynamo.reset()


def main():
    words = sys.argv[1:] + [None] * 2
    for precision in (words[1] or "fp8,bf16").split(","):
        made = layers(precision == "fp8")
        for size in (words[0] or "704x384,480x832").split(","):
            measure(*map(int, size.split("x")), precision, made)
        del made
        torch.cuda.empty_cache()


main()
