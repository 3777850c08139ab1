//! Variation of tokens against those after them.

use std::ops::Range;

use crate::kv::{BlockPool, HeadCache};

/// The rank in its partition of each token that has a next partition; above 1 the others.
pub(super) fn ranks(
    pool: &BlockPool,
    head: &HeadCache,
    lag: usize,
    sinks: usize,
    scores: &mut [f32],
) {
    let (tokens, lag) = (scores.len(), lag.max(1));
    let whole = tokens.saturating_sub(sinks) / lag;
    // Fewer than two partitions: nothing has a next one.
    let ranked = whole.saturating_sub(1) * lag;
    for (i, score) in scores.iter_mut().enumerate() {
        *score = if i < sinks { 2.0 } else { 1.0 + i as f32 / tokens as f32 };
    }
    let dim = pool.head_dim();
    let of = |range: Range<usize>| {
        let mut both = [Vec::with_capacity(lag * dim), Vec::with_capacity(lag * dim)];
        for token in range {
            both[0].extend(head.key(pool, token));
            both[1].extend(head.value(pool, token));
        }
        both
    };
    let mut sum = vec![0.0; lag];
    let mut order = Vec::with_capacity(lag);
    let mut this = if ranked > 0 { of(sinks..sinks + lag) } else { Default::default() };
    for first in (sinks..sinks + ranked).step_by(lag) {
        let next = of(first + lag..first + 2 * lag);
        sum.fill(0.0);
        for (this, next) in this.iter().zip(&next) {
            for (sum, share) in sum.iter_mut().zip(variations(this, next, dim)) {
                *sum += share;
            }
        }
        order.clear();
        order.extend(0..lag);
        // Stable: of equal ones the lower position has the lower rank.
        order.sort_by(|a, b| sum[*a].total_cmp(&sum[*b]));
        for (rank, token) in order.iter().enumerate() {
            scores[first + token] = rank as f32 / lag as f32;
        }
        this = next;
    }
}

/// The softmax, over a partition's tokens, of their standard deviation over the channels, which are scaled to the range of
/// the next partition first. A channel without a range counts as zero.
fn variations(this: &[f32], next: &[f32], dim: usize) -> Vec<f32> {
    let mut low = vec![f32::INFINITY; dim];
    let mut high = vec![f32::NEG_INFINITY; dim];
    for row in next.chunks_exact(dim) {
        for ((low, high), x) in low.iter_mut().zip(&mut high).zip(row) {
            (*low, *high) = (low.min(*x), high.max(*x));
        }
    }
    let mut scaled = vec![0.0; dim];
    let mut all = Vec::with_capacity(this.len() / dim);
    for row in this.chunks_exact(dim) {
        for (((out, x), low), high) in scaled.iter_mut().zip(row).zip(&low).zip(&high) {
            *out = if high > low { (x - low) / (high - low) } else { 0.0 };
        }
        let mean = scaled.iter().sum::<f32>() / dim as f32;
        let square: f32 = scaled.iter().map(|x| (x - mean) * (x - mean)).sum();
        all.push((square / (dim - 1) as f32).sqrt());
    }
    let most = all.iter().copied().fold(0.0, f32::max);
    all.iter_mut().for_each(|x| *x = (*x - most).exp());
    let total: f32 = all.iter().sum();
    all.iter_mut().for_each(|x| *x /= total);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvFormat;
    use crate::testing::noise;

    fn head(keys: &[[f32; 8]], values: &[[f32; 8]]) -> (BlockPool, HeadCache) {
        use crate::append::{AppendItem, append};
        let mut pool = BlockPool::new(8, KvFormat::F32, 1 << 24);
        let mut heads = vec![HeadCache::default()];
        let rows: Vec<f32> =
            keys.iter().zip(values).flat_map(|(k, v)| k.iter().chain(v).copied()).collect();
        let positions: Vec<u32> = (0..keys.len() as u32).collect();
        let item =
            AppendItem { heads: &mut heads, first_row: 0, rows: keys.len(), positions: &positions };
        let threads = crate::threads::Threads::new(1);
        append(&threads, &mut pool, &mut [item], &rows, 16, 0, 8, 8).expect("room");
        (pool, heads.remove(0))
    }

    #[test]
    fn ranks_by_hand() {
        // One sink, two partitions of three, one token behind. The range of the second partition is 0..2 in each channel.
        let flat = |x: f32| [x; 8];
        let mut keys = [
            flat(9.0),
            flat(1.0),
            flat(0.0),
            flat(5.0),
            flat(0.0),
            flat(2.0),
            flat(1.0),
            flat(7.0),
        ];
        // Constant rows don't vary; this one does: scaled to 0 and 2 in turns.
        keys[2] = [0.0, 4.0, 0.0, 4.0, 0.0, 4.0, 0.0, 4.0];
        let (pool, head) = head(&keys, &[flat(1.0); 8]);
        let mut scores = [0.0; 8];
        ranks(&pool, &head, 3, 1, &mut scores);
        // Tokens 1 and 3 tie, the lower one has the lower rank. Values have no range at all.
        assert_eq!(scores[..4], [2.0, 0.0, 2.0 / 3.0, 1.0 / 3.0]);
        assert_eq!(scores[4..], [1.5, 1.625, 1.75, 1.875]);
        // Two partitions of four do not fit behind the sink: by age.
        ranks(&pool, &head, 4, 1, &mut scores);
        assert_eq!(scores, [2.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875]);
        // The spread of 0 2 0 2 0 2 0 2 is sqrt(8 / 7), of a constant 0.
        let found = variations(
            &[keys[1], keys[2], keys[3]].concat(),
            &[keys[4], keys[5], keys[6]].concat(),
            8,
        );
        let (least, most) = (1.0, (8.0f64 / 7.0).sqrt().exp());
        for (x, exact) in found.iter().zip([least, most, least]) {
            assert!((f64::from(*x) - exact / (2.0 * least + most)).abs() < 1e-6, "{found:?}");
        }
    }

    #[test]
    fn noise_ranks_as_in_double_precision() {
        let (lag, sinks, tokens) = (16, 4, 90);
        let rows = |seed| -> Vec<[f32; 8]> {
            noise(seed, tokens * 8).chunks(8).map(|r| r.try_into().expect("eight")).collect()
        };
        let (keys, values) = (rows(1), rows(2));
        let (pool, head) = head(&keys, &values);
        let mut scores = vec![0.0; tokens];
        ranks(&pool, &head, lag, sinks, &mut scores);
        // Behind the sinks 86 tokens: 5 partitions, of which 4 have a next one.
        for first in (sinks..sinks + 4 * lag).step_by(lag) {
            let mut exact = vec![0.0f64; lag];
            for rows in [&keys, &values] {
                let range = |d: usize| {
                    let next = rows[first + lag..first + 2 * lag].iter().map(|r| f64::from(r[d]));
                    next.fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)))
                };
                let spread: Vec<f64> = rows[first..first + lag]
                    .iter()
                    .map(|row| {
                        let scaled: Vec<f64> = (0..8)
                            .map(|d| (f64::from(row[d]) - range(d).0) / (range(d).1 - range(d).0))
                            .collect();
                        let mean = scaled.iter().sum::<f64>() / 8.0;
                        (scaled.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 7.0).sqrt()
                    })
                    .collect();
                let total: f64 = spread.iter().map(|x| x.exp()).sum();
                exact.iter_mut().zip(&spread).for_each(|(sum, x)| *sum += x.exp() / total);
            }
            for i in 0..lag {
                let rank = exact.iter().filter(|x| **x < exact[i]).count();
                assert_eq!(scores[first + i], rank as f32 / lag as f32, "token {}", first + i);
            }
        }
        assert!(scores[sinks + 4 * lag..].windows(2).all(|w| 1.0 < w[0] && w[0] < w[1]));
    }
}
