"""The PyTorch twin of `cargo bench --features cuda --bench video`: Wan 2.1's decoder written for speed in PyTorch.

Channels last, three latents in one pass, torch.compile, random bf16 weights of the true shapes; device events, median.
Usage: python3 tests/bench/peer_video.py 704x384,480x832 [--eager]. One JSON line per figure.
"""
import json, statistics, sys
import torch
import torch.nn.functional as F

torch.set_grad_enabled(False)
torch.backends.cudnn.benchmark = True
BF, DEV = torch.bfloat16, "cuda"


def kernel(out, cin, *size):
    w = torch.randn(out, cin, *size, device=DEV, dtype=BF) / (cin * torch.Size(size).numel()) ** 0.5
    form = torch.channels_last_3d if len(size) == 3 else torch.channels_last
    return w.to(memory_format=form), torch.randn(out, device=DEV, dtype=BF) * 0.01


def causal(x, past, w):
    """Convolves with two past frames in front; returns the result and the new past."""
    joined = torch.cat([past, x], 2)
    pad = (0, w[0].shape[3] // 2, w[0].shape[4] // 2)
    return F.conv3d(joined, w[0], w[1], padding=pad), joined[:, :, -2:]


def norm_silu(x, gain):
    x = x.float()
    return F.silu(x * torch.rsqrt(x.square().sum(1, keepdim=True).clamp(min=1e-24)) * gain).to(BF)


class Decoder:
    def __init__(self):
        def residual(cin, out):
            short = kernel(out, cin, 1, 1, 1) if cin != out else None
            return ("res", self.gain(cin), kernel(out, cin, 3, 3, 3), self.gain(out), kernel(out, out, 3, 3, 3), short)

        def up(c, out, time):
            return ("up", kernel(2 * c, c, 3, 1, 1) if time else None, kernel(out, c, 3, 3))

        self.conv1 = kernel(384, 16, 3, 3, 3)
        attention = ("att", self.gain(384), kernel(1152, 384, 1, 1), kernel(384, 384, 1, 1))
        self.layers = [residual(384, 384), attention, residual(384, 384)] + [residual(384, 384) for _ in range(3)]
        self.layers += [up(384, 192, True), residual(192, 384), residual(384, 384), residual(384, 384), up(384, 192, True)]
        self.layers += [residual(192, 192) for _ in range(3)] + [up(192, 96, False)] + [residual(96, 96) for _ in range(3)]
        self.head = (self.gain(96), kernel(3, 96, 3, 3, 3))

    def gain(self, c):
        return (1 + 0.1 * torch.randn(1, c, 1, 1, 1, device=DEV)) * c**0.5

    def __call__(self, z, past):
        past, new = iter(past), []

        def conv(x, w):
            y, keep = causal(x, next(past), w)
            new.append(keep)
            return y

        x = conv(z, self.conv1)
        for layer in self.layers:
            if layer[0] == "res":
                _, g1, w1, g2, w2, short = layer
                y = conv(norm_silu(conv(norm_silu(x, g1), w1), g2), w2)
                x = (F.conv3d(x, *short) if short else x) + y
            elif layer[0] == "att":
                _, g, qkv, proj = layer
                n, c, t, h, w = x.shape
                y = x.float()
                y = (y * torch.rsqrt(y.square().sum(1, keepdim=True).clamp(min=1e-24)) * g).to(BF)
                y = y.transpose(1, 2).reshape(t, c, h, w)
                q, k, v = F.conv2d(y, *qkv).flatten(2).transpose(1, 2)[:, None].split(c, -1)
                y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(t, c, h, w)
                x = x + F.conv2d(y, *proj).reshape(1, t, c, h, w).transpose(1, 2)
            else:
                _, time, w = layer
                if time is not None:
                    n, c, t, hh, ww = x.shape
                    y = conv(x, time).reshape(n, 2, c, t, hh, ww)
                    x = y.permute(0, 2, 3, 1, 4, 5).reshape(n, c, 2 * t, hh, ww)
                n, c, t, hh, ww = x.shape
                y = x.transpose(1, 2).reshape(t, c, hh, ww).to(memory_format=torch.channels_last)
                y = F.conv2d(F.interpolate(y, scale_factor=2.0, mode="nearest"), w[0], w[1], padding=1)
                x = y.reshape(1, t, -1, 2 * hh, 2 * ww).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        return conv(norm_silu(x, self.head[0]), self.head[1]).clamp(-1, 1), new

    def blank(self, z):
        """A past of zeros, of the shapes that a pass leaves."""
        shapes = []
        original = globals()["causal"]

        def probing(x, _, w):
            past = torch.zeros(1, x.shape[1], 2, *x.shape[3:], device=DEV, dtype=BF)
            shapes.append(past.to(memory_format=torch.channels_last_3d))
            return original(x, shapes[-1], w)

        globals()["causal"] = probing
        try:
            self(z, [None] * 100)
        finally:
            globals()["causal"] = original
        return shapes


def median(run, warm, runs):
    for _ in range(warm):
        run()
    times = []
    for _ in range(runs):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times), min(times), max(times)


def main():
    sizes = [tuple(map(int, s.split("x"))) for s in (sys.argv[1] if len(sys.argv) > 1 else "704x384,480x832").split(",")]
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    a = torch.randn(8192, 8192, device=DEV, dtype=BF)
    ms = median(lambda: a @ a, 3, 9)[0]
    print(json.dumps({"what": "ceiling: bf16 product 8192³", "ms": ms, "tflops": 2 * 8192**3 / ms / 1e9}), flush=True)
    net = Decoder()
    for h, w in sizes:
        z = torch.randn(1, 16, 3, h // 8, w // 8, device=DEV, dtype=BF).to(memory_format=torch.channels_last_3d)
        past = net.blank(z)
        for name, fn in [("eager", net.__call__)] + ([] if "--eager" in sys.argv else [("compiled", torch.compile(net.__call__, dynamic=False))]):
            try:
                ms, least, most = median(lambda: fn(z, past), 2, 9)
            except Exception as e:
                print(f"{name} at {h}x{w}: {str(e)[:400]}", flush=True)
                continue
            work = 40.65 * h * w / (480 * 832)
            print(json.dumps({"what": f"PyTorch, channels last, {name}: decode 3 latents", "size": f"{h}x{w}", "ms": ms,
                              "least": least, "most": most, "tflops": work / ms * 1e3}), flush=True)
        torch._dynamo.reset()


main()
