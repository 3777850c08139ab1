//! Ops on partial caches: what fills them, when, and what reads them.

use batchmax_kernels::cuda::{Address, Arg};
use batchmax_sim::op::{Heads, Lanes, Protect};
use batchmax_sim::units::{Layer, Tokens};

use super::cache::Attended;
use super::interpreter::{Interpreter, Items};
use super::kv::{Caches, HEAD_BYTES, Layout};
use crate::error::ExecError;

/// Who leaves partial caches when, of all layers.
pub(super) struct Order {
    /// Places of a head.
    pub(super) room: usize,
    pub(super) at: Address,
    /// Per layer and head: tokens that came with the last refresh, and those that came since.
    pub(super) counts: Vec<(u32, u32)>,
}

/// Queries of all layers and sequences.
pub(super) struct Noted {
    /// Of the newest row.
    pub(super) now: Address,
    /// When the partial cache was filled.
    pub(super) filled: Address,
    /// Whether it was, per layer and sequence.
    pub(super) known: Vec<u32>,
}

impl Interpreter<'_, '_> {
    /// The partial caches, made when they are first asked for.
    pub(super) fn parts(&mut self) -> Result<&mut Caches, ExecError> {
        if self.kv.parts.is_none() {
            let main = &self.kv.main;
            let layout = Layout { codec: None, channels: None, state: 0, ..main.layout };
            let tokens = self.part_keep(self.most.part) + 1;
            let shape = (main.layers(), main.sequences);
            let parts = Caches::new(self.device, &self.kv.pool, layout, shape, tokens)?;
            self.kv.parts = Some(parts);
        }
        Ok(self.kv.parts.as_mut().expect("made above"))
    }

    /// The partial caches of a layer as kernels take them.
    pub(super) fn part_caches(&mut self, layer: usize) -> Result<Arg, ExecError> {
        self.parts()?;
        let parts = self.kv.parts.as_mut().expect("made above");
        parts.sync(self.device, layer)?;
        Ok(parts.arg(layer))
    }

    /// Those from a sequence on, for kernels that count heads by item.
    fn part_caches_from(&mut self, layer: usize, sequence: usize) -> Result<Arg, ExecError> {
        self.part_caches(layer)?;
        let kv_heads = self.model.kv_heads as usize;
        let parts = self.parts()?;
        let heads = parts.heads_at(layer).plus((sequence * kv_heads * HEAD_BYTES) as u64);
        Ok(parts.arg_with(layer, heads))
    }

    /// No cache is longer than its tables, so a larger budget never makes anybody leave.
    fn part_keep(&self, keep: Tokens) -> usize {
        (keep as usize).min(self.kv.main.stride)
    }

    fn order(&mut self) -> Result<usize, ExecError> {
        let room = self.part_keep(self.most.part) + 1;
        if self.beside.order.is_none() {
            let heads = self.kv.main.layers() * self.kv.main.per_layer();
            let at = self.device.alloc((4 * heads * room) as u64)?;
            self.beside.order = Some(Order { room, at, counts: vec![(0, 0); heads] });
        }
        Ok(room)
    }

    /// Where the order of a layer is, from a sequence on.
    fn order_at(&self, layer: usize, sequence: usize) -> Address {
        let kv_heads = self.model.kv_heads as usize;
        let head = layer * self.kv.main.per_layer() + sequence * kv_heads;
        self.beside
            .order
            .as_ref()
            .map_or(Address::default(), |order| order.at.plus((4 * head * order.room) as u64))
    }

    /// Stretches of items for one launch: their lists follow each other where all have as much room as there is.
    fn alike(&self, items: &Items, room: usize) -> Vec<std::ops::Range<usize>> {
        let mut all = Vec::new();
        for run in items.runs() {
            let whole = (run.clone()).all(|i| self.part_keep(items.list[i].lane.keep) + 1 == room);
            if whole {
                all.push(run);
            } else {
                all.extend(run.map(|i| i..i + 1));
            }
        }
        all
    }

    fn noted(&mut self) -> Result<(), ExecError> {
        if self.beside.noted.is_none() {
            let sequences = self.kv.main.layers() * self.kv.main.sequences;
            let bytes = (sequences * self.kv.main.layout.dim * 4) as u64;
            self.beside.noted = Some(Noted {
                now: self.device.alloc_zeroed(bytes)?,
                filled: self.device.alloc_zeroed(bytes)?,
                known: vec![0; sequences],
            });
        }
        Ok(())
    }

    pub(super) fn compare(
        &mut self,
        heads: Heads,
        below: i32,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        self.noted()?;
        let items = self.items(lanes)?;
        let sequences = self.kv.main.sequences;
        let first = layer * sequences;
        let at = (first * heads.dim as usize * 4) as u64;
        let (known, noted, now) = match &self.beside.noted {
            Some(n) => {
                (n.known[first..first + sequences].to_vec(), n.filled.plus(at), n.now.plus(at))
            }
            None => return Ok(()),
        };
        let known = self.device.put_words("known", &known)?;
        let stale = self.device.scratch("stale", 4 * items.list.len() as u64)?;
        let args = vec![
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32(heads.query),
            Arg::U32(heads.dim),
            Arg::F64(f64::from(below) / 1000.0),
            Arg::At(known),
            Arg::At(noted),
            Arg::At(now),
            Arg::At(stale),
        ];
        self.device.launch("compare", [items.list.len(), 1, 1], (256, 2048), args)?;
        let stale = self.device.words(stale, items.list.len())?;
        self.stale.clear();
        let found = items.list.iter().zip(stale).filter(|(_, stale)| *stale != 0);
        self.stale.extend(found.map(|(item, _)| item.sequence as u32));
        Ok(())
    }

    pub(super) fn refresh(&mut self, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let room = self.order()?;
        let items = self.items(lanes)?;
        let kv_heads = self.model.kv_heads as usize;
        let (mut counts, per_layer) = (Vec::new(), self.kv.main.per_layer());
        self.parts()?;
        for item in &items.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                let tokens = self.kv.main.head(layer, index).tokens;
                let keep = self.part_keep(item.lane.keep).min(tokens);
                counts.push(keep as u32);
                let (pool, parts) = (&mut self.kv.pool, self.kv.parts.as_mut());
                let parts = parts.expect("made above");
                parts.change(layer, index).tokens = 0;
                parts.reserve(pool, layer, index, keep + 1)?;
                parts.change(layer, index).tokens = keep;
                if let Some(order) = &mut self.beside.order {
                    order.counts[layer * per_layer + index] = (keep as u32, 0);
                }
            }
        }
        let longest = counts.iter().copied().max().unwrap_or(0) as usize;
        let (kv, scores) = (self.caches(layer)?, self.scores(layer)?);
        let newest = Protect { sinks: 0, recent: 1 };
        let kept = self.choose(kv.clone(), &items, scores, counts, newest)?;
        let other = (4 * items.list.len() * kv_heads * room) as u64;
        let other = self.device.scratch("other-order", other)?;
        for run in self.alike(&items, room) {
            let item = items.list[run.start];
            let to = self.part_caches_from(layer, item.sequence)?;
            let keep = kept.keep.plus((4 * run.start * kv_heads) as u64);
            let at = items.starting(run.start);
            let args =
                vec![kv.clone(), to, Arg::At(at), Arg::At(kept.list), Arg::U32(0), Arg::At(keep)];
            let pieces = longest * 2 * self.kv.main.layout.dim / 8;
            let grid = [pieces.div_ceil(256), kv_heads, run.len()];
            self.device.launch("gather", grid, (256, 0), args)?;
            let own = self.part_keep(item.lane.keep) + 1;
            let args = vec![
                kv.clone(),
                Arg::At(at),
                Arg::At(scores),
                Arg::At(kept.list),
                Arg::At(keep),
                Arg::U32(own as u32),
                Arg::At(self.order_at(layer, item.sequence)),
                Arg::At(other),
            ];
            self.device.launch("part_order", [kv_heads, run.len(), 1], (256, 128), args)?;
        }
        self.note_filled(&items, layer)
    }

    /// The partial caches of some sequences were filled for the queries noted last.
    fn note_filled(&mut self, items: &Items, layer: usize) -> Result<(), ExecError> {
        let bytes = (self.kv.main.layout.dim * 4) as u64;
        for item in &items.list {
            let index = layer * self.kv.main.sequences + item.sequence;
            if let Some(noted) = &mut self.beside.noted {
                noted.known[index] = 1;
                let at = index as u64 * bytes;
                self.device.copy(noted.now.plus(at), noted.filled.plus(at), bytes)?;
            }
            let state = &mut self.sequences[item.sequence];
            let step = state.generated.len() as u32;
            if step > 0 {
                state.refreshed.push((step, layer as Layer));
            }
        }
        Ok(())
    }

    pub(super) fn append_part(&mut self, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let room = self.order()?;
        let items = self.items(lanes)?;
        let (kv_heads, per_layer) = (self.model.kv_heads as usize, self.kv.main.per_layer());
        let (mut filled, mut added) = (Vec::new(), Vec::new());
        self.parts()?;
        for item in &items.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                let tokens = self.kv.main.head(layer, index).tokens;
                let keep = self.part_keep(item.lane.keep);
                let (pool, parts) = (&mut self.kv.pool, self.kv.parts.as_mut());
                let parts = parts.expect("made above");
                let held = parts.head(layer, index).tokens;
                let wanted = keep.min(tokens) + 1;
                parts.reserve(pool, layer, index, wanted.saturating_sub(held))?;
                if held <= keep {
                    parts.change(layer, index).tokens += 1;
                }
                if let Some(order) = &mut self.beside.order {
                    let counts = &mut order.counts[layer * per_layer + index];
                    filled.push(counts.0);
                    added.push(counts.1);
                    counts.1 += 1;
                }
            }
        }
        let filled = self.device.put_words("filled", &filled)?;
        let added = self.device.put_words("added", &added)?;
        let kv = self.caches(layer)?;
        for run in self.alike(&items, room) {
            let item = items.list[run.start];
            let first = (4 * run.start * kv_heads) as u64;
            let args = vec![
                kv.clone(),
                self.part_caches_from(layer, item.sequence)?,
                Arg::At(items.starting(run.start)),
                Arg::At(filled.plus(first)),
                Arg::At(added.plus(first)),
                Arg::U32((self.part_keep(item.lane.keep) + 1) as u32),
                Arg::At(self.order_at(layer, item.sequence)),
            ];
            self.device.launch("append_part", [kv_heads, run.len(), 1], (64, 0), args)?;
        }
        Ok(())
    }

    /// The partial caches of some sequences, to be attended to.
    pub(super) fn attended_parts(
        &mut self,
        layer: usize,
        items: &Items,
    ) -> Result<Attended, ExecError> {
        let kv = self.part_caches(layer)?;
        let parts = self.parts()?;
        let heads = items.list.iter().flat_map(|i| parts.heads(layer, i.sequence));
        let longest = heads.map(|head| head.tokens).max().unwrap_or(0);
        Ok(Attended { kv, kv_heads: self.model.kv_heads, longest, plain: true })
    }

    pub(super) fn attend_part(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let caches = self.attended_parts(layer, &items)?;
        let out = self.out();
        self.attend_decode(heads, &caches, &items, None, None, out)
    }

    pub(super) fn release_part(&mut self, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let kv_heads = self.model.kv_heads as usize;
        let Some(parts) = &mut self.kv.parts else { return Ok(()) };
        for sequence in lanes.indices() {
            for h in 0..kv_heads {
                let index = sequence as usize * kv_heads + h;
                parts.clear(&mut self.kv.pool, layer, index);
            }
        }
        Ok(())
    }
}
