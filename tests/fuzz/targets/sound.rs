#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &[u8]| {
    use loquent::codec::audio_file::{Limits, Source, read_speech};
    let file = loquent_fuzz::Scratch::new(input);
    let limits = Limits { longest: std::time::Duration::from_secs(60), ..Limits::default() };
    if let Ok((pcm, _)) = read_speech(&Source::File(file.path()), &limits) {
        assert!(pcm.samples.iter().all(|s| s.is_finite()));
    }
});
