//! Ops with a row that speculates: whole tokens go to slower memory, and those that it foresees come back.
//!
//! Slower memory is pinned memory of the host, to and from which a second queue copies while the first one computes, or files,
//! through the thread that the CPU's runs have.

use std::collections::HashMap;

use batchmax_kernels::cuda::{Address, Arg, Event, Pinned};
use batchmax_sim::op::{Heads, Lanes, Protect, part_room};
use batchmax_sim::units::{Bytes, Seconds, Tokens};

use super::cache::Out;
use super::interpreter::{Interpreter, Item, Items};
use super::kv::Caches;
use super::memory::{MAIN, Rows};
use super::rank::Counted;
use crate::error::ExecError;
use crate::tier::{Tier, TierPlace, TierUse};

/// Offloaded tokens.
#[derive(Default)]
pub(super) struct Slower {
    place: TierPlace,
    /// What is fetched for the next step: per layer and sequence, per KV head, ascending.
    foreseen: HashMap<(usize, usize), Vec<Vec<u32>>>,
    /// Of files.
    tier: Option<Tier>,
    /// Of memory, per cache: where, and how many tokens are there.
    pinned: HashMap<usize, (Pinned, usize)>,
    /// Memory of caches that were forgotten.
    spare: Vec<Pinned>,
    /// Rows that come back, per layer.
    arriving: Option<Address>,
    /// The last copy to slower memory has ended, which reads what the next one's rows are written to.
    sent: Option<Event>,
    /// The copies from slower memory have ended, per layer.
    arrived: HashMap<usize, Event>,
    /// Marks around copies that may go on.
    spans: Vec<(Event, Event)>,
    /// Marks around copies that have ended, and around times in which the first queue waited for them.
    ended: [Vec<(Event, Event)>; 2],
    now: u64,
    used: TierUse,
}

impl Slower {
    pub(super) fn new(place: TierPlace) -> Self {
        Self { place, ..Self::default() }
    }

    fn tier(&mut self, token_bytes: usize) -> &mut Tier {
        let place = self.place.clone();
        self.tier.get_or_insert_with(|| Tier::new(place, token_bytes))
    }

    fn in_files(&self) -> bool {
        self.place != TierPlace::Memory
    }

    /// What it was used for so far.
    pub(super) fn used(&self) -> TierUse {
        self.tier.as_ref().map_or(self.used, Tier::used)
    }
}

impl Interpreter<'_, '_> {
    fn slot(&self, layer: usize, sequence: usize, head: usize) -> usize {
        layer * self.kv.main.per_layer() + sequence * self.model.kv_heads as usize + head
    }

    /// Copies the newest rows of each item's heads next to each other; where each head's begin, and how many there are.
    pub(super) fn rows_out(
        &mut self,
        items: &Items,
        layer: usize,
    ) -> Result<(Address, Vec<u32>), ExecError> {
        let kv_heads = self.model.kv_heads as usize;
        let mut from = vec![0u32];
        for item in &items.list {
            for head in self.kv.main.heads(layer, item.sequence) {
                let rows = item.rows.min(head.tokens) as u32;
                from.push(from.last().copied().unwrap_or(0) + rows);
            }
        }
        let all = from.last().copied().unwrap_or(0) as usize;
        let bytes = self.kv.main.layout.token_bytes();
        let kv = self.caches(layer)?;
        let begins = self.device.put_words("rows-from", &from)?;
        let rows = self.device.scratch("rows-out", (all * bytes) as u64)?;
        let args = vec![kv, Arg::At(items.at), Arg::At(begins), Arg::At(rows)];
        let grid = [(items.most_rows() * bytes / 8).div_ceil(256), kv_heads, items.list.len()];
        self.device.launch("rows_out", grid, (256, 0), args)?;
        Ok((rows, from))
    }

    pub(super) fn offload(&mut self, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let items = self.kept_items(lanes)?;
        if let Some(sent) = self.slower.sent {
            self.device.driver()?.wait(MAIN, sent)?;
        }
        let (rows, from) = self.rows_out(&items, layer)?;
        let (kv_heads, bytes) = (self.model.kv_heads as usize, self.kv.main.layout.token_bytes());
        let places = items.list.iter().flat_map(|i| (0..kv_heads).map(move |h| (i.sequence, h)));
        let places: Vec<(usize, usize)> = places.collect();
        if self.slower.in_files() {
            let all = self.device.download(rows, *from.last().unwrap_or(&0) as usize * bytes)?;
            for (n, (sequence, head)) in places.into_iter().enumerate() {
                let part = from[n] as usize * bytes..from[n + 1] as usize * bytes;
                let slot = self.slot(layer, sequence, head);
                self.slower.tier(bytes).store(slot, all[part].to_vec());
            }
            return Ok(());
        }
        let side = self.device.side()?;
        let (ready, start) = (self.device.take_event()?, self.device.take_event()?);
        self.device.driver()?.record(MAIN, ready)?;
        self.device.driver()?.wait(side, ready)?;
        self.device.driver()?.record(side, start)?;
        for (n, (sequence, head)) in places.into_iter().enumerate() {
            let slot = self.slot(layer, sequence, head);
            let (to, held) = self.pinned(slot)?;
            let count = (from[n + 1] - from[n]) as usize;
            let source = rows.plus(u64::from(from[n]) * bytes as u64);
            let (offset, size) = ((held * bytes) as u64, (count * bytes) as u64);
            if size > 0 {
                self.device.driver()?.copy_out(side, source, to, offset, size)?;
            }
            self.slower.pinned.insert(slot, (to, held + count));
            self.slower.now += size;
            self.slower.used.stored = Bytes(self.slower.used.stored.0 + size);
        }
        let used = &mut self.slower.used;
        used.peak = used.peak.max(Bytes(self.slower.now));
        let sent = self.device.take_event()?;
        self.device.driver()?.record(side, sent)?;
        self.device.give_event(ready);
        self.slower.sent = Some(sent);
        self.slower.spans.push((start, sent));
        Ok(())
    }

    /// The memory of a cache and the tokens in it.
    fn pinned(&mut self, slot: usize) -> Result<(Pinned, usize), ExecError> {
        if let Some(found) = self.slower.pinned.get(&slot) {
            return Ok(*found);
        }
        if let Some(spare) = self.slower.spare.pop() {
            return Ok((spare, 0));
        }
        let bytes = self.kv.main.stride * self.kv.main.layout.token_bytes();
        Ok((self.device.alloc_pinned(bytes as u64)?, 0))
    }

    /// Forgets what finished sequences have in slower memory.
    pub(super) fn forget(&mut self, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let bytes = self.kv.main.layout.token_bytes();
        for sequence in lanes.indices() {
            for head in 0..self.model.kv_heads as usize {
                let slot = self.slot(layer, sequence as usize, head);
                if let Some(tier) = &mut self.slower.tier {
                    tier.forget(slot);
                }
                if let Some((at, tokens)) = self.slower.pinned.remove(&slot) {
                    self.slower.now -= (tokens * bytes) as u64;
                    self.slower.spare.push(at);
                }
            }
        }
        Ok(())
    }

    /// Rows of a layer that come back: so many per head.
    fn arriving(&mut self, layer: usize) -> Result<(Address, usize), ExecError> {
        let most = (self.most.part as usize).min(self.kv.main.stride);
        let bytes = (self.kv.main.per_layer() * most * self.kv.main.layout.token_bytes()) as u64;
        let all = match self.slower.arriving {
            Some(at) => at,
            None => {
                let at = self.device.alloc(bytes * self.kv.main.layers() as u64)?;
                *self.slower.arriving.insert(at)
            }
        };
        Ok((all.plus(bytes * layer as u64), most))
    }

    pub(super) fn fetch(&mut self, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let (kv_heads, bytes) = (self.model.kv_heads as usize, self.kv.main.layout.token_bytes());
        let mut wanted = Vec::new();
        for sequence in lanes.indices() {
            let sequence = sequence as usize;
            let Some(lists) = self.slower.foreseen.get(&(layer, sequence)) else { continue };
            for (head, list) in lists.iter().enumerate().filter(|(_, list)| !list.is_empty()) {
                wanted.push((sequence * kv_heads + head, list.clone()));
            }
        }
        let first = layer * self.kv.main.per_layer();
        if self.slower.in_files() {
            for (index, list) in wanted {
                self.slower.tier(bytes).fetch(first + index, list);
            }
            return Ok(());
        }
        let (to, most) = self.arriving(layer)?;
        let side = self.device.side()?;
        let (ready, start) = (self.device.take_event()?, self.device.take_event()?);
        // The step at work has read what came for it.
        self.device.driver()?.record(MAIN, ready)?;
        self.device.driver()?.wait(side, ready)?;
        self.device.driver()?.record(side, start)?;
        for (index, list) in wanted {
            let Some((from, held)) = self.slower.pinned.get(&(first + index)).copied() else {
                return Err(ExecError::TierLost);
            };
            if list.last().is_some_and(|token| *token as usize >= held) {
                return Err(ExecError::TierLost);
            }
            // Neighbours come in one copy.
            for (place, token, count) in stretches(&list) {
                let to = to.plus(((index * most + place) * bytes) as u64);
                let (offset, size) = ((token * bytes) as u64, (count * bytes) as u64);
                self.device.driver()?.copy_in(side, from, offset, to, size)?;
            }
        }
        let done = self.device.take_event()?;
        self.device.driver()?.record(side, done)?;
        self.device.give_event(ready);
        self.slower.arrived.insert(layer, done);
        self.slower.spans.push((start, done));
        Ok(())
    }

    /// Lets the queue wait for the rows that a layer asked for.
    fn wait_for(&mut self, layer: usize) -> Result<(), ExecError> {
        let Some(done) = self.slower.arrived.remove(&layer) else { return Ok(()) };
        let (before, after) = (self.device.take_event()?, self.device.take_event()?);
        self.device.driver()?.record(MAIN, before)?;
        self.device.driver()?.wait(MAIN, done)?;
        self.device.driver()?.record(MAIN, after)?;
        let [copies, waits] = &mut self.slower.ended;
        waits.push((before, after));
        // Copies follow each other in one queue: all before this one have ended, too.
        let last = self.slower.spans.iter().position(|(_, end)| *end == done);
        copies.extend(self.slower.spans.drain(..last.map_or(0, |i| i + 1)));
        Ok(())
    }

    /// Counts the times of copies and waits, once the step has ended.
    pub(super) fn count_copies(&mut self) -> Result<(), ExecError> {
        let mut sums = [0.0; 2];
        for (sum, list) in sums.iter_mut().zip(std::mem::take(&mut self.slower.ended)) {
            for (start, end) in list {
                *sum += self.device.driver()?.elapsed(start, end)?;
                self.device.give_event(start);
                // The next copy to slower memory waits for the one before.
                if self.slower.sent != Some(end) {
                    self.device.give_event(end);
                }
            }
        }
        self.slower.used.busy += Seconds(sums[0]);
        self.slower.used.waited += Seconds(sums[1]);
        Ok(())
    }

    /// Puts rows from files where copies would have put them.
    fn arrive_from_files(&mut self, items: &Items, layer: usize) -> Result<(), ExecError> {
        let (to, most) = self.arriving(layer)?;
        let (kv_heads, bytes) = (self.model.kv_heads as usize, self.kv.main.layout.token_bytes());
        for item in &items.list {
            for head in 0..kv_heads {
                let list = self.slower.foreseen.get(&(layer, item.sequence));
                if list.and_then(|l| l.get(head)).is_none_or(Vec::is_empty) {
                    continue;
                }
                let slot = self.slot(layer, item.sequence, head);
                let rows = self.slower.tier(bytes).wait(slot)?;
                let place = (item.sequence * kv_heads + head) * most * bytes;
                self.device.upload(to.plus(place as u64), &rows)?;
            }
        }
        Ok(())
    }

    /// Puts what was fetched for these sequences into their partial caches, with the speculating row's own token behind.
    fn arrive(&mut self, heads: Heads, items: &Items, layer: usize) -> Result<(), ExecError> {
        if self.slower.in_files() {
            self.arrive_from_files(items, layer)?;
        } else {
            self.wait_for(layer)?;
        }
        let (rows, most) = self.arriving(layer)?;
        let kv_heads = heads.kv as usize;
        let mut positions = vec![0u32; self.kv.main.per_layer() * most];
        let mut from = Vec::with_capacity(items.list.len() * kv_heads);
        let mut any = 0;
        self.parts()?;
        for item in &items.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                let lists = self.slower.foreseen.get(&(layer, item.sequence));
                let wanted = lists.and_then(|l| l.get(h)).map_or(&[][..], |w| w);
                from.push((index * most) as u32);
                // Nobody asks for these positions; cached ones would do as well.
                positions[index * most..][..wanted.len()].copy_from_slice(wanted);
                any = any.max(wanted.len());
                let arrived = (wanted.len() * self.kv.main.layout.token_bytes()) as u64;
                self.slower.used.fetched = Bytes(self.slower.used.fetched.0 + arrived);
                let tokens = self.kv.main.head(layer, index).tokens as Tokens;
                let room = part_room(item.lane.keep, tokens) as usize;
                let (pool, parts) = (&mut self.kv.pool, self.kv.parts.as_mut());
                let parts = parts.expect("made above");
                parts.change(layer, index).tokens = 0;
                parts.reserve(pool, layer, index, room.max(wanted.len()))?;
                parts.change(layer, index).tokens = wanted.len();
            }
        }
        let kv = self.part_caches(layer)?;
        let from = self.device.put_words("arrive-from", &from)?;
        let positions = self.device.put_words("arrive-positions", &positions)?;
        let args = vec![kv, Arg::At(items.at), Arg::At(from), Arg::At(rows), Arg::At(positions)];
        let bytes = self.kv.main.layout.token_bytes();
        let grid = [(any * bytes / 8).div_ceil(256), kv_heads, items.list.len()];
        self.device.launch("rows_in", grid, (256, 0), args)?;
        let own = |item: &Item| Item { first: item.first + item.rows - 1, rows: 1, ..*item };
        let own = self.put_items("own-items", items.list.iter().map(own).collect())?;
        for item in &own.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                let (pool, parts) = (&mut self.kv.pool, self.kv.parts.as_mut());
                let parts = parts.expect("made above");
                parts.reserve(pool, layer, index, 1)?;
                parts.change(layer, index).tokens += 1;
            }
        }
        let kv = self.part_caches(layer)?;
        self.append_to(heads, kv, &own)
    }

    pub(super) fn attend_ahead(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        self.arrive(heads, &items, layer)?;
        let kv_heads = heads.kv as usize;
        // Each row by itself, without the tokens that came back whole.
        let (mut each, mut list, mut begins) = (Vec::new(), Vec::new(), vec![0u32]);
        for item in &items.list {
            for row in item.first..item.first + item.rows {
                each.push(Item { first: row, rows: 1, ..*item });
                for h in 0..kv_heads {
                    let lists = self.slower.foreseen.get(&(layer, item.sequence));
                    list.extend_from_slice(lists.and_then(|l| l.get(h)).map_or(&[][..], |w| w));
                    begins.push(list.len() as u32);
                }
            }
        }
        let each = self.put_items("ahead-items", each)?;
        let without =
            (self.device.put_words("without", &list)?, self.device.put_words("begins", &begins)?);
        let caches = self.attended(layer, &items)?;
        let out = self.out();
        self.attend_decode(heads, &caches, &each, None, Some(without), out)?;
        let parts = self.attended_parts(layer, &items)?;
        let rows = items.list.iter().map(|i| i.first + i.rows).max().unwrap_or(0);
        let at = self.device.scratch("other-attention", out.rows.bytes(rows))?;
        let lse = self.device.scratch("other-lse", (4 * rows * heads.query as usize) as u64)?;
        let other = Out { rows: Rows { at, ..out.rows }, lse };
        self.attend_prefill(heads, &parts, &items, None, None, other)?;
        let args = vec![
            out.rows.arg(),
            Arg::At(out.lse),
            other.rows.arg(),
            Arg::At(other.lse),
            Arg::U32(heads.dim),
        ];
        Ok(self.device.launch("attend_merge", [heads.query as usize, rows, 1], (32, 0), args)?)
    }

    /// Chooses what the speculating row attends to most, with fetched tokens as the whole ones that they were.
    pub(super) fn foresee(
        &mut self,
        heads: Heads,
        whole: bool,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (kv_heads, form) = (heads.kv as usize, heads.form);
        let items = self.items(lanes)?;
        let last = |item: &Item| Item {
            first: item.first + item.rows - 1,
            rows: 1,
            seen: u32::MAX,
            ..*item
        };
        let items = self.put_items("last-items", items.list.iter().map(last).collect())?;
        let counted: Vec<Counted> =
            vec![(1, u32::MAX, heads.kv as f32 / heads.query as f32); items.list.len()];
        let sums = self.device.scratch("sums", 4 * self.kv.main.plane() as u64)?;
        let (kv, longest) = (self.caches(layer)?, self.longest(layer, &items));
        self.mass(heads, (kv.clone(), longest), &items, &counted, sums, 0)?;
        let parts = self.attended_parts(layer, &items)?;
        let plane = self.kv.parts.as_ref().map_or(0, Caches::plane);
        let part_sums = self.device.scratch("part-sums", 4 * plane as u64)?;
        let part = (parts.kv.clone(), parts.longest);
        self.mass(heads, part, &items, &counted, part_sums, 0)?;
        self.put_fetched(&items, (kv, parts.kv), (part_sums, sums), layer)?;
        // The choice is among those that are packed, unless whole ones are wanted, too.
        let mut images = self.kv.main.images(layer);
        let mut counts = Vec::new();
        for item in &items.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                let tokens = self.kv.main.head(layer, index).tokens;
                let (keys, values) = form.packed_of(tokens as Tokens);
                let candidates = if whole { tokens } else { keys.max(values) as usize };
                images[index * 16] = candidates as u32;
                counts.push((item.lane.keep as usize).min(candidates) as u32);
            }
        }
        let at = self.device.put_words("candidate-heads", &images)?;
        let kv = self.kv.main.arg_with(layer, at);
        let kept = self.choose(kv, &items, sums, counts, Protect::default())?;
        for (item, counts) in items.list.iter().zip(kept.counts.chunks(kv_heads)) {
            let mut lists = Vec::with_capacity(kv_heads);
            for (h, count) in counts.iter().enumerate() {
                let meta = (item.sequence * kv_heads + h) * self.kv.main.stride;
                let at = kept.list.plus(4 * meta as u64);
                lists.push(self.device.words(at, *count as usize)?);
            }
            self.slower.foreseen.insert((layer, item.sequence), lists);
        }
        Ok(())
    }

    /// Sums of fetched tokens go where they stand in the caches.
    fn put_fetched(
        &mut self,
        items: &Items,
        (kv, part): (Arg, Arg),
        (from, sums): (Address, Address),
        layer: usize,
    ) -> Result<(), ExecError> {
        let kv_heads = self.model.kv_heads as usize;
        let lists: Vec<Vec<u32>> = (items.list.iter())
            .flat_map(|item| (0..kv_heads).map(move |h| (item.sequence, h)))
            .map(|(sequence, h)| {
                let lists = self.slower.foreseen.get(&(layer, sequence));
                lists.and_then(|l| l.get(h)).cloned().unwrap_or_default()
            })
            .collect();
        let most = lists.iter().map(Vec::len).max().unwrap_or(0);
        if most == 0 {
            return Ok(());
        }
        let counts: Vec<u32> = lists.iter().map(|l| l.len() as u32).collect();
        let padded: Vec<u32> = (lists.into_iter())
            .flat_map(|mut list| {
                list.resize(most, 0);
                list
            })
            .collect();
        let list = self.device.put_words("fetched", &padded)?;
        let counts = self.device.put_words("fetched-counts", &counts)?;
        let args = vec![
            kv,
            part,
            Arg::At(items.at),
            Arg::At(list),
            Arg::U32(most as u32),
            Arg::At(counts),
            Arg::At(from),
            Arg::At(sums),
        ];
        let grid = [most.div_ceil(256), kv_heads, items.list.len()];
        Ok(self.device.launch("rank_put", grid, (256, 0), args)?)
    }
}

/// Neighbours of an ascending list: place of the first, its token, how many.
fn stretches(list: &[u32]) -> Vec<(usize, usize, usize)> {
    let mut found: Vec<(usize, usize, usize)> = Vec::new();
    for (place, token) in list.iter().enumerate() {
        match found.last_mut() {
            Some((_, first, count)) if *first + *count == *token as usize => *count += 1,
            _ => found.push((place, *token as usize, 1)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_come_in_one_copy() {
        assert_eq!(stretches(&[3, 4, 5, 9, 11, 12]), [(0, 3, 3), (3, 9, 1), (4, 11, 2)]);
        assert!(stretches(&[]).is_empty());
    }
}
