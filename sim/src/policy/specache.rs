//! `SpeCache`: packed keys and values on the device, the whole ones in slower memory, a few of which come back in time.
//!
//! Every step sends a second row through the layers, a guess at the next token. The tokens that it attends to most are
//! what the next step is likely to need; they are fetched whole while the rest of the step computes and take the place of
//! their packed copies. The guess decides nothing else: the answer comes from the first row.
//!
//! Paper: <https://arxiv.org/abs/2503.16163>. Packed as in KIVI. Deviations: tokens that are
//! whole on the device anyway are not fetched, unless `whole` says so (the paper excludes only the row's own). Codes of one
//! bit stand for the quartiles between least and largest, as in the paper. Prompts attend in full precision; transfers
//! overlap with everything else of their step.

use serde::Deserialize;

use super::{Kivi, Policy, PolicyError, Prefetching, Request, Role};
use crate::form::Form;
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Packed on the device, whole in slower memory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpeCache {
    /// Bits of a code: 8, 4, 2 or 1.
    pub bits: u32,
    /// Elements that share a scale.
    pub group: u32,
    /// Newest tokens that stay whole on the device.
    pub residual: Tokens,
    /// Tokens fetched per step, layer and KV head.
    pub fetch: Tokens,
    /// Tokens that are whole on the device are fetched too.
    pub whole: bool,
}

impl Default for SpeCache {
    fn default() -> Self {
        Self { bits: 2, group: 32, residual: 64, fetch: 64, whole: false }
    }
}

impl SpeCache {
    fn packing(&self) -> Kivi {
        let Self { bits, group, residual, .. } = *self;
        Kivi { bits, group, residual, swapped: false }
    }
}

impl Policy for SpeCache {
    fn label(&self) -> String {
        let Self { bits, group, residual, fetch, whole } = self;
        let whole = if *whole { ",whole=true" } else { "" };
        format!("specache:bits={bits},group={group},residual={residual},fetch={fetch}{whole}")
    }

    fn role(&self) -> Role {
        // What is fetched is found by its place in the cache: nobody else may drop or pack tokens.
        Role::Selects
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn form(&self, layer: Layer, model: &Model) -> Form {
        self.packing().form(layer, model)
    }

    fn prefetches(&self, _model: &Model) -> Option<Prefetching> {
        Some(Prefetching { tokens: self.fetch, whole: self.whole })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if self.residual == 0 {
            return refuse(
                "without a residual new tokens are packed before they are offloaded".to_owned(),
                "use residual=64",
            );
        }
        if self.fetch == 0 {
            return refuse("0 fetched tokens are KIVI".to_owned(), "use fetch=64, or kivi");
        }
        let model = request.model;
        if model.sliding_window.is_some() || model.attention_softcap.is_some() {
            return refuse(
                format!("{} has sliding layers or capped scores", model.name),
                "use kivi, or an evicting policy",
            );
        }
        (self.packing().check(request)).map_err(|why| PolicyError { policy: self.label(), ..why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvLayout;
    use crate::load::{Load, Schedule};
    use crate::lower::{Setup, lower};
    use crate::memory::{kv_trace, offloaded};
    use crate::op::DType;
    use crate::profile::Catalog;
    use crate::units::Bytes;

    fn program(isl: Tokens, osl: Tokens) -> crate::program::Program {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let kv = KvLayout { dtype: DType::F16, block_tokens: 32, shares_prefix: false };
        let (weights, activations, head) = (DType::F32, DType::F32, DType::F32);
        let setup = Setup { kv, weights, activations, head, tp: 1 };
        let load = Load::uniform(1, isl, osl, Schedule::Static);
        lower(&model, &SpeCache::default(), &load, setup).expect("lowers")
    }

    #[test]
    fn the_first_look_ahead_keeps_nothing_and_every_step_has_two_rows() {
        let mut passes = Vec::new();
        let program = program(512, 12);
        program.visit_passes(|_, pass, _| {
            let rows = pass.before.ops[0].lanes.rows();
            let sampled = pass.after.ops[0].lanes.rows();
            let names: Vec<_> = pass.layers[0].ops.iter().map(|op| op.name).collect();
            let stores = (names.contains(&"append"), names.contains(&"offload"));
            passes.push((pass.steps, pass.ahead, rows, sampled, stores, pass.only_speculates()));
        });
        let expected = [
            (1, 0, 512, 1, (true, true), false),
            (1, 1, 1, 1, (false, false), true),
            (11, 1, 2, 2, (true, true), false),
        ];
        assert_eq!(passes, expected);
        // The look ahead gives no token.
        assert_eq!(program.steps(), (13, 11));
    }

    #[test]
    fn memory_is_packed_here_and_whole_there() {
        let program = program(512, 3);
        // A head's block of 32 tokens: keys 64 channels x (8 B codes + 4 B), values 32 x 2 groups x (8 B + 4 B): 768 B
        // each; whole 4,096 B each. Of 512 keys all are packed (512 = 8 x 64), of the values all but 64: 16 blocks of keys,
        // 14 and 2 whole ones of values.
        let prompt = (16 + 14) * 768 + 2 * 4096;
        assert_eq!(kv_trace(&program)[0], Bytes(30 * 3 * prompt));
        // Looking ahead takes room for 64 fetched tokens and the guess's own: three blocks of both.
        let fetched = 3 * 2 * 4096;
        assert_eq!(kv_trace(&program)[1], Bytes(30 * 3 * (prompt + fetched)));
        // One more token: a whole block of keys, one of values; a value packed into a block of its own.
        let step = prompt + fetched + 4096 + 4096 + 768;
        assert_eq!(kv_trace(&program)[2], Bytes(30 * 3 * step));
        // 514 tokens in 30 layers, 768 B each, lie elsewhere.
        assert_eq!(offloaded(&program), Bytes(514 * 30 * 768));
    }

    #[test]
    fn links_by_hand() {
        let gpu = Catalog::built_in().gpu("a100-sxm-80gb").expect("built in");
        // Sixteen lanes of the fourth generation: 31.5 GB/s, of which copies reach four fifths.
        assert!((gpu.host_bytes_per_s() / 25.2e9 - 1.0).abs() < 0.01);
    }
}
