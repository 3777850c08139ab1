//! `RefreshKV`: steps read a small copy of the best tokens, which is filled anew from the full cache now and then.
//!
//! Once the prompt is read, the tokens that its last query attends to most are copied into a partial cache. Every step
//! reads that and puts its own token there, in the place of the worst. Every few steps a layer whose queries have turned
//! away from those of its last filling attends to everything and fills its partial cache anew. The full cache stays
//! beside it: this saves traffic and costs memory.
//!
//! Paper: <https://arxiv.org/abs/2411.05787>. Whether queries are compared before or after their rotation the paper
//! leaves open: `before_rope` says. `similarity` above 1 refreshes at every comparison. Which comparisons find a layer
//! stale only the run knows; `stale` is the share that predictions expect. With its own threshold the paper reports every
//! 12th step for Llama-3.1-8B, compared every 5th (0.42), and every 7th for Qwen2-7B (0.71).

use serde::Deserialize;

use super::{Budget, Cosine, Policy, PolicyError, Refreshing, Request, Role};
use crate::op::DType;
use crate::profile::Model;
use crate::units::Tokens;

/// A partial cache, filled anew.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefreshKv {
    /// Tokens of the partial cache, per layer and KV head; a share is one of the prompt.
    pub budget: Budget,
    /// Decode steps from one comparison to the next.
    #[serde(default = "usual_every")]
    pub every: u32,
    /// Cosine below which a layer is stale.
    #[serde(default = "usual_similarity")]
    pub similarity: f64,
    /// Queries are compared before their rotation.
    #[serde(default)]
    pub before_rope: bool,
    /// Neighbours whose largest attention is a token's score.
    #[serde(default = "usual_pool")]
    pub pool: Tokens,
    /// Share of the comparisons that are expected to find a layer stale.
    #[serde(default = "usual_stale")]
    pub stale: f64,
}

fn usual_every() -> u32 {
    5
}

fn usual_similarity() -> f64 {
    0.85
}

fn usual_pool() -> Tokens {
    7
}

fn usual_stale() -> f64 {
    0.42
}

impl RefreshKv {
    /// With the paper's parameters and this budget.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        Self {
            budget,
            every: usual_every(),
            similarity: usual_similarity(),
            before_rope: false,
            pool: usual_pool(),
            stale: usual_stale(),
        }
    }
}

impl Policy for RefreshKv {
    fn label(&self) -> String {
        let Self { budget, every, similarity, before_rope, pool, stale } = self;
        let before = if *before_rope { ",before_rope=true" } else { "" };
        format!(
            "refreshkv:budget={budget},every={every},similarity={similarity},pool={pool},stale={stale}{before}"
        )
    }

    fn role(&self) -> Role {
        Role::Selects
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn compresses(&self) -> bool {
        true
    }

    fn refreshes(&self, prompt: Tokens, model: &Model) -> Option<Refreshing> {
        let token_bytes = Request::new(model, prompt, DType::F16).token_bytes;
        let thousandths = |x: f64| (x * 1000.0).round();
        // No cosine is above 1.
        let below = (self.similarity <= 1.0).then(|| Cosine {
            thousandths: thousandths(self.similarity) as i32,
            before_rope: self.before_rope,
            share: thousandths(self.stale) as u32,
        });
        let tokens = self.budget.of(prompt, token_bytes).max(1);
        Some(Refreshing { tokens, every: self.every.max(1), below, pool: self.pool })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if self.budget.of(request.prompt, request.token_bytes) == 0 {
            return refuse("a budget of 0 tokens holds nothing".to_owned(), "raise budget");
        }
        if self.every == 0 || self.pool == 0 {
            return refuse(
                "every and pool must be at least 1".to_owned(),
                "use every=5,pool=7 (never: similarity=-2)",
            );
        }
        if !self.similarity.is_finite() || !(0.0..=1.0).contains(&self.stale) {
            return refuse(
                format!("similarity {} and stale {}", self.similarity, self.stale),
                "similarity is a cosine, 0.85 is usual; stale a share between 0 and 1",
            );
        }
        if request.model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, which read their window only", request.model.name),
                "use an evicting policy",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvLayout;
    use crate::load::{Load, Schedule};
    use crate::lower::{Setup, lower};
    use crate::memory::{kv_peaks, kv_trace};
    use crate::op::{Branch, OpKind, Phase};
    use crate::profile::Catalog;
    use crate::units::Bytes;

    fn program(policy: &RefreshKv, isl: Tokens, osl: Tokens) -> crate::program::Program {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let kv = KvLayout { dtype: DType::F16, block_tokens: 32, shares_prefix: false };
        let (weights, activations, head) = (DType::F32, DType::F32, DType::F32);
        let setup = Setup { kv, weights, activations, head, tp: 1 };
        let load = Load::uniform(1, isl, osl, Schedule::Static);
        lower(&model, policy, &load, setup).expect("lowers")
    }

    #[test]
    fn every_fifth_step_may_refresh() {
        let program = program(&RefreshKv::new(Budget::Tokens(64)), 512, 12);
        let mut steps = Vec::new();
        program.visit_passes(|_, pass, _| {
            if pass.phase == Phase::Decode {
                let names: Vec<_> = pass.layers[0].ops.iter().map(|op| op.name).collect();
                steps.push((pass.steps, names.contains(&"refresh")));
                for op in &pass.layers[0].ops {
                    match op.kind {
                        OpKind::Refresh { .. } => {
                            assert_eq!(op.branch, Branch::Stale { share: 420 });
                        }
                        OpKind::AttendPart { .. } if names.contains(&"refresh") => {
                            assert_eq!(op.branch, Branch::Fresh { share: 580 });
                        }
                        _ => assert!(op.branch == Branch::All || op.name != "qkv"),
                    }
                }
            }
        });
        // Steps 1..4, 5, 6..9, 10, 11.
        assert_eq!(steps, [(4, false), (1, true), (4, false), (1, true), (1, false)]);
    }

    #[test]
    fn memory_is_the_full_cache_and_the_partial_one() {
        let program = program(&RefreshKv::new(Budget::Tokens(64)), 512, 12);
        // A token of a layer: 2 x 3 heads x 64 channels x 2 bytes = 768. Prompt 512 tokens, partial 64 and one more in
        // blocks of 32: 96. After the first decode step the full cache has another block.
        let layer = |full: u64| 768 * (full + 96) * 30;
        let trace = kv_trace(&program);
        assert_eq!(trace[0], Bytes(layer(512)));
        assert!(trace[1..].iter().all(|held| *held == Bytes(layer(544))), "{trace:?}");
        assert_eq!(kv_peaks(&program).decode, Bytes(layer(544)));
    }

    #[test]
    fn a_partial_cache_with_room_grows_with_the_full_one() {
        // 40 tokens, 7 steps of which every one compares: 40 + 1 room, 41, ... all in two blocks; full likewise.
        let policy = RefreshKv { every: 1, ..RefreshKv::new(Budget::Tokens(100)) };
        let program = program(&policy, 63, 4);
        // 63 tokens in 2 blocks, room for 64 in 2; then 64 and 65, 65 and 66, 66 and 67: 2 and 3, 3 and 3 blocks.
        let blocks: Vec<u64> = kv_trace(&program).iter().map(|b| b.0 / (768 * 32 * 30)).collect();
        assert_eq!(blocks, [4, 5, 6, 6]);
    }
}
