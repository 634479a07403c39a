//! Attention over transposed values (`attention90.cu`) and in bf16 (`attention16.cu`) against plain operations in f64 over
//! the same stored numbers. On cards that are not Hopper's cuDNN attends, in rows, and the same must hold.

use candle_core::{DType, Device, Tensor};

use super::{
    attention::{attention, attention_rows, has_own},
    graph::Graph,
    tests::{attention64, bound, card, close, pair, random, wide},
};
use crate::model::{
    Result,
    nn::{
        self, Form, Memory, Rope, Rows, Slot,
        rope::{Group, Rounding},
    },
};

const HEAD: usize = 128;

fn flat(x: &Tensor) -> Vec<f64> {
    wide(x).flatten_all().unwrap().to_vec1().unwrap()
}

/// A new memory for values like these: in rows, transposed, and without their means.
fn memories(values: &Tensor, room: usize, headroom: f64) -> [Memory; 3] {
    let new = || Memory::new(values, (room, values.dims()[1]), true, headroom).unwrap();
    let transposed = || new().transposed(HEAD).unwrap();
    let centred = transposed().centred().unwrap();
    centred.centre(values, None).unwrap();
    [new(), transposed(), centred]
}

/// Ready queries, and the same as numbers.
fn queries(memory: &Memory, x: &Tensor, weight: f64) -> (Tensor, Tensor) {
    let (rows, width) = x.dims2().unwrap();
    let weight = Tensor::full(weight as f32, width, x.device()).unwrap().to_dtype(DType::BF16).unwrap();
    let q = memory.queries(x, &weight, 1e-6).unwrap();
    let ones = Tensor::ones(rows, DType::F32, x.device()).unwrap();
    let numbers = wide(&nn::fp8::restore(&q, &ones).unwrap());
    (q, numbers)
}

/// What was attended to, as it is stored, and as numbers.
fn attended(memory: &Memory, q: &Tensor, heads: usize, keys: usize) -> (Tensor, Tensor) {
    let slot = Slot { at: 0, keys, card: None }.on(q.device(), q.dims()[0]).unwrap();
    let rows = memory.attend(q, heads, Some(&slot)).unwrap();
    let numbers = rows.plain().unwrap();
    let Rows::Scaled { stored, .. } = rows else { panic!("attention in e4m3 is expected") };
    (stored, numbers)
}

/// Queries, keys and values side by side, as one product gives them, and the rotation of as many tokens.
fn tokens(rows: usize, heads: usize, device: &Device) -> (Tensor, Rope) {
    let all = random(&[rows, 3 * heads * HEAD], 1.0).to_dtype(DType::BF16).unwrap().to_device(device).unwrap();
    (all, Rope::new(&[Group::frames(5, 1, 1, rows)], HEAD, Rounding::Half, device).unwrap())
}

fn parts(all: &Tensor) -> [Tensor; 3] {
    let width = all.dims()[1] / 3;
    [0, 1, 2].map(|i| all.narrow(1, i * width, width).unwrap())
}

/// Transposed or in rows, a memory holds the same numbers: what was there, and what comes over it at any row, from a
/// product's columns or from other ranks.
#[test]
fn card_values_are_transposed_at_any_row() {
    let (device, room) = (card(), 640);
    for (heads, rows, at) in
        [(1, 1, 0), (1, 1, 639), (3, 37, 7), (2, 16, 16), (2, 144, 121), (1, 129, 128), (40, 300, 300), (2, 640, 0)]
    {
        let what = format!("{rows} rows of {heads} heads from {at} on");
        let width = heads * HEAD;
        let weight = Tensor::ones(width, DType::BF16, &device).unwrap();
        let (all, rope) = tokens(rows, heads, &device);
        let [q, k, v] = parts(&all);
        let (before, _) = pair(&[room, width], 1.0, DType::BF16, &device);
        let slot = Slot { at, keys: at + rows, card: None }.on(&device, rows).unwrap();
        let [by_rows, transposed, centred] = memories(&(&before + 0.5).unwrap(), room, 1.5);
        let [_, kept, _] = memories(&(&before + 0.5).unwrap(), room, 1.5);
        for memory in [&by_rows, &transposed, &centred, &kept] {
            memory.place(&before, &before).unwrap();
        }
        for memory in [&by_rows, &transposed, &centred] {
            memory.store([&q, &k, &v], [&weight, &weight], 1e-6, &rope, &slot).unwrap();
        }
        let [_, k_ready, v_ready] = kept.ready([&q, &k, &v], [&weight, &weight], 1e-6, &rope).unwrap();
        kept.keep(&k_ready, &v_ready, at).unwrap();

        let (keys, values) = by_rows.part(0, room).unwrap();
        for memory in [&transposed, &kept] {
            let (k2, v2) = memory.part(0, room).unwrap();
            assert!(flat(&keys) == flat(&k2), "keys of {what}");
            assert!(flat(&values) == flat(&v2), "values of {what}");
        }
        for memory in [&transposed, &centred] {
            // What is rounded is .5 less here.
            close(&what, &memory.part(at, rows).unwrap().1, &wide(&v.contiguous().unwrap()), 1.3 * bound(Form::Scaled));
        }
        let ready = centred.ready([&q, &k, &v], [&weight, &weight], 1e-6, &rope);
        assert_eq!(ready.is_err(), has_own(&device, HEAD).unwrap());

        let mut parks = transposed.clone();
        assert_eq!(parks.park(&[]).is_err(), has_own(&device, HEAD).unwrap());
    }
}

/// Sizes that end amid tiles of queries and of keys; work that ends with whole rounds of the card's blocks and that is
/// split among many; keys of which later ones are larger, so that what was summed is rescaled; scores below zero.
#[test]
fn card_attention_of_odd_sizes() {
    let device = card();
    let cases = [
        (1, 1, 1, 128),
        (2, 64, 1, 128),
        (3, 100, 31, 128),
        (2, 192, 96, 128),
        (2, 193, 97, 128),
        (5, 300, 256, 256),
        (1, 577, 640, 640),
        (40, 700, 301, 384),
        (1, 25_600, 97, 128),
        (2, 70, 5_001, 5_120),
        (3, 500, 2_999, 3_072),
    ];
    for (heads, rows, keys, room) in cases {
        for kind in ["random", "growing", "negative"] {
            let what = format!("{rows} over {keys} of {room}, {heads} heads, {kind}");
            let width = heads * HEAD;
            let growth = |i: usize| if kind == "growing" { 0.5 + 1.5 * (1.0 - i as f64 / room as f64) } else { 1.0 };
            let growth = Tensor::from_vec((0..room).map(growth).collect(), (room, 1), &Device::Cpu).unwrap();
            let mean = if kind == "negative" { 1.0 } else { 0.0 };
            let q = (random(&[rows, width], 1.0) + 2.0 * mean).unwrap();
            let k = (random(&[room, width], 1.0).broadcast_mul(&growth).unwrap() - mean).unwrap();
            let bf16 = |t: Tensor| t.to_dtype(DType::BF16).unwrap().to_device(&device).unwrap();
            let (q, k, v) = (bf16(q), bf16(k), bf16(random(&[room, width], 1.0)));
            let [_, transposed, _] = memories(&v, room, 4.0);
            let far = (&v + 2.0).unwrap();
            let [_, _, centred] = memories(&far, room, 4.0);
            for (memory, v) in [(transposed, v), (centred, far)] {
                memory.place(&k, &v).unwrap();
                let (q, q64) = queries(&memory, &q, 1.0);
                let (stored, got) = attended(&memory, &q, heads, keys);
                let (k, v) = memory.part(0, keys).unwrap();
                // Softmax values and the result are rounded; operands are what is stored.
                let limit = 1.1 * bound(Form::Scaled);
                close(&what, &got, &attention64(&q64, &wide(&k), &wide(&v), heads, 1), limit);
                assert!(
                    flat(&stored) == flat(&attended(&memory, &q, heads, keys).0),
                    "{what}: other numbers the second time"
                );
            }
        }
    }
}

/// Values with a mean, more keys than a ring has. A step of e4m3 products cuts its addends off below the sum, so the sum of
/// many keys comes out small: of 15 312 keys like these cuDNN's was 8.7 % small, and ours 7.3 % with the means in it, which
/// may not get worse. Without them it is right.
#[test]
fn card_attention_over_many_keys() {
    let (device, heads, rows, keys, room) = (card(), 2, 13_300, 15_312, 15_360);
    let width = heads * HEAD;
    // A mean for each channel, over an octave, so that rounding the result does not weigh in.
    let means: Vec<f64> = (0..width).map(|i| 4.0 + 4.0 * (i % HEAD) as f64 / HEAD as f64).collect();
    let v = random(&[room, width], 16.0).broadcast_add(&Tensor::new(means, &Device::Cpu).unwrap()).unwrap();
    let bf16 = |t: Tensor| t.to_dtype(DType::BF16).unwrap().to_device(&device).unwrap();
    let (q, k, v) = (bf16(random(&[rows, width], 1.0)), bf16(random(&[room, width], 1.0)), bf16(v));
    let [by_rows, transposed, centred] = memories(&v, room, 4.0);
    // Some rows of the first, of a middle and of the last tile.
    let some = |t: &Tensor| {
        Tensor::cat(&[0, 6_700, rows - 16].map(|from| t.narrow(0, from, 16).unwrap()), 0).unwrap().contiguous().unwrap()
    };
    let mut gains = Vec::new();
    for memory in [&by_rows, &transposed, &centred] {
        memory.place(&k, &v).unwrap();
        let (q, q64) = queries(memory, &q, 1.0);
        let got = some(&wide(&attended(memory, &q, heads, keys).1));
        let (k, v) = memory.part(0, keys).unwrap();
        let want = attention64(&some(&q64), &wide(&k), &wide(&v), heads, 1);
        let sum = |t: Tensor| t.sum_all().unwrap().to_scalar::<f64>().unwrap();
        gains.push(sum((&got * &want).unwrap()) / sum(want.sqr().unwrap()) - 1.0);
    }
    let [by_rows, transposed, centred] = [gains[0], gains[1], gains[2]];
    println!("gain over {keys} keys: cuDNN {by_rows:+.4}, transposed {transposed:+.4}, centred {centred:+.4}");
    if has_own(&device, HEAD).unwrap() {
        assert!(centred.abs() < 0.005, "centred results are off by a factor of {:.4}", 1.0 + centred);
        assert!(transposed.abs() < by_rows.abs() + 0.005, "results are off by a factor of {:.4}", 1.0 + transposed);
    }
}

/// Recorded once, a store and its attention read their rows and numbers on the card whenever they run.
#[test]
fn card_attention_in_a_graph() {
    // A stream of its own: other tests' launches would be recorded too.
    let (device, heads, rows, room) = (super::open(0).unwrap(), 3, 200, 640);
    let width = heads * HEAD;
    let weight = Tensor::ones(width, DType::BF16, &device).unwrap();
    let (all, rope) = tokens(rows, heads, &device);
    let [_, _, memory] = memories(&(&parts(&all)[2] + 0.5).unwrap(), room, 2.0);
    let mut slot = Slot { at: 0, keys: rows, card: None }.on(&device, rows).unwrap();
    let out = Tensor::zeros((rows, width), DType::F8E4M3, &device).unwrap();
    let nothing = out.copy().unwrap();
    let work = |slot: &Slot| -> Result<()> {
        let [q, k, v] = parts(&all);
        let q = memory.store([&q, &k, &v], [&weight, &weight], 1e-6, &rope, slot)?;
        let Rows::Scaled { stored, .. } = memory.attend(&q, heads, Some(slot))? else {
            panic!("attention in e4m3 is expected");
        };
        Ok(out.slice_set(&stored, 0, 0)?)
    };
    work(&slot).unwrap();
    let mut graph = Graph::record(&device, || work(&slot)).unwrap();
    for (at, keys) in [(0, 200), (200, 400), (301, 501), (440, 640), (17, 640)] {
        all.slice_set(&tokens(rows, heads, &device).0, 0, 0).unwrap();
        (slot.at, slot.keys) = (at, keys);
        let card = slot.card.as_ref().unwrap();
        card.slice_set(&Tensor::new(&slot.numbers(rows), &device).unwrap(), 0, 0).unwrap();
        out.slice_set(&nothing, 0, 0).unwrap();
        graph.launch().unwrap();
        let replayed = flat(&out);
        let (_, v) = memory.part(at, rows).unwrap();
        close("values by a graph", &v, &wide(&parts(&all)[2].contiguous().unwrap()), 1.3 * bound(Form::Scaled));
        out.slice_set(&nothing, 0, 0).unwrap();
        work(&slot).unwrap();
        assert!(replayed == flat(&out), "{rows} rows at {at}, {keys} keys: a graph gives other numbers than launches");
        assert!(replayed.iter().any(|x| *x != 0.0));
    }
}

/// bf16: sizes that end amid tiles, work that is split, groups, rows that stand apart, numbers of keys from the card, and
/// rows behind them that must not count.
#[test]
fn card_attention_in_bf16_of_odd_sizes() {
    let device = card();
    let cases = [
        (1, 1, 1, 1, 128),
        (2, 1, 64, 1, 128),
        (3, 1, 100, 31, 128),
        (2, 1, 192, 80, 80),
        (2, 1, 193, 81, 81),
        (2, 3, 129, 255, 255),
        (3, 2, 300, 257, 384),
        (1, 1, 577, 1_153, 1_280),
        (40, 1, 700, 301, 384),
        (1, 1, 17_000, 129, 256),
        (2, 2, 70, 5_001, 5_120),
        (3, 1, 500, 2_999, 3_072),
    ];
    for (heads, batch, rows, keys, room) in cases {
        for kind in ["random", "growing", "negative"] {
            let what = format!("{batch} x {rows} over {keys} of {room}, {heads} heads, {kind}");
            let width = heads * HEAD;
            // Rows behind those that count are large, and would be seen.
            let size = |i: usize| match (i % room < keys, kind) {
                (false, _) => 50.0,
                (true, "growing") => 0.5 + 3.5 * (1.0 - (i % room) as f64 / room as f64),
                _ => 1.0,
            };
            let size =
                Tensor::from_vec((0..batch * room).map(size).collect(), (batch * room, 1), &Device::Cpu).unwrap();
            let mean = if kind == "negative" { 1.0 } else { 0.0 };
            let q = (random(&[batch * rows, width], 1.0) + 2.0 * mean).unwrap();
            let k = (random(&[batch * room, width], 1.0).broadcast_mul(&size).unwrap() - mean).unwrap();
            let v = random(&[batch * room, width], 1.0).broadcast_mul(&size).unwrap();
            let bf16 = |t: &Tensor| t.to_dtype(DType::BF16).unwrap();
            // Queries and values are columns of something wider.
            let apart = |t: &Tensor| Tensor::cat(&[&bf16(t), &bf16(t)], 1).unwrap().to_device(&device).unwrap();
            let (wide_q, wide_v) = (apart(&q), apart(&v));
            let (q16, v16) = (wide_q.narrow(1, width, width).unwrap(), wide_v.narrow(1, 0, width).unwrap());
            let k16 = bf16(&k).to_device(&device).unwrap();
            let numbers = [vec![rows as u32; batch], vec![keys as u32; batch]].concat();
            let valid = Tensor::from_vec(numbers, (2, batch), &device).unwrap();
            let valid = (keys < room).then_some(&valid);
            let attend = || {
                if has_own(&device, HEAD).unwrap() {
                    return attention_rows(&q16, &k16, &v16, heads, batch, valid).unwrap();
                }
                let (q, v) = (q16.contiguous().unwrap(), v16.contiguous().unwrap());
                attention(&q, &k16, &v, heads, batch, valid, None).unwrap()
            };
            let got = attend();
            let all = |t: &Tensor| wide(&t.contiguous().unwrap());
            let (q, k, v) = (all(&q16), all(&k16), all(&v16));
            for group in 0..batch {
                let part = |t: &Tensor, from: usize, n: usize| t.narrow(0, group * from, n).unwrap();
                let want = attention64(&part(&q, rows, rows), &part(&k, room, keys), &part(&v, room, keys), heads, 1);
                close(&what, &part(&got, rows, rows), &want, bound(Form::Plain(DType::BF16)));
            }
            assert!(flat(&got) == flat(&attend()), "{what}: other numbers the second time");
        }
    }
}

/// Recorded once, attention in bf16 reads its keys' number on the card whenever it runs.
#[test]
fn card_attention_in_bf16_in_a_graph() {
    // A stream of its own: other tests' launches would be recorded too.
    let (device, heads, rows, room) = (super::open(0).unwrap(), 3, 200, 2_048);
    let operand = |rows: usize| pair(&[rows, heads * HEAD], 1.0, DType::BF16, &device);
    let ((q, q64), (k, k64), (v, v64)) = (operand(rows), operand(room), operand(room));
    let valid = Tensor::new(&[rows as u32, 1], &device).unwrap();
    let out = q.zeros_like().unwrap();
    let work = || -> Result<()> { Ok(out.slice_set(&attention(&q, &k, &v, heads, 1, Some(&valid), None)?, 0, 0)?) };
    work().unwrap();
    let mut graph = Graph::record(&device, work).unwrap();
    for keys in [1, 80, 81, 1_000, room] {
        valid.slice_set(&Tensor::new(&[rows as u32, keys as u32], &device).unwrap(), 0, 0).unwrap();
        graph.launch().unwrap();
        let cut = |t: &Tensor| t.narrow(0, 0, keys).unwrap();
        let want = attention64(&q64, &cut(&k64), &cut(&v64), heads, 1);
        close(&format!("{keys} keys by a graph"), &out, &want, bound(Form::Plain(DType::BF16)));
    }
}
