//! The language of the project: one [`Op`] is one kernel launch, described fully enough to be costed and to be run.
//!
//! [`Op::work`] is the only place in the workspace where FLOPs and bytes are counted.

use serde::{Deserialize, Serialize};

use crate::form::{Form, Length};
use crate::units::{Bytes, Layer, Tokens};

mod branch;
mod choice;
mod dtype;
mod family;
mod lanes;
mod score;
mod work;

pub use branch::Branch;
pub use choice::{Choice, Pick};
pub use dtype::DType;
pub use family::Family;
pub use lanes::{Lane, Lanes};
pub use score::{Pooling, Score};
pub use work::{Work, visible_pairs};

/// The two halves of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Prompt tokens are read.
    Prefill,
    /// One token per sequence per step.
    Decode,
}

impl Phase {
    /// `prefill` or `decode`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Heads of an attention layer, and the type in which their keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heads {
    /// Query heads.
    pub query: u32,
    /// KV heads.
    pub kv: u32,
    /// Channels per head.
    pub dim: u32,
    /// Element type of the cache.
    pub dtype: DType,
    /// How old tokens are stored.
    pub form: Form,
}

impl Heads {
    /// Bytes of K and V of `tokens` tokens of all KV heads, unpadded.
    #[must_use]
    pub fn kv_bytes(&self, tokens: u64) -> Bytes {
        self.dtype.bytes(2 * u64::from(self.kv) * u64::from(self.dim) * tokens)
    }
}

/// Tokens that no ranking may drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Protect {
    /// The first tokens of the sequence.
    pub sinks: Tokens,
    /// The newest tokens of the sequence.
    pub recent: Tokens,
}

/// Tokens that a partial cache has room for, beside a cache of `tokens` of which it holds the `keep` best: those, and
/// one that comes before another leaves.
#[must_use]
pub fn part_room(keep: Tokens, tokens: Tokens) -> Tokens {
    keep.min(tokens).saturating_add(1)
}

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Rows of the embedding table.
    Embed {
        /// Residual width.
        width: u32,
    },
    /// Root-mean-square norm of each row.
    RmsNorm {
        /// Row width.
        width: u32,
        /// Adds to the residual (norms behind a block).
        accumulate: bool,
    },
    /// y = x W^T (+ bias), or y += x W^T.
    Gemm {
        /// Output columns.
        n: u64,
        /// Inner dimension.
        k: u64,
        /// Type of the weights.
        weights: DType,
        /// Adds to what the output holds (residual).
        accumulate: bool,
    },
    /// Per-head RMS norm of queries and keys.
    QkNorm {
        /// Heads.
        heads: Heads,
    },
    /// Rotates queries and keys.
    Rope {
        /// Heads.
        heads: Heads,
    },
    /// Writes the step's keys and values to the cache.
    Append {
        /// Heads.
        heads: Heads,
    },
    /// Attention over the cache, causal inside the step.
    Attend {
        /// Heads.
        heads: Heads,
        /// Tokens a query sees, its own included, if the layer slides.
        window: Option<Tokens>,
    },
    /// Adds the step's attention to each key's running sum.
    Tally {
        /// Heads.
        heads: Heads,
    },
    /// Scores every cached token of every KV head.
    Rank {
        /// Heads.
        heads: Heads,
        /// The score.
        by: Score,
    },
    /// Keeps the best `Lane::keep` tokens per KV head, compacts, returns blocks to the pool. What is left is settled
    /// ([`crate::form`]).
    Evict {
        /// Heads.
        heads: Heads,
        /// Exempt tokens.
        protect: Protect,
        /// How the budget is shared.
        choice: Choice,
    },
    /// Adds the tokens that the next eviction drops to what earlier ones have left behind.
    Accumulate {
        /// Heads.
        heads: Heads,
        /// As the eviction's.
        protect: Protect,
        /// As the eviction's.
        choice: Choice,
    },
    /// Joins what dropped tokens have left behind to the attention over the cache.
    ReadState {
        /// Heads.
        heads: Heads,
    },
    /// Brings the extremes of each page of keys up to the cache.
    Index {
        /// Heads.
        heads: Heads,
        /// Tokens of a page.
        page: Tokens,
    },
    /// Puts keys behind the sinks into `Lane::keep` clusters per KV head.
    Cluster {
        /// Heads.
        heads: Heads,
        /// First tokens, which belong to no cluster.
        sinks: Tokens,
        /// Rounds of k-means.
        rounds: u32,
    },
    /// Chooses the `Lane::keep` tokens that this step reads.
    Select {
        /// Heads.
        heads: Heads,
        /// How.
        by: Pick,
    },
    /// Attention of one row per sequence over the `Lane::keep` tokens chosen before, copied next to each other.
    AttendChosen {
        /// Heads.
        heads: Heads,
        /// How they were chosen.
        by: Pick,
    },
    /// Notes each sequence's query, the mean over the heads of its newest row, and compares it with the one noted when
    /// its partial cache was filled: below this cosine the partial cache is stale.
    Compare {
        /// Heads.
        heads: Heads,
        /// Thousandths.
        below: i32,
    },
    /// Copies the `Lane::keep` best tokens of the last ranking, the newest among them, into the partial cache that
    /// stands beside a layer's cache.
    Refresh {
        /// Heads.
        heads: Heads,
        /// It is the first time: memory is taken.
        first: bool,
    },
    /// Copies the newest token into the partial cache; once that holds one more than `Lane::keep`, in the place of the
    /// token that the last ranking liked least.
    AppendPart {
        /// Heads.
        heads: Heads,
    },
    /// Attention of one row per sequence over its partial cache.
    AttendPart {
        /// Heads.
        heads: Heads,
    },
    /// The sequence is done: its partial cache goes back to the pool.
    ReleasePart {
        /// Heads.
        heads: Heads,
    },
    /// Copies the newest `Lane::rows` tokens, still whole, to slower memory, while others compute.
    Offload {
        /// Heads.
        heads: Heads,
    },
    /// Attention of each sequence's newest row and of the one after it, which speculates, over the cache with whole tokens
    /// in the place of the `Lane::keep` that were fetched; the speculating row sees its own key too, which is not kept.
    /// Without a newest row (`Lane::rows` is 0) there is the speculating one alone, and nothing is fetched yet.
    AttendAhead {
        /// Heads.
        heads: Heads,
    },
    /// Chooses the `Lane::keep` tokens that the speculating row attends to most: the next step will want them whole.
    Foresee {
        /// Heads.
        heads: Heads,
        /// Tokens that stay whole are chosen too.
        whole: bool,
    },
    /// Brings chosen tokens back from slower memory, while others compute.
    Fetch {
        /// Heads.
        heads: Heads,
    },
    /// Brings the first `Lane::rows` tokens, cached chunk by chunk of so many tokens, from a store.
    Load {
        /// Heads.
        heads: Heads,
        /// Tokens of a chunk.
        chunk: Tokens,
    },
    /// How far the step's values are from those brought from the store, by token.
    Deviate {
        /// Heads.
        heads: Heads,
    },
    /// Fills an empty cache with `Lane::keep` tokens: those brought from the store, keys turned to their places, with the
    /// step's rows in the places of theirs and behind them.
    Blend {
        /// Heads.
        heads: Heads,
    },
    /// Attention of rows that stand anywhere among the cached tokens, the newest `Lane::keep` of them at the end.
    AttendRows {
        /// Heads.
        heads: Heads,
    },
    /// Packs what the step has pushed out of the residual.
    Pack {
        /// Heads.
        heads: Heads,
    },
    /// Drops the least important channels of keys; the first time it chooses them.
    PruneChannels {
        /// Heads.
        heads: Heads,
    },
    /// Cuts the short heads ([`crate::form::Short`]) to their sinks and newest tokens.
    Trim {
        /// Heads.
        heads: Heads,
    },
    /// Only the best `Lane::keep` rows of each sequence go on to the next layer, by the sum of the layer's last ranking
    /// over its KV heads.
    Forward {
        /// Row width.
        width: u32,
        /// Newest rows that go on in any case.
        recent: Tokens,
    },
    /// Sum of each row over the devices that share a layer.
    AllReduce {
        /// Row width.
        width: u32,
    },
    /// activation(gate) * up.
    Gated {
        /// Width of gate (and of up).
        ffn: u32,
    },
    /// cap * tanh(x / cap).
    Softcap {
        /// Row width.
        width: u32,
    },
    /// The next token of each sequence from its logits.
    Sample {
        /// Row width.
        vocab: u32,
    },
    /// The sequence is done: its cache goes back to the pool.
    Release {
        /// Heads.
        heads: Heads,
    },
}

/// One kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    /// What it is called inside its layer (`qkv`, `attend`, `down` ...): finds the weight, names the table row.
    pub name: &'static str,
    /// What it does.
    pub kind: OpKind,
    /// Type of the activations.
    pub dtype: DType,
    /// The sequences it works on.
    pub lanes: Lanes,
    /// Which of them take part, where only the run can tell.
    pub branch: Branch,
}

impl Op {
    /// The kernel family.
    #[must_use]
    pub fn family(&self, phase: Phase) -> Family {
        match self.kind {
            OpKind::Embed { .. } => Family::Embed,
            OpKind::RmsNorm { .. } | OpKind::QkNorm { .. } => Family::Norm,
            OpKind::Gemm { .. } => Family::Gemm,
            OpKind::Rope { .. } => Family::Rope,
            OpKind::Append { .. } | OpKind::AppendPart { .. } => Family::Append,
            OpKind::Attend { .. } if phase == Phase::Prefill => Family::AttendPrefill,
            OpKind::Attend { .. } | OpKind::AttendPart { .. } | OpKind::AttendAhead { .. } => {
                Family::AttendDecode
            }
            OpKind::Tally { .. } => Family::Tally,
            OpKind::Rank { by, .. } => match by {
                Score::Recency => Family::RankRecency,
                Score::KeyNorm => Family::RankKeyNorm,
                Score::KeyDiff => Family::RankKeydiff,
                Score::WindowAttention { .. } => Family::RankWindow,
                Score::TalliedAttention { .. } => Family::RankTally,
                Score::LastAttention | Score::NewestAttention { .. } => Family::RankLast,
                Score::Random { .. } => Family::RankRandom,
                Score::Lag { .. } => Family::RankLag,
                Score::ExpectedAttention { .. } => Family::RankExpected,
            },
            OpKind::Evict { .. } => Family::Evict,
            OpKind::Accumulate { .. } => Family::Accumulate,
            OpKind::ReadState { .. } => Family::ReadState,
            OpKind::Index { .. } => Family::Index,
            OpKind::Cluster { .. } => Family::Cluster,
            OpKind::Select { .. } | OpKind::Foresee { .. } => Family::Select,
            OpKind::Offload { .. } | OpKind::Fetch { .. } | OpKind::Load { .. } => Family::Transfer,
            OpKind::Deviate { .. } => Family::Deviate,
            OpKind::Blend { .. } => Family::Blend,
            OpKind::AttendRows { .. } => Family::AttendPrefill,
            OpKind::AttendChosen { .. } => Family::AttendChosen,
            OpKind::Compare { .. } => Family::Compare,
            OpKind::Refresh { .. } => Family::Refresh,
            OpKind::Pack { .. } => Family::Pack,
            OpKind::PruneChannels { .. } => Family::PruneChannels,
            OpKind::Trim { .. } => Family::Trim,
            OpKind::Forward { .. } => Family::Forward,
            OpKind::AllReduce { .. } => Family::Collective,
            OpKind::Gated { .. } => Family::Gated,
            OpKind::Softcap { .. } => Family::Softcap,
            OpKind::Sample { .. } => Family::Sample,
            OpKind::Release { .. } | OpKind::ReleasePart { .. } => Family::Release,
        }
    }

    /// The heads it works on, if it touches the cache.
    #[must_use]
    pub fn cache_heads(&self) -> Option<Heads> {
        match self.kind {
            OpKind::Append { heads }
            | OpKind::Attend { heads, .. }
            | OpKind::Tally { heads }
            | OpKind::Rank { heads, .. }
            | OpKind::Evict { heads, .. }
            | OpKind::Accumulate { heads, .. }
            | OpKind::ReadState { heads }
            | OpKind::Index { heads, .. }
            | OpKind::Cluster { heads, .. }
            | OpKind::Select { heads, .. }
            | OpKind::AttendChosen { heads, .. }
            | OpKind::Compare { heads, .. }
            | OpKind::Refresh { heads, .. }
            | OpKind::AppendPart { heads }
            | OpKind::AttendPart { heads }
            | OpKind::ReleasePart { heads }
            | OpKind::Offload { heads }
            | OpKind::AttendAhead { heads }
            | OpKind::Foresee { heads, .. }
            | OpKind::Fetch { heads }
            | OpKind::Load { heads, .. }
            | OpKind::Deviate { heads }
            | OpKind::Blend { heads }
            | OpKind::AttendRows { heads }
            | OpKind::Pack { heads }
            | OpKind::PruneChannels { heads }
            | OpKind::Trim { heads }
            | OpKind::Release { heads } => Some(heads),
            _ => None,
        }
    }

    /// Whether it works on the cache, so that its lanes grow from step to step.
    #[must_use]
    pub fn touches_cache(&self) -> bool {
        !matches!(
            self.kind,
            OpKind::Embed { .. }
                | OpKind::RmsNorm { .. }
                | OpKind::Gemm { .. }
                | OpKind::QkNorm { .. }
                | OpKind::Rope { .. }
                | OpKind::Forward { .. }
                | OpKind::AllReduce { .. }
                | OpKind::Gated { .. }
                | OpKind::Softcap { .. }
                | OpKind::Sample { .. }
        )
    }

    /// The attention whose kernel this op runs, `step` steps into its pass: over partial caches as over caches of their
    /// length, with a row that speculates as with that many more sequences.
    #[must_use]
    pub fn as_attention(&self, step: u32) -> Option<Self> {
        let heads = match self.kind {
            OpKind::AttendPart { heads }
            | OpKind::AttendAhead { heads }
            | OpKind::AttendRows { heads } => heads,
            _ => return None,
        };
        let alike = |lane: &Lane| {
            let now = lane.length(step);
            if let OpKind::AttendRows { .. } = self.kind {
                // Rows at the end of so many keys see as many together.
                let rows = f64::from(lane.rows.max(1));
                let kv = work::scattered_pairs(lane) / rows + (rows - 1.0) / 2.0;
                let kv = (kv.round() as Tokens).max(lane.rows);
                return Lane { kv, settled: kv - lane.rows, ..*lane };
            }
            let (kv, sequences) = match self.kind {
                OpKind::AttendPart { .. } => {
                    (now.tokens.min(lane.keep.saturating_add(1)), lane.sequences)
                }
                _ => (now.tokens, lane.sequences.saturating_mul(lane.rows.saturating_add(1))),
            };
            Lane { rows: 1, kv, settled: now.settled.min(kv), sequences, ..*lane }
        };
        let lanes: Vec<Lane> = self.lanes.as_slice().iter().map(alike).collect();
        let kind = OpKind::Attend { heads, window: None };
        Some(Self { kind, lanes: Lanes::new(&lanes), ..self.clone() })
    }

    /// The lanes `step` steps later in the same pass: caches have grown by the rows of each step.
    #[must_use]
    pub fn lanes_at(&self, step: u32, shift: u32) -> Lanes {
        self.moved_lanes(step, shift).collect()
    }

    /// The same in place of what `lanes` held; the memory of a list is kept.
    pub fn move_lanes(&self, step: u32, shift: u32, lanes: &mut Lanes) {
        match lanes {
            Lanes::One(_) => *lanes = self.lanes_at(step, shift),
            Lanes::Many(list) => {
                list.clear();
                list.extend(self.moved_lanes(step, shift));
            }
        }
    }

    fn moved_lanes(&self, step: u32, shift: u32) -> impl Iterator<Item = Lane> {
        let grown = if self.touches_cache() { step } else { 0 };
        self.lanes.as_slice().iter().map(move |lane| {
            let Length { settled, tokens: kv } = lane.length(grown);
            let keep = match self.kind {
                OpKind::Select { by, .. } | OpKind::AttendChosen { by, .. } => {
                    by.chosen(lane.keep, kv - lane.kv)
                }
                _ => lane.keep,
            };
            Lane { first: lane.first + shift, kv, settled, keep, ..*lane }
        })
    }
}

/// Where an op stands in a program: the key on which prediction and measurement meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    /// Prefill or decode.
    pub phase: Phase,
    /// Index of the pass in the program, loops unrolled once.
    pub pass: u32,
    /// Block inside the pass.
    pub block: u32,
    /// Op inside the block.
    pub op: u32,
    /// First layer of the block; `None` outside the layers.
    pub layer: Option<Layer>,
    /// The op's name.
    pub name: &'static str,
}
