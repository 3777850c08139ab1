//! Ops on the caches.

use batchmax_kernels as k;
use batchmax_kernels::append::AppendItem;
use batchmax_kernels::attend::{AttendItem, AttendShape};
use batchmax_kernels::evict::{EvictItem, WithinItem};
use batchmax_kernels::lists::recycle;
use batchmax_kernels::rank::{RankItem, Scorer, TallyItem};
use batchmax_sim::op::{Choice, Heads, Lane, Lanes, Phase, Pooling, Protect, Score};
use batchmax_sim::units::Layer;

use super::lists::rows_in;
use super::{Interpreter, Slots, layer_index};
use crate::error::ExecError;

impl Interpreter<'_> {
    pub(super) fn attend_shape(&self, heads: Heads, window: Option<u32>) -> AttendShape {
        AttendShape {
            heads: heads.query as usize,
            kv_heads: heads.kv as usize,
            head_dim: heads.dim as usize,
            scale: self.model.attention_scale() as f32,
            softcap: self.model.attention_softcap.map(|c| c as f32),
            window,
        }
    }

    /// Where the step's rows will stand in their caches, which do not hold them yet.
    pub(super) fn places(&mut self, lanes: &Lanes, layer: Option<Layer>) -> Vec<u32> {
        let (_, picked) = self.kv.select(layer_index(layer), lanes.as_slice());
        let of = |(_, lane, heads): &(u32, &Lane, &mut [k::kv::HeadCache])| {
            let first = heads.first().map_or(0, k::kv::HeadCache::tokens) as u32;
            first..first + lane.rows
        };
        picked.iter().flat_map(of).collect()
    }

    pub(super) fn append(
        &mut self,
        heads: Heads,
        lanes: &[Lane],
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        self.open_states(heads, lanes, layer)?;
        let width = self.model.qkv_width() as usize;
        let dim = heads.dim as usize;
        let key_offset = heads.query as usize * dim;
        let value_offset = key_offset + heads.kv as usize * dim;
        let Slots { step_rows, positions, qkv, lists, .. } = &mut self.slots;
        let end = rows_in(step_rows, lanes).last().map_or(0, |(first, count)| first + count);
        let (pool, picked) = self.kv.picks(layer_index(layer), lanes);
        let mut items: Vec<AppendItem<'_>> = recycle(std::mem::take(&mut lists.appends));
        items.extend(picked.zip(rows_in(step_rows, lanes)).map(
            |((_, lane, heads), (first_row, _))| {
                // Rows that speculate come last and are not kept.
                let rows = lane.rows as usize;
                let positions = &positions[first_row..first_row + rows];
                AppendItem { heads, first_row, rows, positions }
            },
        ));
        let qkv = &qkv[..end * width];
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
        lists.appends = recycle(items);
        Ok(())
    }

    pub(super) fn attend(
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
        let lanes = lanes.as_slice();
        let Slots { step_rows, qkv, attention, log_sum_exp, lists, .. } = &mut self.slots;
        // Some of the step's sequences may attend elsewhere.
        let rows = rows_in(step_rows, lanes).last().map_or(rows, |(first, count)| first + count);
        let (pool, picked) = self.kv.picks(layer_index(layer), lanes);
        let mut items: Vec<AttendItem<'_>> = recycle(std::mem::take(&mut lists.attends));
        items.extend(picked.zip(rows_in(step_rows, lanes)).map(
            |((.., heads), (first_row, rows))| AttendItem { heads, first_row, rows, at: None },
        ));
        let run = match phase {
            Phase::Prefill => k::attend::attend_prefill,
            Phase::Decode => k::attend::attend_decode,
        };
        run(
            self.threads,
            pool,
            &items,
            &shape,
            &qkv[..rows * width],
            width,
            &mut attention[..rows * out_width],
            Some(&mut log_sum_exp[..rows * shape.heads]),
        );
        lists.attends = recycle(items);
    }

    pub(super) fn tally(&mut self, heads: Heads, lanes: &Lanes, layer: Option<Layer>) {
        let shape = self.attend_shape(heads, None);
        let rows = lanes.rows() as usize;
        let width = self.model.qkv_width() as usize;
        let Slots { qkv, log_sum_exp, lists, .. } = &mut self.slots;
        let (pool, picked) = self.kv.picks(layer_index(layer), lanes.as_slice());
        let mut first_row = 0;
        let mut items: Vec<TallyItem<'_>> = recycle(std::mem::take(&mut lists.tallies));
        items.extend(picked.map(|(_, lane, heads)| {
            let item = TallyItem { heads, first_row, rows: lane.rows as usize };
            first_row += lane.rows as usize;
            item
        }));
        let (qkv, lse) = (&qkv[..rows * width], &log_sum_exp[..rows * shape.heads]);
        k::rank::tally(self.threads, pool, &mut items, &shape, qkv, width, lse);
        lists.tallies = recycle(items);
    }

    pub(super) fn rank(&mut self, heads: Heads, by: Score, lanes: &Lanes, layer: Option<Layer>) {
        let step_rows = self.rows_of(lanes.as_slice());
        let shape = self.attend_shape(heads, None);
        let index = layer_index(layer);
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let mut items: Vec<RankItem<'_>> = picked
            .into_iter()
            .zip(step_rows)
            .map(|((sequence, _, heads), (first_row, rows))| RankItem {
                heads,
                first_row,
                rows,
                seen: self.sequences[sequence as usize].seen_with_step(),
            })
            .collect();
        let (qkv, width) = (&self.slots.qkv, self.model.qkv_width() as usize);
        let mut scores = take_scores(&mut self.slots.scores[index], lanes, heads.kv);
        for list in scores.iter_mut().filter(|list| list.capacity() == 0) {
            *list = self.slots.lists.scores.pop().unwrap_or_default();
        }
        if let Score::ExpectedAttention { sinks, future } = by {
            let rotation = k::rank::Rotation {
                positions: &self.slots.positions,
                table: &self.weights.rope,
                layout: self.weights.rope_layout,
            };
            let reach = (sinks, future);
            k::rank::expected_attention(
                self.threads,
                pool,
                &items,
                &shape,
                qkv,
                width,
                rotation,
                reach,
                &mut scores,
            );
        } else if let Some(scorer) = scorer(by, layer) {
            let lse = &self.slots.log_sum_exp;
            let (threads, scores) = (self.threads, &mut scores);
            k::rank::rank(threads, pool, &mut items, scorer, &shape, qkv, width, lse, scores);
        }
        put_scores(&mut self.slots.scores[index], lanes, heads.kv, scores);
    }

    pub(super) fn evict(
        &mut self,
        heads: Heads,
        protect: Protect,
        choice: Choice,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let index = layer_index(layer);
        let protect = k::evict::Protect { sinks: protect.sinks, recent: protect.recent };
        let step_rows = self.rows_of(lanes.as_slice());
        let shape = self.attend_shape(heads, None);
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let kv_heads = heads.kv;
        let scores = take_scores(&mut self.slots.scores[index], lanes, kv_heads);
        let counts = match choice {
            Choice::Within { loss, most } => {
                let kv_heads = kv_heads as usize;
                let mut items = Vec::with_capacity(picked.len());
                for (at, (sequence, _, heads)) in picked.iter().enumerate() {
                    let (first, rows) = step_rows[at];
                    items.push(WithinItem {
                        heads,
                        row: first + rows - 1,
                        seen: self.sequences[*sequence as usize].seen_with_step(),
                        scores: &scores[at * kv_heads..(at + 1) * kv_heads],
                        most: most as usize,
                    });
                }
                let (qkv, width) = (&self.slots.qkv, self.model.qkv_width() as usize);
                let loss = f64::from(loss) / 1e6;
                k::evict::within(self.threads, pool, &items, &shape, qkv, width, protect, loss)
            }
            _ => Vec::new(),
        };
        let mut items = Vec::with_capacity(picked.len());
        for (at, (sequence, lane, heads)) in picked.into_iter().enumerate() {
            let seen = self.sequences[sequence as usize].seen_with_step();
            let keep = match choice {
                Choice::Within { .. } => vec![counts[at]; heads.len()],
                _ => {
                    let scores = &scores[at * heads.len()..(at + 1) * heads.len()];
                    kept(choice, heads, scores, seen, lane.keep, protect)
                }
            };
            items.push(EvictItem { heads, seen, keep });
        }
        let turning = heads.form.rerotated.then_some(k::evict::Turning {
            table: &self.weights.rope,
            layout: self.weights.rope_layout,
        });
        k::evict::evict(self.threads, pool, &mut items, &scores, protect, turning)?;
        // What an eviction leaves is settled, but for channels that are chosen among the keys that stay.
        let caches = items.iter_mut().flat_map(|item| item.heads.iter_mut());
        if heads.form.pruned.is_none() {
            super::settle::pack(self.threads, pool, caches, &heads.form)?;
        }
        // Only a choice of rows needs them again.
        if self.forwards.contains(&index) {
            put_scores(&mut self.slots.scores[index], lanes, kv_heads, scores);
        } else {
            // The next layer's ranking takes their memory over.
            let spare = &mut self.slots.lists.scores;
            spare.extend(scores.into_iter().filter(|list| list.capacity() > 0));
        }
        Ok(())
    }
}

/// How many tokens each head of a sequence keeps, `mean` on the average, where no attention decides it.
pub(super) fn kept(
    choice: Choice,
    heads: &[k::kv::HeadCache],
    scores: &[Vec<f32>],
    seen: u32,
    mean: u32,
    protect: k::evict::Protect,
) -> Vec<usize> {
    let mean = mean as usize;
    let Choice::AcrossHeads { guaranteed } = choice else { return vec![mean; heads.len()] };
    let ranked: Vec<(&[f32], &[u32])> = (scores.iter().zip(heads))
        .map(|(scores, head)| (scores.as_slice(), head.positions.as_slice()))
        .collect();
    k::evict::share(&ranked, seen, mean, mean * guaranteed as usize / 1000, protect)
}

/// Takes the scores of some sequences out of a layer's, which stand by sequence and KV head.
pub(super) fn take_scores(
    layer: &mut Vec<Vec<f32>>,
    lanes: &Lanes,
    kv_heads: u32,
) -> Vec<Vec<f32>> {
    let mut taken = Vec::new();
    for lane in lanes.as_slice() {
        let (from, to) = (lane.first, lane.first + lane.sequences);
        let range = (from * kv_heads) as usize..(to * kv_heads) as usize;
        if layer.len() < range.end {
            layer.resize_with(range.end, Vec::new);
        }
        taken.extend(layer[range].iter_mut().map(std::mem::take));
    }
    taken
}

/// Puts scores where the eviction or the choice of rows looks for them.
pub(super) fn put_scores(
    layer: &mut [Vec<f32>],
    lanes: &Lanes,
    kv_heads: u32,
    scores: Vec<Vec<f32>>,
) {
    let of =
        |l: &Lane| (l.first * kv_heads) as usize..((l.first + l.sequences) * kv_heads) as usize;
    let places = lanes.as_slice().iter().flat_map(of);
    for (place, scores) in places.zip(scores) {
        layer[place] = scores;
    }
}

/// The kernels' word for a score; `None` for the one that has a kernel of its own.
fn scorer(by: Score, layer: Option<Layer>) -> Option<Scorer> {
    Some(match by {
        Score::Recency => Scorer::Recency,
        Score::KeyNorm => Scorer::KeyNorm,
        Score::KeyDiff => Scorer::KeyDiff,
        Score::WindowAttention { window, pool, pooling, exclude_window } => {
            let pooling = match pooling {
                Pooling::Mean => k::rank::Pooling::Mean,
                Pooling::Max => k::rank::Pooling::Max,
            };
            Scorer::WindowAttention { window, pool, pooling, exclude_window }
        }
        Score::TalliedAttention { mean } => Scorer::Tallied { mean },
        Score::LastAttention => Scorer::LastAttention,
        Score::NewestAttention { pool } => Scorer::NewestAttention { pool },
        Score::Lag { lag, sinks } => Scorer::Lag { lag, sinks },
        Score::ExpectedAttention { .. } => return None,
        Score::Random { seed } => Scorer::Random { seed, layer: layer.unwrap_or(0) },
    })
}
