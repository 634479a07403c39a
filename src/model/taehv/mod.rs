//! The small video decoder of the TAEHV family in the layout of `taew2_1.pth` (madebyollin/taehv at 1f14a56, taehv.py):
//! a fast stand-in for Wan 2.1's decoder. Takes the same normalised latents. `tests/it/small_decoder.rs` holds it against
//! what the reference gave for random weights.
//!
//! Layers are numbered through in `decoder.N`: 1 a convolution, then three stages of three memory blocks, an
//! upsampling without weights, a growth in time (1×1) and a convolution, and at 22 the convolution to pixels. A memory
//! block sees the frame before; that is all the decoder remembers, so streaming equals one pass bit for bit. On an NVIDIA
//! card in bf16 it takes the form of `card`.

#[cfg(feature = "cuda")]
mod card;

use candle_core::{DType, Result, Tensor};

use super::{Result as Loaded, nn::convolve, picture, weights::Weights};

/// 3×3 convolution with padding, with or without bias.
struct Conv(Tensor, Option<Tensor>);

impl Conv {
    fn load(w: &Weights, name: &str, (input, out): (usize, usize), side: usize, bias: bool) -> Loaded<Self> {
        let w = w.pp(name);
        let b = if bias { Some(w.get(out, "bias")?.reshape((1, out, 1, 1))?) } else { None };
        Ok(Conv(w.get((out, input, side, side), "weight")?, b))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = convolve(x, &self.0, self.0.dim(2)? / 2, 1)?;
        match &self.1 {
            Some(b) => y.broadcast_add(b),
            None => Ok(y),
        }
    }
}

struct Stage {
    blocks: Vec<[Conv; 3]>,
    grow: Conv,
    out: Conv,
}

/// The decoder. Immutable.
pub struct Taehv {
    inlet: Conv,
    stages: Vec<Stage>,
    outlet: Conv,
    dtype: DType,
    /// Frames that one latent becomes.
    growth: usize,
    #[cfg(feature = "cuda")]
    card: Option<card::Decoder>,
}

/// What a decoding under way remembers: the last frame at every memory block.
#[derive(Default)]
pub struct Small {
    past: Vec<Option<Tensor>>,
    begun: bool,
}

/// Frames that each stage makes of one, at most (decoder_time_upscale of the reference).
const GROWTH: [usize; 3] = [1, 2, 2];
/// Widths as published.
const WIDTHS: [usize; 4] = [256, 128, 64, 64];

impl Taehv {
    /// Reads the decoder; widths and growth are the file's own.
    pub fn load(w: &Weights, latent_channels: usize) -> Loaded<Self> {
        w.ignore("encoder");
        let width = |name: &str, published: usize| {
            w.shape(name).and_then(|s| s.first().copied()).filter(|n| (1..=4096).contains(n)).unwrap_or(published)
        };
        let mut input = width("decoder.1.weight", WIDTHS[0]);
        let inlet = Conv::load(w, "decoder.1", (latent_channels, input), 3, true)?;
        let (mut stages, mut growth) = (Vec::new(), 1);
        for i in 0..3 {
            let at = 3 + 6 * i;
            let mut blocks = Vec::new();
            for b in at..at + 3 {
                let conv = |k: usize, n: usize| Conv::load(w, &format!("decoder.{b}.conv.{k}"), (n, input), 3, true);
                blocks.push([conv(0, 2 * input)?, conv(2, input)?, conv(4, input)?]);
            }
            let (grow, out) = (format!("decoder.{}.conv", at + 4), format!("decoder.{}", at + 5));
            let stored = (width(&format!("{grow}.weight"), GROWTH[i] * input) / input).max(1);
            let times = stored.min(GROWTH[i]);
            let grown = Conv::load(w, &grow, (input, input * stored), 1, false)?;
            // a file may hold more growth than is used; the last frames are the ones that count
            let grown = Conv(grown.0.narrow(0, input * (stored - times), input * times)?, None);
            let next = width(&format!("{out}.weight"), WIDTHS[i + 1]);
            stages.push(Stage { blocks, grow: grown, out: Conv::load(w, &out, (input, next), 3, false)? });
            growth *= times;
            input = next;
        }
        let outlet = Conv::load(w, "decoder.22", (input, 3), 3, true)?;
        let net = Taehv {
            inlet,
            stages,
            outlet,
            dtype: w.dtype(),
            growth,
            #[cfg(feature = "cuda")]
            card: None,
        };
        #[cfg(feature = "cuda")]
        let net = Taehv { card: card::Decoder::of(&net)?, ..net };
        Ok(net)
    }

    /// Decodes further normalised latents `[channels, n, h, w]` to `[3, t, 8h, 8w]` in −1..1, f32; the first latent ever
    /// gives one frame, every other all of its growth (four).
    pub fn decode_next(&self, state: &mut Small, latents: &Tensor) -> Result<Tensor> {
        let x = self.squashed(latents)?;
        #[cfg(feature = "cuda")]
        if let Some(card) = &self.card {
            return card.decode(state, x, self.growth)?.planes().map_err(card::error);
        }
        let mut x = self.inlet.forward(&x)?.relu()?;
        let mut number = 0;
        for stage in &self.stages {
            for [a, b, c] in &stage.blocks {
                if state.past.len() <= number {
                    state.past.push(None);
                }
                let t = x.dim(0)?;
                let newest = x.narrow(0, t - 1, 1)?.force_contiguous()?;
                let before = match state.past[number].replace(newest) {
                    Some(p) => p,
                    None => x.narrow(0, 0, 1)?.zeros_like()?,
                };
                let before = match t {
                    1 => before,
                    _ => Tensor::cat(&[&before, &x.narrow(0, 0, t - 1)?], 0)?,
                };
                let y = a.forward(&Tensor::cat(&[&x, &before], 1)?)?.relu()?;
                x = (c.forward(&b.forward(&y)?.relu()?)? + &x)?.relu()?;
                number += 1;
            }
            let (_, width, h, w) = x.dims4()?;
            let y = stage.grow.forward(&x.upsample_nearest2d(h * 2, w * 2)?)?;
            x = stage.out.forward(&y.reshape(((), width, h * 2, w * 2))?)?;
        }
        let mut y = self.outlet.forward(&x.relu()?)?;
        if !state.begun {
            state.begun = true;
            y = y.narrow(0, self.growth - 1, y.dim(0)? - (self.growth - 1))?;
        }
        y.transpose(0, 1)?.contiguous()?.to_dtype(DType::F32)?.clamp(0.0, 1.0)?.affine(2.0, -1.0)
    }

    /// [`Taehv::decode_next`] as planar YUV 4:2:0 (BT.601 limited range), `[t, 8w · 8h · 3/2]` bytes; on a card nothing but
    /// these bytes has to leave it.
    pub fn decode_i420(&self, state: &mut Small, latents: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(card) = &self.card {
            return card.decode(state, self.squashed(latents)?, self.growth)?.i420().map_err(card::error);
        }
        picture::i420(&self.decode_next(state, latents)?)
    }

    /// Whether [`Taehv::decode_i420`] is no dearer than [`Taehv::decode_next`].
    pub fn gives_planes(&self) -> bool {
        #[cfg(feature = "cuda")]
        if self.card.is_some() {
            return true;
        }
        self.inlet.0.device().is_cpu()
    }

    /// `[frames, channels, h, w]`, kept within ±3 softly.
    fn squashed(&self, latents: &Tensor) -> Result<Tensor> {
        let x = latents.transpose(0, 1)?.contiguous()?.to_dtype(self.dtype)?;
        if x.dim(0)? == 0 {
            candle_core::bail!("no latents to decode");
        }
        (x * (1.0 / 3.0))?.tanh()? * 3.0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::weights::Tensors;
    use candle_core::Device;

    /// Narrow layers, growth 1, 2, 2, and every name of the published file.
    fn tensors(widths: [usize; 4]) -> Arc<Tensors> {
        let [first, ..] = widths;
        let mut list: Vec<(String, Vec<usize>)> =
            vec![("decoder.1.weight".into(), vec![first, 16, 3, 3]), ("decoder.1.bias".into(), vec![first])];
        for (i, times) in [1, 2, 2].into_iter().enumerate() {
            let (at, n, next) = (3 + 6 * i, widths[i], widths[i + 1]);
            for b in at..at + 3 {
                for (k, input) in [(0, 2 * n), (2, n), (4, n)] {
                    list.push((format!("decoder.{b}.conv.{k}.weight"), vec![n, input, 3, 3]));
                    list.push((format!("decoder.{b}.conv.{k}.bias"), vec![n]));
                }
            }
            list.push((format!("decoder.{}.conv.weight", at + 4), vec![n * times, n, 1, 1]));
            list.push((format!("decoder.{}.weight", at + 5), vec![next, n, 3, 3]));
        }
        let last = widths[3];
        list.extend([("decoder.22.weight".into(), vec![3, last, 3, 3]), ("decoder.22.bias".into(), vec![3])]);
        // Scaled by what each layer sums up, or every pixel would be black or white.
        let random = |s: &[usize]| {
            let summed = s[1..].iter().product::<usize>() as f64;
            let spread = if s.len() == 1 { 0.1 } else { summed.powf(-0.5) };
            Tensor::randn(0f64, spread, s, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
        };
        Arc::new(Tensors::new(list.iter().map(|(n, s)| (n.clone(), random(s))), "test"))
    }

    fn net(tensors: &Arc<Tensors>, device: &Device, dtype: DType) -> Taehv {
        let w = Weights::new(tensors.clone(), device, dtype);
        let net = Taehv::load(&w, 16).unwrap();
        assert_eq!(w.finish().unwrap().unexpected, Vec::<String>::new());
        net
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn card_small_decoder_agrees_with_the_processor_and_streams_bit_for_bit() {
        let card = crate::model::kernels::cuda::open(0).unwrap();
        let tensors = tensors([32, 16, 8, 8]);
        let z = Tensor::randn(0f32, 1.0, (16, 5, 3, 4), &Device::Cpu).unwrap();
        let want = net(&tensors, &Device::Cpu, DType::F32).decode_next(&mut Small::default(), &z).unwrap();
        let on_card = net(&tensors, &card, DType::BF16);
        assert!(on_card.card.is_some());
        let z = z.to_device(&card).unwrap();
        let whole = on_card.decode_next(&mut Small::default(), &z).unwrap();
        let mut state = Small::default();
        let parts =
            [(0, 1), (1, 3), (4, 1)].map(|(at, n)| on_card.decode_next(&mut state, &z.narrow(1, at, n).unwrap()));
        let joined = Tensor::cat(&parts.map(Result::unwrap), 1).unwrap();
        let planes = on_card.decode_i420(&mut Small::default(), &z).unwrap().to_device(&Device::Cpu).unwrap();
        let flat = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&whole), flat(&joined));
        let of_planes = picture::i420(&whole.to_device(&Device::Cpu).unwrap()).unwrap();
        assert_eq!(of_planes.to_vec2::<u8>().unwrap(), planes.to_vec2::<u8>().unwrap());
        let (got, want) = (flat(&whole), flat(&want));
        let (apart, all) = got.iter().zip(&want).fold((0.0, 0.0), |(a, b), (g, w)| (a + (g - w) * (g - w), b + w * w));
        assert!((apart / all).sqrt() < 0.03, "{}", (apart / all).sqrt());
    }

    #[test]
    fn streaming_equals_one_pass_bit_for_bit() {
        let net = net(&tensors([8, 6, 4, 4]), &Device::Cpu, DType::F32);
        let z = Tensor::randn(0f32, 1.0, (16, 5, 3, 4), &Device::Cpu).unwrap();
        let whole = net.decode_next(&mut Small::default(), &z).unwrap();
        assert_eq!(whole.dims(), [3, 17, 24, 32]);
        let mut state = Small::default();
        let cuts = [(0, 1), (1, 3), (4, 1)];
        let parts = cuts.map(|(at, n)| net.decode_next(&mut state, &z.narrow(1, at, n).unwrap()).unwrap());
        assert_eq!(parts[0].dim(1).unwrap(), 1);
        let joined = Tensor::cat(&parts, 1).unwrap();
        let apart = (whole - joined).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(apart, 0.0);
    }
}
