//! e4m3 with one unit from a bound: rows that leave a norm, products of them with results in e4m3, and that no row, however
//! unfavourable, is cut off.

use super::*;
use crate::model::{kernels::cuda::gemm::Product, nn::Unit};

/// Every one of `rows`, which have one unit, is off by what rounding costs and `steps` units at most: none was cut off.
/// Gives the largest in size, in units.
#[track_caller]
fn none_is_cut(what: &str, rows: &Rows, want: &Tensor, steps: f64) -> f64 {
    let Rows::Bound { unit, .. } = rows else { panic!("{what}: rows with one unit are expected") };
    let unit = f64::from(unit.value().to_vec1::<f32>().unwrap()[0]);
    let flat = |t: &Tensor| wide(t).flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let mut most = 0f64;
    for (got, want) in flat(&rows.plain().unwrap()).into_iter().zip(flat(want)) {
        most = most.max(want.abs() / unit);
        // Half a step of three bits is a sixteenth; a little for sums in another order.
        assert!(
            (got - want).abs() <= want.abs() * 0.07 + steps * unit,
            "{what}: {got} in place of {want}, unit {unit}"
        );
    }
    assert!(most <= 448.0, "{what}: {most} units occur");
    most
}

fn stream_types(device: &Device) -> Vec<DType> {
    if device.is_cpu() { vec![DType::F32] } else { vec![DType::F32, DType::BF16] }
}

/// Normed rows with a unit for all: the same numbers, and one spike, the longest that a normed number can be, is not cut.
pub(super) fn norms(device: &Device) {
    for (runs, width) in [(vec![1], 8), (vec![3, 4], 136), (vec![33], 1000), (vec![5, 1, 7], 5120), (vec![2], 13824)] {
        let n: usize = runs.iter().sum();
        for dtype in stream_types(device) {
            let (scale, scale64) = pair(&[runs.len(), width], 0.5, DType::F32, device);
            let (shift, shift64) = pair(&[runs.len(), width], 0.5, DType::F32, device);
            let affine = Affine::new(scale, shift).bounded().unwrap();
            let affine64 = Affine::new(scale64, shift64);
            let what = format!("{runs:?} × {width}, {dtype:?}, one unit");
            let (x, x64) = pair(&[n, width], 1.0, dtype, device);
            let y = Residual::new(x).norm(&affine, &runs, 1e-6, Form::Scaled).unwrap();
            let want = plain::layer_norm(&x64, &affine64, &runs, 1e-6).unwrap();
            none_is_cut(&what, &y, &want, 2e-3);
            close(&what, &y.plain().unwrap(), &want, bound(Form::Scaled));

            // A spike where a run's scale is largest becomes √width of it.
            let mut spikes = vec![0f32; n * width];
            let sizes = affine64.scale.abs().unwrap().argmax(1).unwrap().to_vec1::<u32>().unwrap();
            let run_of = (0..runs.len()).flat_map(|r| std::iter::repeat_n(r, runs[r]));
            for (row, run) in run_of.enumerate() {
                spikes[row * width + sizes[run] as usize] = 100.0;
            }
            let x = Tensor::from_vec(spikes, (n, width), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let want = plain::layer_norm(&x.to_dtype(DType::F64).unwrap(), &affine64, &runs, 1e-6).unwrap();
            let y = Residual::new(x.to_device(device).unwrap()).norm(&affine, &runs, 1e-6, Form::Scaled).unwrap();
            let most = none_is_cut(&format!("{what}, spikes"), &y, &want, 2e-3);
            assert!(width < 100 || most > 250.0, "{what}: a spike of {most} units is no test of the bound");
        }
    }
}

/// Normed rows that lie a hundred of their deviations from zero keep their digits, with a unit for all and with one each; so
/// do rows of one number, and rows of one number but for a single one. 5120 has a kernel of its own.
pub(super) fn far_norms(device: &Device) {
    for (runs, width) in [(vec![2, 1, 30], 136), (vec![3], 5112), (vec![3], 5120), (vec![37, 1, 90, 5], 5120)] {
        let n: usize = runs.iter().sum();
        for dtype in stream_types(device) {
            let (scale, scale64) = pair(&[runs.len(), width], 0.5, DType::F32, device);
            let (shift, shift64) = pair(&[runs.len(), width], 0.5, DType::F32, device);
            let (given, each) =
                (Affine::new(scale.clone(), shift.clone()).bounded().unwrap(), Affine::new(scale, shift));
            let mut x = random(&[n, width], 1.0).affine(1.0, 100.0).unwrap().to_vec2::<f64>().unwrap();
            x[0].fill(100.0);
            x[n - 1].fill(101.0);
            x[n - 1][width / 3] = 100.0;
            let x = Tensor::new(x, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let want = plain::layer_norm(&x.to_dtype(DType::F64).unwrap(), &Affine::new(scale64, shift64), &runs, 1e-6);
            let want = wide(&want.unwrap()).to_vec2::<f64>().unwrap();
            for norm in [given, each] {
                let mut stream = Residual::new(x.to_device(device).unwrap());
                let y = stream.norm(&norm, &runs, 1e-6, Form::Scaled).unwrap();
                let units = match &y {
                    Rows::Scaled { units, .. } => units.to_vec1::<f32>().unwrap(),
                    Rows::Bound { unit, .. } => vec![unit.value().to_vec1::<f32>().unwrap()[0]; n],
                    Rows::Plain(_) => panic!("rows in e4m3 are expected"),
                };
                let y = wide(&y.plain().unwrap()).to_vec2::<f64>().unwrap();
                for (row, unit) in units.into_iter().enumerate() {
                    for (got, want) in y[row].iter().zip(&want[row]) {
                        // Half a step of three bits, half the smallest step, and what f32 makes of a hundred deviations.
                        let allowed = want.abs() * 0.0626 + f64::from(unit) / 1023.0 + 1e-3;
                        assert!(
                            (got - want).abs() <= allowed,
                            "{runs:?} × {width}, {dtype:?}, row {row}: {got} in place of {want}, unit {unit}"
                        );
                    }
                }
            }
        }
    }
}

/// Norm, product, GELU and the form between two matrices, of rows that stand along each of the matrix's own: bounds hold,
/// nothing is cut off, and the bounds are not idle.
pub(super) fn feed_forward(device: &Device) {
    let cpu = device.is_cpu();
    for (width, out, runs) in [(16, 32, 1), (136 + 8, 48, 2), (1040, 272, 3), (5120, 640, 1)] {
        for dtype in stream_types(device) {
            let what = format!("{width} → {out}, {runs} runs, {dtype:?}");
            let kept = if cpu { DType::F32 } else { DType::BF16 };
            let (w, w64) = pair(&[out, width], (width as f64).sqrt().recip(), kept, device);
            // Some channels are much smaller than others, but not so small that they get scales of their own.
            let sizes = Tensor::from_iter((0..out).map(|j| [1.0, 0.5, 0.125][j % 3]), &Device::Cpu).unwrap();
            let sizes = sizes.reshape((out, 1)).unwrap();
            let w64 = w64.broadcast_mul(&sizes).unwrap();
            let w = w.broadcast_mul(&sizes.to_dtype(kept).unwrap().to_device(device).unwrap()).unwrap();
            let (bias, bias64) = pair(&[out], 0.1, kept, device);
            let linear = Linear::new(w, Some(bias)).unwrap().evenly_scaled().unwrap();
            assert_eq!(linear.even(), !cpu, "{what}");
            let (scale, scale64) = pair(&[runs, width], 0.5, DType::F32, device);
            let (shift, shift64) = pair(&[runs, width], 0.2, DType::F32, device);
            let norm = Affine::new(scale, shift).bounded().unwrap();
            let norm64 = Affine::new(scale64.clone(), shift64.clone());

            let given = norm.unit.as_ref().unwrap();
            let bounds = linear.bounds(&norm, given).unwrap();
            let twin = nn::fp8::bounds(
                &w64.to_dtype(DType::F32).unwrap(),
                Some(&bias64.to_dtype(DType::F32).unwrap()),
                &Affine::new(scale64.to_dtype(DType::F32).unwrap(), shift64.to_dtype(DType::F32).unwrap()),
                &given.value().to_device(&Device::Cpu).unwrap(),
            );
            // The card's are of the rounded matrix, whose errors even out over a row.
            let limit = if cpu {
                1e-5
            } else if width < 100 {
                super::bound(Form::Scaled)
            } else {
                2e-2
            };
            close(&format!("bounds of {what}"), &bounds, &twin.unwrap(), limit);

            // Rows along w_j ∘ scale, to the side where the shift and the bias are, for every j of every run.
            let known = shift64.matmul(&w64.t().unwrap()).unwrap().broadcast_add(&bias64).unwrap();
            let rows: Vec<Tensor> = (0..runs)
                .map(|r| {
                    let along = w64.broadcast_mul(&scale64.get(r).unwrap()).unwrap();
                    let side: Vec<f64> = known.get(r).unwrap().to_vec1::<f64>().unwrap();
                    let side = Tensor::from_iter(side.into_iter().map(f64::signum), &Device::Cpu).unwrap();
                    along.broadcast_mul(&side.reshape((out, 1)).unwrap()).unwrap()
                })
                .collect();
            let x = (Tensor::cat(&rows, 0).unwrap() * 30.0).unwrap().to_dtype(dtype).unwrap();
            let (x, x64) = (x.to_device(device).unwrap(), x.to_dtype(DType::F64).unwrap());
            let covered = vec![out; runs];
            let normed = Residual::new(x).norm(&norm, &covered, 1e-6, Form::Scaled).unwrap();
            let h64 = plain::layer_norm(&x64, &norm64, &covered, 1e-6).unwrap().matmul(&w64.t().unwrap()).unwrap();
            let h64 = h64.broadcast_add(&bias64).unwrap();
            let h = linear.forward_rows(&normed, Activation::None).unwrap();
            close(&what, &h, &h64, 1.5 * super::bound(Form::Scaled));

            let gelu = wide(&h).gelu().unwrap();
            let (bounds, sizes) = (wide(&bounds).to_vec2::<f64>().unwrap(), wide(&h).to_vec2::<f64>().unwrap());
            let part = |row: usize, j: usize| sizes[row][j].abs() / (bounds[row / out][j] * nn::fp8::MARGIN);
            for row in 0..runs * out {
                for j in 0..out {
                    assert!(part(row, j) <= 1.0, "{what}: result {j} of row {row} is {} of its bound", part(row, j));
                }
                let own = part(row, row % out);
                assert!(width < 100 || own > 0.7, "{what}: row {row} reaches {own} of its bound");
            }

            let unit = linear.unit_after(&norm).unwrap().unwrap();
            let given = linear.forward_to_gelu(&normed, Form::Scaled, Some(&unit)).unwrap();
            // The library's tanh is an approximation, which shows where GELU is nearly 0.
            let most = none_is_cut(&format!("GELU of {what}"), &given, &gelu, 0.1);
            assert!(width < 100 || most > 250.0, "{what}: {most} units at most are no test of the bound");
            let want = h64.gelu().unwrap();
            close(&format!("GELU of {what}"), &given.plain().unwrap(), &want, 2.0 * super::bound(Form::Scaled));
            // Its reader gets them as rows with a unit each.
            let (second, second64, b64) = pair_of(out, 32, device);
            let form = second.form();
            let given = if form == Form::Scaled { given } else { Rows::Plain(given.plain().unwrap()) };
            let y = second.forward_rows(&given, Activation::None).unwrap();
            let want = want.matmul(&second64.t().unwrap()).unwrap().broadcast_add(&b64).unwrap();
            close(&format!("second after {what}"), &y, &want, 2.5 * super::bound(Form::Scaled));
        }
    }
}

/// A second matrix `[out, width]` in e4m3 where the device computes so, the same in f64, and its bias.
fn pair_of(width: usize, out: usize, device: &Device) -> (Linear, Tensor, Tensor) {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    let (w, w64) = pair(&[out, width], (width as f64).sqrt().recip(), dtype, device);
    let (b, b64) = pair(&[out], 0.1, dtype, device);
    (Linear::new(w, Some(b)).unwrap().scaled().unwrap(), w64, b64)
}

#[test]
fn card_norms_with_one_unit() {
    norms(&card());
}

#[test]
fn card_norms_of_rows_far_from_zero() {
    far_norms(&card());
}

#[test]
fn card_feed_forward_with_one_unit() {
    feed_forward(&card());
}

#[test]
fn card_products_of_whole_operands() {
    let device = &card();
    for (n, width, out) in [(1, 16, 16), (33, 64, 144), (130, 1536, 528), (257, 5120, 640)] {
        let (x, x64) = pair(&[n, width], 1.0, DType::BF16, device);
        let (w, w64) = pair(&[out, width], 0.05, DType::BF16, device);
        let (b, b64) = pair(&[out], 0.5, DType::BF16, device);
        let most =
            |t: &Tensor| Tensor::new(t.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap() as f32, device);
        let (xu, wu) = (Unit::of(&most(&x64).unwrap()).unwrap(), Unit::of(&most(&w64).unwrap()).unwrap());
        let stored = |t, u: &Unit| rows::quantise_by(t, false, u.value()).unwrap();
        let (x8, w8) = (stored(&x, &xu), stored(&w, &wu));
        let numbers = |s: &Tensor, u: &Unit| wide(&nn::fp8::restore(s, u.value()).unwrap());
        close("one unit", &numbers(&x8, &xu), &x64, bound(Form::Scaled));
        let twin =
            nn::fp8::quantise_by(&x64.to_dtype(DType::F32).unwrap(), &xu.value().to_device(&Device::Cpu).unwrap());
        let flat = |t: &Tensor| wide(t).flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (twin, own) = (flat(&twin.unwrap()), flat(&x8));
        let apart = own.iter().zip(&twin).filter(|(a, b)| a != b).count();
        assert!(apart * 50 <= twin.len(), "{apart} of {} numbers differ from the twin's", twin.len());

        let y64 = numbers(&x8, &xu).matmul(&numbers(&w8, &wu).t().unwrap()).unwrap();
        for (has_bias, gelu) in [(false, false), (true, false), (true, true)] {
            let what = format!("[{n}, {width}] · [{out}, {width}] of one scale each, bias {has_bias}, gelu {gelu}");
            let bias = has_bias.then_some(&b);
            let want = if has_bias { y64.broadcast_add(&b64).unwrap() } else { y64.clone() };
            let want = if gelu { want.gelu().unwrap() } else { want };
            let p = Product { x: &x8, weight: &w8, scales: Some((xu.value(), wu.value())), bias, gelu };
            if gemm::possible(&p).unwrap() {
                close(&what, &gemm::product(&p).unwrap(), &want, 1e-2);
            } else {
                assert!(gelu, "{what}: cuBLASLt has no such product");
            }
            let unit = Unit::of(&most(&want).unwrap()).unwrap();
            match gemm::stored_product(&p, unit.inverse()).unwrap() {
                Some(y) => close(&format!("{what}, e4m3"), &numbers(&y, &unit), &want, bound(Form::Scaled) + 5e-3),
                // Then a pass quantises; what the transformer asks for must be there.
                None => assert!(!(gelu && n > 100), "{what}: cuBLASLt gives no e4m3"),
            }
        }
    }
}
