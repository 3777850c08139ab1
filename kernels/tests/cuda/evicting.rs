//! The choice of those that stay, and their way to the front.

use batchmax_kernels::attend::AttendShape;
use batchmax_kernels::evict::{
    EvictItem, Protect, Turning, WithinItem, best, evict, share, within,
};
use batchmax_kernels::kv::KvFormat::{Bf16, F16, Fp8};
use batchmax_kernels::kv::{Codec, KeyAxis};
use batchmax_kernels::rank::{Scorer, TallyItem, tally};
use batchmax_kernels::rope::{RopeLayout, RopeTable};
use proptest::prelude::*;

use super::cases;
use super::decode::{layer_of, shape_of};
use super::elementwise::angles;
use super::gpu::{Arg, Buffer, Gpu, available, bytes_of};
use super::mirror::{Head, KINDS, Mirror, Room, items};
use super::ranking::{SHAPE, layer_in_use, lse_of, mass, on_cpu};
use super::testing::{Layer, noise};
use batchmax_kernels::cuda::emulated::shim::Moved;

fn protect_of(protect: Protect) -> Arg {
    Arg::Bytes(bytes_of(&[protect.sinks, protect.recent]))
}

/// Scores by token, one list per head, where the kernels look for them.
pub fn scores_at(gpu: &mut Gpu, mirror: &Mirror, scores: &[Vec<f32>]) -> Buffer {
    let mut all = vec![f32::NAN; scores.len() * mirror.stride];
    for (head, scores) in mirror.all_heads(gpu).iter().zip(scores) {
        all[head.meta as usize..][..scores.len()].copy_from_slice(scores);
    }
    gpu.input(&all)
}

/// Scores with equal ones and some that are no numbers.
fn uneven(layer: &Layer, seed: u64) -> Vec<Vec<f32>> {
    let heads = layer.caches.iter().flatten().enumerate();
    heads
        .map(|(h, head)| {
            let mut scores = noise(seed + h as u64, head.tokens());
            for (i, score) in scores.iter_mut().enumerate() {
                match i % 7 {
                    2 | 5 => *score = (*score * 4.0).round() / 4.0,
                    3 if i % 21 == 3 => *score = f32::NAN,
                    _ => {}
                }
            }
            scores
        })
        .collect()
}

/// Those that stay, in a buffer by `Head::meta`.
pub fn choose(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    (scores, keep): (Buffer, Buffer),
    protect: Protect,
) -> Buffer {
    let kept = gpu.output(layer.caches.len() * mirror.kv_heads * mirror.stride * 4);
    let list = gpu.input(&items(layer));
    let arguments = [
        mirror.kv(gpu),
        Arg::At(list),
        Arg::At(scores),
        Arg::At(keep),
        protect_of(protect),
        Arg::At(kept),
    ];
    gpu.launch("evict_choose", [mirror.kv_heads, layer.caches.len(), 1], 256, 1152, &arguments);
    kept
}

fn compact(gpu: &mut Gpu, mirror: &Mirror, layer: &Layer, keep: Buffer, kept: Buffer) -> Moved {
    let list = gpu.input(&items(layer));
    let arguments = [mirror.kv(gpu), Arg::At(list), Arg::At(keep), Arg::At(kept)];
    let columns = (mirror.dim * mirror.format.bytes()).div_ceil(64);
    let grid = [columns, 2 * mirror.kv_heads, layer.caches.len()];
    gpu.launch("evict_compact", grid, 256, 0, &arguments)
}

fn numbers(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    (keep, kept): (Buffer, Buffer),
    (array, fresh): (Buffer, u32),
) {
    let list = gpu.input(&items(layer));
    let arguments = [
        mirror.kv(gpu),
        Arg::At(list),
        Arg::At(keep),
        Arg::At(kept),
        Arg::At(array),
        Arg::U32(fresh),
        Arg::U32(0),
    ];
    gpu.launch("evict_numbers", [mirror.kv_heads, layer.caches.len(), 1], 256, 0, &arguments);
}

fn on_cpu_evict(
    layer: &mut Layer,
    keep: &[u32],
    scores: &[Vec<f32>],
    protect: Protect,
    turning: Option<Turning<'_>>,
) {
    let kv_heads = layer.shape.kv_heads;
    let mut list: Vec<EvictItem<'_>> = (layer.caches.iter_mut().zip(&layer.seen).enumerate())
        .map(|(i, (heads, seen))| EvictItem {
            heads,
            seen: *seen,
            keep: keep[i * kv_heads..][..kv_heads].iter().map(|k| *k as usize).collect(),
        })
        .collect();
    evict(&layer.threads, &mut layer.pool, &mut list, scores, protect, turning).expect("room");
}

/// What the counts say once tokens are gone.
fn settle(gpu: &Gpu, mirror: &Mirror, keep: &[u32]) {
    let mut heads = mirror.all_heads(gpu);
    for (head, keep) in heads.iter_mut().zip(keep) {
        head.tokens = head.tokens.min(*keep);
    }
    mirror.put_heads(gpu, &heads);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn the_best_stay_in_order(
        dim in 0usize..6,
        format in 0usize..3,
        tokens in proptest::collection::vec(1usize..120, 1..3),
        keep in proptest::collection::vec(0u32..130, 6),
        sinks in 0u32..40,
        recent in 0u32..50,
        seed: u64,
    ) {
        if !available() {
            return Ok(());
        }
        let dim = [64, 80, 96, 128, 256, 40][dim];
        let shape = AttendShape { heads: 3, kv_heads: 3, head_dim: dim, ..SHAPE };
        let mut layer = Layer::new(tokens.len(), shape, [F16, Bf16, Fp8][format]);
        layer.feed(seed, &tokens);
        layer.thin(seed ^ 1, &vec![90; tokens.len()]);
        // Tallies lag four tokens behind.
        let lse = lse_of(&layer);
        let mut list: Vec<TallyItem<'_>> = layer.caches.iter_mut().zip(&layer.step)
            .map(|(heads, step)| TallyItem { heads, first_row: step.0, rows: step.1.min(1) })
            .collect();
        tally(&layer.threads, &layer.pool, &mut list, &shape, &layer.qkv, layer.width, &lse);
        layer.feed(seed, &vec![4; tokens.len()]);
        let keep = &keep[..3 * tokens.len()];
        let scores = uneven(&layer, seed);
        let protect = Protect { sinks, recent };
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let mut tallies = vec![f32::NAN; keep.len() * mirror.stride];
        for (head, cache) in mirror.all_heads(&gpu).iter().zip(layer.caches.iter().flatten()) {
            tallies[head.meta as usize..][..cache.tally.len()].copy_from_slice(&cache.tally);
        }
        let tallies = gpu.inout(&tallies);
        let (at, stay) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(keep));
        let kept = choose(&mut gpu, &mirror, &layer, (at, stay), protect);
        let all: Vec<u32> = gpu.read(kept);
        for (h, cache) in layer.caches.iter().flatten().enumerate() {
            let (stay, seen) = (keep[h] as usize, layer.seen[h / 3]);
            if stay < cache.tokens() {
                let found = &all[mirror.all_heads(&gpu)[h].meta as usize..][..stay];
                prop_assert_eq!(found, best(&scores[h], &cache.positions, seen, stay, protect));
            }
        }
        compact(&mut gpu, &mirror, &layer, stay, kept);
        numbers(&mut gpu, &mirror, &layer, (stay, kept), (mirror.positions, 0));
        numbers(&mut gpu, &mirror, &layer, (stay, kept), (tallies, 4));
        settle(&gpu, &mirror, keep);
        let before: Vec<usize> = layer.caches.iter().flatten().map(|c| c.tokens()).collect();
        on_cpu_evict(&mut layer, keep, &scores, protect, None);
        mirror.assert_same(&gpu, &layer, "evicted");
        let tallies: Vec<f32> = gpu.read(tallies);
        for (h, cache) in layer.caches.iter().flatten().enumerate() {
            if cache.tokens() < before[h] {
                let found = &tallies[mirror.all_heads(&gpu)[h].meta as usize..][..cache.tokens()];
                prop_assert_eq!(found, cache.tally.as_slice());
            }
        }
    }

    #[test]
    fn heads_share_a_budget(mean in 0usize..60, guaranteed in 0usize..60, sinks in 0u32..5, recent in 0u32..9, seed: u64) {
        if !available() {
            return Ok(());
        }
        let layer = layer_in_use(SHAPE, F16, &[3, 9, 1]);
        let scores = uneven(&layer, seed);
        let protect = Protect { sinks, recent };
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (at, list) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(&items(&layer)));
        let (means, sure) = (gpu.input(&[mean as u32; 3]), gpu.input(&[guaranteed as u32; 3]));
        let keep = gpu.output(6 * 4);
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            Arg::At(at),
            Arg::At(means),
            Arg::At(sure),
            protect_of(protect),
            Arg::At(keep),
        ];
        gpu.launch("evict_share", [3, 1, 1], 256, 256, &arguments);
        let mut expected = Vec::new();
        for (i, heads) in layer.caches.iter().enumerate() {
            let ranked: Vec<(&[f32], &[u32])> = (scores[2 * i..].iter().zip(heads))
                .map(|(scores, head)| (scores.as_slice(), head.positions.as_slice()))
                .collect();
            let counts = share(&ranked, layer.seen[i], mean, guaranteed, protect);
            expected.extend(counts.iter().map(|c| *c as u32));
        }
        prop_assert_eq!(gpu.read::<u32>(keep), expected);
    }
}

#[test]
fn what_moves_moves_once() {
    if !available() {
        return;
    }
    for case in cases::of("evict") {
        let mut layer = layer_of(shape_of(&case), case.format, case.tokens);
        let scores: Vec<Vec<f32>> = (layer.caches.iter().flatten().enumerate())
            .map(|(h, c)| noise(h as u64, c.tokens()))
            .collect();
        let keep: Vec<u32> = layer.caches.iter().flatten().map(|c| c.tokens() as u32 / 2).collect();
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (at, stay) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(&keep));
        let kept = choose(&mut gpu, &mirror, &layer, (at, stay), Protect::default());
        let all: Vec<u32> = gpu.read(kept);
        let row = 2 * mirror.dim * mirror.format.bytes();
        let moves = |h: usize, head: &Head| {
            let kept = &all[head.meta as usize..][..keep[h] as usize];
            kept.iter().enumerate().position(|(i, t)| i as u32 != *t).map_or(0, |i| kept.len() - i)
        };
        let moved_tokens: usize =
            mirror.all_heads(&gpu).iter().enumerate().map(|(h, head)| moves(h, head)).sum();
        let moved = compact(&mut gpu, &mirror, &layer, stay, kept);
        numbers(&mut gpu, &mirror, &layer, (stay, kept), (mirror.positions, 0));
        settle(&gpu, &mirror, &keep);
        on_cpu_evict(&mut layer, &keep, &scores, Protect::default(), None);
        mirror.assert_same(&gpu, &layer, "half");
        // Each column of a head is described anew.
        let columns = (row / 2).div_ceil(64) * 2 * keep.len();
        let share = moved.bytes() / (2 * moved_tokens * row + columns * 116) as f64;
        assert!(share > 0.97 && share < 1.1, "{case:?}: {share} of what moves");
        // Noise leaves a gap early: the table's estimate, half of what stays, is a bound for the moved part.
        assert!(case.bytes() > 0.0 && moved.bytes() > case.bytes());
    }
}

#[test]
fn keys_turn_to_their_places() {
    if !available() {
        return;
    }
    for (layout, format) in [(RopeLayout::Half, F16), (RopeLayout::Interleaved, Bf16)] {
        let mut layer = Layer::new(2, SHAPE, format);
        layer.feed(3, &[100, 61]);
        let inverse: Vec<f32> = (0..24).map(|i| 0.8f32.powi(i)).collect();
        let (scores, keep) = (uneven(&layer, 4), [40, 41, 61, 3]);
        let protect = Protect { sinks: 4, recent: 8 };
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (at, stay) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(&keep));
        let kept = choose(&mut gpu, &mirror, &layer, (at, stay), protect);
        compact(&mut gpu, &mirror, &layer, stay, kept);
        let table = gpu.input(&angles(&inverse, 128, 1.2));
        let list = gpu.input(&items(&layer));
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            Arg::At(stay),
            Arg::At(kept),
            Arg::At(table),
            Arg::U32(24),
            Arg::U32(u32::from(layout == RopeLayout::Interleaved)),
            Arg::F32(1.0 / 1.2),
        ];
        gpu.launch("evict_turn", [(61 * 24usize).div_ceil(256), 2, 2], 256, 0, &arguments);
        numbers(&mut gpu, &mirror, &layer, (stay, kept), (mirror.positions, 0));
        settle(&gpu, &mirror, &keep);
        let table = RopeTable::new(&inverse, 128, 1.2);
        let turning = Turning { table: &table, layout };
        on_cpu_evict(&mut layer, &keep, &scores, protect, Some(turning));
        for (h, cache) in layer.caches.iter().flatten().enumerate() {
            for token in 0..cache.tokens() {
                let (found, wanted) = (mirror.key(&gpu, h, token), cache.key(&layer.pool, token));
                for (x, y) in found.iter().zip(&wanted) {
                    // A rounding of the cache's format apart, where the last bit of a product differs.
                    assert!((x - y).abs() <= y.abs().max(0.1) / 100.0, "{x} for {y}");
                }
                assert_eq!(mirror.value(&gpu, h, token), cache.value(&layer.pool, token));
            }
        }
    }
}

#[test]
fn as_many_go_as_attention_allows() {
    if !available() {
        return;
    }
    let mut layer = Layer::new(2, SHAPE, F16);
    layer.feed(3, &[70, 33]);
    layer.feed(4, &[1, 1]);
    let scores = on_cpu(&mut layer, Scorer::LastAttention);
    let protect = Protect { sinks: 3, recent: 2 };
    let most = [60u32, 20];
    for loss in [0.0, 0.05, 0.2, 0.5, 1.0] {
        let list: Vec<WithinItem<'_>> = (layer.caches.iter().enumerate())
            .map(|(i, heads)| WithinItem {
                heads,
                row: i,
                seen: layer.seen[i],
                scores: &scores[2 * i..2 * i + 2],
                most: most[i] as usize,
            })
            .collect();
        let (threads, pool, shape) = (&layer.threads, &layer.pool, &layer.shape);
        let expected = within(threads, pool, &list, shape, &layer.qkv, layer.width, protect, loss);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let plane = 4 * mirror.stride;
        let weights = gpu.output(3 * plane * 4);
        mass(&mut gpu, &mirror, &layer, &[(1, u32::MAX, 1.0); 2], weights, plane);
        let (at, list) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(&items(&layer)));
        let (order, other) = (gpu.output(plane * 4), gpu.output(plane * 4));
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            Arg::At(at),
            protect_of(protect),
            Arg::At(order),
            Arg::At(other),
        ];
        gpu.launch("evict_order", [2, 2, 1], 128, 128, &arguments);
        let (most, keep) = (gpu.input(&most), gpu.output(16));
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            Arg::At(weights),
            Arg::Bytes((plane as u64).to_ne_bytes().to_vec()),
            Arg::U32(3),
            Arg::At(order),
            Arg::U32(protect.sinks),
            Arg::Bytes(f64::to_ne_bytes(loss).to_vec()),
            Arg::At(most),
            Arg::At(keep),
        ];
        gpu.launch("evict_within", [2, 1, 1], 128, 1024, &arguments);
        let expected: Vec<u32> = expected.iter().flat_map(|n| [*n as u32; 2]).collect();
        assert_eq!(gpu.read::<u32>(keep), expected, "{loss}");
    }
}

#[test]
fn packed_tokens_move_with_their_scales() {
    if !available() {
        return;
    }
    for (bits, group, key_axis) in [
        (2, 32, KeyAxis::Channel),
        (4, 64, KeyAxis::Channel),
        (8, 32, KeyAxis::Token),
        (1, 16, KeyAxis::Token),
    ] {
        let codec = Codec { bits, group, key_axis };
        let shape = AttendShape { head_dim: 80, ..SHAPE };
        let mut layer = Layer::new(2, shape, F16);
        layer.feed(3, &[150, 70]);
        let mut gpu = Gpu::default();
        let room = Room { codec: Some(codec), spare: true, ..Room::default() };
        let mirror = Mirror::new(&mut gpu, &layer, room);
        let counts = |tokens: usize| (tokens - tokens % 64, tokens - 20);
        super::packing::both(&mut gpu, &mirror, &mut layer, codec, counts);
        let (scores, keep) = (uneven(&layer, 4), [90, 37, 70, 1]);
        let protect = Protect { sinks: 20, recent: 8 };
        let (at, stay) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(&keep));
        let kept = choose(&mut gpu, &mirror, &layer, (at, stay), protect);
        let all: Vec<u32> = gpu.read(kept);
        let mut next = mirror.all_heads(&gpu);
        for (h, head) in next.iter_mut().enumerate() {
            if keep[h] >= head.tokens {
                continue;
            }
            let kept = &all[head.meta as usize..][..keep[h] as usize];
            let among = |tokens: u32| kept.partition_point(|t| *t < tokens) as u32;
            head.key_packed = among(head.key_packed);
            head.key_narrow = among(head.key_narrow);
            head.value_packed = among(head.value_packed);
            head.tokens = keep[h];
            let table = |kind: usize| ((h * KINDS + kind) * mirror.blocks) as u32;
            (head.k_whole, head.k_pruned, head.v_whole) = (table(5), table(6), table(7));
        }
        let (after, list) = (gpu.input(&next), gpu.input(&items(&layer)));
        let arguments =
            |gpu: &Gpu| vec![mirror.kv(gpu), Arg::At(list), Arg::At(after), Arg::At(kept)];
        let with = |gpu: &Gpu, side| {
            let mut all = arguments(gpu);
            all.push(Arg::U32(side));
            all
        };
        let (heads, sides) = ([2, 2, 1], with(&gpu, 0));
        let move_grid = [(90 * 2 * 10usize).div_ceil(256), 2, 2];
        gpu.launch("evict_move", move_grid, 256, 0, &arguments(&gpu));
        if key_axis == KeyAxis::Channel {
            let shared = 4 * (usize::from(group) * 80 + 16 * 256);
            gpu.launch("evict_regroup", heads, 256, shared, &arguments(&gpu));
        } else {
            gpu.launch("evict_packed", heads, 256, 0, &sides);
        }
        let sides = with(&gpu, 1);
        gpu.launch("evict_packed", heads, 256, 0, &sides);
        numbers(&mut gpu, &mirror, &layer, (stay, kept), (mirror.positions, 0));
        mirror.put_heads(&gpu, &next);
        on_cpu_evict(&mut layer, &keep, &scores, protect, None);
        mirror.assert_same(&gpu, &layer, &format!("{codec:?}"));
    }
}
