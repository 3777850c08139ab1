//! `DBudgetKV` (later `ReFreeKV`): every layer keeps as many tokens as its prompt demands.
//!
//! Once a layer has read the prompt, tokens go in the order of their importance, the oldest first (or those that received
//! least attention), as long as the attention weights of the newest query keep all but `loss` of their Euclidean length.
//! How many stay is known only when it runs: `kept` says what to expect of a model, layer by layer (`batchmax prepare
//! dbudgetkv`), and memory is planned for `deviations` standard deviations more. A prompt that wants still more is held to
//! that: the authors have no such bound, which `deviations` far above the spread takes away.
//!
//! Paper: <https://arxiv.org/abs/2502.16886>; as in the authors' code the length is that of the last row alone, the mean
//! over query heads, the first `sinks` tokens count in no length and always stay, and all heads of a layer keep the same
//! number; `skip_layers` first layers keep everything (none, as in their code). Deviations: sequences of a batch keep what each of them needs, where the authors keep the most of any; where
//! no deviation is measured, published means stand in.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

use super::{Leaves, Policy, PolicyError, Request, Role, Step};
use crate::kv::KvTape;
use crate::op::{Phase, Protect, Score};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// In which order tokens go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The oldest first.
    #[default]
    Position,
    /// Those with the least attention of all queries first.
    H2o,
    /// The same, over the number of queries that could see the token.
    H2oMean,
}

impl Order {
    fn name(self) -> &'static str {
        match self {
            Self::Position => "position",
            Self::H2o => "h2o",
            Self::H2oMean => "h2o-mean",
        }
    }

    fn score(self) -> Score {
        match self {
            Self::Position => Score::Recency,
            Self::H2o => Score::TalliedAttention { mean: false },
            Self::H2oMean => Score::TalliedAttention { mean: true },
        }
    }
}

/// Shares of a prompt that layers were found to keep: one of each for all layers, or one per layer.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Mean over prompts.
    pub mean: Vec<f64>,
    /// Standard deviation over prompts.
    pub deviation: Vec<f64>,
}

/// Eviction down to a loss.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DBudgetKv {
    /// Share of the length of the newest query's attention weights that may be lost.
    pub loss: f64,
    /// In which order tokens go.
    pub order: Order,
    /// First tokens, which stay.
    pub sinks: Tokens,
    /// First layers, which keep everything.
    pub skip_layers: Layer,
    /// What to expect, by model; `other` where a model is not named.
    pub kept: BTreeMap<String, Kept>,
    /// Standard deviations above the mean that memory is planned for.
    pub deviations: f64,
}

impl Default for DBudgetKv {
    fn default() -> Self {
        Self {
            loss: 0.01,
            order: Order::Position,
            sinks: 4,
            skip_layers: 0,
            kept: BTreeMap::new(),
            deviations: 2.0,
        }
    }
}

impl DBudgetKv {
    fn of(&self, model: &str) -> Option<&Kept> {
        self.kept.get(model).or_else(|| self.kept.get("other"))
    }

    /// Tokens that a layer is expected to keep, and those that it may keep.
    fn counts(&self, kept: Option<&Kept>, layer: Layer, prompt: Tokens) -> (Tokens, Tokens) {
        let at = |shares: &[f64]| match shares {
            [all] => Some(*all),
            each => each.get(layer as usize).copied(),
        };
        let mean = kept.and_then(|k| at(&k.mean)).unwrap_or(1.0);
        let deviation = kept.and_then(|k| at(&k.deviation)).unwrap_or(0.0);
        let least = self.sinks.saturating_add(1).min(prompt);
        let tokens = |share: f64| {
            let tokens = (share * f64::from(prompt)).round().max(0.0) as Tokens;
            tokens.clamp(least, prompt)
        };
        (tokens(mean), tokens(mean + self.deviations * deviation))
    }
}

impl Policy for DBudgetKv {
    fn label(&self) -> String {
        let Self { loss, order, sinks, skip_layers, deviations, .. } = self;
        let order = order.name();
        let skip =
            if *skip_layers > 0 { format!(",skip_layers={skip_layers}") } else { String::new() };
        format!("dbudgetkv:loss={loss},order={order},sinks={sinks},deviations={deviations}{skip}")
    }

    fn role(&self) -> Role {
        Role::Evicts
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn layer_kind(&self, layer: Layer, model: &Model) -> u32 {
        let alike =
            self.of(&model.name).is_none_or(|k| k.mean.len() == 1 && k.deviation.len() == 1);
        if alike { u32::from(layer >= self.skip_layers) } else { layer }
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        let model = request.model;
        if !(0.0..1.0).contains(&self.loss) {
            return refuse(
                format!("loss={} is not a share below 1", self.loss),
                "0.01 is usual: a hundredth of the attention's length",
            );
        }
        if !(0.0..=1e6).contains(&self.deviations) {
            return refuse(format!("deviations={}", self.deviations), "2 is usual");
        }
        if self.sinks >= request.prompt {
            return refuse(
                format!("{} sinks in a prompt of {}", self.sinks, request.prompt),
                "lower sinks",
            );
        }
        if model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, which hold their window only", model.name),
                "use an evicting policy with a budget",
            );
        }
        let Some(kept) = self.of(&model.name) else {
            let Some(of) = self.kept.keys().next() else { return Ok(()) };
            return refuse(
                format!("what layers keep is known for {of}, not for {}", model.name),
                "batchmax prepare dbudgetkv finds it; an entry `other` stands for all",
            );
        };
        for (what, shares) in [("mean", &kept.mean), ("deviation", &kept.deviation)] {
            let each = model.layers as usize;
            if shares.len() != 1 && (shares.len() != each || kept.mean.len() != each) {
                return refuse(
                    format!(
                        "{} values of {what} for the {} layers of {}",
                        shares.len(),
                        model.layers,
                        model.name
                    ),
                    "give one, or one per layer: prepare dbudgetkv writes them",
                );
            }
            if shares.iter().any(|s| !(0.0..=1.0).contains(s)) {
                return refuse(
                    format!("{what} of what layers keep is no share between 0 and 1"),
                    "prepare dbudgetkv writes shares",
                );
            }
        }
        Ok(())
    }

    fn expecting(&self, kept: &[f64], model: &Model) -> Option<Arc<dyn Policy>> {
        // Layers that were expected to be alike stay so: times go with the sum, and ops keep their places.
        let alike = self.of(&model.name).is_none_or(|k| k.mean.len() == 1);
        let dropping = kept.get(self.skip_layers as usize..).unwrap_or_default();
        let mean = dropping.iter().sum::<f64>() / dropping.len().max(1) as f64;
        let mean = if alike { vec![mean] } else { kept.to_vec() };
        let kept = Kept { mean, deviation: vec![0.0] };
        let known = BTreeMap::from([(model.name.clone(), kept)]);
        Some(Arc::new(Self { kept: known, ..self.clone() }))
    }

    fn leaves(&self, request: &Request<'_>) -> Option<Leaves> {
        let least = self.sinks.saturating_add(1).min(request.prompt);
        Some(Leaves { least, again: false, ragged: true })
    }

    fn after_attend(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        if step.phase == Phase::Decode || !step.prompt_read || step.layer < self.skip_layers {
            return;
        }
        if self.order != Order::Position {
            kv.tally();
        }
        let (keep, most) = self.counts(self.of(&step.model.name), step.layer, step.prompt);
        let protect = Protect { sinks: self.sinks, recent: 1 };
        let loss = (self.loss * 1e6).round() as u32;
        kv.rank(self.order.score(), protect);
        kv.keep_within(keep, protect, loss, most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_the_layer_between_the_sinks_and_the_prompt() {
        let kept = Kept { mean: vec![0.5, 0.9, 0.0], deviation: vec![0.1, 0.2, 0.0] };
        let policy = DBudgetKv::default();
        let counts = |layer| policy.counts(Some(&kept), layer, 1000);
        assert_eq!([0, 1, 2].map(counts), [(500, 700), (900, 1000), (5, 5)]);
        // One share for all layers, and nothing known.
        let alike = Kept { mean: vec![0.25], deviation: vec![0.0] };
        assert_eq!(policy.counts(Some(&alike), 7, 1000), (250, 250));
        assert_eq!(policy.counts(None, 7, 1000), (1000, 1000));
    }

    #[test]
    fn skipped_layers_keep_everything_and_count_in_no_mean() {
        let model = crate::profile::Catalog::built_in().model("smollm2-135m").expect("built in");
        let policy = DBudgetKv { skip_layers: 2, ..DBudgetKv::default() };
        let verbs = |layer| {
            let (phase, prompt) = (Phase::Prefill, 512);
            let step = Step {
                model: &model,
                phase,
                layer,
                layers: model.layers,
                prompt,
                rows: prompt,
                prompt_read: true,
                token_bytes: 1,
            };
            let heads = crate::op::Heads {
                query: 9,
                kv: 3,
                dim: 64,
                dtype: crate::op::DType::F16,
                form: crate::form::Form::default(),
            };
            let mut verbs = Vec::new();
            let length = crate::form::Length::with_new(prompt, prompt);
            policy.after_attend(&step, &mut KvTape::new(heads, length, &mut verbs));
            verbs.len()
        };
        assert_eq!([0, 1, 2, 29].map(verbs), [0, 0, 2, 2]);
        assert_ne!(policy.layer_kind(1, &model), policy.layer_kind(2, &model));
        let mut kept = vec![1.0; 30];
        kept[2..].fill(0.5);
        let expecting = policy.expecting(&kept, &model).expect("data decide");
        assert!(expecting.label().ends_with("skip_layers=2"), "{}", expecting.label());
        // A half of 512 in the others: one share of all layers, those that keep everything left out.
        let request = Request::new(&model, 512, crate::op::DType::F16);
        expecting.check(&request).expect("as before");
        let lowered = |p: &dyn Policy| {
            use crate::{kv::KvLayout, load, lower, memory};
            let kv =
                KvLayout { dtype: crate::op::DType::F16, block_tokens: 32, shares_prefix: false };
            let f32 = crate::op::DType::F32;
            let setup = lower::Setup { kv, weights: f32, activations: f32, head: f32, tp: 1 };
            let load = load::Load::uniform(1, 512, 1, load::Schedule::Static);
            memory::kv_trace(&lower::lower(&model, p, &load, setup).expect("lowers"))[0]
        };
        assert_eq!(lowered(expecting.as_ref()).0, (2 * 512 + 28 * 256) * 768);
    }
}
