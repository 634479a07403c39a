//! What of `pocket/` is part of the binary: weights and presenters.

use super::AvatarError;
use crate::{codec::picture, media::Portrait};
use serde::Deserialize;
use std::sync::LazyLock;

/// A built-in face.
#[derive(Clone, Copy, Debug)]
pub struct Presenter {
    /// Short, for addresses: lower-case letters.
    pub id: &'static str,
    pub name: &'static str,
    /// A few words about how they look.
    pub description: &'static str,
    /// The portrait as a PNG, of the size at which the pocket model encodes portraits.
    pub png: &'static [u8],
}

/// The shards of the pocket model's weights, deflated by the build script.
const WEIGHTS: [&[u8]; 2] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/pocket-00001-of-00002.z")),
    include_bytes!(concat!(env!("OUT_DIR"), "/pocket-00002-of-00002.z")),
];

/// Pictures by the id of `presenters.json`.
const PICTURES: &[(&str, &[u8])] = &[
    ("ada", include_bytes!("../../pocket/presenters/ada.png")),
    ("bruno", include_bytes!("../../pocket/presenters/bruno.png")),
    ("chen", include_bytes!("../../pocket/presenters/chen.png")),
    ("dalia", include_bytes!("../../pocket/presenters/dalia.png")),
    ("edgar", include_bytes!("../../pocket/presenters/edgar.png")),
    ("farah", include_bytes!("../../pocket/presenters/farah.png")),
    ("gurdeep", include_bytes!("../../pocket/presenters/gurdeep.png")),
    ("hanna", include_bytes!("../../pocket/presenters/hanna.png")),
    ("ilse", include_bytes!("../../pocket/presenters/ilse.png")),
    ("jamal", include_bytes!("../../pocket/presenters/jamal.png")),
    ("kenji", include_bytes!("../../pocket/presenters/kenji.png")),
    ("lucia", include_bytes!("../../pocket/presenters/lucia.png")),
];

static PRESENTERS: LazyLock<Vec<Presenter>> = LazyLock::new(|| {
    /// The recipe's list says more; only this is told.
    #[derive(Deserialize)]
    struct Entry {
        id: &'static str,
        name: &'static str,
        description: &'static str,
    }
    let list = include_str!("../../pocket/presenters/presenters.json");
    // A list that does not parse or lacks a picture is a broken build; the test below says so.
    let entries: Vec<Entry> = serde_json::from_str(list).unwrap_or_default();
    let presenter = |Entry { id, name, description }| {
        let png = PICTURES.iter().find(|(of, _)| *of == id)?.1;
        Some(Presenter { id, name, description, png })
    };
    entries.into_iter().filter_map(presenter).collect()
});

/// The shards of the pocket model's weights, inflated side by side.
///
/// # Errors
/// The program's own file is damaged.
pub(super) fn weights() -> Result<Vec<Vec<u8>>, AvatarError> {
    let damaged = |why: &dyn std::fmt::Debug| {
        AvatarError::Weights(format!("the weights in this program are damaged, install it again: {why:?}"))
    };
    std::thread::scope(|scope| {
        let shards = WEIGHTS.map(|shard| scope.spawn(|| fdeflate::decompress_to_vec(shard)));
        let inflated = shards.map(|shard| shard.join().map_err(|_| damaged(&"panic"))?.map_err(|e| damaged(&e)));
        inflated.into_iter().collect()
    })
}

/// The built-in faces, in the order in which they are shown.
pub fn presenters() -> &'static [Presenter] {
    &PRESENTERS
}

/// The first built-in face, for warm-up.
pub(super) fn portrait() -> Option<Portrait> {
    picture::decode_portrait(presenters().first()?.png, &picture::PictureLimits::default()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_files() {
        let files = ["pocket/pocket-00001-of-00002.safetensors", "pocket/pocket-00002-of-00002.safetensors"];
        let inflated = weights().unwrap();
        assert_eq!(inflated.len(), files.len());
        for (bytes, file) in inflated.iter().zip(files) {
            assert!(*bytes == std::fs::read(file).unwrap(), "{file}");
        }
    }

    #[test]
    fn every_presenter_has_a_name_and_a_picture() {
        let list = include_str!("../../pocket/presenters/presenters.json");
        assert_eq!(presenters().len(), list.matches("\"id\"").count());
        assert_eq!(presenters().len(), PICTURES.len());
        assert!(presenters().len() >= 6);
        for p in presenters() {
            assert!(!p.name.is_empty() && p.description.len() > 10, "{p:?}");
            let portrait = picture::decode_portrait(p.png, &picture::PictureLimits::default()).unwrap();
            assert_eq!((portrait.width, portrait.height), (384, 384), "{}", p.id);
        }
    }
}
