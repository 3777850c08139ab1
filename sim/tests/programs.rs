//! Lowering and memory, against what can be worked out by hand or step by step.

use std::sync::Arc;

use batchmax_sim::form::{Form, Length};
use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::lower::{LowerError, Setup, lower};
use batchmax_sim::memory::{footprint, kv_peaks, kv_trace};
use batchmax_sim::op::{DType, Heads, OpKind, Phase, part_room};
use batchmax_sim::policy::{
    AnyScore, BatchMax, Budget, By, Composed, Cut, ExpectedAttention, FastKv, Full, H2o, Instant,
    Kivi, KvSharer, LagKv, Policy, PyramidKv, RefreshKv, SnapKv, SpeCache, StreamingLlm, ThinK,
    Tova,
};
use batchmax_sim::profile::{Activation, Model, RopeScaling, SlidingWindow};
use batchmax_sim::program::{Node, Program};
use batchmax_sim::units::{Bytes, Tokens};
use proptest::prelude::*;

fn smollm() -> Model {
    Model {
        name: "smollm2-135m".into(),
        source: "test".into(),
        aliases: Vec::new(),
        layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocab: 49_152,
        context: 8192,
        tied_embeddings: true,
        attention_bias: false,
        qk_norm: false,
        post_norms: false,
        activation: Activation::Silu,
        gated_ffn: true,
        norm_eps: 1e-5,
        rope_theta: 100_000.0,
        rotary_share: 1.0,
        rope_scaling: RopeScaling::None,
        sliding_window: None,
        attention_softcap: None,
        logit_softcap: None,
        attention_scale: None,
        embedding_scale: None,
        weight_dtype: DType::Bf16,
        not_executable: None,
        stored: None,
    }
}

/// Blocks of one token: memory formulas of the literature hold exactly.
fn setup(block_tokens: Tokens) -> Setup {
    Setup {
        kv: KvLayout { dtype: DType::F16, block_tokens, shares_prefix: false },
        weights: DType::F32,
        activations: DType::F32,
        head: DType::F32,
        tp: 1,
    }
}

fn batch_max(budget: Tokens, chunk: Tokens, slack: Tokens) -> BatchMax {
    let cut = Cut {
        budget: Budget::Tokens(budget),
        chunk: Some(chunk),
        sinks: 4,
        recent: 32,
        slack,
        decode: true,
        ..Cut::default()
    };
    BatchMax { cut, by: AnyScore::default() }
}

fn snapkv(budget: Budget, instant: Instant) -> SnapKv {
    let policy = SnapKv::new(budget);
    SnapKv { cut: Cut { instant, ..policy.cut }, ..policy }
}

fn program(policy: &dyn Policy, load: &Load, block: Tokens) -> Program {
    lower(&smollm(), policy, load, setup(block)).expect("lowers")
}

fn passes(program: &Program) -> usize {
    let mut count = 0;
    program.visit_passes(|_, _, _| count += 1);
    count
}

const KV: u64 = 23_040; // bytes a token, all 30 layers, f16
const KV_LAYER: u64 = 768;

#[test]
fn full_folds_to_one_prefill_and_one_decode_pass() {
    let program = program(&Full::default(), &Load::uniform(4, 512, 64, Schedule::Static), 1);
    assert_eq!(passes(&program), 2);
    assert_eq!(program.steps(), (64, 63));
    let peaks = kv_peaks(&program);
    assert_eq!(peaks.prefill, Bytes(4 * 512 * KV));
    // The last token is never fed back.
    assert_eq!(peaks.decode, Bytes(4 * (512 + 63) * KV));
}

#[test]
fn batch_max_holds_the_budget_and_one_layers_chunk() {
    let load = Load::uniform(2, 2048, 65, Schedule::Static);
    let program = program(&batch_max(512, 256, 0), &load, 1);
    // E2, cut layer by layer: K in every layer plus one chunk in the layer at work.
    assert_eq!(kv_peaks(&program).prefill, Bytes(2 * (512 * KV + 256 * KV_LAYER)));
    assert_eq!(kv_peaks(&program).decode, Bytes(2 * (512 * KV + KV_LAYER)));
    // Two quiet chunks, a loop over the equal ones, the last chunk with the head, the decode loop.
    assert!(passes(&program) <= 6, "{} passes", passes(&program));
    assert_eq!(program.steps(), (8 + 64, 64));
}

#[test]
fn slack_lets_decode_grow_between_cuts() {
    let load = Load::uniform(1, 1024, 200, Schedule::Static);
    let program = program(&batch_max(256, 128, 32), &load, 1);
    assert_eq!(kv_peaks(&program).decode, Bytes((256 + 32) * KV + KV_LAYER));
    let evictions = {
        let mut n = 0.0;
        program.visit_passes(|_, pass, times| {
            if pass.phase == Phase::Decode
                && pass.layers[0].ops.iter().any(|op| matches!(op.kind, OpKind::Evict { .. }))
            {
                n += times * f64::from(pass.steps);
            }
        });
        n
    };
    // 199 decode steps, one cut in every 33.
    assert_eq!(evictions, 6.0);
}

#[test]
fn snapkv_peaks_differ_by_the_instant_of_the_cut() {
    let load = Load::uniform(1, 2048, 2, Schedule::Static);
    let snap = |instant| snapkv(Budget::Share(0.25), instant);
    let early = program(&snap(Instant::AfterLayer), &load, 1);
    let late = program(&snap(Instant::AfterPrefill), &load, 1);
    // E1: K of 29 layers and the whole prompt of the last; E0: the whole prompt of all.
    assert_eq!(kv_peaks(&early).prefill, Bytes(512 * KV + (2048 - 512) * KV_LAYER));
    assert_eq!(kv_peaks(&late).prefill, Bytes(2048 * KV));
    assert_eq!(kv_peaks(&early).decode, kv_peaks(&late).decode);
}

#[test]
fn staggered_prefill_holds_one_prompt_beside_the_compressed_caches() {
    let load = Load::uniform(8, 2048, 2, Schedule::Staggered { prefill_batch: 1 });
    let snap = snapkv(Budget::Tokens(512), Instant::AfterPrefill);
    let staggered = program(&snap, &load, 1);
    assert_eq!(kv_peaks(&staggered).prefill, Bytes((7 * 512 + 2048) * KV));
    let Node::Loop { times: 8, shift: 1, .. } = &staggered.nodes[0] else {
        panic!("eight equal prefills fold: {:?}", staggered.nodes[0])
    };
}

#[test]
fn staggered_takes_the_rest_of_the_batch_too() {
    let load = Load::uniform(7, 64, 3, Schedule::Staggered { prefill_batch: 3 });
    let program = program(&Full::default(), &load, 1);
    let mut seen = vec![0u32; 7];
    let visited: Result<(), ()> = program.visit_steps(|view| {
        if view.pass.phase == Phase::Prefill {
            for lane in view.pass.before.ops[0].lanes_at(view.step, view.shift).as_slice() {
                for s in lane.first..lane.first + lane.sequences {
                    seen[s as usize] += lane.rows;
                }
            }
        }
        Ok(())
    });
    visited.expect("no error");
    assert_eq!(seen, vec![64; 7]);
}

#[test]
fn ragged_batches_release_what_is_done() {
    let groups = vec![
        Group { sequences: 2, isl: 100, osl: 5, hit: 0 },
        Group { sequences: 1, isl: 40, osl: 20, hit: 0 },
    ];
    let load = Load::new(groups, Schedule::Static);
    let program = program(&Full::default(), &load, 1);
    let trace = kv_trace(&program);
    assert_eq!(trace.len() as u64, program.steps().0);
    // After 4 decode steps the two short answers are done; 15 more steps for the other.
    assert_eq!(*trace.last().expect("steps"), Bytes((40 + 19) * KV));
    assert_eq!(kv_peaks(&program).decode, Bytes((2 * 104 + 44) * KV));
}

#[test]
fn blocks_round_memory_up() {
    let load = Load::uniform(1, 33, 1, Schedule::Static);
    let program = program(&Full::default(), &load, 32);
    assert_eq!(kv_peaks(&program).prefill, Bytes(64 * KV));
}

#[test]
fn sliding_layers_hold_their_window() {
    let mut model = smollm();
    model.sliding_window = Some(SlidingWindow { tokens: 128, every: 2, full_at: 1 });
    let load = Load::uniform(1, 1024, 2, Schedule::Static);
    let program = lower(&model, &Full::default(), &load, setup(1)).expect("lowers");
    // 15 sliding layers cut to 128 after their attention, 15 full ones; the last layer (29, full) is the peak.
    let trace = kv_trace(&program);
    assert_eq!(trace[0], Bytes(15 * KV_LAYER * (1024 + 128)));
}

#[test]
fn prompts_past_the_context_are_refused() {
    let load = Load::uniform(1, 8192, 1, Schedule::Static);
    let error = lower(&smollm(), &Full::default(), &load, setup(32)).expect_err("too long");
    assert!(matches!(error, LowerError::PastContext { .. }));
    assert!(error.to_string().contains("8192"), "{error}");
}

#[test]
fn a_budget_that_cannot_hold_its_forced_tokens_is_refused() {
    let load = Load::uniform(1, 512, 1, Schedule::Static);
    let error = lower(&smollm(), &batch_max(30, 128, 0), &load, setup(32)).expect_err("too small");
    assert!(error.to_string().contains("36"), "{error}");
}

#[test]
fn chunks_that_straddle_blocks_before_they_are_packed_are_the_peak() {
    let kivi = Kivi { bits: 2, group: 32, residual: 0, swapped: true };
    let parts: Vec<Arc<dyn Policy>> = vec![Arc::new(batch_max(105, 7, 0)), Arc::new(kivi)];
    let policy = Composed::new(parts).expect("goes together");
    let load = Load::uniform(1, 106, 1, Schedule::Static);
    // A packed token takes 2 x (16 B codes + 2 groups x 4 B) = 48 B a head, a whole one 256 B, in blocks of 16. 29 layers
    // have packed 98 tokens, 112 with their blocks. The last has 91 packed, 96 with theirs, and seven more in two blocks.
    let packed = 3 * 112 * 48;
    let last = 3 * (96 * 48 + 2 * 16 * 256);
    assert_eq!(kv_peaks(&program(&policy, &load, 16)).prefill, Bytes(29 * packed + last));
}

/// Any of the policies, with parameters that are valid for prompts of 64 tokens and more.
fn any_policy() -> impl Strategy<Value = Box<dyn Policy>> {
    (0..19u8, 40..400u32, 1..300u32, 0..40u32).prop_map(|(kind, budget, chunk, slack)| {
        let tokens = Budget::Tokens(budget);
        let instant = if slack > 20 { Instant::AfterLayer } else { Instant::AfterPrefill };
        let snap = snapkv(tokens, instant);
        let streaming = StreamingLlm::new(tokens);
        let streaming_chunk = (chunk > 100).then_some(chunk);
        let kivi = Kivi {
            bits: if slack.is_multiple_of(2) { 2 } else { 8 },
            group: 32,
            residual: slack / 8 * 32,
            swapped: slack % 3 == 0,
        };
        let policy: Box<dyn Policy> = match kind {
            0 => Box::new(Full { chunk: Some(chunk) }),
            1 => Box::new(batch_max(budget, chunk, slack)),
            2 => {
                let by = AnyScore { by: By::Tally, ..AnyScore::default() };
                Box::new(BatchMax { by, ..batch_max(budget, chunk, slack) })
            }
            3 => {
                let cut = Cut { chunk: streaming_chunk, slack, ..streaming.cut };
                Box::new(StreamingLlm { cut, ..streaming })
            }
            4 => Box::new(snap),
            5 => Box::new(kivi),
            6 => Box::new(ThinK { drop: 0.3, window: 32, recent: slack }),
            7 => Box::new(PyramidKv::new(Budget::Tokens(budget.max(48)))),
            8 => {
                // Whole groups of a packed cache stay.
                let budget = budget.max(100).next_multiple_of(kivi.residual.max(1));
                let evicting = Arc::new(batch_max(budget, chunk, slack));
                let parts: Vec<Arc<dyn Policy>> = vec![evicting, Arc::new(kivi)];
                Box::new(Composed::new(parts).expect("goes together"))
            }
            9 => {
                let parts: Vec<Arc<dyn Policy>> = vec![
                    Arc::new(snapkv(tokens, Instant::AfterLayer)),
                    Arc::new(ThinK { drop: 0.5, window: 32, recent: 0 }),
                ];
                Box::new(Composed::new(parts).expect("goes together"))
            }
            10 => Box::new(H2o::new(tokens)),
            11 => Box::new(FastKv::default()),
            12 => {
                Box::new(Tova { cut: Cut { slack, ..Tova::new(tokens).cut }, ..Tova::new(tokens) })
            }
            13 => Box::new(ExpectedAttention {
                cut: Cut { instant, ..ExpectedAttention::new(tokens).cut },
                ..ExpectedAttention::new(tokens)
            }),
            14 => Box::new(LagKv {
                cut: Cut { chunk: streaming_chunk, ..LagKv::new(tokens).cut },
                ..LagKv::new(tokens)
            }),
            16 => Box::new(RefreshKv { every: 1 + slack % 7, ..RefreshKv::new(tokens) }),
            17 => Box::new(SpeCache {
                fetch: budget,
                residual: 32 * (1 + slack / 20),
                ..SpeCache::default()
            }),
            15 => Box::new(KvSharer { layers: 1 + slack % 8, ..KvSharer::default() }),
            _ => {
                let sharer = KvSharer { layers: 1 + slack % 8, ..KvSharer::default() };
                let parts: Vec<Arc<dyn Policy>> =
                    vec![Arc::new(sharer), Arc::new(batch_max(budget, chunk, slack))];
                Box::new(Composed::new(parts).expect("goes together"))
            }
        };
        policy
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Folding must not change anything: the peaks of the folded program are those of its unrolled steps.
    #[test]
    fn folded_replay_equals_step_by_step(
        policy in any_policy(),
        batch in 1..5u32,
        isl in 64..900u32,
        osl in 1..120u32,
        staggered in prop::option::of(1..3u32),
        block in prop::sample::select(vec![1u32, 16, 32]),
    ) {
        let schedule = staggered.map_or(Schedule::Static, |prefill_batch| Schedule::Staggered { prefill_batch });
        let program = program(policy.as_ref(), &Load::uniform(batch, isl, osl, schedule), block);
        let (steps, decode) = program.steps();
        prop_assert_eq!(decode, u64::from(osl) - 1);
        let trace = kv_trace(&program);
        prop_assert_eq!(trace.len() as u64, steps);
        let (mut held, mut prefill, mut decoded) = (0i64, 0i64, 0i64);
        let layout = program.header.kv;
        let mut at = 0;
        let walked: Result<(), TestCaseError> = program.visit_steps(|view| {
            view.pass.visit(|_, _, _, op| {
                let Some(heads) = op.cache_heads() else { return Ok(()) };
                for lane in op.lanes_at(view.step, view.shift).as_slice() {
                    let bytes = |settled, tokens| {
                        layout.held(heads, Length { settled, tokens }).0 as i64 * i64::from(lane.sequences)
                    };
                    let now = bytes(lane.settled, lane.kv);
                    // Partial caches are whole whatever stands beside them.
                    let whole = Heads { form: Form::default(), ..heads };
                    let part = |tokens| {
                        let room = Length::settled(part_room(lane.keep, tokens));
                        layout.held(whole, room).0 as i64 * i64::from(lane.sequences)
                    };
                    match op.kind {
                        OpKind::Append { .. } => held += bytes(lane.settled, lane.kv + lane.rows) - now,
                        OpKind::Evict { .. } => {
                            let left = heads.form.after_eviction(lane.keep);
                            held += bytes(left.settled, left.tokens) - now;
                        }
                        OpKind::Trim { .. } => held += bytes(lane.kv, lane.kv) - now,
                        OpKind::Pack { .. } => held += bytes(lane.kv, lane.kv) - now,
                        OpKind::PruneChannels { .. } if heads.form.packed.is_none() => {
                            held += bytes(lane.kv, lane.kv) - now;
                        }
                        OpKind::Refresh { first: true, .. } => held += part(lane.kv),
                        OpKind::AppendPart { .. } => held += part(lane.kv) - part(lane.kv - lane.rows),
                        OpKind::AttendAhead { .. } => {
                            let before = if lane.rows == 0 { 0 } else { part(lane.kv - lane.rows) };
                            held += part(lane.kv) - before;
                        }
                        _ => {}
                    }
                }
                let peak = if view.pass.phase == Phase::Prefill { &mut prefill } else { &mut decoded };
                *peak = (*peak).max(held);
                Ok::<(), TestCaseError>(())
            })?;
            prop_assert_eq!(trace[at].0 as i64, held);
            at += 1;
            Ok(())
        });
        walked?;
        let peaks = kv_peaks(&program);
        prop_assert_eq!(peaks.prefill.0 as i64, prefill);
        prop_assert_eq!(peaks.decode.0 as i64, decoded);
    }

    /// Every prompt token is read once, in order, and caches never hold a token twice.
    #[test]
    fn every_prompt_token_is_read_once(policy in any_policy(), isl in 64..900u32, osl in 1..40u32) {
        let program = program(policy.as_ref(), &Load::uniform(1, isl, osl, Schedule::Static), 32);
        let (mut read, mut generated) = (0, 0);
        let mut resident = 0;
        let walked: Result<(), TestCaseError> = program.visit_steps(|view| {
            let mut layer_now = resident;
            for op in &view.pass.layers[0].ops {
                let lanes = op.lanes_at(view.step, view.shift);
                let lane = lanes.as_slice()[0];
                match op.kind {
                    OpKind::Append { .. } => {
                        prop_assert_eq!(lane.kv, layer_now);
                        layer_now += lane.rows;
                        if view.pass.phase == Phase::Prefill { read += lane.rows } else { generated += lane.rows }
                    }
                    OpKind::Attend { .. } | OpKind::Rank { .. } | OpKind::Tally { .. } => {
                        prop_assert_eq!(lane.kv, layer_now);
                    }
                    OpKind::Evict { .. } => {
                        prop_assert_eq!(lane.kv, layer_now);
                        layer_now = lane.keep;
                    }
                    _ => {}
                }
            }
            for block in view.pass.after_layers.iter().filter(|b| b.layers.is_some_and(|l| l.contains(0))) {
                for op in &block.ops {
                    if let OpKind::Evict { .. } = op.kind {
                        layer_now = op.lanes_at(view.step, view.shift).as_slice()[0].keep;
                    }
                }
            }
            resident = layer_now;
            Ok(())
        });
        walked?;
        prop_assert_eq!(read, isl);
        prop_assert_eq!(generated, osl - 1);
    }

    /// A smaller budget never needs more cache; a larger batch never less of anything. (Buffers are left out of the
    /// first law: the first eviction brings the scratch memory of its scores.)
    #[test]
    fn memory_is_monotone(budget in 40..800u32, chunk in 1..300u32, isl in 64..900u32, batch in 1..6u32) {
        let total = |budget, batch| {
            let program = program(&batch_max(budget, chunk, 0), &Load::uniform(batch, isl, 8, Schedule::Static), 32);
            footprint(&smollm(), &program, Bytes(0))
        };
        let (small, large) = (total(budget, batch), total(budget + 64, batch));
        prop_assert!(small.kv_prefill_peak <= large.kv_prefill_peak);
        prop_assert!(small.kv_decode_peak <= large.kv_decode_peak);
        prop_assert!(small.total() <= total(budget, batch + 1).total());
    }

    /// With room for everything, a compressing policy has the memory of `full` read in the same chunks.
    #[test]
    fn a_budget_past_the_end_changes_nothing(chunk in 1..300u32, isl in 64..900u32, osl in 1..60u32) {
        let load = Load::uniform(2, isl, osl, Schedule::Static);
        let full = program(&Full { chunk: Some(chunk) }, &load, 32);
        let roomy = program(&batch_max(isl + osl, chunk, 0), &load, 32);
        prop_assert_eq!(kv_peaks(&full), kv_peaks(&roomy));
        prop_assert_eq!(full.nodes, roomy.nodes);
    }
}

#[test]
fn rows_become_codes_where_weights_are() {
    let load = Load::uniform(1, 100, 2, Schedule::Static);
    let footprint_of = |weights| {
        let setup = Setup { weights, ..setup(1) };
        let program = lower(&smollm(), &Full::default(), &load, setup).expect("lowers");
        batchmax_sim::memory::footprint(&smollm(), &program, Bytes(0)).activations
    };
    // 100 rows of the widest input, 1536 numbers: a byte each, and 8 more for each of 48 blocks.
    let more = footprint_of(DType::Q4).0 - footprint_of(DType::F32).0;
    assert_eq!(more, 100 * (1536 + 48 * 8));
    assert_eq!(footprint_of(DType::Q8), footprint_of(DType::Q4));
    assert_eq!(footprint_of(DType::Bf16), footprint_of(DType::F32));
}
