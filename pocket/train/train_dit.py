"""Transformer.   torchrun --nproc-per-node N train_dit.py DATA_DIR MODELS_DIR OUT_DIR SECONDS [--resume PATH] [options]

MODELS_DIR holds ae.safetensors and audio.safetensors.  Latents of many random clips are made once on each GPU
and a part of them is replaced every few steps.  The loss: weighted latent error; from --pixels on (a fraction of
the run) also the error of decoded pixels around mouth and eyes; from --own on, half of the sigma < 1 inputs are
built from the model's own prediction at sigma 1.  --together trains transformer and decoder end to end (the encoder
stays), which is what makes blinks crisp.
"""
import argparse
import copy
import os
import random
import time

import numpy as np
import torch

import presenters as ps
from common import DEVICE, GPU, RANK, START, agreed, alike, averaged, begin, end, flat_gradients, half_precision, load, log, save, schedule
from data import LEFT, Clips, Speech, augment, viseme_loss
from model import CHANNELS, REFERENCE, AudioNet, Decoder, Encoder, Transformer, count
from train_ae import matte_loss, parts_of, picture_loss, pictures, pixel_weights

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("models")
parser.add_argument("out")
parser.add_argument("seconds", type=float)
parser.add_argument("--resume")
parser.add_argument("--batch", type=int, default=64 if GPU else 2)
parser.add_argument("--length", type=int, default=16 if GPU else 5)
parser.add_argument("--clips", type=int, default=12000 if GPU else 6)
parser.add_argument("--identities", type=int, default=16000 if GPU else 8)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--optimizer", default="muon")
parser.add_argument("--pixels", type=float, default=.55)
parser.add_argument("--own", type=float, default=.35)
parser.add_argument("--decoded", type=int, default=20, help="of the clips of a step and GPU, how many are decoded, three latents of each")
parser.add_argument("--together", action="store_true", help="train the decoder too, on what the transformer predicts; more blinks, more sigma 1")
parser.add_argument("--hear", type=float, default=0, help="the audio net learns too, at this share of the learning rate; its visemes are then part of the loss")
parser.add_argument("--shut", type=float, default=1, help="of the visemes' errors, see train_audio.py")
parser.add_argument("--square", type=float, default=2, help="weight of the pixels' squared errors")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--max-steps", type=int, default=10 ** 9 if GPU else 4)
args = parser.parse_args()

PARTS = 2
MATTE_EVERY = 3                                               # steps: its truth is two more drawings
REFRESH_EVERY, REFRESH = 4, 16 if GPU else 2
# sizes of the decoded pixels; 512 only when the decoder learns too, so that its part follows the coarse one
DRAWN = (256, 256, 256, 384, 384, 512) if args.together else (256, 384)


class Muon:
    """Momentum, orthogonalised (Newton-Schulz), for matrices of like shape together; the size of a step is AdamW's."""

    def __init__(self, matrices, weight_decay=.02, momentum=.95):
        groups = {}
        for p in matrices:
            groups.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.groups = [(ps_, torch.zeros(len(ps_), *shape, device=ps_[0].device)) for shape, ps_ in groups.items()]
        self.weight_decay, self.momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self, lr):
        for parameters, m in self.groups:
            g = torch.stack([p.grad.flatten(1) for p in parameters])
            m.lerp_(g, 1 - self.momentum)
            x = torch.lerp(g, m, self.momentum).bfloat16()
            turned = x.shape[1] > x.shape[2]
            if turned:
                x = x.mT
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
                y = x @ x.mT
                x = a * x + (b * y + c * (y @ y)) @ x
            x = (x.mT if turned else x).float() * (.2 * max(x.shape[1:]) ** .5)
            for p, u in zip(parameters, x):
                p.mul_(1 - lr * self.weight_decay).add_(u.view_as(p), alpha=-lr)


def latent_weights():
    w = torch.ones(32, 32)
    w[10:16, 8:24] = 1.8
    w[17:25, 10:22] = 3.0
    return (w / w.mean()).to(DEVICE)


class Bank:
    """Clips as latents on the GPU."""

    def __init__(self, clips, encoder, n, length):
        self.clips, self.encoder, self.length, self.n = clips, encoder, length, n
        new = lambda *s, dtype=torch.float32: torch.zeros(n, *s, dtype=dtype, device=DEVICE)
        self.z, self.ref = new(length, CHANNELS, 32, 32, dtype=torch.float16), new(2, CHANNELS, 32, 32, dtype=torch.float16)
        self.start, self.params = new(dtype=torch.long), new(length * 4, ps.PARAMETERS)
        chunk = 64 if GPU else 2
        for i in range(0, n, chunk):
            self.fill(torch.arange(i, min(n, i + chunk), device=DEVICE))
        self.next = 0

    @torch.no_grad()
    def fill(self, index):
        n = len(index)
        s, i, _, params = self.clips.draw(n, 4 * self.length)
        refs = self.clips.references(i)
        encode = lambda p, repeats: torch.cat([self.encoder(pictures(q, REFERENCE).unflatten(0, (-1, 4 // repeats)).repeat_interleave(repeats, 1))
                                               for q in p.flatten(0, 1).split(1024)])
        with half_precision():
            z, r = encode(params, 1), encode(refs, 4)
        self.z[index], self.ref[index] = z.view(n, self.length, *z.shape[1:]).half(), r.view(n, 2, *r.shape[1:]).half()
        self.start[index], self.params[index] = s, params

    def refresh(self, k):
        self.fill((torch.arange(k, device=DEVICE) + self.next) % self.n)
        self.next = (self.next + k) % self.n


def compiled(net, b):
    """Compile the layers and try them; if that fails, train without."""
    torch._dynamo.config.cache_size_limit = 64
    net.layer_fn, net.inject_fn = torch.compile(net._layer, dynamic=False), torch.compile(net._inject, dynamic=False)
    try:
        with half_precision():
            z = torch.randn(b, args.length, CHANNELS, 32, 32, device=DEVICE)
            net(z, torch.ones(b, device=DEVICE), torch.randn(b, 4 * args.length, net.config["audio_dim"], device=DEVICE), z[:, 0]).pow(2).mean().backward()
        torch.cuda.synchronize()
        log("compiled layers")
    except Exception as error:                                # noqa: BLE001  (a compiler may fail in any way)
        log("NOT COMPILED:", type(error).__name__, str(error)[:400])
        net.layer_fn, net.inject_fn = net._layer, net._inject
    net.zero_grad(set_to_none=True)


def main():
    begin()
    torch.manual_seed(args.seed * 100 + RANK)
    g = torch.Generator(device=DEVICE).manual_seed(args.seed * 1000 + RANK)
    speech = Speech(args.data, DEVICE)
    clips = Clips(speech, torch.from_numpy(ps.identity(np.random.default_rng(31 + RANK + 10 * args.seed), args.identities)).to(DEVICE), g, 1 / 20 if args.together else 1 / 45)
    encoder, decoder, audio = Encoder().to(DEVICE), Decoder().to(DEVICE), AudioNet().to(DEVICE)
    for m, state in zip((encoder, decoder), parts_of(load(os.path.join(args.models, "ae.safetensors")))):
        m.load_state_dict(state)
    trained_on = os.path.join(os.path.dirname(args.resume or ""), "decoder.safetensors")
    if args.together and args.resume and os.path.exists(trained_on):
        decoder.load_state_dict(load(trained_on))
        log("resumed", trained_on)
    heard = os.path.join(os.path.dirname(args.resume or ""), "audio.safetensors")
    audio.load_state_dict(load(heard if args.hear and args.resume and os.path.exists(heard) else os.path.join(args.models, "audio.safetensors")))
    for m in (encoder, decoder, audio):
        m.eval().requires_grad_(False)
    for m in (encoder, decoder):
        m.to(memory_format=torch.channels_last)
    if args.together:
        decoder.requires_grad_(True)                          # BatchNorm keeps its running statistics
    if args.hear:
        audio.train().requires_grad_(True)
    net = Transformer().to(DEVICE)
    if args.resume:
        net.load_state_dict(load(args.resume), strict=False)
        log("resumed", args.resume)
    alike((net, decoder, audio))
    ema = copy.deepcopy(net).requires_grad_(False)
    if GPU and not os.environ.get("NO_COMPILE"):
        compiled(net, args.batch)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    trained += [("decoder." + n, p) for n, p in decoder.named_parameters() if p.requires_grad]
    trained += [("audio." + n, p) for n, p in audio.named_parameters() if p.requires_grad]
    ema_decoder, ema_audio = copy.deepcopy(decoder).requires_grad_(False), copy.deepcopy(audio).requires_grad_(False)
    flat = flat_gradients([p for _, p in trained])
    matrix = lambda n, p: args.optimizer == "muon" and p.ndim >= 2 and n.endswith("weight") and (".self_attn." in n or ".ffn." in n or "injector.injector." in n)
    muon = Muon([p for n, p in trained if matrix(n, p)]) if args.optimizer == "muon" else None
    rest = [p for n, p in trained if not matrix(n, p) and not n.startswith(("decoder.", "audio."))]
    adam = torch.optim.AdamW([{"params": [p for p in rest if p.ndim >= 2], "weight_decay": .02}, {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.}],
                             lr=args.lr, betas=(.9, .97), fused=GPU)
    if args.together:
        adam.add_param_group({"params": list(decoder.parameters()), "weight_decay": 0.})
    if args.hear:
        adam.add_param_group({"params": list(audio.parameters()), "weight_decay": .02, "pace": args.hear})
    ema_list, net_list = [*ema.parameters(), *ema_decoder.parameters(), *ema_audio.parameters()], [*net.parameters(), *decoder.parameters(), *audio.parameters()]
    log(f"networks: transformer {count(net) / 1e6:.2f} M parameters")
    bank = Bank(clips, encoder, args.clips, args.length)
    if GPU:
        torch.cuda.synchronize()
    log(f"bank of {args.clips} clips, latent std {bank.z[:64].float().std().item():.3f}, speech {speech.frames / 1500:.0f} min")
    weight, same = latent_weights(), random.Random(args.seed)
    pixel_weight = {size: pixel_weights(size, *((4.0, 5.0) if args.together else (2.2, 3.5))) for size in set(DRAWN)}
    scale = torch.tensor(ps.CONTROL_SCALE, device=DEVICE)
    b, length, step, start, saved = args.batch, args.length, 0, None, 0
    sums = {}

    def store():
        save(os.path.join(args.out, "dit.safetensors"), ema.state_dict(), PARTS)
        if args.together:
            save(os.path.join(args.out, "decoder.safetensors"), ema_decoder.state_dict())
        if args.hear:
            save(os.path.join(args.out, "audio.safetensors"), ema_audio.state_dict())
    while True:
        if step == 4:
            if GPU:
                torch.cuda.synchronize()
            start, budget = time.time(), max(1., args.seconds - (time.time() - START))
            log("compiled")
        elapsed = 0. if start is None else time.time() - start
        p = agreed(0. if start is None else elapsed / budget, step)
        if p >= 1 or step >= args.max_steps:
            break
        lr = args.lr * schedule(p, .02 if not args.resume else .04)
        for group in adam.param_groups:
            group["lr"] = lr * group.get("pace", 1.)
        k = torch.randint(0, bank.n, (b,), device=DEVICE, generator=g)
        z, s, params = bank.z[k].float(), bank.start[k], bank.params[k]
        ref = bank.ref[k, (torch.rand(b, device=DEVICE) < .22).long()].float()
        u = torch.rand(b, device=DEVICE)
        ones, halves = (.70, .88) if args.together else (.52, .80)
        sigma = torch.where(u < ones, 1., torch.where(u < halves, .5, (.05 + .95 * torch.rand(b, device=DEVICE)).round(decimals=2)))
        noise, wide = torch.randn_like(z), sigma[:, None, None, None, None]
        with torch.no_grad(), half_precision():
            m = speech.mels(s, 4 * length)
            if step % 8:
                m = augment(m, g)
        with torch.set_grad_enabled(args.hear > 0), half_precision():
            features = audio(m)[:, LEFT:LEFT + 4 * length]
            said = audio.visemes(features).float()
            a = torch.cat([features.float(), params[..., 56:66] * scale], -1)
        with torch.no_grad(), half_precision():
            origin = z
            if p >= args.own or step < 2:                     # the first steps also compile this case
                order = torch.argsort(sigma)                  # the lowest sigmas first: these get the model's own prediction
                few = order[:max(1, b // 4)]
                origin = z.clone()
                origin[few] = net(noise[few], torch.ones(len(few), device=DEVICE), a[few], ref[few])
        x = (1 - wide) * origin + wide * noise
        with half_precision():
            x0 = net(x, sigma, a, ref)
        error = (x0 - z).pow(2)
        loss = latent = (error * weight).mean()
        if args.hear:
            loss = loss + viseme_loss(said, speech.visemes(s, 4 * length), args.shut)
        if p >= args.pixels:
            n, t = min(b, args.decoded), 3
            first = int(torch.randint(0, length - t + 1, (1,)))
            high = n * 3 // 4 if args.together else n // 2    # most at sigma 1, some at the lowest of this batch
            rows = torch.cat([torch.argsort(sigma, descending=True)[:high], torch.argsort(sigma)[:n - high]])
            size, shown = same.choice(DRAWN), params[rows, 4 * first:4 * (first + t)].flatten(0, 1)
            with half_precision():
                y = decoder(x0[rows, first:first + t], size)
            y = y.float().flatten(0, 1)
            picture = picture_loss(y[:, :3], pictures(shown, size), pixel_weight[size], args.square)
            if args.together and step % MATTE_EVERY == 0:
                picture = picture + .1 * MATTE_EVERY * matte_loss(y[:, 3], ps.render_matte(shown, size))
            loss = loss + (4 if args.together else 1.5) * picture
        flat.zero_()
        loss.backward()
        norm = averaged(flat)
        adam.step()
        if muon:
            muon.step(lr)
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(ema_list, net_list, 1 - min(.9985, step / (step + 10.)))
        if step % REFRESH_EVERY == 0:
            bank.refresh(REFRESH)
        if step % 50 == 0 or not GPU:
            with torch.no_grad():
                one, half = sigma == 1, sigma == .5
                e = error.detach().mean(2)
                values = {"loss": latent.detach(), "s1": e[one].mean(), "s1mouth": e[one][..., 17:25, 10:22].mean(), "s1eyes": e[one][..., 10:16, 8:24].mean(), "s.5": e[half].mean()}
                if p >= args.pixels:
                    values["picture"] = picture.detach()
                if args.hear:
                    values["heard"] = viseme_loss(said, speech.visemes(s, 4 * length), args.shut).detach()
                for q, v in values.items():
                    sums.setdefault(q, []).append(v)
        if step % 250 == 0 or not GPU or step in (1, 4, 100):
            log("dit", step, f"p {p:.2f} norm {norm.item():.2f}", " ".join(f"{q} {torch.stack(v).nanmean().item():.4f}" for q, v in sums.items()))
            sums = {}
        if RANK == 0 and p > .25 * (saved + 1):
            saved += 1
            store()
    if RANK == 0:
        store()
        log("done, steps", step, f"{(time.time() - start) / max(1, step - 4) * 1e3:.1f} ms a step" if start else "")
    end()


if __name__ == "__main__":
    main()
