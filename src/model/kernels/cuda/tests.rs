//! The operations that a card fuses, against plain tensor operations in f64 of the same numbers: one body for the CPU and
//! the card. Inputs are fresh each time, results lie in memory that held NaN before, sizes are odd.

mod bounds;

use candle_core::{DType, Device, Tensor};

use super::{attention, gemm, rows};
use crate::model::{
    nn::rope::{Group, Rounding},
    nn::{
        self, Activation, Folded, Form, Linear, Memory, Residual, Rope, Rows, Slot,
        norm::{Affine, plain},
    },
};

/// The card, and what its operations are compared on.
pub(super) fn card() -> Device {
    static CARD: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    CARD.get_or_init(|| super::open(0).unwrap()).clone()
}

pub(super) fn random(shape: &[usize], deviation: f64) -> Tensor {
    Tensor::randn(0f64, deviation, shape, &Device::Cpu).unwrap()
}

/// Numbers that `dtype` holds exactly, on `device`, and the same in f64.
pub(super) fn pair(shape: &[usize], deviation: f64, dtype: DType, device: &Device) -> (Tensor, Tensor) {
    let stored = random(shape, deviation).to_dtype(dtype).unwrap();
    (stored.to_device(device).unwrap(), stored.to_dtype(DType::F64).unwrap())
}

pub(super) fn wide(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap()
}

/// ‖got − want‖ / ‖want‖, and no NaN.
fn relative(got: &Tensor, want: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let got = wide(got);
    let want = &want.to_dtype(DType::F64).unwrap();
    assert_eq!(got.dims(), want.dims());
    norm(&(got - want).unwrap()) / norm(want).max(1e-30)
}

/// Below so many numbers an error may be that of each of them instead of the mean's.
const FEW: usize = 1000;

#[track_caller]
pub(super) fn close(what: &str, got: &Tensor, want: &Tensor, bound: f64) {
    // Three bits behind the point: a number is off by a sixteenth at most, by 0.026 on average.
    let few = want.elem_count() < FEW && bound >= self::bound(Form::Scaled);
    let bound = if few { bound + 1.0 / 16.0 - 0.036 } else { bound };
    let error = relative(got, want);
    assert!(error <= bound, "{what}: relative error {error:.2e}, at most {bound:.0e} expected");
}

/// What a format's rounding alone costs, doubled: f32, bf16, e4m3.
pub(super) fn bound(form: Form) -> f64 {
    match form {
        Form::Plain(DType::F32) => 5e-6,
        Form::Plain(_) => 4e-3,
        Form::Scaled => 4e-2,
    }
}

/// Types of the stream and forms of the result that a device knows.
fn kinds(device: &Device) -> Vec<(DType, Form)> {
    match device {
        Device::Cpu => vec![(DType::F32, Form::Plain(DType::F32))],
        _ => [DType::F32, DType::BF16]
            .into_iter()
            .flat_map(|x| [Form::Plain(DType::F32), Form::Plain(DType::BF16), Form::Scaled].map(|form| (x, form)))
            .collect(),
    }
}

fn residual_and_norm(device: &Device) {
    for (runs, width) in [(vec![1], 8), (vec![3, 4], 136), (vec![33], 1000), (vec![5, 1, 7], 5120), (vec![2], 13824)] {
        let n: usize = runs.iter().sum();
        for (dtype, form) in kinds(device) {
            let y_type = if matches!(device, Device::Cpu) { DType::F32 } else { DType::BF16 };
            let (x, x64) = pair(&[n, width], 1.0, dtype, device);
            let (y, y64) = pair(&[n, width], 1.0, y_type, device);
            let (gate, gate64) = pair(&[runs.len(), width], 0.5, DType::F32, device);
            let (scale, scale64) = pair(&[runs.len(), width], 0.5, DType::F32, device);
            let (shift, shift64) = pair(&[runs.len(), width], 0.5, DType::F32, device);
            let affine = Affine::new(scale, shift);
            let affine64 = Affine::new(scale64, shift64);
            let what = format!("{runs:?} × {width}, {dtype:?} → {form:?}");

            let mut stream = Residual::new(x.copy().unwrap());
            let first = stream.norm(&affine, &runs, 1e-6, form).unwrap().plain().unwrap();
            close(&what, &first, &plain::layer_norm(&x64, &affine64, &runs, 1e-6).unwrap(), bound(form));

            stream.add(y.clone(), Some((&gate, &runs))).unwrap();
            let second = stream.norm(&affine, &runs, 1e-6, form).unwrap().plain().unwrap();
            // The sum is rounded to the stream's type before it is normed.
            let sum = plain::gated_add(&x64, &y64, &gate64, &runs).unwrap();
            let sum = sum.to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap();
            let slack = if dtype == DType::BF16 { 4e-4 } else { 0.0 };
            close(&what, &second, &plain::layer_norm(&sum, &affine64, &runs, 1e-6).unwrap(), bound(form) + slack);

            stream.add(y, None).unwrap();
            let sum = (sum + y64).unwrap();
            close(&what, stream.settle().unwrap(), &sum, bound(Form::Plain(dtype)));
        }
    }
}

/// Every number is off by what e4m3 with unit 1 costs: half a step of three bits, or half the smallest step.
#[track_caller]
fn each_rounded(what: &str, got: &Tensor, want: &Tensor) {
    let flat = |t: &Tensor| wide(t).flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for (got, want) in flat(got).into_iter().zip(flat(want)) {
        let allowed = want.abs() * 0.0626 + 1.0 / 1024.0 + 1e-4;
        assert!((got - want).abs() <= allowed, "{what}: {got} in place of {want}");
    }
}

/// Keys, values and queries into a memory, and nothing beside their rows. 40 heads of 128 have a kernel of their own.
fn memory(device: &Device) {
    let types: &[(DType, bool)] = if matches!(device, Device::Cpu) {
        &[(DType::F32, false)]
    } else {
        &[(DType::BF16, false), (DType::BF16, true)]
    };
    for &(dtype, fp8) in types {
        for (heads, head, rows) in [(1, 16, 1), (3, 32, 7), (80, 64, 5), (40, 128, 1), (40, 128, 19)] {
            let width = heads * head;
            let what = format!("{rows} rows of {heads} heads of {head}, fp8 {fp8}");
            // Rows of other sizes, so that a norm that is not the row's own is seen.
            let sizes: Vec<f64> = (0..rows).map(|row| 2f64.powi((row % 7) as i32 - 3)).collect();
            let sizes = Tensor::from_vec(sizes, (rows, 1), &Device::Cpu).unwrap();
            let all = random(&[rows, 2 * width], 1.0).broadcast_mul(&sizes).unwrap();
            let all = Tensor::cat(&[all, random(&[rows, width], 1.0)], 1).unwrap().to_dtype(dtype).unwrap();
            let (all, all64) = (all.to_device(device).unwrap(), all.to_dtype(DType::F64).unwrap());
            let (wq, wq64) = pair(&[width], 1.0, dtype, device);
            let (wk, wk64) = pair(&[width], 1.0, dtype, device);
            let groups = [Group::frames(5, 1, 1, rows)];
            let rope = Rope::new(&groups, head, Rounding::Half, device).unwrap();
            let table = wide(rope.table());
            let rope64 = Rope::from_table(table).unwrap();
            let part = |t: &Tensor, i: usize| t.narrow(1, i * width, width).unwrap();
            let values = part(&all, 2).contiguous().unwrap();
            let memory = Memory::new(&values, (3 * rows + 2, values.dims()[1]), fp8, 1.0).unwrap();
            let slot = Slot { at: rows + 1, keys: 2 * rows + 1, card: None }.on(device, rows).unwrap();
            let q =
                memory.store([&part(&all, 0), &part(&all, 1), &part(&all, 2)], [&wq, &wk], 1e-6, &rope, &slot).unwrap();
            let turned = |i: usize, w: &Tensor| {
                plain::rotate(&plain::rms_norm(&part(&all64, i).contiguous().unwrap(), w, 1e-6).unwrap(), &rope64)
                    .unwrap()
            };
            let limit = bound(if fp8 { Form::Scaled } else { Form::Plain(dtype) });
            let q =
                if fp8 { nn::fp8::restore(&q, &Tensor::ones(rows, DType::F32, device).unwrap()).unwrap() } else { q };
            close(&what, &q, &turned(0, &wq64), limit);
            let (k, v) = memory.part(rows + 1, rows).unwrap();
            close(&what, &k, &turned(1, &wk64), limit);
            if fp8 {
                each_rounded(&what, &q, &turned(0, &wq64));
                each_rounded(&what, &k, &turned(1, &wk64));
            }
            close(&what, &v, &part(&all64, 2), limit);
            for (from, n) in [(0, rows + 1), (2 * rows + 1, rows + 1)] {
                let (k, v) = memory.part(from, n).unwrap();
                for t in [k, v] {
                    let most =
                        wide(&t).abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
                    assert_eq!(most, 0.0, "{what}: rows beside the slot were written");
                }
            }
        }
    }
}

fn few_keys(device: &Device) {
    let cpu = matches!(device, Device::Cpu);
    for (frames, n, count, heads, head) in [(1, 1, 1, 1, 8), (3, 11, 5, 40, 128), (2, 5, 8, 5, 24)] {
        let (dtype, forms) = if cpu {
            (DType::F32, vec![Form::Plain(DType::F32)])
        } else {
            (DType::BF16, vec![Form::Plain(DType::BF16), Form::Scaled])
        };
        let width = heads * head;
        let (q, q64) = pair(&[frames * n, width], 1.0, dtype, device);
        let (w, w64) = pair(&[width], 1.0, dtype, device);
        let (k, k64) = pair(&[frames * count, width], 1.0, dtype, device);
        let (v, v64) = pair(&[frames * count, width], 1.0, dtype, device);
        let q64 = plain::rms_norm(&q64, &w64, 1e-6).unwrap();
        let want = attention64(&q64, &k64, &v64, heads, frames);
        for form in forms {
            let got = nn::attention_to_few(&q, &w, &k, &v, heads, frames, 1e-6, form).unwrap().plain().unwrap();
            close(&format!("{frames}·{n} over {count}, {heads}·{head} {form:?}"), &got, &want, bound(form));
        }
    }
}

/// What each value weighs in [`attention64`]: `[groups · a, heads, keys of a group]`.
fn weights64(q: &Tensor, k: &Tensor, bias: Option<&Tensor>, heads: usize, groups: usize) -> Tensor {
    let ((rows, dim), count) = (q.dims2().unwrap(), k.dims()[0] / groups);
    let split = |t: &Tensor| {
        let t = t.reshape((groups, t.dim(0).unwrap() / groups, heads, dim / heads)).unwrap();
        t.transpose(1, 2).unwrap().contiguous().unwrap()
    };
    let scores = split(q).matmul(&split(k).transpose(2, 3).unwrap().contiguous().unwrap()).unwrap();
    let scores = (scores / ((dim / heads) as f64).sqrt()).unwrap();
    let scores = bias.map_or(Ok(scores.clone()), |b| scores.broadcast_add(b)).unwrap();
    let p = candle_nn::ops::softmax(&scores, 3).unwrap();
    p.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, heads, count)).unwrap()
}

/// Forms of a projection's weights: the matrix, the same in f64, and its bias in f64.
fn projection(dim: usize, form: Form, device: &Device) -> (Linear, Tensor, Tensor) {
    let dtype = if form == Form::Plain(DType::F32) { DType::F32 } else { DType::BF16 };
    let (w, w64) = pair(&[dim, dim], (dim as f64).sqrt().recip(), dtype, device);
    let (b, b64) = pair(&[dim], 0.1, dtype, device);
    let o = Linear::new(w, Some(b)).unwrap();
    (if form == Form::Scaled { o.scaled().unwrap() } else { o }, w64, b64)
}

/// Attention to keys of which the last stands for many, made into the output projection.
fn folded(device: &Device) {
    let cpu = device.is_cpu();
    let sizes = [(1, 1, 1, 7), (3, 19, 5, 1), (2, 130, 16, 496), (40, 33, 64, 448), (2, 70, 41, 31), (1, 65, 96, 416)];
    for (heads, rows, n, alike) in sizes {
        let (dtype, forms) = if cpu {
            (DType::F32, vec![Form::Plain(DType::F32)])
        } else {
            (DType::BF16, vec![Form::Plain(DType::BF16), Form::Scaled])
        };
        let dim = heads * 128;
        let (q, q64) = pair(&[rows, dim], 3.0, dtype, device);
        let (w, w64) = pair(&[dim], 1.0, dtype, device);
        let (k, k64) = pair(&[n + 1, dim], 1.0, dtype, device);
        let (v, v64) = pair(&[n + 1, dim], 1.0, dtype, device);
        let ones = Tensor::ones(dim, DType::F64, &Device::Cpu).unwrap();
        let unit = plain::rms_norm(&q64, &ones, 1e-6).unwrap();
        // The norm's weight is in the keys, which are rounded after it.
        let keys = k64.broadcast_mul(&w64).unwrap().to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap();
        let bias: Vec<f64> = (0..=n).map(|i| if i < n { 0.0 } else { (alike as f64).ln() }).collect();
        let bias = Tensor::new(bias, &Device::Cpu).unwrap();
        let p = weights64(&unit, &keys, Some(&bias), heads, 1).narrow(2, 0, n).unwrap();
        let all = |t: &Tensor| {
            let last = t.narrow(0, n, 1).unwrap().broadcast_as((alike, dim)).unwrap().contiguous().unwrap();
            Tensor::cat(&[&t.narrow(0, 0, n).unwrap(), &last], 0).unwrap()
        };
        let attended = attention64(&unit.broadcast_mul(&w64).unwrap(), &all(&k64), &all(&v64), heads, 1);
        for form in forms {
            let what = format!("{rows} rows over {n} and {alike} keys, {heads} heads, {form:?}");
            let (o, o64, b64) = projection(dim, form, device);
            let folded = Folded::new(&o, &k, &v, alike, &w, heads, 1e-6).unwrap();
            let weights = folded.weights(&q).unwrap();
            let got = weights.plain().unwrap();
            let columns = got.dims()[1] / heads;
            let got = got.reshape((rows, heads, columns)).unwrap().narrow(2, 0, n).unwrap();
            close(&format!("weights of {what}"), &got.contiguous().unwrap(), &p, bound(form));
            let want = attended.matmul(&o64.t().unwrap()).unwrap().broadcast_add(&b64).unwrap();
            let bound = if cpu { 1e-5 } else { 2.5 * bound(form) };
            close(&what, &folded.product().forward_rows(&weights, Activation::None).unwrap(), &want, bound);
            // Added to a stream, as a block does it: by the product where there is one.
            let stream_type = if cpu { DType::F32 } else { DType::BF16 };
            let (x, x64) = pair(&[rows, dim], 1.0, stream_type, device);
            let mut x = Residual::new(x);
            x.add_through(folded.product(), &weights, None, None).unwrap();
            close(&format!("{what}, added"), x.settle().unwrap(), &(want + x64).unwrap(), bound);
        }
    }
}

/// Products added to a stream, through gates of either sign that are in the matrix where it has factors.
fn gated(device: &Device) {
    let cpu = device.is_cpu();
    for (rows, dim) in [(1, 16), (33, 144), (70, 5120)] {
        let forms = if cpu { vec![Form::Plain(DType::F32)] } else { vec![Form::Plain(DType::BF16), Form::Scaled] };
        for form in forms {
            let what = format!("{rows} × {dim} {form:?}");
            let stream_type = if cpu { DType::F32 } else { DType::BF16 };
            let (x, x64) = pair(&[rows, dim], 1.0, stream_type, device);
            let (y, y64) = pair(&[rows, dim], 1.0, stream_type, device);
            let (gate, gate64) = pair(&[1, dim], 1.0, DType::F32, device);
            let (o, o64, b64) = projection(dim, form, device);
            let y = if form == Form::Scaled {
                let (stored, units) = rows::quantise(&y, false).unwrap();
                Rows::Scaled { stored, units }
            } else {
                Rows::Plain(y)
            };
            let made = o.gated(&gate).unwrap();
            assert_eq!(made.is_some(), form == Form::Scaled);
            let runs = [rows];
            let mut x = Residual::new(x);
            x.add_through(&o, &y, Some((&gate, &runs)), made.as_ref()).unwrap();
            let y64 = y64.matmul(&o64.t().unwrap()).unwrap().broadcast_add(&b64).unwrap();
            let want = (x64 + y64.broadcast_mul(&gate64).unwrap()).unwrap();
            close(&what, x.settle().unwrap(), &want, bound(form));
        }
    }
}

/// Attention to the few keys of each group, made into the output projection.
fn folded_few(device: &Device) {
    let cpu = device.is_cpu();
    for (groups, n, count, heads) in [(1, 1, 1, 1), (3, 11, 5, 40), (2, 37, 8, 4), (5, 16, 7, 2)] {
        let (dtype, forms) = if cpu {
            (DType::F32, vec![Form::Plain(DType::F32)])
        } else {
            (DType::BF16, vec![Form::Plain(DType::BF16), Form::Scaled])
        };
        let (dim, all) = (heads * 128, groups * count);
        let (q, q64) = pair(&[groups * n, dim], 3.0, dtype, device);
        let (w, w64) = pair(&[dim], 1.0, dtype, device);
        let (k, k64) = pair(&[all, dim], 1.0, dtype, device);
        let (v, v64) = pair(&[all, dim], 1.0, dtype, device);
        let ones = Tensor::ones(dim, DType::F64, &Device::Cpu).unwrap();
        let unit = plain::rms_norm(&q64, &ones, 1e-6).unwrap();
        let keys = k64.broadcast_mul(&w64).unwrap().to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap();
        let p = weights64(&unit, &keys, None, heads, groups);
        let spread: Vec<Tensor> = (0..groups)
            .map(|g| {
                let own = p.narrow(0, g * n, n).unwrap().contiguous().unwrap();
                own.pad_with_zeros(2, g * count, all.next_multiple_of(16) - (g + 1) * count).unwrap()
            })
            .collect();
        let spread = Tensor::cat(&spread, 0).unwrap().flatten_from(1).unwrap();
        let attended = attention64(&unit.broadcast_mul(&w64).unwrap(), &k64, &v64, heads, groups);
        for form in forms {
            let what = format!("{groups}·{n} over {count}, {heads} heads {form:?}");
            let (o, o64, b64) = projection(dim, form, device);
            let folded = Folded::grouped(&o, &k, &v, groups, &w, heads, 1e-6).unwrap();
            let weights = folded.weights(&q).unwrap();
            close(&format!("weights of {what}"), &weights.plain().unwrap(), &spread, bound(form));
            let want = attended.matmul(&o64.t().unwrap()).unwrap().broadcast_add(&b64).unwrap();
            let bound = if cpu { 1e-5 } else { 2.5 * bound(form) };
            close(&what, &folded.product().forward_rows(&weights, Activation::None).unwrap(), &want, bound);
        }
    }
}

pub(super) fn attention64(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, groups: usize) -> Tensor {
    let (rows, dim) = q.dims2().unwrap();
    let split = |t: &Tensor| {
        let t = t.reshape((groups, t.dim(0).unwrap() / groups, heads, dim / heads)).unwrap();
        t.transpose(1, 2).unwrap().contiguous().unwrap()
    };
    let (q, k, v) = (split(q), split(k), split(v));
    let scores =
        (q.matmul(&k.transpose(2, 3).unwrap().contiguous().unwrap()).unwrap() / ((dim / heads) as f64).sqrt()).unwrap();
    let scores = candle_nn::ops::softmax(&scores, 3).unwrap();
    scores.matmul(&v).unwrap().transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, dim)).unwrap()
}

#[test]
fn cpu_and_plain_operations_agree() {
    residual_and_norm(&Device::Cpu);
    memory(&Device::Cpu);
    few_keys(&Device::Cpu);
    folded(&Device::Cpu);
    folded_few(&Device::Cpu);
    gated(&Device::Cpu);
    bounds::norms(&Device::Cpu);
    bounds::far_norms(&Device::Cpu);
    bounds::feed_forward(&Device::Cpu);
}

#[test]
fn card_residual_and_norm() {
    residual_and_norm(&card());
}

#[test]
fn card_memory() {
    memory(&card());
}

#[test]
fn card_memory_waits_in_host_memory() {
    let (device, n, width) = (card(), 130, 64);
    let fresh = || random(&[n, width], 1.0).to_dtype(DType::BF16).unwrap().to_device(&device).unwrap();
    for fp8 in [false, true] {
        let values = fresh();
        let (mut moving, staying) =
            (Memory::new(&values, (n, width), fp8, 1.0), Memory::new(&values, (n, width), fp8, 1.0));
        let (moving, staying) = (moving.as_mut().unwrap(), staying.unwrap());
        let same = |moving: &Memory| {
            let ((k, v), (k2, v2)) = (moving.part(0, n).unwrap(), staying.part(0, n).unwrap());
            assert_eq!(wide(&k).to_vec2::<f64>().unwrap(), wide(&k2).to_vec2::<f64>().unwrap());
            assert_eq!(wide(&v).to_vec2::<f64>().unwrap(), wide(&v2).to_vec2::<f64>().unwrap());
        };
        for round in 0..3 {
            // The first time everything goes; later only what was written: here the first rows.
            let rows = if round == 0 { n } else { 40 };
            let (k, v) = (fresh().narrow(0, 0, rows).unwrap(), fresh().narrow(0, 0, rows).unwrap());
            moving.place(&k, &v).unwrap();
            staying.place(&k, &v).unwrap();
            moving.park(&[0..20, 20..40]).unwrap();
            moving.come(&device).unwrap();
            same(moving);
        }
    }
}

#[test]
fn card_few_keys() {
    few_keys(&card());
}

#[test]
fn card_folded() {
    folded(&card());
}

#[test]
fn card_gated() {
    gated(&card());
}

#[test]
fn card_folded_few() {
    folded_few(&card());
}

#[test]
fn card_quantises_rows() {
    for (n, width) in [(1, 8), (7, 136), (33, 5120), (3, 13824)] {
        for gelu in [false, true] {
            let (x, x64) = pair(&[n, width], 2.0, DType::BF16, &card());
            let (stored, units) = rows::quantise(&x, gelu).unwrap();
            let want = if gelu { x64.gelu().unwrap() } else { x64 };
            close("quantise", &nn::fp8::restore(&stored, &units).unwrap(), &want, bound(Form::Scaled));
            let (twin, _) = nn::fp8::quantise_rows(&want.to_dtype(DType::F32).unwrap()).unwrap();
            let numbers = |t: &Tensor| wide(t).flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let (twin, stored) = (numbers(&twin), numbers(&stored));
            let apart = stored.iter().zip(&twin).filter(|(a, b)| a != b).count();
            // A tie may fall either way when a sum was rounded differently.
            assert!(apart * 50 <= twin.len(), "{apart} of {} numbers differ from the twin's", twin.len());
        }
    }
}

#[test]
fn card_products() {
    for (n, width, out) in [(1, 16, 16), (33, 64, 144), (130, 1536, 528), (257, 5120, 640)] {
        for (has_bias, gelu) in [(false, false), (true, false), (true, true)] {
            let (x, x64) = pair(&[n, width], 1.0, DType::BF16, &card());
            let (w, w64) = pair(&[out, width], 0.05, DType::BF16, &card());
            let (b, b64) = pair(&[out], 0.5, DType::BF16, &card());
            let bias = has_bias.then_some(&b);
            let finish = |y: Tensor| {
                let y = if has_bias { y.broadcast_add(&b64).unwrap() } else { y };
                if gelu { y.gelu().unwrap() } else { y }
            };
            let what = format!("[{n}, {width}] · [{out}, {width}], bias {has_bias}, gelu {gelu}");
            let got = gemm::product(&gemm::Product { x: &x, weight: &w, scales: None, bias, gelu }).unwrap();
            close(&what, &got, &finish(x64.matmul(&w64.t().unwrap()).unwrap()), 5e-3);

            let ((x8, xu), (w8, wu)) = (rows::quantise(&x, false).unwrap(), rows::quantise(&w, false).unwrap());
            let p = gemm::Product { x: &x8, weight: &w8, scales: Some((&xu, &wu)), bias, gelu };
            if gelu && !gemm::possible(&p).unwrap() {
                println!("{what}: cuBLASLt has no e4m3 product with this epilogue, and none is used");
                continue;
            }
            let restored = |s: &Tensor, u: &Tensor| wide(&nn::fp8::restore(s, u).unwrap());
            let want = restored(&x8, &xu).matmul(&restored(&w8, &wu).t().unwrap()).unwrap();
            close(&format!("e4m3 {what}"), &gemm::product(&p).unwrap(), &finish(want.clone()), 1e-2);
            if !gelu {
                let (sum, sum64) = pair(&[n, out], 3.0, DType::BF16, &card());
                if !gemm::add_product(&p, &sum).unwrap() {
                    println!("{what}: cuBLASLt adds no e4m3 product, and sums are passes of their own");
                    continue;
                }
                close(&format!("e4m3 {what}, added"), &sum, &(finish(want) + sum64).unwrap(), 1e-2);
            }
        }
    }
}

#[test]
fn card_attention() {
    for (batch, heads, head, queries, keys, counted) in
        [(1, 2, 128, 70, 256, 201), (3, 4, 64, 17, 128, 128), (1, 40, 128, 130, 384, 300)]
    {
        let dim = heads * head;
        let device = card();
        let (q, q64) = pair(&[batch * queries, dim], 1.0, DType::BF16, &device);
        let (k, k64) = pair(&[batch * keys, dim], 1.0, DType::BF16, &device);
        let (v, v64) = pair(&[batch * keys, dim], 1.0, DType::BF16, &device);
        let what = format!("{batch} · {heads} · {head}, {queries} over {counted} of {keys}");
        if batch > 1 {
            let got = attention::attention(&q, &k, &v, heads, batch, None, None).unwrap();
            close(&what, &got, &attention64(&q64, &k64, &v64, heads, batch), 8e-3);
            continue;
        }
        let valid = Tensor::new(&[queries as u32, counted as u32], &device).unwrap();
        let cut = |t: &Tensor| t.narrow(0, 0, counted).unwrap();
        let want = attention64(&q64, &cut(&k64), &cut(&v64), heads, 1);
        let got = attention::attention(&q, &k, &v, heads, 1, Some(&valid), None).unwrap();
        close(&what, &got, &want, 8e-3);

        let memory = Memory::new(&v, (keys, v.dims()[1]), true, 4.0).unwrap();
        memory.place(&k, &v).unwrap();
        let ones = Tensor::ones(dim, DType::BF16, &device).unwrap();
        let q8 = memory.queries(&q, &ones, 1e-6).unwrap();
        let slot = Slot { at: 0, keys: counted, card: None }.on(&device, queries).unwrap();
        let got = memory.attend(&q8, heads, Some(&slot)).unwrap();
        assert!(matches!(got, Rows::Scaled { .. }));
        let normed = plain::rms_norm(&q64, &wide(&ones), 1e-6).unwrap();
        let want = attention64(&normed, &cut(&k64), &cut(&v64), heads, 1);
        // Independent numbers make a flat softmax: the worst case for a mean of quantised values.
        close(&format!("e4m3 {what}"), &got.plain().unwrap(), &want, 8e-2);
    }
}
