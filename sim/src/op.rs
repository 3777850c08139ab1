//! The language of the project: one [`Op`] is one kernel launch, described fully enough to be costed and to be run.
//!
//! [`Op::work`] is the only place in the workspace where FLOPs and bytes are counted.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Flops, Layer, Tokens};

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

/// What an op moves and computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Floating-point operations.
    pub flops: Flops,
    /// Bytes read, each once.
    pub read: Bytes,
    /// Bytes written, each once.
    pub written: Bytes,
}

impl Work {
    /// Bytes read and written.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.read + self.written
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

/// Pairs (query, visible key) of one sequence: `rows` causal queries at the end of `kv` keys, at most `window` each.
#[must_use]
pub fn visible_pairs(rows: Tokens, kv: Tokens, window: Option<Tokens>) -> f64 {
    let (rows, kv) = (f64::from(rows), f64::from(kv));
    let causal = rows * kv - rows * (rows - 1.0) / 2.0;
    match window.map(f64::from) {
        // Queries that see more than the window are cut to it: those after the first `window` keys.
        Some(window) if kv > window => {
            let first_seen = kv - rows + 1.0;
            let uncut = (window - first_seen).clamp(0.0, rows);
            let uncut_pairs = uncut * first_seen + uncut * (uncut - 1.0) / 2.0;
            uncut_pairs + (rows - uncut) * window
        }
        _ => causal,
    }
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

    /// FLOPs and bytes, `step` steps into its pass. Bytes are the least that must move: each operand once.
    #[must_use]
    pub fn work(&self, step: u32) -> Work {
        let rows = self.lanes.rows();
        let act = |elements: u64| self.dtype.bytes(elements);
        let dense = |flops_per_element: f64, read: u64, written: u64| Work {
            flops: Flops(flops_per_element * rows as f64 * written as f64),
            read: act(rows.saturating_mul(read)),
            written: act(rows.saturating_mul(written)),
        };
        match self.kind {
            OpKind::Embed { width } => dense(0.0, u64::from(width), u64::from(width)),
            OpKind::RmsNorm { width, accumulate } => {
                dense(4.0, u64::from(width) * if accumulate { 2 } else { 1 }, u64::from(width))
            }
            OpKind::QkNorm { heads } => {
                let width = u64::from(heads.query + heads.kv) * u64::from(heads.dim);
                dense(4.0, width, width)
            }
            OpKind::Rope { heads } => {
                let width = u64::from(heads.query + heads.kv) * u64::from(heads.dim);
                dense(3.0, width, width)
            }
            OpKind::Gemm { n, k, weights, accumulate } => Work {
                flops: Flops(2.0 * rows as f64 * n as f64 * k as f64),
                read: weights.bytes(n.saturating_mul(k))
                    + act(rows.saturating_mul(if accumulate { n + k } else { k })),
                written: act(rows.saturating_mul(n)),
            },
            // Each device reads its own row and the sum of the others'.
            OpKind::AllReduce { width } => dense(1.0, 2 * u64::from(width), u64::from(width)),
            OpKind::Gated { ffn } => dense(5.0, 2 * u64::from(ffn), u64::from(ffn)),
            OpKind::Softcap { width } => dense(3.0, u64::from(width), u64::from(width)),
            OpKind::Sample { vocab } => Work {
                flops: Flops(rows as f64 * f64::from(vocab)),
                read: act(rows.saturating_mul(u64::from(vocab))),
                written: Bytes(rows.saturating_mul(4)),
            },
            _ => self.cache_work(step),
        }
    }

    fn cache_work(&self, step: u32) -> Work {
        let mut total = Work::default();
        let Some(heads) = self.cache_heads() else { return total };
        for lane in self.lanes.as_slice() {
            let kv = lane.kv.saturating_add(step.saturating_mul(lane.rows));
            let one = self.lane_work(heads, lane, kv);
            let sequences = u64::from(lane.sequences);
            total.flops += one.flops * sequences as f64;
            total.read += one.read * sequences;
            total.written += one.written * sequences;
        }
        total
    }

    /// Work on one sequence of a lane whose cache holds `kv` tokens.
    fn lane_work(&self, heads: Heads, lane: &Lane, kv: Tokens) -> Work {
        let tokens = u64::from(kv);
        let rows = u64::from(lane.rows);
        let dim = f64::from(heads.dim);
        let query_width = u64::from(heads.query) * u64::from(heads.dim);
        let keys = |tokens: u64| Bytes(heads.kv_bytes(tokens).0 / 2);
        let f32s = |elements: u64| Bytes(elements.saturating_mul(4));
        let kv_heads = u64::from(heads.kv);
        // q.k of each visible pair for every query head: 2 FLOPs a channel.
        let dot = |pairs: f64| Flops(2.0 * f64::from(heads.query) * dim * pairs);
        match self.kind {
            OpKind::Append { .. } => Work {
                flops: Flops(0.0),
                read: self.dtype.bytes(2 * kv_heads * u64::from(heads.dim) * rows),
                written: heads.kv_bytes(rows),
            },
            OpKind::Attend { window, .. } => {
                let pairs = visible_pairs(lane.rows, kv, window);
                let read_tokens = window.map_or(tokens, |w| tokens.min(u64::from(w) + rows - 1));
                Work {
                    flops: dot(pairs) * 2.0,
                    read: heads.kv_bytes(read_tokens) + self.dtype.bytes(rows * query_width),
                    written: self.dtype.bytes(rows * query_width),
                }
            }
            OpKind::Tally { .. } => Work {
                flops: dot(visible_pairs(lane.rows, kv, None)),
                read: keys(tokens) + self.dtype.bytes(rows * query_width) + f32s(kv_heads * tokens),
                written: f32s(kv_heads * tokens),
            },
            OpKind::Rank { by, .. } => {
                let elements = f64::from(heads.kv) * dim * f64::from(kv);
                let (flops, read) = match by {
                    Score::Recency => (0.0, f32s(kv_heads * tokens)),
                    Score::KeyNorm => (2.0 * elements, keys(tokens)),
                    // Two passes over the keys: the anchor, then the cosines.
                    Score::KeyDiff => (6.0 * elements, keys(tokens) * 2),
                    Score::WindowAttention { window, .. } => {
                        let window = window.min(lane.rows);
                        (dot(visible_pairs(window, kv, None)).0, keys(tokens))
                    }
                    Score::TalliedAttention { .. } => {
                        (f64::from(heads.kv) * f64::from(kv), f32s(2 * kv_heads * tokens))
                    }
                };
                Work { flops: Flops(flops), read, written: f32s(kv_heads * tokens) }
            }
            OpKind::Evict { .. } => {
                // In-place compaction moves what lies behind the first hole; on average half of what stays.
                let moved = u64::from(lane.keep.min(kv)) / 2;
                Work {
                    flops: Flops(f64::from(heads.kv) * f64::from(kv)),
                    read: heads.kv_bytes(moved) + f32s(kv_heads * tokens),
                    written: heads.kv_bytes(moved),
                }
            }
            _ => Work::default(),
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

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { query: 9, kv: 3, dim: 64, dtype: DType::F16 };

    fn op(kind: OpKind, lane: Lane) -> Op {
        Op { name: "x", kind, dtype: DType::F32, lanes: Lanes::One(lane) }
    }

    fn lane(sequences: u32, rows: Tokens, kv: Tokens) -> Lane {
        Lane { first: 0, sequences, rows, kv, keep: 0 }
    }

    #[test]
    fn gemm_counts_two_flops_per_multiply_add() {
        let kind = OpKind::Gemm { n: 3, k: 5, weights: DType::Bf16, accumulate: false };
        let work = op(kind, lane(2, 1, 0)).work(0);
        // 2 rows x 3 columns x 5 products x 2 = 60; weights 15 x 2 B, inputs 10 x 4 B, outputs 6 x 4 B.
        assert_eq!(work.flops, Flops(60.0));
        assert_eq!(work.read, Bytes(30 + 40));
        assert_eq!(work.written, Bytes(24));
    }

    #[test]
    fn causal_pairs_by_hand() {
        // 3 queries over 5 keys see 3, 4, 5 of them.
        assert_eq!(visible_pairs(3, 5, None), 12.0);
        // A window of 4 cuts the last to 4.
        assert_eq!(visible_pairs(3, 5, Some(4)), 11.0);
        assert_eq!(visible_pairs(3, 5, Some(2)), 6.0);
        assert_eq!(visible_pairs(1, 5, Some(8)), 5.0);
    }

    #[test]
    fn decode_attention_reads_every_cached_byte_once() {
        let attend = op(OpKind::Attend { heads: HEADS, window: None }, lane(2, 1, 100));
        let work = attend.work(0);
        // 2 sequences x 100 tokens x (2 x 3 x 64 x 2 B) = 153,600 B, plus the queries 2 x 576 x 4 B.
        assert_eq!(work.read, Bytes(153_600 + 4_608));
        // 4 FLOPs x 9 heads x 64 channels x 100 keys x 2 sequences.
        assert_eq!(work.flops, Flops(4.0 * 9.0 * 64.0 * 100.0 * 2.0));
        // Ten steps later each cache is ten longer.
        assert_eq!(attend.work(10).read, Bytes(168_960 + 4_608));
    }

    #[test]
    fn types_parse_by_their_own_names() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert!("float".parse::<DType>().is_err());
    }
}
