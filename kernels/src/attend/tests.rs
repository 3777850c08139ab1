//! Attention against a plain f64 version, and the promises of the module's head bit by bit.

use proptest::prelude::*;

use super::*;
use crate::append::{AppendItem, append};
use crate::gemm::{Packed, WeightFormat};
use crate::kv::KvFormat;
use crate::threads::Threads;

fn made(len: usize, seed: u64) -> Vec<f32> {
    let mut out = vec![0.0; len];
    Packed::synthetic(1, len, WeightFormat::F32, seed, 1.0).row(0, &mut out);
    out
}

struct Case {
    pool: BlockPool,
    heads: Vec<HeadCache>,
    qkv: Vec<f32>,
    width: usize,
    rows: usize,
}

/// A sequence of `tokens` tokens, its rows in one buffer.
fn case(shape: &AttendShape, format: KvFormat, tokens: usize, seed: u64) -> Case {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let qkv = made(tokens * width, seed);
    let mut pool = BlockPool::new(shape.head_dim, format, 1 << 30);
    let mut heads: Vec<_> = (0..shape.kv_heads).map(|_| HeadCache::default()).collect();
    write(&mut pool, &mut heads, shape, &qkv, 0, tokens);
    Case { pool, heads, qkv, width, rows: tokens }
}

fn write(
    pool: &mut BlockPool,
    heads: &mut [HeadCache],
    shape: &AttendShape,
    qkv: &[f32],
    first_row: usize,
    rows: usize,
) {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let keys = shape.heads * shape.head_dim;
    let values = keys + shape.kv_heads * shape.head_dim;
    let first_position = first_row as u32;
    let mut items = [AppendItem { heads, first_row, rows, first_position }];
    append(&Threads::new(1), pool, &mut items, qkv, width, keys, values, shape.head_dim)
        .expect("room");
}

/// softmax(scale q k^T) v in f64, from what the cache holds.
fn reference(case: &Case, shape: &AttendShape, row: usize, head: usize) -> (Vec<f64>, f64) {
    let cache = &case.heads[head / shape.group()];
    let q = &case.qkv[row * case.width + head * shape.head_dim..][..shape.head_dim];
    let sees = cache.tokens() - (case.rows - 1 - row);
    let mut scores = Vec::new();
    for t in 0..sees {
        let dot: f64 = cache
            .key(&case.pool, t)
            .iter()
            .zip(q)
            .map(|(k, q)| f64::from(*k) * f64::from(*q))
            .sum();
        let mut score = dot * f64::from(shape.scale);
        if let Some(cap) = shape.softcap {
            score = f64::from(cap) * (score / f64::from(cap)).tanh();
        }
        let hidden =
            shape.window.is_some_and(|w| cache.positions[t] + w <= cache.positions[sees - 1]);
        scores.push(if hidden { f64::NEG_INFINITY } else { score });
    }
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let mut out = vec![0.0; shape.head_dim];
    for (t, score) in scores.iter().enumerate() {
        let p = (score - max).exp() / sum;
        for (out, v) in out.iter_mut().zip(cache.value(&case.pool, t)) {
            *out += p * f64::from(v);
        }
    }
    (out, max + sum.ln())
}

fn shapes() -> impl Strategy<Value = AttendShape> {
    (
        prop::sample::select(vec![1usize, 2, 3, 4, 7, 8]),
        1..3usize,
        prop::sample::select(vec![8usize, 64, 80, 96, 128]),
        prop::option::of(prop::sample::select(vec![3u32, 20, 50])),
        prop::option::of(Just(5.0f32)),
    )
        .prop_map(|(group, kv_heads, head_dim, window, softcap)| AttendShape {
            heads: group * kv_heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f32).sqrt().recip(),
            softcap,
            window,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn prefill_agrees_with_f64(
        shape in shapes(), tokens in 1..150usize, format in 0..3u8, seed in 0..1000u64,
    ) {
        let format = [KvFormat::F32, KvFormat::F16, KvFormat::Bf16][format as usize];
        let case = case(&shape, format, tokens, seed);
        let items = [AttendItem { heads: &case.heads, first_row: 0, rows: tokens }];
        let mut out = vec![f32::NAN; tokens * shape.heads * shape.head_dim];
        let mut lse = vec![f32::NAN; tokens * shape.heads];
        attend_prefill(&Threads::new(2), &case.pool, &items, &shape, &case.qkv, case.width, &mut out, Some(&mut lse));
        for row in [0, tokens / 2, tokens - 1] {
            for head in 0..shape.heads {
                let (exact, exact_lse) = reference(&case, &shape, row, head);
                let got = &out[(row * shape.heads + head) * shape.head_dim..][..shape.head_dim];
                for (got, exact) in got.iter().zip(&exact) {
                    prop_assert!((f64::from(*got) - exact).abs() < 2e-5, "row {row} head {head}: {got} {exact}");
                }
                prop_assert!((f64::from(lse[row * shape.heads + head]) - exact_lse).abs() < 2e-5);
            }
        }
    }

    #[test]
    fn decode_agrees_with_f64(
        shape in shapes(), tokens in 1..700usize, format in 0..3u8, seed in 0..1000u64,
    ) {
        let format = [KvFormat::F32, KvFormat::F16, KvFormat::Bf16][format as usize];
        let mut case = case(&shape, format, tokens, seed);
        // Only the last row asks.
        case.qkv.drain(..(tokens - 1) * case.width);
        case.rows = 1;
        let items = [AttendItem { heads: &case.heads, first_row: 0, rows: 1 }];
        let mut out = vec![f32::NAN; shape.heads * shape.head_dim];
        let mut lse = vec![f32::NAN; shape.heads];
        attend_decode(&Threads::new(2), &case.pool, &items, &shape, &case.qkv, case.width, &mut out, Some(&mut lse));
        for head in 0..shape.heads {
            let (exact, exact_lse) = reference(&case, &shape, 0, head);
            for (got, exact) in out[head * shape.head_dim..].iter().zip(&exact) {
                prop_assert!((f64::from(*got) - exact).abs() < 2e-5, "{got} {exact}");
            }
            prop_assert!((f64::from(lse[head]) - exact_lse).abs() < 2e-5);
        }
    }

    /// A prompt in chunks, rows of any size, any number of threads: the same bits.
    #[test]
    fn chunks_and_threads_change_no_bit(shape in shapes(), tokens in 2..150usize, chunk in 1..80usize, seed in 0..1000u64) {
        let whole = case(&shape, KvFormat::F16, tokens, seed);
        let out_width = shape.heads * shape.head_dim;
        let mut expected = vec![0.0f32; tokens * out_width];
        let items = [AttendItem { heads: &whole.heads, first_row: 0, rows: tokens }];
        attend_prefill(&Threads::new(1), &whole.pool, &items, &shape, &whole.qkv, whole.width, &mut expected, None);
        let mut pool = BlockPool::new(shape.head_dim, KvFormat::F16, 1 << 30);
        let mut heads: Vec<_> = (0..shape.kv_heads).map(|_| HeadCache::default()).collect();
        let mut out = vec![0.0f32; tokens * out_width];
        for first in (0..tokens).step_by(chunk) {
            let rows = chunk.min(tokens - first);
            write(&mut pool, &mut heads, &shape, &whole.qkv, first, rows);
            let items = [AttendItem { heads: &heads, first_row: first, rows }];
            attend_prefill(&Threads::new(3), &pool, &items, &shape, &whole.qkv, whole.width, &mut out, None);
        }
        prop_assert_eq!(out, expected);
    }

    /// The mass of all queries over all keys is the number of queries times the group.
    #[test]
    fn probabilities_sum_to_one(shape in shapes(), tokens in 1..120usize, last in 1..130usize, seed in 0..1000u64) {
        let case = case(&shape, KvFormat::F32, tokens, seed);
        let items = [AttendItem { heads: &case.heads, first_row: 0, rows: tokens }];
        let mut out = vec![0.0; tokens * shape.heads * shape.head_dim];
        let mut lse = vec![0.0; tokens * shape.heads];
        attend_prefill(&Threads::new(1), &case.pool, &items, &shape, &case.qkv, case.width, &mut out, Some(&mut lse));
        let mut mass = vec![0.0; tokens];
        attention_mass(&mass::Mass {
            head: &case.heads[0], pool: &case.pool, shape: &shape, kv_head: 0, first_row: 0,
            rows: tokens, last, qkv: &case.qkv, qkv_width: case.width, lse: &lse,
        }, &mut mass);
        let expected = (last.min(tokens) * shape.group()) as f32;
        let sum: f32 = mass.iter().sum();
        prop_assert!((sum - expected).abs() < 1e-3 * expected, "{sum} {expected}");
    }
}

#[test]
fn empty_sequences_give_zeros() {
    let shape =
        AttendShape { heads: 2, kv_heads: 1, head_dim: 8, scale: 1.0, softcap: None, window: None };
    let pool = BlockPool::new(8, KvFormat::F16, 1 << 20);
    let heads = vec![HeadCache::default()];
    let items = [AttendItem { heads: &heads, first_row: 0, rows: 1 }];
    let qkv = vec![1.0; 32];
    for run in [attend_prefill, attend_decode] {
        let mut out = vec![f32::NAN; 16];
        let mut lse = vec![0.0; 2];
        run(&Threads::new(1), &pool, &items, &shape, &qkv, 32, &mut out, Some(&mut lse));
        assert!(out.iter().all(|o| *o == 0.0));
        assert!(lse.iter().all(|l| *l == f32::NEG_INFINITY));
    }
}
