//! Replays a program op by op on a device: what [`crate::interpreter`] does on the CPU, which is the definition.
//!
//! The host decides what it can know (counts, places, who takes part) and looks at results only where a choice of the device
//! changes what comes next: tokens, lengths that depend on the data, lists that go to slower memory.

use batchmax_kernels::cuda::{Address, Arg};
use batchmax_kernels::rope::RopeTable;
use batchmax_sim::memory::Buffers;
use batchmax_sim::op::{Lane, Lanes, Op, OpKind, Phase};
use batchmax_sim::profile::{Activation, Model};
use batchmax_sim::program::Pass;
use batchmax_sim::units::{Layer, Tokens};

use super::ahead::Slower;
use super::kv::KvStore;
use super::memory::{Device, Kind, Rows, bytes_of};
use super::weights::{DeviceMaps, DeviceWeights};
use crate::chunks::ChunkStore;
use crate::engine::Chosen;
use crate::error::ExecError;
use crate::interpreter::SequenceState;
use crate::interpreter::step::taking_part;

/// The buffers between ops, as large as [`Buffers`] says, and what the host knows of the step at work.
pub(super) struct Slots {
    pub(super) residual: Rows,
    pub(super) normed: Rows,
    pub(super) qkv: Rows,
    pub(super) attention: Rows,
    pub(super) log_sum_exp: Address,
    pub(super) gate_up: Rows,
    gated: Rows,
    sampled: Rows,
    pub(super) logits: Rows,
    pub(super) ids: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// Sequence, first row and rows of the step at work.
    pub(super) step_rows: Vec<(u32, usize, usize)>,
    /// Sequences whose next token the step at work chose, with the rows of their logits.
    pub(super) chosen: Vec<(u32, usize)>,
    /// The logits of the step at work, where somebody wants them.
    shown: Vec<f32>,
}

impl Slots {
    /// For programs that need `buffers`.
    pub(super) fn new(
        device: &mut Device<'_>,
        model: &Model,
        buffers: &Buffers,
        kind: Kind,
    ) -> Result<Self, ExecError> {
        let widths = Buffers::row_widths(model);
        let rows = buffers.rows.max(1);
        let sampled = buffers.sampled.max(1);
        let mut make = |kind: Kind, rows: u64, width: u64| -> Result<Rows, ExecError> {
            let at = device.alloc(rows * width * kind.bytes())?;
            Ok(Rows { at, kind, width: width as u32 })
        };
        let width = |name: &str| widths.iter().find(|(n, _)| *n == name).map_or(0, |(_, w)| *w);
        Ok(Self {
            residual: make(kind, rows, width("residual"))?,
            normed: make(kind, rows, width("normed"))?,
            qkv: make(kind, rows, width("qkv"))?,
            attention: make(kind, rows, width("attention"))?,
            log_sum_exp: make(Kind::F32, rows, width("log_sum_exp"))?.at,
            gate_up: make(kind, rows, width("gate_up"))?,
            gated: make(kind, rows, width("gated"))?,
            sampled: make(kind, sampled, width("residual"))?,
            logits: make(Kind::F32, sampled, u64::from(model.vocab))?,
            ids: Vec::new(),
            positions: Vec::new(),
            step_rows: Vec::new(),
            chosen: Vec::new(),
            shown: Vec::new(),
        })
    }
}

/// A sequence of an op.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) sequence: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) seen: u32,
    pub(super) lane: Lane,
}

/// The sequences of an op, on both sides.
#[derive(Clone, Debug)]
pub(super) struct Items {
    pub(super) at: Address,
    pub(super) list: Vec<Item>,
}

/// Bytes of an item as kernels read it.
pub(super) const ITEM_BYTES: u64 = 16;

impl Items {
    /// Most rows of one.
    pub(super) fn most_rows(&self) -> usize {
        self.list.iter().map(|i| i.rows).max().unwrap_or(0)
    }

    /// The items from one on, as kernels read them.
    pub(super) fn starting(&self, first: usize) -> Address {
        self.at.plus(first as u64 * ITEM_BYTES)
    }

    /// Stretches of items whose sequences follow each other.
    pub(super) fn runs(&self) -> Vec<std::ops::Range<usize>> {
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for (i, item) in self.list.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if self.list[i - 1].sequence + 1 == item.sequence => run.end = i + 1,
                _ => runs.push(i..i + 1),
            }
        }
        runs
    }
}

/// What stands beside the caches, made when a program first needs it.
#[derive(Default)]
pub(super) struct Beside {
    /// Scores by token, per layer where evictions wait for the end of a pass, else for all.
    pub(super) scores: Vec<Address>,
    /// Tallies by token and layer.
    pub(super) tallies: Option<Address>,
    /// Extremes of pages.
    pub(super) pages: Option<super::choice::Pages>,
    /// Clusters of keys.
    pub(super) clusters: Option<super::choice::Clusters>,
    /// Caches of chosen tokens.
    pub(super) gathered: Option<super::choice::Gathered>,
    /// Partial caches: who leaves when, and the queries that they are compared by.
    pub(super) order: Option<super::refresh::Order>,
    pub(super) noted: Option<super::refresh::Noted>,
}

/// What a replay works on.
pub(super) struct Interpreter<'a, 'd> {
    pub(super) device: &'a mut Device<'d>,
    pub(super) model: &'a Model,
    pub(super) weights: &'a DeviceWeights,
    pub(super) rope: &'a RopeTable,
    /// Its angles on the device, and the pairs of a head.
    pub(super) turns: (Address, u32),
    pub(super) kv: KvStore,
    pub(super) slots: Slots,
    pub(super) sequences: Vec<SequenceState>,
    pub(super) keep_prompt_logits: bool,
    /// Somebody looks at the logits.
    pub(super) watched: bool,
    pub(super) cache_of: Vec<Layer>,
    pub(super) short_heads: Vec<Vec<u32>>,
    pub(super) maps: Vec<DeviceMaps>,
    /// Evictions wait for the end of a pass.
    pub(super) deferred: bool,
    /// Largest numbers of what a choice or a partial cache may need, over the whole program.
    pub(super) most: Most,
    pub(super) beside: Beside,
    pub(super) chunks: ChunkStore,
    pub(super) chunk: u32,
    /// Sequences whose partial cache in the layer at work is stale.
    pub(super) stale: Vec<u32>,
    pub(super) slower: Slower,
    /// Layers whose heads the device has counted this step's rows in already.
    pub(super) advanced: Vec<bool>,
    pub(super) timed: super::step::Timed,
    /// Bytes to write before each op, so that it finds nothing of what it needs in the cache of the device.
    pub(super) sweep: u64,
}

/// Largest numbers of a program.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Most {
    /// Clusters of a head.
    pub(super) clusters: Tokens,
    /// Tokens of a partial cache that was filled.
    pub(super) part: Tokens,
}

impl Interpreter<'_, '_> {
    /// The sequences of an op with their rows in the step.
    pub(super) fn items(&mut self, lanes: &Lanes) -> Result<Items, ExecError> {
        self.items_named("items", lanes, |_, rows| rows)
    }

    /// The same with the rows that the op's lanes say: those that are kept come first.
    pub(super) fn kept_items(&mut self, lanes: &Lanes) -> Result<Items, ExecError> {
        self.items_named("kept-items", lanes, |lane, _| lane.rows as usize)
    }

    fn items_named(
        &mut self,
        name: &'static str,
        lanes: &Lanes,
        rows: impl Fn(&Lane, usize) -> usize,
    ) -> Result<Items, ExecError> {
        let mut step = self.slots.step_rows.iter();
        let mut list = Vec::with_capacity(self.slots.step_rows.len());
        for lane in lanes.as_slice() {
            for sequence in lane.first..lane.first + lane.sequences {
                let found = step.find(|(s, ..)| *s == sequence);
                let Some((_, first, all)) = found.copied() else { continue };
                let rows = rows(lane, all);
                let seen = self.sequences[sequence as usize].seen_with_step();
                let sequence = sequence as usize;
                list.push(Item { sequence, first, rows, seen, lane: *lane });
            }
        }
        self.put_items(name, list)
    }

    pub(super) fn put_items(
        &mut self,
        name: &'static str,
        list: Vec<Item>,
    ) -> Result<Items, ExecError> {
        let words: Vec<u32> = (list.iter())
            .flat_map(|i| [i.sequence as u32, i.first as u32, i.rows as u32, i.seen])
            .collect();
        let at = self.device.put(name, &bytes_of(&words))?;
        Ok(Items { at, list })
    }

    /// The caches of a layer as kernels take them, once the device knows them.
    pub(super) fn caches(&mut self, layer: usize) -> Result<Arg, ExecError> {
        self.kv.main.sync(self.device, layer)?;
        Ok(self.kv.main.arg(layer))
    }

    /// Tokens of the longest head of some sequences.
    pub(super) fn longest(&self, layer: usize, items: &Items) -> usize {
        let heads = items.list.iter().flat_map(|i| self.kv.main.heads(layer, i.sequence));
        heads.map(|head| head.tokens).max().unwrap_or(0)
    }

    /// Positions of the step's rows on the device.
    pub(super) fn positions(&mut self) -> Result<Address, ExecError> {
        Ok(self.device.put("positions", &bytes_of(&self.slots.positions))?)
    }

    pub(super) fn run(
        &mut self,
        pass: &Pass,
        op: &Op,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let taken = taking_part(op.branch, lanes, &self.stale);
        let lanes = taken.as_ref().unwrap_or(lanes);
        if lanes.as_slice().is_empty() {
            return Ok(());
        }
        let rows = lanes.rows() as usize;
        let index = layer_index(layer);
        match op.kind {
            OpKind::Embed { .. } => self.embed(rows),
            OpKind::RmsNorm { accumulate, .. } => self.rms_norm(op.name, lanes, layer, accumulate),
            OpKind::Gemm { accumulate, .. } => self.gemm(op.name, rows, layer, accumulate),
            OpKind::QkNorm { heads } => self.qk_norm(heads, rows, index),
            OpKind::Rope { heads } => self.rotate(heads, lanes, index),
            OpKind::Append { heads } => self.append(heads, lanes, index),
            OpKind::Attend { heads, window } => {
                let cache = layer.map(|l| self.cache_of.get(l as usize).copied().unwrap_or(l));
                self.attend(pass.phase, heads, window, lanes, layer_index(cache))
            }
            OpKind::Tally { heads } => self.tally(heads, lanes, index),
            OpKind::Rank { heads, by } => self.rank(heads, by, lanes, index),
            OpKind::Evict { heads, protect, choice } => {
                self.evict(heads, protect, choice, lanes, index)
            }
            OpKind::Accumulate { heads, protect, choice } => {
                self.accumulate(heads, protect, choice, lanes, index)
            }
            OpKind::ReadState { heads } => self.read_state(heads, lanes, index),
            OpKind::Index { page, .. } => self.index(page, lanes, index),
            OpKind::Cluster { sinks, rounds, .. } => self.cluster(sinks, rounds, lanes, index),
            OpKind::Select { heads, by } => self.select(heads, by, lanes, index),
            OpKind::AttendChosen { heads, by } => self.attend_chosen(heads, by, lanes, index),
            OpKind::Offload { .. } => self.offload(lanes, index),
            OpKind::AttendAhead { heads } => self.attend_ahead(heads, lanes, index),
            OpKind::Foresee { heads, whole } => self.foresee(heads, whole, lanes, index),
            OpKind::Fetch { .. } => self.fetch(lanes, index),
            OpKind::Load { heads, chunk } => self.load(heads, chunk, lanes, index),
            OpKind::Deviate { heads } => self.deviate(heads, lanes, index),
            OpKind::Blend { heads } => self.blend(heads, lanes, index),
            OpKind::AttendRows { heads } => self.attend_rows(heads, lanes, index),
            OpKind::Compare { heads, below } => self.compare(heads, below, lanes, index),
            OpKind::Refresh { .. } => self.refresh(lanes, index),
            OpKind::AppendPart { .. } => self.append_part(lanes, index),
            OpKind::AttendPart { heads } => self.attend_part(heads, lanes, index),
            OpKind::ReleasePart { .. } => self.release_part(lanes, index),
            OpKind::Pack { heads } => self.pack_op(heads, lanes, index),
            OpKind::Trim { heads } => self.trim(heads, lanes, index),
            OpKind::PruneChannels { heads } => self.prune_channels(heads, lanes, index),
            OpKind::Forward { width, recent } => self.forward(width, recent, lanes, index),
            OpKind::AllReduce { .. } => self.all_reduce(rows),
            OpKind::Gated { .. } => self.gated(rows),
            OpKind::Softcap { width } => self.softcap(rows * width as usize),
            OpKind::Sample { .. } => self.sample(pass, lanes.as_slice(), rows),
            OpKind::Release { .. } => self.release(lanes, index),
        }
    }

    fn embed(&mut self, rows: usize) -> Result<(), ExecError> {
        let scale = self.model.embedding_scale.unwrap_or(1.0) as f32;
        let ids = self.device.put("ids", &bytes_of(&self.slots.ids))?;
        let out = self.slots.residual;
        let (weights, kind) = (self.weights, self.weights.kind);
        Ok(weights.embedding.embed(self.device, kind, (ids, rows), scale, out)?)
    }

    fn rms_norm(
        &mut self,
        name: &str,
        lanes: &Lanes,
        layer: Option<Layer>,
        accumulate: bool,
    ) -> Result<(), ExecError> {
        let Some(layer) = layer else {
            self.gather_sampled(lanes.as_slice())?;
            let (input, out) = (self.slots.sampled, self.slots.normed);
            return self.norm(input, self.weights.final_norm, false, out, lanes.rows() as usize);
        };
        let weights = &self.weights.layers[layer as usize];
        let weight = match name {
            "attention_norm" => weights.attention_norm,
            "ffn_norm" => weights.ffn_norm,
            "post_attention_norm" => weights.post_attention_norm,
            _ => weights.post_ffn_norm,
        };
        // Behind a block: the norm of the block's output is added to the residual.
        let (residual, normed) = (self.slots.residual, self.slots.normed);
        let (input, out) = if accumulate { (normed, residual) } else { (residual, normed) };
        self.norm(input, weight, accumulate, out, lanes.rows() as usize)
    }

    fn norm(
        &mut self,
        input: Rows,
        weight: Address,
        accumulate: bool,
        out: Rows,
        rows: usize,
    ) -> Result<(), ExecError> {
        let args = vec![
            input.arg(),
            Arg::At(weight),
            Arg::U32(Kind::F32 as u32),
            Arg::F32(self.model.norm_eps as f32),
            Arg::U32(accumulate.into()),
            out.arg(),
        ];
        let threads = if input.width > 4096 { 256 } else { 128 };
        Ok(self.device.launch("rms_norm", [rows, 1, 1], (threads, 64), args)?)
    }

    /// Copies the last row of every sampled sequence next to each other, and the one before where two are sampled.
    fn gather_sampled(&mut self, sampled: &[Lane]) -> Result<(), ExecError> {
        let (from, to) = (self.slots.residual, self.slots.sampled);
        let mut copies: Vec<(usize, usize, usize)> = Vec::new();
        let (mut step, mut out) = (self.slots.step_rows.iter(), 0);
        for lane in sampled {
            for sequence in lane.first..lane.first + lane.sequences {
                let found = step.find(|(s, ..)| *s == sequence);
                let Some((_, first, count)) = found.copied() else { continue };
                let wanted = lane.rows as usize;
                let row = first + count - wanted;
                // Rows that stand next to each other go in one copy.
                match copies.last_mut() {
                    Some((at, _, rows)) if *at + *rows == row => *rows += wanted,
                    _ => copies.push((row, out, wanted)),
                }
                out += wanted;
            }
        }
        for (row, out, rows) in copies {
            let (from, to) = (from.at.plus(from.bytes(row)), to.at.plus(to.bytes(out)));
            self.device.copy(from, to, self.slots.sampled.bytes(rows))?;
        }
        Ok(())
    }

    fn gemm(
        &mut self,
        name: &str,
        rows: usize,
        layer: Option<Layer>,
        accumulate: bool,
    ) -> Result<(), ExecError> {
        let (weights, slots) = (self.weights, &self.slots);
        let none = Address::default();
        let Some(layer) = layer else {
            let head = weights.head.as_ref().unwrap_or(&weights.embedding);
            let (x, y) = (slots.normed, slots.logits);
            return Ok(head.multiply(self.device, (x, rows), head.n, none, accumulate, y)?);
        };
        let layer = &weights.layers[layer as usize];
        // Devices that share the layer are about to add up: one of them brings the residual.
        let adds = accumulate && self.device.rank().0 == 0;
        let out = if accumulate { slots.residual } else { slots.normed };
        let (x, w, bias, y) = match name {
            "query" | "qkv" => (slots.normed, &layer.qkv, layer.qkv_bias, slots.qkv),
            "output" => (slots.attention, &layer.output, none, out),
            "gate_up" => (slots.normed, &layer.gate_up, none, slots.gate_up),
            _ => (slots.gated, &layer.down, none, out),
        };
        // Queries come first in a fused row; keys and values of a layer that reads another's cache are not needed.
        let queries = (self.model.heads * self.model.head_dim) as usize;
        let columns = if name == "query" { queries } else { w.n };
        Ok(w.multiply(self.device, (x, rows), columns, bias, adds, y)?)
    }

    /// The parts of a block's output that the devices of a layer have: in the residual, or where the norm behind the block
    /// takes them from.
    fn all_reduce(&mut self, rows: usize) -> Result<(), ExecError> {
        if self.device.rank().1 < 2 {
            let part = "layers that several devices share on one".to_owned();
            return Err(ExecError::NotExecutable { model: self.model.name.clone(), part });
        }
        let slots = &self.slots;
        let out = if self.model.post_norms { slots.normed } else { slots.residual };
        Ok(self.device.all_reduce(out, rows)?)
    }

    fn gated(&mut self, rows: usize) -> Result<(), ExecError> {
        let gelu = self.model.activation == Activation::GeluTanh;
        let (input, out) = (self.slots.gate_up, self.slots.gated);
        let args = vec![input.arg(), Arg::U32(rows as u32), Arg::U32(gelu.into()), out.arg()];
        let grid = [(rows * out.width as usize / 8).div_ceil(256), 1, 1];
        Ok(self.device.launch("gated", grid, (256, 0), args)?)
    }

    fn softcap(&mut self, count: usize) -> Result<(), ExecError> {
        let cap = self.model.logit_softcap.unwrap_or(f64::INFINITY) as f32;
        let logits = self.slots.logits;
        let kind = logits.kind as u32;
        let args = vec![Arg::At(logits.at), Arg::U32(kind), Arg::U64(count as u64), Arg::F32(cap)];
        Ok(self.device.launch("softcap", [count.div_ceil(2048), 1, 1], (256, 0), args)?)
    }

    /// Chooses the next tokens: on the device by the largest logit, else here, as the CPU does.
    fn sample(&mut self, pass: &Pass, lanes: &[Lane], rows: usize) -> Result<(), ExecError> {
        let vocab = self.slots.logits.width as usize;
        let greedy = self.sequences.iter().all(|s| s.sampler.is_greedy());
        let prompt = pass.phase == Phase::Prefill && self.keep_prompt_logits;
        let ids = self.device.scratch("sampled", 8 * rows as u64)?;
        let gaps = ids.plus(4 * rows as u64);
        let args = vec![self.slots.logits.arg(), Arg::At(ids), Arg::At(gaps)];
        self.device.launch("argmax", [rows, 1, 1], (1024, 384), args)?;
        let found = self.device.words(ids, 2 * rows)?;
        self.slots.shown.clear();
        if self.watched || prompt || !greedy {
            self.slots.shown = self.device.floats(self.slots.logits.at, rows * vocab)?;
        }
        let mut row = 0;
        let sequences = lanes
            .iter()
            .flat_map(|l| (l.first..l.first + l.sequences).zip(std::iter::repeat(l.rows)));
        for (index, count) in sequences {
            let sequence = &mut self.sequences[index as usize];
            if count > pass.ahead {
                let logits = self.slots.shown.get(row * vocab..(row + 1) * vocab);
                if prompt {
                    sequence.prompt_logits = logits.map(<[f32]>::to_vec);
                }
                let (token, gap) = match logits {
                    Some(logits) if !greedy => sequence.sampler.next(logits),
                    _ => (found[row], f32::from_bits(found[rows + row])),
                };
                let forced = sequence.forced.get(sequence.generated.len());
                sequence.generated.push(forced.copied().unwrap_or(token));
                sequence.gaps.push(gap);
                self.slots.chosen.push((index, row));
            }
            row += count as usize;
            if pass.ahead > 0 {
                sequence.guesses.push(found[row - 1]);
            }
        }
        Ok(())
    }

    /// Shows the logits of the tokens that the last step chose.
    pub(super) fn show(&self, watch: &mut dyn FnMut(Chosen<'_>)) {
        let vocab = self.slots.logits.width as usize;
        for (sequence, row) in &self.slots.chosen {
            let sequence = *sequence as usize;
            let index = self.sequences[sequence].generated.len() - 1;
            if let Some(logits) = self.slots.shown.get(row * vocab..(row + 1) * vocab) {
                watch(Chosen { sequence, index, logits });
            }
        }
    }

    fn release(&mut self, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let kv_heads = self.model.kv_heads as usize;
        for sequence in lanes.indices() {
            for head in 0..kv_heads {
                let index = sequence as usize * kv_heads + head;
                self.kv.main.clear(&mut self.kv.pool, layer, index);
            }
        }
        self.forget(lanes, layer)
    }
}

pub(super) fn layer_index(layer: Option<Layer>) -> usize {
    layer.map_or(0, |l| l as usize)
}
