//! Peak bytes, by replaying a program's appends, evictions and releases. No policy writes a memory formula.

mod history;

use serde::Serialize;

pub use history::{Moment, kv_history};

use crate::form::{Form, Length};
use crate::kv::KvLayout;
use crate::op::{Choice, DType, Heads, Lane, Op, OpKind, Phase, Score, part_room};
use crate::profile::Model;
use crate::program::{Block, Header, Node, Pass, Program};
use crate::units::{Bytes, Tokens};

/// Bytes by kind. Peaks of different kinds are added as if they met, which they do in every prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Parameters.
    pub weights: Bytes,
    /// Caches at the worst moment of the prefill.
    pub kv_prefill_peak: Bytes,
    /// Caches at the worst moment of the decode.
    pub kv_decode_peak: Bytes,
    /// What the caches may take beyond their peaks, at most, where lengths depend on the text.
    pub kv_spread: Bytes,
    /// What they may stay below them, at most.
    pub kv_shortfall: Bytes,
    /// In slower memory: what is offloaded, or the chunks that are reused. No part of the sums.
    pub away: Bytes,
    /// Buffers between ops.
    pub activations: Bytes,
    /// What is kept per cached token besides keys and values (positions, scores).
    pub bookkeeping: Bytes,
    /// What the process or the device takes before the first weight.
    pub runtime: Bytes,
}

impl Footprint {
    /// The larger of the two cache peaks.
    #[must_use]
    pub fn kv_peak(&self) -> Bytes {
        self.kv_prefill_peak.max(self.kv_decode_peak)
    }

    /// Whether caches that were to hold `predicted` bytes may hold `held`.
    #[must_use]
    pub fn allows(&self, predicted: Bytes, held: Bytes) -> bool {
        held.0 <= predicted.0.saturating_add(self.kv_spread.0)
            && held.0.saturating_add(self.kv_shortfall.0) >= predicted.0
    }

    /// The caches, in the worst case of what depends on the text.
    #[must_use]
    pub fn kv_most(&self) -> Bytes {
        self.kv_peak() + self.kv_spread
    }

    /// Everything, in the worst case of what depends on the text.
    #[must_use]
    pub fn most(&self) -> Bytes {
        self.total() + self.kv_spread
    }

    /// Everything.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.weights + self.kv_peak() + self.activations + self.bookkeeping + self.runtime
    }
}

/// Elements of the buffers that a program needs between its ops. The executor allocates exactly these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    /// Rows of the widest step.
    pub rows: u64,
    /// Rows that are sampled in one step, at most.
    pub sampled: u64,
    /// Scores of cached tokens alive at once.
    pub scores: u64,
    /// Cached tokens of all sequences, layers and KV heads, at most.
    pub cached: u64,
    /// Caches carry a running attention sum.
    pub tallied: bool,
}

impl Buffers {
    /// What `program` needs.
    #[must_use]
    pub fn of(program: &Program) -> Self {
        let mut need = Self::default();
        program.visit_passes(|_, pass, _| {
            for op in &pass.before.ops {
                need.rows = need.rows.max(op.lanes.rows());
            }
            let sampled = pass.after.ops.iter().map(|op| op.lanes.rows()).max().unwrap_or(0);
            need.sampled = need.sampled.max(sampled);
            let (mut kept_scores, mut head_scores) = (0, 0);
            let deferred = pass
                .after_layers
                .iter()
                .any(|b| b.ops.iter().any(|op| matches!(op.kind, OpKind::Evict { .. })));
            for block in &pass.layers {
                let mut scores = 0;
                for op in &block.ops {
                    if let OpKind::Rank { heads, by } = op.kind {
                        let tokens: u64 = op
                            .lanes
                            .as_slice()
                            .iter()
                            .map(|l| u64::from(l.sequences) * u64::from(l.kv))
                            .sum();
                        scores += tokens * u64::from(heads.kv);
                        // One weight per query head before they are averaged.
                        if matches!(by, Score::ExpectedAttention { .. }) {
                            head_scores = head_scores.max(tokens * u64::from(heads.query));
                        }
                        need.tallied |= matches!(
                            by,
                            Score::WindowAttention { .. }
                                | Score::LastAttention
                                | Score::NewestAttention { .. }
                        );
                    }
                    need.tallied |= matches!(op.kind, OpKind::Tally { .. });
                }
                // Scores wait for the end of the pass where the eviction does.
                kept_scores = if deferred {
                    kept_scores + scores * u64::from(block.times())
                } else {
                    kept_scores.max(scores)
                };
            }
            need.scores = need.scores.max(kept_scores + head_scores);
        });
        need
    }

    /// Bytes of all buffers, 4 bytes an element on the CPU (`element_bytes`).
    #[must_use]
    pub fn bytes(&self, model: &Model, element_bytes: u64) -> Bytes {
        let per_row: u64 = Self::row_widths(model).iter().map(|(_, width)| *width).sum();
        let sampled = self.sampled * (u64::from(model.hidden) + u64::from(model.vocab));
        let elements =
            self.rows.saturating_mul(per_row).saturating_add(sampled).saturating_mul(element_bytes);
        Bytes(elements.saturating_add(self.scores.saturating_mul(4)))
    }

    /// The buffers that hold a row per token in flight, with their widths in elements.
    #[must_use]
    pub fn row_widths(model: &Model) -> [(&'static str, u64); 7] {
        let attention = u64::from(model.heads) * u64::from(model.head_dim);
        let ffn = u64::from(model.ffn);
        [
            ("residual", u64::from(model.hidden)),
            ("normed", u64::from(model.hidden)),
            ("qkv", model.qkv_width()),
            ("attention", attention),
            ("log_sum_exp", u64::from(model.heads)),
            ("gate_up", if model.gated_ffn { 2 * ffn } else { ffn }),
            ("gated", ffn),
        ]
    }
}

/// Bytes of the weights: linear layers in `dtype`, embedding and head in `head`.
#[must_use]
pub fn weight_bytes(model: &Model, dtype: DType, head: DType) -> Bytes {
    let linear = u64::from(model.layers) * model.layer_linear_parameters();
    dtype.bytes(linear) + head.bytes(model.parameters() - linear)
}

/// The footprint of a program on an engine that takes `runtime` bytes for itself.
#[must_use]
pub fn footprint(model: &Model, program: &Program, runtime: Bytes) -> Footprint {
    footprint_with(model, program, &Buffers::of(program), runtime)
}

/// The same where its buffers are known.
pub(crate) fn footprint_with(
    model: &Model,
    program: &Program,
    buffers: &Buffers,
    runtime: Bytes,
) -> Footprint {
    let peaks = kv_peaks(program);
    let held = peaks.prefill.max(peaks.decode);
    let per_token = model.kv_elements_per_token_layer() / u64::from(model.kv_heads.max(1));
    let token_bytes = program.header.kv.dtype.bytes(per_token).0.max(1);
    let cached_heads = held.0 / token_bytes;
    // A 4-byte position per token and KV head, and a running sum where a score needs one.
    let bookkeeping = Bytes(cached_heads * if buffers.tallied { 8 } else { 4 });
    Footprint {
        weights: weight_bytes(model, program.header.weights, program.header.head)
            + map_bytes(program),
        kv_prefill_peak: peaks.prefill,
        kv_decode_peak: peaks.decode,
        kv_spread: kv_spread(program),
        kv_shortfall: kv_shortfall(program),
        away: offloaded(program),
        activations: buffers.bytes(model, program.header.activations.bits() / 8)
            + coded_rows(model, buffers.rows, program.header.weights),
        bookkeeping,
        runtime,
    }
}

/// Bytes of the rows of one product as codes, where weights are multiplied in integers: a byte a number, and a scale and a
/// sum of 4 bytes for each block of 32.
fn coded_rows(model: &Model, rows: u64, weights: DType) -> Bytes {
    if !matches!(weights, DType::Q4 | DType::Q8) {
        return Bytes(0);
    }
    let attention = u64::from(model.heads) * u64::from(model.head_dim);
    let widest = attention.max(model.hidden.into()).max(model.ffn.into());
    Bytes(rows.saturating_mul(widest.next_multiple_of(32) + widest.div_ceil(32) * 8))
}

/// Bytes of the networks through which dropped tokens are added to a state and queries read it, all layers.
fn map_bytes(program: &Program) -> Bytes {
    let mut most = 0u64;
    program.visit_passes(|_, pass, _| {
        // Every pass has all layers.
        let layer = |block: &Block| {
            let state = |op: &Op| op.cache_heads().filter(|h| h.form.state.is_some());
            let (queries, keys) =
                block.ops.iter().find_map(state).map_or((0, 0), |h| h.map_elements());
            u64::from(block.times()) * (queries + keys)
        };
        most = most.max(pass.layers.iter().map(layer).sum());
    });
    DType::F32.bytes(most)
}

/// Bytes by which caches may exceed their replay because their lengths depend on the text. The replay gives heads that
/// share a budget their mean, and heads of other lengths may each need one block more; it gives layers that keep what they
/// need what is expected, and they may need all that they may have.
#[must_use]
pub fn kv_spread(program: &Program) -> Bytes {
    apart(program, |choice, keep| match choice {
        Choice::Within { most, .. } => most.saturating_sub(keep),
        _ => 0,
    })
}

/// Bytes by which caches may stay below their replay, for the same reason.
#[must_use]
pub fn kv_shortfall(program: &Program) -> Bytes {
    apart(program, |choice, keep| if matches!(choice, Choice::Within { .. }) { keep } else { 0 })
}

/// Bytes of all heads that are up to `tokens` (of what an eviction keeps) and one block away from their replay.
fn apart(program: &Program, tokens: impl Fn(Choice, Tokens) -> Tokens) -> Bytes {
    let layout = program.header.kv;
    let mut most = 0u64;
    program.visit_passes(|_, pass, _| {
        let ragged: u64 = pass
            .blocks()
            .flat_map(|(_, block)| block.ops.iter().map(move |op| (block.times(), op)))
            .map(|(times, op)| match op.kind {
                OpKind::Evict { heads, choice, .. } if choice.is_ragged() => {
                    let block = heads.kv_bytes(u64::from(layout.block_tokens)).0;
                    // Blocks fill at other steps, too.
                    let blocks =
                        |keep| u64::from(tokens(choice, keep).div_ceil(layout.block_tokens)) + 1;
                    let lanes = op.lanes.as_slice().iter();
                    let each = lanes.map(|l| u64::from(l.sequences) * blocks(l.keep));
                    u64::from(times) * block * each.sum::<u64>()
                }
                _ => 0,
            })
            .sum();
        most = most.max(ragged);
    });
    // Sequences of other passes may be cut already.
    let sequences = program.header.load.sequences();
    let in_a_pass = |pass: &Pass| pass.before.ops.first().map_or(1, |op| op.lanes.sequences());
    let mut fewest = sequences;
    program.visit_passes(|_, pass, _| fewest = fewest.min(in_a_pass(pass)));
    Bytes(most.saturating_mul(sequences.div_ceil(fewest.max(1))))
}

/// Cache peaks of the two phases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvPeaks {
    /// Worst moment of the prefill.
    pub prefill: Bytes,
    /// Worst moment of the decode.
    pub decode: Bytes,
}

/// Replays a program's cache ops.
#[must_use]
pub fn kv_peaks(program: &Program) -> KvPeaks {
    let mut replay = Replay { layout: program.header.kv, peaks: KvPeaks::default() };
    replay.nodes(&program.nodes, held_before(program));
    replay.peaks
}

/// Cache bytes held after every step of the unrolled program, in order; the executor's own count must equal it.
#[must_use]
pub fn kv_trace(program: &Program) -> Vec<Bytes> {
    let replay = Replay { layout: program.header.kv, peaks: KvPeaks::default() };
    let mut held = held_before(program);
    let mut trace = Vec::new();
    let walked: Result<(), std::convert::Infallible> = program.visit_steps(|view| {
        for (_, block) in view.pass.blocks() {
            let delta: i128 = block.ops.iter().map(|op| replay.delta(op, view.step)).sum();
            held += delta * i128::from(block.times());
        }
        trace.push(to_bytes(held));
        Ok(())
    });
    match walked {
        Ok(()) => trace,
    }
}

/// Bytes of slower memory that a program's offloaded tokens, or the chunks that it reuses if no two are alike, take at most.
/// They lie there whole and without padding.
#[must_use]
pub fn offloaded(program: &Program) -> Bytes {
    let bytes = |heads: Heads, tokens: u64| i128::from(heads.kv_bytes(tokens).0);
    let offloads = |pass: &Pass| {
        let away = |op: &Op| matches!(op.kind, OpKind::Offload { .. } | OpKind::Load { .. });
        pass.blocks().any(|(_, b)| b.ops.iter().any(away))
    };
    let mut any = false;
    program.visit_passes(|_, pass, _| any |= offloads(pass));
    if !any {
        return Bytes(0);
    }
    let held = program.header.held.iter();
    let mut now: i128 = held
        .map(|h| bytes(h.heads, u64::from(h.tokens)) * i128::from(h.layers * h.sequences))
        .sum();
    let mut most = now;
    let walked: Result<(), std::convert::Infallible> = program.visit_steps(|view| {
        for (_, block) in view.pass.blocks() {
            for op in &block.ops {
                let moved = |l: &Lane| match op.kind {
                    OpKind::Offload { heads } => bytes(heads, u64::from(l.rows)),
                    // What is brought has been there.
                    OpKind::Load { heads, .. } => bytes(heads, u64::from(l.rows)),
                    OpKind::Release { heads } if program.header.chunks.is_empty() => {
                        -bytes(heads, u64::from(l.length(view.step).tokens))
                    }
                    _ => 0,
                };
                let lanes = op.lanes.as_slice().iter();
                let sum: i128 = lanes.map(|l| moved(l) * i128::from(l.sequences)).sum();
                now += sum * i128::from(block.times());
                most = most.max(now);
            }
        }
        Ok(())
    });
    match walked {
        Ok(()) => to_bytes(most),
    }
}

/// Bytes in the caches before the first step.
fn held_before(program: &Program) -> i128 {
    let Header { kv, held, .. } = &program.header;
    held.iter().map(|h| i128::from(h.bytes(*kv).0)).sum()
}

fn to_bytes(held: i128) -> Bytes {
    Bytes(u64::try_from(held.max(0)).unwrap_or(u64::MAX))
}

struct Replay {
    layout: KvLayout,
    peaks: KvPeaks,
}

impl Replay {
    /// What a partial cache, whole whatever the cache beside it is, holds at most.
    fn part(&self, heads: Heads, keep: Tokens, tokens: Tokens) -> i128 {
        let whole = Heads { form: Form::default(), ..heads };
        i128::from(self.layout.held(whole, Length::settled(part_room(keep, tokens))).0)
    }

    /// What `op` adds to one layer's held bytes in the step `step` of its pass.
    fn delta(&self, op: &Op, step: u32) -> i128 {
        let Some(heads) = op.cache_heads() else { return 0 };
        let held = |length| i128::from(self.layout.held(heads, length).0);
        let part = |keep, tokens| self.part(heads, keep, tokens);
        let mut sum = 0;
        for lane in op.lanes.as_slice() {
            let now = lane.length(step);
            // Partial caches stand beside the others.
            let beside = match op.kind {
                OpKind::Refresh { first: true, .. } => part(lane.keep, now.tokens),
                OpKind::AttendAhead { .. } if lane.rows == 0 => part(lane.keep, now.tokens),
                OpKind::AppendPart { .. } | OpKind::AttendAhead { .. } => {
                    part(lane.keep, now.tokens)
                        - part(lane.keep, now.tokens.saturating_sub(lane.rows))
                }
                OpKind::ReleasePart { .. } => -part(lane.keep, now.tokens),
                _ => 0,
            };
            sum += beside * i128::from(lane.sequences);
            let after = match op.kind {
                OpKind::Append { .. } => {
                    held(Length { tokens: now.tokens.saturating_add(lane.rows), ..now })
                }
                OpKind::Blend { .. } => {
                    held(Length { tokens: now.tokens.saturating_add(lane.keep), ..now })
                }
                OpKind::Evict { .. } => held(heads.form.after_eviction(lane.keep.min(now.tokens))),
                OpKind::Trim { .. } => held(Length::settled(now.tokens)),
                // Pruning and packing come together; what is left is settled when both are done.
                OpKind::Pack { .. } => held(Length::settled(now.tokens)),
                OpKind::PruneChannels { .. } if heads.form.packed.is_none() => {
                    held(Length::settled(now.tokens))
                }
                // Others may still hold the first of its tokens.
                OpKind::Release { .. } => held(Length::settled(lane.keep)),
                _ => continue,
            };
            sum += (after - held(now)) * i128::from(lane.sequences);
        }
        sum
    }

    /// Net change of one layer in a step, and its highest point on the way.
    fn block(&self, block: &Block, step: u32) -> (i128, i128) {
        let (mut now, mut top) = (0, 0);
        for op in &block.ops {
            now += self.delta(op, step);
            top = top.max(now);
        }
        (now, top)
    }

    /// Net change of one layer over the first `steps` steps of a pass: caches between steps are settled.
    fn grown(&self, block: &Block, steps: u32) -> i128 {
        block.ops.iter().map(|op| self.growth(op, steps)).sum()
    }

    /// What the appends of `steps` steps add to one layer.
    fn growth(&self, op: &Op, steps: u32) -> i128 {
        let Some(heads) = op.cache_heads() else { return 0 };
        let held = |lane: &Lane, step| -> i128 {
            let now = lane.length(step);
            match op.kind {
                OpKind::Append { .. } => i128::from(self.layout.held(heads, now).0),
                OpKind::AppendPart { .. } | OpKind::AttendAhead { .. } => {
                    self.part(heads, lane.keep, now.tokens.saturating_sub(lane.rows))
                }
                _ => 0,
            }
        };
        let grown = |l: &Lane| (held(l, steps) - held(l, 0)) * i128::from(l.sequences);
        op.lanes.as_slice().iter().map(grown).sum()
    }

    fn see(&mut self, phase: Phase, held: i128) {
        let peak = match phase {
            Phase::Prefill => &mut self.peaks.prefill,
            Phase::Decode => &mut self.peaks.decode,
        };
        *peak = (*peak).max(to_bytes(held));
    }

    fn pass(&mut self, pass: &Pass, held: i128) -> i128 {
        if pass.steps == 1 {
            return self.step(pass, 0, held);
        }
        let period = pass.layers.iter().flat_map(|b| &b.ops).filter_map(Op::cache_heads);
        // New tokens that are packed at once begin anywhere in a block, and more of them straddle two.
        let begins = |form: &Form| match form.is_plain() {
            true => 1,
            false => self.layout.block_tokens.max(1),
        };
        let period = period.map(|h| h.form.period().next_multiple_of(begins(&h.form)));
        let period = period.max().unwrap_or(1);
        // A pass of several steps drops nothing, so its caches rise from period to period: the last one is the highest.
        let from = pass.steps.saturating_sub(period);
        let mut held = held
            + [&pass.layers, &pass.after_layers]
                .into_iter()
                .flatten()
                .map(|b| self.grown(b, from) * i128::from(b.times()))
                .sum::<i128>();
        for step in from..pass.steps {
            held = self.step(pass, step, held);
        }
        held
    }

    /// One step; returns what is held after it.
    fn step(&mut self, pass: &Pass, step: u32, mut held: i128) -> i128 {
        for blocks in [&pass.layers, &pass.after_layers] {
            match blocks.as_slice() {
                // All layers alike: the worst is the first or the last.
                [block] => {
                    let (net, top) = self.block(block, step);
                    let last = i128::from(block.times()) - 1;
                    self.see(pass.phase, held + top);
                    self.see(pass.phase, held + last * net + top);
                    held += (last + 1) * net;
                }
                _ => {
                    let summaries: Vec<_> =
                        blocks.iter().map(|b| (b, self.block(b, step))).collect();
                    for layer in 0..pass.layer_count() {
                        for (block, (net, top)) in &summaries {
                            if block.layers.is_some_and(|l| l.contains(layer)) {
                                self.see(pass.phase, held + top);
                                held += net;
                            }
                        }
                    }
                }
            }
        }
        self.see(pass.phase, held);
        held
    }

    fn nodes(&mut self, nodes: &[Node], mut held: i128) -> i128 {
        for node in nodes {
            match node {
                Node::Pass(pass) => held = self.pass(pass, held),
                Node::Loop { times, body, .. } => {
                    let once = self.nodes(body, held);
                    let delta = once - held;
                    let repeats = i128::from(*times) - 1;
                    // Every repetition adds the same, so the last one is the highest.
                    if repeats > 0 && delta != 0 {
                        self.nodes(body, held + repeats * delta);
                    }
                    held = once + repeats * delta;
                }
            }
        }
        held
    }
}
