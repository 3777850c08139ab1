//! Attention of chunks of prompts.

use batchmax_kernels::attend::{AttendItem, AttendShape, attend_prefill, join};
use batchmax_kernels::kv::KvFormat::{self, Bf16, F16, F32, Fp8};
use batchmax_kernels::kv::{Codec, KeyAxis};
use batchmax_kernels::reference;
use proptest::prelude::*;

use super::gpu::{Arg, Gpu, available};
use super::mirror::{Mirror, Room, decoded, encoded, items, rows};
use super::testing::{Layer, assert_close, noise};

/// Outputs and logarithms of denominators; `at`: positions of rows that stand anywhere.
pub fn run(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    at: Option<&[u32]>,
) -> (Vec<f32>, Vec<f32>) {
    run_as(gpu, mirror, layer, at, None)
}

/// The same, on tensor cores if they have a type.
fn run_as(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    at: Option<&[u32]>,
    tensor: Option<KvFormat>,
) -> (Vec<f32>, Vec<f32>) {
    let shape = layer.shape;
    let (count, dim) = (layer.rows(), shape.head_dim);
    let (qkv, list) = (gpu.input(&layer.qkv), gpu.input(&items(layer)));
    let (out, lse) =
        (gpu.output(count * shape.heads * dim * 4), gpu.output(count * shape.heads * 4));
    let at = at.map_or(Arg::Null, |at| Arg::At(gpu.input(at)));
    let arguments = [
        mirror.kv(gpu),
        Arg::At(list),
        rows(gpu, qkv, F32, layer.width),
        Arg::U32(shape.heads as u32),
        Arg::F32(shape.scale),
        Arg::F32(shape.softcap.unwrap_or(0.0)),
        Arg::U32(shape.window.unwrap_or(0)),
        at,
        rows(gpu, out, F32, shape.heads * dim),
        Arg::At(lse),
    ];
    let most = layer.step.iter().map(|s| s.1).max().unwrap_or(0);
    let (queries, shared, name) = match tensor {
        None => (32, 4 * (64 * (dim + 4) + 32 * 33 + 96), "attend_prefill".to_owned()),
        Some(format) => {
            let name = if format == F16 { "f16" } else { "bf16" };
            (64, 2 * 128 * (dim + 8) + 512, format!("attend_prefill_{name}_{dim}"))
        }
    };
    let tiles = (most * shape.group()).div_ceil(queries).max(1);
    let grid = [tiles, shape.kv_heads, layer.caches.len()];
    gpu.launch(&name, grid, 128, shared, &arguments);
    (gpu.read(out), gpu.read(lse))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn chunks_over_what_was_kept_by_the_definition(
        dim in 0usize..6,
        kv_heads in 1usize..3,
        group in 1usize..10,
        format in 0usize..3,
        before in proptest::collection::vec(0usize..70, 1..3),
        chunk in 1usize..40,
        keep in 0usize..50,
        window in 0u32..60,
        cap: bool,
    ) {
        if !available() {
            return Ok(());
        }
        let dim = [64, 80, 96, 128, 256, 16][dim];
        let shape = AttendShape {
            heads: kv_heads * group,
            kv_heads,
            head_dim: dim,
            scale: 1.0 / (dim as f32).sqrt(),
            softcap: cap.then_some(3.0),
            window: (window > 0).then_some(window),
        };
        let mut layer = Layer::new(before.len(), shape, [F16, Bf16, Fp8][format]);
        layer.feed(3, &before);
        layer.thin(5, &vec![keep; before.len()]);
        let mut steps = vec![chunk; before.len()];
        steps[0] = chunk / 2 + 1;
        layer.feed(4, &steps);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (out, lse) = run(&mut gpu, &mirror, &layer, None);
        let (mut exact, mut exact_lse) = (Vec::new(), Vec::new());
        for item in layer.items() {
            let (out, lse) = reference::attend(&layer.pool, &item, &shape, &layer.qkv, layer.width);
            exact.extend(out);
            exact_lse.extend(lse);
        }
        assert_close(&out, &exact, 5e-6, "chunks");
        assert_close(&lse, &exact_lse, 5e-6, "chunks: lse");
    }

    #[test]
    fn chunks_on_tensor_cores_by_the_definition(
        dim in 0usize..5,
        kv_heads in 1usize..3,
        group in 1usize..10,
        format in 0usize..3,
        brain: bool,
        before in proptest::collection::vec(0usize..70, 1..3),
        chunk in 1usize..40,
        keep in 0usize..50,
        window in 0u32..60,
        cap: bool,
        packed: bool,
    ) {
        if !available() {
            return Ok(());
        }
        let dim = [64, 80, 96, 128, 256][dim];
        let shape = AttendShape {
            heads: kv_heads * group,
            kv_heads,
            head_dim: dim,
            scale: 1.0 / (dim as f32).sqrt(),
            softcap: cap.then_some(3.0),
            window: (window > 0).then_some(window),
        };
        let mut layer = Layer::new(before.len(), shape, [F16, Bf16, Fp8][format]);
        layer.feed(3, &before);
        layer.thin(5, &vec![keep; before.len()]);
        layer.feed(4, &vec![chunk; before.len()]);
        let tensor = if brain { Bf16 } else { F16 };
        layer.qkv = decoded(tensor, &encoded(tensor, &layer.qkv));
        let codec = Codec { bits: 4, group: 32, key_axis: KeyAxis::Channel };
        let mut gpu = Gpu::default();
        let room = Room { codec: packed.then_some(codec), ..Room::default() };
        let mirror = Mirror::new(&mut gpu, &layer, room);
        if packed {
            let counts = |tokens: usize| (tokens / 32 * 32, tokens / 2);
            super::packing::both(&mut gpu, &mirror, &mut layer, codec, counts);
        }
        let (out, lse) = run_as(&mut gpu, &mirror, &layer, None, Some(tensor));
        let (mut exact, mut exact_lse) = (Vec::new(), Vec::new());
        for item in layer.items() {
            let (out, lse) = reference::attend(&layer.pool, &item, &shape, &layer.qkv, layer.width);
            exact.extend(out);
            exact_lse.extend(lse);
        }
        // Weights have 11 or 8 bits, and so have keys and values of other forms.
        let tolerance = if brain { 3e-2 } else { 4e-3 };
        assert_close(&out, &exact, tolerance, "chunks");
        assert_close(&lse, &exact_lse, tolerance, "chunks: lse");
    }
}

fn layer(rows: &[usize], shape: AttendShape) -> Layer {
    let mut layer = Layer::new(rows.len(), shape, F16);
    layer.feed(8, rows);
    layer
}

const SHAPE: AttendShape =
    AttendShape { heads: 6, kv_heads: 2, head_dim: 64, scale: 0.125, softcap: None, window: None };

#[test]
fn rows_that_stand_anywhere_see_what_is_before_them() {
    if !available() {
        return;
    }
    let mut layer = layer(&[80, 45], SHAPE);
    // Some of the rows go on, with the last of them.
    let at: Vec<u32> = [[3, 10, 31, 32, 60, 79], [0, 1, 20, 33, 40, 44]].concat();
    let width = layer.width;
    let mut qkv = Vec::new();
    for (i, (first, _)) in layer.step.clone().into_iter().enumerate() {
        for p in &at[6 * i..6 * i + 6] {
            let row = first + *p as usize;
            qkv.extend_from_slice(&layer.qkv[row * width..(row + 1) * width]);
        }
        layer.step[i] = (6 * i, 6);
    }
    layer.qkv = qkv;
    for window in [None, Some(17)] {
        layer.shape.window = window;
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (out, _) = run(&mut gpu, &mirror, &layer, Some(&at));
        let on_cpu: Vec<AttendItem<'_>> = (layer.caches.iter().enumerate())
            .map(|(i, heads)| AttendItem {
                heads,
                first_row: 6 * i,
                rows: 6,
                at: Some(&at[6 * i..6 * i + 6]),
            })
            .collect();
        let mut expected = vec![0.0; out.len()];
        let (threads, pool) = (&layer.threads, &layer.pool);
        attend_prefill(
            threads,
            pool,
            &on_cpu,
            &layer.shape,
            &layer.qkv,
            width,
            &mut expected,
            None,
        );
        let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
        assert_close(&out, &expected, 1e-5, "rows anywhere");
    }
}

#[test]
fn chunks_of_a_prompt_give_its_bits() {
    if !available() {
        return;
    }
    for tensor in [None, Some(F16), Some(Bf16)] {
        let one = |layer: &Layer| {
            let mut gpu = Gpu::default();
            let mirror = Mirror::new(&mut gpu, layer, Room::default());
            run_as(&mut gpu, &mirror, layer, None, tensor).0
        };
        let whole = one(&layer(&[75], SHAPE));
        let (mut cut, mut layer) = (Vec::new(), Layer::new(1, SHAPE, F16));
        for rows in [31, 1, 43] {
            layer.feed(8, &[rows]);
            cut.extend(one(&layer));
        }
        assert!(whole == cut, "{tensor:?}");
    }
}

#[test]
fn outputs_over_different_keys_are_joined() {
    if !available() {
        return;
    }
    let (rows_of, heads, dim) = (3, 4, 80);
    let numbers = |seed| (noise(seed, rows_of * heads * dim), noise(seed + 1, rows_of * heads));
    let ((mut a, mut a_lse), (b, mut b_lse)) = (numbers(1), numbers(5));
    (a_lse[0], b_lse[3], a_lse[5], b_lse[5]) =
        (f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY);
    let mut gpu = Gpu::default();
    let (out, lse) = (gpu.inout(&a), gpu.inout(&a_lse));
    let (other, other_lse) = (gpu.input(&b), gpu.input(&b_lse));
    let arguments = [
        rows(&gpu, out, F32, heads * dim),
        Arg::At(lse),
        rows(&gpu, other, F32, heads * dim),
        Arg::At(other_lse),
        Arg::U32(dim as u32),
    ];
    gpu.launch("attend_merge", [heads, rows_of, 1], 32, 0, &arguments);
    join(&mut a, &mut a_lse, &b, &b_lse, dim);
    let exact = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    assert_close(&gpu.read::<f32>(out), &exact(&a), 1e-6, "merged");
    assert_close(&gpu.read::<f32>(lse), &exact(&a_lse), 1e-6, "merged lse");
}
