#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &[u8]| {
    let file = loquent_fuzz::Scratch::new(input);
    let Ok(checkpoint) = loquent::model::weights::open(&file.path()) else { return };
    for name in checkpoint.source.names().iter().take(100) {
        let Some(shape) = checkpoint.source.shape(name) else { continue };
        if let Ok(tensor) = checkpoint.source.load(name) {
            assert_eq!(tensor.dims(), shape, "{name}");
        }
        let _ = checkpoint.source.quantised(name);
    }
});
