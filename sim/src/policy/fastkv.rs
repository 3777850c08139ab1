//! FastKV: upper layers read a part of the prompt only, and every layer keeps a part of what it reads.
//!
//! After layer `after` the rows that the window's queries attend to most, summed over all heads, go on; the layers above
//! never see the others. Each layer keeps, like SnapKV, the best columns of its own window; the absolute number is the
//! same in all layers as far as rounding lets it.
//!
//! Paper: <https://arxiv.org/abs/2502.01068>. `after` counts from 0; without it, the layer before the middle, as the
//! authors' 15 of 32. Average pooling; positions stay the original ones.

use serde::Deserialize;

use super::{Forwards, Leaves, Policy, PolicyError, Request, Role, Step};
use crate::kv::KvTape;
use crate::op::{Phase, Pooling, Protect, Score};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Fewer rows for the upper layers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FastKv {
    /// Share of the prompt that every layer keeps, 0-1.
    pub retain: f64,
    /// Share of the rows that go on, 0-1.
    pub forward: f64,
    /// The last layer that sees all rows.
    pub after: Option<Layer>,
    /// Queries that choose; they stay.
    pub window: Tokens,
    /// Width of the average pooling.
    pub pool: Tokens,
}

impl Default for FastKv {
    fn default() -> Self {
        Self { retain: 0.1, forward: 0.2, after: None, window: 8, pool: 7 }
    }
}

impl FastKv {
    fn after(&self, layers: u32) -> Layer {
        self.after.unwrap_or_else(|| (layers / 2).saturating_sub(1))
    }

    /// Rows above layer `after`.
    fn rows(&self, prompt: Tokens) -> Tokens {
        ((f64::from(prompt) * self.forward) as Tokens).max(self.window).min(prompt)
    }

    /// Tokens that a layer keeps of `rows`.
    fn kept(&self, rows: Tokens, above: bool) -> Tokens {
        let share = if above { (self.retain / self.forward).min(1.0) } else { self.retain };
        ((f64::from(rows) * share) as Tokens).max(self.window).min(rows)
    }
}

impl Policy for FastKv {
    fn label(&self) -> String {
        let after = self.after.map_or_else(String::new, |l| format!(",after={l}"));
        let Self { retain, forward, window, pool, .. } = self;
        format!("fastkv:retain={retain},forward={forward},window={window},pool={pool}{after}")
    }

    fn role(&self) -> Role {
        Role::Evicts
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn layer_kind(&self, layer: Layer, model: &Model) -> u32 {
        let after = self.after(model.layers);
        u32::from(layer >= after) + u32::from(layer > after)
    }

    fn forwards(&self, prompt: Tokens, model: &Model) -> Option<Forwards> {
        let (after, rows) = (self.after(model.layers), self.rows(prompt));
        (rows < prompt).then_some(Forwards { after, rows, recent: self.window })
    }

    fn leaves(&self, request: &Request<'_>) -> Option<Leaves> {
        let below = self.kept(request.prompt, false);
        let least = below.min(self.kept(self.rows(request.prompt), true));
        Some(Leaves { least, again: false, ragged: false })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if request.hit > 0 {
            return refuse(
                "which rows of a prefix upper layers see, the end of the prompt decides".to_owned(),
                "leave --prefix-hit out, or use a policy that reads all rows in all layers",
            );
        }
        let share = |x: f64| x > 0.0 && x <= 1.0;
        if !share(self.retain) || !share(self.forward) {
            return refuse(
                "retain and forward are shares of the prompt".to_owned(),
                "set them above 0 and at most 1 (0.1 and 0.2 are usual)",
            );
        }
        if self.after(request.model.layers) >= request.model.layers {
            return refuse(
                format!("{} has {} layers", request.model.name, request.model.layers),
                "set after to one of them, counting from 0",
            );
        }
        if request.model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, which can't skip tokens", request.model.name),
                "use an evicting policy",
            );
        }
        if self.window == 0 || self.pool == 0 || self.window > request.prompt {
            return refuse(
                format!("a window of {} in a prompt of {}", self.window, request.prompt),
                "set window between 1 and the prompt's length (8 is usual), pool to at least 1",
            );
        }
        Ok(())
    }

    fn after_attend(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        if step.phase == Phase::Decode || !step.prompt_read {
            return;
        }
        let after = self.after(step.layers);
        let keep = self.kept(step.rows, step.layer > after);
        let chooses_rows = step.layer == after && self.rows(step.prompt) < step.prompt;
        if keep < kv.tokens() || chooses_rows {
            let (window, pool) = (self.window, self.pool);
            let pooling = Pooling::Mean;
            let by = Score::WindowAttention { window, pool, pooling, exclude_window: true };
            kv.rank(by, Protect { sinks: 0, recent: window }).keep(keep);
        }
    }
}
