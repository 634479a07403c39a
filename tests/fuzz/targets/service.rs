#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &[u8]| {
    loquent_fuzz::service::house().ask(input);
});
