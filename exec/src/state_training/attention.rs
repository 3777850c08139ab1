//! What attention makes of an excerpt with all tokens and with those that H2O keeps, and which are dropped when.

use batchmax_sim::op::Protect;
use batchmax_sim::profile::Model;
use candle_core::{Device, Result, Tensor};
use half::f16;

use super::Training;

/// Sizes, and what stays.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    scale: f32,
    softcap: Option<f32>,
    budget: usize,
    protect: Protect,
    tokens: usize,
}

/// An excerpt in one layer. Queries are those for which something has been dropped.
pub(super) struct Excerpt {
    /// `[heads][queries][dim]`.
    pub(super) queries: Tensor,
    /// `[KV heads][tokens][dim]`.
    pub(super) keys: Tensor,
    /// `[KV heads][tokens][dim + 1]`: values, and a one.
    pub(super) values: Tensor,
    /// `[KV heads][queries][tokens]`: one where a token has been dropped.
    pub(super) dropped: Tensor,
    /// Output over the tokens that stay, `[heads][queries][dim]`.
    pub(super) kept: Tensor,
    /// Logarithm of its denominator, `[heads][queries]`.
    pub(super) kept_log: Vec<f32>,
    /// Attention that dropped tokens have, for 1 of all that stay, `[heads][queries]`.
    pub(super) excess: Vec<f32>,
    /// Output over all tokens.
    pub(super) target: Tensor,
}

/// Attention of some queries over some tokens.
struct Attention {
    /// `[heads][queries][dim]`.
    out: Tensor,
    /// `[heads][queries]`.
    log: Vec<f32>,
}

impl Shape {
    pub(super) fn of(model: &Model, training: &Training, tokens: usize) -> Self {
        Self {
            tokens,
            heads: model.heads as usize,
            kv_heads: model.kv_heads as usize,
            dim: model.head_dim as usize,
            scale: model.attention_scale() as f32,
            softcap: model.attention_softcap.map(|c| c as f32),
            budget: training.budget as usize,
            protect: training.protect,
        }
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first query for which something has been dropped.
    fn first(&self) -> usize {
        self.budget + 1
    }

    pub(super) fn queries(&self) -> usize {
        self.tokens - self.first()
    }

    /// `[heads or KV heads][tokens][dim]` of fused rows.
    fn part(&self, rows: &[f16], from: usize, heads: usize) -> Result<Tensor> {
        let width = (self.heads + 2 * self.kv_heads) * self.dim;
        let mut all = Vec::with_capacity(heads * self.tokens * self.dim);
        for head in from..from + heads {
            for row in rows.chunks_exact(width) {
                all.extend(row[head * self.dim..][..self.dim].iter().map(|x| x.to_f32()));
            }
        }
        Tensor::from_vec(all, (heads, self.tokens, self.dim), &Device::Cpu)
    }

    /// Scores of all queries and keys: `[heads][tokens][tokens]`.
    fn scores(&self, queries: &Tensor, keys: &Tensor) -> Result<Vec<f32>> {
        let queries = queries.reshape((self.kv_heads, self.group() * self.tokens, self.dim))?;
        let scores = queries.matmul(&keys.t()?)?.flatten_all()?;
        let mut scores = (scores * f64::from(self.scale))?.to_vec1::<f32>()?;
        if let Some(cap) = self.softcap {
            scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
        Ok(scores)
    }

    /// Attention over the tokens that `sees(KV head, query, token)` of those up to the query's own.
    fn attend(
        &self,
        scores: &[f32],
        values: &Tensor,
        sees: &dyn Fn(usize, usize, usize) -> bool,
    ) -> Result<Attention> {
        let (tokens, queries) = (self.tokens, self.queries());
        let mut shares = vec![0.0f32; self.heads * queries * tokens];
        let mut log = Vec::with_capacity(self.heads * queries);
        for (row, shares) in shares.chunks_exact_mut(tokens).enumerate() {
            let (head, query) = (row / queries, self.first() + row % queries);
            let scores = &scores[(head * tokens + query) * tokens..][..=query];
            let seen = |t: &usize| sees(head / self.group(), query, *t);
            let most = (0..=query).filter(seen).map(|t| scores[t]).fold(f32::MIN, f32::max);
            let mut sum = 0.0;
            for t in (0..=query).filter(seen) {
                shares[t] = (scores[t] - most).exp();
                sum += shares[t];
            }
            shares[..=query].iter_mut().for_each(|s| *s /= sum);
            log.push(most + sum.ln());
        }
        let shares = Tensor::from_vec(
            shares,
            (self.kv_heads, self.group() * queries, tokens),
            &Device::Cpu,
        )?;
        let out = shares.matmul(values)?.reshape((self.heads, queries, self.dim))?;
        Ok(Attention { out, log })
    }

    /// The output over what stays with a budget of `extra` tokens more.
    pub(super) fn keeping(&self, extra: u32, rows: &[f16]) -> Result<Tensor> {
        let keys = self.part(rows, self.heads, self.kv_heads)?;
        let scores = self.scores(&self.part(rows, 0, self.heads)?, &keys)?;
        let gone = self.gone(&scores, self.budget + extra as usize);
        let values = self.part(rows, self.heads + self.kv_heads, self.kv_heads)?;
        let stays = |head: usize, query: usize, token: usize| gone[head][token] > query;
        Ok(self.attend(&scores, &values, &stays)?.out)
    }

    /// By KV head and token, the first query that no longer sees it.
    fn gone(&self, scores: &[f32], budget: usize) -> Vec<Vec<usize>> {
        let of = self.group() * self.tokens * self.tokens;
        scores.chunks_exact(of).map(|s| dropped(s, self.tokens, budget, self.protect)).collect()
    }
}

/// H2O token by token for one KV head, whose query heads have `scores[head][query][token]`: by token, the first query that no
/// longer sees it. Every query adds its attention over what is there; above the budget the token with the least goes.
fn dropped(scores: &[f32], tokens: usize, budget: usize, protect: Protect) -> Vec<usize> {
    let mut gone = vec![usize::MAX; tokens];
    let mut tally = vec![0.0f32; tokens];
    let mut kept: Vec<usize> = Vec::with_capacity(budget + 1);
    let mut shares = Vec::with_capacity(budget + 1);
    for query in 0..tokens {
        kept.push(query);
        for head in scores.chunks_exact(tokens * tokens) {
            let row = &head[query * tokens..][..tokens];
            let most = kept.iter().map(|t| row[*t]).fold(f32::MIN, f32::max);
            shares.clear();
            shares.extend(kept.iter().map(|t| (row[*t] - most).exp()));
            let sum: f32 = shares.iter().sum();
            kept.iter().zip(&shares).for_each(|(t, share)| tally[*t] += share / sum);
        }
        if kept.len() > budget {
            let may_go =
                |t: usize| t >= protect.sinks as usize && t + (protect.recent as usize) <= query;
            let least = (0..kept.len())
                .filter(|i| may_go(kept[*i]))
                .min_by(|a, b| tally[kept[*a]].total_cmp(&tally[kept[*b]]));
            let token = kept.remove(least.unwrap_or(0));
            gone[token] = query + 1;
        }
    }
    gone
}

impl Excerpt {
    pub(super) fn new(shape: &Shape, rows: &[f16]) -> Result<Self> {
        let device = &Device::Cpu;
        let (heads, kv_heads, queries) = (shape.heads, shape.kv_heads, shape.queries());
        let all = shape.part(rows, 0, heads)?;
        let keys = shape.part(rows, heads, kv_heads)?;
        let values = shape.part(rows, heads + kv_heads, kv_heads)?;
        let scores = shape.scores(&all, &keys)?;
        let gone = shape.gone(&scores, shape.budget);
        let stays = |head: usize, query: usize, token: usize| gone[head][token] > query;
        let full = shape.attend(&scores, &values, &|_, _, _| true)?;
        let kept = shape.attend(&scores, &values, &stays)?;
        let excess = full.log.iter().zip(&kept.log).map(|(all, kept)| (all - kept).exp_m1());
        let mut mask = Vec::with_capacity(kv_heads * queries * shape.tokens);
        for gone in &gone {
            for query in shape.first()..shape.tokens {
                mask.extend(gone.iter().map(|gone| f32::from(u8::from(*gone <= query))));
            }
        }
        let ones = Tensor::ones((kv_heads, shape.tokens, 1), values.dtype(), device)?;
        Ok(Self {
            queries: all.narrow(1, shape.first(), queries)?.contiguous()?,
            values: Tensor::cat(&[&values, &ones], 2)?,
            keys,
            dropped: Tensor::from_vec(mask, (kv_heads, queries, shape.tokens), device)?,
            excess: excess.map(|x| x.max(0.0)).collect(),
            kept: kept.out,
            kept_log: kept.log,
            target: full.out,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_with_the_least_attention_goes_and_stays_away() {
        // One head, five tokens; token 0 is seen by all, 1 by nobody, 2 a little by 3.
        let mut scores = vec![0.0f32; 25];
        for query in 0..5 {
            for token in 0..=query {
                scores[query * 5 + token] = [9.0, -9.0, -1.0, -2.0, -2.0][token];
            }
        }
        let gone = dropped(&scores, 5, 2, Protect { sinks: 0, recent: 1 });
        // Above two tokens, query 2 drops 1 (it and the newest are left), query 3 drops 2, query 4 drops 3.
        assert_eq!(gone, [usize::MAX, 3, 4, 5, usize::MAX]);
        // What is protected stays: a sink of two tokens leaves only the newest but one.
        let gone = dropped(&scores, 5, 3, Protect { sinks: 2, recent: 1 });
        assert_eq!(gone, [usize::MAX, usize::MAX, 4, 5, usize::MAX]);
    }
}
