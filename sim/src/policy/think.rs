//! `ThinK`: old keys without their least important channels.
//!
//! Once a layer has read the prompt, a channel's importance is the mean square of the window's queries in it times that of
//! the keys; the least important ones go, per KV head, for all tokens but the newest. Values stay whole.
//!
//! Paper: <https://arxiv.org/abs/2407.21018>. Channels are chosen once. Deviation: keys generated later are pruned too,
//! with the same channels, once a block of 32 of them lies behind the recent ones; the authors leave them whole unless
//! they are packed as well. Dropped channels are rounded down to whole ones.

use serde::Deserialize;

use super::{Policy, PolicyError, Request, Role};
use crate::form::{Form, Pruned};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Fewer key channels.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ThinK {
    /// Share of the channels to drop, 0-1 (lambda).
    pub drop: f64,
    /// Queries that weigh the channels.
    pub window: Tokens,
    /// Newest tokens whose keys stay whole.
    pub recent: Tokens,
}

impl Default for ThinK {
    fn default() -> Self {
        Self { drop: 0.4, window: 32, recent: 32 }
    }
}

impl ThinK {
    fn channels(&self, dim: u32) -> u32 {
        dim - (f64::from(dim) * self.drop) as u32
    }
}

impl Policy for ThinK {
    fn label(&self) -> String {
        format!("think:drop={},window={},recent={}", self.drop, self.window, self.recent)
    }

    fn role(&self) -> Role {
        Role::Prunes
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn form(&self, _layer: Layer, model: &Model) -> Form {
        let channels = self.channels(model.head_dim);
        let pruned = Pruned { channels, window: self.window, recent: self.recent };
        Form { pruned: (channels < model.head_dim).then_some(pruned), ..Form::default() }
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if !(0.0..1.0).contains(&self.drop) {
            return refuse(format!("drop={} is not a share below 1", self.drop), "0.4 is usual");
        }
        if self.window == 0 || self.window > request.prompt {
            return refuse(
                format!("a window of {} queries in a prompt of {}", self.window, request.prompt),
                "set window between 1 and the prompt's length (32 is usual)",
            );
        }
        Ok(())
    }
}
