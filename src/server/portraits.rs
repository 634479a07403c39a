//! Pictures that visitors brought: in memory only, bounded, forgotten after a while.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | pictures | `server.portraits_kept` | the one unused for longest leaves |

use crate::media::Portrait;
use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant, SystemTime},
};

/// That the person shown agreed, in the words of whoever brought the picture.
#[derive(Clone, Debug)]
pub(super) struct Consent {
    pub(super) statement: String,
    pub(super) at: SystemTime,
}

/// The store. `now` is an argument everywhere.
pub(super) struct Portraits {
    kept: usize,
    ttl: Duration,
    pictures: Mutex<HashMap<String, Kept>>,
}

struct Kept {
    portrait: Portrait,
    consent: Consent,
    used: Instant,
}

impl Portraits {
    pub(super) fn new(kept: usize, ttl: Duration) -> Portraits {
        Portraits { kept, ttl, pictures: Mutex::default() }
    }

    /// Keeps a picture under an id that cannot be guessed.
    pub(super) fn put(&self, id: String, portrait: Portrait, consent: Consent, now: Instant) -> String {
        let mut pictures = self.pictures.lock().unwrap_or_else(|e| e.into_inner());
        Self::forget_old(&mut pictures, self.ttl, now);
        while pictures.len() >= self.kept {
            let oldest = pictures.iter().min_by_key(|(_, k)| k.used).map(|(id, _)| id.clone());
            let Some(oldest) = oldest else { break };
            pictures.remove(&oldest);
        }
        pictures.insert(id.clone(), Kept { portrait, consent, used: now });
        id
    }

    /// The picture, if it is still kept; using it keeps it for longer.
    pub(super) fn get(&self, id: &str, now: Instant) -> Option<Portrait> {
        let mut pictures = self.pictures.lock().unwrap_or_else(|e| e.into_inner());
        Self::forget_old(&mut pictures, self.ttl, now);
        let kept = pictures.get_mut(id)?;
        kept.used = now;
        Some(kept.portrait.clone())
    }

    /// What was stated when the picture was brought.
    pub(super) fn consent(&self, id: &str) -> Option<Consent> {
        let pictures = self.pictures.lock().unwrap_or_else(|e| e.into_inner());
        pictures.get(id).map(|k| k.consent.clone())
    }

    /// Pictures kept now, and the bytes they take.
    pub(super) fn size(&self) -> (usize, usize) {
        let pictures = self.pictures.lock().unwrap_or_else(|e| e.into_inner());
        (pictures.len(), pictures.values().map(|k| k.portrait.rgb.len()).sum())
    }

    fn forget_old(pictures: &mut HashMap<String, Kept>, ttl: Duration, now: Instant) {
        pictures.retain(|_, k| now.saturating_duration_since(k.used) < ttl);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreed() -> Consent {
        Consent { statement: "It is me.".into(), at: SystemTime::UNIX_EPOCH }
    }

    fn picture() -> Portrait {
        Portrait { width: 1, height: 1, rgb: vec![0u8; 3].into() }
    }

    #[test]
    fn the_one_unused_for_longest_leaves_first() {
        let store = Portraits::new(2, Duration::from_secs(60));
        let t = Instant::now();
        let a = store.put("a".into(), picture(), agreed(), t);
        let b = store.put("b".into(), picture(), agreed(), t + Duration::from_secs(1));
        assert!(store.get(&a, t + Duration::from_secs(2)).is_some());
        let c = store.put("c".into(), picture(), agreed(), t + Duration::from_secs(3));
        assert!(store.get(&b, t + Duration::from_secs(4)).is_none(), "b was unused for longest");
        assert!(store.get(&a, t + Duration::from_secs(4)).is_some());
        assert!(store.get(&c, t + Duration::from_secs(4)).is_some());
        assert_eq!(store.consent(&c).unwrap().statement, "It is me.");
        assert_eq!(store.size(), (2, 6));
    }

    #[test]
    fn a_picture_is_forgotten_after_its_time_unless_used() {
        let store = Portraits::new(2, Duration::from_secs(60));
        let t = Instant::now();
        let a = store.put("a".into(), picture(), agreed(), t);
        assert!(store.get(&a, t + Duration::from_secs(59)).is_some());
        assert!(store.get(&a, t + Duration::from_secs(118)).is_some());
        assert!(store.get(&a, t + Duration::from_secs(178)).is_none());
        assert!(store.get("no such id", t).is_none());
    }
}
