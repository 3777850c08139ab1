//! Policies as users name them: a preset, what they change of it, and several together.

use std::sync::Arc;

use super::{Composed, KINDS, Policy, builder};
use crate::profile::catalog::explained;
use crate::profile::{Catalog, ProfileError};
use crate::units::parse_tokens;

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
        if text.contains('+') {
            return Self::composed(catalog, text);
        }
        let (name, overrides) = text.split_once(':').unwrap_or((text, ""));
        let (origin, source) = catalog.policy_text(name)?;
        let table: toml::Table = crate::profile::catalog::parse_toml(&origin, &source)?;
        let invalid = |key: &str, problem: String| ProfileError::Invalid {
            origin: if overrides.is_empty() { origin.clone() } else { format!("--policy {text}") },
            key: key.to_owned(),
            problem,
        };
        let mut table = table;
        // A file that a preset names stands beside it.
        if let Some(toml::Value::String(file)) = table.get_mut("maps")
            && let Some(folder) = catalog.folder("policies", name)
        {
            *file = folder.join(&*file).to_string_lossy().into_owned();
        }
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
            invalid(
                "kind",
                explained(&format!(
                    "unknown policy kind `{kind}`, expected one of `{}`",
                    KINDS.join("`, `")
                )),
            )
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

    /// `a:key=value+b`: several policies on one cache.
    fn composed(catalog: &Catalog, text: &str) -> Result<Self, ProfileError> {
        let parts: Vec<Self> = text
            .split('+')
            .map(|part| Self::parse(catalog, part.trim()))
            .collect::<Result<_, _>>()?;
        let names: Vec<&str> = parts.iter().map(|p| p.name.as_str()).collect();
        let (name, about) = (names.join("+"), format!("{} together", names.join(" and ")));
        let papers: Vec<&str> = parts.iter().filter_map(|p| p.paper.as_deref()).collect();
        let paper = (!papers.is_empty()).then(|| papers.join(" "));
        let policies = parts.iter().map(|p| Arc::clone(&p.policy)).collect();
        let policy = Composed::new(policies).map_err(|why| ProfileError::Invalid {
            origin: format!("--policy {text}"),
            key: name.clone(),
            problem: format!("{}; hint: {}", why.problem, why.remedy),
        })?;
        Ok(Self { name, paper, about, policy: Arc::new(policy) })
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
    fn parts_work_together_where_it_makes_sense() {
        let catalog = Catalog::built_in();
        let parse = |text: &str| Preset::parse(&catalog, text);
        let both = parse("snapkv:budget=512+kivi:bits=2").expect("goes together");
        assert_eq!(both.name, "snapkv+kivi");
        assert!(
            both.policy.label().contains("budget=512") && both.policy.label().contains("bits=2")
        );
        for text in ["snapkv+h2o", "kivi+snapkv", "full+snapkv", "kivi+kivi", "think+snapkv"] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains("hint: "), "{error}");
        }
    }
}
