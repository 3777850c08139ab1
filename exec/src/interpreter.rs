//! Replays a program op by op on the CPU. It knows no policy by name: *how many* tokens stay is in the ops, *which* is
//! decided here by their scores.

mod ahead;
mod blend;
mod cache;
mod choice;
mod forward;
mod lists;
mod refresh;
mod settle;
mod state;
pub(crate) mod step;
#[cfg(test)]
mod tests;

use batchmax_kernels as k;
use batchmax_kernels::threads::Threads;
use batchmax_sim::memory::Buffers;
use batchmax_sim::op::{Lane, Lanes, Op, OpKind, Phase};
use batchmax_sim::profile::{Activation, Model};
use batchmax_sim::program::{Pass, StepView};
use batchmax_sim::units::Layer;

use crate::chunks::ChunkStore;
use crate::clock::Clock;
use crate::error::ExecError;
use crate::kv_store::KvStore;
use crate::sampling::Sampler;
use crate::state_maps::StateMaps;
use crate::tier::{Tier, TierPlace};
use crate::weights::Weights;
use ahead::Foreseen;
use lists::{Lists, rows_in};
use refresh::Noted;
use step::{StepRows, taking_part};

/// The buffers between ops, as large as [`Buffers`] says and no larger.
pub struct Slots {
    residual: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attention: Vec<f32>,
    log_sum_exp: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    sampled: Vec<f32>,
    logits: Vec<f32>,
    /// Chosen tokens of the layer at work, set after set.
    reads: Vec<Vec<u32>>,
    /// What is fetched for the next step, per layer and sequence.
    foreseen: Vec<Vec<Foreseen>>,
    /// Queries that were noted, per layer and sequence; empty until some are.
    noted: Vec<Vec<Noted>>,
    /// Sequences whose partial cache in the layer at work is stale.
    stale: Vec<u32>,
    /// Key channels that stay, per layer, sequence and KV head; empty until they are chosen.
    channels: Vec<Vec<Vec<u16>>>,
    /// Scores per layer, from a ranking until its eviction.
    scores: Vec<Vec<Vec<f32>>>,
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// Sequence, first row and rows of the step at work.
    step_rows: Vec<(u32, usize, usize)>,
    /// Sequences whose next token the step at work chose, with the rows of their logits.
    chosen: Vec<(u32, usize)>,
    /// Rows that fit.
    capacity: usize,
    /// Memory of lists that ops make anew each time.
    lists: Lists,
}

impl Slots {
    /// For a program that needs `buffers`.
    #[must_use]
    pub fn new(model: &Model, buffers: &Buffers) -> Self {
        let rows = buffers.rows as usize;
        let widths = Buffers::row_widths(model);
        let make = |name: &str| {
            let width = widths.iter().find(|(n, _)| *n == name).map_or(0, |(_, w)| *w as usize);
            vec![0.0f32; rows * width]
        };
        let sampled = buffers.sampled as usize;
        Self {
            residual: make("residual"),
            normed: make("normed"),
            qkv: make("qkv"),
            attention: make("attention"),
            log_sum_exp: make("log_sum_exp"),
            gate_up: make("gate_up"),
            gated: make("gated"),
            sampled: vec![0.0; sampled * model.hidden as usize],
            logits: vec![0.0; sampled * model.vocab as usize],
            reads: Vec::new(),
            foreseen: vec![Vec::new(); model.layers as usize],
            noted: vec![Vec::new(); model.layers as usize],
            stale: Vec::new(),
            channels: vec![Vec::new(); model.layers as usize],
            scores: vec![Vec::new(); model.layers as usize],
            ids: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            step_rows: Vec::new(),
            chosen: Vec::new(),
            capacity: rows.max(1),
            lists: Lists::default(),
        }
    }

    /// Rows of the step at work.
    fn rows(&self) -> usize {
        self.step_rows.last().map_or(0, |(_, first, rows)| first + rows)
    }

    /// Queries, keys and values of the layer at work.
    pub(crate) fn qkv_rows(&self) -> &[f32] {
        &self.qkv[..self.rows() * (self.qkv.len() / self.capacity)]
    }
}

/// One sequence while it runs.
pub struct SequenceState {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Tokens in the caches' past, dropped ones included: the next position.
    pub seen: u32,
    /// Tokens that the step at work adds, whether or not all layers see them.
    pub step: u32,
    /// Tokens that take the place of the first choices.
    pub forced: Vec<u32>,
    /// Generated tokens.
    pub generated: Vec<u32>,
    /// Gap between the two best logits of each.
    pub gaps: Vec<f32>,
    /// Decode steps, from 1, and layers in which its partial cache was filled anew.
    pub refreshed: Vec<(u32, Layer)>,
    /// Guesses at the next token but one, one a step.
    pub guesses: Vec<u32>,
    /// Positions of the prompt's rows that went on to the upper layers, where not all did.
    pub forwarded: Vec<u32>,
    /// The choice of tokens.
    pub sampler: Sampler,
    /// Logits at the last prompt position, where they were asked for.
    pub prompt_logits: Option<Vec<f32>>,
}

impl SequenceState {
    /// Tokens in the past, those of the step at work included.
    pub(crate) fn seen_with_step(&self) -> u32 {
        self.seen + self.step
    }

    /// Adds the tokens of its next `rows` rows.
    pub(crate) fn put_ids(&self, phase: Phase, rows: u32, ids: &mut Vec<u32>) {
        let from = self.seen as usize;
        match phase {
            Phase::Prefill => ids.extend_from_slice(&self.prompt[from..from + rows as usize]),
            Phase::Decode => {
                let last = self.generated.last().copied().unwrap_or_default();
                ids.push(last);
                if rows > 1 {
                    ids.push(self.guesses.last().copied().unwrap_or(last));
                }
            }
        }
    }

    /// What another sequence with the same prompt takes over.
    pub(crate) fn copied(&self) -> Copied {
        Copied {
            seen: self.seen,
            generated: self.generated.clone(),
            gaps: self.gaps.clone(),
            prompt_logits: self.prompt_logits.clone(),
        }
    }

    /// Goes on from where another one is, with forced tokens of its own.
    pub(crate) fn take_over(&mut self, copied: Copied) {
        let forced = self.forced.iter().copied().map(Some).chain(std::iter::repeat(None));
        let chosen = copied.generated.iter().zip(forced);
        self.generated = chosen.map(|(chosen, forced)| forced.unwrap_or(*chosen)).collect();
        (self.seen, self.gaps, self.prompt_logits) =
            (copied.seen, copied.gaps, copied.prompt_logits);
    }
}

/// What a sequence leaves to those with the same prompt.
pub(crate) struct Copied {
    seen: u32,
    generated: Vec<u32>,
    gaps: Vec<f32>,
    prompt_logits: Option<Vec<f32>>,
}

/// What a replay works on.
pub struct Interpreter<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its weights.
    pub weights: &'a Weights,
    /// The threads.
    pub threads: &'a Threads,
    /// The caches.
    pub kv: KvStore,
    /// The buffers.
    pub slots: Slots,
    /// The sequences.
    pub sequences: Vec<SequenceState>,
    /// Keep the logits at the last prompt position.
    pub keep_prompt_logits: bool,
    /// The layer whose cache each layer reads; empty: its own.
    pub cache_of: Vec<Layer>,
    /// KV heads of each layer that hold sinks and newest tokens only; empty: none.
    pub short_heads: Vec<Vec<u32>>,
    /// Networks of the states that dropped tokens leave, where a program has such.
    pub maps: Option<StateMaps>,
    /// Layers behind which only some rows go on.
    pub forwards: Vec<usize>,
    /// Caches of chunks that were read alone.
    pub chunks: ChunkStore,
    /// Tokens of a chunk of what was brought last.
    pub chunk: u32,
    /// Where offloaded tokens go.
    pub tier_place: TierPlace,
    /// Slower memory, once something is there.
    pub tier: Option<Tier>,
}

impl Interpreter<'_> {
    /// Runs one step and times its ops.
    pub fn step(&mut self, view: &StepView<'_>, clock: &mut Clock) -> Result<(), ExecError> {
        self.step_seen(view, clock, &mut |_, _, _| {})
    }

    /// The same; `see` looks at the buffers after each op.
    pub(crate) fn step_seen(
        &mut self,
        view: &StepView<'_>,
        clock: &mut Clock,
        see: &mut dyn FnMut(&Slots, &Op, Option<Layer>),
    ) -> Result<(), ExecError> {
        clock.start_step();
        let mut lanes = Lanes::Many(std::mem::take(&mut self.slots.lists.lanes));
        view.pass.before.ops[0].move_lanes(view.step, view.shift, &mut lanes);
        self.gather_rows(view, &lanes);
        view.pass.visit(|block, index, layer, op| {
            op.move_lanes(view.step, view.shift, &mut lanes);
            self.run(view.pass, op, &lanes, layer)?;
            clock.lap(view.pass_index, block, index);
            see(&self.slots, op, layer);
            Ok::<(), ExecError>(())
        })?;
        view.pass.before.ops[0].move_lanes(view.step, view.shift, &mut lanes);
        for lane in lanes.as_slice() {
            for sequence in lane.first..lane.first + lane.sequences {
                let sequence = &mut self.sequences[sequence as usize];
                sequence.seen += std::mem::take(&mut sequence.step);
            }
        }
        if let Lanes::Many(list) = lanes {
            self.slots.lists.lanes = list;
        }
        clock.end_step(view.pass.phase);
        Ok(())
    }

    /// Hidden states of the last step's rows behind the last norm.
    pub(crate) fn last_states(&self) -> Vec<f32> {
        let width = self.model.hidden as usize;
        let rows = self.slots.rows() * width;
        let mut out = vec![0.0; rows];
        let input = &self.slots.residual[..rows];
        let (norm, eps) = (&self.weights.final_norm, self.model.norm_eps as f32);
        k::norm::rms_norm(self.threads, input, width, norm, eps, &mut out);
        out
    }

    /// Lets the sequence `to` go on from where `from` is: what it cached, counted and chose.
    pub fn copy_sequence(&mut self, from: usize, to: usize) -> Result<(), ExecError> {
        self.kv.copy(from, to)?;
        let kv_heads = self.model.kv_heads as usize;
        for channels in self.slots.channels.iter_mut().filter(|c| !c.is_empty()) {
            for head in 0..kv_heads {
                channels[to * kv_heads + head] = channels[from * kv_heads + head].clone();
            }
        }
        for noted in self.slots.noted.iter_mut().filter(|n| !n.is_empty()) {
            noted[to] = noted[from].clone();
        }
        let copied = self.sequences[from].copied();
        self.sequences[to].take_over(copied);
        Ok(())
    }

    /// The step's rows, sequence after sequence.
    fn gather_rows(&mut self, view: &StepView<'_>, lanes: &Lanes) {
        let slots = &mut self.slots;
        slots.chosen.clear();
        StepRows {
            ids: &mut slots.ids,
            positions: &mut slots.positions,
            sequences: &mut slots.step_rows,
        }
        .gather(view, lanes, &mut self.sequences);
    }

    fn run(
        &mut self,
        pass: &Pass,
        op: &Op,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let taken = taking_part(op.branch, lanes, &self.slots.stale);
        let lanes = taken.as_ref().unwrap_or(lanes);
        if lanes.as_slice().is_empty() {
            return Ok(());
        }
        let rows = lanes.rows() as usize;
        let model = self.model;
        let qkv_width = model.qkv_width() as usize;
        match op.kind {
            OpKind::Embed { width } => {
                let scale = model.embedding_scale.unwrap_or(1.0) as f32;
                let out = &mut self.slots.residual[..rows * width as usize];
                k::embed::embed(self.threads, &self.weights.embedding, &self.slots.ids, scale, out);
            }
            OpKind::RmsNorm { width, accumulate } => {
                self.rms_norm(op.name, lanes, layer, width as usize, accumulate);
            }
            OpKind::Gemm { accumulate, .. } => self.gemm(op.name, rows, layer, accumulate),
            OpKind::QkNorm { heads } => {
                let weights = &self.weights.layers[layer_index(layer)];
                if let Some((query, key)) = &weights.qk_norm {
                    let dim = heads.dim as usize;
                    let (q, kv) = (heads.query as usize, heads.kv as usize);
                    let eps = model.norm_eps as f32;
                    let qkv = &mut self.slots.qkv[..rows * qkv_width];
                    k::norm::qk_norm(self.threads, qkv, qkv_width, 0, q, dim, query, eps);
                    k::norm::qk_norm(self.threads, qkv, qkv_width, q * dim, kv, dim, key, eps);
                }
            }
            OpKind::Rope { heads } => {
                let rotated = (heads.query + heads.kv) as usize;
                let places;
                let positions = if heads.form.rerotated {
                    places = self.places(lanes, layer);
                    &places
                } else {
                    &self.slots.positions[..rows]
                };
                k::rope::rope(
                    self.threads,
                    &mut self.slots.qkv[..rows * qkv_width],
                    qkv_width,
                    rotated,
                    heads.dim as usize,
                    positions,
                    &self.weights.rope,
                    self.weights.rope_layout,
                );
            }
            OpKind::Append { heads } => self.append(heads, lanes.as_slice(), layer)?,
            OpKind::Attend { heads, window } => {
                let cache = layer.map(|l| self.cache_of.get(l as usize).copied().unwrap_or(l));
                self.attend(pass.phase, heads, window, lanes, cache);
            }
            OpKind::Tally { heads } => self.tally(heads, lanes, layer),
            OpKind::Rank { heads, by } => self.rank(heads, by, lanes, layer),
            OpKind::Evict { heads, protect, choice } => {
                self.evict(heads, protect, choice, lanes, layer)?;
            }
            OpKind::Accumulate { heads, protect, choice } => {
                self.accumulate(heads, protect, choice, lanes, layer);
            }
            OpKind::ReadState { heads } => self.read_state(heads, lanes, layer),
            OpKind::Index { page, .. } => self.index(page, lanes, layer),
            OpKind::Cluster { sinks, rounds, .. } => self.cluster(sinks, rounds, lanes, layer),
            OpKind::Select { heads, by } => self.select(heads, by, lanes, layer),
            OpKind::AttendChosen { heads, .. } => self.attend_chosen(heads, lanes, layer)?,
            OpKind::Offload { .. } => self.offload(lanes, layer),
            OpKind::AttendAhead { heads } => self.attend_ahead(heads, lanes, layer)?,
            OpKind::Foresee { heads, whole } => self.foresee(heads, whole, lanes, layer),
            OpKind::Fetch { .. } => self.fetch(lanes, layer),
            OpKind::Load { heads, chunk } => self.load(heads, chunk, lanes, layer)?,
            OpKind::Deviate { heads } => self.deviate(heads, lanes, layer),
            OpKind::Blend { heads } => self.blend(heads, lanes, layer)?,
            OpKind::AttendRows { heads } => self.attend_rows(heads, lanes, layer),
            OpKind::Compare { heads, below } => self.compare(heads, below, lanes, layer),
            OpKind::Refresh { .. } => self.refresh(lanes, layer)?,
            OpKind::AppendPart { .. } => self.append_part(lanes, layer)?,
            OpKind::AttendPart { heads } => self.attend_part(heads, lanes, layer),
            OpKind::ReleasePart { .. } => {
                self.kv.release_parts(layer_index(layer), &refresh::sequences(lanes));
            }
            OpKind::Pack { heads } => self.pack(heads, lanes, layer)?,
            OpKind::Trim { heads } => self.trim(heads, lanes, layer)?,
            OpKind::PruneChannels { heads } => self.prune_channels(heads, lanes, layer)?,
            OpKind::Forward { width, recent } => {
                self.forward(width as usize, recent, lanes, layer_index(layer));
            }
            // One process on one machine: there is nobody to add up with.
            OpKind::AllReduce { .. } => {
                return Err(ExecError::NotExecutable {
                    model: model.name.clone(),
                    part: "layers that several devices share".to_owned(),
                });
            }
            OpKind::Gated { ffn } => {
                let ffn = ffn as usize;
                let activation = match model.activation {
                    Activation::Silu => k::activation::Activation::Silu,
                    Activation::GeluTanh => k::activation::Activation::GeluTanh,
                };
                let gate_up = &self.slots.gate_up[..rows * 2 * ffn];
                let out = &mut self.slots.gated[..rows * ffn];
                k::activation::gated(self.threads, gate_up, ffn, activation, out);
            }
            OpKind::Softcap { width } => {
                let cap = model.logit_softcap.unwrap_or(f64::INFINITY) as f32;
                let logits = &mut self.slots.logits[..rows * width as usize];
                k::softcap::softcap(self.threads, logits, cap);
            }
            OpKind::Sample { vocab } => self.sample(pass, lanes.as_slice(), vocab as usize),
            OpKind::Release { .. } => {
                let (pool, picked) = self.kv.picks(layer_index(layer), lanes.as_slice());
                for (_, _, heads) in picked {
                    for head in heads {
                        head.clear(pool);
                    }
                }
                self.forget(lanes, layer);
            }
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        name: &str,
        lanes: &Lanes,
        layer: Option<Layer>,
        width: usize,
        accumulate: bool,
    ) {
        let rows = lanes.rows() as usize;
        let eps = self.model.norm_eps as f32;
        if layer.is_none() {
            self.gather_sampled(lanes.as_slice(), width);
            let input = &self.slots.sampled[..rows * width];
            let out = &mut self.slots.normed[..rows * width];
            k::norm::rms_norm(self.threads, input, width, &self.weights.final_norm, eps, out);
            return;
        }
        let weights = &self.weights.layers[layer_index(layer)];
        let none: &[f32] = &[];
        let weight = match name {
            "attention_norm" => &weights.attention_norm,
            "ffn_norm" => &weights.ffn_norm,
            "post_attention_norm" => weights.post_attention_norm.as_deref().unwrap_or(none),
            _ => weights.post_ffn_norm.as_deref().unwrap_or(none),
        };
        let slots = &mut self.slots;
        if accumulate {
            // Behind a block: the norm of the block's output is added to the residual.
            let out = &mut slots.gate_up[..rows * width];
            k::norm::rms_norm(self.threads, &slots.normed[..rows * width], width, weight, eps, out);
            for (residual, add) in slots.residual[..rows * width].iter_mut().zip(out.iter()) {
                *residual += add;
            }
        } else {
            let out = &mut slots.normed[..rows * width];
            k::norm::rms_norm(
                self.threads,
                &slots.residual[..rows * width],
                width,
                weight,
                eps,
                out,
            );
        }
    }

    /// Copies the last row of every sampled sequence next to each other, and the one before where two are sampled.
    fn gather_sampled(&mut self, sampled: &[Lane], width: usize) {
        let slots = &mut self.slots;
        let rows = rows_in(&slots.step_rows, sampled);
        let lanes = sampled.iter().flat_map(|l| std::iter::repeat_n(l.rows, l.sequences as usize));
        let mut out = 0;
        for ((first, count), wanted) in rows.zip(lanes) {
            let (from, to) = ((first + count - wanted as usize) * width, (first + count) * width);
            slots.sampled[out..out + to - from].copy_from_slice(&slots.residual[from..to]);
            out += to - from;
        }
    }

    /// First row and number of rows, in the step, of each sequence of `lanes`, which may be some of the step's.
    fn rows_of(&self, lanes: &[Lane]) -> Vec<(usize, usize)> {
        rows_in(&self.slots.step_rows, lanes).collect()
    }

    fn gemm(&mut self, name: &str, rows: usize, layer: Option<Layer>, accumulate: bool) {
        let weights = self.weights;
        let slots = &mut self.slots;
        let threads = self.threads;
        let multiply = |x: &[f32], w: &k::gemm::Packed, bias: Option<&[f32]>, out: &mut [f32]| {
            k::gemm::gemm(
                threads,
                &x[..rows * w.k()],
                rows,
                w,
                bias,
                accumulate,
                &mut out[..rows * w.n()],
            );
        };
        let Some(layer) = layer else {
            let head = weights.head.as_ref().unwrap_or(&weights.embedding);
            return multiply(&slots.normed, head, None, &mut slots.logits);
        };
        let layer = &weights.layers[layer as usize];
        let out = if accumulate { &mut slots.residual } else { &mut slots.normed };
        match name {
            // Queries come first in a fused row; keys and values of a layer that reads another's cache are not needed.
            "query" => {
                let columns = self.model.heads as usize * self.model.head_dim as usize;
                let (w, bias) = (&layer.qkv, layer.qkv_bias.as_deref());
                let (x, out) = (&slots.normed[..rows * w.k()], &mut slots.qkv[..rows * w.n()]);
                k::gemm::gemm_first(threads, x, rows, w, columns, bias, out);
            }
            "qkv" => multiply(&slots.normed, &layer.qkv, layer.qkv_bias.as_deref(), &mut slots.qkv),
            "output" => multiply(&slots.attention, &layer.output, None, out),
            "gate_up" => multiply(&slots.normed, &layer.gate_up, None, &mut slots.gate_up),
            _ => multiply(&slots.gated, &layer.down, None, out),
        }
    }

    fn sample(&mut self, pass: &Pass, lanes: &[Lane], vocab: usize) {
        let mut row = 0;
        let sequences = lanes
            .iter()
            .flat_map(|l| (l.first..l.first + l.sequences).zip(std::iter::repeat(l.rows)));
        for (index, rows) in sequences {
            let of = |row: usize| row * vocab..(row + 1) * vocab;
            let sequence = &mut self.sequences[index as usize];
            if rows > pass.ahead {
                let logits = &self.slots.logits[of(row)];
                if pass.phase == Phase::Prefill && self.keep_prompt_logits {
                    sequence.prompt_logits = Some(logits.to_vec());
                }
                let (token, gap) = sequence.sampler.next(logits);
                let forced = sequence.forced.get(sequence.generated.len());
                sequence.generated.push(forced.copied().unwrap_or(token));
                sequence.gaps.push(gap);
                self.slots.chosen.push((index, row));
            }
            row += rows as usize;
            if pass.ahead > 0 {
                let logits = &self.slots.logits[of(row - 1)];
                sequence.guesses.push(k::sample::argmax(logits).0);
            }
        }
    }

    /// The sequences whose next token the last step chose, each with that token's index and its logits.
    pub fn chosen(&self) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let vocab = self.model.vocab as usize;
        self.slots.chosen.iter().map(move |(sequence, row)| {
            let sequence = *sequence as usize;
            let logits = &self.slots.logits[row * vocab..(row + 1) * vocab];
            (sequence, self.sequences[sequence].generated.len() - 1, logits)
        })
    }
}

fn layer_index(layer: Option<Layer>) -> usize {
    layer.map_or(0, |l| l as usize)
}
