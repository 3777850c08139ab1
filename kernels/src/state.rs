//! What is left of dropped tokens: a state of constant size per KV head, which attention reads beside the cache (`LESS`).
//!
//! A dropped token with key k and value v adds `psi(k)^T v` to a matrix of `rank x head_dim` and `psi(k)` to a vector of
//! `rank`. A query q finds `phi(q) . matrix` as numerator and `phi(q) . vector` as denominator, in the same unit as the
//! exponentials of the scores of the tokens that stay. Both maps are small networks, never negative:
//! `phi(q) = |gelu(gelu(q A) B)|`; `psi(k) = |f + (f M) * gate|` with `f = |scale| * gelu(gelu(k A) B)`.
//! A state that no token has reached, and one whose weight for a query is zero, changes no bit of its output.

use crate::attend::{AttendItem, AttendShape};
use crate::evict::{EvictItem, Protect, best};
use crate::kv::{BlockPool, Half, HeadCache, PoolFull};
use crate::threads::{Disjoint, Threads};

/// Two products with an activation behind each: `gelu(gelu(x A) B)`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Network {
    /// `[head_dim][hidden]`.
    pub first: Vec<f32>,
    /// `[hidden][rank]`.
    pub second: Vec<f32>,
}

/// The map of the keys of a KV head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeyMap {
    /// Its network.
    pub network: Network,
    /// `[rank][rank]`.
    pub mix: Vec<f32>,
    /// `[rank]`.
    pub scale: Vec<f32>,
    /// `[rank]`.
    pub gate: Vec<f32>,
}

/// The maps of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Maps {
    /// Rows of the state.
    pub rank: usize,
    /// Width of the networks.
    pub hidden: usize,
    /// One per query head.
    pub queries: Vec<Network>,
    /// One per KV head.
    pub keys: Vec<KeyMap>,
}

/// The state of a KV head: `[rank][head_dim]`, then `[rank]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub(crate) half: Half,
    pub(crate) rank: usize,
}

fn gelu(x: f32) -> f32 {
    // The usual approximation by tanh.
    let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// `y = x A` for `A` of `[x][y]`.
fn product(x: &[f32], a: &[f32], y: &mut [f32]) {
    y.fill(0.0);
    for (x, row) in x.iter().zip(a.chunks_exact(y.len())) {
        y.iter_mut().zip(row).for_each(|(y, a)| *y += x * a);
    }
}

impl Network {
    fn run(&self, x: &[f32], hidden: &mut [f32], out: &mut [f32]) {
        product(x, &self.first, hidden);
        hidden.iter_mut().for_each(|h| *h = gelu(*h));
        product(hidden, &self.second, out);
        out.iter_mut().for_each(|o| *o = gelu(*o));
    }
}

impl Maps {
    /// `phi` of a query of a head.
    ///
    /// # Panics
    /// If there is no such head or a width is another.
    #[must_use]
    pub fn phi(&self, head: usize, query: &[f32]) -> Vec<f32> {
        let (mut hidden, mut out) = (vec![0.0; self.hidden], vec![0.0; self.rank]);
        self.queries[head].run(query, &mut hidden, &mut out);
        out.iter_mut().for_each(|x| *x = x.abs());
        out
    }

    /// `psi` of a key of a KV head.
    ///
    /// # Panics
    /// If there is no such head or a width is another.
    #[must_use]
    pub fn psi(&self, head: usize, key: &[f32]) -> Vec<f32> {
        let map = &self.keys[head];
        let (mut hidden, mut first) = (vec![0.0; self.hidden], vec![0.0; self.rank]);
        map.network.run(key, &mut hidden, &mut first);
        first.iter_mut().zip(&map.scale).for_each(|(x, scale)| *x *= scale.abs());
        let mut out = vec![0.0; self.rank];
        product(&first, &map.mix, &mut out);
        for ((out, first), gate) in out.iter_mut().zip(&first).zip(&map.gate) {
            *out = (first + *out * gate).abs();
        }
        out
    }

    /// Checks the widths against a shape.
    ///
    /// # Panics
    /// If one is another.
    fn check(&self, shape: &AttendShape) {
        let (rank, hidden, dim) = (self.rank, self.hidden, shape.head_dim);
        let fits = |n: &Network| n.first.len() == dim * hidden && n.second.len() == hidden * rank;
        let key = |k: &KeyMap| {
            fits(&k.network)
                && k.mix.len() == rank * rank
                && k.scale.len() == rank
                && k.gate.len() == rank
        };
        assert_eq!((self.queries.len(), self.keys.len()), (shape.heads, shape.kv_heads), "maps");
        assert!(self.queries.iter().all(fits) && self.keys.iter().all(key), "widths of maps");
    }
}

/// Bytes of a state.
#[must_use]
pub fn state_bytes(rank: usize, head_dim: usize) -> usize {
    4 * rank * (head_dim + 1)
}

impl HeadCache {
    /// Takes memory for a state of `rank` rows, of zeros, if it has none.
    ///
    /// # Errors
    /// If the budget has no room; nothing is taken then.
    pub fn open_state(&mut self, pool: &mut BlockPool, rank: usize) -> Result<(), PoolFull> {
        if self.state.is_none() {
            let bytes = state_bytes(rank, pool.head_dim());
            let half = pool.try_alloc_bytes(bytes)?;
            // SAFETY: the half has so many bytes and is this head's alone; all-zero bytes are floats of zero.
            unsafe { pool.ptr(half).write_bytes(0, bytes) };
            self.state = Some(State { half, rank });
        }
        Ok(())
    }

    /// The state, `[rank][head_dim]` and then `[rank]`, if it has one.
    #[must_use]
    pub fn state(&self, pool: &BlockPool) -> Option<Vec<f32>> {
        // SAFETY: nobody writes the state of a head that is borrowed here.
        self.state.map(|state| unsafe { numbers(pool, state) }.to_vec())
    }
}

/// # Safety
/// Nobody else uses the state while the slice lives.
#[expect(clippy::mut_from_ref, reason = "halves of one pool belong to different heads")]
unsafe fn numbers(pool: &BlockPool, state: State) -> &mut [f32] {
    let count = state.rank * (pool.head_dim() + 1);
    // SAFETY: a half of a state has so many floats, and slots of its size are multiples of 4 bytes in aligned memory.
    unsafe { std::slice::from_raw_parts_mut(pool.ptr(state.half).cast::<f32>(), count) }
}

/// Adds a token to a state.
fn fold(state: &mut [f32], psi: &[f32], value: &[f32]) {
    let (matrix, vector) = state.split_at_mut(psi.len() * value.len());
    for (row, psi) in matrix.chunks_exact_mut(value.len()).zip(psi) {
        row.iter_mut().zip(value).for_each(|(sum, v)| *sum += psi * v);
    }
    vector.iter_mut().zip(psi).for_each(|(sum, psi)| *sum += psi);
}

/// Joins what a query finds in a state to its output over a cache; `lse` is the logarithm of that output's denominator.
fn join(state: &[f32], phi: &[f32], lse: f32, out: &mut [f32]) {
    let (matrix, vector) = state.split_at(phi.len() * out.len());
    let weight: f32 = vector.iter().zip(phi).map(|(sum, phi)| sum * phi).sum();
    // Zero where nothing has been dropped; what is not a number must not spread.
    if !(weight > 0.0 && weight.is_finite()) {
        return;
    }
    let log = weight.ln();
    let most = log.max(lse);
    let total = most + ((log - most).exp() + (lse - most).exp()).ln();
    // The state's share, over its own weight, so that no factor overflows.
    let (own, kept) = ((log - total).exp() / weight, (lse - total).exp());
    out.iter_mut().for_each(|out| *out *= kept);
    for (row, phi) in matrix.chunks_exact(out.len()).zip(phi) {
        out.iter_mut().zip(row).for_each(|(out, sum)| *out += own * phi * sum);
    }
}

/// Adds the tokens that an [`crate::evict::evict`] with the same arguments drops to the states of their heads.
///
/// # Panics
/// If scores or states are missing, or maps are not those of the heads.
pub fn accumulate(
    threads: &Threads,
    pool: &BlockPool,
    items: &[EvictItem<'_>],
    scores: &[Vec<f32>],
    protect: Protect,
    maps: &Maps,
) {
    let heads: Vec<(usize, usize)> = items
        .iter()
        .enumerate()
        .flat_map(|(i, item)| (0..item.heads.len()).map(move |h| (i, h)))
        .collect();
    threads.run(heads.len(), |at| {
        let (i, h) = heads[at];
        let item = &items[i];
        let (head, keep) = (&item.heads[h], item.keep[h]);
        if head.tokens() <= keep {
            return;
        }
        let Some(state) = head.state else { unreachable!("a head without a state") };
        assert!(scores.get(at).is_some_and(|s| s.len() == head.tokens()), "scores are missing");
        let kept = best(&scores[at], &head.positions, item.seen, keep, protect);
        // SAFETY: each task has its own head, and a state belongs to one head.
        let state = unsafe { numbers(pool, state) };
        let mut kept = kept.into_iter().peekable();
        for token in 0..head.tokens() {
            if kept.next_if_eq(&(token as u32)).is_none() {
                let psi = maps.psi(h, &head.key(pool, token));
                fold(state, &psi, &head.value(pool, token));
            }
        }
    });
}

/// Joins what the queries of `items` find in the states of their heads to their outputs `out` over the caches, as attention
/// has left them with the logarithms `lse` of their denominators. Heads without a state are left alone.
///
/// # Panics
/// If the sizes do not fit each other, or maps are not those of the heads.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn read_state(
    threads: &Threads,
    pool: &BlockPool,
    items: &[AttendItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    out: &mut [f32],
    lse: &[f32],
    maps: &Maps,
) {
    shape.check(pool, qkv, qkv_width);
    maps.check(shape);
    let dim = shape.head_dim;
    for item in items {
        let last = item.first_row + item.rows;
        shape.check_item(item.heads.len(), last, qkv.len() / qkv_width);
        assert!(last * shape.heads * dim <= out.len() && last * shape.heads <= lse.len(), "rows");
    }
    let tasks: Vec<(&AttendItem<'_>, usize)> =
        items.iter().flat_map(|item| (0..shape.heads).map(move |h| (item, h))).collect();
    let out = Disjoint::new(out);
    threads.run(tasks.len(), |i| {
        let (item, h) = tasks[i];
        let Some(state) = item.heads[h / shape.group()].state else { return };
        // SAFETY: states are only read here.
        let state = unsafe { numbers(pool, state) };
        for row in item.first_row..item.first_row + item.rows {
            let query = &qkv[row * qkv_width + h * dim..][..dim];
            let at = (row * shape.heads + h) * dim;
            // SAFETY: each task has its own head of its own rows.
            let out = unsafe { out.slice_mut(at..at + dim) };
            join(state, &maps.phi(h, query), lse[row * shape.heads + h], out);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::attend_decode;
    use crate::evict::evict;
    use crate::kv::KvFormat;
    use crate::testing::{Layer, assert_close, bits, noise};

    const SHAPE: AttendShape = AttendShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        scale: 0.25,
        softcap: None,
        window: None,
    };

    fn maps(seed: u64, scale: f32) -> Maps {
        let (rank, hidden, dim) = (3, 5, 16);
        let network = |seed| Network {
            first: noise(seed, dim * hidden),
            second: noise(seed + 1, hidden * rank),
        };
        let key = |seed| KeyMap {
            network: network(seed),
            mix: noise(seed + 2, rank * rank),
            scale: vec![scale; rank],
            gate: vec![scale; rank],
        };
        Maps {
            rank,
            hidden,
            queries: (0..4).map(|h| network(seed + 10 * h)).collect(),
            keys: (0..2).map(|h| key(seed + 100 + 10 * h)).collect(),
        }
    }

    /// Reads 40 tokens, keeps 8 of each head, reads one more; the output of its attention, and with the state.
    fn dropped(maps: &Maps) -> (Vec<f32>, Vec<f32>, Layer) {
        let mut layer = Layer::new(1, SHAPE, KvFormat::F32);
        layer.feed(5, &[40]);
        for head in &mut layer.caches[0] {
            head.open_state(&mut layer.pool, maps.rank).expect("room");
        }
        let scores = vec![noise(1, 40), noise(2, 40)];
        let heads = &mut layer.caches[0];
        let mut items = [EvictItem { heads, seen: 40, keep: vec![8, 8] }];
        let protect = Protect { sinks: 1, recent: 2 };
        accumulate(&layer.threads, &layer.pool, &items, &scores, protect, maps);
        evict(&layer.threads, &mut layer.pool, &mut items, &scores, protect, None).expect("room");
        layer.feed(5, &[1]);
        let (mut out, mut lse) = (vec![0.0; 64], vec![0.0; 4]);
        let (threads, pool, items) = (&layer.threads, &layer.pool, layer.items());
        let (qkv, width) = (&layer.qkv, layer.width);
        attend_decode(threads, pool, &items, &SHAPE, qkv, width, &mut out, Some(&mut lse));
        let alone = out.clone();
        read_state(threads, pool, &items, &SHAPE, qkv, width, &mut out, &lse, maps);
        drop(items);
        (alone, out, layer)
    }

    #[test]
    fn keys_that_map_to_zero_change_no_bit() {
        let (alone, joined, _) = dropped(&maps(3, 0.0));
        assert_eq!(bits(&alone), bits(&joined));
        let (alone, joined, _) = dropped(&maps(3, 0.5));
        assert!(alone != joined && joined.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn a_state_takes_memory_once_and_gives_it_back() {
        let mut layer = Layer::new(1, SHAPE, KvFormat::F16);
        layer.feed(1, &[3]);
        let (pool, head) = (&mut layer.pool, &mut layer.caches[0][0]);
        let before = (pool.held_bytes(), head.held_bytes(pool));
        head.open_state(pool, 8).expect("room");
        head.open_state(pool, 8).expect("room");
        // 8 x (16 + 1) floats.
        assert_eq!(pool.held_bytes(), before.0 + 544);
        assert_eq!(head.held_bytes(pool), before.1 + 544);
        assert!(head.state(pool).is_some_and(|s| s == vec![0.0; 136]));
        let mut copy = head.copy(pool).expect("room");
        assert!(copy.state(pool).is_some_and(|s| s == vec![0.0; 136]));
        copy.clear(pool);
        head.clear(pool);
        assert!(head.state(pool).is_none());
        assert_eq!(pool.held_bytes(), before.0 - before.1);
    }

    #[test]
    fn maps_by_hand() {
        // gelu(1) = .84119 by tanh, gelu(.84119) = 0.67276.
        let network = Network { first: vec![1.0], second: vec![1.0] };
        let key = KeyMap {
            network: network.clone(),
            mix: vec![2.0],
            scale: vec![-0.5],
            gate: vec![-1.0],
        };
        let maps = Maps { rank: 1, hidden: 1, queries: vec![network], keys: vec![key] };
        assert_close(&maps.phi(0, &[1.0]), &[0.67276], 2e-5, "phi");
        // f = .5 x 0.67276; |f - 2 f| = f.
        assert_close(&maps.psi(0, &[1.0]), &[0.33638], 2e-5, "psi");
    }

    /// With features that know every key, attention over what was dropped is exact, whatever stays.
    #[test]
    fn exact_features_give_full_attention() {
        let (tokens, dim) = (12usize, 8usize);
        let (query, keys, values) = (noise(1, dim), noise(2, tokens * dim), noise(3, tokens * dim));
        let score = |t: usize| -> f64 {
            let key = &keys[t * dim..][..dim];
            2.0 * query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
        };
        let attend = |of: &[usize]| -> (Vec<f64>, f64) {
            let total: f64 = of.iter().map(|t| score(*t).exp()).sum();
            let at = |d: usize| {
                of.iter().map(|t| score(*t).exp() * f64::from(values[t * dim + d])).sum::<f64>()
            };
            ((0..dim).map(|d| at(d) / total).collect(), total.ln())
        };
        let (full, _) = attend(&(0..tokens).collect::<Vec<_>>());
        let phi: Vec<f32> = (0..tokens).map(|t| score(t).exp() as f32).collect();
        for stay in [0, 1, 5, 11] {
            let kept: Vec<usize> = (0..stay).collect();
            let mut state = vec![0.0; tokens * (dim + 1)];
            for t in stay..tokens {
                let one_hot: Vec<f32> = (0..tokens).map(|i| f32::from(u8::from(i == t))).collect();
                fold(&mut state, &one_hot, &values[t * dim..][..dim]);
            }
            let (mut out, lse) = if stay == 0 {
                (vec![0.0; dim], f32::NEG_INFINITY)
            } else {
                let (out, lse) = attend(&kept);
                (out.iter().map(|x| *x as f32).collect(), lse as f32)
            };
            join(&state, &phi, lse, &mut out);
            assert_close(&out, &full, 2e-6, &format!("{stay} stay"));
        }
    }

    #[test]
    fn the_order_in_which_tokens_are_dropped_does_not_matter() {
        let maps = maps(7, 0.3);
        let (keys, values) = (noise(1, 20 * 16), noise(2, 20 * 16));
        let state = |order: &mut dyn Iterator<Item = usize>| {
            let mut state = vec![0.0; 3 * 17];
            for t in order {
                fold(&mut state, &maps.psi(0, &keys[t * 16..][..16]), &values[t * 16..][..16]);
            }
            state
        };
        let forward: Vec<f64> = state(&mut (0..20)).into_iter().map(f64::from).collect();
        assert_close(&state(&mut (0..20).rev()), &forward, 1e-5, "backwards");
    }
}
