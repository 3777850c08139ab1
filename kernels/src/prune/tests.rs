//! Pruned caches against their definition.

use proptest::prelude::*;

use super::*;
use crate::attend::tests::check;
use crate::evict::{EvictItem, Protect, evict};
use crate::kv::{Codec, KeyAxis, KvFormat};
use crate::pack::tests::{codecs, contents, expected, held, pack_all, shape};
use crate::rank::Scorer;
use crate::testing::{Layer, noise};

fn prune_all(layer: &mut Layer, kept: &[Vec<u16>], tokens: usize) -> Result<(), PoolFull> {
    let kv_heads = layer.shape.kv_heads;
    let mut items: Vec<PruneItem<'_>> = layer
        .caches
        .iter_mut()
        .zip(kept.chunks(kv_heads))
        .map(|(heads, kept)| PruneItem { heads, kept, tokens })
        .collect();
    prune(&layer.threads, &mut layer.pool, &mut items)
}

/// Channels at random, some for each head.
fn channels(seed: u64, heads: usize, dim: usize, count: usize) -> Vec<Vec<u16>> {
    let of = |h: usize| {
        let score = noise(seed ^ (h as u64) << 7, dim);
        let mut order: Vec<u16> = (0..dim as u16).collect();
        order.sort_by(|a, b| score[usize::from(*a)].total_cmp(&score[usize::from(*b)]));
        order.truncate(count);
        order.sort_unstable();
        order
    };
    (0..heads).map(of).collect()
}

#[test]
fn channels_are_ranked_by_hand() {
    let mut layer = Layer::new(1, shape(2, 1, 8), KvFormat::F32);
    layer.feed(1, &[2]);
    // Two rows of two query heads, and keys of two tokens, in the layout of a fused row of 32.
    let row = |a: [f32; 8], b: [f32; 8]| [a, b, [0.0; 8], [0.0; 8]].concat();
    let first = row([9.0; 8], [9.0; 8]);
    let last = row(
        [1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, f32::NAN],
    );
    layer.qkv = [first, last].concat();
    let keys = [[1.0, 1.0, 9.0, 2.0, 3.0, 1.0, 0.0, 1.0], [1.0, 1.0, 9.0, 0.0, 4.0, 1.0, 0.0, 1.0]];
    let rows: Vec<f32> = keys.iter().flat_map(|k| [*k, [0.0; 8]].concat()).collect();
    layer.caches[0][0].clear(&mut layer.pool);
    let mut items = [crate::append::AppendItem {
        heads: &mut layer.caches[0],
        first_row: 0,
        rows: 2,
        positions: &[0, 1],
    }];
    crate::append::append(&layer.threads, &mut layer.pool, &mut items, &rows, 16, 0, 8, 8)
        .expect("room");
    // Means of squares of the last row: 1, 2, 0, 1 ..; of keys 1, 1, 81, 2, 12.5, 1, 0, 1. So the scores are
    // 1, 2, 0, 2, 12.5, 1, 0 and no number; 0, 2 before 6, then 0 before 5, 1 before 3.
    let item = ChannelItem { heads: &layer.caches[0], first_row: 0, rows: 2 };
    let keep = |drop| {
        let items = std::slice::from_ref(&item);
        let (shape, qkv) = (&layer.shape, &layer.qkv);
        rank_channels(&layer.threads, &layer.pool, items, 1, drop, shape, qkv, 32).remove(0)
    };
    assert_eq!(keep(1), [0, 1, 3, 4, 5, 6, 7]);
    assert_eq!(keep(3), [1, 3, 4, 5, 7]);
    assert_eq!(keep(5), [3, 4, 7]);
    assert_eq!(keep(7), [7]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn pruned_channels_count_as_zero(
        seed in any::<u64>(),
        group in prop::sample::select(vec![1usize, 3, 4, 13]),
        dim in prop::sample::select(vec![8usize, 64, 72]),
        share in 0.2f32..1.0,
        format in prop::sample::select(vec![KvFormat::F32, KvFormat::F16, KvFormat::Fp8]),
        before in prop::sample::select(vec![1usize, 31, 32, 33, 64, 100, 600]),
        narrow in prop::sample::select(vec![0usize, 1, 31, 32, 33, 68, 100, 568]),
        rows in 1usize..40,
        codec in codecs(),
        packed in 0usize..4,
    ) {
        let mut layer = Layer::new(2, shape(group, 1, dim), format);
        layer.feed(seed, &[before, 20]);
        let plain = contents(&layer);
        let count = ((dim as f32 * share) as usize).max(1);
        let kept = channels(seed, 2, dim, count);
        prune_all(&mut layer, &kept, narrow / 2).expect("room");
        prune_all(&mut layer, &kept, narrow).expect("room");
        for ((after, plain), kept) in contents(&layer).iter().zip(&plain).zip(&kept) {
            for (t, (after, plain)) in after.iter().zip(plain).enumerate() {
                let lacks = |d: usize| t < narrow && !kept.contains(&(d as u16));
                let key: Vec<f32> = (0..dim).map(|d| if lacks(d) { 0.0 } else { plain.0[d] }).collect();
                prop_assert_eq!(&after.0, &key);
                prop_assert_eq!(&after.1, &plain.1);
            }
        }
        prop_assert_eq!(layer.pool.held_bytes(), held(&layer, codec));
        layer.feed(seed, &[rows, 1]);
        check(&layer, false);
        layer.feed(seed, &[1, 1]);
        check(&layer, true);
        // What was pruned, and what was not yet, is packed without those channels.
        if narrow > 0 {
            let before = contents(&layer);
            let keys = packed * usize::from(codec.group);
            pack_all(&mut layer, keys, keys / 2, codec).expect("room");
            for ((after, before), kept) in contents(&layer).iter().zip(&before).zip(&kept) {
                let kept: Vec<usize> = kept.iter().map(|d| usize::from(*d)).collect();
                prop_assert_eq!(after, &expected(codec, before, keys, keys / 2, &kept));
            }
            prop_assert_eq!(layer.pool.held_bytes(), held(&layer, codec));
            layer.feed(seed, &[1, 1]);
            check(&layer, true);
            layer.feed(seed, &[rows, 3]);
            check(&layer, false);
        }
        layer.caches.iter_mut().flatten().for_each(|h| h.clear(&mut layer.pool));
        prop_assert_eq!(layer.pool.held_bytes(), 0);
    }

    #[test]
    fn eviction_keeps_the_right_tokens_of_every_form(
        seed in any::<u64>(),
        codec in codecs(),
        dim in prop::sample::select(vec![8usize, 64, 72]),
        format in prop::sample::select(vec![KvFormat::F32, KvFormat::F16, KvFormat::Fp8]),
        tokens in prop::sample::select(vec![5usize, 32, 64, 97, 200]),
        with_channels in any::<bool>(),
        narrow in 0usize..200,
        packed in 0usize..5,
        values in 0usize..200,
        keep in 0usize..180,
    ) {
        let mut layer = Layer::new(1, shape(3, 2, dim), format);
        layer.feed(seed, &[tokens]);
        let kept = channels(seed, 2, dim, dim - dim / 3);
        if with_channels {
            prune_all(&mut layer, &kept, narrow).expect("room");
        }
        pack_all(&mut layer, packed * usize::from(codec.group), values, codec).expect("room");
        let before = contents(&layer);
        let counts: Vec<[usize; 3]> = layer.caches.iter().flatten().map(|h| {
            [h.keys.packed_tokens(), h.keys.narrow_tokens(), h.values.packed_tokens()]
        }).collect();
        let scores: Vec<Vec<f32>> = (0..2).map(|h| noise(seed ^ h, tokens)).collect();
        let each = vec![keep; layer.caches[0].len()];
        let mut items =
            [EvictItem { heads: &mut layer.caches[0], seen: tokens as u32, keep: each }];
        let protect = Protect { sinks: 2, recent: 4 };
        evict(&layer.threads, &mut layer.pool, &mut items, &scores, protect, None).expect("room");
        prop_assert_eq!(layer.pool.held_bytes(), held(&layer, codec));
        for (h, head) in layer.caches[0].iter().enumerate() {
            let stay: Vec<usize> = head.positions.iter().map(|p| *p as usize).collect();
            prop_assert_eq!(stay.len(), keep.min(tokens));
            let among = |n: usize| stay.iter().filter(|t| **t < n).count();
            let found = [head.keys.packed_tokens(), head.keys.narrow_tokens(), head.values.packed_tokens()];
            prop_assert_eq!(found, counts[h].map(among));
            let moved: Vec<_> = stay.iter().map(|t| before[h][*t].clone()).collect();
            let mut exact = moved.clone();
            // Keys along channels are packed anew from the first group with a gap on.
            let gap = stay.iter().enumerate().position(|(to, from)| to != *from).unwrap_or(stay.len());
            if codec.key_axis == KeyAxis::Channel && gap < found[0] {
                let channels: Vec<usize> = head.kept_channels().map_or((0..dim).collect(), |k| {
                    k.iter().map(|d| usize::from(*d)).collect()
                });
                let from = gap / usize::from(codec.group) * usize::from(codec.group);
                let anew = expected(codec, &moved[from..].to_vec(), found[0] - from, 0, &channels);
                exact[from..found[0]].clone_from_slice(&anew[..found[0] - from]);
            }
            for (t, exact) in exact.iter().enumerate() {
                prop_assert_eq!(&head.key(&layer.pool, t), &exact.0);
                prop_assert_eq!(&head.value(&layer.pool, t), &exact.1);
            }
        }
        layer.feed(seed, &[1]);
        check(&layer, true);
        // Keys rank as what they stand for, and more can be packed after.
        let mut scores = Vec::new();
        let mut items = [crate::rank::RankItem { heads: &mut layer.caches[0], first_row: 0, rows: 1, seen: 0 }];
        crate::rank::rank(&layer.threads, &layer.pool, &mut items, Scorer::KeyNorm, &layer.shape, &layer.qkv, layer.width, &[], &mut scores);
        for (head, scores) in layer.caches[0].iter().zip(&scores) {
            let exact: Vec<f64> = (0..head.tokens()).map(|t| {
                -head.key(&layer.pool, t).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
            }).collect();
            crate::testing::assert_close(scores, &exact, 1e-6, "norm");
        }
        layer.feed(seed, &[70]);
        pack_all(&mut layer, 96, 60, codec).expect("room");
        prop_assert_eq!(layer.pool.held_bytes(), held(&layer, codec));
        layer.feed(seed, &[3]);
        check(&layer, false);
    }
}

#[test]
fn an_eviction_that_needs_more_than_the_budget_changes_nothing() {
    let codec = Codec { bits: 2, group: 32, key_axis: KeyAxis::Channel };
    let mut layer = Layer::new(1, shape(1, 1, 64), KvFormat::F32);
    layer.feed(3, &[96]);
    pack_all(&mut layer, 64, 64, codec).expect("room");
    // 64 packed and 32 whole. Keeping 70 leaves at most 38 + 32: the whole ones then lie in two blocks.
    let before = contents(&layer);
    let held = layer.pool.held_bytes();
    let mut pool = std::mem::replace(&mut layer.pool, BlockPool::new(64, KvFormat::F32, 0));
    pool.set_budget(held + 8191);
    let scores = vec![(0..96).map(|t| if t < 64 { t as f32 / 64.0 } else { 9.0 }).collect()];
    let keep = vec![70; layer.caches[0].len()];
    let mut items = [EvictItem { heads: &mut layer.caches[0], seen: 96, keep }];
    let full = evict(&layer.threads, &mut pool, &mut items, &scores, Protect::default(), None)
        .expect_err("a whole half more for keys and values each");
    assert_eq!((full.requested, pool.held_bytes()), (4 * 8192, held));
    layer.pool = pool;
    assert_eq!((contents(&layer), layer.caches[0][0].tokens()), (before, 96));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// What the products of queries and keys lose is at most the square of the sum over the dropped channels of
    /// |queries| |keys| (the triangle inequality), and no other choice of as many channels has a smaller bound.
    #[test]
    fn what_is_dropped_has_the_least_bound(seed in any::<u64>(), rows in 1usize..20, drop in 1usize..8) {
        const DIM: usize = 8;
        let mut layer = Layer::new(1, shape(1, 1, DIM), KvFormat::F32);
        layer.feed(seed, &[30]);
        layer.feed(seed ^ 1, &[rows]);
        let item = ChannelItem { heads: &layer.caches[0], first_row: 0, rows };
        let items = std::slice::from_ref(&item);
        let (shape, qkv, width) = (&layer.shape, &layer.qkv, layer.width);
        let kept = rank_channels(&layer.threads, &layer.pool, items, rows, drop, shape, qkv, width).remove(0);
        prop_assert_eq!(kept.len(), DIM - drop);
        let keys: Vec<Vec<f64>> = contents(&layer)[0].iter().map(|(k, _)| k.iter().map(|x| f64::from(*x)).collect()).collect();
        let queries: Vec<Vec<f64>> =
            qkv.chunks(width).map(|row| row[..DIM].iter().map(|x| f64::from(*x)).collect()).collect();
        let norm = |rows: &[Vec<f64>], j: usize| rows.iter().map(|r| r[j] * r[j]).sum::<f64>().sqrt();
        let weights: Vec<f64> = (0..DIM).map(|j| norm(&queries, j) * norm(&keys, j)).collect();
        let bound = |dropped: &[usize]| dropped.iter().map(|j| weights[*j]).sum::<f64>().powi(2);
        let lost = |dropped: &[usize]| -> f64 {
            let pairs = queries.iter().flat_map(|q| keys.iter().map(move |k| (q, k)));
            pairs.map(|(q, k)| dropped.iter().map(|j| q[*j] * k[*j]).sum::<f64>().powi(2)).sum()
        };
        let chosen: Vec<usize> = (0..DIM).filter(|j| !kept.contains(&(*j as u16))).collect();
        prop_assert!(lost(&chosen) <= bound(&chosen) * (1.0 + 1e-9));
        for set in 0u32..1 << DIM {
            if set.count_ones() as usize == drop {
                let other: Vec<usize> = (0..DIM).filter(|j| set >> j & 1 == 1).collect();
                prop_assert!(bound(&chosen) <= bound(&other) * (1.0 + 1e-5), "{chosen:?} {other:?}");
                prop_assert!(lost(&chosen) <= bound(&other) * (1.0 + 1e-5));
            }
        }
    }
}
