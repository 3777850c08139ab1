//! Ops that choose what a step reads of a cache.

use batchmax_kernels as k;
use batchmax_kernels::select::{
    ChosenItem, ClusterItem, IndexItem, PageChoice, PageIndex, SelectItem,
};
use batchmax_sim::op::{Heads, Lanes, Pick};
use batchmax_sim::units::{Layer, Tokens};

use super::{Interpreter, layer_index};
use crate::error::ExecError;

impl Interpreter<'_> {
    pub(super) fn index(&mut self, page: Tokens, lanes: &Lanes, layer: Option<Layer>) {
        let (dim, kv_heads) = (self.model.head_dim as usize, self.model.kv_heads as usize);
        let (pool, picked) = self.kv.indexed(layer_index(layer), lanes.as_slice());
        let mut items: Vec<IndexItem<'_>> = Vec::with_capacity(picked.len() * kv_heads);
        for (heads, indices) in picked {
            for (head, index) in heads.iter().zip(indices) {
                let fresh = || PageIndex::new(page as usize, dim);
                let pages = index.pages.get_or_insert_with(fresh);
                items.push(IndexItem { head, pages });
            }
        }
        k::select::index(self.threads, pool, &mut items);
    }

    pub(super) fn cluster(
        &mut self,
        sinks: Tokens,
        rounds: u32,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) {
        let (pool, picked) = self.kv.indexed(layer_index(layer), lanes.as_slice());
        let counts = lanes
            .as_slice()
            .iter()
            .flat_map(|l| std::iter::repeat_n(l.keep as usize, l.sequences as usize));
        for ((heads, indices), count) in picked.into_iter().zip(counts) {
            let mut items: Vec<ClusterItem<'_>> = (heads.iter().zip(indices))
                .map(|(head, index)| ClusterItem { head, clusters: &mut index.clusters })
                .collect();
            let (sinks, rounds) = (sinks as usize, rounds as usize);
            k::select::cluster(self.threads, pool, &mut items, sinks, count, rounds);
        }
    }

    pub(super) fn select(&mut self, heads: Heads, by: Pick, lanes: &Lanes, layer: Option<Layer>) {
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let rows = lanes.rows() as usize;
        let qkv = &self.slots.qkv[..rows * width];
        let (_, picked) = self.kv.indexed(layer_index(layer), lanes.as_slice());
        let wanted = lanes
            .as_slice()
            .iter()
            .flat_map(|l| std::iter::repeat_n(l.keep as usize, l.sequences as usize));
        let choice = match by {
            Pick::Bounds { per_query_head, newest, .. } => {
                PageChoice::Bound { per_query_head, newest }
            }
            Pick::Shares { channels, .. } => PageChoice::Shares { channels: channels as usize },
            Pick::Clusters { sinks, .. } => {
                let (group, dim) = (shape.group(), shape.head_dim);
                let mut chosen = Vec::with_capacity(picked.len() * shape.heads);
                for (row, ((caches, indices), wanted)) in picked.iter().zip(wanted).enumerate() {
                    for h in 0..shape.heads {
                        let (cache, index) = (&caches[h / group], &indices[h / group]);
                        let from = row * width + h * dim;
                        let tokens = cache.tokens();
                        // What came after the clusters is read in any case.
                        let later = tokens - index.clusters.end().min(tokens);
                        let budget = wanted.saturating_sub(sinks as usize + later);
                        let query = &qkv[from..from + dim];
                        chosen.push(index.clusters.select(query, budget, tokens));
                    }
                }
                self.slots.reads = chosen;
                return;
            }
        };
        let items: Vec<SelectItem<'_>> = (picked.iter().zip(wanted).enumerate())
            .map(|(row, ((heads, indices), tokens))| {
                let pages = indices.iter().filter_map(|i| i.pages.as_ref()).collect();
                SelectItem { heads, pages, row, tokens }
            })
            .collect();
        self.slots.reads =
            k::select::select_pages(self.threads, &items, choice, &shape, qkv, width);
    }

    pub(super) fn attend_chosen(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let rows = lanes.rows() as usize;
        let (pool, picked) = self.kv.indexed(layer_index(layer), lanes.as_slice());
        let chosen = std::mem::take(&mut self.slots.reads);
        let sets = chosen.len() / rows.max(1);
        let items: Vec<ChosenItem<'_>> = (picked.iter().zip(chosen.chunks(sets.max(1))))
            .enumerate()
            .map(|(row, ((heads, _), chosen))| ChosenItem { heads, row, chosen })
            .collect();
        k::select::attend_chosen(
            self.threads,
            pool,
            &items,
            &shape,
            &self.slots.qkv[..rows * width],
            width,
            &mut self.slots.attention[..rows * shape.heads * shape.head_dim],
            Some(&mut self.slots.log_sum_exp[..rows * shape.heads]),
        )?;
        Ok(())
    }
}
