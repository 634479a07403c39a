//! One file per golden kind, or per family of kinds; each kind has `check(golden, check)`.

pub mod common;
mod hearing;
mod pictures;
pub mod rope_tables;
mod text;
mod video;

/// Gives a kind's name to a check of a family.
macro_rules! named {
    ($($kind:ident => $($at:ident)::+;)*) => {
        $(pub mod $kind { pub use super::$($at)::+ as check; })*
    };
}

named! {
    audio_buckets => hearing::audio_buckets_check;
    audio_load => hearing::audio_load_check;
    image_prep => pictures::image_prep_check;
    umt5 => text::umt5_encoder_check;
    vae21 => video::vae_check;
    vae21_stream => video::vae_stream_check;
    vae22 => video::vae_check;
    wav2vec2_feat => hearing::wav2vec2_feat_check;
}
