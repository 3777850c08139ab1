//! Quest: every step reads the pages whose keys can matter most, and keeps all.
//!
//! The smallest and the largest number of each channel in a page of keys bound its products with a query; the pages with
//! the largest bounds are read. The full cache stays resident: this saves traffic, not memory.
//!
//! Paper: <https://arxiv.org/abs/2406.10774>. The first two layers read everything. How heads of a group choose, and
//! whether the current page competes, the paper leaves open: `per_head` and `newest` say.

use serde::Deserialize;

use super::{Budget, Policy, PolicyError, Reading, Request, Role};
use crate::op::{DType, Pick};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Layers that read everything.
pub(super) const DENSE: Layer = 2;

/// The best pages are read.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quest {
    /// Tokens read per step, layer and head; a share is one of the prompt.
    pub budget: Budget,
    /// Tokens of a page.
    #[serde(default = "usual_page")]
    pub page: Tokens,
    /// Every query head chooses for itself; otherwise a group chooses together.
    #[serde(default)]
    pub per_head: bool,
    /// The page of the newest token is always read.
    #[serde(default = "yes")]
    pub newest: bool,
}

fn usual_page() -> Tokens {
    16
}

fn yes() -> bool {
    true
}

impl Policy for Quest {
    fn label(&self) -> String {
        let Self { budget, page, per_head, newest } = self;
        format!("quest:budget={budget},page={page},per_head={per_head},newest={newest}")
    }

    fn role(&self) -> Role {
        Role::Selects
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn compresses(&self) -> bool {
        true
    }

    fn layer_kind(&self, layer: Layer, _model: &Model) -> u32 {
        u32::from(layer >= DENSE)
    }

    fn reads(&self, layer: Layer, prompt: Tokens, model: &Model) -> Option<Reading> {
        let (page, per_query_head, newest) = (self.page, self.per_head, self.newest);
        let by = Pick::Bounds { page, per_query_head, newest };
        let token_bytes = Request::new(model, prompt, DType::F16).token_bytes;
        let tokens = self.budget.of(prompt, token_bytes) / page * page;
        (layer >= DENSE).then_some(Reading { by, tokens })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if self.page == 0 {
            return refuse("a page of 0 tokens holds nothing".to_owned(), "use page=16");
        }
        let budget = self.budget.of(request.prompt, request.token_bytes);
        if budget < self.page {
            return refuse(
                format!("a budget of {budget} tokens has no room for a page of {}", self.page),
                "raise budget or lower page",
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
