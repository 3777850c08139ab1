//! The caches of all sequences: a length of their own per sequence, layer and KV head, in blocks of one pool with a hard
//! byte budget.

use batchmax_kernels::kv::{BlockPool, HeadCache, KvFormat};
use batchmax_kernels::select::{Clusters, LeavingOrder, PageIndex, PartItem};
use batchmax_sim::op::{DType, Lane};
use batchmax_sim::units::{Bytes, Tokens};

/// The caches, by layer; inside a layer sequence after sequence, inside a sequence KV head after KV head.
pub struct KvStore {
    /// The blocks.
    pub pool: BlockPool,
    layers: Vec<Vec<HeadCache>>,
    kv_heads: usize,
    /// Extremes of pages and clusters of keys, as the caches; empty until a program makes some.
    indices: Vec<Vec<Indices>>,
    /// Partial caches beside the others; empty until a program fills some.
    parts: Vec<Vec<HeadCache>>,
    orders: Vec<Vec<LeavingOrder>>,
}

/// The KV heads of a sequence in one layer, and what their tokens are chosen by.
pub type Indexed<'a> = (&'a [HeadCache], &'a mut [Indices]);

/// What tokens are chosen by, of one head.
#[derive(Clone, Default)]
pub struct Indices {
    /// Extremes of its pages.
    pub pages: Option<PageIndex>,
    /// Clusters of its keys.
    pub clusters: Clusters,
}

/// The cache format of a type, if the kernels have it.
#[must_use]
pub fn kv_format(dtype: DType) -> Option<KvFormat> {
    match dtype {
        DType::F32 => Some(KvFormat::F32),
        DType::F16 => Some(KvFormat::F16),
        DType::Bf16 => Some(KvFormat::Bf16),
        DType::Fp8 => Some(KvFormat::Fp8),
        _ => None,
    }
}

/// A sequence's index, its lane, and its KV heads in one layer.
pub type Picked<'a> = (u32, &'a Lane, &'a mut [HeadCache]);

impl KvStore {
    /// Empty caches for `sequences` sequences.
    #[must_use]
    pub fn new(
        layers: usize,
        sequences: usize,
        kv_heads: usize,
        head_dim: usize,
        format: KvFormat,
        budget: Bytes,
    ) -> Self {
        let layer =
            || std::iter::repeat_with(HeadCache::default).take(sequences * kv_heads).collect();
        Self {
            pool: BlockPool::new(head_dim, format, budget.0),
            layers: std::iter::repeat_with(layer).take(layers).collect(),
            kv_heads,
            indices: vec![Vec::new(); layers],
            parts: std::iter::repeat_with(Vec::new).take(layers).collect(),
            orders: vec![Vec::new(); layers],
        }
    }

    /// The pool, and the heads of each sequence of `lanes` in one layer, in order, each with its lane and its index.
    pub fn picks<'a>(
        &'a mut self,
        layer: usize,
        lanes: &'a [Lane],
    ) -> (&'a mut BlockPool, impl Iterator<Item = Picked<'a>>) {
        let of = |lane: &'a Lane| (lane.first..lane.first + lane.sequences).map(move |s| (s, lane));
        let mut wanted = lanes.iter().flat_map(of);
        // Lanes come in the order of their sequences, so one sweep finds them all.
        let mut sequences = self.layers[layer].chunks_mut(self.kv_heads).zip(0u32..);
        let next = move || {
            let (index, lane) = wanted.next()?;
            let (heads, _) = sequences.find(|(_, s)| *s == index)?;
            Some((index, lane, heads))
        };
        (&mut self.pool, std::iter::from_fn(next))
    }

    /// The same as a list.
    pub fn select<'a>(
        &'a mut self,
        layer: usize,
        lanes: &'a [Lane],
    ) -> (&'a mut BlockPool, Vec<Picked<'a>>) {
        let (pool, picks) = self.picks(layer, lanes);
        (pool, picks.collect())
    }

    /// Makes room for the lists of caches of up to so many tokens.
    pub fn expect_tokens(&mut self, tokens: Tokens) {
        self.layers.iter_mut().flatten().for_each(|head| head.expect_tokens(tokens as usize));
    }

    /// The pool, and for the sequences of `lanes` in one layer: their caches and what tokens are chosen by.
    pub fn indexed<'a>(
        &'a mut self,
        layer: usize,
        lanes: &[Lane],
    ) -> (&'a BlockPool, Vec<Indexed<'a>>) {
        let caches = &self.layers[layer];
        let indices = &mut self.indices[layer];
        indices.resize_with(caches.len(), Indices::default);
        let wanted =
            |s: usize| lanes.iter().any(|l| (l.first..l.first + l.sequences).contains(&(s as u32)));
        let heads = self.kv_heads;
        let all = caches.chunks(heads).zip(indices.chunks_mut(heads)).enumerate();
        let picked = all.filter(|(s, _)| wanted(*s)).map(|(_, both)| both).collect();
        (&self.pool, picked)
    }

    /// The pool, and the partial caches of some sequences in one layer with the tokens that each holds, head after head.
    pub fn parts(
        &mut self,
        layer: usize,
        sequences: &[(u32, Tokens)],
    ) -> (&mut BlockPool, Vec<PartItem<'_>>) {
        let (caches, parts) = (&self.layers[layer], &mut self.parts[layer]);
        let orders = &mut self.orders[layer];
        parts.resize_with(caches.len(), HeadCache::default);
        orders.resize_with(caches.len(), LeavingOrder::default);
        let mut items = Vec::with_capacity(sequences.len() * self.kv_heads);
        let all = caches.iter().zip(parts).zip(orders).enumerate();
        for (i, ((head, part), order)) in all {
            let sequence = (i / self.kv_heads) as u32;
            if let Some((_, keep)) = sequences.iter().find(|(s, _)| *s == sequence) {
                items.push(PartItem { head, part, order, keep: *keep as usize });
            }
        }
        (&mut self.pool, items)
    }

    /// The partial caches of one sequence in one layer, and the pool; none before they are filled.
    #[must_use]
    pub fn part(&self, layer: usize, sequence: usize) -> &[HeadCache] {
        let heads = sequence * self.kv_heads..(sequence + 1) * self.kv_heads;
        self.parts[layer].get(heads).unwrap_or_default()
    }

    /// The pool, and the partial caches of one sequence in one layer.
    pub fn part_heads(
        &mut self,
        layer: usize,
        sequence: u32,
    ) -> (&mut BlockPool, &mut [HeadCache]) {
        let (pool, _, parts) = self.with_parts(layer, sequence);
        (pool, parts)
    }

    /// The pool, the caches of one sequence in one layer, and the partial ones beside them, if there are any.
    pub fn with_parts(
        &mut self,
        layer: usize,
        sequence: u32,
    ) -> (&mut BlockPool, &mut [HeadCache], &mut [HeadCache]) {
        let first = sequence as usize * self.kv_heads;
        let heads = first..first + self.kv_heads;
        let parts = self.parts[layer].get_mut(heads.clone()).unwrap_or_default();
        (&mut self.pool, &mut self.layers[layer][heads], parts)
    }

    /// Gives the partial caches of sequences in one layer back.
    pub fn release_parts(&mut self, layer: usize, sequences: &[(u32, Tokens)]) {
        let (pool, items) = self.parts(layer, sequences);
        for item in items {
            item.part.clear(pool);
            item.order.clear();
        }
    }

    /// The heads of one sequence in one layer.
    #[must_use]
    pub fn heads(&self, layer: usize, sequence: usize) -> &[HeadCache] {
        &self.layers[layer][sequence * self.kv_heads..(sequence + 1) * self.kv_heads]
    }

    /// Positions kept by each KV head of each layer of a sequence.
    #[must_use]
    pub fn kept(&self, sequence: usize) -> Vec<Vec<Vec<Tokens>>> {
        (0..self.layers.len())
            .map(|layer| self.heads(layer, sequence).iter().map(|h| h.positions.clone()).collect())
            .collect()
    }

    /// Bytes held now.
    #[must_use]
    pub fn held(&self) -> Bytes {
        Bytes(self.pool.held_bytes())
    }
}

impl KvStore {
    /// Gives the sequence `to`, which holds nothing, copies of all that the sequence `from` holds.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<(), batchmax_kernels::kv::PoolFull> {
        let heads = (0..self.kv_heads).map(|h| (from * self.kv_heads + h, to * self.kv_heads + h));
        let pool = &mut self.pool;
        for (from, to) in heads {
            for layer in &mut self.layers {
                layer[to] = layer[from].copy(pool)?;
            }
            // What a program does not use is empty.
            for parts in self.parts.iter_mut().filter(|p| !p.is_empty()) {
                parts[to] = parts[from].copy(pool)?;
            }
            for orders in self.orders.iter_mut().filter(|o| !o.is_empty()) {
                orders[to] = orders[from].clone();
            }
            for indices in self.indices.iter_mut().filter(|i| !i.is_empty()) {
                indices[to] = indices[from].clone();
            }
        }
        Ok(())
    }

    /// Gives every cache of the first `layers` layers `tokens` made-up tokens, so that a profile can time an op over a
    /// long cache without reading a prompt.
    pub fn fill(
        &mut self,
        layers: u32,
        tokens: Tokens,
    ) -> Result<(), batchmax_kernels::kv::PoolFull> {
        for layer in self.layers.iter_mut().take(layers as usize) {
            for head in layer {
                head.fill(&mut self.pool, tokens as usize)?;
            }
        }
        Ok(())
    }
}
