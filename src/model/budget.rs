//! What the 14B model in block mode takes of a card, before anything is loaded: memory by part, and the frames per second
//! to expect. Pure arithmetic over the network's shapes (MODEL.md §9, §13), so that too small a card is told at the start
//! instead of met in mid-speech.

/// How matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    Bf16,
    /// e4m3 with a scale per row.
    Fp8,
    /// GGUF Q8_0: 34 bytes for 32 weights.
    Q8,
    /// GGUF Q4_K: 144 bytes for 256 weights.
    Q4,
}

impl Stored {
    fn bytes(self) -> f64 {
        match self {
            Stored::Bf16 => 2.0,
            Stored::Fp8 => 1.0,
            Stored::Q8 => 34.0 / 32.0,
            Stored::Q4 => 144.0 / 256.0,
        }
    }
}

/// One way to run the model.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Pixels; multiples of 16.
    pub height: usize,
    pub width: usize,
    pub weights: Stored,
    /// Keys and values in e4m3 instead of bf16; attention runs in it, too.
    pub fp8_memory: bool,
    /// Denoising steps; each has a ring of its own.
    pub steps: usize,
    /// Latent frames in a ring, the block's own included (LiveAvatar: 12).
    pub ring: usize,
    /// Faces at once; they share the weights.
    pub sessions: usize,
    /// Transformer blocks that stay on the card; the others visit it.
    pub resident: usize,
    /// Only the ring of the step at work is on the card.
    pub parked: bool,
    /// Pictures come from the small decoder.
    pub small_decoder: bool,
}

/// GB (10⁹ bytes) by part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    pub weights: f64,
    /// Rings and conditioning of all sessions.
    pub memories: f64,
    /// What the decoder remembers of all sessions.
    pub decoders: f64,
    /// Activations, a prompt, workspaces and the driver's own; once, however many sessions there are.
    pub working: f64,
}

impl Need {
    pub fn total(&self) -> f64 {
        self.weights + self.memories + self.decoders + self.working
    }

    /// Whether it fits a card with `gb` of memory, with 3 % to spare for what fragments.
    pub fn fits(&self, gb: f64) -> bool {
        self.total() <= gb * 0.97
    }
}

/// What a card sustains at the model's shapes.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// TFLOP/s: products in bf16 and e4m3, attention in bf16 and e4m3, the decoder's convolutions.
    pub bf16: f64,
    pub fp8: f64,
    pub attention: f64,
    pub attention_fp8: f64,
    pub convolution: f64,
    /// GB/s: the card's own memory, and the bus.
    pub memory: f64,
    pub bus: f64,
    /// What is left of all that when kernels follow each other without a pause and the card is at its power limit.
    pub sustained: f64,
}

/// Ceilings measured on an H200 (2026-11-22 and, attention and convolutions, 2026-11-27, CUDA 13.0, cuDNN 9.19), and what
/// whole steps leave of them.
pub const H200: Speed = Speed {
    bf16: 740.0,
    fp8: 1400.0,
    attention: 720.0,
    attention_fp8: 990.0,
    convolution: 670.0,
    memory: 4200.0,
    bus: 50.0,
    sustained: 0.9,
};

const DIM: f64 = 5120.0;
const FEED: f64 = 13_824.0;
const LAYERS: usize = 40;
const INJECTORS: f64 = 12.0;
const PARAMETERS: f64 = 16_295_755_609.0;
/// Latent frames of a block, and the frames of video they become.
const BLOCK: f64 = 3.0;
const FRAMES: f64 = 12.0;
/// Conditioning in latent frames: reference, and 19 packed motion latents.
const CONDITIONING: f64 = 2.5;

/// Tokens of a text, and the largest part of a projection that a short one is made into (`nn::Folded`).
const TEXT: f64 = 512.0;
const FOLDED: f64 = 0.8;

/// Elements of the matrices of one transformer block: 8 of attention, 2 of the feed-forward part.
const MATRICES: f64 = 8.0 * DIM * DIM + 2.0 * DIM * FEED;

impl Plan {
    fn tokens(&self) -> f64 {
        ((self.height / 16) * (self.width / 16)) as f64
    }

    fn pixels(&self) -> f64 {
        (self.height * self.width) as f64
    }

    /// Predicted need.
    pub fn need(&self) -> Need {
        let resident = self.resident.min(LAYERS) as f64;
        let matrices = MATRICES * LAYERS as f64 + INJECTORS * 4.0 * DIM * DIM;
        let rest = (PARAMETERS - matrices) * 2.0;
        // A visiting block needs room for itself and the next.
        let visiting = if self.resident < LAYERS { 2.0 } else { 0.0 };
        let share = (resident + visiting) / LAYERS as f64;
        // Autoencoder and audio encoder.
        let others = 0.13e9 * 2.0 + 0.32e9 * 4.0;
        let weights = matrices * share.min(1.0) * self.weights.bytes() + rest + others;
        let each = if self.fp8_memory { 1.0 } else { 2.0 };
        // Every ring has the conditioning in front of it; the original is kept for when it moves.
        let rings = if self.parked { 1 } else { self.steps };
        let kept = rings as f64 * (self.ring as f64 + CONDITIONING) + CONDITIONING;
        let memories = LAYERS as f64 * 2.0 * kept * self.tokens() * DIM * each * self.sessions as f64;
        // Two past frames at every temporal convolution: channels times their count, by the share of the pixels.
        let past = 7.0 * 96.0 + 6.0 * 192.0 / 4.0 + (192.0 + 6.0 * 384.0) / 16.0 + (11.0 * 384.0 + 16.0) / 64.0;
        let decoders = 2.0 * 2.0 * past * self.pixels() * self.sessions as f64;
        let folds = matches!(self.weights, Stored::Bf16 | Stored::Fp8) && resident == LAYERS as f64 && !self.parked;
        let text = if folds { FOLDED * DIM * DIM * self.weights.bytes() } else { 2.0 * TEXT * DIM * each };
        // Four tensors of the last level for a block of frames, the transformer's activations, a gigabyte of the driver's.
        let rows = BLOCK * self.tokens();
        let activations = rows * (6.0 * DIM + 2.0 * FEED) * 2.0;
        let working = 4.2 * FRAMES * 96.0 * 2.0 * self.pixels() + activations + LAYERS as f64 * text + 1.2e9;
        Need { weights: weights / 1e9, memories: memories / 1e9, decoders: decoders / 1e9, working: working / 1e9 }
    }

    /// Predicted frames per second of all sessions together, ring full, decoder beside the transformer.
    pub fn frames_per_second(&self, card: &Speed) -> f64 {
        let (n, q) = (self.tokens(), BLOCK * self.tokens());
        let matrix = if self.weights == Stored::Fp8 { card.fp8 } else { card.bf16 } * 1e12;
        let attention = if self.fp8_memory { card.attention_fp8 } else { card.attention } * 1e12;
        let linear = 2.0 * q * ((6.0 * DIM * DIM + 2.0 * DIM * FEED) * LAYERS as f64 + INJECTORS * 2.0 * DIM * DIM);
        let keys = (self.ring as f64 + CONDITIONING) * n;
        let attending = 4.0 * q * (keys + TEXT) * DIM * LAYERS as f64;
        // Between the products every row passes the memory about 14 times.
        let passes = 14.0 * q * DIM * 2.0 * LAYERS as f64 / (card.memory * 1e9);
        let visiting = (LAYERS - self.resident.min(LAYERS)) as f64 * MATRICES * self.weights.bytes();
        let step =
            ((linear / matrix + attending / attention + passes) / card.sustained).max(visiting / (card.bus * 1e9));
        let decode = 40.65e12 * self.pixels() / (480.0 * 832.0) / (card.convolution * 1e12) / card.sustained;
        // 7 ms where the other takes 46, at 704×384 (H200, 2026-11-27).
        let decode = if self.small_decoder { decode / 7.0 } else { decode };
        // The decoder's work takes its share of the card also when it runs beside.
        FRAMES / (self.steps as f64 * step + decode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE: Plan = Plan {
        height: 704,
        width: 384,
        weights: Stored::Fp8,
        fp8_memory: true,
        steps: 3,
        ring: 12,
        sessions: 1,
        resident: LAYERS,
        parked: false,
        small_decoder: false,
    };

    #[test]
    fn the_rings_are_as_large_as_the_specification_says() {
        // Four rings in bf16 (GPU.md §3): 42, 61, 142 GB; without their conditioning.
        for (height, width, gb) in [(704, 384, 42.0), (480, 832, 61.0), (720, 1280, 142.0)] {
            let plan = Plan { height, width, fp8_memory: false, steps: 4, ..LIVE };
            let rings = plan.need().memories * 48.0 / (48.0 + 5.0 * CONDITIONING);
            assert!((rings / gb - 1.0).abs() < 0.02, "{height}×{width}: {rings} GB");
        }
    }

    #[test]
    fn bf16_weights_are_the_checkpoints_and_more_sessions_need_more() {
        let plan = Plan { weights: Stored::Bf16, ..LIVE };
        assert!((plan.need().weights - 32.6 - 1.54).abs() < 0.1, "{}", plan.need().weights);
        let two = Plan { sessions: 2, ..plan }.need();
        assert!(two.memories == 2.0 * plan.need().memories && two.weights == plan.need().weights);
        assert!(Plan { ring: 8, ..plan }.need().total() < plan.need().total());
        assert!(Plan { resident: 4, ..plan }.need().weights < 9.0);
    }

    #[test]
    fn what_fits_where() {
        let quality = Plan { steps: 4, ..LIVE };
        assert!(quality.need().fits(80.0) && !quality.need().fits(24.0), "{:?}", quality.need());
        assert!(Plan { fp8_memory: false, weights: Stored::Bf16, ..quality }.need().fits(141.0));
        assert!(!Plan { fp8_memory: false, height: 720, width: 1280, ..quality }.need().fits(141.0));
        let parked = Plan { parked: true, ..quality }.need();
        assert!(parked.memories < 0.4 * quality.need().memories && parked.weights == quality.need().weights);
    }

    #[test]
    fn predictions_are_the_floors_of_the_specification_and_fewer_steps_are_faster() {
        let quality = Plan { steps: 4, ..LIVE };
        let fps = quality.frames_per_second(&H200);
        // 23.7 one after the other, 24.1 with the decoder beside (src/model/kernels/NOTES.md).
        assert!((23.2..24.6).contains(&fps), "{fps}");
        assert!(LIVE.frames_per_second(&H200) > fps);
        let visiting = Plan { resident: 0, ..quality };
        assert!(visiting.frames_per_second(&H200) < fps);
        // 26.4 were measured.
        let small = Plan { small_decoder: true, ..quality }.frames_per_second(&H200);
        assert!((25.4..26.8).contains(&small), "{small}");
    }
}
