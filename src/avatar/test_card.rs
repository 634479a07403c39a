//! A generator without a model: time code, a moving bar, the portrait in a corner, and a level meter drawn from the
//! speech. It has the pocket engine's geometry, so everything that is not the model can be driven and timed with it.

use super::{AvatarError, Generator, Intake, MatteWish, OpenOptions, Result, Stream};
use crate::media::{
    AudioBlock, Epoch, Frame, FrameBlock, Geometry, MediaTime, Pixels, Portrait, SPEECH_RATE, StageTimes,
};
use std::{
    collections::VecDeque,
    sync::{Arc, LazyLock},
};

const SIZE: usize = 256;
const FPS: u32 = 25;
const BLOCK: u32 = 4;
const SAMPLES_PER_FRAME: usize = (SPEECH_RATE / FPS) as usize;
const THUMB: usize = 80;

/// The test card.
pub fn test_card() -> Box<dyn Generator> {
    Box::new(TestCard)
}

struct TestCard;

fn geometry() -> Geometry {
    Geometry {
        width: SIZE as u32,
        height: SIZE as u32,
        fps: FPS,
        first_block_frames: BLOCK,
        block_frames: BLOCK,
        look_ahead: MediaTime::from_millis(130),
        matte: true,
    }
}

impl Generator for TestCard {
    fn geometry(&self) -> Geometry {
        geometry()
    }
    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> Result<Box<dyn Stream>> {
        let (w, h) = (portrait.width as usize, portrait.height as usize);
        if w == 0 || h == 0 || portrait.rgb.len() != 3 * w * h {
            return Err(AvatarError::Portrait("The picture has no pixels; choose another one.".into()));
        }
        let side = w.min(h);
        let mut thumb = Vec::with_capacity(3 * THUMB * THUMB);
        for y in 0..THUMB {
            for x in 0..THUMB {
                let at = 3 * (((h - side) / 2 + y * side / THUMB) * w + (w - side) / 2 + x * side / THUMB);
                thumb.extend_from_slice(&portrait.rgb[at..at + 3]);
            }
        }
        Ok(Box::new(Card {
            geometry: geometry(),
            intake: Intake::default(),
            speech: VecDeque::new(),
            next: 0,
            hue: (options.seed % 3) as usize,
            matte: options.matte.clone(),
            thumb,
        }))
    }
}

struct Card {
    geometry: Geometry,
    intake: Intake,
    /// Speech not yet shown; the front is the first sample of block `next`.
    speech: VecDeque<f32>,
    next: u64,
    hue: usize,
    matte: MatteWish,
    thumb: Vec<u8>,
}

impl Stream for Card {
    fn push(&mut self, audio: &AudioBlock) -> Result<()> {
        let mut clean = Vec::new();
        self.intake.take(audio, &mut clean)?;
        self.speech.extend(clean);
        Ok(())
    }

    fn pull(&mut self) -> Result<Option<FrameBlock>> {
        if !self.intake.allows(&self.geometry, self.next) {
            return Ok(None);
        }
        let first = self.geometry.first_frame(self.next);
        let frames = (0..u64::from(self.geometry.block(self.next)))
            .map(|i| {
                let take = SAMPLES_PER_FRAME.min(self.speech.len());
                let power: f32 = self.speech.drain(..take).map(|s| s * s).sum::<f32>() / SAMPLES_PER_FRAME as f32;
                Frame {
                    at: self.intake.origin() + MediaTime::from_units((first + i) as i64, FPS),
                    width: SIZE as u32,
                    height: SIZE as u32,
                    pixels: Pixels::Rgb(self.draw(first + i, power.sqrt()).into()),
                    matte: self.matte.get().then(|| DISC.clone()),
                }
            })
            .collect();
        let index = self.next;
        self.next += 1;
        Ok(Some(FrameBlock {
            epoch: Epoch::default(),
            index,
            frames,
            stages: StageTimes::default(),
            controls: Vec::new(),
        }))
    }

    fn cut(&mut self) -> bool {
        self.speech.clear();
        self.intake.rewind(self.geometry.first_frame(self.next) * SAMPLES_PER_FRAME as u64);
        true
    }

    fn finish(&mut self) -> Result<()> {
        self.intake.finish();
        Ok(())
    }
}

impl Card {
    /// Frame `index` for speech of root-mean-square `level` (0..1).
    fn draw(&self, index: u64, level: f32) -> Vec<u8> {
        let mut rgb = vec![0u8; 3 * SIZE * SIZE];
        for (i, px) in rgb.chunks_exact_mut(3).enumerate() {
            let (x, y) = (i % SIZE, i / SIZE);
            px.copy_from_slice(&[(24 + x / 8) as u8, (24 + y / 8) as u8, 48]);
            px[self.hue] += 40;
        }
        for y in 0..THUMB {
            let to = 3 * ((y + 12) * SIZE + SIZE - THUMB - 12);
            rgb[to..to + 3 * THUMB].copy_from_slice(&self.thumb[3 * y * THUMB..3 * (y + 1) * THUMB]);
        }
        let mut fill = |x0: usize, y0: usize, w: usize, h: usize, colour: [u8; 3]| {
            for y in y0..(y0 + h).min(SIZE) {
                for x in x0..(x0 + w).min(SIZE) {
                    rgb[3 * (y * SIZE + x)..][..3].copy_from_slice(&colour);
                }
            }
        };
        fill((index as usize * 4) % SIZE, 200, 12, 44, [230, 230, 230]);
        // −50 dB..0 dB on 160 pixels.
        let db = 20.0 * level.max(1e-5).log10();
        let height = ((db / 50.0 + 1.0).clamp(0.0, 1.0) * 160.0) as usize;
        fill(12, 20, 28, 164, [12, 12, 12]);
        fill(14, 22 + 160 - height, 24, height, if db > -6.0 { [230, 60, 40] } else { [60, 210, 90] });
        let seconds = index / u64::from(FPS);
        let code = format!("{:02}:{:02}:{:02}", seconds / 60 % 100, seconds % 60, index % u64::from(FPS));
        for (n, c) in code.bytes().enumerate() {
            for (row, bits) in glyph(c).iter().enumerate() {
                for col in (0..3).filter(|col| bits >> (2 - col) & 1 == 1) {
                    fill(52 + n * 24 + col * 6, 140 + row * 6, 6, 6, [250, 250, 250]);
                }
            }
        }
        rgb
    }
}

/// The card's matte: a disc in the middle whose edge is soft over 32 pixels.
static DISC: LazyLock<Arc<[u8]>> = LazyLock::new(|| {
    let from_middle = |i: usize| i as f32 + 0.5 - SIZE as f32 / 2.0;
    (0..SIZE * SIZE)
        .map(|i| {
            let radius = from_middle(i % SIZE).hypot(from_middle(i / SIZE));
            ((112.0 - radius) / 32.0 * 255.0 + 0.5) as u8
        })
        .collect()
});

/// 3×5 pixels, one row per byte.
fn glyph(c: u8) -> [u8; 5] {
    match c {
        b'0' => [7, 5, 5, 5, 7],
        b'1' => [2, 6, 2, 2, 7],
        b'2' => [7, 1, 7, 4, 7],
        b'3' => [7, 1, 7, 1, 7],
        b'4' => [5, 5, 7, 1, 1],
        b'5' => [7, 4, 7, 1, 7],
        b'6' => [7, 4, 7, 5, 7],
        b'7' => [7, 1, 1, 1, 1],
        b'8' => [7, 5, 7, 5, 7],
        b'9' => [7, 5, 7, 1, 7],
        _ => [0, 2, 0, 2, 0],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speech() -> Vec<f32> {
        (0..SPEECH_RATE as usize * 2 + 321).map(|i| (i as f32 * 0.05).sin() * (i as f32 / 9000.0).fract()).collect()
    }

    fn render(cut: usize) -> Vec<FrameBlock> {
        let mut card = TestCard;
        let portrait = card.sample_portrait();
        let mut stream = card.open(&portrait, &OpenOptions::default()).unwrap();
        let (mut out, mut at) = (Vec::new(), MediaTime::from_millis(40));
        for part in speech().chunks(cut) {
            let audio = AudioBlock { at, samples: part.to_vec() };
            at = audio.end();
            stream.push(&audio).unwrap();
            while let Some(block) = stream.pull().unwrap() {
                out.push(block);
            }
        }
        stream.finish().unwrap();
        while let Some(block) = stream.pull().unwrap() {
            out.push(block);
        }
        out
    }

    #[test]
    fn however_the_speech_is_cut_the_pictures_are_the_same() {
        let whole = render(usize::MAX >> 1);
        let frames = speech().len().div_ceil(SAMPLES_PER_FRAME);
        assert_eq!(whole.len(), frames.div_ceil(4), "the last block is padded to its full length");
        for cut in [1, 160, 333, 2560, 5000] {
            let parts = render(cut);
            assert_eq!(parts.len(), whole.len());
            for (a, b) in parts.iter().flat_map(|b| &b.frames).zip(whole.iter().flat_map(|b| &b.frames)) {
                assert_eq!(a.at, b.at);
                assert!(a.pixels == b.pixels, "frame at {:?} differs when cut by {cut}", a.at);
            }
        }
        assert_eq!(whole[1].frames[0].at, MediaTime::from_millis(40 + 160));
    }

    #[test]
    fn a_picture_without_pixels_is_refused_in_words() {
        let empty = Portrait { width: 0, height: 4, rgb: Vec::new().into() };
        assert!(matches!(TestCard.open(&empty, &OpenOptions::default()), Err(AvatarError::Portrait(_))));
    }
}
