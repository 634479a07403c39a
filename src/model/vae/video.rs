//! The Wan video autoencoders: 2.1 (16 channels, 8×8×4; MODEL.md §5) and 2.2 (48 channels, 16×16×4; §11.3), told apart
//! by their keys. A pass is chunked by definition: pixels in groups of 1, 4, 4, …, latents one at a time; a
//! [`Encoding`] or [`Decoding`] remembers what lies between the chunks, so that streaming equals one pass bit for bit.

use candle_core::{DType, Device, Result, Tensor};

use super::{
    chunk::{History, Probe, Video, quiet},
    wan::{CausalConv, Head, Layer, Loader, Savings},
};
use crate::model::{
    Result as Loaded,
    taehv::{Small, Taehv},
    weights::Weights,
};

/// `vae2_1.py::Wan2_1_VAE` (Wan-Video/Wan2.2 at 42bf4cf): mean and deviation of each latent channel.
#[rustfmt::skip]
const STATISTICS_21: [(f32, f32); 16] = [
    (-0.7571, 2.8184), (-0.7089, 1.4541), (-0.9113, 2.3275), (0.1075, 2.6558), (-0.1745, 1.2196), (0.9653, 1.7708),
    (-0.1517, 2.6052), (1.5508, 2.0743), (0.4134, 3.2687), (-0.0715, 2.1526), (0.5517, 2.8652), (-0.3632, 1.5579),
    (-0.1922, 1.6382), (-0.9497, 1.1253), (0.2503, 2.8251), (-0.2921, 1.9160),
];

/// `vae2_2.py::Wan2_2_VAE` (the same commit).
#[rustfmt::skip]
const STATISTICS_22: [(f32, f32); 48] = [
    (-0.2289, 0.4765), (-0.0052, 1.0364), (-0.1323, 0.4514), (-0.2339, 1.1677), (-0.2799, 0.5313), (0.0174, 0.4990),
    (0.1838, 0.4818), (0.1557, 0.5013), (-0.1382, 0.8158), (0.0542, 1.0344), (0.2813, 0.5894), (0.0891, 1.0901),
    (0.1570, 0.6885), (-0.0098, 0.6165), (0.0375, 0.8454), (-0.1825, 0.4978), (-0.2246, 0.5759), (-0.1207, 0.3523),
    (-0.0698, 0.7135), (0.5109, 0.6804), (0.2665, 0.5833), (-0.2108, 1.4146), (-0.2158, 0.8986), (0.2502, 0.5659),
    (-0.2055, 0.7069), (-0.0322, 0.5338), (0.1109, 0.4889), (0.1567, 0.4917), (-0.0729, 0.4069), (0.0899, 0.4999),
    (-0.2799, 0.6866), (-0.1230, 0.4093), (-0.0313, 0.5709), (-0.1649, 0.6065), (0.0117, 0.6415), (0.0723, 0.4944),
    (-0.2839, 0.5726), (-0.2083, 1.2042), (-0.0520, 0.5458), (0.3748, 1.6887), (0.0152, 0.3971), (0.1957, 1.0600),
    (0.1433, 0.3943), (-0.2944, 0.5537), (0.3573, 0.5444), (-0.0548, 0.4089), (-0.1681, 0.7468), (-0.0667, 0.7744),
];

/// A level of the main path; in 2.2 a parameter-free shortcut goes around it.
struct Level {
    layers: Vec<Layer>,
    around: bool,
}

impl Level {
    /// Frames and side by which the level's resampling shrinks or grows.
    fn factors(&self) -> (usize, usize) {
        match self.layers.last() {
            Some(Layer::Resample(r)) if r.temporal() => (2, 2),
            Some(Layer::Resample(_)) => (1, 2),
            _ => (1, 1),
        }
    }
}

/// Encoder or decoder.
struct Network {
    inlet: CausalConv,
    middle: Vec<Layer>,
    levels: Vec<Level>,
    head: Head,
}

/// Widths of the four levels in units of the base width, with the width before the first level in front.
const MULTIPLIERS: [usize; 5] = [1, 1, 2, 4, 4];

impl Network {
    fn encoder(l: &mut Loader, kind: Kind, dim: usize, out: usize) -> Loaded<Self> {
        let widths = MULTIPLIERS.map(|m| m * dim);
        let inlet = CausalConv::load(l, "encoder.conv1", (kind.planes(), widths[0]), (3, 3))?;
        let mut levels = Vec::new();
        let mut number = 0;
        for (i, pair) in widths.windows(2).enumerate() {
            let (input, width) = (pair[0], pair[1]);
            let mut layers = Vec::new();
            for k in 0..3 {
                let name = kind.name("encoder.downsamples", i, k, &mut number);
                match k {
                    2 if i == 3 => number -= 1,
                    2 => layers.push(Layer::resample(l, &name, (width, width), i > 0, true)?),
                    _ => layers.push(Layer::residual(l, &name, if k == 0 { input } else { width }, width)?),
                }
            }
            kind.gather(layers, &mut levels);
        }
        let middle = Layer::middle(l, "encoder.middle", widths[4])?;
        Ok(Network { inlet, middle, levels, head: Head::load(l, "encoder.head", widths[4], out)? })
    }

    fn decoder(l: &mut Loader, kind: Kind, dim: usize, input: usize) -> Loaded<Self> {
        let widths = [4, 4, 4, 2, 1].map(|m| m * dim);
        let inlet = CausalConv::load(l, "decoder.conv1", (input, widths[0]), (3, 3))?;
        let middle = Layer::middle(l, "decoder.middle", widths[0])?;
        let mut levels = Vec::new();
        let mut number = 0;
        for (i, pair) in widths.windows(2).enumerate() {
            let width = pair[1];
            // in 2.1 the upsampling before this level has halved the width already
            let input = if kind == Kind::Wan21 && i > 0 { pair[0] / 2 } else { pair[0] };
            let up = if kind == Kind::Wan21 { width / 2 } else { width };
            // The first level's upsampling makes two frames of one.
            l.even = i > 0;
            let mut layers = Vec::new();
            for k in 0..4 {
                let name = kind.name("decoder.upsamples", i, k, &mut number);
                match k {
                    3 if i == 3 => number -= 1,
                    3 => layers.push(Layer::resample(l, &name, (width, up), i < 2, false)?),
                    _ => layers.push(Layer::residual(l, &name, if k == 0 { input } else { width }, width)?),
                }
            }
            kind.gather(layers, &mut levels);
        }
        Ok(Network { inlet, middle, levels, head: Head::load(l, "decoder.head", widths[4], kind.planes())? })
    }
}

/// Averages blocks of (frames, rows, columns) folded into channels down to `out` channels.
fn shortcut_down(x: &Tensor, out: usize, (ft, fs): (usize, usize)) -> Result<Tensor> {
    let x = x.pad_with_zeros(0, (ft - x.dim(0)? % ft) % ft, 0)?;
    let (t, c, h, w) = x.dims4()?;
    let x = x.reshape(&[t / ft, ft, c, h / fs, fs, w / fs, fs][..])?;
    let x = x.permute(vec![0, 2, 1, 4, 6, 3, 5])?.contiguous()?;
    let group = c * ft * fs * fs / out;
    x.reshape((t / ft, out, group, h / fs, w / fs))?.mean(2)
}

/// Repeats channels and folds them out into (frames, rows, columns); the very first frame is not doubled.
fn shortcut_up(x: &Tensor, out: usize, (ft, fs): (usize, usize), first: bool) -> Result<Tensor> {
    let (t, c, h, w) = x.dims4()?;
    let times = out * ft * fs * fs / c;
    let x = x.unsqueeze(2)?.broadcast_as((t, c, times, h, w))?.contiguous()?;
    let x = x.reshape(&[t, out, ft, fs, fs, h, w][..])?.permute(vec![0, 2, 1, 5, 3, 6, 4])?.contiguous()?;
    let x = x.reshape((t * ft, out, h * fs, w * fs))?;
    if first { x.narrow(0, ft - 1, t * ft - (ft - 1)) } else { Ok(x) }
}

/// Which of the two published autoencoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Wan21,
    Wan22,
}

impl Kind {
    /// Colour planes that encoder and decoder see: 2.2 folds squares of 2×2 pixels.
    fn planes(self) -> usize {
        match self {
            Kind::Wan21 => 3,
            Kind::Wan22 => 12,
        }
    }

    /// 2.1 numbers its layers through; 2.2 numbers levels, and layers within them.
    fn name(self, path: &str, level: usize, layer: usize, number: &mut usize) -> String {
        *number += 1;
        match self {
            Kind::Wan21 => format!("{path}.{}", *number - 1),
            Kind::Wan22 => format!("{path}.{level}.{}.{layer}", path.rsplit('.').next().unwrap_or_default()),
        }
    }

    fn gather(self, layers: Vec<Layer>, levels: &mut Vec<Level>) {
        match self {
            Kind::Wan21 => levels.extend(layers.into_iter().map(|l| Level { layers: vec![l], around: false })),
            Kind::Wan22 => levels.push(Level { layers, around: true }),
        }
    }

    fn statistics(self) -> &'static [(f32, f32)] {
        match self {
            Kind::Wan21 => &STATISTICS_21,
            Kind::Wan22 => &STATISTICS_22,
        }
    }

    /// Base widths of encoder and decoder as published.
    pub fn widths(self) -> (usize, usize) {
        match self {
            Kind::Wan21 => (96, 96),
            Kind::Wan22 => (160, 256),
        }
    }
}

/// A Wan video autoencoder. Immutable; shared by all who encode and decode.
pub struct WanVae {
    kind: Kind,
    dtype: DType,
    encoder: Option<Network>,
    decoder: Network,
    outlet: Option<CausalConv>,
    inlet: CausalConv,
    mean: Tensor,
    inverse_deviation: Tensor,
    /// Decodes instead of `decoder`, faster and coarser.
    small: Option<Taehv>,
    /// On a card: statistics and the convolution before the decoder as one matrix `[16, 16]` and its bias `[16]`, f32.
    #[cfg(feature = "cuda")]
    card: Option<(Tensor, Tensor)>,
}

/// What an encoding under way remembers: surplus pixels that do not fill a group yet, and the layers' past frames.
#[derive(Default)]
pub struct Encoding {
    history: History,
    waiting: Option<Tensor>,
    chunks: usize,
}

/// What a decoding under way remembers.
#[derive(Default)]
pub struct Decoding {
    history: History,
    chunks: usize,
    small: Small,
}

impl WanVae {
    /// Reads either autoencoder by its official keys; widths are the file's own. A file without `encoder.*` gives one
    /// that only decodes.
    pub fn load(weights: &Weights) -> Loaded<Self> {
        Self::load_with(weights, Savings::default())
    }

    /// The same with only these savings, where it runs on a card.
    pub fn load_with(weights: &Weights, savings: Savings) -> Loaded<Self> {
        let wrapped = weights.has("decoder.upsamples.0.upsamples.0.residual.2.weight");
        let kind = if wrapped { Kind::Wan22 } else { Kind::Wan21 };
        let width = |name: &str, axis: usize, published: usize| match weights.shape(name) {
            Some(s) if s.len() == 5 && s[axis] > 0 && s[axis] <= 4096 => s[axis],
            _ => published,
        };
        let encoder = weights.has("encoder.conv1.weight");
        let encoder = encoder.then(|| width("encoder.conv1.weight", 0, kind.widths().0));
        let decoder = width("decoder.head.2.weight", 1, kind.widths().1);
        Self::build_with(weights, kind, encoder, decoder, savings)
    }

    /// Reads one of `kind` with these base widths; `None` leaves the encoder out.
    pub fn build(weights: &Weights, kind: Kind, encoder: Option<usize>, decoder: usize) -> Loaded<Self> {
        Self::build_with(weights, kind, encoder, decoder, Savings::default())
    }

    fn build_with(
        weights: &Weights,
        kind: Kind,
        encoder: Option<usize>,
        decoder: usize,
        savings: Savings,
    ) -> Loaded<Self> {
        let table = kind.statistics();
        let z = table.len();
        // The form for cards is 2.1's, in bf16, and computes with eight channels at a time.
        let fits = decoder % 8 == 0 && encoder.is_none_or(|dim| dim % 8 == 0) && 4 * decoder <= 768;
        let bf16 = weights.device().is_cuda() && weights.dtype() == DType::BF16;
        let l = &mut Loader::new(weights).for_card(kind == Kind::Wan21 && bf16 && fits, savings);
        let (encoder, outlet) = match encoder {
            Some(dim) => (
                Some(Network::encoder(l, kind, dim, 2 * z)?),
                Some(CausalConv::load(l, "conv1", (2 * z, 2 * z), (1, 1))?),
            ),
            None => (None, None),
        };
        let inlet = CausalConv::load(l, "conv2", (z, z), (1, 1))?;
        let decoder = Network::decoder(l, kind, decoder, z)?;
        let column = |f: &dyn Fn(&(f32, f32)) -> f32| -> Result<Tensor> {
            Tensor::from_vec(table.iter().map(f).collect::<Vec<f32>>(), (z, 1, 1, 1), weights.device())
        };
        let (mean, inverse_deviation) = (column(&|s| s.0)?, column(&|s| 1.0 / s.1)?);
        #[cfg(feature = "cuda")]
        let card = inlet.matrix()?.map(|(matrix, bias)| -> Result<_> {
            // W (z / s + m) + b
            let row = |t: &Tensor| t.flatten_all()?.unsqueeze(0);
            let shift = matrix.broadcast_mul(&row(&mean)?)?.sum(1)?;
            Ok((matrix.broadcast_div(&row(&inverse_deviation)?)?.contiguous()?, (shift + bias)?))
        });
        Ok(WanVae {
            kind,
            dtype: weights.dtype(),
            encoder,
            decoder,
            outlet,
            inlet,
            mean,
            inverse_deviation,
            small: None,
            #[cfg(feature = "cuda")]
            card: card.transpose()?,
        })
    }

    /// The same with another decoder, which takes the same latents; encoding stays as it is.
    pub fn decoded_by(self, small: Taehv) -> Self {
        WanVae { small: Some(small), ..self }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it lives.
    pub fn device(&self) -> &Device {
        self.mean.device()
    }

    /// Latent channels: 16 or 48.
    pub fn channels(&self) -> usize {
        self.mean.elem_count()
    }

    /// Pixels per latent position and side: 8 or 16.
    pub fn scale(&self) -> usize {
        match self.kind {
            Kind::Wan21 => 8,
            Kind::Wan22 => 16,
        }
    }

    /// Mean and 1/deviation of each latent channel, `[channels]`, f32.
    pub fn statistics(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.mean.flatten_all()?, self.inverse_deviation.flatten_all()?))
    }

    /// Encodes a whole video `[3, t, height, width]` in −1..1 to normalised latents `[channels, 1 + (t−1)/4, h, w]`, f32;
    /// frames that do not fill a group of four are dropped.
    pub fn encode(&self, video: &Tensor) -> Result<Tensor> {
        match self.encode_next(&mut Encoding::default(), video)? {
            Some(latents) => Ok(latents),
            None => candle_core::bail!("a video without frames cannot be encoded"),
        }
    }

    /// Encodes more of a video, cut anywhere; `None` when no group of frames is full yet.
    pub fn encode_next(&self, state: &mut Encoding, video: &Tensor) -> Result<Option<Tensor>> {
        self.encode_probed(state, video, &mut quiet)
    }

    /// [`WanVae::encode_next`] that shows intermediate results as `downsamples.2.0`: layer, then chunk.
    pub fn encode_probed(&self, state: &mut Encoding, video: &Tensor, probe: Probe) -> Result<Option<Tensor>> {
        let (Some(encoder), Some(outlet)) = (&self.encoder, &self.outlet) else {
            candle_core::bail!("this autoencoder file has no encoder (keys `encoder.*`); take the complete one")
        };
        let mut frames = video.to_dtype(self.dtype)?.transpose(0, 1)?.contiguous()?;
        if let Some(w) = state.waiting.take() {
            frames = Tensor::cat(&[&w, &frames], 0)?;
        }
        let mut out = Vec::new();
        let mut at = 0;
        loop {
            let size = if state.chunks == 0 { 1 } else { 4 };
            if at + size > frames.dim(0)? {
                break;
            }
            let x = frames.narrow(0, at, size)?;
            at += size;
            out.push(self.encode_chunk(encoder, outlet, state, &x, probe)?);
            state.chunks += 1;
        }
        let rest = frames.dim(0)? - at;
        state.waiting = (rest > 0).then(|| frames.narrow(0, at, rest)?.force_contiguous()).transpose()?;
        if out.is_empty() {
            return Ok(None);
        }
        let moments = Tensor::cat(&out, 0)?;
        let mu = moments.narrow(1, 0, self.channels())?.transpose(0, 1)?.to_dtype(DType::F32)?;
        mu.broadcast_sub(&self.mean)?.broadcast_mul(&self.inverse_deviation).map(Some)
    }

    fn encode_chunk(
        &self,
        net: &Network,
        outlet: &CausalConv,
        state: &mut Encoding,
        x: &Tensor,
        probe: Probe,
    ) -> Result<Tensor> {
        let (n, h) = (state.chunks, &mut state.history);
        let x = match self.kind {
            Kind::Wan21 => x.clone(),
            // pixels of a 2×2 square into channels ordered (colour, column, row)
            Kind::Wan22 => {
                let (t, c, height, width) = x.dims4()?;
                if height % 2 != 0 || width % 2 != 0 {
                    candle_core::bail!("pictures of {width}×{height} cannot be halved");
                }
                x.reshape((t, c, height / 2, 2, width / 2, 2))?
                    .permute(vec![0, 1, 5, 3, 2, 4])?
                    .contiguous()?
                    .reshape((t, c * 4, height / 2, width / 2))?
            }
        };
        let mut x = net.inlet.onward(self.enter(x)?, h)?;
        x.show(probe, || format!("conv1.{n}"))?;
        for (i, level) in net.levels.iter().enumerate() {
            let kept = if level.around { x.plain() } else { None };
            for layer in &level.layers {
                x = layer.forward(x, h)?;
            }
            if let (Some(kept), Video::Plain(y)) = (kept, &x) {
                x = Video::Plain((y + shortcut_down(&kept, y.dim(1)?, level.factors())?)?);
            }
            x.show(probe, || format!("downsamples.{i}.{n}"))?;
        }
        for (i, layer) in net.middle.iter().enumerate() {
            x = layer.forward(x, h)?;
            x.show(probe, || format!("middle.{i}.{n}"))?;
        }
        let x = net.head.forward(x, h)?;
        outlet.onward(x, h)?.leave()
    }

    /// `[frames, channels, height, width]` in the form that the layers take.
    fn enter(&self, x: Tensor) -> Result<Video> {
        #[cfg(feature = "cuda")]
        if self.card.is_some() {
            return Video::on_card(&x, 4);
        }
        Ok(Video::Plain(x))
    }

    /// Decodes whole normalised latents `[channels, n, h, w]` to `[3, 1 + 4(n−1), height, width]` in −1..1, f32.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_next(&mut Decoding::default(), latents)
    }

    /// Decodes further latents of a video; the first one ever gives one frame, every other four.
    pub fn decode_next(&self, state: &mut Decoding, latents: &Tensor) -> Result<Tensor> {
        self.decode_probed(state, latents, &mut quiet)
    }

    /// [`WanVae::decode_next`] that shows intermediate results as `upsamples.3.1`: layer, then chunk.
    pub fn decode_probed(&self, state: &mut Decoding, latents: &Tensor, probe: Probe) -> Result<Tensor> {
        if let Some(small) = &self.small {
            return small.decode_next(&mut state.small, latents);
        }
        let parts = self.decode_parts(state, latents, probe)?;
        let planes = parts.into_iter().map(Video::planes).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&planes, 1)
    }

    /// Decodes further latents to what video encoders take: planar YUV 4:2:0 in BT.601 limited range, `[frames,
    /// width · height · 3/2]` bytes where the network lives; on a card nothing but these bytes has to leave it.
    pub fn decode_i420(&self, state: &mut Decoding, latents: &Tensor) -> Result<Tensor> {
        if let Some(small) = &self.small {
            return small.decode_i420(&mut state.small, latents);
        }
        let parts = self.decode_parts(state, latents, &mut quiet)?;
        Tensor::cat(&parts.into_iter().map(Video::i420).collect::<Result<Vec<_>>>()?, 0)
    }

    /// Whether [`WanVae::decode_i420`] is no dearer than [`WanVae::decode_next`]: it is where a card's planes would first
    /// have to come to the processor.
    pub fn gives_planes(&self) -> bool {
        if let Some(small) = &self.small {
            return small.gives_planes();
        }
        #[cfg(feature = "cuda")]
        if self.card.is_some() {
            return true;
        }
        self.device().is_cpu()
    }

    fn decode_parts(&self, state: &mut Decoding, latents: &Tensor, probe: Probe) -> Result<Vec<Video>> {
        let n = latents.dim(1)?;
        if n == 0 {
            candle_core::bail!("no latents to decode");
        }
        let mut parts = Vec::new();
        #[cfg(feature = "cuda")]
        if let Some((matrix, bias)) = &self.card {
            let latents = latents.to_dtype(DType::F32)?;
            let mut at = 0;
            while at < n {
                // The very first latent stands alone, as its upsampling differs.
                let size = if state.chunks == 0 { 1 } else { PASS.min(n - at) };
                let z = latents.narrow(1, at, size)?.contiguous()?;
                let x = self.decoder.inlet.latents(&z, matrix, bias, PASS, &mut state.history)?;
                parts.push(self.decode_chunk(state, x, probe)?);
                state.chunks += size;
                at += size;
            }
            return Ok(parts);
        }
        let z = latents.to_dtype(DType::F32)?.broadcast_div(&self.inverse_deviation)?.broadcast_add(&self.mean)?;
        let z = z.transpose(0, 1)?.contiguous()?.to_dtype(self.dtype)?;
        let z = self.inlet.forward(&z, &mut state.history)?;
        for i in 0..n {
            let x = self.decoder.inlet.onward(Video::Plain(z.narrow(0, i, 1)?), &mut state.history)?;
            parts.push(self.decode_chunk(state, x, probe)?);
            state.chunks += 1;
        }
        Ok(parts)
    }

    /// From the decoder's first convolution to pixels.
    fn decode_chunk(&self, state: &mut Decoding, mut x: Video, probe: Probe) -> Result<Video> {
        let (n, h, net) = (state.chunks, &mut state.history, &self.decoder);
        x.show(probe, || format!("conv1.{n}"))?;
        for (i, layer) in net.middle.iter().enumerate() {
            x = layer.forward(x, h)?;
            x.show(probe, || format!("middle.{i}.{n}"))?;
        }
        for (i, level) in net.levels.iter().enumerate() {
            let kept = if level.around { x.plain() } else { None };
            for layer in &level.layers {
                x = layer.forward(x, h)?;
            }
            let factors = level.factors();
            if let (Some(kept), Video::Plain(y), true) = (kept, &x, factors.1 > 1) {
                x = Video::Plain((y + shortcut_up(&kept, y.dim(1)?, factors, n == 0)?)?);
            }
            x.show(probe, || format!("upsamples.{i}.{n}"))?;
        }
        x = net.head.forward(x, h)?;
        match (self.kind, x) {
            (Kind::Wan22, Video::Plain(x)) => {
                let (t, c, height, width) = x.dims4()?;
                let x = x.reshape((t, c / 4, 2, 2, height, width))?.permute(vec![0, 1, 4, 3, 5, 2])?.contiguous()?;
                Ok(Video::Plain(x.reshape((t, c / 4, height * 2, width * 2))?))
            }
            (_, x) => Ok(x),
        }
    }
}

/// Latents that a card decodes in one pass: a block of the streaming model. More would only take more memory.
#[cfg(feature = "cuda")]
const PASS: usize = 3;
