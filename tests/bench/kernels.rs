//! `cargo bench --bench kernels`: the pocket decoder's convolutions against candle's, in one run on one machine, and
//! the whole autoencoder. Prints milliseconds (best of several), GFLOP/s and the ratio; fails if the ratio over the
//! whole decoder is below 4.

use candle_core::{DType, Device, Tensor};
use loquent::model::{
    kernels::{Conv, Isa, Output, Plane, Pool},
    vae::patch::{Decoder, Encoder, Grid, Memory},
    weights::{Tensors, Weights},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Images, size, channels in and out, kernel, how often in one decode.
const LAYERS: [(usize, usize, usize, usize, usize, u32); 6] = [
    (1, 32, 16, 112, 3, 1),
    (1, 32, 224, 112, 3, 1),
    (1, 32, 112, 112, 3, 5),
    (1, 32, 112, 512, 1, 1),
    (4, 64, 32, 32, 3, 4),
    (4, 64, 32, 48, 3, 1),
];

fn best(mut once: impl FnMut()) -> Duration {
    once();
    (0..12)
        .map(|_| {
            let began = Instant::now();
            once();
            began.elapsed()
        })
        .min()
        .unwrap_or_default()
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn main() {
    let threads = 2;
    let pool = Pool::new(threads);
    println!("{:?}, {threads} threads", Isa::best());
    let (mut ours_total, mut theirs_total, mut flop_total) = (0.0, 0.0, 0.0);
    for (n, size, cin, cout, k, times) in LAYERS {
        let x = Tensor::randn(0f32, 1.0, (n, cin, size, size), &Device::Cpu).expect("input");
        let w = Tensor::randn(0f32, 0.1, (cout, cin, k, k), &Device::Cpu).expect("weight");
        let weight = w.flatten_all().and_then(|w| w.to_vec1::<f32>()).expect("weight");
        let conv = Conv::new(Isa::best(), &weight, &vec![0.0; cout], [cout, cin, k], 1, None).expect("conv");
        let mut plane = Plane::zeros(n, size, size, cin, 1);
        let values = x.permute((0, 2, 3, 1)).and_then(|x| x.flatten_all()?.to_vec1::<f32>()).expect("input");
        for (row, chunk) in values.chunks_exact(size * cin).enumerate() {
            plane.row_mut(row / size, row % size).copy_from_slice(chunk);
        }
        let mut raw = Plane::zeros(n, size, size, cout, 0);
        let ours = best(|| conv.run(&pool, &plane, Output { raw: Some(&mut raw), ..Output::default() }));
        let mut theirs_out = None;
        let theirs = best(|| theirs_out = x.conv2d(&w, k / 2, 1, 1, 1).ok());
        let theirs_out = theirs_out.expect("candle's convolution").permute((0, 2, 3, 1)).expect("permute");
        let theirs_out = theirs_out.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values");
        for (row, chunk) in theirs_out.chunks_exact(size * cout).enumerate() {
            let worst =
                raw.row(row / size, row % size).iter().zip(chunk).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-2, "the two disagree by {worst}");
        }
        let flop = 2.0 * (n * size * size * cin * cout * k * k) as f64;
        println!(
            "{n}×{size}×{size} {cin:>3}→{cout:<3} {k}×{k}: {:7.3} ms {:6.1} GFLOP/s; candle {:8.3} ms {:6.1} GFLOP/s; {:5.1}×",
            ms(ours),
            flop / ours.as_secs_f64() / 1e9,
            ms(theirs),
            flop / theirs.as_secs_f64() / 1e9,
            theirs.as_secs_f64() / ours.as_secs_f64()
        );
        let times = f64::from(times);
        ours_total += times * ms(ours);
        theirs_total += times * ms(theirs);
        flop_total += times * flop;
    }
    let ratio = theirs_total / ours_total;
    println!(
        "all convolutions of a block: {ours_total:.1} ms for {:.2} GFLOP; candle {theirs_total:.1} ms; {ratio:.1}×",
        flop_total / 1e9
    );

    let grid = Grid { name: String::new(), factor: 2, blocks: 2, matte: false };
    let weights = Weights::new(Arc::new(random()), &Device::Cpu, DType::F32);
    for threads in [1, 2] {
        let pool = Pool::new(threads);
        let encoder = Encoder::load(&weights.pp("encoder"), Isa::best(), 4).expect("encoder");
        let decoder = Decoder::load(&weights.pp("decoder"), Isa::best(), &grid).expect("decoder");
        let rgb = vec![100u8; 3 * 256 * 256];
        let mut memory = Memory::new(&decoder, 32, 32);
        let z = encoder.encode(&pool, [&rgb; 4], 256, 256);
        let encode = best(|| drop(encoder.encode(&pool, [&rgb; 4], 256, 256)));
        let decode = best(|| drop(decoder.decode(&pool, &z, &mut memory)));
        println!("{threads} threads: encode {:.1} ms, decode {:.1} ms a block of 160 ms", ms(encode), ms(decode));
    }
    assert!(ratio >= 4.0, "the convolution should be at least 4 times as fast as candle's");
}

/// An autoencoder of the right shapes.
fn random() -> Tensors {
    let conv = |name: &str, cout: usize, cin: usize, k: usize| {
        let scale = 1.0 / ((cin * k * k) as f32).sqrt();
        let w = Tensor::randn(0f32, scale, (cout, cin, k, k), &Device::Cpu).expect("weight");
        let b = Tensor::zeros(cout, DType::F32, &Device::Cpu).expect("bias");
        [(format!("{name}.weight"), w), (format!("{name}.bias"), b)]
    };
    let mut all = Vec::new();
    all.extend(conv("encoder.conv_in", 96, 192, 3));
    for (name, c) in [("encoder.res1", 96), ("encoder.res2", 192), ("encoder.res3", 192)] {
        all.extend(conv(&format!("{name}.a"), c, c, 3));
        all.extend(conv(&format!("{name}.b"), c, c, 3));
    }
    all.extend(conv("encoder.down", 192, 96, 3));
    all.extend(conv("encoder.conv_out", 16, 192, 1));
    all.extend(conv("decoder.conv_in", 112, 16, 3));
    for (name, cin, c) in
        [("mem", 224, 112), ("res1", 112, 112), ("res2", 112, 112), ("res3", 32, 32), ("res4", 32, 32)]
    {
        all.extend(conv(&format!("decoder.{name}.a"), c, cin, 3));
        all.extend(conv(&format!("decoder.{name}.b"), c, c, 3));
    }
    all.extend(conv("decoder.up", 512, 112, 1));
    all.extend(conv("decoder.conv_out", 48, 32, 3));
    Tensors::new(all, "random weights")
}
