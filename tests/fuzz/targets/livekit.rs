#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &[u8]| {
    loquent_fuzz::livekit::packets(input);
    if let Ok(text) = std::str::from_utf8(input) {
        loquent_fuzz::livekit::words(text);
    }
});
