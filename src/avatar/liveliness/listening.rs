//! What a face hears of its own voice: stressed syllables, pauses, ends of phrases, questions.

use super::{FPS, Liveliness};
use crate::avatar::Tone;

/// Semitones that a voice ends above its middle when it asks.
const ASKED: f32 = 3.0;

impl Liveliness {
    /// Follows the voice; says whether a syllable was stressed.
    pub(super) fn listen(&mut self, tone: Tone) -> bool {
        let level = if tone.level.is_finite() { tone.level.clamp(0.0, 1.0) } else { 0.0 };
        let db = 20.0 * level.max(1e-4).log10();
        // The floor follows quickly down and slowly up, and never believes that speech is noise.
        let rate = if db < self.floor_db { 0.2 } else { 0.004 };
        self.floor_db = (self.floor_db + rate * (db - self.floor_db)).clamp(-80.0, -35.0);
        let now = ((db - self.floor_db - 8.0) / 22.0).clamp(0.0, 1.0);
        let before = self.quick;
        self.quick += (now - self.quick) * if now > self.quick { 0.5 } else { 0.25 };
        self.slow += (now - self.slow) * 0.06;
        self.follow_pitch(tone.pitch);
        if self.quick > 0.2 {
            if self.silent_s > 0.6 {
                (self.spoken_s, self.middle, self.voiced) = (0.0, None, 0);
            }
            self.spoken_s += 1.0 / FPS;
            self.silent_s = 0.0;
        } else {
            let was = self.silent_s;
            self.silent_s += 1.0 / FPS;
            // A pause after some speech: often a nod or a blink, as people do at the end of a phrase; not after a
            // question, which waits for its answer.
            if was <= 0.28 && self.silent_s > 0.28 && self.spoken_s > 1.2 {
                let draw = self.chance();
                if self.has_asked() {
                    self.asked = 32;
                    self.gaze = [0.0; 2];
                    self.next_gaze = self.next_gaze.max(self.frame + 40);
                } else if draw < 0.35 && self.nod.is_none() {
                    self.nod = Some((self.between(0.05, 0.11), 0.0));
                } else if draw < 0.6 {
                    self.blink_soon();
                }
            }
        }
        self.quick > 0.55 && self.quick - before > 0.16
    }

    /// Keeps the middle of the phrase's pitch and its end.
    fn follow_pitch(&mut self, pitch: Option<f32>) {
        let Some(hz) = pitch.filter(|hz| hz.is_finite() && *hz > 20.0) else { return };
        let semitones = 12.0 * (hz / 100.0).log2();
        let middle = self.middle.get_or_insert(semitones);
        // What jumps by an octave was heard wrongly.
        if (semitones - *middle).abs() > 11.0 {
            return;
        }
        *middle += 0.04 * (semitones - *middle);
        self.recent.rotate_left(1);
        self.recent[4] = semitones;
        self.voiced += 1;
    }

    /// Whether the phrase that just ended rose like a question.
    fn has_asked(&self) -> bool {
        let (Some(middle), true) = (self.middle, self.voiced > 12) else { return false };
        let end = self.recent[2..].iter().sum::<f32>() / 3.0;
        end - middle > ASKED && end > self.recent[0]
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{BROW, tests::RANGE},
        *,
    };

    #[test]
    fn a_question_raises_brows_and_a_statement_does_not() {
        // A phrase of two seconds whose last 400 ms rise, or fall, by five semitones; then silence.
        let after = |seed: u64, bend: f32| {
            let mut life = Liveliness::new(seed, RANGE);
            let mut highest = f32::MIN;
            for frame in 0..25 * 4 {
                let t = frame as f32 / FPS;
                let spoken = t < 2.0;
                let bent = bend * ((t - 1.6) / 0.4).clamp(0.0, 1.0);
                let pitch = spoken.then(|| 120.0 * 2f32.powf(bent / 12.0));
                let c = life.next(Tone { level: if spoken { 0.1 } else { 0.0 }, pitch });
                if t > 2.5 {
                    highest = highest.max(c[BROW]);
                }
            }
            highest
        };
        for seed in 0..10 {
            assert!(after(seed, 5.0) > 0.2, "a question: {}", after(seed, 5.0));
            assert!(after(seed, -5.0) < 0.2, "a statement: {}", after(seed, -5.0));
        }
    }
}
