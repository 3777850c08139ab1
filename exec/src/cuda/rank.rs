//! Scores of cached tokens, and tallies of the attention that they receive.

use batchmax_kernels::cuda::{Address, Arg};
use batchmax_sim::op::{Heads, Lanes, Pooling, Score};

use super::cache::{lanes_of, tile_bytes};
use super::interpreter::{Interpreter, Items};
use super::memory::{bytes_of, bytes_of_floats};
use crate::error::ExecError;

/// Tokens of a part of a mean direction of keys, whatever the batch.
const PART: usize = 512;

/// What counts of an item's rows: its last so many; tokens whose sums begin at zero; the weight of a row and head.
pub(super) type Counted = (u32, u32, f32);

impl Interpreter<'_, '_> {
    /// The scores of a layer, by token.
    pub(super) fn scores(&mut self, layer: usize) -> Result<Address, ExecError> {
        let count = if self.deferred { self.kv.main.layers() } else { 1 };
        while self.beside.scores.len() < count {
            let at = self.device.alloc(4 * self.kv.main.plane() as u64)?;
            self.beside.scores.push(at);
        }
        Ok(self.beside.scores[layer % count])
    }

    /// The tallies of a layer, by token.
    pub(super) fn tallies(&mut self, layer: usize) -> Result<Address, ExecError> {
        let plane = 4 * self.kv.main.plane() as u64;
        let all = match self.beside.tallies {
            Some(at) => at,
            None => {
                let at = self.device.alloc(plane * self.kv.main.layers() as u64)?;
                *self.beside.tallies.insert(at)
            }
        };
        Ok(all.plus(plane * layer as u64))
    }

    /// Adds attention to sums by token; with `plane` numbers between them if it is not 0, each head's apart.
    pub(super) fn mass(
        &mut self,
        heads: Heads,
        (kv, longest): (Arg, usize),
        items: &Items,
        counted: &[Counted],
        sums: Address,
        plane: usize,
    ) -> Result<(), ExecError> {
        let words: Vec<u32> = (counted.iter())
            .flat_map(|(last, fresh, weight)| [*last, *fresh, weight.to_bits(), 0])
            .collect();
        let counted = self.device.put("counted", &bytes_of(&words))?;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::At(counted),
            self.slots.qkv.arg(),
            Arg::U32(heads.query),
            self.scale(),
            self.attention_cap(),
            Arg::U32(0),
            Arg::At(self.slots.log_sum_exp),
            Arg::At(sums),
            Arg::U64(plane as u64),
        ];
        let grid = [longest.div_ceil(32), heads.kv as usize, items.list.len()];
        let shared = tile_bytes(heads.dim as usize, 32 * 33 + 96);
        Ok(self.device.launch("mass", grid, (128, shared), args)?)
    }

    /// Newest tokens of an item's heads that have no tally yet.
    fn untallied(&self, layer: usize, sequence: usize) -> u32 {
        let heads = self.kv.main.heads(layer, sequence);
        heads.iter().map(|head| (head.tokens - head.tallied) as u32).max().unwrap_or(0)
    }

    /// The tallies of all tokens of some sequences stand.
    fn mark_tallied(&mut self, layer: usize, items: &Items) {
        let kv_heads = self.kv.main.layout.kv_heads;
        for item in &items.list {
            for head in 0..kv_heads {
                let head = self.kv.main.follow(layer, item.sequence * kv_heads + head);
                head.tallied = head.tokens;
            }
        }
    }

    pub(super) fn tally(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let weight = heads.kv as f32 / heads.query as f32;
        let counted: Vec<Counted> = (items.list.iter())
            .map(|item| (u32::MAX, self.untallied(layer, item.sequence), weight))
            .collect();
        let (kv, sums) = (self.caches(layer)?, self.tallies(layer)?);
        let longest = self.longest(layer, &items);
        self.mass(heads, (kv, longest), &items, &counted, sums, 0)?;
        self.mark_tallied(layer, &items);
        Ok(())
    }

    pub(super) fn rank(
        &mut self,
        heads: Heads,
        by: Score,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let dim = heads.dim as usize;
        let (lanes, per_token) = (lanes_of(dim), 256);
        let per_key = 128 / lanes;
        match by {
            Score::Recency => self.score("rank_recency", per_token, &items, layer, vec![]),
            Score::KeyNorm => self.score("rank_norms", per_key, &items, layer, vec![]),
            Score::KeyDiff => {
                let more = self.directions(heads, &items, layer)?;
                self.score("rank_differences", per_key, &items, layer, more)
            }
            Score::Random { seed } => {
                let more = vec![Arg::U32(seed), Arg::U32(layer as u32)];
                self.score("rank_chance", per_token, &items, layer, more)
            }
            Score::TalliedAttention { mean } => {
                let tally = self.tallies(layer)?;
                let fresh = self.untallied_of_all(layer, &items);
                let more = vec![Arg::At(tally), Arg::U32(fresh), Arg::U32(mean.into())];
                self.score("rank_tallied", per_token, &items, layer, more)
            }
            Score::WindowAttention { window, pool, pooling, exclude_window } => {
                let tally = self.window(heads, window, &items, layer)?;
                let more = vec![
                    Arg::At(tally),
                    Arg::U32(if exclude_window { window } else { 0 }),
                    Arg::U32(pool.max(1)),
                    Arg::U32((pooling == Pooling::Max).into()),
                ];
                self.score("rank_window", per_token, &items, layer, more)
            }
            Score::LastAttention => {
                let sums = self.device.scratch("sums", 4 * self.kv.main.plane() as u64)?;
                let weight = heads.kv as f32 / heads.query as f32;
                self.newest(heads, &items, layer, weight, sums, 0)?;
                self.score("rank_last", per_token, &items, layer, vec![Arg::At(sums)])
            }
            Score::NewestAttention { pool } => {
                let (sums, plane) = self.by_head(heads, &items, layer)?;
                let group = heads.query / heads.kv;
                let more = vec![
                    Arg::At(sums),
                    Arg::U64(plane as u64),
                    Arg::U32(group),
                    Arg::U32(pool.max(1)),
                ];
                self.score("rank_newest", per_token, &items, layer, more)
            }
            Score::Lag { lag, sinks } => {
                let (kv, scores) = (self.caches(layer)?, self.scores(layer)?);
                let args =
                    vec![kv, Arg::At(items.at), Arg::U32(lag), Arg::U32(sinks), Arg::At(scores)];
                let partitions = self.longest(layer, &items).div_ceil(lag.max(1) as usize) + 1;
                let grid = [partitions, heads.kv as usize, items.list.len()];
                let shared = 4 * (2 * dim + 3 * lag as usize + 4);
                Ok(self.device.launch("rank_lag", grid, (128, shared), args)?)
            }
            Score::ExpectedAttention { sinks, future } => {
                self.expected(heads, (sinks, future), &items, layer)
            }
        }
    }

    /// Runs a kernel that gives every token a score.
    fn score(
        &mut self,
        kernel: &'static str,
        per_block: usize,
        items: &Items,
        layer: usize,
        more: Vec<Arg>,
    ) -> Result<(), ExecError> {
        let (kv, scores) = (self.caches(layer)?, self.scores(layer)?);
        let mut args = vec![kv, Arg::At(items.at)];
        args.extend(more);
        args.push(Arg::At(scores));
        let kv_heads = self.model.kv_heads as usize;
        let grid = [self.longest(layer, items).div_ceil(per_block), kv_heads, items.list.len()];
        let block = if per_block == 256 { 256 } else { 128 };
        Ok(self.device.launch(kernel, grid, (block, 0), args)?)
    }

    /// Newest tokens without a tally, of any of the sequences: equal where something tallies in every step.
    fn untallied_of_all(&self, layer: usize, items: &Items) -> u32 {
        items.list.iter().map(|i| self.untallied(layer, i.sequence)).max().unwrap_or(0)
    }

    /// The mean direction of the keys, in parts.
    fn directions(
        &mut self,
        heads: Heads,
        items: &Items,
        layer: usize,
    ) -> Result<Vec<Arg>, ExecError> {
        let (dim, kv_heads, count) = (heads.dim as usize, heads.kv as usize, items.list.len());
        let parts = self.longest(layer, items).div_ceil(PART).max(1);
        let partial =
            self.device.scratch("directions", (count * kv_heads * parts * dim * 4) as u64)?;
        let kv = self.caches(layer)?;
        let args = vec![kv, Arg::At(items.at), Arg::U32(PART as u32), Arg::At(partial)];
        self.device.launch("key_directions", [parts, kv_heads, count], (128, 4096), args)?;
        Ok(vec![Arg::U32(PART as u32), Arg::U32(parts as u32), Arg::At(partial)])
    }

    /// Brings the attention of the last rows up to date, which stands where others have tallies.
    fn window(
        &mut self,
        heads: Heads,
        window: u32,
        items: &Items,
        layer: usize,
    ) -> Result<Address, ExecError> {
        let group = heads.query / heads.kv;
        let counted: Vec<Counted> = (items.list.iter())
            .map(|item| {
                let known = self.kv.main.heads(layer, item.sequence);
                let state = known.iter().all(|head| head.tallied > 0);
                if item.rows == 1 && state {
                    let weight = 1.0 / (group * window.max(1)) as f32;
                    (1, self.untallied(layer, item.sequence), weight)
                } else {
                    let last = (item.rows as u32).min(window);
                    (last, u32::MAX, 1.0 / (group * last.max(1)) as f32)
                }
            })
            .collect();
        let (kv, sums) = (self.caches(layer)?, self.tallies(layer)?);
        let longest = self.longest(layer, items);
        self.mass(heads, (kv, longest), items, &counted, sums, 0)?;
        self.mark_tallied(layer, items);
        Ok(sums)
    }

    /// The attention of each item's last row.
    fn newest(
        &mut self,
        heads: Heads,
        items: &Items,
        layer: usize,
        weight: f32,
        sums: Address,
        plane: usize,
    ) -> Result<(), ExecError> {
        let counted = vec![(1, u32::MAX, weight); items.list.len()];
        let kv = self.caches(layer)?;
        let longest = self.longest(layer, items);
        self.mass(heads, (kv, longest), items, &counted, sums, plane)
    }

    /// The attention of each item's last row, head by head of a group: sums, and numbers from one head's to the next one's.
    pub(super) fn by_head(
        &mut self,
        heads: Heads,
        items: &Items,
        layer: usize,
    ) -> Result<(Address, usize), ExecError> {
        let (plane, group) = (self.kv.main.plane(), (heads.query / heads.kv) as usize);
        let sums = self.device.scratch("sums", (4 * group * plane) as u64)?;
        self.newest(heads, items, layer, 1.0, sums, plane)?;
        Ok((sums, plane))
    }

    /// By the attention of queries distributed like those of the step.
    fn expected(
        &mut self,
        heads: Heads,
        (sinks, future): (u32, u32),
        items: &Items,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (dim, query, count) = (heads.dim as usize, heads.query as usize, items.list.len());
        let group = query / heads.kv as usize;
        let mut ahead = Vec::new();
        for item in &items.list {
            let turns = self.rope.mean_turn(item.seen, future);
            ahead.extend(turns.iter().map(|t| t.0));
            ahead.extend(turns.iter().map(|t| t.1));
        }
        let ahead = self.device.put("ahead", &bytes_of_floats(&ahead))?;
        let moments = (count * query * (dim + dim * dim) * 4) as u64;
        let moments = self.device.scratch("moments", moments)?;
        let (positions, kv, scores) = (self.positions()?, self.caches(layer)?, self.scores(layer)?);
        let (table, pairs) = self.turns;
        let factor = self.rope.factor();
        let args = vec![
            kv.clone(),
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::At(positions),
            Arg::U32(sinks),
            Arg::At(table),
            Arg::U32(pairs),
            Arg::U32(self.weights.interleaved.into()),
            Arg::F32(1.0 / (factor * factor)),
            Arg::At(ahead),
            Arg::At(moments),
        ];
        self.device.launch("query_moments", [query, count, 1], (256, 4 * 10 * dim), args)?;
        let plane = self.kv.main.plane();
        let logits = self.device.scratch("sums", (4 * group * plane) as u64)?;
        let args = vec![
            kv.clone(),
            Arg::At(items.at),
            Arg::U32(sinks),
            self.scale(),
            Arg::At(moments),
            Arg::At(logits),
            Arg::U64(plane as u64),
        ];
        let grid = [self.longest(layer, items).div_ceil(32), query, count];
        let shared = 4 * (33 * (dim + 4) + 128);
        self.device.launch("expected_logits", grid, (128, shared), args)?;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::U32(group as u32),
            Arg::At(logits),
            Arg::U64(plane as u64),
            Arg::At(scores),
        ];
        let grid = [heads.kv as usize, count, 1];
        Ok(self.device.launch("expected_scores", grid, (256, 4 * (16 * group + 64)), args)?)
    }
}
