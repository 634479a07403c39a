"""Checkpoints -> the weights file.   python export.py MODELS_DIR DIT_PATH OUT.safetensors [--shards] [--steps N] [--audio-only]

MODELS_DIR holds ae.safetensors and audio.safetensors; DIT_PATH may be in parts (PATH.0, PATH.1); a decoder.safetensors
beside it (training together) replaces the autoencoder's decoder.  With --audio-only DIT_PATH is a weights file, and all but the
audio net is taken from it.
"""
import argparse
import os

import torch

import presenters as ps
import weights
from common import load
from model import CONFIG, AudioNet, Decoder, Encoder, Transformer
from audio import MEL_FILTERS


def with_audio(models, path):
    """The tensors of a weights file with the audio net of MODELS_DIR"""
    tensors, _ = weights.read(path)
    for k, v in load(os.path.join(models, "audio.safetensors")).items():
        assert tensors["audio." + k].shape == v.shape, k
        tensors["audio." + k] = v
    return tensors


def tensors_of(models, dit_path):
    state = load(os.path.join(models, "ae.safetensors"))
    encoder, decoder, audio, dit = Encoder(), Decoder(), AudioNet(), Transformer()
    for name, m in (("encoder.", encoder), ("decoder.", decoder)):
        m.load_state_dict({k[len(name):]: v for k, v in state.items() if k.startswith(name)})
    if os.path.exists(os.path.join(os.path.dirname(dit_path), "decoder.safetensors")):      # trained on with the transformer
        decoder.load_state_dict(load(os.path.join(os.path.dirname(dit_path), "decoder.safetensors")))
    trained_on = os.path.join(os.path.dirname(dit_path), "audio.safetensors")
    audio.load_state_dict(load(trained_on if os.path.exists(trained_on) else os.path.join(models, "audio.safetensors")))
    dit.load_state_dict(load(dit_path))
    out = weights.vae_tensors(encoder, decoder)
    out.update({"audio." + k: v for k, v in audio.state_dict().items()})
    out["audio.mel_filters"] = torch.from_numpy(MEL_FILTERS)
    out.update({"dit." + k: v for k, v in dit.state_dict().items()})
    out["control_scale"], out["control_range"] = torch.tensor(ps.CONTROL_SCALE), torch.tensor(ps.CONTROL_RANGE, dtype=torch.float32)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models")
    parser.add_argument("dit")
    parser.add_argument("out")
    parser.add_argument("--shards", action="store_true")
    parser.add_argument("--audio-only", action="store_true")
    parser.add_argument("--steps", type=int, default=CONFIG["default_steps"])
    args = parser.parse_args()
    config = {**CONFIG, "default_steps": args.steps, "control_names": ps.CONTROL_NAMES, "control_neutral": ps.NEUTRAL}
    tensors = (with_audio if args.audio_only else tensors_of)(args.models, args.dit)
    if args.shards:
        for file in weights.write_shards(args.out, tensors, config):
            print(file, os.path.getsize(file))
    else:
        print(args.out, weights.write(args.out, tensors, config))
