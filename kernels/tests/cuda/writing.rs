//! Appending, and attention over what was appended, of random shapes.

use batchmax_kernels::attend::AttendShape;
use batchmax_kernels::kv::KvFormat::{Bf16, F16, F32, Fp8};
use proptest::prelude::*;

use super::decode;
use super::gpu::{Arg, Gpu, available};
use super::mirror::{Mirror, Room, items, rows};
use super::testing::Layer;
use batchmax_kernels::cuda::emulated::shim::Moved;

/// Appends the layer's last step to a mirror of what was before.
pub fn append(gpu: &mut Gpu, mirror: &Mirror, layer: &Layer) -> Moved {
    let (list, qkv) = (gpu.input(&items(layer)), gpu.input(&layer.qkv));
    let stride = Arg::U32(0);
    let kv_heads = layer.shape.kv_heads;
    let arguments = [Arg::At(mirror.heads), Arg::At(list), Arg::U32(kv_heads as u32), stride];
    gpu.launch("advance_heads", [layer.caches.len(), 1, 1], 32, 0, &arguments);
    let mut positions = Vec::new();
    for ((_, rows), seen) in layer.step.iter().zip(&layer.seen) {
        positions.extend(seen - *rows as u32..*seen);
    }
    let positions = gpu.input(&positions);
    let dim = layer.shape.head_dim;
    let key = layer.shape.heads * dim;
    let arguments = [
        mirror.kv(gpu),
        Arg::At(list),
        rows(gpu, qkv, F32, layer.width),
        Arg::U32(key as u32),
        Arg::U32((key + kv_heads * dim) as u32),
        Arg::At(positions),
    ];
    let most = layer.step.iter().map(|s| s.1).max().unwrap_or(0);
    let grid = [(most * kv_heads * 2 * dim / 8).div_ceil(256).max(1), layer.caches.len(), 1];
    gpu.launch("append", grid, 256, 0, &arguments)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    #[test]
    fn what_is_appended_is_attended_to(
        dim in 0usize..6,
        kv_heads in 1usize..4,
        group in 1usize..17,
        format in 0usize..3,
        before in proptest::collection::vec(0usize..90, 1..4),
        keep in 0usize..60,
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
        // Positions with gaps.
        layer.thin(5, &vec![keep; before.len()]);
        let mut gpu = Gpu::default();
        let room = Room { tokens: 140, ..Room::default() };
        let mirror = Mirror::new(&mut gpu, &layer, room);
        layer.feed(4, &vec![1; before.len()]);
        let moved = append(&mut gpu, &mirror, &layer);
        mirror.assert_same(&gpu, &layer, "appended");
        let numbers = before.len() * 2 * kv_heads * dim;
        let floor = numbers as f64 * (4 + layer.pool.format().bytes()) as f64;
        prop_assert!(moved.bytes() >= floor && moved.bytes() < 1.2 * floor + 64.0 * numbers as f64 / dim as f64);
        let found = decode::run(&mut gpu, &mirror, &layer, None);
        decode::check(&layer, &found, 4e-6, "random");
    }
}

#[test]
fn rows_go_out_and_come_back() {
    if !available() {
        return;
    }
    for (format, dim) in [(F16, 80), (Fp8, 64)] {
        let shape = AttendShape { head_dim: dim, ..super::ranking::SHAPE };
        let mut layer = Layer::new(2, shape, format);
        layer.feed(3, &[40, 5]);
        layer.feed(4, &[7, 33]);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let bytes = layer.pool.token_bytes();
        let (list, from) = (gpu.input(&items(&layer)), gpu.input(&[0u32, 7, 14, 47]));
        let rows = gpu.output(80 * bytes);
        let arguments = [mirror.kv(&gpu), Arg::At(list), Arg::At(from), Arg::At(rows)];
        let grid = [(33 * bytes / 8).div_ceil(256), 2, 2];
        let moved = gpu.launch("rows_out", grid, 256, 0, &arguments);
        assert!(moved.bytes() < 1.2 * (2 * 80 * bytes) as f64);
        let mut expected = Vec::new();
        for (heads, (_, count)) in layer.caches.iter().zip(&layer.step) {
            for head in heads {
                let tokens = head.tokens() - count..head.tokens();
                for token in tokens {
                    for row in [head.key(&layer.pool, token), head.value(&layer.pool, token)] {
                        expected.extend(super::mirror::encoded(format, &row));
                    }
                }
            }
        }
        assert!(gpu.bytes(rows) == expected);
        // Into caches of that many tokens.
        let back = Mirror::new(
            &mut gpu,
            &Layer::new(2, shape, format),
            Room { tokens: 33, ..Room::default() },
        );
        let mut heads = back.all_heads(&gpu);
        heads.iter_mut().zip([7, 7, 33, 33]).for_each(|(head, tokens)| head.tokens = tokens);
        back.put_heads(&gpu, &heads);
        let positions = gpu.input(&(100..180).collect::<Vec<u32>>());
        let arguments =
            [back.kv(&gpu), Arg::At(list), Arg::At(from), Arg::At(rows), Arg::At(positions)];
        gpu.launch("rows_in", grid, 256, 0, &arguments);
        let found: Vec<u32> = gpu.read(back.positions);
        for (h, cache) in layer.caches.iter().flatten().enumerate() {
            let count = heads[h].tokens as usize;
            let first = [100, 107, 114, 147][h];
            let wanted: Vec<u32> = (first..).take(count).collect();
            assert_eq!(found[h * back.stride..][..count], wanted);
            for token in 0..count {
                let at = cache.tokens() - count + token;
                assert_eq!(back.key(&gpu, h, token), cache.key(&layer.pool, at));
                assert_eq!(back.value(&gpu, h, token), cache.value(&layer.pool, at));
            }
        }
    }
}

#[test]
fn sums_of_a_partial_cache_go_where_its_tokens_stand() {
    if !available() {
        return;
    }
    let mut layer = Layer::new(1, super::ranking::SHAPE, F16);
    layer.feed(3, &[40]);
    let mut gpu = Gpu::default();
    let mirror = Mirror::new(&mut gpu, &layer, Room::default());
    let part = Mirror::new(&mut gpu, &layer, Room { tokens: 100, ..Room::default() });
    let (list, counts) = (gpu.input(&[5u32, 9, 30, 1, 2, 39]), gpu.input(&[3u32, 2]));
    let numbers: Vec<f32> = (0..2 * part.stride).map(|i| i as f32).collect();
    let (from, sums) = (gpu.input(&numbers), gpu.inout(&vec![-1.0f32; 2 * mirror.stride]));
    let sequences = gpu.input(&items(&layer));
    let arguments = [
        mirror.kv(&gpu),
        part.kv(&gpu),
        Arg::At(sequences),
        Arg::At(list),
        Arg::U32(3),
        Arg::At(counts),
        Arg::At(from),
        Arg::At(sums),
    ];
    gpu.launch("rank_put", [1, 2, 1], 256, 0, &arguments);
    let mut expected = vec![-1.0f32; 2 * mirror.stride];
    (expected[5], expected[9], expected[30]) = (0.0, 1.0, 2.0);
    (expected[mirror.stride + 1], expected[mirror.stride + 2]) =
        (part.stride as f32, part.stride as f32 + 1.0);
    assert_eq!(gpu.read::<f32>(sums), expected);
}

#[test]
fn chunks_are_appended_across_blocks() {
    if !available() {
        return;
    }
    for format in [F16, Bf16, Fp8] {
        let case = &super::cases::of("attend-decode")[0];
        let mut layer = Layer::new(3, decode::shape_of(case), format);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room { tokens: 128, ..Room::default() });
        for step in [[33, 0, 1], [1, 40, 31], [60, 1, 33]] {
            layer.feed(9, &step);
            append(&mut gpu, &mirror, &layer);
            mirror.assert_same(&gpu, &layer, "chunks");
        }
    }
}
