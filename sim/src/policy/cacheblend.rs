//! CacheBlend: caches of chunks of text that were read alone are put together again, and the tokens that suffer most from
//! what their chunk did not see are computed anew.
//!
//! A prompt is taken for chunks of `chunk` tokens and a question of `suffix` tokens. Of each chunk a store holds keys and
//! values as they came when the chunk was a prompt of its own. Layers up to `check` read the whole prompt; there the values
//! are compared with the stored ones, and the tokens of the chunks whose values differ most, a share `recompute` of them, go
//! on together with the question. The layers above take all other tokens from the store, their keys turned to the places
//! where the chunks now stand.
//!
//! Paper: <https://arxiv.org/abs/2405.16444>. Deviations: the check layer is computed whole (the authors attend there with
//! the chosen rows only, which saves less than a layer); one choice, at the check layer (the paper also tells of a gradual
//! one); rows see what stands before them by their true positions (the authors' mask takes the chosen rows for the last
//! ones); all of `suffix` goes on (a slip in the authors' example forces the last token only). Keys are stored turned by
//! their place in the chunk: turning on by the place of the chunk is the same as turning the raw key once. Chunks are read
//! without a token that begins a sequence, as prompts are here. `recompute = 1` is a plain prefill.
//!
//! The store is taken to hold every chunk; a plan proposes this where it is named only. Whether a prompt's chunks are there
//! is the load's business, not the policy's.

use serde::Deserialize;

use super::{Forwards, Policy, PolicyError, Request, Reusing, Role};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Caches of chunks, blended.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheBlend {
    /// Share of the chunks' tokens that are computed anew in all layers, 0-1.
    pub recompute: f64,
    /// Tokens at the end of the prompt that stand in no chunk.
    pub suffix: Tokens,
    /// Tokens of a chunk; the last one may be shorter.
    pub chunk: Tokens,
    /// The layer that compares, counted from 0; the last that reads all tokens.
    pub check: Layer,
}

impl Default for CacheBlend {
    fn default() -> Self {
        Self { recompute: 0.16, suffix: 64, chunk: 512, check: 1 }
    }
}

impl CacheBlend {
    /// Tokens in chunks, and rows that go on; `None` if all do.
    fn counts(&self, prompt: Tokens, model: &Model) -> Option<(Tokens, Tokens)> {
        let chunked = prompt.checked_sub(self.suffix)?;
        let chosen = (f64::from(chunked) * self.recompute) as Tokens;
        let above = self.check + 1 < model.layers;
        (above && chosen < chunked).then_some((chunked, chosen + self.suffix))
    }
}

impl Policy for CacheBlend {
    fn label(&self) -> String {
        let Self { recompute, suffix, chunk, check } = self;
        format!("cacheblend:recompute={recompute},suffix={suffix},chunk={chunk},check={check}")
    }

    fn role(&self) -> Role {
        Role::Reuses
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn compresses(&self) -> bool {
        false
    }

    fn only_if_named(&self) -> bool {
        true
    }

    fn layer_kind(&self, layer: Layer, _model: &Model) -> u32 {
        u32::from(layer >= self.check) + u32::from(layer > self.check)
    }

    fn forwards(&self, prompt: Tokens, model: &Model) -> Option<Forwards> {
        let (_, rows) = self.counts(prompt, model)?;
        Some(Forwards { after: self.check, rows, recent: self.suffix })
    }

    fn reuses(&self, prompt: Tokens, model: &Model) -> Option<Reusing> {
        let (tokens, _) = self.counts(prompt, model)?;
        Some(Reusing { tokens, chunk: self.chunk })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        let model = request.model;
        if !(0.0..=1.0).contains(&self.recompute) {
            return refuse(
                format!("recompute={} is not a share", self.recompute),
                "set it between 0 and 1 (0.16 is usual)",
            );
        }
        if self.chunk == 0 || self.suffix == 0 {
            return refuse(
                "a chunk and the question behind the chunks have a token at least".to_owned(),
                "set chunk and suffix above 0 (512 and 64 are usual)",
            );
        }
        if self.suffix >= request.prompt {
            return refuse(
                format!("a question of {} in a prompt of {}", self.suffix, request.prompt),
                "lower suffix, or use longer prompts",
            );
        }
        if self.check >= model.layers {
            return refuse(
                format!("{} has {} layers", model.name, model.layers),
                "set check to one of them, counting from 0 (1 is usual)",
            );
        }
        if request.hit > 0 {
            return refuse(
                "chunks stand anywhere in a prompt, a cached prefix at its start".to_owned(),
                "leave --prefix-hit out",
            );
        }
        if model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, which hold no whole chunks", model.name),
                "use a model without",
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
    use crate::memory::{kv_peaks, offloaded};
    use crate::op::{DType, Family, Phase};
    use crate::policy::Full;
    use crate::profile::Catalog;
    use crate::program::Program;

    fn lowered(policy: &dyn Policy, isl: Tokens) -> Program {
        let setup = Setup {
            kv: KvLayout { dtype: DType::F16, block_tokens: 32, shares_prefix: false },
            weights: DType::F32,
            activations: DType::F32,
            head: DType::F32,
            tp: 1,
        };
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        lower(&model, policy, &Load::uniform(2, isl, 4, Schedule::Static), setup).expect("lowers")
    }

    /// FLOPs of the linear layers while reading, without the head.
    fn linear(program: &Program) -> f64 {
        let mut sum = 0.0;
        program.visit_passes(|_, pass, _| {
            for block in pass.layers.iter().filter(|_| pass.phase == Phase::Prefill) {
                let gemms = block.ops.iter().filter(|op| op.family(pass.phase) == Family::Gemm);
                sum += gemms.map(|op| op.work(0).flops.0).sum::<f64>() * f64::from(block.times());
            }
        });
        sum
    }

    #[test]
    fn two_layers_read_all_the_others_what_is_chosen() {
        let (full, blend) =
            (lowered(&Full::default(), 1064), lowered(&CacheBlend::default(), 1064));
        // 2 layers of 1,064 rows, 28 of 160 + 64.
        let share = (2.0 * 1064.0 + 28.0 * 224.0) / (30.0 * 1064.0);
        assert!((linear(&blend) / linear(&full) - share).abs() < 1e-12);
        // Nothing is saved of the caches; the store holds 1,000 tokens of 2 sequences in 29 layers.
        assert_eq!(kv_peaks(&blend).decode, kv_peaks(&full).decode);
        assert_eq!(offloaded(&blend).0, 2 * 1000 * 29 * 768);
        assert_eq!(blend.header.chunks.len(), 2, "chunks of 512 and of 488");
    }

    #[test]
    fn with_all_computed_anew_it_is_a_plain_prefill() {
        let policy = CacheBlend { recompute: 1.0, ..CacheBlend::default() };
        let (full, blend) = (lowered(&Full::default(), 700), lowered(&policy, 700));
        assert_eq!(linear(&blend), linear(&full));
        assert!(blend.header.chunks.is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let usual = CacheBlend::default();
        let cases = [
            (CacheBlend { recompute: 1.5, ..usual.clone() }, 512, "not a share"),
            (CacheBlend { chunk: 0, ..usual.clone() }, 512, "a token at least"),
            (usual.clone(), 64, "a question of 64 in a prompt of 64"),
            (CacheBlend { check: 30, ..usual.clone() }, 512, "has 30 layers"),
        ];
        for (policy, prompt, part) in cases {
            let error = policy.check(&Request::new(&model, prompt, DType::F16)).expect_err(part);
            assert!(error.to_string().contains(part), "{error}");
        }
        let hit = Request::new(&model, 512, DType::F16).with_hit(64);
        assert!(usual.check(&hit).is_err());
    }
}
