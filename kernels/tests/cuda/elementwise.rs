//! Kernels on rows of activations.

use batchmax_kernels::activation::{self, Activation};
use batchmax_kernels::kv::KvFormat::{self, Bf16, F16, F32};
use batchmax_kernels::norm;
use batchmax_kernels::rope::{RopeLayout, RopeTable, rope};
use batchmax_kernels::sample;
use batchmax_kernels::threads::Threads;
use half::f16;
use proptest::prelude::*;

use super::gpu::{Arg, Buffer, Gpu, available, bytes_of};
use super::mirror::{decoded, encoded, rows, type_of};
use super::testing::{assert_close, noise};

/// Relative error of a number of a type.
fn step(format: KvFormat) -> f64 {
    match format {
        F32 => 2e-6,
        F16 => 1.0 / 1024.0,
        _ => 1.0 / 128.0,
    }
}

/// Numbers as a type rounds them, and a buffer of them.
fn numbers(gpu: &mut Gpu, format: KvFormat, of: &[f32]) -> (Vec<f32>, Buffer) {
    let bytes = encoded(format, of);
    (decoded(format, &bytes), gpu.inout(&bytes))
}

fn floats(gpu: &Gpu, format: KvFormat, buffer: Buffer) -> Vec<f32> {
    decoded(format, gpu.bytes(buffer))
}

fn exact(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// The angles of positions, as the kernels read them.
pub fn angles(inverse: &[f32], positions: usize, factor: f32) -> Vec<f32> {
    let of = |p: usize, turn: fn(f64) -> f64| {
        inverse.iter().map(move |f| (turn(f64::from(*f) * p as f64) * f64::from(factor)) as f32)
    };
    (0..positions).flat_map(|p| of(p, f64::cos).chain(of(p, f64::sin))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn rms_norms(width in 1usize..200, count in 1usize..4, format in 0usize..3, add: bool) {
        if !available() {
            return Ok(());
        }
        let (format, width) = ([F32, F16, Bf16][format], 8 * width);
        let mut gpu = Gpu::default();
        let (x, input) = numbers(&mut gpu, format, &noise(1, count * width));
        let (before, out) = numbers(&mut gpu, format, &noise(2, count * width));
        let weight = noise(3, width);
        let weights = gpu.input(&weight);
        let arguments = [
            rows(&gpu, input, format, width),
            Arg::At(weights),
            Arg::U32(0),
            Arg::F32(1e-5),
            Arg::U32(add.into()),
            rows(&gpu, out, format, width),
        ];
        let threads = if width > 4096 { 256 } else { 128 };
        let moved = gpu.launch("rms_norm", [count, 1, 1], threads, 64, &arguments);
        let mut expected = vec![0.0; x.len()];
        norm::rms_norm(&Threads::new(1), &x, width, &weight, 1e-5, &mut expected);
        if add {
            expected.iter_mut().zip(&before).for_each(|(y, b)| *y += b);
        }
        assert_close(&floats(&gpu, format, out), &exact(&expected), step(format), "norm");
        let floor = (count * width * format.bytes()) as f64 * if add { 3.0 } else { 2.0 };
        prop_assert_eq!(moved.bytes(), floor + 4.0 * width as f64);
    }

    #[test]
    fn head_norms_and_rotations(
        dim in 0usize..5, heads in 1usize..5, count in 1usize..4, format in 0usize..3, part in 1usize..4, interleaved: bool,
    ) {
        if !available() {
            return Ok(());
        }
        let (format, dim) = ([F32, F16, Bf16][format], [64, 80, 96, 128, 256][dim]);
        let (offset, width) = (16, 16 + heads * dim + 24);
        let threads = Threads::new(1);
        let mut gpu = Gpu::default();
        let (mut x, qkv) = numbers(&mut gpu, format, &noise(7, count * width));
        let weight = noise(3, dim);
        let weights = gpu.input(&weight);
        let lanes = if dim <= 64 { 8 } else if dim <= 128 { 16 } else { 32 };
        let arguments = [
            rows(&gpu, qkv, format, width),
            Arg::U32(count as u32),
            Arg::U32(offset as u32),
            Arg::U32(heads as u32),
            Arg::U32(dim as u32),
            Arg::At(weights),
            Arg::U32(0),
            Arg::F32(1e-6),
        ];
        let grid = (count * heads * lanes).div_ceil(128);
        gpu.launch("qk_norm", [grid, 1, 1], 128, 0, &arguments);
        norm::qk_norm(&threads, &mut x, width, offset, heads, dim, &weight, 1e-6);
        assert_close(&floats(&gpu, format, qkv), &exact(&x), step(format), "qk norm");

        let mut x = floats(&gpu, format, qkv);
        // All channels, half of them, or a number of pairs that is no multiple of eight.
        let pairs = [dim / 2, dim / 4, dim / 2 - 3][part - 1];
        let inverse: Vec<f32> = (0..pairs).map(|i| 0.9f32.powi(i as i32)).collect();
        let positions: Vec<u32> = (0..count as u32).map(|r| r * 37 % 101).collect();
        let (table, at) = (gpu.input(&angles(&inverse, 101, 1.25)), gpu.input(&positions));
        let layout = if interleaved { RopeLayout::Interleaved } else { RopeLayout::Half };
        let arguments = [
            rows(&gpu, qkv, format, width),
            Arg::U32(count as u32),
            Arg::U32(heads as u32),
            Arg::U32(dim as u32),
            Arg::At(at),
            Arg::At(table),
            Arg::U32(pairs as u32),
            Arg::U32(interleaved.into()),
        ];
        let pieces = if pairs % 8 == 0 { pairs / 8 } else { pairs };
        // Pieces of sixteen bytes need heads that begin at a multiple of eight.
        let grid = (count * heads * pieces).div_ceil(256);
        gpu.launch("rope", [grid, 1, 1], 256, 0, &arguments);
        rope(&threads, &mut x, width, heads, dim, &positions, &RopeTable::new(&inverse, 128, 1.25), layout);
        assert_close(&floats(&gpu, format, qkv), &exact(&x), step(format), "rope");
    }

    #[test]
    fn gates_and_caps(ffn in 1usize..60, count in 1usize..4, format in 0usize..3, gelu: bool, odd in 0usize..8) {
        if !available() {
            return Ok(());
        }
        let (format, ffn) = ([F32, F16, Bf16][format], 8 * ffn);
        let mut gpu = Gpu::default();
        let wide: Vec<f32> = noise(5, count * 2 * ffn).iter().map(|x| x * 8.0).collect();
        let (x, input) = numbers(&mut gpu, format, &wide);
        let out = gpu.output(count * ffn * format.bytes());
        let arguments = [
            rows(&gpu, input, format, 2 * ffn),
            Arg::U32(count as u32),
            Arg::U32(gelu.into()),
            rows(&gpu, out, format, ffn),
        ];
        gpu.launch("gated", [(count * ffn / 8).div_ceil(256), 1, 1], 256, 0, &arguments);
        let mut expected = vec![0.0; count * ffn];
        let activation = if gelu { Activation::GeluTanh } else { Activation::Silu };
        activation::gated(&Threads::new(1), &x, ffn, activation, &mut expected);
        assert_close(&floats(&gpu, format, out), &exact(&expected), step(format), "gated");

        let count = x.len() - odd;
        let data = gpu.inout(&encoded(format, &x[..count]));
        let arguments = [
            Arg::At(data),
            Arg::U32(type_of(format)),
            Arg::Bytes(bytes_of(&[count as u64])),
            Arg::F32(5.0),
        ];
        let moved = gpu.launch("softcap", [count.div_ceil(2048), 1, 1], 256, 0, &arguments);
        let capped: Vec<f64> = x[..count].iter().map(|x| 5.0 * (f64::from(*x) / 5.0).tanh()).collect();
        assert_close(&floats(&gpu, format, data), &capped, step(format), "softcap");
        prop_assert_eq!(moved.bytes(), (2 * count * format.bytes()) as f64);
    }
}

#[test]
fn rows_of_tables_and_products_with_codes() {
    if !available() {
        return;
    }
    let (n, k) = (70, 96);
    for (bits, format) in [(0u32, F16), (0, Bf16), (4, F16), (8, Bf16)] {
        let mut gpu = Gpu::default();
        let ids = [69u32, 0, 31, 31];
        let list = gpu.input(&ids);
        let out = gpu.output(ids.len() * k * 4);
        let (table, scale) = (noise(bits.into(), n * k), 1.5);
        let weights: Vec<f32>;
        if bits == 0 {
            let (rounded, at) = numbers(&mut gpu, format, &table);
            weights = rounded;
            let arguments = [
                rows(&gpu, at, format, k),
                Arg::At(list),
                Arg::U32(4),
                Arg::F32(scale),
                rows(&gpu, out, F32, k),
            ];
            gpu.launch("embed", [1, 1, 1], 256, 0, &arguments);
        } else {
            let codes: Vec<u8> =
                (0..n * k * bits as usize / 8).map(|i| (i * 89 + 7) as u8).collect();
            let level = |i: usize| {
                let (scale, least) = (f16::from_f32(0.01 + i as f32 * 1e-4), f16::from_f32(-0.25));
                u32::from(scale.to_bits()) | u32::from(least.to_bits()) << 16
            };
            let levels: Vec<u32> = (0..n * k / 32).map(level).collect();
            weights = (0..n * k)
                .map(|i| {
                    let code = match bits {
                        8 => i32::from(codes[i]),
                        _ => i32::from(codes[i / 2] >> (4 * (i % 2)) & 15),
                    };
                    let half = |bits: u32| f16::from_bits(bits as u16).to_f32();
                    let level = levels[i / 32];
                    code as f32 * half(level) + half(level >> 16)
                })
                .collect();
            let (codes, levels) = (gpu.input(&codes), gpu.input(&levels));
            let arguments = [
                Arg::At(codes),
                Arg::At(levels),
                Arg::U32(bits),
                Arg::At(list),
                Arg::U32(4),
                Arg::F32(scale),
                rows(&gpu, out, F32, k),
            ];
            gpu.launch("embed_codes", [1, 1, 1], 256, 0, &arguments);
            let whole = gpu.output(n * k * format.bytes());
            let arguments = [
                Arg::At(codes),
                Arg::At(levels),
                Arg::U32(bits),
                Arg::U32(n as u32),
                rows(&gpu, whole, format, k),
            ];
            let moved =
                gpu.launch("dequantise", [(n * k / 8).div_ceil(256), 1, 1], 256, 0, &arguments);
            assert_eq!(floats(&gpu, format, whole), decoded(format, &encoded(format, &weights)));
            let floor = n * k * (8 * format.bytes() + bits as usize + 1) / 8;
            assert_eq!(moved.bytes(), floor as f64);
            let m = 6;
            let (x, input) = numbers(&mut gpu, format, &noise(9, m * k));
            let (bias, before) = (noise(4, n), noise(8, m * n));
            let (biases, y) = (gpu.input(&bias), gpu.inout(&before));
            let arguments = [
                rows(&gpu, input, format, k),
                Arg::U32(m as u32),
                Arg::At(codes),
                Arg::At(levels),
                Arg::U32(bits),
                Arg::U32(n as u32),
                Arg::At(biases),
                Arg::U32(1),
                rows(&gpu, y, F32, n),
            ];
            gpu.launch("gemv_codes", [n.div_ceil(8), m.div_ceil(4), 1], 256, 0, &arguments);
            let mut exact = batchmax_kernels::reference::gemm(&x, &weights, k, Some(&bias));
            exact.iter_mut().zip(&before).for_each(|(sum, y)| *sum += f64::from(*y));
            assert_close(&gpu.read::<f32>(y), &exact, 1e-5, "gemv");
        }
        let expected: Vec<f64> = (ids.iter())
            .flat_map(|id| weights[*id as usize * k..][..k].iter().map(|x| f64::from(x * scale)))
            .collect();
        assert_close(&gpu.read::<f32>(out), &expected, 1e-6, "embed");
    }
}

fn argmax(rows_of: &[Vec<f32>]) -> (Vec<u32>, Vec<f32>) {
    let width = rows_of[0].len();
    let mut gpu = Gpu::default();
    let logits = gpu.input(&rows_of.concat());
    let (ids, gaps) = (gpu.output(4 * rows_of.len()), gpu.output(4 * rows_of.len()));
    let arguments = [rows(&gpu, logits, F32, width), Arg::At(ids), Arg::At(gaps)];
    gpu.launch("argmax", [rows_of.len(), 1, 1], 1024, 384, &arguments);
    (gpu.read(ids), gpu.read(gaps))
}

#[test]
fn the_largest_logit_and_its_gap() {
    if !available() {
        return;
    }
    for width in [1, 7, 1000, 9001] {
        let mut all: Vec<Vec<f32>> = (0..3).map(|i| noise(i, width)).collect();
        if width > 8 {
            // Equal ones far apart, no numbers, and nothing else.
            (all[0][5], all[0][width - 2]) = (9.0, 9.0);
            (all[1][0], all[1][700]) = (f32::NAN, f32::NAN);
            all[2].fill(f32::NEG_INFINITY);
        }
        let (ids, gaps) = argmax(&all);
        for (i, row) in all.iter().enumerate() {
            let (id, gap) = sample::argmax(row);
            assert!(
                ids[i] == id && (gaps[i] == gap || gap.is_nan() && gaps[i].is_nan()),
                "{width}, {i}"
            );
        }
    }
}

fn draw(logits: &[f32], temperature: f32, share: f32, uniform: &[f32]) -> Vec<u32> {
    let mut gpu = Gpu::default();
    let data = gpu.input(&vec![logits; uniform.len()].concat());
    let (luck, ids) = (gpu.input(uniform), gpu.output(4 * uniform.len()));
    let arguments = [
        rows(&gpu, data, F32, logits.len()),
        Arg::F32(temperature),
        Arg::F32(share),
        Arg::At(luck),
        Arg::At(ids),
    ];
    gpu.launch("top_p", [uniform.len(), 1, 1], 64, 8 * 64 + 512, &arguments);
    gpu.read(ids)
}

#[test]
fn draws_are_of_the_smallest_set_and_follow_its_weights() {
    if !available() {
        return;
    }
    // Probabilities 0.1, 0.2, 0.3, 0.4.
    let logits: Vec<f32> = [1.0f32, 2.0, 3.0, 4.0].iter().map(|p| p.ln()).collect();
    let even = [0.0, 0.2, 0.5, 0.99, 1.0];
    assert_eq!(draw(&logits, 1.0, 1.0, &even), [0, 1, 2, 3, 3]);
    // 0.7 is reached by the two likeliest: 3/7 and 4/7.
    assert_eq!(draw(&logits, 1.0, 0.69, &[0.0, 0.42, 0.43, 1.0]), [2, 2, 3, 3]);
    assert_eq!(draw(&logits, 1.0, 0.0, &[0.0, 0.9]), [3, 3]);
    assert_eq!(draw(&logits, 0.01, 1.0, &[0.01, 0.9]), [3, 3]);
    // Of ten equal ones the first three make 0.3.
    assert_eq!(draw(&[2.0; 10], 1.0, 0.29, &[0.0, 0.34, 0.67, 1.0]), [0, 1, 2, 2]);
    // As often as the CPU's kernel: both sets are the same, so are the counts of an even grid of draws.
    let logits: Vec<f32> = noise(5, 300).iter().map(|x| 4.0 * x).collect();
    let grid: Vec<f32> = (0..60).map(|i| (i as f32 + 0.5) / 60.0).collect();
    for (temperature, share) in [(1.0, 1.0), (0.7, 0.8), (2.0, 0.95)] {
        let count = |ids: &[u32]| {
            let mut counts = vec![0i32; 300];
            ids.iter().for_each(|id| counts[*id as usize] += 1);
            counts
        };
        let found = count(&draw(&logits, temperature, share, &grid));
        let on_cpu: Vec<u32> =
            grid.iter().map(|u| sample::top_p(&logits, temperature, share, *u)).collect();
        for (a, b) in found.iter().zip(count(&on_cpu)) {
            assert!((a - b).abs() <= 2, "{a} for {b}");
        }
    }
}

#[test]
fn biases_stand_in_every_row_or_are_added() {
    if !available() {
        return;
    }
    for (format, add) in [(F32, false), (F16, true), (Bf16, false), (Bf16, true)] {
        let (count, n, width) = (5, 70, 80);
        let mut gpu = Gpu::default();
        let (before, y) = numbers(&mut gpu, format, &noise(1, count * width));
        let bias = noise(2, n);
        let bias_at = gpu.input(&bias);
        let arguments = [
            rows(&gpu, y, format, width),
            Arg::U32(count as u32),
            Arg::U32(n as u32),
            Arg::At(bias_at),
            Arg::U32(add.into()),
        ];
        let grid = [(count * n).div_ceil(256), 1, 1];
        let moved = gpu.launch("bias_rows", grid, 256, 0, &arguments);
        let mut expected = before;
        for row in expected.chunks_mut(width) {
            for (y, b) in row.iter_mut().zip(&bias) {
                *y = if add { *y + b } else { *b };
            }
        }
        assert!(floats(&gpu, format, y) == decoded(format, &encoded(format, &expected)));
        let passes = if add { 2 } else { 1 };
        assert_eq!(moved.bytes(), (passes * count * n * format.bytes() + 4 * n) as f64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    /// Each row by its own largest number; 448 steps of it at most are what a byte holds.
    #[test]
    fn rows_become_bytes_with_a_scale(width in 1usize..400, count in 1usize..4, format in 0usize..3) {
        if !available() {
            return Ok(());
        }
        let (format, width) = ([F32, F16, Bf16][format], 16 * width);
        let mut gpu = Gpu::default();
        let mut values = noise(1, count * width);
        values[..width].fill(0.0);
        let (x, input) = numbers(&mut gpu, format, &values);
        let (out, scales) = (gpu.output(count * width), gpu.output(4 * count));
        let threads = if width > 4096 { 256 } else { 128 };
        let arguments = [rows(&gpu, input, format, width), Arg::At(out), Arg::At(scales)];
        let moved = gpu.launch("narrow_rows", [count, 1, 1], threads, 64, &arguments);
        let (bytes, scales) = (decoded(KvFormat::Fp8, gpu.bytes(out)), floats(&gpu, F32, scales));
        for ((x, bytes), scale) in x.chunks(width).zip(bytes.chunks(width)).zip(&scales) {
            let most = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            prop_assert_eq!(*scale, most / 448.0);
            let by = if most > 0.0 { 448.0 / most } else { 0.0 };
            let expected: Vec<f32> = x.iter().map(|x| x * by).collect();
            prop_assert_eq!(bytes, &decoded(KvFormat::Fp8, &encoded(KvFormat::Fp8, &expected))[..]);
        }
        // Rows that are longer than what registers hold are read again.
        if width <= 4 * 8 * threads {
            let each = format.bytes() + 1;
            prop_assert_eq!(moved.bytes(), (count * (width * each + 4)) as f64);
        }
    }

    #[test]
    fn sums_get_their_scales(
        columns in 1usize..30,
        count in 1usize..6,
        format in 0usize..3,
        biased: bool,
        add: bool,
    ) {
        if !available() {
            return Ok(());
        }
        let (format, n, width) = ([F32, F16, Bf16][format], 16 * columns, 16 * columns + 8);
        let mut gpu = Gpu::default();
        let (sums, scales) = (noise(1, count * n), noise(2, count));
        let (of_columns, bias) = (noise(3, n), noise(4, n));
        let (before, y) = numbers(&mut gpu, format, &noise(5, count * width));
        let [sums_at, scales_at, columns_at, bias_at] =
            [&sums, &scales, &of_columns, &bias].map(|of| gpu.input(of));
        let arguments = [
            Arg::At(sums_at),
            Arg::At(scales_at),
            Arg::At(columns_at),
            Arg::U32(count as u32),
            Arg::U32(n as u32),
            if biased { Arg::At(bias_at) } else { Arg::Null },
            Arg::U32(add.into()),
            rows(&gpu, y, format, width),
        ];
        let grid = [(count * n / 8).div_ceil(256), 1, 1];
        let moved = gpu.launch("scale_rows", grid, 256, 0, &arguments);
        let found = floats(&gpu, format, y);
        let mut expected = exact(&before);
        for (r, row) in expected.chunks_mut(width).enumerate() {
            for (c, y) in row[..n].iter_mut().enumerate() {
                let sum = f64::from(sums[r * n + c]) * f64::from(scales[r]) * f64::from(of_columns[c]);
                let bias = if biased { f64::from(bias[c]) } else { 0.0 };
                *y = if add { *y } else { 0.0 } + sum + bias;
            }
        }
        assert_close(&found, &expected, step(format), "scaled");
        let passes = if add { 2 } else { 1 };
        let bytes = count * n * (4 + passes * format.bytes()) + 4 * (count + n * (1 + usize::from(biased)));
        prop_assert_eq!(moved.bytes(), bytes as f64);
    }
}
