//! Naive kernels in double precision, straight from the definitions. The tests of this crate and of its users compare with
//! them.

use crate::attend::{AttendItem, AttendShape};
use crate::kv::{BlockPool, HeadCache};

/// `x W^T + bias` for `m` rows of `k` and `n` rows of weights.
#[must_use]
pub fn gemm(x: &[f32], weights: &[f32], k: usize, bias: Option<&[f32]>) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| {
        x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    x.chunks_exact(k)
        .flat_map(|x| {
            weights
                .chunks_exact(k)
                .enumerate()
                .map(move |(i, w)| dot(x, w) + bias.map_or(0.0, |b| f64::from(b[i])))
        })
        .collect()
}

/// Scores of a query against every cached token, minus infinity where it does not see it. It is row `row` of `rows`.
#[must_use]
pub fn scores(
    pool: &BlockPool,
    cache: &HeadCache,
    shape: &AttendShape,
    query: &[f32],
    row: usize,
    rows: usize,
) -> Vec<f64> {
    let end = (cache.tokens() + row + 1).saturating_sub(rows);
    let own = if end > 0 { cache.positions[end - 1] } else { 0 };
    (0..cache.tokens())
        .map(|t| {
            let near = shape
                .window
                .is_none_or(|w| i64::from(cache.positions[t]) > i64::from(own) - i64::from(w));
            if t >= end || !near {
                return f64::NEG_INFINITY;
            }
            let product: f64 = cache
                .key(pool, t)
                .iter()
                .zip(query)
                .map(|(k, q)| f64::from(*k) * f64::from(*q))
                .sum();
            let score = product * f64::from(shape.scale);
            shape.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        })
        .collect()
}

/// Softmax and the logarithm of its denominator.
#[must_use]
pub fn softmax(scores: &[f64]) -> (Vec<f64>, f64) {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; scores.len()], max);
    }
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    (scores.iter().map(|s| (s - max).exp() / total).collect(), max + total.ln())
}

/// The query of a head of a row.
fn query<'a>(
    shape: &AttendShape,
    qkv: &'a [f32],
    width: usize,
    row: usize,
    head: usize,
) -> &'a [f32] {
    &qkv[row * width + head * shape.head_dim..][..shape.head_dim]
}

/// Attention of one item: outputs of its rows and the logarithms of their softmax denominators.
#[must_use]
pub fn attend(
    pool: &BlockPool,
    item: &AttendItem<'_>,
    shape: &AttendShape,
    qkv: &[f32],
    width: usize,
) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for row in 0..item.rows {
        for head in 0..shape.heads {
            let cache = &item.heads[head / shape.group()];
            let q = query(shape, qkv, width, item.first_row + row, head);
            let (p, l) = softmax(&scores(pool, cache, shape, q, row, item.rows));
            let mut sums = vec![0.0; shape.head_dim];
            for (t, p) in p.iter().enumerate().filter(|(_, p)| **p > 0.0) {
                for (sum, v) in sums.iter_mut().zip(cache.value(pool, t)) {
                    *sum += p * f64::from(v);
                }
            }
            out.extend(sums);
            lse.push(l);
        }
    }
    (out, lse)
}

/// Per cached token of a KV head, the sum over the last `last` of an item's rows of the probability that they give it,
/// averaged over the group's heads.
#[must_use]
pub fn attention_mass(
    pool: &BlockPool,
    item: &AttendItem<'_>,
    kv_head: usize,
    shape: &AttendShape,
    qkv: &[f32],
    width: usize,
    last: usize,
) -> Vec<f64> {
    let cache = &item.heads[kv_head];
    let mut mass = vec![0.0; cache.tokens()];
    for row in item.rows - last..item.rows {
        for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
            let q = query(shape, qkv, width, item.first_row + row, head);
            let (p, _) = softmax(&scores(pool, cache, shape, q, row, item.rows));
            for (mass, p) in mass.iter_mut().zip(p) {
                *mass += p / shape.group() as f64;
            }
        }
    }
    mass
}
