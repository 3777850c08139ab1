//! Packed caches against plain arithmetic, and attention over them against the reference.

use proptest::prelude::*;

use super::*;
use crate::append::AppendItem;
use crate::attend::AttendShape;
use crate::attend::tests::check;
use crate::kv::{KeyAxis, KvFormat};
use crate::testing::{Layer, noise};

pub(crate) fn shape(group: usize, kv_heads: usize, head_dim: usize) -> AttendShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttendShape { heads: group * kv_heads, kv_heads, head_dim, scale, softcap: None, window: None }
}

pub(crate) fn pack_all(
    layer: &mut Layer,
    keys: usize,
    values: usize,
    codec: Codec,
) -> Result<(), PoolFull> {
    let mut items: Vec<PackItem<'_>> =
        layer.caches.iter_mut().map(|heads| PackItem { heads, keys, values }).collect();
    pack(&layer.threads, &mut layer.pool, &mut items, codec)
}

pub(crate) type Contents = Vec<(Vec<f32>, Vec<f32>)>;

pub(crate) fn contents(layer: &Layer) -> Vec<Contents> {
    let of = |h: &HeadCache| {
        (0..h.tokens()).map(|t| (h.key(&layer.pool, t), h.value(&layer.pool, t))).collect()
    };
    layer.caches.iter().flatten().map(of).collect()
}

/// A group after packing, by the definition.
pub(crate) fn packed(codec: Codec, group: &[f32]) -> Vec<f32> {
    let min = group.iter().copied().fold(f32::INFINITY, f32::min);
    let max = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let top = ((1u32 << codec.bits) - 1) as f32;
    let (scale, zero) = match codec.bits {
        1 => ((max - min) / 2.0, (3.0 * min + max) / 4.0),
        _ => ((max - min) / top, min),
    };
    let round = |x: f32| half::f16::from_f32(x).to_f32();
    let (scale, zero) = (round(scale), round(zero));
    let code = |x: &f32| match scale {
        0.0 => 0.0,
        _ => ((x - zero) / scale).clamp(0.0, top).round_ties_even(),
    };
    group.iter().map(|x| code(x) * scale + zero).collect()
}

/// What a head holds after packing, by the definition; `kept` are the channels of keys.
pub(crate) fn expected(
    codec: Codec,
    before: &Contents,
    keys: usize,
    values: usize,
    kept: &[usize],
) -> Contents {
    let mut after = before.clone();
    let group = usize::from(codec.group);
    let keys = keys.min(before.len());
    if codec.key_axis == KeyAxis::Channel {
        for first in (0..keys).step_by(group) {
            for d in kept {
                let tokens = first..(first + group).min(keys);
                let of: Vec<f32> = tokens.clone().map(|t| before[t].0[*d]).collect();
                tokens.zip(packed(codec, &of)).for_each(|(t, x)| after[t].0[*d] = x);
            }
        }
    } else {
        for (t, (key, _)) in before[..keys].iter().enumerate() {
            for part in kept.chunks(group) {
                let of: Vec<f32> = part.iter().map(|d| key[*d]).collect();
                part.iter().zip(packed(codec, &of)).for_each(|(d, x)| after[t].0[*d] = x);
            }
        }
    }
    for (key, _) in &mut after[..keys] {
        (0..key.len()).filter(|d| !kept.contains(d)).for_each(|d| key[d] = 0.0);
    }
    for (t, (_, value)) in before.iter().enumerate().take(values) {
        after[t].1 = value.chunks(group).flat_map(|part| packed(codec, part)).collect();
    }
    after
}

pub(crate) fn codecs() -> impl Strategy<Value = Codec> {
    let group = prop::sample::select(vec![32u16, 64]);
    let axis = prop::sample::select(vec![KeyAxis::Channel, KeyAxis::Token]);
    (prop::sample::select(vec![1u8, 2, 4, 8]), group, axis)
        .prop_map(|(bits, group, key_axis)| Codec { bits, group, key_axis })
}

/// The sum of the documented sizes of what the caches should hold.
pub(crate) fn held(layer: &Layer, codec: Codec) -> u64 {
    let format = layer.pool.format();
    let dim = layer.pool.head_dim();
    let side = |tokens: usize, packed: usize, narrow: usize, sizes: [usize; 3]| {
        let between = |from: usize, to: usize| {
            if to > from { to.div_ceil(32) - from / 32 } else { 0 }
        };
        packed.div_ceil(32) * sizes[0]
            + between(packed, narrow) * sizes[1]
            + between(narrow, tokens) * sizes[2]
    };
    let whole = dim * 32 * format.bytes();
    let of = |head: &HeadCache| {
        let n = head.tokens();
        let kept = head.kept_channels().map_or(dim, <[u16]>::len);
        let (k, v) = (head.keys.packed_tokens(), head.values.packed_tokens());
        let key_sizes = [codec.key_half_bytes(kept), kept * 32 * format.bytes(), whole];
        side(n, k, head.keys.narrow_tokens(), key_sizes)
            + side(n, v, v, [codec.value_half_bytes(dim), 0, whole])
    };
    layer.caches.iter().flatten().map(of).sum::<usize>() as u64
}

#[test]
fn a_packed_cache_by_hand() {
    // Keys of channel d are d + token, values 10 * token + channel.
    let mut layer = Layer::new(1, shape(1, 1, 8), KvFormat::F32);
    let mut head = HeadCache::default();
    let rows: Vec<f32> = (0..40)
        .flat_map(|t| {
            let key = (0..8).map(move |d| (d + t) as f32);
            key.chain((0..8).map(move |d| (10 * t + d) as f32))
        })
        .collect();
    let positions: Vec<u32> = (0..40).collect();
    let mut items = [AppendItem {
        heads: std::slice::from_mut(&mut head),
        first_row: 0,
        rows: 40,
        positions: &positions,
    }];
    crate::append::append(&layer.threads, &mut layer.pool, &mut items, &rows, 16, 0, 8, 8)
        .expect("room");
    layer.caches[0] = vec![head];
    let codec = Codec { bits: 2, group: 32, key_axis: KeyAxis::Channel };
    pack_all(&mut layer, 32, 33, codec).expect("room");
    let (head, pool) = (&layer.caches[0][0], &layer.pool);
    // Range 31 in 3 steps: 31 / 3 = 10.333, in binary16 10.336. Token 15 is 1.45 steps, token 16 1.55 above the zero.
    let step = half::f16::from_f32(31.0 / 3.0).to_f32();
    let column = |t: usize| head.key(pool, t)[3] - 3.0;
    assert_eq!([0, 15, 16, 31].map(column), [0.0, step, 2.0 * step, 3.0 * step]);
    assert_eq!(head.key(pool, 32)[3], 35.0);
    // 7 / 3 in binary16 is 2.334: channels 0 .. 7 are 0, .43, .86, 1.29, 1.71, 2.14, 2.57, 3.0 steps.
    let step = half::f16::from_f32(7.0 / 3.0).to_f32();
    let codes = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0];
    assert_eq!(head.value(pool, 32), codes.map(|c| 320.0 + c * step));
    assert_eq!(head.value(pool, 33)[7], 337.0);
    // K: 8 x (8 + 4) packed and 8 x 32 x 4 whole; V: two packed of 32 x (2 + 4) and one whole.
    assert_eq!(head.held_bytes(pool), 96 + 1024 + 2 * 192 + 1024);
    assert_eq!(pool.held_bytes(), head.held_bytes(pool));
}

/// What KIVI found in real models: some channels of the keys are far larger than the others. Packed along tokens they cost
/// the others nothing, packed along channels they take all levels.
#[test]
fn outlier_channels_want_keys_packed_along_tokens() {
    let error = |key_axis| {
        let mut layer = Layer::new(1, shape(1, 1, 64), KvFormat::F32);
        layer.feed(5, &[128]);
        let width = layer.width;
        for row in layer.qkv.chunks_exact_mut(width) {
            for channel in [3, 17, 40] {
                row[64 + channel] += 20.0;
            }
        }
        layer.caches[0][0].clear(&mut layer.pool);
        let positions: Vec<u32> = (0..128).collect();
        let rows = 128;
        let heads = &mut layer.caches[0];
        let mut items = [AppendItem { heads, first_row: 0, rows, positions: &positions }];
        let (threads, pool, qkv) = (&layer.threads, &mut layer.pool, &layer.qkv);
        crate::append::append(threads, pool, &mut items, qkv, width, 64, 128, 64).expect("room");
        let before = contents(&layer);
        pack_all(&mut layer, 128, 0, Codec { bits: 2, group: 32, key_axis }).expect("room");
        let after = contents(&layer);
        let of = |contents: &[Contents]| -> Vec<f32> {
            contents[0].iter().flat_map(|(key, _)| key.clone()).collect()
        };
        let pairs = of(&before).into_iter().zip(of(&after));
        pairs.map(|(x, y)| (x - y) * (x - y)).sum::<f32>()
    };
    let (channel, token) = (error(KeyAxis::Channel), error(KeyAxis::Token));
    assert!(token > 10.0 * channel, "per channel {channel}, per token {token}");
}

#[test]
fn packing_needs_no_room_for_both_forms_but_respects_the_budget() {
    let codec = Codec { bits: 4, group: 32, key_axis: KeyAxis::Channel };
    let mut layer = Layer::new(1, shape(1, 1, 64), KvFormat::F16);
    layer.pool = BlockPool::new(64, KvFormat::F16, 2 * 8192);
    layer.feed(3, &[64]);
    // Full to the brim, and yet all of it can be packed; the peak is what was.
    pack_all(&mut layer, 64, 64, codec).expect("what is given back is enough");
    assert_eq!(layer.pool.held_bytes(), 2 * (64 * 20 + 32 * 40) as u64);
    assert_eq!(layer.pool.peak_bytes(), 2 * 8192);
    // One value of a block packed: its half comes on top.
    let mut layer = Layer::new(1, shape(1, 1, 64), KvFormat::F16);
    layer.pool = BlockPool::new(64, KvFormat::F16, 2 * 8192);
    layer.feed(3, &[64]);
    let before = contents(&layer);
    let full = pack_all(&mut layer, 0, 1, codec).expect_err("no room");
    assert_eq!((full.requested, full.held), (32 * 40, 2 * 8192));
    assert_eq!((contents(&layer), layer.pool.held_bytes()), (before, 2 * 8192));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn packed_tokens_are_what_their_codes_stand_for(
        seed in any::<u64>(),
        codec in codecs(),
        dim in prop::sample::select(vec![8usize, 64, 72, 80]),
        format in prop::sample::select(vec![KvFormat::F32, KvFormat::F16, KvFormat::Bf16]),
        tokens in prop::collection::vec(0usize..150, 2),
        groups in 0usize..5,
        values in prop::collection::vec(0usize..140, 2),
        more in 0usize..70,
    ) {
        let mut layer = Layer::new(2, shape(1, 2, dim), format);
        layer.feed(seed, &tokens);
        let before = contents(&layer);
        // In two steps: values may stop anywhere, keys at a group.
        let keys = groups * usize::from(codec.group);
        let (first, last) = (values[0].min(values[1]), values[0].max(values[1]));
        let half = if codec.key_axis == KeyAxis::Token { first } else { keys / 2 / usize::from(codec.group) * usize::from(codec.group) };
        pack_all(&mut layer, half, first, codec).expect("room");
        pack_all(&mut layer, keys, last, codec).expect("room");
        let all: Vec<usize> = (0..dim).collect();
        let keys = keys.max(half);
        for (head, tokens) in layer.caches.iter().flatten().zip([tokens[0], tokens[0], tokens[1], tokens[1]]) {
            prop_assert_eq!(head.keys.packed_tokens(), keys.min(tokens));
            prop_assert_eq!(head.values.packed_tokens(), last.min(tokens));
        }
        let exact: Vec<Contents> =
            before.iter().map(|b| {
                // A group cut short by the end of the cache is packed when it is asked for.
                expected(codec, b, keys, last, &all)
            }).collect();
        prop_assert_eq!(contents(&layer), exact.clone());
        prop_assert_eq!(layer.pool.held_bytes(), held(&layer, codec));
        // New tokens are whole, and the packed ones stay.
        layer.feed(seed, &[more, 1]);
        for (after, before) in contents(&layer).iter().zip(&exact) {
            prop_assert_eq!(&after[..before.len()], &before[..]);
        }
        for keep in [77, 40, 3] {
            for head in layer.caches.iter_mut().flatten() {
                head.truncate(&mut layer.pool, keep);
            }
            for (after, before) in contents(&layer).iter().zip(&exact) {
                let n = after.len().min(before.len());
                prop_assert_eq!(&after[..n], &before[..n]);
            }
            prop_assert_eq!(layer.pool.held_bytes(), held(&layer, codec));
        }
        layer.caches.iter_mut().flatten().for_each(|h| h.clear(&mut layer.pool));
        prop_assert_eq!(layer.pool.held_bytes(), 0);
    }

    #[test]
    fn attention_over_packed_caches_matches_the_reference(
        seed in any::<u64>(),
        codec in codecs(),
        group in prop::sample::select(vec![1usize, 3, 4, 13]),
        dim in prop::sample::select(vec![8usize, 64, 72, 128]),
        format in prop::sample::select(vec![KvFormat::F32, KvFormat::F16, KvFormat::Fp8]),
        window in prop::option::of(1u32..90),
        before in prop::sample::select(vec![1usize, 31, 32, 33, 64, 65, 100, 600]),
        keys in 0usize..5,
        values in prop::sample::select(vec![0usize, 1, 31, 32, 33, 64, 95, 513]),
        rows in 1usize..40,
    ) {
        let mut layer = Layer::new(2, AttendShape { window, ..shape(group, 1, dim) }, format);
        layer.feed(seed, &[before, 20]);
        pack_all(&mut layer, keys * usize::from(codec.group), values, codec).expect("room");
        layer.feed(seed, &[rows, 1]);
        check(&layer, false);
        layer.feed(seed, &[1, 1]);
        check(&layer, true);
    }

    #[test]
    fn tokens_can_be_packed_when_they_come(
        seed in any::<u64>(),
        codec in codecs(),
        chunks in prop::collection::vec(1usize..50, 1..6),
    ) {
        let codec = Codec { key_axis: KeyAxis::Token, ..codec };
        let (dim, width) = (64, 5 + 4 * 64);
        let rows: usize = chunks.iter().sum();
        let qkv = noise(seed, rows * width);
        let layer = Layer::new(1, shape(1, 2, dim), KvFormat::F16);
        let mut pool = BlockPool::new(dim, KvFormat::F16, 1 << 20);
        let mut caches = vec![HeadCache::default(), HeadCache::default()];
        let mut first_row = 0;
        for rows in chunks {
            let positions: Vec<u32> = (first_row as u32..).take(rows).collect();
            let positions = positions.as_slice();
            let mut items = [AppendItem { heads: &mut caches, first_row, rows, positions }];
            append_packed(&layer.threads, &mut pool, &mut items, &qkv, width, 5, 5 + 2 * dim, dim, codec)
                .expect("room");
            first_row += rows;
        }
        let all: Vec<usize> = (0..dim).collect();
        for (h, cache) in caches.iter().enumerate() {
            let plain: Contents = (0..rows)
                .map(|t| {
                    let at = |offset: usize| qkv[t * width + offset..][..dim].to_vec();
                    (at(5 + h * dim), at(5 + (2 + h) * dim))
                })
                .collect();
            let found: Contents = (0..rows).map(|t| (cache.key(&pool, t), cache.value(&pool, t))).collect();
            prop_assert_eq!(found, expected(codec, &plain, rows, rows, &all));
        }
        let block = codec.key_half_bytes(dim) + codec.value_half_bytes(dim);
        prop_assert_eq!(pool.held_bytes(), (2 * rows.div_ceil(32) * block) as u64);
        prop_assert_eq!(pool.peak_bytes(), pool.held_bytes());
    }
}
