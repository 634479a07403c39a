#!/usr/bin/env python3
"""What `clip.rs` is compared with: the official S2V transformer's modules in eager PyTorch, written anew in their shapes.

python3 tests/bench/peer_clip.py [SIZES]    e.g. 480x832

One forward for a clip of 80 frames: 40 layers over noisy, reference and packed motion tokens, the modulation of two runs in
f32 on an f32 residual, bf16 linears as autocast gives them, rotation in complex double as wan/modules/s2v/model_s2v.py of
Wan-Video/Wan2.2 (42bf4cf) has it, text attention with keys and values computed each time, audio attention after 12 layers;
both branches of the guidance in turn. Attention is PyTorch's own choice of kernel, and cuDNN's. Prints JSON lines.
"""
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DIM, HIDDEN, HEADS, HEAD, LAYERS, TEXT, FRAMES, AUDIO = 5120, 13824, 40, 128, 40, 512, 20, 5
INJECTED = {0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39}
RUNS = 3
torch.set_grad_enabled(False)
torch.manual_seed(1)


def random(*shape, deviation=1.0, dtype=torch.bfloat16):
    return torch.empty(*shape, device="cuda", dtype=dtype).normal_(0, deviation)


def linear(width, out):
    return random(out, width, deviation=width**-0.5), random(out, deviation=0.01)


def rms(x, weight):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight


def turned(x, freqs):
    y = torch.view_as_complex(x.to(torch.float64).reshape(x.shape[0], HEADS, -1, 2))
    return torch.view_as_real(y * freqs).flatten(2).float().bfloat16()


def heads(x):
    return x.view(1, -1, HEADS, HEAD).transpose(1, 2)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, DIM)


def norm(x, eps=1e-6):
    return F.layer_norm(x.float(), (DIM,), eps=eps)


def runs(x, scale, shift, at):
    """Each run of tokens has a scale and a shift of its own."""
    return torch.cat([x[:at] * scale[0] + shift[0], x[at:] * scale[1] + shift[1]])


def gated(x, gate, at):
    return torch.cat([x[:at] * gate[0], x[at:] * gate[1]])


def block(x, e, freqs, text, at, p):
    e = (p["m"] + e).unbind(1)
    h = runs(norm(x), 1 + e[1], e[0], at).bfloat16()
    q, k = rms(F.linear(h, *p["q"]), p["nq"]), rms(F.linear(h, *p["k"]), p["nk"])
    v = F.linear(h, *p["v"])
    q, k = turned(q.view(-1, HEADS, HEAD), freqs), turned(k.view(-1, HEADS, HEAD), freqs)
    x = x + gated(F.linear(attend(heads(q), heads(k), heads(v)), *p["o"]).float(), e[2], at)
    h = F.layer_norm(x, (DIM,), p["n3w"], p["n3b"], eps=1e-6).bfloat16()
    q, k = rms(F.linear(h, *p["cq"]), p["nq"]), rms(F.linear(text, *p["ck"]), p["nk"])
    x = x + F.linear(attend(heads(q), heads(k), heads(F.linear(text, *p["cv"]))), *p["co"])
    h = runs(norm(x), 1 + e[4], e[3], at).bfloat16()
    y = F.linear(F.gelu(F.linear(h, *p["f1"]), approximate="tanh"), *p["f2"])
    return x + gated(y.float(), e[5], at)


def hear(x, audio, affine, at, p):
    h = norm(x[:at].view(FRAMES, -1, DIM)) * (1 + affine[0]) + affine[1]
    q = rms(F.linear(h.bfloat16(), *p["aq"]), p["nq"]).view(FRAMES, -1, HEADS, HEAD).transpose(1, 2)
    k = rms(F.linear(audio, *p["ak"]), p["nk"]).view(FRAMES, AUDIO, HEADS, HEAD).transpose(1, 2)
    v = F.linear(audio, *p["av"]).view(FRAMES, AUDIO, HEADS, HEAD).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, DIM)
    return torch.cat([x[:at] + F.linear(o, *p["ao"]), x[at:]])


def layers():
    made = []
    for i in range(LAYERS):
        p = {n: linear(DIM, DIM) for n in ("q", "k", "v", "o", "cq", "ck", "cv", "co")}
        p |= {"f1": linear(DIM, HIDDEN), "f2": linear(HIDDEN, DIM), "m": random(1, 6, DIM, deviation=0.3, dtype=torch.float32)}
        p |= {n: 1 + random(DIM, deviation=0.1) for n in ("nq", "nk")}
        p |= {"n3w": 1 + random(DIM, deviation=0.1, dtype=torch.float32), "n3b": random(DIM, deviation=0.1, dtype=torch.float32)}
        if i in INJECTED:
            p |= {n: linear(DIM, DIM) for n in ("aq", "ak", "av", "ao")}
        made.append(p)
    return made


def measure(height, width, made, name, backends):
    frame = (height // 16) * (width // 16)
    at, tokens = FRAMES * frame, frame * (2 * FRAMES + 5) // 2
    start, text = random(tokens, DIM, dtype=torch.float32), random(TEXT, DIM)
    e = random(2, 6, DIM, deviation=0.3, dtype=torch.float32)
    freqs = torch.polar(torch.ones(tokens, 1, HEAD // 2, device="cuda", dtype=torch.float64),
                        torch.rand(tokens, 1, HEAD // 2, device="cuda", dtype=torch.float64) * 6.3)
    audio = random(FRAMES, AUDIO, DIM)
    affine = [random(FRAMES, 1, DIM, deviation=0.1, dtype=torch.float32) for _ in range(2)]

    def forward():
        x = start
        for i, p in enumerate(made):
            x = block(x, e, freqs, text, at, p)
            if i in INJECTED:
                x = hear(x, audio, affine, at, p)
        return x

    times = []
    with sdpa_kernel(backends):
        for i in range(RUNS + 1):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            forward()
            out = forward()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b))
    times = sorted(times[1:])
    print(json.dumps({
        "what": f"PyTorch eager, {name} attention: clip of 80 frames, a forward of each branch", "size": f"{height}x{width}",
        "tokens": tokens, "precision": "bf16", "ms": statistics.median(times), "least": times[0], "most": times[-1],
        "finite": bool(torch.isfinite(out).all()), "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "torch": torch.__version__, "card": torch.cuda.get_device_name(),
    }), flush=True)


def main():
    made = layers()
    for size in (sys.argv[1] if len(sys.argv) > 1 else "480x832").split(","):
        for name, backends in (("flash", [SDPBackend.FLASH_ATTENTION]), ("cuDNN", [SDPBackend.CUDNN_ATTENTION])):
            try:
                measure(*map(int, size.split("x")), made, name, backends + [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
            except Exception as error:
                print(f"{name} at {size}: {str(error)[:300]}", flush=True)


main()
