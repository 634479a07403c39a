//! Golden vectors of the official programs, replayed against the Rust networks.
//!
//! `LOQUENT_GOLDENS=DIR cargo test --release --test golden` reads any folder of goldens; without the variable the
//! subset in `tests/golden/data`. Every size comes from the JSON. There is one test per kind: it runs every golden of
//! that kind in the folder. Kinds nobody has implemented are `#[ignore]`d by name, and so show as ignored, not as
//! passed; a kind that neither list knows fails `every_kind_is_known`.

#![allow(unreachable_pub)] // a test binary has no outside

mod data;
mod kinds;
mod pocket;

use data::{Check, Golden};

/// Runs every golden of `kind` in the folder. The project's own subset has every kind but those it leaves out by name; of
/// another folder what it has is checked, and what it lacks is said.
fn run(kind: &str, check: fn(&Golden, &mut Check) -> Result<(), String>) {
    let all: Vec<_> = data::index().into_iter().filter(|(_, k)| k == kind).collect();
    if all.is_empty() {
        data::say(&format!("SKIPPED {kind}: no golden of this kind in {}", data::folder().display()));
        assert!(
            !data::own_subset() || LEFT_OUT_OF_SUBSET.contains(&kind),
            "no golden of kind {kind} in {}",
            data::folder().display()
        );
        return;
    }
    let mut failures = Vec::new();
    for (name, _) in all {
        let outcome = Golden::read(&name).and_then(|golden| {
            let mut seen = Check::new(&golden);
            check(&golden, &mut seen)?;
            seen.finish()
        });
        match outcome {
            Ok(line) => data::say(&line),
            Err(e) => {
                data::say(&format!("FAILED {name}: {e}"));
                failures.push(format!("{name}: {e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Kinds whose data is too large for the repository.
const LEFT_OUT_OF_SUBSET: &[&str] = &["la_tpp", "vae21", "vae22"];

macro_rules! kinds {
    ($($kind:ident),* $(,)?) => {
        /// Kinds with a check.
        const CHECKED: &[&str] = &[$(stringify!($kind)),*];
        $(#[test] fn $kind() { run(stringify!($kind), kinds::$kind::check) })*
    };
}

macro_rules! not_yet {
    ($($kind:ident),* $(,)?) => {
        /// Kinds without a check: ignored loudly, never counted as passed.
        const NOT_YET: &[&str] = &[$(stringify!($kind)),*];
        $(#[test] #[ignore = "no check for this kind yet"] fn $kind() { panic!("no check for this kind yet") })*
    };
}

// One line per kind; the check lives in `kinds/<kind>.rs`.
kinds! {
    audio_buckets,
    audio_inject,
    audio_load,
    causal_audio_encoder,
    dit_block,
    fp8_quant,
    frame_packer,
    image_prep,
    la_e2e,
    la_stream,
    la_tpp,
    lora_merge,
    rope_tables,
    s2v_e2e,
    s2v_forward,
    schedulers,
    umt5,
    vae21,
    vae21_stream,
    vae22,
    wan_forward,
    wav2vec2_feat,
}
not_yet! {}

#[test]
fn every_kind_is_known() {
    let all = data::index();
    assert!(!all.is_empty(), "no goldens in {}", data::folder().display());
    let mut unknown = Vec::new();
    for (name, kind) in all {
        if NOT_YET.contains(&kind.as_str()) {
            data::say(&format!("SKIPPED {name}: no check for kind {kind} yet"));
        } else if !CHECKED.contains(&kind.as_str()) {
            unknown.push(format!("{name} ({kind})"));
        }
    }
    assert!(unknown.is_empty(), "goldens of kinds that have no test: {}", unknown.join(", "));
}
