//! What every evicting policy shares: a budget, when it cuts, what it may not drop, how layers and heads share.
//!
//! A policy that only ranks tokens says how ([`Scoring`]) and gets the rest from here: one-shot compression after a layer
//! (E1) or after the whole prefill (E0), or after every chunk (E2: the regime of Batch-Max), eviction in decode with
//! hysteresis, budgets per layer and per head.

use std::fmt::{Debug, Write};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Budget, Leaves, Policy, PolicyError, Request, Role, Step};
use crate::form::Form;
use crate::kv::KvTape;
use crate::op::{Choice, Phase, Protect, Score};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// When a one-shot policy cuts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Instant {
    /// Each layer right after its own attention (E1): later layers never hold their full prompt beside earlier ones.
    #[default]
    AfterLayer,
    /// All layers after the whole prefill (E0): the full prompt of every layer is resident at once.
    AfterPrefill,
}

/// How much is kept, and when the rest goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    /// What stays per layer and KV head, protected tokens included.
    pub budget: Budget,
    /// Prompt tokens between two cuts while the prompt is read (E2); `None` reads it whole.
    pub chunk: Option<Tokens>,
    /// When a prompt that is read whole is cut.
    pub instant: Instant,
    /// First tokens that stay.
    pub sinks: Tokens,
    /// Newest tokens that stay.
    pub recent: Tokens,
    /// Cut in decode at all.
    pub decode: bool,
    /// Tokens over the budget at which decode cuts: fewer, larger compactions.
    pub slack: Tokens,
    /// Budgets that fall linearly from the first layer to the last, the least being the mean / `pyramid`
    /// (`PyramidKV`'s beta).
    pub pyramid: Option<f64>,
    /// Heads share a layer's budget, each with this share of it in any case (`AdaKV`).
    pub guaranteed: Option<f64>,
    /// Keys are turned to their place in the cache whenever tokens before them go, and what comes next stands behind the
    /// cache, not behind the text: no position is ever past what the model was trained on.
    pub rerotate: bool,
}

impl Default for Cut {
    fn default() -> Self {
        Self {
            budget: Budget::Share(0.25),
            chunk: None,
            instant: Instant::AfterLayer,
            sinks: 0,
            recent: 0,
            decode: false,
            slack: 0,
            pyramid: None,
            guaranteed: None,
            rerotate: false,
        }
    }
}

/// The keys of [`Cut`] in a preset; only the budget has no usual value.
#[derive(Deserialize)]
struct CutText {
    budget: Budget,
    chunk: Option<Tokens>,
    instant: Option<Instant>,
    sinks: Option<Tokens>,
    recent: Option<Tokens>,
    decode: Option<bool>,
    slack: Option<Tokens>,
    pyramid: Option<f64>,
    guaranteed: Option<f64>,
    rerotate: Option<bool>,
}

const CUT_KEYS: [&str; 10] = [
    "budget",
    "chunk",
    "instant",
    "sinks",
    "recent",
    "decode",
    "slack",
    "pyramid",
    "guaranteed",
    "rerotate",
];

impl Cut {
    fn with(self, text: CutText) -> Self {
        Self {
            budget: text.budget,
            // A chunk of 0 in a preset or on the command line reads the prompt whole.
            chunk: text.chunk.or(self.chunk).filter(|c| *c > 0),
            instant: text.instant.unwrap_or(self.instant),
            sinks: text.sinks.unwrap_or(self.sinks),
            recent: text.recent.unwrap_or(self.recent),
            decode: text.decode.unwrap_or(self.decode),
            slack: text.slack.unwrap_or(self.slack),
            pyramid: text.pyramid.or(self.pyramid),
            guaranteed: text.guaranteed.or(self.guaranteed),
            rerotate: text.rerotate.unwrap_or(self.rerotate),
        }
    }

    /// The part of a label that says what differs from `usual`.
    fn label(&self, usual: &Self) -> String {
        let mut label = format!("budget={}", self.budget);
        let mut add = |differs: bool, key: &str, value: &dyn std::fmt::Display| {
            if differs {
                // Writing to a string can't fail.
                write!(label, ",{key}={value}").ok();
            }
        };
        add(self.chunk.is_some() || usual.chunk.is_some(), "chunk", &self.chunk.unwrap_or(0));
        let instant = match self.instant {
            Instant::AfterLayer => "after-layer",
            Instant::AfterPrefill => "after-prefill",
        };
        add(self.instant != usual.instant, "instant", &instant);
        add(self.sinks != usual.sinks, "sinks", &self.sinks);
        add(self.recent != usual.recent, "recent", &self.recent);
        add(self.decode != usual.decode, "decode", &self.decode);
        add(self.slack != usual.slack, "slack", &self.slack);
        add(self.pyramid != usual.pyramid, "pyramid", &self.pyramid.unwrap_or(1.0));
        add(self.guaranteed != usual.guaranteed, "guaranteed", &self.guaranteed.unwrap_or(1.0));
        add(self.rerotate != usual.rerotate, "rerotate", &self.rerotate);
        label
    }

    /// Tokens of a layer, `forced` of which stay in any case and are not part of what layers share.
    fn of_layer(&self, step: &Step<'_>, forced: Tokens) -> Tokens {
        let mean = self.budget.of(step.prompt, step.token_bytes);
        match self.pyramid {
            Some(beta) if step.layers > 1 && mean > forced => {
                let most = step.prompt.saturating_sub(forced);
                forced + pyramid(mean - forced, most, beta, step.layer, step.layers)
            }
            _ => mean,
        }
    }
}

/// `PyramidKV`'s tokens of a layer beside the window, where `mean` is their mean: from `2 mean - mean / beta` in the first
/// layer to `mean / beta` in the last, in equal steps, rounded; none gets more than `most`, and then the last ones more.
fn pyramid(mean: Tokens, most: Tokens, beta: f64, layer: Layer, layers: u32) -> Tokens {
    let low = f64::from(mean) / beta.max(1.0);
    let high = (2.0 * f64::from(mean) - low).min(f64::from(most.max(mean)));
    let low = 2.0 * f64::from(mean) - high;
    let fall = (high - low) * f64::from(layer) / f64::from(layers - 1);
    // Halves go to the even number, as in the reference.
    (high - fall).round_ties_even().max(0.0) as Tokens
}

/// How one policy ranks tokens: what its file says.
pub trait Scoring: Clone + Debug + Default + DeserializeOwned + Send + Sync + 'static {
    /// The kind that a preset names.
    const KIND: &'static str;

    /// What it keeps and when, as its paper has it.
    #[must_use]
    fn usual() -> Cut {
        Cut::default()
    }

    /// The ranking.
    fn score(&self) -> Score;

    /// The ranking where it depends on what stays in any case.
    fn score_under(&self, _cut: &Cut) -> Score {
        self.score()
    }

    /// Whether it ranks by all queries of the prompt, and so can cut once only.
    fn whole_prompt(&self) -> bool {
        false
    }

    /// What no ranking may drop, at a budget of `budget` tokens.
    fn protect(&self, cut: &Cut, _budget: Tokens) -> Protect {
        Protect { sinks: cut.sinks, recent: cut.recent }
    }

    /// As [`Policy::only_if_named`].
    fn only_if_named(&self) -> bool {
        false
    }

    /// Its own parameters for the label, as `key=value,`.
    fn parameters(&self) -> String {
        String::new()
    }

    /// Refuses parameters: what doesn't work, and what would.
    fn check(&self, _request: &Request<'_>) -> Result<(), (String, String)> {
        Ok(())
    }
}

/// An evicting policy: a ranking and a budget.
#[derive(Clone, Debug)]
pub struct Evicting<S> {
    /// How much, when.
    pub cut: Cut,
    /// By what.
    pub by: S,
}

impl<S: Scoring> Evicting<S> {
    /// With its usual parameters and this budget.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        Self { cut: Cut { budget, ..S::usual() }, by: S::default() }
    }

    /// From the keys of a preset.
    pub(super) fn from_table(mut table: toml::Table) -> Result<Self, toml::de::Error> {
        let mut cut = toml::Table::new();
        for key in CUT_KEYS {
            if let Some(value) = table.remove(key) {
                cut.insert(key.to_owned(), value);
            }
        }
        let cut = toml::Value::Table(cut).try_into::<CutText>()?;
        let by = toml::Value::Table(table).try_into::<S>().map_err(|e| match e.message() {
            // The ranking knows its own keys only.
            text if text.starts_with("unknown field") => {
                let (what, own) = text.split_once(", ").unwrap_or((text, ""));
                let own: Vec<&str> = own.split('`').skip(1).step_by(2).collect();
                let known = [own.as_slice(), &CUT_KEYS].concat().join("`, `");
                serde::de::Error::custom(format!("{what}, expected one of `{known}`"))
            }
            _ => e,
        })?;
        Ok(Self { cut: S::usual().with(cut), by })
    }

    fn forced(&self, budget: Tokens) -> Protect {
        self.by.protect(&self.cut, budget)
    }

    /// The layer's budget and what is protected in it.
    fn budget(&self, step: &Step<'_>) -> (Tokens, Protect) {
        let mean = self.cut.budget.of(step.prompt, step.token_bytes);
        let forced = self.forced(mean);
        // The window of a pyramid stands outside the sharing; sinks and recent tokens of other policies too.
        let tokens = self.cut.of_layer(step, forced.sinks.saturating_add(forced.recent));
        (tokens, self.forced(tokens))
    }

    fn choice(&self) -> Choice {
        self.cut.guaranteed.map_or(Choice::PerHead, |share| Choice::AcrossHeads {
            guaranteed: (share * 1000.0).round() as u32,
        })
    }

    fn late(&self, step: &Step<'_>) -> bool {
        self.cut.instant == Instant::AfterPrefill && step.phase == Phase::Prefill
    }
}

/// A policy that keeps a budget of the tokens that it ranks highest, and drops the others where the program says so.
pub trait Evictor: Policy {
    /// Tokens that stay in the step's layer once it has more, and which of them stay in any case.
    fn layer_budget(&self, step: &Step<'_>) -> (Tokens, Protect);
}

impl<S: Scoring> Evictor for Evicting<S> {
    fn layer_budget(&self, step: &Step<'_>) -> (Tokens, Protect) {
        self.budget(step)
    }
}

impl<S: Scoring> Policy for Evicting<S> {
    fn evictor(self: Arc<Self>) -> Option<Arc<dyn Evictor>> {
        Some(self)
    }

    fn label(&self) -> String {
        format!("{}:{}{}", S::KIND, self.by.parameters(), self.cut.label(&S::usual()))
    }

    fn role(&self) -> Role {
        Role::Evicts
    }

    fn prefill_chunk(&self) -> Option<Tokens> {
        self.cut.chunk
    }

    fn acts_in_decode(&self) -> bool {
        self.cut.decode
    }

    fn quiet_up_to(&self, step: &Step<'_>) -> Option<Tokens> {
        let decode = step.phase == Phase::Decode;
        if decode && !self.cut.decode {
            return Some(Tokens::MAX);
        }
        let slack = if decode { self.cut.slack } else { 0 };
        Some(self.budget(step).0.saturating_add(slack))
    }

    fn only_if_named(&self) -> bool {
        self.by.only_if_named()
    }

    fn layer_kind(&self, layer: Layer, _model: &Model) -> u32 {
        if self.cut.pyramid.is_some() { layer } else { 0 }
    }

    fn form(&self, _layer: Layer, _model: &Model) -> Form {
        Form { rerotated: self.cut.rerotate, ..Form::default() }
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: String| {
            Err(PolicyError { policy: self.label(), problem, remedy })
        };
        if let Err((problem, remedy)) = self.by.check(request) {
            return refuse(problem, remedy);
        }
        if self.cut.guaranteed.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
            return refuse(
                "guaranteed is a share of the budget".to_owned(),
                "set it between 0 and 1 (0.2 is usual)".to_owned(),
            );
        }
        if self.cut.guaranteed.is_some() && request.model.kv_heads < 2 {
            return refuse(
                format!("{} has one KV head: there is nothing to share", request.model.name),
                "leave guaranteed out".to_owned(),
            );
        }
        if self.cut.rerotate && self.cut.guaranteed.is_some() {
            return refuse(
                "heads of different lengths have no common place for the next token".to_owned(),
                "leave out rerotate or guaranteed".to_owned(),
            );
        }
        if self.cut.rerotate && matches!(self.by.score(), Score::ExpectedAttention { .. }) {
            return refuse(
                "queries to come are expected at places in the text".to_owned(),
                "leave out rerotate".to_owned(),
            );
        }
        if self.cut.pyramid.is_some_and(|beta| !beta.is_finite() || beta < 1.0) {
            return refuse(
                "pyramid must be at least 1".to_owned(),
                "set it to 1 (all layers alike) or more (20 is usual)".to_owned(),
            );
        }
        if self.cut.chunk.is_some() && self.cut.instant == Instant::AfterPrefill {
            return refuse(
                "a policy that cuts after the prefill reads the prompt whole".to_owned(),
                "leave out chunk or instant".to_owned(),
            );
        }
        if self.by.whole_prompt() && (self.cut.chunk.is_some() || self.cut.decode) {
            return refuse(
                "ranks by all queries of the prompt, so it can cut once only".to_owned(),
                "leave out chunk and decode".to_owned(),
            );
        }
        let budget = self.cut.budget.of(request.prompt, request.token_bytes);
        let Protect { sinks, recent } = self.forced(budget);
        let forced = u64::from(sinks) + u64::from(recent);
        if u64::from(budget) < forced || budget == 0 {
            return refuse(
                format!(
                    "a budget of {budget} tokens can't hold {sinks} sinks and {recent} recent tokens"
                ),
                format!(
                    "raise budget to at least {}, or lower sinks, recent or window",
                    forced.max(1)
                ),
            );
        }
        Ok(())
    }

    fn leaves(&self, request: &Request<'_>) -> Option<Leaves> {
        let layers = request.model.layers;
        let least = (0..layers).map(|layer| {
            let step = Step {
                model: request.model,
                phase: Phase::Prefill,
                layer,
                layers,
                prompt: request.prompt,
                rows: request.prompt,
                prompt_read: true,
                token_bytes: request.token_bytes,
            };
            self.budget(&step).0
        });
        let again = self.cut.decode || self.cut.chunk.is_some_and(|c| c < request.prompt);
        let ragged = self.choice().is_ragged();
        Some(Leaves { least: least.min().unwrap_or(0), again, ragged })
    }

    fn after_attend(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        let decode = step.phase == Phase::Decode;
        if decode && !self.cut.decode {
            return;
        }
        let score = self.by.score_under(&self.cut);
        if matches!(score, Score::TalliedAttention { .. }) {
            kv.tally();
        }
        let (budget, protect) = self.budget(step);
        let slack = if decode { self.cut.slack } else { 0 };
        if kv.tokens() > budget.saturating_add(slack) {
            let ranked = kv.rank(score, protect);
            if !self.late(step) {
                ranked.keep_by(budget, protect, self.choice());
            }
        }
    }

    fn after_pass(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        let (budget, protect) = self.budget(step);
        if self.late(step) && kv.tokens() > budget {
            kv.keep_by(budget, protect, self.choice());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pyramid_has_the_total_of_equal_layers() {
        // The reference's counts for a budget of 256 with a window of 32 on 30 layers.
        let counts: Vec<Tokens> = (0..30).map(|l| 32 + pyramid(224, 480, 20.0, l, 30)).collect();
        assert_eq!((counts[0], counts[29]), (32 + 437, 32 + 11));
        assert_eq!(counts.iter().sum::<Tokens>(), 30 * 256);
        assert_eq!(pyramid(224, 480, 1.0, 7, 30), 224);
        // Three quarters of a prompt of 1,000: the first layer keeps all of it, the others what that leaves.
        let counts: Vec<Tokens> = (0..30).map(|l| 32 + pyramid(718, 968, 20.0, l, 30)).collect();
        assert_eq!((counts[0], counts[29]), (1000, 500));
        assert!(counts.iter().sum::<Tokens>().abs_diff(30 * 750) <= 2, "{counts:?}");
    }
}
