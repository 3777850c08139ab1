//! Full: every key and value stays. The baseline, and a policy like any other.
//!
//! Parameters: `chunk`, prompt tokens per prefill step (default: the whole prompt at once).

use serde::Deserialize;

use super::{Policy, Role};
use crate::units::Tokens;

/// No compression.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Full {
    /// Prompt tokens per prefill step.
    #[serde(default)]
    pub chunk: Option<Tokens>,
}

impl Policy for Full {
    fn label(&self) -> String {
        self.chunk.map_or_else(|| "full".to_owned(), |chunk| format!("full:chunk={chunk}"))
    }

    fn role(&self) -> Role {
        Role::Keeps
    }

    fn prefill_chunk(&self) -> Option<Tokens> {
        self.chunk
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn compresses(&self) -> bool {
        false
    }
}
