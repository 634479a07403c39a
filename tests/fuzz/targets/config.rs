#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &str| {
    let _ = loquent::config::Config::layered(Some(("fuzz", input)), &[]).map(|c| c.validate());
    let _ = loquent::server::parse_keys(input);
});
