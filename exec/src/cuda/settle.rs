//! Ops that bring caches into their settled form: fewer bits, fewer channels, short heads.

use batchmax_kernels::cuda::Arg;
use batchmax_kernels::kv::{BLOCK_TOKENS, KeyAxis};
use batchmax_sim::op::{Choice, Heads, Lanes, Protect};
use batchmax_sim::units::Tokens;

use super::interpreter::{Interpreter, Items};
use super::kv::{Caches, needed};
use crate::error::ExecError;

/// Tokens of a part of a sum of squares, whatever the batch.
const PART: usize = 512;

/// A head that gets packed: where it is, and how many keys and values shall be.
struct Packing {
    index: usize,
    to: [usize; 2],
}

impl Interpreter<'_, '_> {
    pub(super) fn pack_op(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        self.pack(heads, &items, layer)
    }

    /// Packs what a settled cache of each head's length has packed.
    pub(super) fn pack(
        &mut self,
        heads: Heads,
        items: &Items,
        layer: usize,
    ) -> Result<(), ExecError> {
        if heads.form.packed.is_none() {
            return Ok(());
        }
        let kv_heads = heads.kv as usize;
        let (mut work, mut freed, mut wanted) = (Vec::new(), 0, 0);
        for item in &items.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                let head = self.kv.main.head(layer, index);
                // Heads that share a budget differ in length: each is settled by its own.
                let (keys, values) = heads.form.packed_of(head.tokens as Tokens);
                let to = [(0, keys), (1, values)]
                    .map(|(side, to)| (to as usize).min(head.tokens).max(head.sides[side].packed));
                if to[0] == head.sides[0].packed && to[1] == head.sides[1].packed {
                    continue;
                }
                let bytes = |side, form| self.kv.main.layout.bytes(Caches::part(side, form)).0;
                for (side, to) in to.into_iter().enumerate() {
                    let of = head.sides[side];
                    if to > of.packed {
                        let needed = needed(to, to.max(of.narrow), head.tokens);
                        wanted += (needed[0] - of.halves[0]) as u64 * bytes(side, 0);
                        let drops = self.drops(layer, index, side, to);
                        freed +=
                            drops[0] as u64 * bytes(side, 1) + drops[1] as u64 * bytes(side, 2);
                    }
                }
                work.push(Packing { index, to });
            }
        }
        if work.is_empty() {
            return Ok(());
        }
        self.kv.pool.exchange(freed, wanted)?;
        // Some heads at a time: what they give back is room for the next ones.
        let mut from = 0;
        while from < work.len() {
            let (mut to, mut taken) = (from, 0);
            while to < work.len() {
                let more = self.bytes_to_take(layer, &work[to]);
                if to > from && taken + more > self.kv.pool.left() {
                    break;
                }
                taken += more;
                to += 1;
            }
            self.pack_some(&work[from..to], layer)?;
            from = to;
        }
        Ok(())
    }

    /// Pruned and whole halves of a side that go once its first `packed` tokens are packed.
    fn drops(&self, layer: usize, index: usize, side: usize, packed: usize) -> [usize; 2] {
        let head = self.kv.main.head(layer, index);
        let of = head.sides[side];
        let narrow = packed.max(of.narrow);
        let needed = needed(packed, narrow, head.tokens);
        let moved = |from: usize, to: usize| to / BLOCK_TOKENS - from / BLOCK_TOKENS;
        let drops = |halves: usize, moved: usize, needed: usize| {
            if needed == 0 { halves } else { moved.min(halves) }
        };
        [
            drops(of.halves[1], moved(of.packed, packed), needed[1]),
            drops(of.halves[2], moved(of.narrow, narrow), needed[2]),
        ]
    }

    fn bytes_to_take(&self, layer: usize, work: &Packing) -> u64 {
        let head = self.kv.main.head(layer, work.index);
        (0..2)
            .map(|side| {
                let more = work.to[side].div_ceil(BLOCK_TOKENS) - head.sides[side].halves[0];
                let bytes = self.kv.main.layout.bytes(Caches::part(side, 0)).1;
                more as u64 * bytes.next_multiple_of(64)
            })
            .sum()
    }

    fn pack_some(&mut self, work: &[Packing], layer: usize) -> Result<(), ExecError> {
        for one in work {
            for side in 0..2 {
                while self.kv.main.head(layer, one.index).sides[side].halves[0]
                    < one.to[side].div_ceil(BLOCK_TOKENS)
                {
                    let at = (layer, one.index);
                    self.kv.main.push(&mut self.kv.pool, at, (side, 0))?;
                }
            }
        }
        self.launch_packing(work, layer)?;
        for one in work {
            for side in 0..2 {
                let of = self.kv.main.head(layer, one.index).sides[side];
                if one.to[side] <= of.packed {
                    continue;
                }
                let drops = self.drops(layer, one.index, side, one.to[side]);
                let (main, pool) = (&mut self.kv.main, &mut self.kv.pool);
                for (form, count) in [(1, drops[0]), (2, drops[1])] {
                    pool.settle(count as u64 * main.layout.bytes(Caches::part(side, form)).0);
                    let first = of.base(form);
                    main.give_back(pool, (layer, one.index), (side, form), first..first + count);
                }
                let of = &mut main.change(layer, one.index).sides[side];
                (of.halves[1], of.halves[2]) = (of.halves[1] - drops[0], of.halves[2] - drops[1]);
                of.packed = one.to[side];
                of.narrow = of.narrow.max(of.packed);
            }
        }
        Ok(())
    }

    /// Packs in halves that are there.
    fn launch_packing(&mut self, work: &[Packing], layer: usize) -> Result<(), ExecError> {
        let Some(codec) = self.kv.main.layout.codec else { return Ok(()) };
        let kv = self.caches(layer)?;
        let (mut which, mut to) = (Vec::new(), Vec::new());
        let mut units = [0usize; 2];
        let group = match codec.key_axis {
            KeyAxis::Channel => usize::from(codec.group),
            KeyAxis::Token => BLOCK_TOKENS,
        };
        for one in work {
            let head = self.kv.main.head(layer, one.index);
            which.push(one.index as u32);
            for (side, unit) in [(0, group), (1, BLOCK_TOKENS)] {
                to.push(one.to[side] as u32);
                if one.to[side] > head.sides[side].packed {
                    let count = one.to[side].div_ceil(unit) - head.sides[side].packed / unit;
                    units[side] = units[side].max(count);
                }
            }
        }
        let which = self.device.put_words("which", &which)?;
        let to = self.device.put_words("which-to", &to)?;
        let args = || vec![kv.clone(), Arg::At(which), Arg::At(to)];
        let dim = self.kv.main.layout.dim;
        let by_token = 4 * 32 * (dim + dim / 4);
        let sided = |side: u32| {
            let mut all = args();
            all.push(Arg::U32(side));
            all
        };
        let grid = [units[0], work.len(), 1];
        if codec.key_axis == KeyAxis::Channel {
            let shared = 4 * (group * dim + 16 * 256);
            self.device.launch("pack_channels", grid, (256, shared), args())?;
        } else {
            self.device.launch("pack_tokens", grid, (256, by_token), sided(0))?;
        }
        let grid = [units[1], work.len(), 1];
        Ok(self.device.launch("pack_tokens", grid, (256, by_token), sided(1))?)
    }

    pub(super) fn prune_channels(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let Some(pruned) = heads.form.pruned else { return Ok(()) };
        let items = self.items(lanes)?;
        let drop = heads.dim - pruned.channels;
        self.choose_channels(heads, &items, (pruned.window, drop), layer)?;
        let kv_heads = heads.kv as usize;
        let (mut work, mut freed, mut wanted) = (Vec::new(), 0, 0);
        let bytes = |form| self.kv.main.layout.bytes(Caches::part(0, form)).0;
        for index in
            items.list.iter().flat_map(|i| (0..kv_heads).map(|h| i.sequence * kv_heads + h))
        {
            let head = self.kv.main.head(layer, index);
            let keys = head.sides[0];
            let to = (heads.form.pruned_of(head.tokens as Tokens) as usize).min(head.tokens);
            if to <= keys.narrow {
                continue;
            }
            let needed = needed(keys.packed, to, head.tokens);
            let moved = to / BLOCK_TOKENS - keys.base(2);
            let surplus = if needed[2] == 0 { keys.halves[2] } else { moved.min(keys.halves[2]) };
            wanted += (needed[1] - keys.halves[1]) as u64 * bytes(1);
            freed += surplus as u64 * bytes(2);
            work.push((index, to, needed[1], surplus));
        }
        if work.is_empty() {
            return Ok(());
        }
        let whole = bytes(2);
        self.kv.pool.exchange(freed, wanted)?;
        // Head by head where there is no room for all: what one gives back is room for the next.
        let pitch = self.kv.main.layout.bytes(Caches::part(0, 1)).1.next_multiple_of(64);
        let all: u64 = work.iter().map(|(_, _, pruned, _)| *pruned as u64 * pitch).sum();
        let at_once = if all <= self.kv.pool.left() { work.len() } else { 1 };
        for some in work.chunks(at_once) {
            for (index, _, pruned, _) in some {
                while self.kv.main.head(layer, *index).sides[0].halves[1] < *pruned {
                    self.kv.main.push(&mut self.kv.pool, (layer, *index), (0, 1))?;
                }
            }
            self.launch_pruning(some, layer)?;
            for (index, to, _, surplus) in some {
                let (main, pool) = (&mut self.kv.main, &mut self.kv.pool);
                pool.settle(*surplus as u64 * whole);
                let first = main.head(layer, *index).sides[0].base(2);
                main.give_back(pool, (layer, *index), (0, 2), first..first + surplus);
                let keys = &mut main.change(layer, *index).sides[0];
                keys.halves[2] -= surplus;
                keys.narrow = *to;
            }
        }
        Ok(())
    }

    fn launch_pruning(
        &mut self,
        work: &[(usize, usize, usize, usize)],
        layer: usize,
    ) -> Result<(), ExecError> {
        let kv = self.caches(layer)?;
        let which: Vec<u32> = work.iter().map(|w| w.0 as u32).collect();
        let to: Vec<u32> = work.iter().map(|w| w.1 as u32).collect();
        let narrow = |w: &(usize, usize, usize, usize)| {
            w.1 - self.kv.main.head(layer, w.0).sides[0].narrow.min(w.1)
        };
        let most = work.iter().map(narrow).max().unwrap_or(0);
        let which = self.device.put_words("which", &which)?;
        let to = self.device.put_words("which-to", &to)?;
        let args = vec![kv, Arg::At(which), Arg::At(to)];
        let grid = [(most * self.kv.main.layout.dim / 8).div_ceil(256), work.len(), 1];
        Ok(self.device.launch("prune", grid, (256, 0), args)?)
    }

    /// Chooses the channels of sequences that have none yet, by this step's queries.
    fn choose_channels(
        &mut self,
        heads: Heads,
        items: &Items,
        (window, drop): (Tokens, u32),
        layer: usize,
    ) -> Result<(), ExecError> {
        let (kv_heads, dim) = (heads.kv as usize, heads.dim as usize);
        let without: Vec<_> = (items.list.iter())
            .filter(|i| !self.kv.main.heads(layer, i.sequence).iter().any(|head| head.chosen))
            .copied()
            .collect();
        if without.is_empty() {
            return Ok(());
        }
        let items = self.put_items("channel-items", without)?;
        let parts = self.longest(layer, &items).div_ceil(PART).max(1);
        let count = items.list.len();
        let partial = (count * kv_heads * parts * dim * 4) as u64;
        let partial = self.device.scratch("directions", partial)?;
        let kv = self.caches(layer)?;
        let args = vec![kv.clone(), Arg::At(items.at), Arg::U32(PART as u32), Arg::At(partial)];
        self.device.launch("channel_squares", [parts, kv_heads, count], (128, 4096), args)?;
        let numbers = self.kv.main.layout.kept_stride();
        for run in items.runs() {
            let first = items.list[run.start].sequence * kv_heads;
            let to = self.kv.main.kept_at(layer).plus(2 * (first * numbers) as u64);
            let from = partial.plus((run.start * kv_heads * parts * dim * 4) as u64);
            let args = vec![
                kv.clone(),
                Arg::At(items.starting(run.start)),
                self.slots.qkv.arg(),
                Arg::U32(heads.query),
                Arg::U32(window),
                Arg::U32(drop),
                Arg::U32(PART as u32),
                Arg::U32(parts as u32),
                Arg::At(from),
                Arg::At(to),
            ];
            let grid = [kv_heads, run.len(), 1];
            self.device.launch("choose_channels", grid, (256, 1024), args)?;
        }
        for item in &items.list {
            for h in 0..kv_heads {
                self.kv.main.change(layer, item.sequence * kv_heads + h).chosen = true;
            }
        }
        Ok(())
    }

    /// Cuts short heads to their sinks and newest tokens, where they have become too long.
    pub(super) fn trim(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (Some(short), Some(which)) = (heads.form.short, self.short_heads.get(layer)) else {
            return Ok(());
        };
        let which = which.clone();
        let items = self.items(lanes)?;
        let mut counts = Vec::with_capacity(items.list.len() * heads.kv as usize);
        let mut cut = false;
        for item in &items.list {
            // The others say how long the sequence is.
            let target = short.of(item.lane.kv);
            for (h, head) in self.kv.main.heads(layer, item.sequence).iter().enumerate() {
                let cuts = which.contains(&(h as u32)) && head.tokens > target as usize;
                counts.push(if cuts { target } else { head.tokens as u32 });
                cut |= cuts;
            }
        }
        if !cut {
            return Ok(());
        }
        let recency = batchmax_sim::op::Score::Recency;
        self.rank(heads, recency, lanes, layer)?;
        let protect = Protect { sinks: short.sinks, recent: 0 };
        let (kv, scores) = (self.caches(layer)?, self.scores(layer)?);
        let kept = self.choose(kv, &items, scores, counts, protect)?;
        self.drop_others(heads, &items, &kept, layer)
    }

    /// How many tokens an eviction keeps, where no attention decides it.
    pub(super) fn plain_counts(
        &mut self,
        heads: Heads,
        (protect, choice): (Protect, Choice),
        items: &Items,
        layer: usize,
    ) -> Result<Vec<u32>, ExecError> {
        let choice = if let Choice::Within { .. } = choice { Choice::PerHead } else { choice };
        self.counts(heads, (protect, choice), items, layer)
    }
}
