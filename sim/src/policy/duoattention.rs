//! `DuoAttention`: some heads keep everything, the others their sinks and newest tokens.
//!
//! Which KV heads need the whole context is found once per model (`streaming`, by layer); the others stream. Where nobody
//! has looked, the number follows from `retrieval`, spread evenly over the layers, and the highest heads of a layer stand
//! in for those that would be found: memory and speed are right, what it loses is not known.
//!
//! Paper: <https://arxiv.org/abs/2410.10819>. Deviations: a prompt that is read whole attends to all of it in every head
//! and streaming heads are cut afterwards (kvpress does the same); with `chunk` they are cut after every chunk and see
//! their sinks, their newest tokens and the chunk, as in the authors' chunked prefill. In decode they are cut once they
//! are `slack` tokens over. Positions stay the original ones.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Leaves, Policy, PolicyError, Request, Role};
use crate::form::{Form, Short};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Retrieval heads and streaming heads.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DuoAttention {
    /// Share of the KV heads that keep everything, 0-1, where `streaming` does not name the others.
    pub retrieval: f64,
    /// First tokens that streaming heads keep.
    pub sinks: Tokens,
    /// Newest tokens that they keep.
    pub recent: Tokens,
    /// Tokens over that at which decode cuts them.
    pub slack: Tokens,
    /// Prompt tokens between two cuts; 0 reads prompts whole.
    pub chunk: Tokens,
    /// Streaming KV heads by model and layer.
    pub streaming: BTreeMap<String, Vec<Vec<u32>>>,
}

impl Default for DuoAttention {
    fn default() -> Self {
        Self {
            retrieval: 0.5,
            sinks: 64,
            recent: 256,
            slack: 31,
            chunk: 0,
            streaming: BTreeMap::new(),
        }
    }
}

impl DuoAttention {
    fn short(&self, layer: Layer, model: &Model) -> Vec<u32> {
        if let Some(layers) = self.streaming.get(&model.name) {
            return layers.get(layer as usize).cloned().unwrap_or_default();
        }
        // As many as add up to the share over all layers so far.
        let share = f64::from(model.kv_heads) * (1.0 - self.retrieval.clamp(0.0, 1.0));
        let until = |layers: u32| (f64::from(layers) * share).round() as u32;
        let count = (until(layer.saturating_add(1)) - until(layer)).min(model.kv_heads);
        (model.kv_heads - count..model.kv_heads).collect()
    }
}

impl Policy for DuoAttention {
    fn label(&self) -> String {
        let Self { retrieval, sinks, recent, slack, chunk, .. } = self;
        let chunk = if *chunk > 0 { format!(",chunk={chunk}") } else { String::new() };
        format!(
            "duoattention:retrieval={retrieval},sinks={sinks},recent={recent},slack={slack}{chunk}"
        )
    }

    fn role(&self) -> Role {
        Role::Evicts
    }

    fn prefill_chunk(&self) -> Option<Tokens> {
        (self.chunk > 0).then_some(self.chunk)
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn layer_kind(&self, layer: Layer, model: &Model) -> u32 {
        self.short(layer, model).len() as u32
    }

    fn short_heads(&self, layer: Layer, model: &Model) -> Vec<u32> {
        self.short(layer, model)
    }

    fn form(&self, layer: Layer, model: &Model) -> Form {
        let heads = self.short(layer, model).len() as u32;
        let tokens = self.sinks.saturating_add(self.recent);
        let short = Short { heads, sinks: self.sinks, tokens, slack: self.slack };
        Form { short: (heads > 0).then_some(short), ..Form::default() }
    }

    fn leaves(&self, _request: &Request<'_>) -> Option<Leaves> {
        Some(Leaves { least: self.sinks.saturating_add(self.recent), again: true, ragged: true })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        let model = request.model;
        if !(0.0..=1.0).contains(&self.retrieval) {
            return refuse(
                format!("retrieval={} is not a share", self.retrieval),
                "set it between 0 and 1 (0.5 is usual)",
            );
        }
        if self.recent == 0 {
            return refuse(
                "a streaming head has to see its newest token".to_owned(),
                "set recent to 1 or more (256 is usual)",
            );
        }
        if model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, which hold their window only", model.name),
                "use an evicting policy with a budget",
            );
        }
        let Some(layers) = self.streaming.get(&model.name) else {
            let Some(of) = self.streaming.keys().next() else { return Ok(()) };
            return refuse(
                format!("its heads are those of {of}, not of {}", model.name),
                "batchmax prepare duoattention finds them; the preset goes by their number",
            );
        };
        if layers.len() != model.layers as usize {
            return refuse(
                format!("heads of {} layers, {} has {}", layers.len(), model.name, model.layers),
                "name the streaming heads of every layer, [] for none",
            );
        }
        for (layer, heads) in layers.iter().enumerate() {
            let ascending = heads.is_sorted_by(|a, b| a < b);
            if !ascending || heads.last().is_some_and(|h| *h >= model.kv_heads) {
                return refuse(
                    format!("layer {layer}: {heads:?} are no KV heads of {}", model.kv_heads),
                    "count from 0, in ascending order",
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Catalog;

    #[test]
    fn streaming_heads_are_spread_over_the_layers() {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let policy = DuoAttention::default();
        // Half of 3 heads: 1.5 a layer, which rounds to 2, 1, 2, 1 ... (1.5 to 2, 3, 4.5 to 5, 6).
        let counts: Vec<usize> = (0..4).map(|l| policy.short_heads(l, &model).len()).collect();
        assert_eq!(counts, [2, 1, 2, 1]);
        assert_eq!(policy.short_heads(0, &model), [1, 2]);
        let all: usize = (0..30).map(|l| policy.short_heads(l, &model).len()).sum();
        assert_eq!(all, 45);
        let named = vec![vec![0, 2]; 30];
        let streaming = BTreeMap::from([(model.name.clone(), named)]);
        let policy = DuoAttention { streaming, ..policy };
        assert_eq!(policy.short_heads(7, &model), [0, 2]);
    }
}
