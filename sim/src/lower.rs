//! (model, policy, load) -> [`Program`].
//!
//! A policy's hooks run against a [`KvTape`]; what they say becomes ops. Steps in which a policy says the same and drops
//! nothing differ only by the growth of the caches and fold into one pass; once the caches come back to an earlier
//! state, the passes between are a period and fold into a loop. So the work of lowering grows with the number of
//! *events*, not of steps.

use crate::form::Length;
use crate::kv::{KvLayout, KvTape, Verb};
use crate::load::{Group, Load, Schedule};
use crate::op::{DType, Lane, Op, OpKind, Phase, Protect, Score};
use crate::policy::{Beside, Policy, PolicyError, Request, Step, check_with_prefix};
use crate::profile::Model;
use crate::program::{Header, Held, Node, Program};
use crate::units::Tokens;

mod ahead;
mod blend;
mod classes;
mod continuous;
mod emit;
mod ops;
mod prefix;
mod refresh;
mod uniform;

use classes::{Class, classes};
pub use prefix::lower_prefix;
use refresh::Comparing;
pub use uniform::Uniform;

/// Tokens a sliding layer's cache may grow in decode before it is cut to its window again.
const SLIDE_SLACK: Tokens = 32;

/// The types and the layout an engine works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Layout of the caches.
    pub kv: KvLayout,
    /// Type of the weights.
    pub weights: DType,
    /// Type of the activations.
    pub activations: DType,
    /// Type of the embedding and the output head: engines leave them at 16 bits when they quantise the rest.
    pub head: DType,
    /// Devices that share each layer; the model is then one device's part ([`Model::shard`]).
    pub tp: u32,
}

/// Why there is no program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// The load is empty.
    #[error("a load needs at least one sequence, one prompt token and one generated token")]
    EmptyLoad,
    /// Longer than the model can read.
    #[error(
        "{isl} prompt tokens plus {osl} generated ones exceed the context of {model}, {context} tokens; \
         hint: shorten --isl or --osl"
    )]
    PastContext {
        /// Prompt.
        isl: Tokens,
        /// Answer.
        osl: Tokens,
        /// The model.
        model: String,
        /// Its limit.
        context: Tokens,
    },
    /// Sequences that wait would hold their prefixes all the while.
    #[error(
        "a continuous schedule starts with empty caches: which of the waiting requests' prefixes stay cached is not planned; \
         hint: leave --prefix-hit out, or --schedule staggered"
    )]
    HitWhileWaiting,
    /// More sequences than an index can count.
    #[error("{0} sequences are more than a batch can hold; hint: lower --batch")]
    TooManySequences(u64),
    /// The policy refuses.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// All of the prompt is cached.
    #[error(
        "a prefix hit of {hit} tokens leaves nothing to read of {isl} prompt tokens; hint: --prefix-hit {} at most",
        isl - 1
    )]
    NothingToRead {
        /// Prompt.
        isl: Tokens,
        /// Its cached part.
        hit: Tokens,
    },
}

/// Equal sequences while they are lowered.
#[derive(Clone)]
struct Sequences {
    first: u32,
    count: u32,
    isl: Tokens,
    read: Tokens,
    generated: Tokens,
    osl: Tokens,
    /// Resident tokens per class of layers.
    resident: Vec<Tokens>,
    /// Of those, the first ones that equal sequences hold together.
    shared: Vec<Tokens>,
}

/// Sequences that take part in a step.
#[derive(Clone, Copy)]
struct Active {
    index: usize,
    rows: Tokens,
    prompt_read: bool,
    /// Whether partial caches may be filled anew.
    comparing: Comparing,
    /// Rows that speculate, beside those of the step.
    ahead: Tokens,
}

/// Lowers a run.
pub fn lower(
    model: &Model,
    policy: &dyn Policy,
    load: &Load,
    setup: Setup,
) -> Result<Program, LowerError> {
    let total = load.sequences();
    if load.groups.is_empty()
        || load.groups.iter().any(|g| g.sequences == 0 || g.isl == 0 || g.osl == 0)
    {
        return Err(LowerError::EmptyLoad);
    }
    if total > u64::from(u32::MAX / 2) {
        return Err(LowerError::TooManySequences(total));
    }
    for group in &load.groups {
        if u64::from(group.isl) + u64::from(group.osl) > u64::from(model.context) {
            return Err(LowerError::PastContext {
                isl: group.isl,
                osl: group.osl,
                model: model.name.clone(),
                context: model.context,
            });
        }
        if group.hit >= group.isl {
            return Err(LowerError::NothingToRead { isl: group.isl, hit: group.hit });
        }
        let request = Request::new(model, group.isl, setup.kv.dtype);
        check_with_prefix(policy, &request.with_hit(group.hit))?;
    }
    if matches!(load.schedule, Schedule::Continuous { .. }) && load.groups.iter().any(|g| g.hit > 0)
    {
        return Err(LowerError::HitWhileWaiting);
    }
    let mut lowering = Lowering::new(model, policy, setup);
    let (held, nodes) = lowering.run(load);
    Ok(Program { header: header(model, policy, load, setup, held), nodes })
}

/// Lowers one step over caches that already hold `resident` tokens: a probe of a profile. Nothing is checked.
#[must_use]
pub fn lower_pass(
    model: &Model,
    policy: &dyn Policy,
    load: &Load,
    setup: Setup,
    phase: Phase,
    rows: Tokens,
    resident: Tokens,
) -> Program {
    let mut lowering = Lowering::new(model, policy, setup);
    let mut all = Vec::with_capacity(load.groups.len());
    let mut active = Vec::with_capacity(load.groups.len());
    let mut first = 0;
    for (index, group) in load.groups.iter().enumerate() {
        let mut sequences = lowering.sequences(first, group);
        sequences.resident.fill(resident);
        all.push(sequences);
        // One step stands for all.
        let comparing = Comparing::Averaged;
        let ahead = if phase == Phase::Decode { lowering.ahead() } else { 0 };
        active.push(Active { index, rows, prompt_read: true, comparing, ahead });
        first += group.sequences;
    }
    let mut nodes = Vec::new();
    lowering.emit(&mut all, &active, phase, 1, false, &mut nodes);
    Program { header: header(model, policy, load, setup, Vec::new()), nodes }
}

fn header(
    model: &Model,
    policy: &dyn Policy,
    load: &Load,
    setup: Setup,
    held: Vec<Held>,
) -> Header {
    Header {
        model: model.name.clone(),
        policy: policy.label(),
        load: load.clone(),
        kv: setup.kv,
        weights: setup.weights,
        activations: setup.activations,
        head: setup.head,
        cache_of: {
            let map = || (0..model.layers).map(|l| policy.cache_of(l, model));
            if map().eq(0..model.layers) { Vec::new() } else { map().collect() }
        },
        short_heads: {
            let of = |l| policy.short_heads(l, model);
            let all: Vec<Vec<u32>> = (0..model.layers).map(of).collect();
            if all.iter().all(Vec::is_empty) { Vec::new() } else { all }
        },
        maps: match policy.beside() {
            Beside::File(file) => Some(file),
            Beside::Nothing | Beside::Missing => None,
        },
        chunks: blend::chunks(model, policy, load, setup),
        held,
    }
}

struct Lowering<'a> {
    model: &'a Model,
    policy: &'a dyn Policy,
    setup: Setup,
    token_bytes: u64,
    classes: Vec<Class>,
    /// Whether others run on, or begin, when a sequence has its answer: it then gives its caches back.
    others_follow: bool,
    // Lists that each pass fills anew.
    verbs: Vec<Verb>,
    probe: Vec<Verb>,
    spoken: Vec<Op>,
    stay: Vec<Tokens>,
}

impl<'a> Lowering<'a> {
    fn new(model: &'a Model, policy: &'a dyn Policy, setup: Setup) -> Self {
        Self {
            model,
            policy,
            setup,
            token_bytes: Request::new(model, 0, setup.kv.dtype).token_bytes,
            classes: classes(model, policy, setup),
            others_follow: false,
            verbs: Vec::new(),
            probe: Vec::new(),
            spoken: Vec::new(),
            stay: Vec::new(),
        }
    }

    fn sequences(&self, first: u32, group: &Group) -> Sequences {
        Sequences {
            first,
            count: group.sequences,
            isl: group.isl,
            read: 0,
            generated: 0,
            osl: group.osl,
            resident: vec![0; self.classes.len()],
            shared: vec![0; self.classes.len()],
        }
    }

    fn run(&mut self, load: &Load) -> (Vec<Held>, Vec<Node>) {
        let mut all = Vec::with_capacity(load.groups.len());
        let mut first = 0;
        for group in &load.groups {
            let mut sequences = self.sequences(first, group);
            if group.hit > 0 {
                self.take_prefix(&mut sequences, group);
            }
            all.push(sequences);
            first += group.sequences;
        }
        let held = self.held(&all);
        let mut nodes = Vec::with_capacity(8);
        match load.schedule {
            Schedule::Static => self.prefill(&mut all, &mut nodes),
            Schedule::Staggered { prefill_batch } => {
                for sequences in &mut all {
                    self.prefill_staggered(sequences, prefill_batch.max(1), &mut nodes);
                }
            }
            Schedule::Continuous { .. } => {
                self.continuous(all, load.admission, &mut nodes);
                return (held, nodes);
            }
        }
        self.look_ahead(&mut all, &mut nodes);
        while self.decode_to_an_end(&mut all, &mut nodes) {}
        (held, nodes)
    }

    fn prefill_staggered(&mut self, all: &mut Sequences, batch: u32, nodes: &mut Vec<Node>) {
        let batch = batch.min(all.count);
        let (times, rest) = (all.count / batch, all.count % batch);
        let mut done = 0;
        for (count, times) in [(batch, times), (rest, u32::from(rest > 0))] {
            if times == 0 {
                continue;
            }
            let mut part = Sequences { first: all.first + done, count, ..all.clone() };
            let mut body = Vec::new();
            self.prefill(std::slice::from_mut(&mut part), &mut body);
            done += count * times;
            if times > 1 {
                nodes.push(Node::Loop { times, shift: count, body });
            } else {
                nodes.append(&mut body);
            }
            if done == all.count {
                *all = Sequences { first: all.first, count: all.count, ..part };
            }
        }
    }

    /// Reads the prompts of `all` together, chunk by chunk.
    fn prefill(&mut self, all: &mut [Sequences], nodes: &mut Vec<Node>) {
        let chunk = self.policy.prefill_chunk().unwrap_or(Tokens::MAX).max(1);
        loop {
            let active: Vec<Active> = all
                .iter()
                .enumerate()
                .filter(|(_, s)| s.read < s.isl)
                .map(|(index, s)| {
                    let left = s.isl - s.read;
                    Active {
                        index,
                        rows: left.min(chunk),
                        prompt_read: left <= chunk,
                        comparing: Comparing::Never,
                        ahead: 0,
                    }
                })
                .collect();
            if active.is_empty() {
                return;
            }
            let whole_chunks = |a: &Active| (all[a.index].isl - all[a.index].read - 1) / chunk;
            let equal_steps = active.iter().map(whole_chunks).min().unwrap_or(0);
            if equal_steps > 0 {
                self.stretch(all, &active, Phase::Prefill, equal_steps, nodes);
            } else {
                // Answers of one token end here.
                self.emit(all, &active, Phase::Prefill, 1, self.others_follow, nodes);
            }
            let steps = equal_steps.max(1);
            for a in &active {
                let s = &mut all[a.index];
                s.read += a.rows * steps;
                if a.prompt_read {
                    s.generated = 1;
                }
            }
        }
    }

    /// Generates until the next sequences have their answers; the first token came from the prefill. Whether any were left.
    fn decode_to_an_end(&mut self, all: &mut [Sequences], nodes: &mut Vec<Node>) -> bool {
        let mut active: Vec<Active> = all
            .iter()
            .enumerate()
            .filter(|(_, s)| s.generated < s.osl)
            .map(|(index, _)| Active {
                index,
                rows: 1,
                prompt_read: true,
                comparing: Comparing::Never,
                ahead: self.ahead(),
            })
            .collect();
        let Some(steps) = active.iter().map(|a| all[a.index].osl - all[a.index].generated).min()
        else {
            return false;
        };
        let others_follow = self.others_follow
            || active.iter().any(|a| all[a.index].osl - all[a.index].generated > steps);
        // Where others go on, the step that ends these is one of its own: it releases their caches.
        let mut left = steps - u32::from(others_follow);
        while left > 0 {
            let alike = self.compare(all, &mut active).min(left);
            self.stretch(all, &active, Phase::Decode, alike, nodes);
            for a in &active {
                all[a.index].generated += alike;
            }
            left -= alike;
        }
        if others_follow {
            self.compare(all, &mut active);
            self.emit(all, &active, Phase::Decode, 1, true, nodes);
            for a in &active {
                all[a.index].generated += 1;
            }
        }
        true
    }

    /// `left` steps with the same rows: quiet steps fold into passes, periods into loops.
    fn stretch(
        &mut self,
        all: &mut [Sequences],
        active: &[Active],
        phase: Phase,
        mut left: u32,
        nodes: &mut Vec<Node>,
    ) {
        let snapshot = |all: &[Sequences]| -> Vec<Tokens> {
            active.iter().flat_map(|a| all[a.index].resident.iter().copied()).collect()
        };
        let mut marks: Vec<(Vec<Tokens>, usize, u32)> = Vec::new();
        while left > 0 {
            let quiet = self.quiet_steps(all, active, phase, left);
            if quiet > 0 {
                self.emit(all, active, phase, quiet, false, nodes);
                left -= quiet;
                continue;
            }
            self.emit(all, active, phase, 1, false, nodes);
            left -= 1;
            let now = snapshot(all);
            if let Some((_, from, then)) = marks.iter().find(|(state, ..)| *state == now) {
                let period = then - left;
                let times = left / period;
                if times > 0 {
                    let body = nodes.split_off(*from);
                    nodes.push(Node::Loop { times: times + 1, shift: 0, body });
                    left -= times * period;
                }
                marks.clear();
            }
            marks.push((now, nodes.len(), left));
        }
    }

    /// Rows of a step that a class of layers sees.
    fn rows(&self, s: &Sequences, a: &Active, phase: Phase, class: usize) -> Tokens {
        if phase == Phase::Decode || a.rows < s.isl {
            return a.rows;
        }
        let forwards = self.policy.forwards(s.isl, self.model);
        forwards
            .filter(|f| self.classes[class].layers.first > f.after)
            .map_or(a.rows, |f| f.rows.min(a.rows))
    }

    fn step(&self, s: &Sequences, a: &Active, phase: Phase, class: usize) -> Step<'a> {
        Step {
            model: self.model,
            phase,
            layer: self.classes[class].layers.first,
            layers: self.model.layers,
            prompt: s.isl,
            rows: self.rows(s, a, phase, class),
            prompt_read: a.prompt_read,
            token_bytes: self.token_bytes,
        }
    }

    /// Tokens that a step adds to a cache: its rows, and those that a layer takes over.
    fn added(&self, s: &Sequences, a: &Active, phase: Phase, class: usize) -> Tokens {
        self.blended(s, a, phase, class).map_or_else(|| self.rows(s, a, phase, class), |_| s.isl)
    }

    /// Runs the hooks of one layer over a cache that already holds the step's tokens. Returns what stays, and how many
    /// of the verbs belong right after the attention.
    fn hooks(
        &self,
        step: &Step<'_>,
        class: usize,
        (tokens, new): (Tokens, Tokens),
        verbs: &mut Vec<Verb>,
    ) -> (Tokens, usize) {
        verbs.clear();
        let Class { window, heads, .. } = self.classes[class];
        let mut tape = KvTape::new(heads, Length::with_new(tokens, new), verbs);
        self.policy.after_attend(step, &mut tape);
        if let Some(window) = window {
            let slack = if step.phase == Phase::Decode { SLIDE_SLACK } else { 0 };
            if tape.tokens() > window.saturating_add(slack) {
                tape.rank(Score::Recency, Protect::default()).keep(window);
            }
        }
        if !heads.form.is_plain() {
            tape.settle();
        }
        let length = tape.length();
        // Layers that read this cache still have to attend to all of it.
        let drops = |v: &Verb| {
            matches!(
                v.kind,
                OpKind::Evict { .. }
                    | OpKind::Pack { .. }
                    | OpKind::PruneChannels { .. }
                    | OpKind::Trim { .. }
            )
        };
        let split = match self.classes[class].is_read {
            true => verbs.iter().position(drops).unwrap_or(verbs.len()),
            false => verbs.len(),
        };
        let mut tape = KvTape::new(heads, length, verbs);
        self.policy.after_pass(step, &mut tape);
        (tape.tokens(), split)
    }

    /// The largest cache up to which nothing is dropped and all steps say the same, where that is known.
    fn quiet_up_to(&self, step: &Step<'_>, class: usize) -> Option<Tokens> {
        let silent = step.phase == Phase::Decode && !self.policy.acts_in_decode();
        let policy = if silent { Tokens::MAX } else { self.policy.quiet_up_to(step)? };
        let slack = if step.phase == Phase::Decode { SLIDE_SLACK } else { 0 };
        let window = self.classes[class].window.map(|w| w.saturating_add(slack));
        Some(window.map_or(policy, |window| window.min(policy)))
    }

    /// How many of the next steps drop nothing and speak the same verbs as the first of them.
    fn quiet_steps(
        &mut self,
        all: &[Sequences],
        active: &[Active],
        phase: Phase,
        most: u32,
    ) -> u32 {
        let slides = self.classes.iter().any(|c| c.window.is_some());
        if phase == Phase::Decode && !self.policy.acts_in_decode() && !slides {
            return most;
        }
        let (mut first, mut now) =
            (std::mem::take(&mut self.verbs), std::mem::take(&mut self.probe));
        let mut quiet = most;
        for a in active {
            let s = &all[a.index];
            for class in 0..self.classes.len() {
                let step = self.step(s, a, phase, class);
                // Steps that are known to be like the first, if that is one of them.
                let known = self
                    .quiet_up_to(&step, class)
                    .map_or(0, |most| most.saturating_sub(s.resident[class]) / a.rows.max(1));
                let mut i = 0;
                while i < quiet {
                    let tokens = s.resident[class].saturating_add(a.rows.saturating_mul(i + 1));
                    let (stay, _) = self.hooks(&step, class, (tokens, step.rows), &mut now);
                    if i == 0 {
                        first.clone_from(&now);
                    }
                    let same = now.len() == first.len()
                        && now.iter().zip(&first).all(|(v, verb)| v.kind == verb.kind);
                    if stay != tokens || !same {
                        quiet = i;
                        break;
                    }
                    i = (i + 1).max(known);
                }
            }
        }
        first.clear();
        self.verbs = first;
        self.probe = now;
        quiet
    }
}

fn lane(s: &Sequences, rows: Tokens, length: Length, keep: Tokens) -> Lane {
    let Length { settled, tokens: kv } = length;
    Lane { first: s.first, sequences: s.count, rows, kv, settled, keep }
}
