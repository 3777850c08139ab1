//! Scores of cached tokens, and tallies.

use batchmax_kernels::attend::{AttendShape, attend_prefill};
use batchmax_kernels::kv::KvFormat::{self, Bf16, F16, F32, Fp8};
use batchmax_kernels::rank::{Pooling, RankItem, Scorer, TallyItem, rank, tally};

use super::gpu::{Arg, Buffer, Gpu, available};
use super::mirror::{Head, Mirror, Room, items, rows};
use super::testing::{Layer, assert_close};
use batchmax_kernels::cuda::emulated::shim::Moved;

/// A layer in the middle of a run: heads with gaps of their own, and a step's rows.
pub fn layer_in_use(shape: AttendShape, format: KvFormat, step: &[usize]) -> Layer {
    let mut layer = Layer::new(3, shape, format);
    layer.feed(3, &[100, 40, 0]);
    layer.thin(9, &[50, 37, 0]);
    layer.feed(4, step);
    layer
}

pub const SHAPE: AttendShape =
    AttendShape { heads: 6, kv_heads: 2, head_dim: 64, scale: 0.3, softcap: None, window: None };

/// The logarithms of the denominators of a step.
pub fn lse_of(layer: &Layer) -> Vec<f32> {
    let mut out = vec![0.0; layer.rows() * layer.shape.heads * layer.shape.head_dim];
    let mut lse = vec![0.0; layer.rows() * layer.shape.heads];
    attend_prefill(
        &layer.threads,
        &layer.pool,
        &layer.items(),
        &layer.shape,
        &layer.qkv,
        layer.width,
        &mut out,
        Some(&mut lse),
    );
    lse
}

/// The CPU's scores.
pub fn on_cpu(layer: &mut Layer, scorer: Scorer) -> Vec<Vec<f32>> {
    let lse = lse_of(layer);
    let mut list: Vec<RankItem<'_>> = (layer.caches.iter_mut().zip(&layer.step).zip(&layer.seen))
        .map(|((heads, step), seen)| RankItem {
            heads,
            first_row: step.0,
            rows: step.1,
            seen: *seen,
        })
        .collect();
    let mut scores = Vec::new();
    let (threads, pool, shape) = (&layer.threads, &layer.pool, &layer.shape);
    rank(threads, pool, &mut list, scorer, shape, &layer.qkv, layer.width, &lse, &mut scores);
    scores
}

/// As `Counted` of `cuda/rank/mass.cu`: last rows, tokens whose sums begin at zero, weight.
type Counted = (u32, u32, f32);

/// Adds attention to `sums`.
pub fn mass(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    counted: &[Counted],
    sums: Buffer,
    plane: usize,
) -> Moved {
    let (shape, dim) = (layer.shape, layer.shape.head_dim);
    let lse = gpu.input(&lse_of(layer));
    let (qkv, list) = (gpu.input(&layer.qkv), gpu.input(&items(layer)));
    let words: Vec<u32> = counted
        .iter()
        .flat_map(|(last, fresh, weight)| [*last, *fresh, weight.to_bits(), 0])
        .collect();
    let counted = gpu.input(&words);
    let most = mirror.all_heads(gpu).iter().map(|h| h.tokens as usize).max().unwrap_or(0);
    let arguments = [
        mirror.kv(gpu),
        Arg::At(list),
        Arg::At(counted),
        rows(gpu, qkv, F32, layer.width),
        Arg::U32(shape.heads as u32),
        Arg::F32(shape.scale),
        Arg::F32(shape.softcap.unwrap_or(0.0)),
        Arg::U32(shape.window.unwrap_or(0)),
        Arg::At(lse),
        Arg::At(sums),
        Arg::Bytes((plane as u64).to_ne_bytes().to_vec()),
    ];
    let grid = [most.div_ceil(32), shape.kv_heads, layer.caches.len()];
    gpu.launch("mass", grid, 128, 4 * (64 * (dim + 4) + 32 * 33 + 96), &arguments)
}

/// Runs a kernel that gives every token a score.
pub fn scores(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    kernel: &str,
    more: Vec<Arg>,
) -> Vec<Vec<f32>> {
    scored(gpu, mirror, layer, kernel, more).1
}

/// The same, and what it moved.
pub fn scored(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    kernel: &str,
    more: Vec<Arg>,
) -> (Moved, Vec<Vec<f32>>) {
    let heads = mirror.all_heads(gpu);
    let out = gpu.output(heads.len() * mirror.stride * 4);
    let list = gpu.input(&items(layer));
    let most = heads.iter().map(|h| h.tokens as usize).max().unwrap_or(0);
    let mut arguments = vec![mirror.kv(gpu), Arg::At(list)];
    arguments.extend(more);
    arguments.push(Arg::At(out));
    let lanes = if mirror.dim <= 64 {
        8
    } else if mirror.dim <= 128 {
        16
    } else {
        32
    };
    let (per_block, block) = match kernel {
        "rank_norms" | "rank_differences" => (128 / lanes, 128),
        _ => (256, 256),
    };
    let grid = [most.div_ceil(per_block), mirror.kv_heads, layer.caches.len()];
    let moved = gpu.launch(kernel, grid, block, 0, &arguments);
    let all: Vec<f32> = gpu.read(out);
    let of = |head: &Head| all[head.meta as usize..][..head.tokens as usize].to_vec();
    (moved, heads.iter().map(of).collect())
}

pub fn assert_scores(found: &[Vec<f32>], expected: &[Vec<f32>], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len());
    for (h, (found, expected)) in found.iter().zip(expected).enumerate() {
        let exact: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
        assert_close(found, &exact, tolerance, &format!("{what}: head {h}"));
    }
}

#[test]
fn by_position_chance_and_keys() {
    if !available() {
        return;
    }
    for (dim, format) in [(64, F16), (80, Bf16), (128, Fp8), (256, F16)] {
        let shape = AttendShape { head_dim: dim, ..SHAPE };
        let mut layer = layer_in_use(shape, format, &[3, 1, 40]);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let found = scores(&mut gpu, &mirror, &layer, "rank_recency", vec![]);
        assert_scores(&found, &on_cpu(&mut layer, Scorer::Recency), 0.0, "recency");
        let chance = vec![Arg::U32(7), Arg::U32(3)];
        let found = scores(&mut gpu, &mirror, &layer, "rank_chance", chance);
        let scorer = Scorer::Random { seed: 7, layer: 3 };
        assert_scores(&found, &on_cpu(&mut layer, scorer), 0.0, "chance");
        let found = scores(&mut gpu, &mirror, &layer, "rank_norms", vec![]);
        assert_scores(&found, &on_cpu(&mut layer, Scorer::KeyNorm), 1e-6, "norms");
        let (part, parts) = (32, 3);
        let partial = gpu.output(6 * parts * dim * 4);
        let list = gpu.input(&items(&layer));
        let arguments = [mirror.kv(&gpu), Arg::At(list), Arg::U32(part), Arg::At(partial)];
        gpu.launch("key_directions", [parts, 2, 3], 128, 4096, &arguments);
        let more = vec![Arg::U32(part), Arg::U32(parts as u32), Arg::At(partial)];
        let found = scores(&mut gpu, &mirror, &layer, "rank_differences", more);
        assert_scores(&found, &on_cpu(&mut layer, Scorer::KeyDiff), 3e-6, "differences");
    }
}

#[test]
fn by_the_attention_of_a_window() {
    if !available() {
        return;
    }
    for (pooling, exclude_window, pool) in
        [(Pooling::Mean, true, 5), (Pooling::Max, false, 7), (Pooling::Mean, false, 4)]
    {
        let window = 8;
        let scorer = Scorer::WindowAttention { window, pool, pooling, exclude_window };
        let mut layer = layer_in_use(SHAPE, F16, &[20, 3, 40]);
        let mut gpu = Gpu::default();
        let room = Room { tokens: 96, ..Room::default() };
        let mirror = Mirror::new(&mut gpu, &layer, room.clone());
        let sums = gpu.output(6 * mirror.stride * 4);
        let weight = |rows: u32| 1.0 / (3 * rows) as f32;
        let counted: Vec<Counted> =
            [8, 3, 8].iter().map(|last| (*last, u32::MAX, weight(*last))).collect();
        mass(&mut gpu, &mirror, &layer, &counted, sums, 0);
        let more = || {
            let exclude = if exclude_window { window } else { 0 };
            let largest = u32::from(pooling == Pooling::Max);
            vec![Arg::At(sums), Arg::U32(exclude), Arg::U32(pool), Arg::U32(largest)]
        };
        let found = scores(&mut gpu, &mirror, &layer, "rank_window", more());
        assert_scores(&found, &on_cpu(&mut layer, scorer), 1e-5, "window of a prompt");
        // A step of one row adds to what is there.
        layer.feed(5, &[1, 1, 1]);
        let numbers: Vec<f32> = gpu.read(sums);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, room);
        let sums = gpu.inout(&numbers);
        mass(&mut gpu, &mirror, &layer, &[(1, 1, weight(8)); 3], sums, 0);
        let exclude = if exclude_window { window } else { 0 };
        let largest = u32::from(pooling == Pooling::Max);
        let more = vec![Arg::At(sums), Arg::U32(exclude), Arg::U32(pool), Arg::U32(largest)];
        let found = scores(&mut gpu, &mirror, &layer, "rank_window", more);
        assert_scores(&found, &on_cpu(&mut layer, scorer), 1e-5, "window of a step");
    }
}

#[test]
fn by_the_attention_of_the_last_row() {
    if !available() {
        return;
    }
    for shape in [SHAPE, AttendShape { softcap: Some(2.0), ..SHAPE }] {
        let mut layer = layer_in_use(shape, Bf16, &[1, 4, 33]);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let plane = 6 * mirror.stride;
        let sums = gpu.output(3 * plane * 4);
        mass(&mut gpu, &mirror, &layer, &[(1, u32::MAX, 1.0 / 3.0); 3], sums, 0);
        let found = scores(&mut gpu, &mirror, &layer, "rank_last", vec![Arg::At(sums)]);
        assert_scores(&found, &on_cpu(&mut layer, Scorer::LastAttention), 1e-5, "last");
        mass(&mut gpu, &mirror, &layer, &[(1, u32::MAX, 1.0); 3], sums, plane);
        let plane = Arg::Bytes((plane as u64).to_ne_bytes().to_vec());
        let more = vec![Arg::At(sums), plane, Arg::U32(3), Arg::U32(5)];
        let found = scores(&mut gpu, &mirror, &layer, "rank_newest", more);
        let scorer = Scorer::NewestAttention { pool: 5 };
        assert_scores(&found, &on_cpu(&mut layer, scorer), 1e-5, "newest");
    }
}

#[test]
fn tallies_of_chunks_are_those_of_prompts() {
    if !available() {
        return;
    }
    let shape = AttendShape { window: Some(50), ..SHAPE };
    let mut layer = Layer::new(2, shape, F16);
    let mut sums: Vec<f32> = Vec::new();
    let mut whole = Vec::new();
    for step in [[20, 33], [41, 1], [1, 30]] {
        layer.feed(6, &step);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room { tokens: 64, ..Room::default() });
        sums.resize(4 * mirror.stride, f32::NAN);
        let buffer = gpu.inout(&sums);
        let counted = step.map(|rows| (u32::MAX, rows as u32, 1.0 / 3.0));
        mass(&mut gpu, &mirror, &layer, &counted, buffer, 0);
        sums = gpu.read(buffer);
        let lse = lse_of(&layer);
        let mut list: Vec<TallyItem<'_>> = (layer.caches.iter_mut().zip(&layer.step))
            .map(|(heads, step)| TallyItem { heads, first_row: step.0, rows: step.1 })
            .collect();
        tally(&layer.threads, &layer.pool, &mut list, &shape, &layer.qkv, layer.width, &lse);
        let found: Vec<Vec<f32>> = (mirror.all_heads(&gpu).iter())
            .map(|h| sums[h.meta as usize..][..h.tokens as usize].to_vec())
            .collect();
        let expected: Vec<Vec<f32>> =
            layer.caches.iter().flatten().map(|c| c.tally.clone()).collect();
        assert_scores(&found, &expected, 1e-5, "tally");
        for mean in [false, true] {
            let tallies = gpu.input(&sums);
            let more = vec![Arg::At(tallies), Arg::U32(0), Arg::U32(mean.into())];
            let found = scores(&mut gpu, &mirror, &layer, "rank_tallied", more);
            let expected = on_cpu(&mut layer, Scorer::Tallied { mean });
            assert_scores(&found, &expected, 1e-5, "tallied");
        }
        whole = found;
    }
    let mut layer = Layer::new(2, shape, F16);
    layer.feed(6, &[62, 64]);
    let mut gpu = Gpu::default();
    let mirror = Mirror::new(&mut gpu, &layer, Room { tokens: 64, ..Room::default() });
    let buffer = gpu.output(4 * mirror.stride * 4);
    mass(&mut gpu, &mirror, &layer, &[(u32::MAX, u32::MAX, 1.0 / 3.0); 2], buffer, 0);
    let sums: Vec<f32> = gpu.read(buffer);
    for (h, expected) in mirror.all_heads(&gpu).iter().zip(&whole) {
        let found = sums[h.meta as usize..][..h.tokens as usize].to_vec();
        // The denominators come from the CPU, whose chunks give the same bits.
        assert!(found == *expected);
    }
}
