//! Appending, and attention over what was appended, of random shapes.

use batchmax_kernels::attend::AttendShape;
use batchmax_kernels::kv::KvFormat::{Bf16, F16, F32, Fp8};
use proptest::prelude::*;

use super::decode;
use super::gpu::{Arg, Gpu};
use super::mirror::{Mirror, Room, items, rows};
use super::shim::{Moved, available};
use super::testing::Layer;

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
