//! Can the model make this picture speak? It tries: half a second of a vowel, and a look at what comes out.
//!
//! A picture in the model's range comes back like itself where nothing should move (upper half) and moves its mouth
//! where a presenter's mouth is. Of 24 drawn and the twelve built-in presenters the worst had 30.7 dB and a movement of
//! 19.1. Photographs, faces at another place or size, painted-over mouths, noise and flat fields all fail one of the two
//! bounds: of those that come back like themselves none moved by more than 10.4.

use super::{Shared, design};
use crate::{
    avatar::{AvatarError, Result, noise::normal},
    media::Portrait,
    model::{
        audio::{AHEAD, FEATURES, MelState},
        dit::StreamState,
        vae::patch::{FRAMES, LATENT, Memory},
    },
};
use std::{
    collections::{VecDeque, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
};

const LEAST_LIKENESS_DB: f64 = 25.0;
/// Mean difference of the mouth's pixels between the two frames that differ most (of 255). Not of neighbouring frames:
/// how fast a mouth opens at such a sound is the audio net's affair.
const LEAST_MOVEMENT: f64 = 14.0;
/// The upper part in which nothing moves, and the mouth (rows, columns), of a picture of 256.
const STILL_ROWS: usize = 128;
const MOUTH: [[usize; 2]; 2] = [[140, 192], [86, 170]];
const BLOCKS: usize = 3;
/// Pictures remembered as accepted.
const REMEMBERED: usize = 64;

/// What is needed to judge, and who passed.
pub(super) struct Audition {
    /// The vowel as it is heard, `[BLOCKS · 4][192]`.
    vowel: Vec<f32>,
    passed: VecDeque<u64>,
}

impl Audition {
    pub(super) fn new(s: &Shared) -> Audition {
        let frames = BLOCKS * FRAMES;
        // A buzz at 130 Hz, on and off four times a second.
        let buzz = |i: usize| {
            let t = i as f64 / 16_000.0;
            if (t * 4.0).fract() < 0.5 { ((t * 130.0).fract() - 0.5) as f32 * 0.4 } else { 0.0 }
        };
        let speech: Vec<f32> = (0..(frames + 4) * 640).map(buzz).collect();
        let (mut mels, mut state) = (MelState::default(), s.net.start());
        let mut vowel = s.net.push(&mut state, &s.mel.push(&mut mels, &speech));
        vowel.extend(s.net.push(&mut state, &s.mel.push(&mut mels, &[0.0; AHEAD])));
        vowel.extend(s.net.finish(&mut state));
        vowel.truncate(frames * FEATURES);
        Audition { vowel, passed: VecDeque::new() }
    }

    /// `picture`: packed RGB of the pictures' size; `state`: a stream opened on it with one step.
    pub(super) fn judge(&mut self, s: &Shared, mut state: StreamState, picture: &[u8]) -> Result<()> {
        let mut hash = DefaultHasher::new();
        picture.hash(&mut hash);
        let hash = hash.finish();
        if self.passed.contains(&hash) {
            return Ok(());
        }
        let [h, w] = s.grid;
        let mut memory = Memory::new(&s.decoder, h, w);
        let mut shown = Vec::new();
        for (b, features) in self.vowel.chunks_exact(FRAMES * FEATURES).enumerate() {
            let noise = normal(1, b as u64, LATENT * h * w);
            let latent = s
                .imagine(&mut state, features.iter().copied(), &[s.control_neutral; FRAMES], noise)
                .map_err(|e| AvatarError::Device { block: b as u64, stage: "audition", source: e.into() })?;
            shown.extend(s.decoder.decode(&s.pool, &latent, &mut memory));
        }
        let width = s.geometry.width as usize;
        let scale = |n: usize| n * width / 256;
        let still = 3 * width * scale(STILL_ROWS);
        let squares: f64 = shown
            .iter()
            .flat_map(|f| f[..still].iter().zip(&picture[..still]))
            .map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2))
            .sum();
        let likeness = 10.0 * (255.0f64.powi(2) / (squares / (still * shown.len()) as f64).max(1e-6)).log10();
        let [rows, columns] = MOUTH.map(|range| range.map(scale));
        let moved = |(i, j): (usize, usize)| {
            let row = |y: usize| 3 * (y * width + columns[0])..3 * (y * width + columns[1]);
            let rows = (rows[0]..rows[1]).flat_map(|y| shown[i][row(y)].iter().zip(&shown[j][row(y)]));
            let (sum, count) = rows.fold((0.0, 0), |(s, n), (a, b)| (s + f64::from(a.abs_diff(*b)), n + 1));
            sum / f64::from(count.max(1))
        };
        let pairs = (0..shown.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        let movement = pairs.map(moved).fold(0.0, f64::max);
        if likeness < LEAST_LIKENESS_DB || movement < LEAST_MOVEMENT {
            let what = if likeness < LEAST_LIKENESS_DB { "draw this picture" } else { "make this picture speak" };
            return Err(AvatarError::Portrait(format!(
                "The pocket engine cannot {what} (likeness {likeness:.0} dB of {LEAST_LIKENESS_DB:.0}, mouth movement \
                 {movement:.0} of {LEAST_MOVEMENT:.0}). It knows drawn presenters in the style of the built-in ones, seen \
                 from the front with the face in the middle; photographs need the large model. Please choose one of the \
                 built-in presenters, or the designed look that is nearest to this picture: design:{}",
                nearest(picture, width)?
            )));
        }
        self.passed.push_back(hash);
        if self.passed.len() > REMEMBERED {
            self.passed.pop_front();
        }
        Ok(())
    }
}

fn nearest(picture: &[u8], width: usize) -> Result<design::Design> {
    let side = width as u32;
    design::nearest(&Portrait { width: side, height: side, rgb: picture.into() })
}
