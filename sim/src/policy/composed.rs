//! Several policies on one cache: `snapkv:budget=25%+kivi:bits=2`.
//!
//! Their hooks run in the order in which they are named, their forms are joined. What makes no sense together is refused
//! with a reason.

use std::sync::Arc;

use super::{
    Beside, Forwards, Policy, PolicyError, Prefetching, Reading, Refreshing, Request, Reusing,
    Role, Step,
};
use crate::form::Form;
use crate::kv::KvTape;
use crate::op::Pick;
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Policies that work together.
#[derive(Clone, Debug)]
pub struct Composed(Vec<Arc<dyn Policy>>);

impl Composed {
    /// Of parts that go together.
    ///
    /// # Errors
    /// If two of them contradict each other.
    pub fn new(parts: Vec<Arc<dyn Policy>>) -> Result<Self, PolicyError> {
        let composed = Self(parts);
        for (i, a) in composed.0.iter().enumerate() {
            for b in &composed.0[i + 1..] {
                if let Some((problem, remedy)) = contradiction(a.role(), b.role()) {
                    return Err(PolicyError {
                        policy: composed.label(),
                        problem: problem.to_owned(),
                        remedy: remedy.to_owned(),
                    });
                }
            }
        }
        Ok(composed)
    }
}

/// Why two policies can't share a cache, and what to do instead.
fn contradiction(a: Role, b: Role) -> Option<(&'static str, &'static str)> {
    use Role::{Evicts, Keeps, Packs, Prunes, Reuses, Selects, Shares};
    match (a, b) {
        (Keeps, _) | (_, Keeps) => {
            Some(("one of the parts keeps everything", "leave it out: it adds nothing"))
        }
        (Evicts, Evicts) => {
            Some(("two policies evict from one cache", "name one, with the smaller budget"))
        }
        (Packs, Packs) => Some(("two policies pack one cache", "name one, with fewer bits")),
        (Prunes, Prunes) => Some(("two policies prune one cache", "name one")),
        (Shares, Shares) => Some(("two policies share layers", "name one")),
        (Shares, Prunes | Selects) | (Prunes | Selects, Shares) => Some((
            "channels and pages are chosen by a layer's own queries, and a shared cache has several",
            "share layers together with an evicting or packing policy instead",
        )),
        (Selects, Packs | Prunes) | (Packs | Prunes, Selects) => Some((
            "tokens that are chosen are copied as they came, and the other part stores them otherwise",
            "name one of them",
        )),
        (Reuses, Reuses) => Some(("two policies put caches together", "name one")),
        (Reuses, Selects) => None,
        (Selects, Reuses) => Some((
            "what is read of a cache is chosen when it has been put together",
            "name the part that reuses first: cacheblend+quest",
        )),
        (Reuses, _) | (_, Reuses) => Some((
            "a cache that is put together from chunks holds every token as it came",
            "use it alone, or with a policy that chooses what to read: cacheblend+quest",
        )),
        (Selects, Selects) => Some(("two policies choose what to read", "name one")),
        (Selects, Evicts) | (Evicts, Selects) => Some((
            "one part relies on the tokens that the other drops",
            "name one of them (rocketkv evicts and selects by itself)",
        )),
        (Packs, Evicts | Prunes) => Some((
            "packed tokens would be taken apart again",
            "name the packing part last: snapkv+think+kivi",
        )),
        (Prunes, Evicts) => Some((
            "channels are chosen among the keys that stay",
            "name the evicting part first: snapkv+think",
        )),
        _ => None,
    }
}

impl Policy for Composed {
    fn label(&self) -> String {
        self.0.iter().map(|p| p.label()).collect::<Vec<_>>().join("+")
    }

    fn role(&self) -> Role {
        self.0.iter().map(|p| p.role()).next().unwrap_or(Role::Keeps)
    }

    fn evicts(&self) -> bool {
        self.0.iter().any(|p| p.evicts())
    }

    fn prefill_chunk(&self) -> Option<Tokens> {
        self.0.iter().filter_map(|p| p.prefill_chunk()).min()
    }

    fn acts_in_decode(&self) -> bool {
        self.0.iter().any(|p| p.acts_in_decode())
    }

    fn quiet_up_to(&self, step: &Step<'_>) -> Option<Tokens> {
        let parts = self.0.iter().map(|p| p.quiet_up_to(step));
        parts.reduce(|a, b| Some(a?.min(b?))).flatten()
    }

    fn compresses(&self) -> bool {
        self.0.iter().any(|p| p.compresses())
    }

    fn layer_kind(&self, layer: Layer, model: &Model) -> u32 {
        // Kinds need only differ where some part's does.
        self.0.iter().fold(0u32, |kind, p| {
            kind.wrapping_mul(1_000_003).wrapping_add(p.layer_kind(layer, model))
        })
    }

    fn cache_of(&self, layer: Layer, model: &Model) -> Layer {
        self.0.iter().map(|p| p.cache_of(layer, model)).min().unwrap_or(layer)
    }

    fn forwards(&self, prompt: Tokens, model: &Model) -> Option<Forwards> {
        self.0.iter().find_map(|p| p.forwards(prompt, model))
    }

    fn reads(&self, layer: Layer, prompt: Tokens, model: &Model) -> Option<Reading> {
        self.0.iter().find_map(|p| p.reads(layer, prompt, model))
    }

    fn short_heads(&self, layer: Layer, model: &Model) -> Vec<u32> {
        self.0
            .iter()
            .map(|p| p.short_heads(layer, model))
            .find(|h| !h.is_empty())
            .unwrap_or_default()
    }

    fn reuses(&self, prompt: Tokens, model: &Model) -> Option<Reusing> {
        self.0.iter().find_map(|p| p.reuses(prompt, model))
    }

    fn only_if_named(&self) -> bool {
        self.0.iter().any(|p| p.only_if_named())
    }

    fn refreshes(&self, prompt: Tokens, model: &Model) -> Option<Refreshing> {
        self.0.iter().find_map(|p| p.refreshes(prompt, model))
    }

    fn prefetches(&self, model: &Model) -> Option<Prefetching> {
        self.0.iter().find_map(|p| p.prefetches(model))
    }

    fn beside(&self) -> Beside {
        let named = |p: &Arc<dyn Policy>| Some(p.beside()).filter(|b| *b != Beside::Nothing);
        self.0.iter().find_map(named).unwrap_or_default()
    }

    fn form(&self, layer: Layer, model: &Model) -> Form {
        self.0.iter().fold(Form::default(), |form, p| form.and(p.form(layer, model)))
    }

    fn expecting(&self, kept: &[f64], model: &Model) -> Option<Arc<dyn Policy>> {
        let counted: Vec<_> = self.0.iter().map(|p| p.expecting(kept, model)).collect();
        counted.iter().any(Option::is_some).then(|| {
            let parts = counted.into_iter().zip(&self.0);
            Arc::new(Self(parts.map(|(c, p)| c.unwrap_or_else(|| Arc::clone(p))).collect())) as _
        })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        self.0.iter().try_for_each(|p| p.check(request))?;
        let (model, form) = (request.model, self.form(0, request.model));
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if form.rerotated {
            return refuse(
                "keys that are turned when others go have no second owner".to_owned(),
                "leave out rerotate",
            );
        }
        let reads = (0..model.layers).find_map(|l| self.reads(l, request.prompt, model));
        if reads.is_some() && (form.packed.is_some() || form.pruned.is_some()) {
            return refuse(
                "tokens that are chosen are copied as they came, and the other part stores them otherwise".to_owned(),
                "name one of them",
            );
        }
        let shares = (0..model.layers).any(|l| self.cache_of(l, model) != l);
        if shares && (reads.is_some() || self.forwards(request.prompt, model).is_some()) {
            return refuse(
                "what is read and what goes on is chosen by a layer's own cache, and some have none".to_owned(),
                "share layers together with an evicting or packing policy instead",
            );
        }
        // Only a choice of pages has been seen to be that of a plain prefill.
        let clusters = reads.is_some_and(|r| matches!(r.by, Pick::Clusters { .. }));
        let beside =
            self.prefetches(model).is_some() || self.refreshes(request.prompt, model).is_some();
        if self.reuses(request.prompt, model).is_some() && (clusters || beside) {
            return refuse(
                "clusters, partial caches and slower memory are made of a prompt that is read whole".to_owned(),
                "choose pages: cacheblend+quest",
            );
        }
        let Some(evicts) = self.0.iter().find_map(|p| p.leaves(request)) else { return Ok(()) };
        if form.state.is_some() && shares {
            return refuse(
                "queries read the state of their own layer's cache only".to_owned(),
                "leave one of the parts out",
            );
        }
        let residual = form.packed.map_or(0, |p| p.residual);
        if evicts.least < residual {
            return refuse(
                format!(
                    "a budget of {} tokens is less than the {residual} newest that stay whole",
                    evicts.least
                ),
                "raise budget or lower residual",
            );
        }
        if evicts.ragged && form.packed.is_some() {
            return refuse(
                "heads that share a budget keep no whole groups of tokens to pack".to_owned(),
                "leave guaranteed out",
            );
        }
        if evicts.again && form.pruned.is_some() {
            return refuse(
                "channels are dropped once, tokens again and again".to_owned(),
                "evict once: chunk=0,decode=false",
            );
        }
        Ok(())
    }

    fn after_attend(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        for part in &self.0 {
            part.after_attend(step, kv);
        }
    }

    fn after_pass(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        for part in &self.0 {
            part.after_pass(step, kv);
        }
    }
}
