//! How much a policy keeps.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Tokens, parse_bytes, parse_tokens};

/// What to keep: tokens, a share of the prompt, or bytes per sequence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "BudgetText")]
pub enum Budget {
    /// Tokens per layer and KV head.
    Tokens(Tokens),
    /// Share of the prompt length, 0-1.
    Share(f64),
    /// Bytes of one sequence's cache in all layers.
    Bytes(Bytes),
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
        let expected = "expected tokens (512, 4k), a share of the prompt (25%, 0.25) or bytes a sequence (8MB)";
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
                None => match (parse_tokens(&text), parse_bytes(&text)) {
                    (Ok(tokens), _) if tokens > 0 => Ok(Self::Tokens(tokens)),
                    (Err(_), Ok(bytes)) if bytes.0 > 0 && text.ends_with(['B', 'b']) => {
                        Ok(Self::Bytes(bytes))
                    }
                    _ => Err(format!("{expected}, got \"{text}\"")),
                },
            },
            BudgetText::Count(n) => Err(format!("{expected}, got {n}")),
            BudgetText::Share(x) => Err(format!("{expected}, got {x}")),
        }
    }
}

impl Budget {
    /// Tokens for a prompt of `prompt` tokens, each of which takes `token_bytes` in all layers; rounded down, at
    /// least 1.
    #[must_use]
    pub fn of(self, prompt: Tokens, token_bytes: u64) -> Tokens {
        match self {
            Self::Tokens(tokens) => tokens,
            Self::Share(share) => ((f64::from(prompt) * share) as Tokens).max(1),
            Self::Bytes(bytes) => {
                Tokens::try_from(bytes.0 / token_bytes.max(1)).unwrap_or(Tokens::MAX).max(1)
            }
        }
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tokens(tokens) => write!(f, "{tokens}"),
            Self::Share(share) => write!(f, "{}%", share * 100.0),
            Self::Bytes(bytes) => write!(f, "{}B", bytes.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_tokens_shares_or_bytes() {
        let read = |text: &str| {
            toml::from_str::<toml::Table>(&format!("b = {text}"))
                .expect("toml")
                .remove("b")
                .expect("key")
                .try_into::<Budget>()
        };
        assert_eq!(read("512").expect("tokens").of(2048, 1), 512);
        assert_eq!(read("0.25").expect("share").of(2048, 1), 512);
        assert_eq!(read("\"25%\"").expect("percent").of(2048, 1), 512);
        assert_eq!(read("\"4k\"").expect("4k").of(1, 1), 4096);
        // 8 MB at 23,040 bytes a token: 347.2 tokens.
        assert_eq!(read("\"8MB\"").expect("bytes").of(2048, 23_040), 347);
        assert!(read("0").is_err() && read("-3").is_err() && read("1.5").is_err());
        assert!(read("\"0B\"").is_err());
    }
}
