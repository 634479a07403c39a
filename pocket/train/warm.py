"""Start from a weights file of the 256-pixel form: what it knows is worth an hour of training.

    python warm.py OLD(.safetensors or shards' stem) SPEECH_DIR OUT_DIR

Writes ae, audio and dit .safetensors for train_ae.py, train_audio.py and train_dit.py.  The encoder's first convolution then
sees 384 pixels as it saw 256 (6 pixels averaged to 4); the parts per size start from the old part, its features
interpolated.  BatchNorm is undone: each norm is given the statistics that real clips have there.
"""
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

import presenters as ps
import weights
from common import DEVICE, log, save
from data import Clips, Speech
from model import AudioNet, ConvNorm, Decoder, Encoder, SIZES


def squeeze():
    """[4, 6]: the mean of 6 pixels as 4"""
    m = torch.zeros(4, 6)
    for i in range(4):
        for j in range(6):
            m[i, j] = max(0., min((i + 1) * 1.5, j + 1) - max(i * 1.5, j)) / 1.5
    return m


def stretch(k):
    """[k, 2]: k features between the two of an old cell"""
    at = [min(1., max(0., (i + .5) * 2 / k - .5)) for i in range(k)]
    return torch.tensor([[1 - t, t] for t in at])


def adopt(module, weight, bias):
    module[0].weight.data.copy_(weight)
    module.bias = bias.to(DEVICE)


def measured(net, *inputs):
    """One pass in which each norm learns its statistics, so that it changes nothing"""
    def forward(self, x):
        y = self[0](x)
        mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3))
        n = self[1]
        n.running_mean.copy_(mean), n.running_var.copy_(variance)
        if hasattr(self, "bias"):
            n.weight.data.copy_((variance + n.eps).sqrt()), n.bias.data.copy_(mean + self.bias)
        return n(y)
    old = ConvNorm.forward
    ConvNorm.forward = forward
    try:
        return net.eval()(*inputs)
    finally:
        ConvNorm.forward = old


def main():
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    w, _ = weights.read(sys.argv[1])
    out = sys.argv[3]
    os.makedirs(out, exist_ok=True)
    encoder, decoder = Encoder().to(DEVICE), Decoder().to(DEVICE)
    pair = lambda name: (w[f"vae.{name}.weight"], w[f"vae.{name}.bias"])
    weight, bias = pair("encoder.conv_in")
    d = squeeze()
    weight = torch.einsum("ofcyxhw,yp,xq->ofcpqhw", weight.unflatten(1, (4, 3, 4, 4)), d, d).flatten(1, 4)
    adopt(encoder.conv_in, weight, bias)
    adopt(encoder.down, *pair("encoder.down"))
    adopt(decoder.conv_in, *pair("decoder.conv_in"))
    for prefix, net in (("encoder", encoder), ("decoder", decoder)):
        for name in ("res1", "res2", "res3", "mem"):
            if hasattr(net, name):
                adopt(getattr(net, name).a, *pair(f"{prefix}.{name}.a")), adopt(getattr(net, name).b, *pair(f"{prefix}.{name}.b"))
    encoder.conv_out.weight.copy_(pair("encoder.conv_out")[0]), encoder.conv_out.bias.copy_(pair("encoder.conv_out")[1])
    for size in SIZES:
        fine = decoder.fine[str(size)]
        u = stretch(fine.k)
        weight, bias = pair("decoder.up")
        wide = lambda t: torch.einsum("fcyx...,py,qx->fcpq...", t.unflatten(0, (4, fine.c, 2, 2)), u, u).flatten(0, 3)
        adopt(fine.up, wide(weight), wide(bias))
        for name in ("res3", "res4"):
            adopt(getattr(fine, name).a, *pair(f"decoder.{name}.a")), adopt(getattr(fine, name).b, *pair(f"decoder.{name}.b"))
        fine.res5.b[1].weight.data.zero_()
        fine.conv_out.weight[:48], fine.conv_out.bias[:48] = pair("decoder.conv_out")
        fine.conv_out.weight[48:] *= .1
    g = torch.Generator(device=DEVICE).manual_seed(0)
    clips = Clips(Speech(sys.argv[2], DEVICE), torch.from_numpy(ps.identity(np.random.default_rng(0), 64)).to(DEVICE), g)
    few = 24 if DEVICE.type == "cuda" else 4
    params = clips.draw(few, 8)[3]
    x = ps.render(params, 384).view(-1, 4, 3, 384, 384).float() / 127.5 - 1
    z = measured(encoder, x)
    log("latents: mean", round(z.mean().item(), 3), "deviation", round(z.std().item(), 3))
    for size in SIZES:
        y = measured(decoder, z.view(few, 2, *z.shape[1:]), size)[..., :3, :, :].flatten(0, 1)
        true = ps.render(params, size).float() / 127.5 - 1
        log(size, "psnr", round(float(10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), true))), 2))
    save(os.path.join(out, "ae.safetensors"), {f"{n}.{k}": v for n, m in (("encoder", encoder), ("decoder", decoder)) for k, v in m.state_dict().items()})
    audio = AudioNet()                                     # blocks that the old net lacks begin as nothing
    for block in audio.blocks:
        block.scale.zero_()
    audio.load_state_dict({k[6:]: v for k, v in w.items() if k.startswith("audio.") and k != "audio.mel_filters"}, strict=False)
    save(os.path.join(out, "audio.safetensors"), audio.state_dict())
    save(os.path.join(out, "dit.safetensors"), {k[4:]: v for k, v in w.items() if k.startswith("dit.")}, 2)


if __name__ == "__main__":
    main()
