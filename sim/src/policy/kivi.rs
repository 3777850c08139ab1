//! KIVI: old keys and values in 2 or 4 bits, new ones whole.
//!
//! Keys are packed per channel over groups of neighbouring tokens, a whole residual at a time; values per token over
//! groups of channels, one token a step once the residual is full. Prompts attend in full precision and are packed
//! afterwards, layer by layer (E1); a step attends before it packs.
//!
//! Paper: <https://arxiv.org/abs/2402.02750>. `swapped` packs keys per token (for comparison: clearly worse). Groups of
//! keys are at most a block of 32 tokens here; the authors' default is 32 too.

use serde::Deserialize;

use super::{Policy, PolicyError, Request, Role};
use crate::form::{Form, KeyAxis, Packed};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Packed keys and values behind a residual window.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kivi {
    /// Bits of a code: 8, 4, 2 or 1.
    pub bits: u32,
    /// Elements that share a scale.
    pub group: u32,
    /// Newest tokens that stay whole.
    pub residual: Tokens,
    /// Keys per token instead of per channel.
    pub swapped: bool,
}

impl Default for Kivi {
    fn default() -> Self {
        Self { bits: 4, group: 32, residual: 128, swapped: false }
    }
}

impl Policy for Kivi {
    fn label(&self) -> String {
        let swapped = if self.swapped { ",swapped=true" } else { "" };
        let Self { bits, group, residual, .. } = self;
        format!("kivi:bits={bits},group={group},residual={residual}{swapped}")
    }

    fn role(&self) -> Role {
        Role::Packs
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn form(&self, _layer: Layer, _model: &Model) -> Form {
        // Without a residual there is no group of tokens to wait for: everything is packed per token as it comes.
        let keys =
            if self.swapped || self.residual == 0 { KeyAxis::Token } else { KeyAxis::Channel };
        let packed = Packed { bits: self.bits, group: self.group, keys, residual: self.residual };
        Form { packed: Some(packed), ..Form::default() }
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        let dim = request.model.head_dim;
        if !matches!(self.bits, 1 | 2 | 4 | 8) {
            return refuse(format!("{} bits can't be packed", self.bits), "use 8, 4, 2 or 1");
        }
        if self.group == 0 || !dim.is_multiple_of(self.group) {
            return refuse(
                format!("groups of {} don't divide the {dim} channels of a head", self.group),
                "use a divisor of the head dimension (32 is usual)",
            );
        }
        let per_channel = !self.swapped && self.residual > 0;
        // Codes of a group fill whole vectors.
        let unit = if per_channel { 32 } else { 16 };
        if !self.group.is_multiple_of(unit) {
            return refuse(
                format!("groups of {} are no multiple of {unit}", self.group),
                "use 32, 64 ... (32 is usual)",
            );
        }
        if per_channel && !self.residual.is_multiple_of(32) {
            return refuse(
                format!("a residual of {} tokens is no multiple of a block of 32", self.residual),
                "use 32, 64, 128 ... or 0",
            );
        }
        if per_channel && !self.residual.is_multiple_of(self.group) {
            return refuse(
                format!("a residual of {} tokens is no multiple of {}", self.residual, self.group),
                "raise residual or lower group",
            );
        }
        Ok(())
    }
}
