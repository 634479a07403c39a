#![no_main]

use libfuzzer_sys::fuzz_target;
use loquent_fuzz as _;

fuzz_target!(|input: &[u8]| {
    let file = loquent_fuzz::Scratch::new(input);
    let Ok(mut pose) = loquent::codec::pose::PoseFile::open(&file.path()) else { return };
    for _ in 0..100 {
        let Ok(Some(picture)) = pose.next() else { return };
        assert_eq!(picture.rgb.len(), 3 * picture.width as usize * picture.height as usize);
    }
});
