#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &str| {
    loquent_fuzz::net::descriptions(input);
});
