#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &str| {
    for sentence in loquent::voice::sentences(input) {
        assert!(!sentence.trim().is_empty());
    }
    let _ = loquent::model::umt5::clean::clean(input);
});
