//! Evictions: how many tokens each head keeps is found here or on the device, which ones on the device.

use std::ops::Range;

use batchmax_kernels::cuda::{Address, Arg};
use batchmax_kernels::kv::KeyAxis;
use batchmax_sim::op::{Choice, Heads, Lanes, Protect};

use super::interpreter::{Interpreter, Items};
use super::kv::{Caches, Head, Side, needed};
use super::memory::bytes_of;
use super::pool::Pool;
use crate::error::ExecError;

fn protect_arg(protect: Protect) -> Arg {
    Arg::Bytes(bytes_of(&[protect.sinks, protect.recent]))
}

/// What an eviction leaves of some sequences.
pub(super) struct Kept {
    /// How many tokens each head keeps, item after item, here and on the device.
    pub(super) counts: Vec<u32>,
    pub(super) keep: Address,
    /// Which ones, by token, on the device.
    pub(super) list: Address,
}

/// What becomes of the forms of a head.
struct Plan {
    index: usize,
    next: Head,
    /// Bytes that count, given back and taken.
    freed: u64,
    wanted: u64,
    /// Bytes of what is taken, on the device.
    taken: u64,
}

impl Interpreter<'_, '_> {
    /// How many tokens each head keeps.
    pub(super) fn counts(
        &mut self,
        heads: Heads,
        (protect, choice): (Protect, Choice),
        items: &Items,
        layer: usize,
    ) -> Result<Vec<u32>, ExecError> {
        let kv_heads = heads.kv as usize;
        let means: Vec<u32> = items.list.iter().map(|i| i.lane.keep).collect();
        match choice {
            Choice::PerHead => {
                Ok(means.iter().flat_map(|mean| std::iter::repeat_n(*mean, kv_heads)).collect())
            }
            Choice::AcrossHeads { guaranteed } => {
                let sure: Vec<u32> = (means.iter())
                    .map(|mean| (u64::from(*mean) * u64::from(guaranteed) / 1000) as u32)
                    .collect();
                let (scores, kv) = (self.scores(layer)?, self.caches(layer)?);
                let mean = self.device.put_words("means", &means)?;
                let sure = self.device.put_words("guaranteed", &sure)?;
                let count = items.list.len();
                let keep = self.device.scratch("found-keep", 4 * (count * kv_heads) as u64)?;
                let args = vec![
                    kv,
                    Arg::At(items.at),
                    Arg::At(scores),
                    Arg::At(mean),
                    Arg::At(sure),
                    protect_arg(protect),
                    Arg::At(keep),
                ];
                self.device.launch("evict_share", [count, 1, 1], (256, 256), args)?;
                Ok(self.device.words(keep, count * kv_heads)?)
            }
            Choice::Within { loss, most } => {
                self.within(heads, protect, f64::from(loss) / 1e6, most, items, layer)
            }
        }
    }

    /// The fewest tokens that keep the newest query's attention.
    fn within(
        &mut self,
        heads: Heads,
        protect: Protect,
        loss: f64,
        most: u32,
        items: &Items,
        layer: usize,
    ) -> Result<Vec<u32>, ExecError> {
        let (kv_heads, count) = (heads.kv as usize, items.list.len());
        let (weights, plane) = self.by_head(heads, items, layer)?;
        let (scores, kv) = (self.scores(layer)?, self.caches(layer)?);
        let order = self.device.scratch("order", 4 * plane as u64)?;
        let other = self.device.scratch("other-order", 4 * plane as u64)?;
        let args = vec![
            kv.clone(),
            Arg::At(items.at),
            Arg::At(scores),
            protect_arg(protect),
            Arg::At(order),
            Arg::At(other),
        ];
        self.device.launch("evict_order", [kv_heads, count, 1], (256, 128), args)?;
        let most = self.device.put_words("most", &vec![most; count])?;
        let keep = self.device.scratch("found-keep", 4 * (count * kv_heads) as u64)?;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::At(weights),
            Arg::U64(plane as u64),
            Arg::U32(heads.query / heads.kv),
            Arg::At(order),
            Arg::U32(protect.sinks),
            Arg::F64(loss),
            Arg::At(most),
            Arg::At(keep),
        ];
        self.device.launch("evict_within", [count, 1, 1], (256, 8 * 256), args)?;
        Ok(self.device.words(keep, count * kv_heads)?)
    }

    /// The best tokens of each head of `kv`, by scores.
    pub(super) fn choose(
        &mut self,
        kv: Arg,
        items: &Items,
        scores: Address,
        counts: Vec<u32>,
        protect: Protect,
    ) -> Result<Kept, ExecError> {
        let keep = self.device.put_words("keep", &counts)?;
        let list = self.device.scratch("kept", 4 * self.kv.main.plane() as u64)?;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::At(scores),
            Arg::At(keep),
            protect_arg(protect),
            Arg::At(list),
        ];
        let grid = [self.model.kv_heads as usize, items.list.len(), 1];
        self.device.launch("evict_choose", grid, (256, 1152), args)?;
        Ok(Kept { counts, keep, list })
    }

    pub(super) fn evict(
        &mut self,
        heads: Heads,
        protect: Protect,
        choice: Choice,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let counts = self.counts(heads, (protect, choice), &items, layer)?;
        let (kv, scores) = (self.caches(layer)?, self.scores(layer)?);
        let kept = self.choose(kv, &items, scores, counts, protect)?;
        self.drop_others(heads, &items, &kept, layer)?;
        // What an eviction leaves is settled, but for channels that are chosen among the keys that stay.
        if heads.form.pruned.is_none() {
            self.pack(heads, &items, layer)?;
        }
        Ok(())
    }

    /// Moves what stays to the front and gives back the halves of the others.
    pub(super) fn drop_others(
        &mut self,
        heads: Heads,
        items: &Items,
        kept: &Kept,
        layer: usize,
    ) -> Result<(), ExecError> {
        let kv_heads = heads.kv as usize;
        let mut all = (items.list.iter().zip(kept.counts.chunks(kv_heads)))
            .flat_map(|(i, keep)| (0..kv_heads).map(move |h| (i.sequence * kv_heads + h, keep[h])));
        let main = &self.kv.main;
        if !all.any(|(index, keep)| main.head(layer, index).tokens > keep as usize) {
            return Ok(());
        }
        let plain = (items.list.iter())
            .all(|item| main.heads(layer, item.sequence).iter().all(Head::is_plain));
        if plain {
            self.compact(heads, items, kept, layer)?;
            self.move_numbers(items, kept, layer)?;
            for (item, keep) in items.list.iter().zip(kept.counts.chunks(kv_heads)) {
                for (h, keep) in keep.iter().enumerate() {
                    let index = item.sequence * kv_heads + h;
                    self.drop_behind(layer, index, *keep as usize);
                }
            }
            return Ok(());
        }
        self.evict_mixed(heads, items, kept, layer)
    }

    fn drop_behind(&mut self, layer: usize, index: usize, keep: usize) {
        let head = self.kv.main.head(layer, index);
        if head.tokens > keep {
            // Those that have no tally yet have got one of zero.
            let tallied = if head.tallied > 0 { keep } else { 0 };
            self.kv.main.truncate(&mut self.kv.pool, layer, index, keep);
            self.kv.main.follow(layer, index).tallied = tallied;
        }
    }

    /// Moves whole tokens in place, and turns their keys where they are rotated by their places.
    fn compact(
        &mut self,
        heads: Heads,
        items: &Items,
        kept: &Kept,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (kv, count) = (self.caches(layer)?, items.list.len());
        let args = vec![kv.clone(), Arg::At(items.at), Arg::At(kept.keep), Arg::At(kept.list)];
        let row = heads.dim as usize * self.kv.main.layout.kind.bytes() as usize;
        let grid = [row.div_ceil(64), 2 * heads.kv as usize, count];
        self.device.launch("evict_compact", grid, (256, 0), args)?;
        if !heads.form.rerotated {
            return Ok(());
        }
        let (table, pairs) = self.turns;
        let most = kept.counts.iter().copied().max().unwrap_or(0) as usize;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::At(kept.keep),
            Arg::At(kept.list),
            Arg::At(table),
            Arg::U32(pairs),
            Arg::U32(self.weights.interleaved.into()),
            Arg::F32(1.0 / self.rope.factor()),
        ];
        let grid = [(most * pairs as usize).div_ceil(256), heads.kv as usize, count];
        Ok(self.device.launch("evict_turn", grid, (256, 0), args)?)
    }

    /// Moves positions and tallies.
    fn move_numbers(&mut self, items: &Items, kept: &Kept, layer: usize) -> Result<(), ExecError> {
        let kv = self.caches(layer)?;
        let kv_heads = self.model.kv_heads as usize;
        let mut arrays = vec![(self.kv.main.positions_at(layer), 0)];
        let known = |i: &super::interpreter::Item| self.kv.main.heads(layer, i.sequence).iter();
        if items.list.iter().flat_map(known).any(|head| head.tallied > 0) {
            let lag = (items.list.iter().flat_map(known))
                .filter(|head| head.tallied > 0)
                .map(|head| (head.tokens - head.tallied) as u32)
                .max();
            arrays.push((self.tallies(layer)?, lag.unwrap_or(0)));
        }
        for (array, fresh) in arrays {
            let args = vec![
                kv.clone(),
                Arg::At(items.at),
                Arg::At(kept.keep),
                Arg::At(kept.list),
                Arg::At(array),
                Arg::U32(fresh),
                Arg::U32(0),
            ];
            let grid = [kv_heads, items.list.len(), 1];
            self.device.launch("evict_numbers", grid, (256, 0), args)?;
        }
        Ok(())
    }

    /// Caches of several forms: packed tokens move in place, the others to new halves, some sequences at a time if there is
    /// no room for more.
    fn evict_mixed(
        &mut self,
        heads: Heads,
        items: &Items,
        kept: &Kept,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (kv_heads, stride) = (heads.kv as usize, self.kv.main.stride);
        let mut plans: Vec<Vec<Plan>> = Vec::with_capacity(items.list.len());
        for (item, keep) in items.list.iter().zip(kept.counts.chunks(kv_heads)) {
            let mut of_item = Vec::with_capacity(kv_heads);
            for (h, keep) in keep.iter().enumerate() {
                let index = item.sequence * kv_heads + h;
                let keep = *keep as usize;
                if self.kv.main.head(layer, index).tokens > keep {
                    let at = kept.list.plus(4 * (index * stride) as u64);
                    let stay = self.device.words(at, keep)?;
                    of_item.push(plan(&self.kv.main, layer, index, &stay));
                }
            }
            plans.push(of_item);
        }
        // All bytes are counted before any token moves, as on the CPU.
        let of = |bytes: fn(&Plan) -> u64| plans.iter().flatten().map(bytes).sum::<u64>();
        let (freed, wanted) = (of(|p| p.freed), of(|p| p.wanted));
        self.kv.pool.exchange(freed, wanted)?;
        let mut from = 0;
        while from < plans.len() {
            let (mut to, mut taken) = (from, 0);
            while to < plans.len() {
                let more: u64 = plans[to].iter().map(|p| p.taken).sum();
                if to > from && taken + more > self.kv.pool.left() {
                    break;
                }
                taken += more;
                to += 1;
            }
            self.evict_some(heads, items, from..to, (kept, kv_heads), &mut plans, layer)?;
            from = to;
        }
        Ok(())
    }

    fn evict_some(
        &mut self,
        heads: Heads,
        items: &Items,
        range: Range<usize>,
        (kept, kv_heads): (&Kept, usize),
        plans: &mut [Vec<Plan>],
        layer: usize,
    ) -> Result<(), ExecError> {
        let some =
            Items { at: items.starting(range.start), list: items.list[range.clone()].to_vec() };
        let first = range.start * kv_heads;
        let part = Kept {
            counts: kept.counts[first..range.end * kv_heads].to_vec(),
            keep: kept.keep.plus(4 * first as u64),
            list: kept.list,
        };
        for plan in plans[range.clone()].iter_mut().flatten() {
            take_next(&mut self.kv.main, &mut self.kv.pool, layer, plan)?;
        }
        let kv = self.caches(layer)?;
        let mut images = self.kv.main.images(layer);
        for plan in plans[range.clone()].iter().flatten() {
            // They name the tables that the halves have been put in.
            let image = self.kv.main.image(plan.index, &plan.next, false);
            images[plan.index * 16..][..16].copy_from_slice(&image);
        }
        let next = self.device.put_words("next-heads", &images)?;
        self.move_forms(heads, kv, &some, (next, &part))?;
        self.move_numbers(&some, &part, layer)?;
        for plan in plans[range].iter().flatten() {
            let (main, pool) = (&mut self.kv.main, &mut self.kv.pool);
            pool.settle(plan.freed);
            let old = main.head(layer, plan.index).clone();
            for side in 0..2 {
                let packed = plan.next.sides[side].halves[0];
                let of = old.sides[side];
                main.give_back(pool, (layer, plan.index), (side, 0), packed..of.halves[0]);
                for form in 1..3 {
                    let first = of.base(form);
                    let blocks = first..first + of.halves[form];
                    main.give_back(pool, (layer, plan.index), (side, form), blocks);
                }
            }
            *main.change(layer, plan.index) = plan.next.clone();
        }
        Ok(())
    }

    fn move_forms(
        &mut self,
        heads: Heads,
        kv: Arg,
        items: &Items,
        (next, kept): (Address, &Kept),
    ) -> Result<(), ExecError> {
        let (kv_heads, count, dim) = (heads.kv as usize, items.list.len(), heads.dim as usize);
        let args = || vec![kv.clone(), Arg::At(items.at), Arg::At(next), Arg::At(kept.list)];
        let most = kept.counts.iter().copied().max().unwrap_or(0) as usize;
        let grid = [(most * 2 * dim / 8).div_ceil(256), kv_heads, count];
        self.device.launch("evict_move", grid, (256, 0), args())?;
        let Some(codec) = self.kv.main.layout.codec else { return Ok(()) };
        let grid = [kv_heads, count, 1];
        let packed = |side: u32| {
            let mut all = args();
            all.push(Arg::U32(side));
            all
        };
        if codec.key_axis == KeyAxis::Channel {
            let shared = 4 * (usize::from(codec.group) * dim + 16 * 256);
            self.device.launch("evict_regroup", grid, (256, shared), args())?;
        } else {
            self.device.launch("evict_packed", grid, (256, 0), packed(0))?;
        }
        Ok(self.device.launch("evict_packed", grid, (256, 0), packed(1))?)
    }
}

/// What becomes of a head that keeps the tokens `stay`.
fn plan(main: &Caches, layer: usize, index: usize, stay: &[u32]) -> Plan {
    let head = main.head(layer, index);
    let mut next = Head { tokens: stay.len(), second: !head.second, ..head.clone() };
    if head.tallied > 0 {
        next.tallied = stay.len();
    }
    let (mut freed, mut wanted, mut taken) = (0, 0, 0);
    for side in 0..2 {
        let old = head.sides[side];
        let among = |tokens: usize| stay.partition_point(|t| (*t as usize) < tokens);
        let (packed, narrow) = (among(old.packed), among(old.narrow));
        let halves = needed(packed, narrow, stay.len());
        let bytes = |form: usize| main.layout.bytes(Caches::part(side, form));
        freed += (old.halves[0] - halves[0]) as u64 * bytes(0).0;
        for (form, count) in halves.iter().enumerate().skip(1) {
            let (counted, bytes) = bytes(form);
            freed += old.halves[form] as u64 * counted;
            wanted += *count as u64 * counted;
            taken += *count as u64 * bytes.next_multiple_of(64);
        }
        next.sides[side] = Side { packed, narrow, halves };
    }
    Plan { index, next, freed, wanted, taken }
}

/// Takes the halves for what moves, in the head's other tables.
fn take_next(
    main: &mut Caches,
    pool: &mut Pool,
    layer: usize,
    plan: &Plan,
) -> Result<(), ExecError> {
    for side in 0..2 {
        let of = plan.next.sides[side];
        for form in 1..3 {
            let part = Caches::part(side, form);
            let (counted, bytes) = main.layout.bytes(part);
            let first = of.base(form);
            for block in first..first + of.halves[form] {
                let place = pool.take(counted, bytes)?;
                main.set_place((layer, plan.index), part, plan.next.second, block, place);
            }
        }
    }
    Ok(())
}
