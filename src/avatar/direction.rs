//! Stage directions: what a face is told to do besides speaking, and how lively it is. Given from any thread while the
//! face speaks; it looks once a block.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | gestures → face | 16 | the new one is refused, and whoever gave it is told |

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, Ordering},
};

/// Gestures that may wait for the next block.
const WAITING: usize = 16;
/// Largest liveliness.
pub const LIVELIEST: f32 = 2.0;
/// Longest a gesture may be held, seconds.
pub const LONGEST_S: f32 = 60.0;

/// What a face can be told to do. Directions are the viewer's: left is the left of the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    LookLeft,
    LookRight,
    LookUp,
    LookDown,
    /// At the viewer; ends other looks.
    LookAhead,
    Smile,
    Nod,
    Shake,
    RaiseBrows,
    Frown,
    Blink,
}

impl Act {
    /// All of them by the names that programs use.
    pub const ALL: [(&'static str, Act); 11] = [
        ("look_left", Act::LookLeft),
        ("look_right", Act::LookRight),
        ("look_up", Act::LookUp),
        ("look_down", Act::LookDown),
        ("look_ahead", Act::LookAhead),
        ("smile", Act::Smile),
        ("nod", Act::Nod),
        ("shake", Act::Shake),
        ("raise_brows", Act::RaiseBrows),
        ("frown", Act::Frown),
        ("blink", Act::Blink),
    ];

    /// By its name.
    pub fn named(name: &str) -> Option<Act> {
        Act::ALL.iter().find(|(known, _)| *known == name).map(|(_, act)| *act)
    }
}

/// An act, how wide it is, and how long it is held.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gesture {
    pub act: Act,
    /// 0..1.
    pub strength: f32,
    /// Looks, smiles and brows are held for so long; nods, shakes and blinks take the time they take.
    pub seconds: f32,
}

/// See the module. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Direction(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Bits of an f32; not a number = nobody said.
    liveliness: AtomicU32,
    waiting: Mutex<Vec<Gesture>>,
}

impl Default for Direction {
    fn default() -> Self {
        Direction(Arc::new(Inner { liveliness: AtomicU32::new(f32::NAN.to_bits()), waiting: Mutex::default() }))
    }
}

impl Direction {
    /// How much of its own a face does: 0 only breathes and blinks, 1 is usual, [`LIVELIEST`] is the most.
    pub fn liveliness(&self) -> f32 {
        let told = f32::from_bits(self.0.liveliness.load(Ordering::Relaxed));
        if told.is_nan() { 1.0 } else { told }
    }

    pub fn set_liveliness(&self, liveliness: f32) {
        if !liveliness.is_nan() {
            self.0.liveliness.store(liveliness.clamp(0.0, LIVELIEST).to_bits(), Ordering::Relaxed);
        }
    }

    /// Sets it where nobody has.
    pub fn usually(&self, liveliness: f32) {
        let value = liveliness.clamp(0.0, LIVELIEST).to_bits();
        let unset = |bits: u32| f32::from_bits(bits).is_nan().then_some(value);
        // Somebody did: theirs stays.
        let _ = self.0.liveliness.fetch_update(Ordering::Relaxed, Ordering::Relaxed, unset);
    }

    /// Does this from the next block on; false when as many wait as may.
    pub fn give(&self, gesture: Gesture) -> bool {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(|e| e.into_inner());
        let room = waiting.len() < WAITING;
        if room {
            waiting.push(gesture);
        }
        room
    }

    /// What waits, in the order in which it was given.
    pub fn take(&self) -> Vec<Gesture> {
        std::mem::take(&mut *self.0.waiting.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_says_so_and_what_was_said_first_about_liveliness_stays() {
        let direction = Direction::default();
        let nod = Gesture { act: Act::Nod, strength: 1.0, seconds: 1.0 };
        assert!((0..WAITING).all(|_| direction.clone().give(nod)));
        assert!(!direction.give(nod));
        assert_eq!((direction.take().len(), direction.take().len()), (WAITING, 0));
        assert_eq!(direction.liveliness(), 1.0);
        direction.usually(0.5);
        direction.usually(0.7);
        assert_eq!(direction.liveliness(), 0.5);
        direction.set_liveliness(9.0);
        assert_eq!(direction.liveliness(), LIVELIEST);
        assert!(Act::ALL.iter().all(|(name, act)| Act::named(name) == Some(*act)));
    }
}
