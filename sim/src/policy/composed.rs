//! Several policies on one cache: `snapkv:budget=25%+kivi:bits=2`.
//!
//! Their hooks run in the order in which they are named, their forms are joined. What makes no sense together is refused
//! with a reason; so is what could be made sense of, but is not offered: Batch-Max and other policies that evict more than
//! once before `ThinK` (channels are chosen once, and a cut would have to take pruned blocks apart), `KVSharer` with `ThinK` or
//! with a policy that chooses what to read (several layers would choose in one cache), and LESS with anything else that
//! evicts (`over=` names the policy it works over).

use std::sync::Arc;

use super::{
    Beside, Forwards, Policy, PolicyError, Prefetching, Reading, Refreshing, Request, Reusing,
    Role, Step,
};
use crate::form::{Form, Length};
use crate::kv::KvTape;
use crate::op::{DType, Heads, OpKind, Phase, Score};
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
        (Reuses, Shares) | (Shares, Reuses) => Some((
            "chunks are stored of every layer, and some layers have no cache",
            "leave one of the parts out",
        )),
        (Reuses, _) => None,
        (_, Reuses) => Some((
            "a cache is put together before anything else is done to it",
            "name the part that reuses first: cacheblend+kivi",
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

impl Composed {
    /// What a part asks of a prompt that is mostly taken over from chunks, which it has not: rows for the tokens of the
    /// chunks are computed of a few only, and all at once.
    fn not_blended(&self, request: &Request<'_>) -> Option<(String, &'static str)> {
        let Request { model, prompt, token_bytes, .. } = *request;
        let form = self.form(0, model);
        if self.0.iter().filter_map(|p| p.forwards(prompt, model)).count() > 1 {
            let problem = "two policies choose the rows that go on".to_owned();
            return Some((problem, "leave one of the parts out"));
        }
        if self.prefill_chunk().is_some_and(|chunk| chunk < prompt) {
            let problem = "the caches of chunks are put together at once, not cut in between";
            return Some((problem.to_owned(), "evict after the prompt: chunk=0"));
        }
        if form.state.is_some() {
            let problem = "states are made of a prompt that is read whole".to_owned();
            return Some((problem, "leave one of the parts out"));
        }
        let question = self.forwards(prompt, model).map_or(prompt, |f| f.recent);
        let mut verbs = Vec::new();
        let heads = Heads {
            query: model.heads,
            kv: model.kv_heads,
            dim: model.head_dim,
            dtype: DType::F16,
            form,
        };
        for layer in 0..model.layers {
            let phase = Phase::Prefill;
            let (layers, rows, prompt_read) = (model.layers, prompt, true);
            let step = Step { model, phase, layer, layers, prompt, rows, prompt_read, token_bytes };
            let mut tape = KvTape::new(heads, Length::with_new(prompt, prompt), &mut verbs);
            self.after_attend(&step, &mut tape);
            self.after_pass(&step, &mut tape);
        }
        let windows = verbs.iter().map(|verb| match verb.kind {
            OpKind::Rank { by: Score::WindowAttention { window, .. }, .. } => window,
            OpKind::Rank {
                by: Score::TalliedAttention { .. } | Score::ExpectedAttention { .. },
                ..
            } => Tokens::MAX,
            _ => 0,
        });
        match windows.chain(form.pruned.map(|p| p.window)).max().unwrap_or(0) {
            Tokens::MAX => Some((
                "tokens are ranked by the queries of the whole prompt, and few of them are computed".to_owned(),
                "rank by keys or by the last queries: cacheblend+snapkv",
            )),
            window if window > question => Some((
                format!("a window of {window} queries, and a question of {question} tokens"),
                "raise suffix, or lower window",
            )),
            _ => None,
        }
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
        if self.reuses(request.prompt, model).is_some()
            && let Some((problem, remedy)) = self.not_blended(request)
        {
            return refuse(problem, remedy);
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
