//! FLOPs and bytes: the only place in the workspace where they are counted.

use super::{Choice, Heads, Lane, Op, OpKind, Pick, Score};
use crate::form::{Form, Length};
use crate::units::{Bytes, Flops, Tokens};

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

/// Pairs (query, visible key) of one sequence whose rows stand anywhere among the cached tokens: the newest `Lane::keep` at
/// the end, the others, in expectation, in the middle of what is before.
#[must_use]
pub(crate) fn scattered_pairs(lane: &Lane) -> f64 {
    let newest = lane.keep.min(lane.rows).min(lane.kv);
    let others = f64::from(lane.rows - newest);
    others * f64::from(lane.kv - newest + 1) / 2.0 + visible_pairs(newest, lane.kv, None)
}

impl Op {
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
            // One row in, one row out for what goes on; a choice among the scores before.
            OpKind::Forward { width, .. } => {
                let (mut kept, mut scored) = (0u64, 0u64);
                for lane in self.lanes.as_slice() {
                    kept += u64::from(lane.sequences) * u64::from(lane.keep);
                    scored += u64::from(lane.sequences) * u64::from(lane.rows);
                }
                let moved = act(kept.saturating_mul(u64::from(width)));
                Work {
                    flops: Flops(scored as f64),
                    read: moved + Bytes(scored.saturating_mul(4)),
                    written: moved,
                }
            }
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
        if let Some(part) = self.as_attention(step) {
            return part.work(0);
        }
        let mut total = Work::default();
        let Some(heads) = self.cache_heads() else { return total };
        for lane in self.lanes.as_slice() {
            let one = self.lane_work(heads, lane, lane.length(step));
            let sequences = u64::from(lane.sequences);
            total.flops += one.flops * sequences as f64;
            total.read += one.read * sequences;
            total.written += one.written * sequences;
        }
        total
    }

    /// Work on one sequence of a lane whose cache has this length.
    fn lane_work(&self, heads: Heads, lane: &Lane, length: Length) -> Work {
        let kv = length.tokens;
        let tokens = u64::from(kv);
        let rows = u64::from(lane.rows);
        let dim = f64::from(heads.dim);
        let query_width = u64::from(heads.query) * u64::from(heads.dim);
        let f32s = |elements: u64| Bytes(elements.saturating_mul(4));
        let kv_heads = u64::from(heads.kv);
        let stored = heads.stored(length);
        let all_keys = Bytes(stored.0 / 2);
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
                let cached = match window {
                    Some(w) => heads.kv_bytes(tokens.min(u64::from(w) + rows - 1)),
                    None => stored,
                };
                Work {
                    flops: dot(pairs) * 2.0 * heads.share_of_tokens(length),
                    read: cached + self.dtype.bytes(rows * query_width),
                    written: self.dtype.bytes(rows * query_width),
                }
            }
            OpKind::Tally { .. } => Work {
                flops: dot(visible_pairs(lane.rows, kv, None)),
                read: all_keys + self.dtype.bytes(rows * query_width) + f32s(kv_heads * tokens),
                written: f32s(kv_heads * tokens),
            },
            OpKind::Rank { by, .. } => {
                let elements = f64::from(heads.kv) * dim * f64::from(kv);
                let queries = |rows: Tokens| self.dtype.bytes(u64::from(rows) * query_width);
                let (flops, read) = match by {
                    Score::Recency => (0.0, f32s(kv_heads * tokens)),
                    Score::KeyNorm => (2.0 * elements, all_keys),
                    // Two passes over the keys: the anchor, then the cosines.
                    Score::KeyDiff => (6.0 * elements, all_keys * 2),
                    Score::WindowAttention { window, .. } => {
                        let window = window.min(lane.rows);
                        (dot(visible_pairs(window, kv, None)).0, all_keys)
                    }
                    Score::LastAttention | Score::NewestAttention { .. } => {
                        (dot(visible_pairs(1, kv, None)).0, all_keys + queries(1))
                    }
                    Score::Random { .. } => (0.0, f32s(kv_heads * tokens)),
                    // Keys and values: least and greatest 2, scaled 2, mean and spread 4.
                    Score::Lag { .. } => (16.0 * elements, stored),
                    Score::ExpectedAttention { .. } => {
                        // Covariance of the queries, then a product with mean and covariance per key and query head.
                        let (rows, square) = (f64::from(lane.rows), dim * dim);
                        let products = square * (rows + f64::from(kv)) + dim * f64::from(kv);
                        let flops = 2.0 * f64::from(heads.query) * products + 2.0 * elements;
                        (flops, stored + queries(lane.rows))
                    }
                    Score::TalliedAttention { .. } => {
                        (f64::from(heads.kv) * f64::from(kv), f32s(2 * kv_heads * tokens))
                    }
                };
                Work { flops: Flops(flops), read, written: f32s(kv_heads * tokens) }
            }
            OpKind::Evict { choice, .. } => {
                // The newest query's attention over all keys says how many may go.
                let (weighing, keys) = match choice {
                    Choice::Within { .. } => (dot(visible_pairs(1, kv, None)).0, all_keys),
                    _ => (0.0, Bytes(0)),
                };
                // In-place compaction moves what lies behind the first hole; on average half of what stays.
                let moved = Bytes(heads.stored(Length::settled(lane.keep.min(kv))).0 / 2);
                // Keys that move are turned, two multiplications and an addition a channel.
                let turned = if heads.form.rerotated {
                    3.0 * f64::from(heads.kv) * dim * f64::from(lane.keep.min(kv)) / 2.0
                } else {
                    0.0
                };
                Work {
                    flops: Flops(f64::from(heads.kv) * f64::from(kv) + weighing + turned),
                    read: moved + keys + f32s(kv_heads * tokens),
                    written: moved,
                }
            }
            OpKind::Accumulate { .. } => {
                // Keys and values of what goes, and the scores that say what does.
                let kept = lane.keep.min(kv);
                let dropped = stored.0.saturating_sub(heads.stored(Length::settled(kept)).0);
                let (state, (_, maps)) = (heads.state_bytes(), heads.map_elements());
                let rank = u64::from(heads.form.state.map_or(0, |s| s.rank));
                // The vectors of a map scale, they multiply no matrix.
                let products =
                    (maps - kv_heads * 2 * rank) + kv_heads * rank * (u64::from(heads.dim) + 1);
                Work {
                    flops: Flops(2.0 * f64::from(kv - kept) * products as f64),
                    read: Bytes(dropped) + f32s(kv_heads * tokens) + state + f32s(maps),
                    written: state,
                }
            }
            OpKind::ReadState { .. } => {
                let (state, (maps, _)) = (heads.state_bytes(), heads.map_elements());
                let rank = u64::from(heads.form.state.map_or(0, |s| s.rank));
                let sums = u64::from(heads.query) * rank * (u64::from(heads.dim) + 1);
                let outputs = self.dtype.bytes(rows * query_width);
                Work {
                    flops: Flops(2.0 * rows as f64 * (maps + sums) as f64),
                    read: outputs * 2 + state + f32s(maps),
                    written: outputs,
                }
            }
            OpKind::Index { page, .. } => {
                let new = heads.kv_bytes(rows).0 / 2;
                let pages = rows.div_ceil(u64::from(page.max(1)));
                Work {
                    flops: Flops(2.0 * f64::from(heads.kv) * dim * rows as f64),
                    read: Bytes(new),
                    written: f32s(2 * kv_heads * u64::from(heads.dim) * pages),
                }
            }
            OpKind::Cluster { sinks, rounds, .. } => {
                let clustered = f64::from(kv.saturating_sub(sinks));
                let products = clustered * f64::from(lane.keep) * f64::from(rounds + 1);
                Work {
                    flops: Flops(2.0 * f64::from(heads.kv) * dim * products),
                    read: all_keys,
                    written: f32s(
                        kv_heads * (u64::from(lane.keep) * u64::from(heads.dim) + tokens),
                    ),
                }
            }
            OpKind::Select { by, .. } => {
                let queries = self.dtype.bytes(rows * query_width);
                let written = f32s(u64::from(by.sets(heads)) * u64::from(lane.keep));
                let pages = |page: Tokens| f64::from(kv.div_ceil(page.max(1)));
                let (products, numbers) = match by {
                    Pick::Bounds { page, .. } => (2.0 * pages(page) * dim, 2.0 * pages(page) * dim),
                    Pick::Shares { page, channels } => {
                        let read = pages(page) * f64::from(channels);
                        (read, read)
                    }
                    Pick::Clusters { sinks, per_cluster } => {
                        let centres = f64::from(kv.saturating_sub(sinks)) / f64::from(per_cluster);
                        (centres * dim, centres * dim)
                    }
                };
                Work {
                    flops: Flops(2.0 * f64::from(heads.query) * products),
                    read: queries + f32s((f64::from(heads.kv) * numbers) as u64),
                    written,
                }
            }
            OpKind::AttendChosen { by, .. } => {
                let grown = length.tokens.saturating_sub(lane.kv);
                let chosen = by.chosen(lane.keep, grown).min(kv);
                // Chosen tokens are read, written next to each other, and read again.
                let set = Heads { kv: by.sets(heads), form: Form::default(), ..heads };
                let moved = set.kv_bytes(u64::from(chosen));
                Work {
                    flops: dot(f64::from(chosen)) * 2.0,
                    read: moved * 2 + self.dtype.bytes(rows * query_width),
                    written: moved + self.dtype.bytes(rows * query_width),
                }
            }
            OpKind::Compare { .. } => {
                let width = query_width * u64::from(lane.rows.min(1));
                Work {
                    // The mean over the heads, then a product and two lengths.
                    flops: Flops(width as f64 + 6.0 * dim),
                    read: self.dtype.bytes(width) + f32s(u64::from(heads.dim)),
                    written: f32s(u64::from(heads.dim)),
                }
            }
            OpKind::Refresh { .. } => {
                let copied = heads.kv_bytes(u64::from(lane.keep.min(kv)));
                Work {
                    flops: Flops(f64::from(heads.kv) * f64::from(kv)),
                    read: copied + f32s(kv_heads * tokens),
                    written: copied,
                }
            }
            OpKind::AppendPart { .. } => {
                let moved = heads.kv_bytes(rows);
                Work { flops: Flops(0.0), read: moved, written: moved }
            }
            OpKind::Offload { .. } | OpKind::Fetch { .. } => {
                let tokens = match self.kind {
                    OpKind::Offload { .. } => rows,
                    _ => u64::from(lane.keep.min(kv)),
                };
                let moved = heads.kv_bytes(tokens);
                Work { flops: Flops(0.0), read: moved, written: moved }
            }
            // Off the store and into buffers of the device.
            OpKind::Load { .. } => {
                let moved = heads.kv_bytes(rows);
                Work { flops: Flops(0.0), read: moved, written: moved }
            }
            OpKind::Deviate { .. } => {
                let values = rows * kv_heads * u64::from(heads.dim);
                Work {
                    flops: Flops(3.0 * values as f64),
                    read: Bytes(heads.kv_bytes(rows).0 / 2) + self.dtype.bytes(values),
                    written: f32s(kv_heads * rows),
                }
            }
            OpKind::Blend { .. } => {
                let filled = heads.kv_bytes(u64::from(lane.keep));
                Work {
                    flops: Flops(3.0 * f64::from(heads.kv) * dim * f64::from(lane.keep)),
                    read: filled,
                    written: filled,
                }
            }
            OpKind::AttendRows { .. } => Work {
                flops: dot(scattered_pairs(lane)) * 2.0,
                read: heads.kv_bytes(tokens) + self.dtype.bytes(rows * query_width),
                written: self.dtype.bytes(rows * query_width),
            },
            OpKind::Foresee { .. } => Work {
                flops: dot(f64::from(kv)),
                read: all_keys + self.dtype.bytes(query_width),
                written: f32s(kv_heads * u64::from(lane.keep.min(kv))),
            },
            OpKind::Pack { .. } => {
                // As many tokens as came, on the average over the steps: keys are packed in bursts of a whole residual.
                let grown = settles(heads, lane, kv);
                let elements = f64::from(heads.kv) * dim * 2.0 * grown;
                let whole = heads.dtype.bits() as f64 / 8.0;
                let packed = heads
                    .form
                    .packed
                    .map_or(0.0, |p| f64::from(p.bits) / 8.0 + 4.0 / f64::from(p.group));
                Work {
                    // Minimum, maximum, scale, round.
                    flops: Flops(5.0 * elements),
                    read: Bytes((elements * whole) as u64),
                    written: Bytes((elements * packed) as u64),
                }
            }
            OpKind::Trim { .. } => {
                let Some(short) = heads.form.short else { return Work::default() };
                let before = short.of(length.settled) + (kv - length.settled);
                let after = short.of(kv);
                // What comes behind the sinks moves up, where anything goes.
                let moved = if after < before { after.saturating_sub(short.sinks) } else { 0 };
                let per_head = heads.dtype.bytes(2 * u64::from(heads.dim) * u64::from(moved));
                let bytes = per_head * u64::from(short.heads);
                Work { flops: Flops(0.0), read: bytes, written: bytes }
            }
            OpKind::PruneChannels { .. } => {
                let grown = settles(heads, lane, kv);
                let elements = f64::from(heads.kv) * dim * grown;
                let bytes = elements * heads.dtype.bits() as f64 / 8.0;
                let kept = heads.form.pruned.map_or(1.0, |p| f64::from(p.channels) / dim);
                // Squares of all keys, once; then the kept channels are moved.
                let chooses = if lane.rows == kv { 2.0 * elements } else { 0.0 };
                Work {
                    flops: Flops(chooses),
                    read: Bytes(bytes as u64),
                    written: Bytes((bytes * kept) as u64),
                }
            }
            _ => Work::default(),
        }
    }
}

/// Tokens that a step settles: what a prompt leaves behind its residual, as many as came afterwards.
fn settles(heads: Heads, lane: &Lane, kv: Tokens) -> f64 {
    if lane.rows < kv {
        return f64::from(lane.rows);
    }
    let (keys, values) = heads.form.packed_of(kv);
    match heads.form.packed {
        Some(_) => f64::from(keys + values) / 2.0,
        None => f64::from(heads.form.pruned_of(kv)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Branch, DType, Lanes};

    const HEADS: Heads = Heads {
        query: 9,
        kv: 3,
        dim: 64,
        dtype: DType::F16,
        form: Form { packed: None, pruned: None, short: None, state: None, rerotated: false },
    };

    fn op(kind: OpKind, lane: Lane) -> Op {
        Op { name: "x", kind, dtype: DType::F32, lanes: Lanes::One(lane), branch: Branch::All }
    }

    fn lane(sequences: u32, rows: Tokens, kv: Tokens) -> Lane {
        Lane { first: 0, sequences, rows, kv, settled: kv.saturating_sub(rows), keep: 0 }
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
    fn rankings_by_hand() {
        let rank = |by, lane| op(OpKind::Rank { heads: HEADS, by }, lane).work(0);
        // K of 100 tokens: 100 x 3 heads x 64 channels x 2 B; a query row 576 x 4 B; scores 3 x 100 x 4 B.
        let (keys, query, scores) = (38_400, 2_304, 1_200);
        let last = rank(Score::LastAttention, lane(1, 40, 100));
        // One row of nine heads over 100 keys, 2 x 64 each.
        assert_eq!((last.flops, last.read), (Flops(115_200.0), Bytes(keys + query)));
        assert_eq!(last.written, Bytes(scores));
        let random = rank(Score::Random { seed: 1 }, lane(1, 40, 100));
        assert_eq!((random.flops, random.read), (Flops(0.0), Bytes(scores)));
        let lag = rank(Score::Lag { lag: 16, sinks: 4 }, lane(1, 40, 100));
        // 19,200 keys' elements and as many of values, 8 each.
        assert_eq!((lag.flops, lag.read), (Flops(307_200.0), Bytes(2 * keys)));
        let expected = rank(Score::ExpectedAttention { sinks: 4, future: 512 }, lane(2, 100, 100));
        assert_eq!(expected.read, Bytes(2 * (2 * keys + 100 * query)));
        // Per sequence and query head 200 products with a square of 64 and 100 with a vector; the lengths of the values.
        let per_head = 2.0 * (200.0 * 4096.0 + 100.0 * 64.0);
        assert_eq!(expected.flops, Flops(2.0 * (9.0 * per_head + 38_400.0)));
    }

    #[test]
    fn types_parse_by_their_own_names() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert!("float".parse::<DType>().is_err());
    }
}
