"""Numbers for the Rust tests.  python parity.py random OUT_WEIGHTS OUT_PARITY   |   python parity.py WEIGHTS OUT_PARITY [PORTRAIT.png]

Writes the streaming form's inputs and outputs and checks that the training form gives the same x0.
"""
import sys

import torch
from safetensors.torch import save_file

import weights
from model import REFERENCE, SIZES, AudioNet, Decoder, Encoder, Transformer
from audio import MEL_FILTERS
from streaming import Pocket, bytes_of

BLOCKS = 5
SCALE = [4., 4., 20., 50., 80., 2., 2., 3., 2., 2.]
RANGE = [[-.7, .7], [-.7, .7], [-.1, .1], [-.06, .06], [-.035, .035], [0, 1], [-1, 1], [-.7, .7], [-.7, 1], [0, 1]]


def all_tensors(encoder, decoder, audio, dit):
    out = weights.vae_tensors(encoder, decoder)
    out.update({"audio." + k: v for k, v in audio.state_dict().items()})
    out["audio.mel_filters"] = torch.from_numpy(MEL_FILTERS)
    out.update({"dit." + k: v for k, v in dit.state_dict().items()})
    out["control_scale"], out["control_range"] = torch.tensor(SCALE), torch.tensor(RANGE)
    return out


def random_networks():
    torch.manual_seed(7)
    nets = Encoder(), Decoder(), AudioNet(), Transformer()
    with torch.no_grad():
        for net in nets[:2]:
            for m in net.modules():
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.running_mean.normal_(std=.1)
                    m.running_var.uniform_(.5, 1.5)
        nets[3].head.head.weight.normal_(std=.05)
        for m in nets[3].modules():
            if isinstance(m, torch.nn.Linear):
                m.bias.normal_(std=.05)
    return [n.eval() for n in nets]


def training_form(tensors):
    """The transformer of model.py with the (dequantised) tensors of a weights file."""
    dit = Transformer()
    missing, unexpected = dit.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("dit.")}, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return dit.eval()


def record(path, picture):
    tensors, config = weights.read(path)
    net, g = Pocket(tensors, config), torch.Generator().manual_seed(3)
    n = BLOCKS * 4 * 640
    t = torch.arange(n) / 16000
    wave = (.3 * torch.sin(2 * torch.pi * (140 + 60 * t) * t) * (.5 + .5 * torch.sin(2 * torch.pi * 3.1 * t)) + .02 * torch.randn(n, generator=g)).float()
    low, high = tensors["control_range"].T
    controls = low + (high - low) * torch.rand(BLOCKS * 4, 10, generator=g)
    noise = torch.randn(BLOCKS, 16, 32, 32, generator=g)
    mel, features, visemes = net.features(wave.numpy())
    ref = net.encode_picture(picture)
    out = {"waveform": wave, "controls": controls, "reference": picture, "noise": noise, "mel": mel, "features": features, "visemes": visemes, "reference_latent": ref}
    audio = torch.cat([features, controls * tensors["control_scale"]], 1)
    dit, worst = training_form(tensors), 0.0
    for steps in (1, 2):
        stream, latents, frames, memories, first = net.open(ref, steps, 256), [], [], [], []
        for b in range(BLOCKS):
            trace = []
            memories.append(stream.memory)
            shown = stream.next(features[4 * b:4 * b + 4], controls[4 * b:4 * b + 4], noise[b], trace)
            latents.append(stream.latent)
            first.append(trace[0])
            if b < 2:
                frames.append(shown)
        out[f"x0.steps{steps}"] = torch.stack(latents)
        x0 = dit(noise[None], torch.ones(1), audio[None], ref[None])[0]
        worst = max(worst, float((x0 - torch.stack(first)).abs().max()))
        if steps == 2:
            x = noise + (.5 - 1) * (noise - x0)
            worst = max(worst, float((dit(x[None], torch.full((1,), .5), audio[None], ref[None])[0] - torch.stack(latents)).abs().max()))
            shown = torch.cat(frames)
            out["frames"], out["matte"] = shown[[3, 7], :3], shown[[3, 7], 3]    # last frame of blocks 0 and 1
            out["frames_crop"] = shown[:, :3, 128:192, 96:160]                   # all eight frames around the mouth
            for size in SIZES[1:]:                                               # the last frame of block 1: 128 pixels from the middle
                whole = bytes_of(net.decode(latents[1], memories[1], size)[0])[3, :, size // 2:size // 2 + 128, size // 2 - 64:size // 2 + 64]
                out[f"frame.{size}"], out[f"matte.{size}"] = whole[:3], whole[3]
    print(f"training form against streaming form: largest difference {worst:.2e}; x0 std {out['x0.steps2'].std():.3f}")
    assert worst < 2e-3
    g_, l_ = net.audio_tokens(audio[:4])
    out["audio_global.0"], out["audio_local.0"] = g_, l_
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if sys.argv[1] == "random":
        size = weights.write(sys.argv[2], all_tensors(*random_networks()))
        print("weights", size)
        picture = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) * 255)[None]
        picture = torch.nn.functional.interpolate(picture, size=REFERENCE, mode="bilinear")[0].byte()
        path, target = sys.argv[2], sys.argv[3]
    else:
        import cv2
        path, target = sys.argv[1], sys.argv[2]
        picture = torch.from_numpy(cv2.imread(sys.argv[3])[..., ::-1].copy()).permute(2, 0, 1)
    out = record(path, picture.contiguous())
    save_file({k: v.contiguous() for k, v in out.items()}, target)
    print({k: tuple(v.shape) for k, v in out.items()})
