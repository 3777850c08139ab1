//! The attention that cached tokens may expect of queries to come, from the distribution of those of this step.

use super::RankItem;
use crate::attend::AttendShape;
use crate::kv::{BlockPool, HeadCache};
use crate::rope::{RopeLayout, RopeTable, turn};
use crate::simd::{Isa, Simd, isa, multiversion};
use crate::threads::{Disjoint, Threads};

/// How the step's queries have been rotated.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Position of each row.
    pub positions: &'a [u32],
    /// The angles.
    pub table: &'a RopeTable,
    /// The pairs.
    pub layout: RopeLayout,
}

/// Queries that are multiplied at once.
const BATCH: usize = 4;

/// Scores the tokens of every head: `scores[item * kv_heads + head][token]`.
///
/// With mean mu and covariance Sigma of a query head's rows from position `sinks` on, before their rotation, both turned by
/// the mean rotation of the `future` positions after the sequence's last, a key k has the weight
/// exp(s k.mu + s^2 k.Sigma k / 2), s the scale of the shape, normalised over the head's tokens from position `sinks` on.
/// The score is the mean weight over the group's heads times the length of the value, and infinite for the sinks. A
/// logit cap is not part of it.
///
/// # Panics
/// If the sizes do not fit each other.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn expected_attention(
    threads: &Threads,
    pool: &BlockPool,
    items: &[RankItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    rotation: Rotation<'_>,
    (sinks, future): (u32, u32),
    scores: &mut Vec<Vec<f32>>,
) {
    shape.check(pool, qkv, qkv_width);
    let rows = (qkv.len() / qkv_width).min(rotation.positions.len());
    assert!(rotation.table.rotary_dim() <= shape.head_dim, "more rotated channels than channels");
    for item in items {
        shape.check_item(item.heads.len(), item.first_row + item.rows, rows);
    }
    let step = Step { pool, shape, qkv, qkv_width, rotation, sinks, future };
    step.run(isa(), threads, items, scores);
}

/// What all tasks share.
struct Step<'a> {
    pool: &'a BlockPool,
    shape: &'a AttendShape,
    qkv: &'a [f32],
    qkv_width: usize,
    rotation: Rotation<'a>,
    sinks: u32,
    future: u32,
}

impl Step<'_> {
    fn run(&self, isa: Isa, threads: &Threads, items: &[RankItem<'_>], scores: &mut Vec<Vec<f32>>) {
        let (heads, kv_heads, group) = (self.shape.heads, self.shape.kv_heads, self.shape.group());
        let mut weights = vec![Vec::new(); items.len() * heads];
        let out = Disjoint::new(&mut weights);
        threads.run(items.len() * heads, |i| {
            let (item, head) = (&items[i / heads], i % heads);
            let cache = &item.heads[head / group];
            // SAFETY: each task has its own head's weights; `isa` is available.
            unsafe { *out.item_mut(i) = run_weights(isa, self, item, head, cache) };
        });
        scores.resize_with(items.len() * kv_heads, Vec::new);
        let out = Disjoint::new(scores);
        threads.run(items.len() * kv_heads, |i| {
            let head = &items[i / kv_heads].heads[i % kv_heads];
            // SAFETY: each task has its own head's scores.
            let scores = unsafe { out.item_mut(i) };
            scores.clear();
            for (token, position) in head.positions.iter().enumerate() {
                let weights = &weights[i * group..(i + 1) * group];
                let mean = weights.iter().map(|w| w[token]).sum::<f32>() / group as f32;
                let value = head.value(self.pool, token);
                let length = value.iter().map(|x| x * x).sum::<f32>().sqrt();
                scores.push(if *position < self.sinks { f32::INFINITY } else { mean * length });
            }
        });
    }

    /// Mean and covariance of a head's queries before their rotation; zero where no row counts.
    #[inline(always)]
    fn distribution(&self, item: &RankItem<'_>, head: usize) -> (Vec<f32>, Vec<f32>) {
        let dim = self.shape.head_dim;
        let rows = item.first_row..item.first_row + item.rows;
        let counts = |row: &usize| self.rotation.positions[*row] >= self.sinks;
        let rows: Vec<usize> = rows.filter(counts).collect();
        let query = |row: usize, out: &mut [f32]| {
            out.copy_from_slice(&self.qkv[row * self.qkv_width + head * dim..][..dim]);
            let Rotation { positions, table, layout } = self.rotation;
            table.turn_back(out, positions[row], layout);
        };
        let mut batch = vec![0.0; BATCH * dim];
        let mut sums = vec![0.0f64; dim];
        for row in &rows {
            query(*row, &mut batch[..dim]);
            sums.iter_mut().zip(&batch).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        let share = 1.0 / rows.len().max(1) as f64;
        let mean: Vec<f32> = sums.iter().map(|sum| (sum * share) as f32).collect();
        let mut covariance = vec![0.0; dim * dim];
        for rows in rows.chunks(BATCH) {
            batch.fill(0.0);
            for (row, out) in rows.iter().zip(batch.chunks_exact_mut(dim)) {
                query(*row, out);
                out.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean);
            }
            let (a, rest) = batch.split_at(dim);
            let (b, rest) = rest.split_at(dim);
            let (c, d) = rest.split_at(dim);
            for (i, sums) in covariance.chunks_exact_mut(dim).enumerate() {
                let (ai, bi, ci, di) = (a[i], b[i], c[i], d[i]);
                for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                    *sum += ai * a + bi * b + ci * c + di * d;
                }
            }
        }
        covariance.iter_mut().for_each(|x| *x = (f64::from(*x) * share) as f32);
        (mean, covariance)
    }

    /// Turns both by the mean rotation R of the positions ahead: R mu and R Sigma R^T.
    #[inline(always)]
    fn turn_ahead(&self, from: u32, mean: &mut [f32], covariance: &mut [f32]) {
        let dim = self.shape.head_dim;
        let turns = self.rotation.table.mean_turn(from, self.future);
        for (i, (cos, sin)) in turns.iter().enumerate() {
            let (a, b) = self.rotation.layout.pair(i, turns.len());
            (mean[a], mean[b]) = turn(mean[a], mean[b], *cos, *sin);
            for d in 0..dim {
                let (x, y) = (covariance[a * dim + d], covariance[b * dim + d]);
                (covariance[a * dim + d], covariance[b * dim + d]) = turn(x, y, *cos, *sin);
            }
        }
        for row in covariance.chunks_exact_mut(dim) {
            for (i, (cos, sin)) in turns.iter().enumerate() {
                let (a, b) = self.rotation.layout.pair(i, turns.len());
                (row[a], row[b]) = turn(row[a], row[b], *cos, *sin);
            }
        }
    }
}

multiversion! {
    /// # Safety
    /// The item's rows lie in the step's.
    unsafe fn run_weights(step: &Step<'_>, item: &RankItem<'_>, head: usize, cache: &HeadCache) -> Vec<f32> = weights_body
}

/// Weights of the cached tokens by one query head; zero for the sinks. Plain loops: what an `Isa` adds is the width at
/// which they are compiled, never another order of sums.
#[inline(always)]
unsafe fn weights_body<S: Simd>(
    _: S,
    step: &Step<'_>,
    item: &RankItem<'_>,
    head: usize,
    cache: &HeadCache,
) -> Vec<f32> {
    let dim = step.shape.head_dim;
    let (mut mean, mut covariance) = step.distribution(item, head);
    step.turn_ahead(item.seen, &mut mean, &mut covariance);
    let scale = step.shape.scale;
    let mut weights = vec![f32::NEG_INFINITY; cache.tokens()];
    let mut product = vec![0.0; dim];
    for (token, weight) in weights.iter_mut().enumerate() {
        if cache.positions[token] < step.sinks {
            continue;
        }
        let key = cache.key(step.pool, token);
        product.fill(0.0);
        for (x, row) in key.iter().zip(covariance.chunks_exact(dim)) {
            product.iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
        }
        let dot = |a: &[f32]| -> f32 { a.iter().zip(&key).map(|(x, y)| x * y).sum() };
        *weight = scale * dot(&mean) + 0.5 * scale * scale * dot(&product);
    }
    let most = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if most == f32::NEG_INFINITY {
        weights.fill(0.0);
        return weights;
    }
    weights.iter_mut().for_each(|x| *x = (*x - most).exp());
    let total: f64 = weights.iter().map(|x| f64::from(*x)).sum();
    weights.iter_mut().for_each(|x| *x = (f64::from(*x) / total) as f32);
    weights
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvFormat;
    use crate::testing::{Layer, assert_close};

    fn shape(group: usize, kv_heads: usize, head_dim: usize) -> AttendShape {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let heads = group * kv_heads;
        AttendShape { heads, kv_heads, head_dim, scale, softcap: None, window: None }
    }

    fn expected(isa: Isa, layer: &mut Layer, rotation: Rotation<'_>, future: u32) -> Vec<Vec<f32>> {
        let mut items: Vec<RankItem<'_>> = Vec::new();
        for ((heads, step), seen) in layer.caches.iter_mut().zip(&layer.step).zip(&layer.seen) {
            items.push(RankItem { heads, first_row: step.0, rows: step.1, seen: *seen });
        }
        let step = Step {
            pool: &layer.pool,
            shape: &layer.shape,
            qkv: &layer.qkv,
            qkv_width: layer.width,
            rotation,
            sinks: 4,
            future,
        };
        let mut scores = vec![vec![9.0; 3]; 7];
        step.run(isa, &layer.threads, &items, &mut scores);
        scores
    }

    /// A vector at angle 0 turned to a position, or back, in double precision.
    fn turned(x: &[f64], angles: &[f64], by: f64, layout: RopeLayout) -> Vec<f64> {
        let mut out = x.to_vec();
        for (i, angle) in angles.iter().enumerate() {
            let (a, b) = layout.pair(i, angles.len());
            let (sin, cos) = (angle * by).sin_cos();
            (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin);
        }
        out
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(x, y)| x * y).sum()
    }

    fn f64s(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

    #[test]
    fn scores_match_their_definition_in_double_precision() {
        let (dim, group, future) = (16, 3, 20u32);
        // Twelve of sixteen channels are rotated.
        let frequencies = [1.0f32, 0.5, 0.2, 0.1, 0.01, 0.001];
        let table = RopeTable::new(&frequencies, 64, 1.0);
        let angles = f64s(&frequencies);
        for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
            let mut layer = Layer::new(2, shape(group, 2, dim), KvFormat::F32);
            layer.feed(3, &[50, 13]);
            let positions: Vec<u32> = (0..50).chain(0..13).collect();
            let rotation = Rotation { positions: &positions, table: &table, layout };
            for isa in Isa::available() {
                let scores = expected(isa, &mut layer, rotation, future);
                for (i, found) in scores.iter().enumerate() {
                    let (sequence, kv_head) = (i / 2, i % 2);
                    let (first, rows) = layer.step[sequence];
                    let cache = &layer.caches[sequence][kv_head];
                    let mut exact = vec![0.0; rows - 4];
                    for head in kv_head * group..(kv_head + 1) * group {
                        let queries: Vec<Vec<f64>> = (first + 4..first + rows)
                            .map(|row| {
                                let q = f64s(&layer.qkv[row * layer.width + head * dim..][..dim]);
                                turned(&q, &angles, -f64::from(positions[row]), layout)
                            })
                            .collect();
                        let n = queries.len() as f64;
                        let mean: Vec<f64> = (0..dim)
                            .map(|d| queries.iter().map(|q| q[d]).sum::<f64>() / n)
                            .collect();
                        // k.R x of the mean rotation R is the mean over the positions ahead.
                        let ahead = |k: &[f64], x: &[f64]| {
                            let at =
                                |p| dot(k, &turned(x, &angles, f64::from(rows as u32 + p), layout));
                            (0..future).map(at).sum::<f64>() / f64::from(future)
                        };
                        let logit = |token: usize| {
                            let key = f64s(&cache.key(&layer.pool, token));
                            // k.R Sigma R^T k is the variance of k.R q.
                            let centre = ahead(&key, &mean);
                            let spread = queries.iter().map(|q| (ahead(&key, q) - centre).powi(2));
                            let variance = spread.sum::<f64>() / n;
                            centre / 4.0 + variance / 16.0 / 2.0
                        };
                        let logits: Vec<f64> = (4..rows).map(logit).collect();
                        let total: f64 = logits.iter().map(|x| x.exp()).sum();
                        for (token, x) in logits.iter().enumerate() {
                            let value = f64s(&cache.value(&layer.pool, 4 + token));
                            exact[token] += x.exp() / total / 3.0 * dot(&value, &value).sqrt();
                        }
                    }
                    assert!(found[..4].iter().all(|x| *x == f32::INFINITY));
                    assert_close(&found[4..], &exact, 3e-6, "expected attention");
                }
            }
        }
    }

    #[test]
    fn equal_queries_and_one_position_ahead_give_that_query_s_softmax() {
        // No rotation and equal queries: mu is the query, Sigma zero.
        let table = RopeTable::new(&[0.0; 4], 16, 1.0);
        let positions: Vec<u32> = (0..7).collect();
        let rotation = Rotation { positions: &positions, table: &table, layout: RopeLayout::Half };
        let mut layer = Layer::new(1, shape(1, 1, 8), KvFormat::F32);
        layer.feed(1, &[7]);
        let width = layer.width;
        for row in 0..7 {
            let query = &mut layer.qkv[row * width..row * width + 8];
            query.fill(0.0);
            query[2] = 8.0f32.sqrt() * 2.0;
        }
        let scores = expected(Isa::available()[0], &mut layer, rotation, 1);
        let head = &layer.caches[0][0];
        // The scale 1 / sqrt(8) makes the logit twice the third channel.
        let logit = |token| f64::from(head.key(&layer.pool, token)[2] * 2.0).exp();
        let total: f64 = (4..7).map(logit).sum();
        let exact: Vec<f64> = (4..7)
            .map(|token| {
                let value = f64s(&head.value(&layer.pool, token));
                logit(token) / total * dot(&value, &value).sqrt()
            })
            .collect();
        assert_close(&scores[0][4..], &exact, 1e-6, "one query");
    }
}
