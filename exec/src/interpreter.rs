//! Replays a program op by op on the CPU. It knows no policy by name: *how many* tokens stay is in the ops, *which* is
//! decided here by their scores.

use batchmax_kernels as k;
use batchmax_kernels::append::AppendItem;
use batchmax_kernels::attend::{AttendItem, AttendShape};
use batchmax_kernels::evict::EvictItem;
use batchmax_kernels::rank::{RankItem, Scorer, TallyItem};
use batchmax_kernels::threads::Threads;
use batchmax_sim::memory::Buffers;
use batchmax_sim::op::{Heads, Lane, Lanes, Op, OpKind, Phase, Protect, Score};
use batchmax_sim::profile::{Activation, Model};
use batchmax_sim::program::{Pass, StepView};
use batchmax_sim::units::Layer;

use crate::clock::Clock;
use crate::error::ExecError;
use crate::kv_store::KvStore;
use crate::sampling::Sampler;
use crate::weights::Weights;

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
    /// Scores per layer, from a ranking until its eviction.
    scores: Vec<Vec<Vec<f32>>>,
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// Sequence, first row and rows of the step at work.
    step_rows: Vec<(u32, usize, usize)>,
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
            scores: vec![Vec::new(); model.layers as usize],
            ids: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            step_rows: Vec::new(),
        }
    }
}

/// One sequence while it runs.
pub struct SequenceState {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Tokens in the caches' past, dropped ones included: the next position.
    pub seen: u32,
    /// Generated tokens.
    pub generated: Vec<u32>,
    /// Gap between the two best logits of each.
    pub gaps: Vec<f32>,
    /// The choice of tokens.
    pub sampler: Sampler,
    /// Logits at the last prompt position, where they were asked for.
    pub prompt_logits: Option<Vec<f32>>,
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
}

impl Interpreter<'_> {
    /// Runs one step and times its ops.
    pub fn step(&mut self, view: &StepView<'_>, clock: &mut Clock) -> Result<(), ExecError> {
        clock.start_step();
        self.gather_rows(view);
        view.pass.visit(|block, index, layer, op| {
            let lanes = op.lanes_at(view.step, view.shift);
            self.run(view.pass, op, &lanes, layer)?;
            clock.lap(view.pass_index, block, index);
            Ok::<(), ExecError>(())
        })?;
        let moved = view.pass.before.ops[0].lanes_at(view.step, view.shift);
        for lane in moved.as_slice() {
            for sequence in lane.first..lane.first + lane.sequences {
                self.sequences[sequence as usize].seen += lane.rows;
            }
        }
        clock.end_step(view.pass.phase);
        Ok(())
    }

    /// The tokens and positions of the step's rows, sequence after sequence.
    fn gather_rows(&mut self, view: &StepView<'_>) {
        let slots = &mut self.slots;
        slots.ids.clear();
        slots.positions.clear();
        slots.step_rows.clear();
        let lanes = view.pass.before.ops[0].lanes_at(view.step, view.shift);
        for lane in lanes.as_slice() {
            for index in lane.first..lane.first + lane.sequences {
                let sequence = &self.sequences[index as usize];
                let from = sequence.seen as usize;
                slots.step_rows.push((index, slots.ids.len(), lane.rows as usize));
                match view.pass.phase {
                    Phase::Prefill => slots
                        .ids
                        .extend_from_slice(&sequence.prompt[from..from + lane.rows as usize]),
                    Phase::Decode => {
                        slots.ids.push(sequence.generated.last().copied().unwrap_or_default());
                    }
                }
                slots.positions.extend(sequence.seen..sequence.seen + lane.rows);
            }
        }
    }

    fn attend_shape(&self, heads: Heads, window: Option<u32>) -> AttendShape {
        AttendShape {
            heads: heads.query as usize,
            kv_heads: heads.kv as usize,
            head_dim: heads.dim as usize,
            scale: self.model.attention_scale() as f32,
            softcap: self.model.attention_softcap.map(|c| c as f32),
            window,
        }
    }

    fn run(
        &mut self,
        pass: &Pass,
        op: &Op,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
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
                k::rope::rope(
                    self.threads,
                    &mut self.slots.qkv[..rows * qkv_width],
                    qkv_width,
                    rotated,
                    heads.dim as usize,
                    &self.slots.positions,
                    &self.weights.rope,
                    self.weights.rope_layout,
                );
            }
            OpKind::Append { heads } => self.append(heads, lanes.as_slice(), layer)?,
            OpKind::Attend { heads, window } => {
                self.attend(pass.phase, heads, window, lanes, layer);
            }
            OpKind::Tally { heads } => self.tally(heads, lanes, layer),
            OpKind::Rank { heads, by } => self.rank(heads, by, lanes, layer),
            OpKind::Evict { protect, .. } => self.evict(protect, lanes, layer)?,
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
            OpKind::Sample { vocab } => self.sample(pass.phase, lanes.as_slice(), vocab as usize),
            OpKind::Release { .. } => {
                let (pool, picked) = self.kv.select(layer_index(layer), lanes.as_slice());
                for (_, _, heads) in picked {
                    for head in heads {
                        head.clear(pool);
                    }
                }
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

    /// Copies the last row of every sampled sequence next to each other.
    fn gather_sampled(&mut self, sampled: &[Lane], width: usize) {
        let rows = self.rows_of(sampled);
        let slots = &mut self.slots;
        for (out, (first, count)) in rows.into_iter().enumerate() {
            let last = first + count - 1;
            slots.sampled[out * width..(out + 1) * width]
                .copy_from_slice(&slots.residual[last * width..(last + 1) * width]);
        }
    }

    /// First row and number of rows, in the step, of each sequence of `lanes`, which may be some of the step's.
    fn rows_of(&self, lanes: &[Lane]) -> Vec<(usize, usize)> {
        let wanted = lanes.iter().flat_map(|l| l.first..l.first + l.sequences);
        let mut step = self.slots.step_rows.iter();
        wanted
            .filter_map(|sequence| step.find(|(s, ..)| *s == sequence).map(|(_, f, n)| (*f, *n)))
            .collect()
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
            "qkv" => multiply(&slots.normed, &layer.qkv, layer.qkv_bias.as_deref(), &mut slots.qkv),
            "output" => multiply(&slots.attention, &layer.output, None, out),
            "gate_up" => multiply(&slots.normed, &layer.gate_up, None, &mut slots.gate_up),
            _ => multiply(&slots.gated, &layer.down, None, out),
        }
    }

    fn append(
        &mut self,
        heads: Heads,
        lanes: &[Lane],
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let width = self.model.qkv_width() as usize;
        let dim = heads.dim as usize;
        let key_offset = heads.query as usize * dim;
        let value_offset = key_offset + heads.kv as usize * dim;
        let (pool, picked) = self.kv.select(layer_index(layer), lanes);
        let mut first_row = 0;
        let mut items: Vec<AppendItem<'_>> = picked
            .into_iter()
            .map(|(sequence, lane, heads)| {
                let rows = lane.rows as usize;
                let first_position = self.sequences[sequence as usize].seen;
                let item = AppendItem { heads, first_row, rows, first_position };
                first_row += rows;
                item
            })
            .collect();
        let qkv = &self.slots.qkv[..first_row * width];
        k::append::append(
            self.threads,
            pool,
            &mut items,
            qkv,
            width,
            key_offset,
            value_offset,
            dim,
        )?;
        Ok(())
    }

    fn attend(
        &mut self,
        phase: Phase,
        heads: Heads,
        window: Option<u32>,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) {
        let shape = self.attend_shape(heads, window);
        let rows = lanes.rows() as usize;
        let width = self.model.qkv_width() as usize;
        let out_width = shape.heads * shape.head_dim;
        let (pool, picked) = self.kv.select(layer_index(layer), lanes.as_slice());
        let mut first_row = 0;
        let items: Vec<AttendItem<'_>> = picked
            .into_iter()
            .map(|(_, lane, heads)| {
                let rows = lane.rows as usize;
                let item = AttendItem { heads, first_row, rows };
                first_row += rows;
                item
            })
            .collect();
        let run = match phase {
            Phase::Prefill => k::attend::attend_prefill,
            Phase::Decode => k::attend::attend_decode,
        };
        run(
            self.threads,
            pool,
            &items,
            &shape,
            &self.slots.qkv[..rows * width],
            width,
            &mut self.slots.attention[..rows * out_width],
            Some(&mut self.slots.log_sum_exp[..rows * shape.heads]),
        );
    }

    fn tally(&mut self, heads: Heads, lanes: &Lanes, layer: Option<Layer>) {
        let shape = self.attend_shape(heads, None);
        let rows = lanes.rows() as usize;
        let width = self.model.qkv_width() as usize;
        let (pool, picked) = self.kv.select(layer_index(layer), lanes.as_slice());
        let mut first_row = 0;
        let mut items: Vec<TallyItem<'_>> = picked
            .into_iter()
            .map(|(_, lane, heads)| {
                let item = TallyItem { heads, first_row, rows: lane.rows as usize };
                first_row += lane.rows as usize;
                item
            })
            .collect();
        let qkv = &self.slots.qkv[..rows * width];
        let lse = &self.slots.log_sum_exp[..rows * shape.heads];
        k::rank::tally(self.threads, pool, &mut items, &shape, qkv, width, lse);
    }

    fn rank(&mut self, heads: Heads, by: Score, lanes: &Lanes, layer: Option<Layer>) {
        let scorer = match by {
            Score::Recency => Scorer::Recency,
            Score::KeyNorm => Scorer::KeyNorm,
            Score::KeyDiff => Scorer::KeyDiff,
            Score::WindowAttention { window, pool, exclude_window } => {
                Scorer::WindowAttention { window, pool, exclude_window }
            }
            Score::TalliedAttention { mean } => Scorer::Tallied { mean },
        };
        let step_rows = self.rows_of(lanes.as_slice());
        let shape = self.attend_shape(heads, None);
        let index = layer_index(layer);
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let mut items: Vec<RankItem<'_>> = picked
            .into_iter()
            .zip(step_rows)
            .map(|((sequence, lane, heads), (first_row, rows))| RankItem {
                heads,
                first_row,
                rows,
                seen: self.sequences[sequence as usize].seen + lane.rows,
            })
            .collect();
        k::rank::rank(
            self.threads,
            pool,
            &mut items,
            scorer,
            &shape,
            &self.slots.qkv,
            self.model.qkv_width() as usize,
            &self.slots.log_sum_exp,
            &mut self.slots.scores[index],
        );
    }

    fn evict(
        &mut self,
        protect: Protect,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let index = layer_index(layer);
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let mut items: Vec<EvictItem<'_>> = picked
            .into_iter()
            .map(|(sequence, lane, heads)| EvictItem {
                heads,
                seen: self.sequences[sequence as usize].seen + lane.rows,
                keep: lane.keep as usize,
            })
            .collect();
        let protect = k::evict::Protect { sinks: protect.sinks, recent: protect.recent };
        let scores = std::mem::take(&mut self.slots.scores[index]);
        k::evict::evict(self.threads, pool, &mut items, &scores, protect)?;
        Ok(())
    }

    fn sample(&mut self, phase: Phase, lanes: &[Lane], vocab: usize) {
        let sequences = lanes.iter().flat_map(|l| l.first..l.first + l.sequences);
        for (row, index) in sequences.enumerate() {
            let logits = &self.slots.logits[row * vocab..(row + 1) * vocab];
            let sequence = &mut self.sequences[index as usize];
            if phase == Phase::Prefill && self.keep_prompt_logits {
                sequence.prompt_logits = Some(logits.to_vec());
            }
            let (token, gap) = sequence.sampler.next(logits);
            sequence.generated.push(token);
            sequence.gaps.push(gap);
        }
    }
}

fn layer_index(layer: Option<Layer>) -> usize {
    layer.map_or(0, |l| l as usize)
}
