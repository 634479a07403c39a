//! What tells that a video is computer-made: the badge in the picture, and marks with the time of making.

use crate::codec::{Badge, BadgeLanguage, BadgePlace, marks};
use std::time::SystemTime;

#[derive(clap::Args, Clone, Debug)]
pub(super) struct Flags {
    /// Where the badge stands that says the picture is computer-made.
    #[arg(long, value_enum, default_value_t = Place::BottomRight)]
    badge: Place,
    /// What the badge is written in.
    #[arg(long, value_enum, default_value_t = Language::En)]
    badge_language: Language,
    /// When the file says it was made, such as 2026-01-31T12:00:00Z; the present moment when left out.
    #[arg(long, value_name = "RFC3339", value_parser = date)]
    date: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Place {
    TopLeft,
    TopRight,
    BottomLeft,
    BottomRight,
    Off,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Language {
    En,
    Zh,
}

impl Flags {
    /// Warns where the badge was switched off.
    pub(super) fn warn(&self) {
        if self.badge == Place::Off {
            eprintln!(
                "warning: without the badge nobody can see that the picture is computer-made; many countries ask \
                 whoever publishes it to say so"
            );
        }
    }

    pub(super) fn badge(&self, width: u32, height: u32) -> anyhow::Result<Option<Badge>> {
        let place = match self.badge {
            Place::TopLeft => BadgePlace::TopLeft,
            Place::TopRight => BadgePlace::TopRight,
            Place::BottomLeft => BadgePlace::BottomLeft,
            Place::BottomRight => BadgePlace::BottomRight,
            Place::Off => BadgePlace::Off,
        };
        let language = match self.badge_language {
            Language::En => BadgeLanguage::En,
            Language::Zh => BadgeLanguage::Zh,
        };
        Ok(Badge::new(place, language, width, height)?)
    }

    /// The moment that the file tells.
    pub(super) fn when(&self) -> String {
        self.date.clone().unwrap_or_else(|| marks::rfc3339(SystemTime::now()))
    }
}

/// A moment in UTC as it stands in the file.
fn date(text: &str) -> Result<String, String> {
    let shape = text.bytes().map(|b| if b.is_ascii_digit() { b'0' } else { b }).collect::<Vec<u8>>();
    if shape == b"0000-00-00T00:00:00Z" {
        return Ok(text.into());
    }
    Err("give it in UTC to the second, such as 2026-01-31T12:00:00Z".into())
}
