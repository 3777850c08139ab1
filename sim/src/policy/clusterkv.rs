//! `ClusterKV`: keys are put into clusters once the prompt is read; every step reads the clusters that its queries like.
//!
//! K-means on the directions of a head's keys behind the sinks. Every *query* head takes clusters in the order of the
//! products with their centres until its budget is full, beside the sinks and all tokens generated since.
//!
//! Paper: <https://arxiv.org/abs/2412.03213>. The first two layers read everything. Deviations: tokens generated later are
//! not clustered again (the authors do so every 320); the first centres are evenly spread over the prompt instead of
//! drawn at random; the full cache stays on the device.

use serde::Deserialize;

use super::quest::DENSE;
use super::{Budget, Policy, PolicyError, Reading, Request, Role};
use crate::op::{DType, Pick};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// The best clusters are read.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterKv {
    /// Clustered tokens read per step, layer and query head; a share is one of the prompt.
    pub budget: Budget,
    /// First tokens, which are always read.
    #[serde(default = "usual_sinks")]
    pub sinks: Tokens,
    /// Tokens of a cluster, on the average.
    #[serde(default = "usual_cluster")]
    pub per_cluster: Tokens,
}

fn usual_sinks() -> Tokens {
    16
}

fn usual_cluster() -> Tokens {
    80
}

impl Policy for ClusterKv {
    fn label(&self) -> String {
        let Self { budget, sinks, per_cluster } = self;
        format!("clusterkv:budget={budget},sinks={sinks},per_cluster={per_cluster}")
    }

    fn role(&self) -> Role {
        Role::Selects
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn layer_kind(&self, layer: Layer, _model: &Model) -> u32 {
        u32::from(layer >= DENSE)
    }

    fn reads(&self, layer: Layer, prompt: Tokens, model: &Model) -> Option<Reading> {
        let by = Pick::Clusters { sinks: self.sinks, per_cluster: self.per_cluster };
        let token_bytes = Request::new(model, prompt, DType::F16).token_bytes;
        let tokens = self.sinks.saturating_add(self.budget.of(prompt, token_bytes)).min(prompt);
        (layer >= DENSE).then_some(Reading { by, tokens })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if self.per_cluster == 0 {
            return refuse("clusters of 0 tokens hold nothing".to_owned(), "use per_cluster=80");
        }
        if self.sinks >= request.prompt {
            return refuse(
                format!("{} sinks leave nothing of {} tokens", self.sinks, request.prompt),
                "lower sinks (16 is usual)",
            );
        }
        if request.model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, which read their window only", request.model.name),
                "use an evicting policy",
            );
        }
        Ok(())
    }
}
