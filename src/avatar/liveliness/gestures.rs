//! Gestures ([`Gesture`]): what a face was told to do, on top of its own life.

use super::{BROW, Controls, FPS, Liveliness, PITCH, SMILE, YAW};
use crate::avatar::{Act, Gesture, LONGEST_S};

/// Gestures carried out at once; the oldest gives way.
const AT_ONCE: usize = 8;
/// Frames that a nod and a shake take.
const NOD: f32 = 30.0;
const SHAKE: f32 = 38.0;

impl Liveliness {
    /// Begins a gesture.
    pub fn act(&mut self, gesture: Gesture) {
        let looks = [Act::LookLeft, Act::LookRight, Act::LookUp, Act::LookDown, Act::LookAhead];
        if looks.contains(&gesture.act) {
            // It looks at one place at a time.
            self.acts.retain(|(running, _)| !looks.contains(&running.act));
        }
        self.acts.retain(|(running, _)| running.act != gesture.act);
        if self.acts.len() == AT_ONCE {
            self.acts.remove(0);
        }
        self.acts.push((gesture, 0.0));
    }

    /// What is held: looks, smile, brows. Gives where it looks, if it was told to look somewhere.
    pub(super) fn directed(&mut self, target: &mut Controls) -> Option<[f32; 2]> {
        let mut look = None;
        for (gesture, _) in &self.acts {
            let s = gesture.width();
            let mut turn = |gaze: [f32; 2], yaw: f32, pitch: f32| {
                look = Some(gaze.map(|g| g * s));
                target[YAW] += s * (yaw - target[YAW]);
                target[PITCH] += s * (pitch - target[PITCH]);
            };
            match gesture.act {
                Act::LookLeft => turn([-0.75, 0.0], -0.34, 0.0),
                Act::LookRight => turn([0.75, 0.0], 0.34, 0.0),
                Act::LookUp => turn([0.0, -0.5], 0.0, -0.28),
                Act::LookDown => turn([0.0, 0.5], 0.0, 0.28),
                Act::LookAhead => turn([0.0, 0.0], 0.0, 0.0),
                Act::Smile => target[SMILE] += s * (0.85 - target[SMILE]),
                Act::RaiseBrows => target[BROW] += s * (0.65 - target[BROW]),
                Act::Frown => target[BROW] += s * (-0.42 - target[BROW]),
                Act::Nod | Act::Shake | Act::Blink => {}
            }
        }
        look
    }

    /// Nods, shakes and blinks, which are quicker than the springs; ends what is over.
    pub(super) fn quick_acts(&mut self, out: &mut Controls) {
        use std::f32::consts::TAU;
        let mut blink = false;
        for (gesture, age) in &mut self.acts {
            let s = gesture.width();
            // Two and a half swings that fade in and out.
            let swing = |length: f32| (*age / length * 2.0 * TAU).sin() * (*age / length * std::f32::consts::PI).sin();
            match gesture.act {
                Act::Nod => out[PITCH] += 0.22 * s * swing(NOD),
                Act::Shake => out[YAW] += 0.24 * s * swing(SHAKE),
                Act::Blink => blink |= *age == 0.0,
                _ => {}
            }
            *age += 1.0;
        }
        self.acts.retain(|(gesture, age)| *age < gesture.frames());
        if blink && self.blink.is_none() {
            self.next_blink = self.frame + 1;
        }
    }
}

impl Gesture {
    /// What is not a number is no movement.
    fn width(&self) -> f32 {
        if self.strength.is_nan() { 0.0 } else { self.strength.clamp(0.0, 1.0) }
    }

    fn frames(&self) -> f32 {
        match self.act {
            Act::Nod => NOD,
            Act::Shake => SHAKE,
            Act::Blink => 1.0,
            _ => self.seconds.clamp(0.1, LONGEST_S) * FPS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            BLINK, GAZE_X, GAZE_Y,
            tests::{RANGE, voice},
        },
        *,
    };

    #[test]
    fn gestures_are_done_held_and_end() {
        let lived = |act: Act| {
            let mut life = Liveliness::new(4, RANGE);
            (0..50).for_each(|_| assert_eq!(life.next(0.0).len(), 10));
            life.act(Gesture { act, strength: 1.0, seconds: 2.0 });
            (0..250).map(|_| life.next(0.0)).collect::<Vec<Controls>>()
        };
        let mean = |c: &[Controls], i: usize| c.iter().map(|c| c[i]).sum::<f32>() / c.len() as f32;
        for (act, control, toward) in [
            (Act::LookLeft, GAZE_X, -0.6),
            (Act::LookRight, GAZE_X, 0.6),
            (Act::LookUp, GAZE_Y, -0.4),
            (Act::LookDown, GAZE_Y, 0.4),
            (Act::LookLeft, YAW, -0.2),
            (Act::LookRight, YAW, 0.2),
            (Act::LookUp, PITCH, -0.15),
            (Act::LookDown, PITCH, 0.15),
            (Act::Smile, SMILE, 0.6),
            (Act::RaiseBrows, BROW, 0.5),
            (Act::Frown, BROW, -0.3),
        ] {
            let life = lived(act);
            let held = mean(&life[35..50], control);
            assert!(held / toward >= 1.0, "{act:?}: {held}, wanted {toward}");
            let after = mean(&life[125..], control);
            assert!(after.abs() < 0.6 * toward.abs() || control == SMILE && after < 0.5, "{act:?} stays: {after}");
        }
        for (act, control) in [(Act::Nod, PITCH), (Act::Shake, YAW)] {
            let life = lived(act);
            let (low, high) =
                life[..40].iter().fold((f32::MAX, f32::MIN), |(l, h), c| (l.min(c[control]), h.max(c[control])));
            assert!(high - low > 0.25, "{act:?} {low} {high}");
        }
        assert!(lived(Act::Blink)[..8].iter().any(|c| c[BLINK] > 0.9));
        // All at once, again and again: still inside the trained range.
        let mut life = Liveliness::new(1, RANGE);
        life.amount(2.0);
        for frame in 0..2500 {
            if frame % 7 == 0 {
                let (_, act) = Act::ALL[frame / 7 % Act::ALL.len()];
                life.act(Gesture { act, strength: f32::INFINITY, seconds: f32::NAN });
            }
            let c = life.next(voice(frame));
            assert!(c.iter().zip(RANGE).all(|(v, [low, high])| (low..=high).contains(v)), "{c:?}");
        }
    }
}
