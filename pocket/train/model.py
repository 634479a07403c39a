"""The three networks in the form that trains: autoencoder (with BatchNorm), audio net, transformer (causal over a sequence).

Names of parameters are the names in the weights file; `export.py` folds BatchNorm and quantises.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

CHANNELS, LATENT = 16, 32            # latent [16, 32, 32] = 4 frames, whatever their size: a cell is 8, 12 or 16 pixels wide
SIZES, REFERENCE = (256, 384, 512), 384              # pictures the decoder draws; what the encoder sees
FEATURES, CONTROLS, VISEMES = 192, 10, 6
CONFIG = {
    "dim": 256, "num_heads": 4, "num_layers": 8, "ffn_dim": 1024, "freq_dim": 256, "in_dim": 16, "out_dim": 16, "patch": [1, 4, 4],
    "eps": 1e-6, "text_len": 0, "audio_dim": FEATURES + CONTROLS, "audio_layers": 1, "num_audio_token": 4, "enable_adain": True,
    "audio_inject_layers": [0, 2, 4, 6], "motion_frames": [5, 2], "kv_frames": 4, "frames_per_block": 1, "conditioning": "following",
    "rope_half": False, "cond": "reference", "prediction": "sample", "reference_gate": True, "framepack": "still",
    "sigmas": {"1": [1.0], "2": [1.0, 0.5], "3": [1.0, 0.67, 0.33], "4": [1.0, 0.75, 0.5, 0.25]}, "default_steps": 2,
    "size": [256, 256], "sizes": list(SIZES), "reference_size": REFERENCE, "fine_blocks": 3, "matte": "joint", "fps": 25, "latent": [16, 32, 32], "vae": "patch", "audio": "mel", "gelu": "erf", "sample_rate": 16000,
    "audio_width": 192, "audio_dilation": [1, 1, 2, 2, 4, 8, 16, 2], "audio_ahead": [1, 1, 1, 1, 1, 0, 0, 0],
}


# ------------------------------------------------------------------ autoencoder
class ConvNorm(nn.Sequential):
    def __init__(self, cin, cout, kernel=3, stride=1, gain=1.0):
        conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        norm = nn.BatchNorm2d(cout, momentum=.03)
        nn.init.constant_(norm.weight, gain)
        super().__init__(conv, norm)


class Residual(nn.Module):
    def __init__(self, c, cin=None):
        super().__init__()
        self.a, self.b = ConvNorm(cin or c, c), ConvNorm(c, c, gain=.2)

    def forward(self, x, extra=None):
        return x + self.b(F.relu(self.a(F.relu(x if extra is None else torch.cat([x, extra], 1)))))


def group_mean(x, out):
    return x.unflatten(1, (out, -1)).mean(2) * (x.shape[1] / out) ** .5


class Encoder(nn.Module):
    def __init__(self, a=96, b=192):
        super().__init__()
        self.b = b
        self.conv_in, self.res1, self.down = ConvNorm(432, a), Residual(a), ConvNorm(a, b, 3, 2)
        self.res2, self.res3, self.conv_out = Residual(b), Residual(b), nn.Conv2d(b, CHANNELS, 1)
        self.normalise = nn.BatchNorm2d(CHANNELS, affine=False, momentum=.03)

    def forward(self, frames):
        """[N, 4, 3, 384, 384] in -1..1 -> [N, 16, 32, 32]"""
        n = frames.shape[0]
        x = F.pixel_unshuffle(frames.flatten(0, 1), 6)
        x = x.view(n, 432, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        x = self.res1(self.conv_in(x))
        x = self.down(F.relu(x)) + group_mean(F.pixel_unshuffle(x, 2), self.b)
        return self.normalise(self.conv_out(F.relu(self.res3(self.res2(x)))).float())


class Fine(nn.Module):
    """The part of the decoder that belongs to a size: k x k features a latent cell, 4 x 4 pixels a feature, red, green, blue, matte"""

    def __init__(self, size, a=112, c=32):
        super().__init__()
        self.k, self.c = size // 128, c
        self.up, self.res3, self.res4, self.res5 = ConvNorm(a, 4 * self.k ** 2 * c, 1), Residual(c), Residual(c), Residual(c)
        self.conv_out = nn.Conv2d(c, 64, 3, 1, 1)

    def forward(self, x):
        """[N, 112, 32, 32] after ReLU -> [4N, 4, size, size]"""
        x = self.up(x)
        x = F.pixel_shuffle(x.reshape(-1, self.k ** 2 * self.c, *x.shape[2:]), self.k)
        return F.pixel_shuffle(self.conv_out(F.relu(self.res5(self.res4(self.res3(x))))), 4)


class Decoder(nn.Module):
    def __init__(self, a=112):
        super().__init__()
        self.conv_in, self.mem = ConvNorm(CHANNELS, a), Residual(a, 2 * a)
        self.res1, self.res2 = Residual(a), Residual(a)
        self.fine = nn.ModuleDict({str(size): Fine(size, a) for size in SIZES})

    def forward(self, z, size=REFERENCE):
        """[B, T, 16, 32, 32] -> [B, 4T, 4, size, size], not clamped: colours -1..1, matte 0..1; before the first latent the memory is zero"""
        b, t = z.shape[:2]
        x = self.conv_in(z.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        past = torch.cat([torch.zeros_like(x.view(b, t, *x.shape[1:])[:, :1]), x.view(b, t, *x.shape[1:])[:, :-1]], 1).flatten(0, 1)
        x = self.fine[str(size)](F.relu(self.res2(self.res1(self.mem(x, past)))))
        return x.view(b, t * 4, *x.shape[1:])


class Probe(nn.Module):
    """Reads mouth and pose from pixels; only for evaluation.  Output: opening, width, press, fv, then the ten controls.
    The mouth is read from its own part of the picture, twice as fine: the width of small mouths is a matter of single pixels."""
    AROUND = slice(112, 208), slice(64, 192)              # where the mouth can be, at 256 pixels

    def __init__(self):
        super().__init__()
        self.net = self.reader(48, ((64, 1), (64, 2), (96, 1), (96, 2), (128, 2), (128, 2)), 128 * 16, 14)
        self.mouth = self.reader(12, ((48, 1), (64, 2), (64, 1), (96, 2), (96, 1), (128, 2)), 128 * 48, 4)

    @staticmethod
    def reader(c, layers, flat, out):
        net = []
        for wide, stride in layers:
            net += [nn.Conv2d(c, wide, 3, stride, 1), nn.ReLU()]
            c = wide
        return nn.Sequential(*net, nn.Flatten(), nn.Linear(flat, 256), nn.ReLU(), nn.Linear(256, out))

    def forward(self, x):
        mouth = self.mouth(F.pixel_unshuffle(x[..., self.AROUND[0], self.AROUND[1]], 2))
        return torch.cat([mouth, self.net(F.pixel_unshuffle(x, 4))[:, 4:]], 1)


# ------------------------------------------------------------------ audio net
class AudioBlock(nn.Module):
    def __init__(self, d, dilation, ahead, drop):
        super().__init__()
        self.pad, self.drop = (4 * dilation - ahead, ahead), drop
        self.norm = nn.LayerNorm(d)
        self.conv, self.proj = nn.Conv1d(d, d, 5, dilation=dilation), nn.Conv1d(d, d, 1)
        self.scale = nn.Parameter(torch.full((d,), .3))

    def forward(self, x):
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x + self.scale[:, None] * self.proj(F.dropout(F.gelu(self.conv(F.pad(h, self.pad))), self.drop, self.training))


class AudioNet(nn.Module):
    def __init__(self, d=CONFIG["audio_width"], drop=.1):
        super().__init__()
        self.conv_in = nn.Conv1d(64, d, 3)
        self.blocks = nn.ModuleList(AudioBlock(d, k, a, drop) for k, a in zip(CONFIG["audio_dilation"], CONFIG["audio_ahead"]))
        self.down, self.norm, self.visemes = nn.Conv1d(d, FEATURES, 2, stride=2), nn.LayerNorm(FEATURES), nn.Linear(FEATURES, VISEMES)

    def forward(self, mel):
        """[B, 2T, 64] -> features [B, T, 192]"""
        x = self.conv_in(F.pad(((mel - 5) / 2).transpose(1, 2), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.norm(self.down(x).transpose(1, 2))


# ------------------------------------------------------------------ rotary tables
def axis_positions(start, end, span, time):
    """Positions of a token group along one axis; the order of operations is numpy's linspace, in f64."""
    n = end - start
    if time and start < 0:
        return [-int(p) for p in _line(float(-start), float(-span - start + 1), n)]
    return [int(p) for p in _line(float(start), float(start + span - 1), n)]


def _line(start, stop, n):
    if n == 1:
        return [start]
    step = (stop - start) / (n - 1)
    values = [start + j * step for j in range(n)]
    values[-1] = stop
    return values


def rope_table(groups, d):
    """[(start, end, span)] of (time, row, column) -> cos, sin [tokens, d/2] in f64"""
    c = d // 2
    pairs = [c - 2 * (c // 3), c // 3, c // 3]
    angles = []
    for start, end, span in groups:
        axes = []
        for a in range(3):
            position = torch.tensor(axis_positions(start[a], end[a], span[a], a == 0), dtype=torch.float64)
            axes.append(position[:, None] * 10000.0 ** (-torch.arange(pairs[a], dtype=torch.float64) / pairs[a]))
        t, h, w = (len(x) for x in axes)
        angles.append(torch.cat([axes[0][:, None, None].expand(t, h, w, -1), axes[1][None, :, None].expand(t, h, w, -1),
                                 axes[2][None, None].expand(t, h, w, -1)], -1).reshape(-1, c))
    angles = torch.cat(angles)
    return angles.cos(), angles.sin()


def conditioning_groups(offset, n=8):
    """Reference, then motion newest, middle, oldest (four); `offset` is p0 of the specification."""
    frame = lambda t, size: ((t + offset, 0, 0), (t + offset + 1, size, size), (1, n, n))
    return [frame(30, n), frame(-1, n), frame(-3, n // 2)] + [frame(t, n // 4) for t in (-19, -14, -9, -4)]


def rotate(x, cos, sin):
    """x [..., heads, d] with tables [tokens, d/2] that broadcast over the leading axes"""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(x.dtype)


# ------------------------------------------------------------------ transformer
class RmsNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RmsNorm(d), RmsNorm(d)


def layer_norm(x, eps=1e-6):
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def attend(q, k, v):
    """[N, tokens, heads, d]"""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, d, ffn):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, d))
        self.self_attn = Attention(d)
        self.ffn = nn.Sequential(nn.Linear(d, ffn), nn.GELU("tanh"), nn.Linear(ffn, d))

    def qkv(self, x, m, heads):
        a = self.self_attn
        y = layer_norm(x) * (1 + m[1]) + m[0]
        split = lambda t: t.unflatten(-1, (heads, -1))
        return split(a.norm_q(a.q(y))), split(a.norm_k(a.k(y))), split(a.v(y))

    def rest(self, x, y, m):
        x = x + self.self_attn.o(y) * m[2]
        return x + self.ffn(layer_norm(x) * (1 + m[4]) + m[3]) * m[5]


class CausalConv(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, 3)

    def forward(self, x, stride):
        return F.conv1d(torch.cat([x[..., :1], x[..., :1], x], -1), self.conv.weight, self.conv.bias, stride)


class AudioEncoderCore(nn.Module):
    def __init__(self, d, audio, tokens):
        super().__init__()
        self.tokens = tokens
        self.padding_tokens = nn.Parameter(torch.randn(1, 1, 1, d) * .02)
        self.conv1_local, self.conv1_global = CausalConv(audio, tokens * d // 4), CausalConv(audio, d // 4)
        self.conv2, self.conv3, self.final_linear = CausalConv(d // 4, d // 2), CausalConv(d // 2, d), nn.Linear(d, d)

    def forward(self, x, drop):
        """[N, audio, frames] -> global [N, d] and local [N, tokens + 1, d] of the last latent frame"""
        act = lambda h: F.silu(layer_norm(h.transpose(1, 2))).transpose(1, 2)
        tail = lambda h: act(self.conv3(act(self.conv2(act(h), 2)), 2))
        n = x.shape[0]
        local = tail(self.conv1_local(x, 1).unflatten(1, (self.tokens, -1)).flatten(0, 1))[..., drop]
        local = torch.cat([local.view(n, self.tokens, -1), self.padding_tokens[0].expand(n, 1, -1).to(local.dtype)], 1)
        return self.final_linear(tail(self.conv1_global(x, 1))[..., drop]), local


class AudioEncoder(nn.Module):
    def __init__(self, d, audio, tokens):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, 1, 1, 1), requires_grad=False)
        self.encoder = AudioEncoderCore(d, audio, tokens)


class Injector(nn.Module):
    def __init__(self, d, n):
        super().__init__()
        self.injector = nn.ModuleList(Attention(d) for _ in range(n))
        self.injector_adain_layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(d, 2 * d)}) for _ in range(n))

    def inject(self, j, x, g, l, heads):
        """x [N, 64, d], g [N, d], l [N, 5, d]"""
        a = self.injector[j]
        shift, scale = self.injector_adain_layers[j]["linear"](F.silu(g))[:, None].chunk(2, -1)
        y = layer_norm(x, 1e-5) * (1 + scale) + shift
        split = lambda t: t.unflatten(-1, (heads, -1))
        return x + a.o(attend(split(a.norm_q(a.q(y))), split(a.norm_k(a.k(l))), split(a.v(l))))


class Head(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, d))
        self.head, self.gate = nn.Linear(d, 16 * CHANNELS), nn.Linear(d, CHANNELS)


class FramePacker(nn.Module):
    """The motion latents are the reference repeated 19 times, so the time axis of the kernels is stored summed."""

    def __init__(self, d):
        super().__init__()
        self.proj = nn.Conv3d(CHANNELS, d, (1, 4, 4))
        self.proj_2x = nn.Conv3d(CHANNELS, d, (1, 8, 8))
        self.proj_4x = nn.Conv3d(CHANNELS, d, (1, 16, 16))


def patches(conv, x):
    """[N, 16, 32, 32] -> [N, tokens, d] by a convolution whose stride is its kernel"""
    k = conv.weight.shape[-1]
    n = x.shape[-1] // k
    y = x.reshape(x.shape[0], CHANNELS, n, k, n, k).permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], n * n, -1)
    return F.linear(y, conv.weight.flatten(1), conv.bias)


class Transformer(nn.Module):
    def __init__(self, config=CONFIG):
        super().__init__()
        c = self.config = config
        d, self.heads, self.window = c["dim"], c["num_heads"], c["kv_frames"]
        self.patch_embedding, self.cond_encoder = nn.Conv3d(CHANNELS, d, (1, 4, 4)), nn.Conv3d(CHANNELS, d, (1, 4, 4))
        self.frame_packer, self.trainable_cond_mask = FramePacker(d), nn.Embedding(3, d)
        self.time_embedding = nn.Sequential(nn.Linear(c["freq_dim"], d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.casual_audio_encoder = AudioEncoder(d, c["audio_dim"], c["num_audio_token"])
        self.blocks = nn.ModuleList(Block(d, c["ffn_dim"]) for _ in range(c["num_layers"]))
        self.audio_injector, self.head = Injector(d, len(c["audio_inject_layers"])), Head(d)
        self._init(d)
        for name, groups in [("cond", conditioning_groups(0))] + [(f"t{j}", [((j, 0, 0), (j + 1, 8, 8), (1, 8, 8))]) for j in range(self.window)]:
            cos, sin = rope_table(groups, d // self.heads)
            self.register_buffer("cos_" + name, cos.float(), persistent=False)
            self.register_buffer("sin_" + name, sin.float(), persistent=False)
        half = c["freq_dim"] // 2
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half), persistent=False)
        self.layer_fn, self.inject_fn = self._layer, self._inject      # replaced by compiled versions on a GPU

    def _init(self, d):
        for name, p in self.named_parameters():
            if p.ndim >= 2 and name.endswith("weight") and "trainable" not in name:
                nn.init.trunc_normal_(p, std=.7 / p[0].numel() ** .5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            self.trainable_cond_mask.weight.normal_(std=.1)
            for b in self.blocks:
                b.modulation[:, (2, 5)] = 1
                b.self_attn.o.weight.mul_(.3)
                b.ffn[2].weight.mul_(.3)
            for a in self.audio_injector.injector:
                a.o.weight.mul_(.3)
            self.time_projection[1].weight.mul_(.1)
            self.head.head.weight.zero_()
            self.head.gate.weight.mul_(.1)
            self.head.gate.bias.fill_(.7)

    def time(self, sigma):
        """[N] -> e [N, d], e0 [N, 6, d]"""
        a = (1000 * sigma.double())[:, None] * self.frequencies
        e = self.time_embedding(torch.cat([a.cos(), a.sin()], -1).float())
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def table(self, name):
        return getattr(self, "cos_" + name), getattr(self, "sin_" + name)

    def _layer(self, block, x, c, mx, mc):
        """x [B, L, 64, d] noisy frames, c [B, 160, d] conditioning; mx [B, 6, d], mc [1, 6, d]"""
        b, length, n, _ = x.shape
        w = self.window
        mc = (block.modulation + mc)[:, :, None].unbind(1)
        mx = (block.modulation + mx)[:, :, None, None].unbind(1)
        cq, ck, cv = block.qkv(c, mc, self.heads)
        ck = rotate(ck, *self.table("cond"))
        c = block.rest(c, attend(rotate(cq, *self.table("cond")), ck, cv), mc)
        q, k, v = block.qkv(x, mx, self.heads)
        q = rotate(q, *self.table(f"t{w - 1}"))
        pad = lambda t: F.pad(t, (0, 0, 0, 0, 0, 0, w - 1, 0))
        kp, vp = pad(k), pad(v)
        keys = torch.cat([rotate(kp[:, j:j + length], *self.table(f"t{j}")) for j in range(w)] + [ck[:, None].expand(-1, length, -1, -1, -1)], 2)
        values = torch.cat([vp[:, j:j + length] for j in range(w)] + [cv[:, None].expand(-1, length, -1, -1, -1)], 2)
        out = [attend(q[:, f], keys[:, f, n * (w - 1 - f):], values[:, f, n * (w - 1 - f):])[:, None] for f in range(min(w - 1, length))]
        if length >= w:
            out.append(attend(q[:, w - 1:].flatten(0, 1), keys[:, w - 1:].flatten(0, 1), values[:, w - 1:].flatten(0, 1)).unflatten(0, (b, -1)))
        return block.rest(x, torch.cat(out, 1), mx), c

    def _inject(self, injector, j, x, g, l):
        return injector.inject(j, x.flatten(0, 1), g, l, self.heads).view_as(x)

    def forward(self, noisy, sigma, audio, ref):
        """noisy [B, L, 16, 32, 32] at sigma [B], audio [B, 4L, 202], ref [B, 16, 32, 32] -> x0 like noisy.
        Frame f sees frames f-3..f and the conditioning; all frames of a sequence are at one sigma."""
        b, length = noisy.shape[:2]
        mask = self.trainable_cond_mask.weight
        pad, drop = self.config["motion_frames"]
        a = audio.unflatten(1, (length, 4)).flatten(0, 1).transpose(1, 2)
        g, l = self.casual_audio_encoder.encoder(torch.cat([a[..., :1].expand(-1, -1, pad), a], -1), drop)
        x = patches(self.patch_embedding, noisy.flatten(0, 1)).unflatten(0, (b, length)).float()
        x = x + patches(self.cond_encoder, ref)[:, None] + mask[0]
        p = self.frame_packer
        c = torch.cat([patches(self.patch_embedding, ref) + mask[1]] + [
            t + mask[2] for t in (patches(p.proj, ref), patches(p.proj_2x, ref), patches(p.proj_4x, ref).repeat(1, 4, 1))], 1).float()
        e, e0 = self.time(sigma)
        _, ez = self.time(sigma.new_zeros(1))
        inject = self.config["audio_inject_layers"]
        for i, block in enumerate(self.blocks):
            x, c = self.layer_fn(block, x, c, e0, ez)
            if i in inject:
                x = self.inject_fn(self.audio_injector, inject.index(i), x, g, l)
        shift, scale = (self.head.modulation + e[:, None]).unbind(1)
        y = layer_norm(x) * (1 + scale[:, None, None]) + shift[:, None, None]
        return unpatch(self.head.head(y).float()) + gate_map(self.head.gate(y).float()) * ref[:, None]


def unpatch(y):
    """[..., 64, 256] with channel fastest -> [..., 16, 32, 32]"""
    lead = y.shape[:-2]
    y = y.reshape(-1, 8, 8, 4, 4, CHANNELS).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(*lead, CHANNELS, LATENT, LATENT)


def gate_map(g):
    """[..., 64, 16] -> [..., 16, 32, 32], each gate over its 4x4 patch"""
    lead = g.shape[:-2]
    g = g.reshape(-1, 8, 8, CHANNELS).permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return g.reshape(*lead, CHANNELS, LATENT, LATENT)


def count(module):
    return sum(p.numel() for p in module.parameters())
