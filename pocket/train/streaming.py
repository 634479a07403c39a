"""The run-time form of the pocket model in PyTorch, from the weights file alone: one block of four frames at a time.

This is what the Rust engine does, written plainly; `parity.py` records its numbers and checks that the
training form of `model.py` gives the same.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from model import conditioning_groups, gate_map, group_mean, rope_table, rotate, unpatch


def log_mel(audio, filters):
    """audio [n] -> [n // 320, 64]; frame i is centred on sample 320 i + 160"""
    x = np.pad(np.asarray(audio, np.float32), (96, 512))
    n = len(audio) // 320
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = np.lib.stride_tricks.sliding_window_view(x, 512)[::320][:n] * window
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    return torch.from_numpy(np.clip(np.log10(power @ filters.double().numpy().T + 1e-8) + 8, 0, 11)).float()


class Pocket:
    def __init__(self, weights, config):
        self.w, self.c = weights, config
        self.heads, self.d = config["num_heads"], config["dim"] // config["num_heads"]

    # -------------------------------------------------------------- audio
    def features(self, audio):
        """audio [n] f32 -> mel [2T, 64], features [T, 192], visemes [T, 6] with T = n // 640"""
        w = self.w
        mel = log_mel(audio[:len(audio) // 640 * 640], w["audio.mel_filters"])
        x = F.conv1d(((mel.T - 5) / 2)[None], w["audio.conv_in.weight"], w["audio.conv_in.bias"], padding=1)
        for j, (dilation, ahead) in enumerate(zip(self.c["audio_dilation"], self.c["audio_ahead"])):
            p = f"audio.blocks.{j}."
            h = F.layer_norm(x.transpose(1, 2), (x.shape[1],), w[p + "norm.weight"], w[p + "norm.bias"]).transpose(1, 2)
            h = F.gelu(F.conv1d(F.pad(h, (4 * dilation - ahead, ahead)), w[p + "conv.weight"], w[p + "conv.bias"], dilation=dilation))
            x = x + w[p + "scale"][:, None] * F.conv1d(h, w[p + "proj.weight"], w[p + "proj.bias"])
        x = F.conv1d(x, w["audio.down.weight"], w["audio.down.bias"], stride=2)[0].T
        f = F.layer_norm(x, (x.shape[1],), w["audio.norm.weight"], w["audio.norm.bias"])
        return mel, f, F.linear(f, w["audio.visemes.weight"], w["audio.visemes.bias"])

    # -------------------------------------------------------------- autoencoder
    def conv(self, name, x, **k):
        w = self.w[f"vae.{name}.weight"]
        return F.conv2d(x, w, self.w[f"vae.{name}.bias"], padding=w.shape[-1] // 2, **k)

    def residual(self, name, x, extra=None):
        y = x if extra is None else torch.cat([x, extra], 1)
        return x + self.conv(name + ".b", F.relu(self.conv(name + ".a", F.relu(y))))

    def encode(self, frames):
        """[4, 3, 384, 384] (256 pixels in a file without "sizes") in -1..1 -> [16, 32, 32]"""
        x = F.pixel_unshuffle(frames, frames.shape[-1] // 64)
        x = self.conv("encoder.conv_in", x.reshape(1, -1, 64, 64))
        x = self.residual("encoder.res1", x)
        x = self.conv("encoder.down", F.relu(x), stride=2) + group_mean(F.pixel_unshuffle(x, 2), 192)
        x = self.residual("encoder.res3", self.residual("encoder.res2", x))
        return self.conv("encoder.conv_out", F.relu(x))[0]

    def encode_picture(self, picture):
        """[3, size, size] u8"""
        side = self.c.get("reference_size", 256)
        x = F.interpolate(picture[None].float(), (side, side), mode="area" if picture.shape[-1] > side else "bilinear")[0] if picture.shape[-1] != side else picture.float()
        return self.encode((x / 127.5 - 1).expand(4, -1, -1, -1))

    def features_of(self, z, memory, size=256):
        """one latent and the memory of the last -> the decoder's last coarse [112, 32, 32] and fine [4, 32, 32k, 32k] features
        (after ReLU), new memory"""
        x = self.conv("decoder.conv_in", z[None])
        y = self.residual("decoder.mem", x, torch.zeros_like(x) if memory is None else memory)
        wide = F.relu(self.residual("decoder.res2", self.residual("decoder.res1", y)))
        p = f"decoder.{size}." if "sizes" in self.c else "decoder."
        y = self.conv(p + "up", wide)
        y = F.pixel_shuffle(y.reshape(4, -1, *y.shape[2:]), size // 128)
        for k in range(3, 3 + self.c.get("fine_blocks", 2)):
            y = self.residual(f"{p}res{k}", y)
        return wide[0], F.relu(y), x

    def decode(self, z, memory, size):
        """one latent and the memory of the last -> 4 frames [4, 4, size, size], colours in -1..1 and matte in 0..1, new memory;
        a file without "sizes" gives three planes"""
        _, fine, memory = self.features_of(z, memory, size)
        y = F.pixel_shuffle(self.conv(f"decoder.{size}.conv_out" if "sizes" in self.c else "decoder.conv_out", fine), 4)
        return torch.cat([y[:, :3].clamp(-1, 1), y[:, 3:].clamp(0, 1)], 1), memory

    # -------------------------------------------------------------- transformer
    def lin(self, name, x):
        return F.linear(x, self.w[f"dit.{name}.weight"], self.w[f"dit.{name}.bias"])

    def split(self, x):
        return x.reshape(x.shape[0], self.heads, self.d)

    def rms(self, name, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w[f"dit.{name}.weight"]

    def patches(self, name, z):
        w = self.w[f"dit.{name}.weight"]
        return F.conv2d(z[None], w[:, :, 0], self.w[f"dit.{name}.bias"], stride=w.shape[-1])[0].flatten(1).T

    def time(self, sigma):
        h = self.c["freq_dim"] // 2
        a = 1000 * float(sigma) * 10000.0 ** (-torch.arange(h, dtype=torch.float64) / h)
        e = self.lin("time_embedding.2", F.silu(self.lin("time_embedding.0", torch.cat([a.cos(), a.sin()]).float())))
        return e, self.lin("time_projection.1", F.silu(e)).reshape(6, -1)

    def qkv(self, name, y, source=None):
        source = y if source is None else source
        return (self.split(self.rms(name + ".norm_q", self.lin(name + ".q", y))), self.split(self.rms(name + ".norm_k", self.lin(name + ".k", source))),
                self.split(self.lin(name + ".v", source)))

    def attend(self, q, k, v):
        s = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.d)
        return torch.einsum("hqk,khd->qhd", s.softmax(-1), v).flatten(1)

    def block(self, i, x, e0, attention):
        m = self.w[f"dit.blocks.{i}.modulation"][0] + e0
        norm = lambda t: F.layer_norm(t, t.shape[-1:], eps=1e-6)
        q, k, v = self.qkv(f"blocks.{i}.self_attn", norm(x) * (1 + m[1]) + m[0])
        x = x + self.lin(f"blocks.{i}.self_attn.o", attention(i, q, k, v)) * m[2]
        y = norm(x) * (1 + m[4]) + m[3]
        return x + self.lin(f"blocks.{i}.ffn.2", F.gelu(self.lin(f"blocks.{i}.ffn.0", y), approximate="tanh")) * m[5]

    def audio_tokens(self, a):
        """[4, 202], one block -> global [d], local [5, d]"""
        pad, drop = self.c["motion_frames"]
        p, tokens = "casual_audio_encoder.encoder.", self.c["num_audio_token"]
        x = torch.cat([a[:1].expand(pad, -1), a]).T[None]

        def causal(name, x, stride):
            x = torch.cat([x[..., :1], x[..., :1], x], -1)
            return F.conv1d(x, self.w[f"dit.{p}{name}.conv.weight"], self.w[f"dit.{p}{name}.conv.bias"], stride=stride)

        def act(x):
            x = x.transpose(1, 2)
            return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6)).transpose(1, 2)

        def tail(x):
            return act(causal("conv3", act(causal("conv2", act(x), 2)), 2))
        local = tail(causal("conv1_local", x, 1)[0].reshape(tokens, self.c["dim"] // 4, -1))[..., drop]
        g = tail(causal("conv1_global", x, 1))[0, :, drop]
        return self.lin(p + "final_linear", g), torch.cat([local, self.w[f"dit.{p}padding_tokens"][0, 0]])

    def inject(self, j, x, g, l):
        shift, scale = self.lin(f"audio_injector.injector_adain_layers.{j}.linear", F.silu(g)).chunk(2)
        n = f"audio_injector.injector.{j}"
        y = F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale) + shift
        return x + self.lin(n + ".o", self.attend(*self.qkv(n, y, l)))

    def open(self, ref, steps, size=256):
        return Stream(self, ref, self.c["sigmas"][str(steps)], size)


def bytes_of(frames):
    """[N, 4, H, W], colours -1..1 and matte 0..1 -> u8"""
    return torch.cat([(frames[:, :3] + 1) * 127.5, frames[:, 3:] * 255], 1).round().clamp(0, 255).byte()


class Stream:
    """One face: conditioning keys, one ring of keys and values per denoising step, the decoder's memory."""

    def __init__(self, net, ref, sigmas, size):
        self.net, self.ref, self.sigmas, self.position, self.memory, self.size = net, ref, sigmas, 0, None, size
        self.keep = net.c["kv_frames"]
        self.rings = [[[] for _ in range(net.c["num_layers"])] for _ in sigmas]
        mask = net.w["dit.trainable_cond_mask.weight"]
        x = torch.cat([net.patches("patch_embedding", ref) + mask[1]] + [
            net.patches("frame_packer." + n, ref).repeat(times, 1) + mask[2] for n, times in (("proj", 1), ("proj_2x", 1), ("proj_4x", 4))])
        cos, sin = (t.float() for t in rope_table(conditioning_groups(0), net.d))
        _, ez = net.time(0.0)
        self.cond = {}

        def attention(i, q, k, v):
            self.cond[i] = (k, v)
            return net.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        for i in range(net.c["num_layers"]):
            x = net.block(i, x, ez, attention)

    def denoise(self, x, sigma, audio, step):
        """x [16, 32, 32] at sigma -> x0, writing this step's ring"""
        net, p = self.net, self.position
        g, l = net.audio_tokens(audio)
        y = net.patches("patch_embedding", x) + net.patches("cond_encoder", self.ref) + net.w["dit.trainable_cond_mask.weight"][0]
        cos, sin = (t.float() for t in rope_table([((p, 0, 0), (p + 1, 8, 8), (1, 8, 8))], net.d))
        ccos, csin = (t.float() for t in rope_table(conditioning_groups(p - self.keep + 1), net.d))
        e, e0 = net.time(sigma)

        def attention(i, q, k, v):
            ring = self.rings[step][i]
            ring.append((rotate(k, cos, sin), v))
            del ring[:-self.keep]
            ck, cv = self.cond[i]
            keys = torch.cat([r[0] for r in ring] + [rotate(ck, ccos, csin)])
            return net.attend(rotate(q, cos, sin), keys, torch.cat([r[1] for r in ring] + [cv]))
        inject = net.c["audio_inject_layers"]
        for i in range(net.c["num_layers"]):
            y = net.block(i, y, e0, attention)
            if i in inject:
                y = net.inject(inject.index(i), y, g, l)
        shift, scale = net.w["dit.head.modulation"][0] + e
        y = F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return unpatch(net.lin("head.head", y)) + gate_map(net.lin("head.gate", y)) * self.ref

    def next(self, features, controls, noise, trace=None, show=True):
        """features [4, 192], controls [4, 10] in natural units, noise [16, 32, 32] -> four frames u8 [4, 4, size, size] with the matte as fourth plane,
        or None without `show` (then only the decoder's memory is kept up)"""
        audio = torch.cat([features, controls * self.net.w["control_scale"]], 1)
        x, sigmas = noise, list(self.sigmas) + [0.0]
        for step, (now, then) in enumerate(zip(sigmas, sigmas[1:])):
            x0 = self.denoise(x, now, audio, step)
            if trace is not None:
                trace.append(x0)
            x = x + (then - now) * (x - x0) / now
        self.position += 1
        if not show:
            self.latent, self.memory = x, self.net.conv("decoder.conv_in", x[None])
            return None
        frames, self.memory = self.net.decode(x, self.memory, self.size)
        self.latent = x
        return bytes_of(frames)
