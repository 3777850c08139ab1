//! How many tokens may go before the newest query's attention loses too much.

use super::{Protect, rank_keys};
use crate::attend::AttendShape;
use crate::kv::{BlockPool, HeadCache};
use crate::threads::{Disjoint, Threads};

/// The caches of one sequence in one layer.
pub struct WithinItem<'a> {
    /// Caches of its KV heads; all hold the same number of tokens.
    pub heads: &'a [HeadCache],
    /// The row of the newest query.
    pub row: usize,
    /// Tokens of the sequence so far.
    pub seen: u32,
    /// One score per cached token of each KV head, as [`super::evict`] takes them.
    pub scores: &'a [Vec<f32>],
    /// Tokens that may stay, at most.
    pub most: usize,
}

/// Tokens that every head of each item keeps: the fewest at which the attention weights of the newest query, sinks apart,
/// keep `1 - loss` of their Euclidean length, the mean over query heads. Tokens go in the order of their scores, those of
/// the recent ones last; one that is no sink stays in any case. Protected sinks always stay and count in no length.
///
/// # Panics
/// If the sizes do not fit each other.
#[must_use]
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn within(
    threads: &Threads,
    pool: &BlockPool,
    items: &[WithinItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    protect: Protect,
    loss: f64,
) -> Vec<usize> {
    shape.check(pool, qkv, qkv_width);
    let rows = qkv.len() / qkv_width;
    for item in items {
        shape.check_item(item.heads.len(), item.row + 1, rows);
        assert_eq!(item.scores.len(), item.heads.len(), "not the scores of each head");
    }
    let kv_heads = shape.kv_heads;
    let mut left = vec![Vec::new(); items.len() * kv_heads];
    let out = Disjoint::new(&mut left);
    threads.run(items.len() * kv_heads, |i| {
        let (item, head) = (&items[i / kv_heads], i % kv_heads);
        let group = shape.group();
        let from = item.row * qkv_width + head * group * shape.head_dim;
        let queries = &qkv[from..from + group * shape.head_dim];
        // SAFETY: each task has its own place.
        unsafe { *out.item_mut(i) = lengths_left(pool, item, head, shape, queries, protect) };
    });
    items
        .iter()
        .zip(left.chunks(kv_heads))
        .map(|(item, left)| {
            let tokens = item.heads.first().map_or(0, HeadCache::tokens);
            (tokens - droppable(left, loss)).min(item.most)
        })
        .collect()
}

/// The largest number of tokens that may go: `left[head][i]` is what is left, summed over the head's queries, when `i` are
/// gone.
fn droppable(left: &[Vec<f64>], loss: f64) -> usize {
    let sum = |i: usize| left.iter().filter_map(|l| l.get(i)).sum::<f64>();
    let candidates = left.iter().map(Vec::len).min().unwrap_or(0);
    let full = sum(0);
    // Nothing but the sinks is attended to: what has no weight may go.
    let lost = |i: usize| if full > 0.0 { (full - sum(i)) / full } else { 0.0 };
    // What is left falls with every token.
    (1..candidates).take_while(|i| lost(*i) <= loss).last().unwrap_or(0)
}

/// Length of the weights that are left when the first 0, 1, 2, ... candidates of one KV head are gone, summed over its
/// query heads.
fn lengths_left(
    pool: &BlockPool,
    item: &WithinItem<'_>,
    head: usize,
    shape: &AttendShape,
    queries: &[f32],
    protect: Protect,
) -> Vec<f64> {
    let cache = &item.heads[head];
    let tokens = cache.tokens();
    let dim = shape.head_dim;
    let keys: Vec<u64> =
        rank_keys(&item.scores[head], &cache.positions, item.seen, protect).collect();
    let mut order: Vec<usize> =
        (0..tokens).filter(|t| cache.positions[*t] >= protect.sinks).collect();
    order.sort_unstable_by_key(|t| keys[*t]);
    let group = queries.len() / dim;
    let mut logits = vec![0.0f64; group * tokens];
    for token in 0..tokens {
        let key = cache.key(pool, token);
        for (query, logits) in queries.chunks(dim).zip(logits.chunks_mut(tokens)) {
            let product: f32 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
            let scaled = product * shape.scale;
            let capped = shape.softcap.map_or(scaled, |cap| cap * (scaled / cap).tanh());
            logits[token] = f64::from(capped);
        }
    }
    let mut left = vec![0.0; order.len()];
    for weights in logits.chunks_mut(tokens.max(1)) {
        let most = weights.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
        weights.iter_mut().for_each(|w| *w = (*w - most).exp());
        let total: f64 = weights.iter().sum();
        let mut squares = 0.0;
        for (token, left) in order.iter().zip(&mut left).rev() {
            let share = weights[*token] / total;
            squares += share * share;
            *left += squares.sqrt();
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_weights_keep_the_square_of_what_may_not_be_lost() {
        // 2,000 weights of 1: what is left of their length is sqrt(kept / 2000), so (1 - T)^2 of them stay.
        let left: Vec<f64> = (0..2000).map(|gone| f64::from(2000 - gone).sqrt()).collect();
        for loss in [0.01, 0.1, 0.5] {
            let kept = 2000 - droppable(&[left.clone(), left.clone()], loss);
            let expected = (1.0 - loss) * (1.0 - loss) * 2000.0;
            assert!((kept as f64 - expected).abs() <= 1.0, "{kept} for {expected}");
        }
        // One candidate stays whatever is allowed; nothing goes where nothing may.
        assert_eq!(droppable(std::slice::from_ref(&left), 1.0), 1999);
        assert_eq!(droppable(&[left], 0.0), 0);
    }

    #[test]
    fn more_goes_the_more_may_be_lost_and_never_more_than_that() {
        // Lengths that fall by uneven steps, in two heads that disagree.
        let falling = |seed: u64| -> Vec<f64> {
            let steps = crate::testing::noise(seed, 300);
            let mut left: Vec<f64> = (steps.iter())
                .scan(0.0, |sum, step| {
                    *sum += f64::from(step * step);
                    Some(*sum)
                })
                .collect();
            left.reverse();
            left
        };
        let heads = [falling(1), falling(2)];
        let sum = |gone: usize| heads.iter().map(|h| h[gone]).sum::<f64>();
        let gone: Vec<usize> = (0..=20).map(|l| droppable(&heads, f64::from(l) / 20.0)).collect();
        assert!(gone.is_sorted() && gone[10] > gone[1], "{gone:?}");
        for (loss, gone) in (0..=20).zip(gone) {
            let lost = |gone| (sum(0) - sum(gone)) / sum(0);
            assert!(lost(gone) <= f64::from(loss) / 20.0);
            assert!(gone + 1 == 300 || lost(gone + 1) > f64::from(loss) / 20.0);
        }
    }

    #[test]
    fn leading_tokens_without_weight_may_go_for_nothing() {
        assert_eq!(droppable(&[vec![2.0, 2.0, 2.0, 1.0]], 0.0), 2);
        assert_eq!(droppable(&[vec![0.0; 4]], 0.01), 3);
        // The mean of 3 and 1 lost by half where the first query loses all.
        assert_eq!(droppable(&[vec![3.0, 0.0], vec![1.0, 1.0]], 0.75), 1);
        assert_eq!(droppable(&[vec![3.0, 0.0], vec![1.0, 1.0]], 0.7), 0);
        assert_eq!(droppable(&[], 0.5), 0);
    }
}
