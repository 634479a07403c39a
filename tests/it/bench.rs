//! `loquent bench` as a user runs it: what it says about one device and about stages that overlap.

use serde_json::Value;
use std::process::Command;

fn bench(device: &str) -> Value {
    let model =
        ["--engine", "s2v", "--checkpoint", "random:tiny", "--mode", "block", "--size", "64x64", "--steps", "1"];
    let done = Command::new(env!("CARGO_BIN_EXE_loquent"))
        .arg("bench")
        .args(model)
        .args(["--clip-frames", "24", "--audio-context-ms", "1600", "--seconds", "1", "--json", "--device", device])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    report["runs"][0].clone()
}

#[test]
fn frames_a_second_are_wall_time_and_latency_is_told_apart() {
    for (device, overlapped) in [("cpu", false), ("cpu,cpu", true)] {
        let run = bench(device);
        let number = |key: &str| run[key].as_f64().unwrap_or_else(|| panic!("{key} in {run}"));
        assert_eq!((&run["device"], &run["overlapped"]), (&device.into(), &overlapped.into()), "{run}");
        assert_eq!(number("under_way") > 0.0, overlapped, "{run}");
        // Four blocks of 480 ms are the first that have 1600 ms behind them; a fifth is of that shape.
        assert_eq!((&run["warm_up_blocks"], &run["settled"]), (&5.into(), &true.into()), "{run}");
        assert_eq!(run["blocks"], 3, "{run}");
        assert!((number("frames_per_second") * number("real_time_factor") - 25.0).abs() < 1e-6, "{run}");
        // Three blocks are as long as the wall time they took.
        let (wall, most) = (3.0 * 480.0 * number("real_time_factor"), number("block_most_ms"));
        assert!(most < wall && wall <= 3.0 * most * 1.001, "{run}");
        for key in ["features_ms", "generation_ms", "decode_ms", "encode_ms"] {
            assert!(number(key) > 0.0, "{key} in {run}");
        }
        // A block alone goes through all stages.
        assert!(number("latency_ms") > 0.0 && run["latency_full_ms"].is_number() == overlapped, "{run}");
        if !overlapped {
            assert!(number("block_p50_ms") >= number("decode_ms"), "{run}");
        }
    }
}
