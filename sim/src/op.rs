//! The language of the project: one [`Op`] is one kernel launch, described fully enough to be costed and to be run.
//!
//! [`Op::work`] is the only place in the workspace where FLOPs and bytes are counted.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Layer, Tokens};

mod work;

pub use work::{Work, visible_pairs};

/// Element types of weights, activations and caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit float.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit float.
    Fp8,
    /// 8-bit integer.
    Int8,
    /// 4-bit integer.
    Int4,
    /// 2-bit integer.
    Int2,
}

impl DType {
    /// Every type, for parsing and for help texts.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F16, Self::Bf16, Self::Fp8, Self::Int8, Self::Int4, Self::Int2];

    /// Bits of one element, scales not counted.
    #[must_use]
    pub fn bits(self) -> u64 {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Fp8 | Self::Int8 => 8,
            Self::Int4 => 4,
            Self::Int2 => 2,
        }
    }

    /// Bytes of `elements`, rounded up; scales not counted.
    #[must_use]
    pub fn bytes(self, elements: u64) -> Bytes {
        Bytes(elements.saturating_mul(self.bits()).div_ceil(8))
    }

    /// The name in files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int2 => "int2",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        Self::ALL.into_iter().find(|d| d.name() == lower).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|d| d.name()).collect();
            format!("\"{text}\" is not a type; known: {}", known.join(", "))
        })
    }
}

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
}

impl Heads {
    /// Bytes of K and V of `tokens` tokens of all KV heads, unpadded.
    #[must_use]
    pub fn kv_bytes(&self, tokens: u64) -> Bytes {
        self.dtype.bytes(2 * u64::from(self.kv) * u64::from(self.dim) * tokens)
    }
}

/// How tokens are ranked before some are dropped. Closed: `exec` has one kernel per word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Score {
    /// Newer is better.
    Recency,
    /// Small keys are better: -|k|.
    KeyNorm,
    /// Unusual keys are better: -cos(k, mean of the normalised keys).
    KeyDiff,
    /// Attention that the last queries pay, smoothed along the cache.
    WindowAttention {
        /// Queries of the observation window.
        window: Tokens,
        /// Width of the average pooling.
        pool: Tokens,
        /// Pool as if the window's own columns did not exist (SnapKV, kvpress).
        exclude_window: bool,
    },
    /// Attention received since the token came, summed over queries.
    TalliedAttention {
        /// Divide by the number of queries that could see the token.
        mean: bool,
    },
}

impl Score {
    /// The name in presets and tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Recency => "recency",
            Self::KeyNorm => "key-norm",
            Self::KeyDiff => "keydiff",
            Self::WindowAttention { .. } => "window",
            Self::TalliedAttention { .. } => "tally",
        }
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

/// Equal sequences inside an op: `sequences` of them from index `first`, each with `rows` query tokens in this step
/// over a cache of `kv` tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lane {
    /// Index of the first sequence in the load.
    pub first: u32,
    /// How many sequences.
    pub sequences: u32,
    /// Query tokens per sequence.
    pub rows: Tokens,
    /// Cached tokens per sequence and KV head. `Append`, `Evict`, `Release`: before the op. Other ops: as read.
    pub kv: Tokens,
    /// Tokens that stay (`Evict` only).
    pub keep: Tokens,
}

/// The lanes of an op; one lane (all sequences equal) needs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// All sequences are equal.
    One(Lane),
    /// Ragged batch.
    Many(Vec<Lane>),
}

impl Lanes {
    /// From a list; one element is stored inline.
    #[must_use]
    pub fn new(lanes: &[Lane]) -> Self {
        match lanes {
            [one] => Self::One(*one),
            many => Self::Many(many.to_vec()),
        }
    }

    /// The lanes in order of their sequences.
    #[must_use]
    pub fn as_slice(&self) -> &[Lane] {
        match self {
            Self::One(lane) => std::slice::from_ref(lane),
            Self::Many(lanes) => lanes,
        }
    }

    /// Adds a lane behind the others.
    pub fn push(&mut self, lane: Lane) {
        match self {
            Self::One(one) => *self = Self::Many(vec![*one, lane]),
            Self::Many(lanes) => lanes.push(lane),
        }
    }

    /// Query tokens of all sequences.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.as_slice().iter().map(|l| u64::from(l.sequences) * u64::from(l.rows)).sum()
    }

    /// Sequences of all lanes.
    #[must_use]
    pub fn sequences(&self) -> u64 {
        self.as_slice().iter().map(|l| u64::from(l.sequences)).sum()
    }
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
    /// Keeps the best `Lane::keep` tokens per KV head, compacts, returns blocks to the pool.
    Evict {
        /// Heads.
        heads: Heads,
        /// Exempt tokens.
        protect: Protect,
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

/// The family of kernels an op belongs to: the row of a validation table and the unit of calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Matrix products.
    Gemm,
    /// Attention of prompt chunks.
    AttendPrefill,
    /// Attention of single tokens.
    AttendDecode,
    /// Embedding look-up.
    Embed,
    /// Norms.
    Norm,
    /// Rotary embedding.
    Rope,
    /// Cache writes.
    Append,
    /// Running attention sums.
    Tally,
    /// Ranking by position.
    RankRecency,
    /// Ranking by key norm.
    RankKeyNorm,
    /// Ranking by distance from the mean key.
    RankKeydiff,
    /// Ranking by the window's attention.
    RankWindow,
    /// Ranking by tallied attention.
    RankTally,
    /// Compaction.
    Evict,
    /// Sums over devices.
    Collective,
    /// Gate activation.
    Gated,
    /// Logit cap.
    Softcap,
    /// Sampling.
    Sample,
    /// Freeing.
    Release,
}

impl Family {
    /// Every family, in the order of tables.
    pub const ALL: [Self; 19] = [
        Self::Gemm,
        Self::AttendPrefill,
        Self::AttendDecode,
        Self::Embed,
        Self::Norm,
        Self::Rope,
        Self::Append,
        Self::Tally,
        Self::RankRecency,
        Self::RankKeyNorm,
        Self::RankKeydiff,
        Self::RankWindow,
        Self::RankTally,
        Self::Evict,
        Self::Collective,
        Self::Gated,
        Self::Softcap,
        Self::Sample,
        Self::Release,
    ];

    /// The name in tables and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::AttendPrefill => "attend-prefill",
            Self::AttendDecode => "attend-decode",
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Rope => "rope",
            Self::Append => "append",
            Self::Tally => "tally",
            Self::RankRecency => "rank-recency",
            Self::RankKeyNorm => "rank-key-norm",
            Self::RankKeydiff => "rank-keydiff",
            Self::RankWindow => "rank-window",
            Self::RankTally => "rank-tally",
            Self::Evict => "evict",
            Self::Collective => "collective",
            Self::Gated => "gated",
            Self::Softcap => "softcap",
            Self::Sample => "sample",
            Self::Release => "release",
        }
    }
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
            OpKind::Append { .. } => Family::Append,
            OpKind::Attend { .. } if phase == Phase::Prefill => Family::AttendPrefill,
            OpKind::Attend { .. } => Family::AttendDecode,
            OpKind::Tally { .. } => Family::Tally,
            OpKind::Rank { by, .. } => match by {
                Score::Recency => Family::RankRecency,
                Score::KeyNorm => Family::RankKeyNorm,
                Score::KeyDiff => Family::RankKeydiff,
                Score::WindowAttention { .. } => Family::RankWindow,
                Score::TalliedAttention { .. } => Family::RankTally,
            },
            OpKind::Evict { .. } => Family::Evict,
            OpKind::AllReduce { .. } => Family::Collective,
            OpKind::Gated { .. } => Family::Gated,
            OpKind::Softcap { .. } => Family::Softcap,
            OpKind::Sample { .. } => Family::Sample,
            OpKind::Release { .. } => Family::Release,
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
            | OpKind::Release { heads } => Some(heads),
            _ => None,
        }
    }

    /// The lanes `step` steps later in the same pass: caches have grown by the rows of each step.
    #[must_use]
    pub fn lanes_at(&self, step: u32, shift: u32) -> Lanes {
        let move_on = |lane: &Lane| Lane {
            first: lane.first + shift,
            kv: if self.cache_heads().is_some() {
                lane.kv.saturating_add(step.saturating_mul(lane.rows))
            } else {
                lane.kv
            },
            ..*lane
        };
        match &self.lanes {
            Lanes::One(lane) => Lanes::One(move_on(lane)),
            Lanes::Many(lanes) => Lanes::Many(lanes.iter().map(move_on).collect()),
        }
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
