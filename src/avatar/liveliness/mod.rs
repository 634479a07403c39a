//! What a face does besides speaking: blinks, glances, nods, brows, sway, a smile, and calm when nothing is said.
//!
//! A pure process at the video rate: a seed and the tone of each frame in, ten controls out (yaw, pitch, roll, dx, dy,
//! blink, gaze x, gaze y, brow, smile; units as the renderer's), inside the range the model was trained on. Moves are
//! about half as wide as in training, where the model is at its surest.
//!
//! It listens: stressed syllables move brows and head, the end of a phrase brings a nod or a blink, a voice that rose
//! before its pause has asked something and gets raised brows and a tilted head. Where nothing is said it listens to
//! somebody: its eyes stay, it nods slightly now and then. [`BOUNDS`] hold the head at any liveliness; gestures
//! ([`Gesture`]) may use all of the trained range.
//!
//! `listening` follows the voice, `gestures` carries out what it is told; what it does of itself is here.

mod gestures;
mod listening;

use super::{Gesture, Tone};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// Controls of one frame.
pub type Controls = [f32; 10];

const FPS: f32 = 25.0;
const REST: Controls = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3];
const YAW: usize = 0;
const PITCH: usize = 1;
const ROLL: usize = 2;
const DX: usize = 3;
const DY: usize = 4;
const BLINK: usize = 5;
const GAZE_X: usize = 6;
const GAZE_Y: usize = 7;
const BROW: usize = 8;
const SMILE: usize = 9;

/// Yaw, pitch, roll, dx and dy of the head's own motion stay within ± these, in the renderer's units: the tip of the
/// nose never leaves a box of ±4 % of the picture's width and ±3 % of its height around its rest.
pub const BOUNDS: [f32; 5] = [0.36, 0.32, 0.05, 0.03, 0.022];

/// A value drawn towards a target without overshoot (critically damped).
#[derive(Clone, Copy, Default)]
struct Spring {
    at: f32,
    speed: f32,
}

impl Spring {
    /// One frame; `seconds` is about the time to arrive.
    fn follow(&mut self, target: f32, seconds: f32) -> f32 {
        let (w, dt) = (4.0 / seconds, 1.0 / FPS);
        // Implicit step: stable for any stiffness.
        self.speed = (self.speed + w * w * dt * (target - self.at)) / ((1.0 + w * dt) * (1.0 + w * dt));
        self.at += self.speed * dt;
        self.at
    }
}

/// The process of one face.
#[derive(Clone)]
pub struct Liveliness {
    rng: ChaCha8Rng,
    range: [[f32; 2]; 10],
    frame: u64,
    /// Estimate of the room's noise, dB.
    floor_db: f32,
    /// How much is being said, 0..1: quick (syllables) and slow (phrases).
    quick: f32,
    slow: f32,
    /// Seconds since the last pause began or ended.
    spoken_s: f32,
    silent_s: f32,
    springs: [Spring; 10],
    /// Where the head would be without nods, and when that changes.
    pose: [f32; 5],
    next_pose: u64,
    next_blink: u64,
    last_blink: u64,
    /// Frames of the running blink: (age, length, depth).
    blink: Option<(u32, u32, f32)>,
    gaze: [f32; 2],
    next_gaze: u64,
    /// Depth and age in frames of the running nod.
    nod: Option<(f32, f32)>,
    /// When the listener nods next, if nothing is said until then.
    next_sign: u64,
    /// Phases of the sway that never rests.
    phases: [f32; 6],
    /// Pitch of the phrase in semitones: its slow mean, and the last voiced frames.
    middle: Option<f32>,
    recent: [f32; 5],
    voiced: usize,
    /// Frames of attention after a question.
    asked: u32,
    amount: f32,
    /// Running gestures with their ages in frames.
    acts: Vec<(Gesture, f32)>,
    /// Where the head was when it last visibly moved, and for how many frames nothing has moved since.
    anchor: [f32; 2],
    still: u32,
    brow: f32,
    smile: f32,
    next_smile: u64,
}

impl Liveliness {
    /// `range`: smallest and largest trained value of each control. The same seed lives the same life.
    pub fn new(seed: u64, range: [[f32; 2]; 10]) -> Liveliness {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Its own stream: noise of the pictures uses the others.
        rng.set_stream(u64::MAX);
        let mut life = Liveliness {
            rng,
            range,
            frame: 0,
            floor_db: -60.0,
            quick: 0.0,
            slow: 0.0,
            spoken_s: 0.0,
            silent_s: 10.0,
            springs: REST.map(|at| Spring { at, speed: 0.0 }),
            pose: [0.0; 5],
            next_pose: 0,
            next_blink: 0,
            last_blink: 0,
            blink: None,
            gaze: [0.0; 2],
            next_gaze: 0,
            nod: None,
            next_sign: 0,
            phases: [0.0; 6],
            middle: None,
            recent: [0.0; 5],
            voiced: 0,
            asked: 0,
            amount: 1.0,
            acts: Vec::new(),
            anchor: [0.0; 2],
            still: 0,
            brow: 0.0,
            smile: REST[SMILE],
            next_smile: 0,
        };
        life.next_blink = life.after(0.8, 3.0);
        life.next_gaze = life.after(1.0, 2.5);
        life.next_pose = life.after(0.4, 1.0);
        life.next_smile = life.after(2.0, 5.0);
        life.next_sign = life.after(3.0, 7.0);
        life.phases = std::array::from_fn(|_| life.between(0.0, std::f32::consts::TAU));
        life
    }

    /// How much of its own it does from now on: 0 only breathes and blinks, 1 is usual, 2 the most.
    pub fn amount(&mut self, liveliness: f32) {
        self.amount = liveliness.clamp(0.0, super::LIVELIEST);
    }

    /// 0..1.
    fn chance(&mut self) -> f32 {
        (self.rng.next_u32() >> 8) as f32 / (1 << 24) as f32
    }
    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.chance()
    }
    /// About normal, deviation 1, never beyond ±2.1: three uniforms.
    fn around(&mut self) -> f32 {
        (self.chance() + self.chance() + self.chance() - 1.5) * 1.4
    }
    /// A frame some seconds from now.
    fn after(&mut self, low_s: f32, high_s: f32) -> u64 {
        self.frame + (self.between(low_s, high_s) * FPS) as u64
    }

    /// The next frame, in which speech has this tone.
    pub fn next(&mut self, tone: impl Into<Tone>) -> Controls {
        let tone = tone.into();
        let stressed = self.listen(tone);
        self.move_head(stressed);
        self.look_around();
        let mut target = REST;
        target[YAW..=DY].copy_from_slice(&self.pose);
        if let Some((depth, age)) = &mut self.nod {
            // Down and back, once, in about half a second.
            target[PITCH] += *depth * (std::f32::consts::PI * *age / 12.0).sin();
            *age += 1.0;
            if *age > 12.0 {
                self.nod = None;
            }
        }
        target[PITCH] += 0.035 * self.slow;
        target[DX] += 0.05 * target[YAW];
        self.brow *= 0.96;
        target[BROW] = self.brow + 0.10 * (self.slow - 0.3).max(0.0);
        target[SMILE] = self.smile;
        if self.asked > 0 {
            self.asked -= 1;
            target[BROW] = target[BROW].max(0.30);
            target[ROLL] += 0.016 * if self.phases[2] > std::f32::consts::PI { 1.0 } else { -1.0 };
            target[PITCH] -= 0.03;
        }
        for (i, (value, rest)) in target.iter_mut().zip(REST).enumerate() {
            *value = rest + self.amount * (*value - rest);
            if let Some(bound) = BOUNDS.get(i) {
                *value = value.clamp(-0.95 * bound, 0.95 * bound);
            }
        }
        // Eyes stay on the listener while the head turns.
        let look = self.directed(&mut target);
        let turned = 0.25 * self.springs[YAW].at;
        let gaze = look.unwrap_or_else(|| self.gaze.map(|g| g * self.amount.min(1.5)));
        target[GAZE_X] = gaze[0] - if look.is_none() { turned } else { 0.0 };
        target[GAZE_Y] = gaze[1];
        let mut out = [0.0; 10];
        // Seconds each control takes to arrive; a glance takes two or three frames.
        let slowness = [0.9, 0.55, 1.2, 1.4, 1.2, 0.1, 0.10, 0.10, 0.35, 0.9];
        for (i, value) in out.iter_mut().enumerate() {
            *value = self.springs[i].follow(target[i], slowness[i]);
        }
        // Whole from half of the usual liveliness on, so that it never freezes.
        let swaying = (2.0 * self.amount).min(1.0);
        for ((value, sway), bound) in out.iter_mut().zip(self.sway()).zip(BOUNDS) {
            *value = (*value + swaying * sway).clamp(-bound, bound);
        }
        // Breath: the shoulders rise and fall a little, always.
        out[DY] += 0.0018 * (self.frame as f32 / FPS * std::f32::consts::TAU / 4.1).sin();
        out[BLINK] = self.lids();
        self.quick_acts(&mut out);
        for (value, [low, high]) in out.iter_mut().zip(self.range) {
            *value = value.clamp(low, high);
        }
        self.stir(&out);
        self.frame += 1;
        out
    }

    /// When nothing was seen to move for more than a second, the eyes do.
    fn stir(&mut self, out: &Controls) {
        // A pixel of a picture of 256.
        const SEEN: f32 = 0.0062;
        let head = [out[DX] + 0.115 * out[YAW], out[DY] + 0.082 * out[PITCH]];
        self.still += 1;
        if head.iter().zip(self.anchor).any(|(now, then)| (now - then).abs() > SEEN) || out[BLINK] > 0.5 {
            (self.anchor, self.still) = (head, 0);
        }
        if self.still > 30 && self.amount > 0.0 {
            let aside = if self.chance() < 0.5 { 0.3 } else { -0.3 };
            self.gaze = if self.gaze[0].abs() > 0.2 { [0.0; 2] } else { [aside, self.gaze[1]] };
            self.next_gaze = self.after(0.8, 2.0);
            self.still = 0;
        }
    }

    /// Slow sums of waves that never agree: nobody holds still for two seconds.
    fn sway(&self) -> [f32; 5] {
        let t = self.frame as f32 / FPS;
        let wave = |i: usize, period: f32| (t * std::f32::consts::TAU / period + self.phases[i]).sin();
        let mut sway = [0.0; 5];
        sway[YAW] = 0.036 * wave(0, 5.3) + 0.036 * wave(1, 2.6);
        sway[PITCH] = 0.026 * wave(2, 4.3);
        sway[ROLL] = 0.004 * wave(3, 6.7);
        sway[DX] = 0.0040 * wave(4, 4.7) + 0.0022 * wave(5, 2.9);
        sway
    }

    fn move_head(&mut self, stressed: bool) {
        // Half as wide when it only listens.
        let amount = 0.45 + 0.55 * self.slow.min(1.0);
        if stressed && self.chance() < 0.22 {
            self.brow = self.between(0.10, 0.32);
            if self.nod.is_none() && self.chance() < 0.5 {
                self.nod = Some((self.between(0.03, 0.08), 0.0));
            }
        }
        if self.frame >= self.next_pose {
            let lively = self.slow > 0.15;
            // Each new pose leans back towards rest.
            let wide = [0.13, 0.07, 0.014, 0.008, 0.004];
            for (i, width) in wide.into_iter().enumerate() {
                self.pose[i] = 0.3 * self.pose[i] + amount * width * self.around();
            }
            self.next_pose = if lively { self.after(0.5, 1.8) } else { self.after(1.6, 4.5) };
        }
        if self.silent_s > 1.5 {
            // Calm comes back slowly, faster than new poses lead away.
            self.pose.iter_mut().for_each(|p| *p *= 0.985);
        }
        if self.silent_s < 1.0 {
            self.next_sign = self.after(3.0, 7.0);
        } else if self.frame >= self.next_sign && self.nod.is_none() {
            // A listener's sign: a slight nod, or brows.
            if self.chance() < 0.7 {
                self.nod = Some((self.between(0.04, 0.09), 0.0));
            } else {
                self.brow = self.between(0.08, 0.20);
            }
            self.next_sign = self.after(5.0, 11.0);
        }
        if self.frame >= self.next_smile {
            self.smile = (REST[SMILE] + 0.14 * self.around()).max(0.08);
            self.next_smile = self.after(2.5, 7.0);
        }
    }

    fn look_around(&mut self) {
        if self.frame < self.next_gaze {
            return;
        }
        let away = self.gaze != [0.0; 2];
        if away && self.chance() < 0.75 {
            self.gaze = [0.0; 2];
            self.next_gaze = self.after(1.2, 4.0);
        } else {
            // Who listens looks away more rarely and less far than who speaks and thinks.
            let wide = if self.silent_s > 1.5 { 0.6 } else { 1.0 };
            self.gaze = [0.26 * wide * self.around(), 0.13 * wide * self.around()];
            self.next_gaze = self.after(0.4, 1.4);
            // A wide glance likes to begin with a blink.
            if self.gaze[0].abs() > 0.28 && self.chance() < 0.4 {
                self.blink_soon();
            }
        }
    }

    /// Blinks now, if neither the last nor the next blink is near.
    fn blink_soon(&mut self) {
        if self.frame > self.last_blink + 40 && self.frame + 25 < self.next_blink {
            self.next_blink = self.frame;
        }
    }

    /// 0 open..1 closed.
    fn lids(&mut self) -> f32 {
        if self.blink.is_none() && self.frame >= self.next_blink {
            let length = 4 + (self.chance() * 3.0) as u32;
            let depth = if self.chance() < 0.85 { 1.0 } else { self.between(0.6, 0.9) };
            self.blink = Some((0, length, depth));
            self.last_blink = self.frame;
            // Between 10 and 25 a minute.
            self.next_blink = self.after(2.4, 6.0);
        }
        let Some((age, length, depth)) = &mut self.blink else { return 0.0 };
        // Closing takes a third of the time, opening the rest; held for a moment in between.
        let phase = (*age as f32 + 0.5) / *length as f32;
        let lid = (1.7 * (phase / 0.30).min((1.0 - phase) / 0.70)).clamp(0.0, 1.0) * *depth;
        *age += 1;
        if age == length {
            self.blink = None;
        }
        lid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const RANGE: [[f32; 2]; 10] = [
        [-0.6, 0.6],
        [-0.55, 0.55],
        [-0.07, 0.07],
        [-0.045, 0.045],
        [-0.03, 0.03],
        [0.0, 1.0],
        [-0.9, 0.9],
        [-0.6, 0.6],
        [-0.5, 0.8],
        [0.0, 0.9],
    ];

    /// Phrases of two seconds with syllables at 4 Hz, pauses of one.
    pub(super) fn voice(frame: usize) -> f32 {
        let t = frame as f32 / FPS;
        if t % 3.0 < 2.0 { 0.12 * (0.5 + 0.5 * (t * 4.0 * std::f32::consts::TAU).sin()) } else { 0.001 }
    }

    fn live(seed: u64, seconds: usize, level: impl Fn(usize) -> f32) -> Vec<Controls> {
        let mut life = Liveliness::new(seed, RANGE);
        (0..seconds * 25).map(|f| life.next(level(f))).collect()
    }

    /// Lengths in frames of the stretches with closed or closing lids.
    fn blinks(life: &[Controls]) -> Vec<usize> {
        // What runs into the end is not whole.
        let end = life.iter().rposition(|c| c[BLINK] == 0.0).unwrap_or(0);
        life[..=end].split(|c| c[BLINK] == 0.0).map(<[_]>::len).filter(|n| *n > 0).collect()
    }

    #[test]
    fn it_blinks_as_people_do() {
        for seed in 0..8 {
            for speaking in [true, false] {
                let life = live(seed, 300, |f| if speaking { voice(f) } else { 0.0 });
                let blinks = blinks(&life);
                assert!((50..=125).contains(&blinks.len()), "{} in five minutes", blinks.len());
                assert!(blinks.iter().all(|n| (3..=6).contains(n)), "120 to 250 ms: {blinks:?}");
            }
        }
    }

    #[test]
    fn it_never_freezes_and_its_head_stays_within_its_bounds() {
        // Where things are in a picture of 256, in pixels, as the renderer moves them: nose, eyes, gaze, shoulders.
        let pixel = |v: f32| v / 0.79 * 128.0;
        let seen = |c: &Controls| {
            let nose = [pixel(c[DX] + 0.115 * c[YAW]), pixel(c[DY] + 0.082 * c[PITCH])];
            [nose[0], nose[1], pixel(0.028 * c[GAZE_X]), pixel(0.019 * c[GAZE_Y]), 10.0 * c[BLINK]]
        };
        for seed in 0..6 {
            for speaking in [true, false] {
                for amount in [0.5, 1.0, 2.0] {
                    let mut life = Liveliness::new(seed, RANGE);
                    life.amount(amount);
                    let all: Vec<Controls> =
                        (0..4 * 60 * 25).map(|f| life.next(if speaking { voice(f) } else { 0.0 })).collect();
                    for (at, window) in all.windows(50).enumerate() {
                        let moved = (0..5).any(|i| {
                            let range = window
                                .iter()
                                .map(|c| seen(c)[i])
                                .fold([f32::MAX, f32::MIN], |r, v| [r[0].min(v), r[1].max(v)]);
                            range[1] - range[0] >= 0.5
                        });
                        assert!(
                            moved,
                            "frozen for two seconds at frame {at}, liveliness {amount}, speaking {speaking}"
                        );
                    }
                    for c in &all {
                        for (value, bound) in c.iter().zip(BOUNDS) {
                            assert!(value.abs() <= bound, "{c:?} beyond {BOUNDS:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn without_liveliness_it_only_blinks_and_breathes() {
        let mut life = Liveliness::new(2, RANGE);
        life.amount(0.0);
        let all: Vec<Controls> = (0..3000).map(|f| life.next(voice(f))).collect();
        assert!(all.iter().all(|c| c[YAW] == 0.0 && c[PITCH] == 0.0 && c[BROW] == 0.0 && c[GAZE_X] == 0.0));
        assert!(blinks(&all).len() > 10 && all.iter().any(|c| c[DY] != 0.0));
    }

    #[test]
    fn it_stays_inside_the_trained_range_and_moves_smoothly() {
        let storms: [fn(usize) -> f32; 4] =
            [voice, |_| 1.0, |f| if f % 2 == 0 { 1.0 } else { 0.0 }, |f| if f % 5 == 0 { f32::NAN } else { 1e30 }];
        for (seed, level) in storms.into_iter().enumerate() {
            let life = live(seed as u64, 120, level);
            for c in &life {
                assert!(c.iter().zip(RANGE).all(|(v, [low, high])| (low..=high).contains(v)), "{c:?}");
            }
            // Largest step from frame to frame, as part of the range; eyes and lids are quick by nature.
            let most = [0.03, 0.05, 0.03, 0.03, 0.04, 1.0, 0.35, 0.35, 0.06, 0.03];
            for pair in life.windows(2) {
                for i in 0..10 {
                    let step = (pair[1][i] - pair[0][i]).abs() / (RANGE[i][1] - RANGE[i][0]);
                    assert!(step <= most[i], "control {i} jumps by {step} of its range");
                }
            }
        }
    }

    #[test]
    fn it_is_livelier_in_speech_and_calm_in_silence_but_never_frozen() {
        let width = |life: &[Controls], i: usize| {
            let mean = life.iter().map(|c| c[i]).sum::<f32>() / life.len() as f32;
            (life.iter().map(|c| (c[i] - mean).powi(2)).sum::<f32>() / life.len() as f32).sqrt()
        };
        let (mut speaking, mut silent) = (0.0, 0.0);
        for seed in 0..6 {
            let (a, b) = (live(seed, 120, voice), live(seed, 120, |_| 0.0));
            speaking += width(&a, YAW) + width(&a, PITCH);
            silent += width(&b, YAW) + width(&b, PITCH);
            assert!(width(&b, DY) > 0.0005 && width(&b, YAW) > 0.002, "a listener breathes and sways");
            assert!(width(&b, GAZE_X) > 0.02, "and looks around");
            // After the voice stops, the head comes back.
            let end = live(seed, 40, |f| if f < 500 { voice(f) } else { 0.0 });
            let late = &end[900..];
            assert!(late.iter().map(|c| c[YAW].abs()).sum::<f32>() / (late.len() as f32) < 0.08);
        }
        assert!(speaking > 1.5 * silent, "{speaking} {silent}");
    }

    #[test]
    fn the_same_seed_lives_the_same_life() {
        assert_eq!(live(3, 20, voice), live(3, 20, voice));
        assert_ne!(live(3, 20, voice), live(4, 20, voice));
    }
}
