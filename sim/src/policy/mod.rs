//! What a system does to a KV cache: one small file per policy against one trait.
//!
//! *How many* tokens stay is decided here, when the program is lowered; *which* is decided when it runs. To add a
//! policy: its file, one line in `registry!`, one preset in `profiles/policies/`.

mod batch_max;
mod full;
mod snapkv;
mod streaming_llm;

use std::fmt::Debug;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use batch_max::BatchMax;
pub use full::Full;
pub use snapkv::SnapKv;
pub use streaming_llm::StreamingLlm;

use crate::kv::KvTape;
use crate::op::{Phase, Score};
use crate::profile::catalog::explained;
use crate::profile::{Catalog, Model, ProfileError};
use crate::units::{Layer, Tokens, parse_tokens};

/// One layer's step, as a policy sees it. Nothing here grows with the step, so that equal steps fold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Prefill or decode.
    pub phase: Phase,
    /// The layer (the first of those that share the tape).
    pub layer: Layer,
    /// Prompt length of the sequence.
    pub prompt: Tokens,
    /// Tokens this step adds.
    pub rows: Tokens,
    /// The prompt is complete after this step.
    pub prompt_read: bool,
}

/// What a system does to a KV cache.
pub trait Policy: Debug + Send + Sync {
    /// The policy with its parameters, as `--policy` accepts it.
    fn label(&self) -> String;

    /// Prompt tokens read between two calls of the hooks; `None` reads the prompt whole.
    fn prefill_chunk(&self) -> Option<Tokens> {
        None
    }

    /// Whether [`Self::after_attend`] may do anything in decode steps; `false` spares the lowering a scan.
    fn acts_in_decode(&self) -> bool {
        true
    }

    /// Whether it ever drops anything: what does not is what compression is compared with.
    fn compresses(&self) -> bool {
        true
    }

    /// Refuses parameters or models that it can't serve, before any work starts.
    fn check(&self, _model: &Model, _prompt: Tokens) -> Result<(), PolicyError> {
        Ok(())
    }

    /// Called for each layer right after its attention.
    fn after_attend(&self, _step: &Step, _kv: &mut KvTape<'_>) {}

    /// Called for each layer after all layers are through.
    fn after_pass(&self, _step: &Step, _kv: &mut KvTape<'_>) {}
}

/// A policy with its parameters can't do what is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policy {policy}: {problem}; hint: {remedy}")]
pub struct PolicyError {
    /// Its label.
    pub policy: String,
    /// What doesn't work.
    pub problem: String,
    /// What would.
    pub remedy: String,
}

/// Tokens to keep: a number, or a share of the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "BudgetText")]
pub enum Budget {
    /// Tokens per layer and KV head.
    Tokens(Tokens),
    /// Share of the prompt length, 0-1.
    Share(f64),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum BudgetText {
    Count(i64),
    Share(f64),
    Text(String),
}

impl TryFrom<BudgetText> for Budget {
    type Error = String;
    fn try_from(text: BudgetText) -> Result<Self, String> {
        let expected = "expected tokens (512, 4k) or a share of the prompt (25%, 0.25)";
        match text {
            BudgetText::Count(n) if n > 0 && n <= i64::from(Tokens::MAX) => {
                Ok(Self::Tokens(n as Tokens))
            }
            BudgetText::Share(x) if x > 0.0 && x <= 1.0 => Ok(Self::Share(x)),
            BudgetText::Text(text) => match text.strip_suffix('%') {
                Some(percent) => match percent.trim().parse::<f64>() {
                    Ok(p) if p > 0.0 && p <= 100.0 => Ok(Self::Share(p / 100.0)),
                    _ => Err(format!("{expected}, got \"{text}\"")),
                },
                None => match parse_tokens(&text) {
                    Ok(tokens) if tokens > 0 => Ok(Self::Tokens(tokens)),
                    _ => Err(format!("{expected}, got \"{text}\"")),
                },
            },
            BudgetText::Count(n) => Err(format!("{expected}, got {n}")),
            BudgetText::Share(x) => Err(format!("{expected}, got {x}")),
        }
    }
}

impl Budget {
    /// Tokens for a prompt of `prompt` tokens; shares round down, at least 1.
    #[must_use]
    pub fn of(self, prompt: Tokens) -> Tokens {
        match self {
            Self::Tokens(tokens) => tokens,
            Self::Share(share) => ((f64::from(prompt) * share) as Tokens).max(1),
        }
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tokens(tokens) => write!(f, "{tokens}"),
            Self::Share(share) => write!(f, "{}%", share * 100.0),
        }
    }
}

/// The scores a preset can name; parameters stand beside it in the preset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// Newer is better.
    Recency,
    /// Small keys are better.
    #[default]
    KeyNorm,
    /// Keys unlike the mean are better.
    Keydiff,
    /// Attention of the last queries, pooled over all candidates.
    Window,
    /// The same, pooled as if the window's own columns did not exist.
    WindowSnap,
    /// Attention received, divided by the queries that could see the token.
    Tally,
    /// Attention received, undivided (H2O).
    TallySum,
}

impl By {
    /// The score, with the window's parameters where it has some.
    #[must_use]
    pub fn score(self, window: Tokens, pool: Tokens) -> Score {
        match self {
            Self::Recency => Score::Recency,
            Self::KeyNorm => Score::KeyNorm,
            Self::Keydiff => Score::KeyDiff,
            Self::Window => Score::WindowAttention { window, pool, exclude_window: false },
            Self::WindowSnap => Score::WindowAttention { window, pool, exclude_window: true },
            Self::Tally => Score::TalliedAttention { mean: true },
            Self::TallySum => Score::TalliedAttention { mean: false },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Recency => "recency",
            Self::KeyNorm => "key-norm",
            Self::Keydiff => "keydiff",
            Self::Window => "window",
            Self::WindowSnap => "window-snap",
            Self::Tally => "tally",
            Self::TallySum => "tally-sum",
        }
    }
}

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

type Build = fn(toml::Table) -> Result<Arc<dyn Policy>, toml::de::Error>;

fn build<P: Policy + DeserializeOwned + 'static>(
    table: toml::Table,
) -> Result<Arc<dyn Policy>, toml::de::Error> {
    Ok(Arc::new(toml::Value::Table(table).try_into::<P>()?))
}

macro_rules! registry {
    ($($kind:literal => $policy:ty,)*) => {
        /// The kinds a preset can name.
        pub const KINDS: &[&str] = &[$($kind),*];

        fn builder(kind: &str) -> Option<Build> {
            match kind {
                $($kind => Some(build::<$policy>),)*
                _ => None,
            }
        }
    };
}

registry! {
    "full" => Full,
    "batch-max" => BatchMax,
    "snapkv" => SnapKv,
    "streaming-llm" => StreamingLlm,
}

/// A policy with its parameters, from a preset and what the user changed.
#[derive(Clone, Debug)]
pub struct Preset {
    /// The preset's name.
    pub name: String,
    /// Where the idea is from.
    pub paper: Option<String>,
    /// One sentence.
    pub about: String,
    /// The policy.
    pub policy: Arc<dyn Policy>,
}

impl Preset {
    /// Reads `name` or `name:key=value,key=value` with the presets of `catalog`.
    pub fn parse(catalog: &Catalog, text: &str) -> Result<Self, ProfileError> {
        let (name, overrides) = text.split_once(':').unwrap_or((text, ""));
        let (origin, source) = catalog.policy_text(name)?;
        let table: toml::Table = crate::profile::catalog::parse_toml(&origin, &source)?;
        let invalid = |key: &str, problem: String| ProfileError::Invalid {
            origin: if overrides.is_empty() { origin.clone() } else { format!("--policy {text}") },
            key: key.to_owned(),
            problem,
        };
        let mut table = table;
        let mut take = |key: &str| match table.remove(key) {
            Some(toml::Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(key, "expected a string".to_owned())),
            None => Ok(None),
        };
        let kind = take("kind")?.ok_or_else(|| invalid("kind", "missing".to_owned()))?;
        let paper = take("paper")?;
        let about = take("about")?.unwrap_or_default();
        for pair in overrides.split(',').filter(|p| !p.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(invalid(pair, "expected key=value".to_owned()));
            };
            table.insert(key.trim().to_owned(), override_value(value.trim()));
        }
        let make = builder(&kind).ok_or_else(|| {
            invalid("kind", format!("no policy kind \"{kind}\"; known: {}", KINDS.join(", ")))
        })?;
        let policy = make(table).map_err(|e| {
            let problem = explained(e.message());
            // The table has no positions any more: a key that stands in the file is looked for.
            let key = problem.split('`').nth(1).unwrap_or_default();
            let stands = |l: &str| l.split_once('=').is_some_and(|(k, _)| k.trim() == key);
            match source.lines().position(stands) {
                Some(index) if problem.starts_with("unknown field") => {
                    ProfileError::Syntax { origin: origin.clone(), line: index + 1, problem }
                }
                _ => invalid(&kind, problem),
            }
        })?;
        Ok(Self { name: name.to_owned(), paper, about, policy })
    }
}

/// `512` and `0.25` are numbers, `true` a boolean, `4k` tokens, everything else a string.
fn override_value(text: &str) -> toml::Value {
    if let Ok(number) = text.parse::<i64>() {
        return toml::Value::Integer(number);
    }
    if let Ok(number) = text.parse::<f64>() {
        return toml::Value::Float(number);
    }
    if let Ok(flag) = text.parse::<bool>() {
        return toml::Value::Boolean(flag);
    }
    match parse_tokens(text) {
        Ok(tokens) => toml::Value::Integer(i64::from(tokens)),
        Err(_) => toml::Value::String(text.to_owned()),
    }
}

/// Refuses a budget that can't hold what no ranking may drop.
fn check_budget(
    policy: &dyn Policy,
    budget: Tokens,
    sinks: Tokens,
    recent: Tokens,
) -> Result<(), PolicyError> {
    let forced = u64::from(sinks) + u64::from(recent);
    if u64::from(budget) < forced || budget == 0 {
        return Err(PolicyError {
            policy: policy.label(),
            problem: format!(
                "a budget of {budget} tokens can't hold {sinks} sinks and {recent} recent tokens"
            ),
            remedy: format!("raise budget to at least {}, or lower sinks or recent", forced.max(1)),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_builds() {
        let catalog = Catalog::built_in();
        for name in catalog.policy_names() {
            let preset = Preset::parse(&catalog, &name).expect("built-in presets are valid");
            assert!(!preset.about.is_empty(), "{name} says what it is");
        }
    }

    #[test]
    fn parameters_override_the_preset() {
        let preset =
            Preset::parse(&Catalog::built_in(), "batch-max:budget=512,chunk=128,by=recency")
                .expect("valid");
        let label = preset.policy.label();
        assert!(label.contains("budget=512") && label.contains("chunk=128"), "{label}");
        assert!(label.contains("by=recency"), "{label}");
        assert_eq!(preset.policy.prefill_chunk(), Some(128));
    }

    #[test]
    fn unknown_parameters_are_refused() {
        let error = Preset::parse(&Catalog::built_in(), "batch-max:bugdet=512").expect_err("typo");
        assert!(error.to_string().contains("bugdet"), "{error}");
    }

    #[test]
    fn budgets_are_tokens_or_shares() {
        let read = |text: &str| {
            toml::from_str::<toml::Table>(&format!("b = {text}"))
                .expect("toml")
                .remove("b")
                .expect("key")
                .try_into::<Budget>()
        };
        assert_eq!(read("512").expect("tokens").of(2048), 512);
        assert_eq!(read("0.25").expect("share").of(2048), 512);
        assert_eq!(read("\"25%\"").expect("percent").of(2048), 512);
        assert_eq!(read("\"4k\"").expect("4k").of(1), 4096);
        assert!(read("0").is_err() && read("-3").is_err() && read("1.5").is_err());
    }
}
