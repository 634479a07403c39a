//! What a face does besides speaking: blinks, glances, nods, brows, sway, a smile, and calm when nothing is said.
//!
//! A pure process at the video rate: a seed and the loudness of each frame in, ten controls out (yaw, pitch, roll, dx,
//! dy, blink, gaze x, gaze y, brow, smile; units as the renderer's), inside the range the model was trained on. Moves
//! are about half as wide as in training, where the model is at its surest.

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
const DX: usize = 3;
const DY: usize = 4;
const BLINK: usize = 5;
const GAZE_X: usize = 6;
const GAZE_Y: usize = 7;
const BROW: usize = 8;
const SMILE: usize = 9;

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
            brow: 0.0,
            smile: REST[SMILE],
            next_smile: 0,
        };
        life.next_blink = life.after(0.8, 3.0);
        life.next_gaze = life.after(1.0, 2.5);
        life.next_pose = life.after(0.4, 1.0);
        life.next_smile = life.after(2.0, 5.0);
        life
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

    /// The next frame, in which speech has the root-mean-square `level` (0..1).
    pub fn next(&mut self, level: f32) -> Controls {
        let stressed = self.listen(level);
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
        // Eyes stay on the listener while the head turns.
        target[GAZE_X] = self.gaze[0] - 0.25 * self.springs[YAW].at;
        target[GAZE_Y] = self.gaze[1];
        self.brow *= 0.96;
        target[BROW] = self.brow + 0.10 * (self.slow - 0.3).max(0.0);
        target[SMILE] = self.smile;
        let mut out = [0.0; 10];
        // Seconds each control takes to arrive; a glance takes two or three frames.
        let slowness = [0.9, 0.55, 1.2, 1.4, 1.2, 0.1, 0.10, 0.10, 0.35, 0.9];
        for (i, value) in out.iter_mut().enumerate() {
            *value = self.springs[i].follow(target[i], slowness[i]);
        }
        // Breath: the shoulders rise and fall a little, always.
        out[DY] += 0.0018 * (self.frame as f32 / FPS * std::f32::consts::TAU / 4.1).sin();
        out[BLINK] = self.lids();
        for (value, [low, high]) in out.iter_mut().zip(self.range) {
            *value = value.clamp(low, high);
        }
        self.frame += 1;
        out
    }

    /// Follows the voice; says whether a syllable was stressed.
    fn listen(&mut self, level: f32) -> bool {
        let level = if level.is_finite() { level.clamp(0.0, 1.0) } else { 0.0 };
        let db = 20.0 * level.max(1e-4).log10();
        // The floor follows quickly down and slowly up, and never believes that speech is noise.
        let rate = if db < self.floor_db { 0.2 } else { 0.004 };
        self.floor_db = (self.floor_db + rate * (db - self.floor_db)).clamp(-80.0, -35.0);
        let now = ((db - self.floor_db - 8.0) / 22.0).clamp(0.0, 1.0);
        let before = self.quick;
        self.quick += (now - self.quick) * if now > self.quick { 0.5 } else { 0.25 };
        self.slow += (now - self.slow) * 0.06;
        if self.quick > 0.2 {
            if self.silent_s > 0.6 {
                self.spoken_s = 0.0;
            }
            self.spoken_s += 1.0 / FPS;
            self.silent_s = 0.0;
        } else {
            let was = self.silent_s;
            self.silent_s += 1.0 / FPS;
            // A pause after some speech: often a nod or a blink, as people do at the end of a phrase.
            if was <= 0.28 && self.silent_s > 0.28 && self.spoken_s > 1.2 {
                let draw = self.chance();
                if draw < 0.35 && self.nod.is_none() {
                    self.nod = Some((self.between(0.05, 0.11), 0.0));
                } else if draw < 0.6 {
                    self.blink_soon();
                }
            }
        }
        self.quick > 0.55 && self.quick - before > 0.16
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
            self.gaze = [0.26 * self.around(), 0.13 * self.around()];
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

    const RANGE: [[f32; 2]; 10] = [
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
    fn voice(frame: usize) -> f32 {
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
