//! Ops that bring caches into their settled form: fewer bits, fewer channels.

use batchmax_kernels as k;
use batchmax_kernels::evict::{EvictItem, Protect};
use batchmax_kernels::kv::{BlockPool, Codec, HeadCache, KeyAxis};
use batchmax_kernels::pack::PackItem;
use batchmax_kernels::prune::{ChannelItem, PruneItem};
use batchmax_kernels::threads::Threads;
use batchmax_sim::form::{self, Form};
use batchmax_sim::op::{Heads, Lanes};
use batchmax_sim::units::{Layer, Tokens};

use super::{Interpreter, layer_index};
use crate::error::ExecError;

/// Packs what a settled cache of each head's length has packed.
pub(super) fn pack<'a>(
    threads: &Threads,
    pool: &mut BlockPool,
    heads: impl Iterator<Item = &'a mut HeadCache>,
    form: &Form,
) -> Result<(), ExecError> {
    let Some(packed) = form.packed else { return Ok(()) };
    let key_axis = match packed.keys {
        form::KeyAxis::Channel => KeyAxis::Channel,
        form::KeyAxis::Token => KeyAxis::Token,
    };
    let codec = Codec { bits: packed.bits as u8, group: packed.group as u16, key_axis };
    let mut items: Vec<PackItem<'_>> = heads
        .map(|head| {
            // Heads that share a budget differ in length: each is settled by its own.
            let (keys, values) = form.packed_of(head.tokens() as Tokens);
            let (keys, values) = (keys as usize, values as usize);
            PackItem { heads: std::slice::from_mut(head), keys, values }
        })
        .collect();
    Ok(k::pack::pack(threads, pool, &mut items, codec)?)
}

impl Interpreter<'_> {
    pub(super) fn pack(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let (pool, picked) = self.kv.picks(layer_index(layer), lanes.as_slice());
        let caches = picked.flat_map(|(_, _, heads)| heads);
        pack(self.threads, pool, caches, &heads.form)
    }

    pub(super) fn prune_channels(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let Some(pruned) = heads.form.pruned else { return Ok(()) };
        self.choose_channels(heads, lanes, layer);
        let index = layer_index(layer);
        let channels = &self.slots.channels[index];
        let kv_heads = heads.kv as usize;
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        debug_assert!(pruned.channels <= heads.dim);
        let mut items: Vec<PruneItem<'_>> = Vec::with_capacity(picked.len() * kv_heads);
        for (sequence, _, caches) in picked {
            for (h, head) in caches.iter_mut().enumerate() {
                let kept = &channels[sequence as usize * kv_heads + h];
                let tokens = heads.form.pruned_of(head.tokens() as Tokens) as usize;
                let heads = std::slice::from_mut(head);
                items.push(PruneItem { heads, kept: std::slice::from_ref(kept), tokens });
            }
        }
        Ok(k::prune::prune(self.threads, pool, &mut items)?)
    }

    /// Cuts short heads to their sinks and newest tokens, where they have become too long.
    pub(super) fn trim(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let index = layer_index(layer);
        let (Some(short), Some(which)) = (heads.form.short, self.short_heads.get(index)) else {
            return Ok(());
        };
        let sequences = &self.sequences;
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let mut scores = Vec::with_capacity(picked.len() * heads.kv as usize);
        let mut items = Vec::with_capacity(picked.len());
        for (sequence, lane, caches) in picked {
            // The others say how long the sequence is.
            let target = short.of(lane.kv) as usize;
            let mut keep = Vec::with_capacity(caches.len());
            for (head, cache) in caches.iter().enumerate() {
                let cut = which.contains(&(head as u32)) && cache.tokens() > target;
                keep.push(if cut { target } else { cache.tokens() });
                let newest = cache.positions.iter().map(|p| *p as f32);
                scores.push(if cut { newest.collect() } else { Vec::new() });
            }
            let seen = sequences[sequence as usize].seen_with_step();
            items.push(EvictItem { heads: caches, seen, keep });
        }
        let protect = Protect { sinks: short.sinks, recent: 0 };
        Ok(k::evict::evict(self.threads, pool, &mut items, &scores, protect, None)?)
    }

    /// Chooses the channels of sequences that have none yet, by this step's queries.
    fn choose_channels(&mut self, heads: Heads, lanes: &Lanes, layer: Option<Layer>) {
        let Some(pruned) = heads.form.pruned else { return };
        let (index, kv_heads) = (layer_index(layer), heads.kv as usize);
        let step_rows = self.rows_of(lanes.as_slice());
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let sequences = self.sequences.len();
        let channels = &mut self.slots.channels[index];
        channels.resize(sequences * kv_heads, Vec::new());
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let without = |s: u32| channels[s as usize * kv_heads].is_empty();
        let (mut chosen_for, mut items) = (Vec::new(), Vec::new());
        for ((sequence, _, caches), (first_row, rows)) in picked.into_iter().zip(step_rows) {
            if without(sequence) {
                chosen_for.push(sequence as usize);
                items.push(ChannelItem { heads: &*caches, first_row, rows });
            }
        }
        if items.is_empty() {
            return;
        }
        let drop = (heads.dim - pruned.channels) as usize;
        let chosen = k::prune::rank_channels(
            self.threads,
            pool,
            &items,
            pruned.window as usize,
            drop,
            &shape,
            &self.slots.qkv,
            width,
        );
        for (sequence, chosen) in chosen_for.into_iter().zip(chosen.chunks(kv_heads)) {
            for (to, from) in channels[sequence * kv_heads..].iter_mut().zip(chosen) {
                to.clone_from(from);
            }
        }
    }
}
