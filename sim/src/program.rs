//! The ops of a run, in order, as a value: print it, snapshot it, cost it, replay it.
//!
//! Identical layers are stored once (a [`Block`] with its layers), steps that differ only by the growth of the caches
//! are one [`Pass`], and periods (equal chunks once a budget is reached, equal groups of a staggered prefill) are a
//! [`Node::Loop`].

use crate::form::Length;
use crate::kv::KvLayout;
use crate::load::Load;
use crate::op::{DType, Heads, Op, OpKind, Phase, Site};
use crate::units::{Bytes, Layer, Tokens};

/// Layers `first`, `first + stride`, ...: `count` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// The lowest.
    pub first: Layer,
    /// Distance between two.
    pub stride: u32,
    /// How many.
    pub count: u32,
}

impl Layers {
    /// Whether `layer` is one of them.
    #[must_use]
    pub fn contains(&self, layer: Layer) -> bool {
        layer >= self.first
            && (layer - self.first).is_multiple_of(self.stride)
            && (layer - self.first) / self.stride < self.count
    }
}

/// Ops that some layers share.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The layers; `None`: outside the layers (embedding, head).
    pub layers: Option<Layers>,
    /// In order of execution.
    pub ops: Vec<Op>,
}

impl Block {
    /// How often the block runs in a step.
    #[must_use]
    pub fn times(&self) -> u32 {
        self.layers.map_or(1, |l| l.count)
    }
}

/// `steps` forward passes that differ only in the length of the caches, which grow by each lane's rows per step.
#[derive(Clone, Debug, PartialEq)]
pub struct Pass {
    /// Prefill or decode.
    pub phase: Phase,
    /// Equal steps.
    pub steps: u32,
    /// Rows per sequence that speculate on the token after the step's: they go through all layers and are not kept. Without
    /// a row that is, the step only speculates, on the first token after the prompt's.
    pub ahead: Tokens,
    /// In order: before the layers, the layers (interleaved by layer number), after the layers.
    pub before: Block,
    /// The layers' blocks; each layer is in exactly one.
    pub layers: Vec<Block>,
    /// Cache work after the whole pass (eviction instant E0), by layers.
    pub after_layers: Vec<Block>,
    /// Final norm, head, sampling, release.
    pub after: Block,
}

impl Pass {
    /// The blocks with their index, in the order in which sites are numbered.
    pub fn blocks(&self) -> impl Iterator<Item = (u32, &Block)> {
        std::iter::once(&self.before)
            .chain(&self.layers)
            .chain(&self.after_layers)
            .chain(std::iter::once(&self.after))
            .enumerate()
            .map(|(i, b)| (i as u32, b))
    }

    /// Whether no token comes of it.
    #[must_use]
    pub fn only_speculates(&self) -> bool {
        let rows = self.before.ops.first().and_then(|op| op.lanes.as_slice().first());
        self.ahead > 0 && rows.is_some_and(|lane| lane.rows == self.ahead)
    }

    /// Layers of the model.
    #[must_use]
    pub fn layer_count(&self) -> u32 {
        self.layers.iter().map(Block::times).sum()
    }

    /// The block of a layer among `blocks`, with its index in [`Self::blocks`].
    fn find(blocks: &[Block], offset: u32, layer: Layer) -> Option<(u32, &Block)> {
        blocks
            .iter()
            .enumerate()
            .find(|(_, b)| b.layers.is_some_and(|l| l.contains(layer)))
            .map(|(i, b)| (offset + i as u32, b))
    }

    /// Visits the ops of one step in the order of execution: `(block index, op index, layer, op)`.
    pub fn visit<E>(
        &self,
        mut run: impl FnMut(u32, u32, Option<Layer>, &Op) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut block = |index: u32, block: &Block, layer: Option<Layer>| {
            for (i, op) in block.ops.iter().enumerate() {
                run(index, i as u32, layer, op)?;
            }
            Ok(())
        };
        block(0, &self.before, None)?;
        let layer_count = self.layer_count();
        let after_at = 1 + self.layers.len() as u32;
        for layer in 0..layer_count {
            if let Some((index, found)) = Self::find(&self.layers, 1, layer) {
                block(index, found, Some(layer))?;
            }
        }
        if !self.after_layers.is_empty() {
            for layer in 0..layer_count {
                if let Some((index, found)) = Self::find(&self.after_layers, after_at, layer) {
                    block(index, found, Some(layer))?;
                }
            }
        }
        block(after_at + self.after_layers.len() as u32, &self.after, None)
    }
}

/// A pass, or a period of passes.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// Steps.
    Pass(Box<Pass>),
    /// `body`, `times` times; the sequences move on by `shift` each time.
    Loop {
        /// Repetitions, >= 1.
        times: u32,
        /// Added to [`crate::op::Lane::first`] per repetition.
        shift: u32,
        /// What is repeated.
        body: Vec<Node>,
    },
}

/// What a program was lowered for.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// The model's name.
    pub model: String,
    /// The policy with its parameters.
    pub policy: String,
    /// The sequences.
    pub load: Load,
    /// Layout of the caches.
    pub kv: KvLayout,
    /// Type of the weights.
    pub weights: DType,
    /// Type of the activations.
    pub activations: DType,
    /// Type of the embedding and the output head.
    pub head: DType,
    /// The layer whose cache each layer reads; empty: its own.
    pub cache_of: Vec<Layer>,
    /// KV heads of each layer that hold sinks and recent tokens only; empty: none.
    pub short_heads: Vec<Vec<u32>>,
    /// File of the networks that add dropped tokens to a state and read it ([`crate::form::State`]), if there is one.
    pub maps: Option<String>,
    /// What caches hold before the first step: prefixes that were read earlier.
    pub held: Vec<Held>,
}

/// Caches of some layers and sequences before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The layers, in number.
    pub layers: u32,
    /// The sequences, in number.
    pub sequences: u32,
    /// One layer's heads.
    pub heads: Heads,
    /// Tokens of each sequence.
    pub tokens: Tokens,
    /// Of those, the first ones that all of these sequences hold together.
    pub shared: Tokens,
}

impl Held {
    /// Bytes of all layers: the shared part once, the rest by sequence.
    #[must_use]
    pub fn bytes(&self, layout: KvLayout) -> Bytes {
        let held = |tokens| layout.held(self.heads, Length::settled(tokens)).0;
        let own = held(self.tokens).saturating_sub(held(self.shared));
        let layer = held(self.shared) + own * u64::from(self.sequences);
        Bytes(layer * u64::from(self.layers))
    }
}

impl Header {
    /// The layer whose cache `layer` reads.
    #[must_use]
    pub fn cache_of(&self, layer: Layer) -> Layer {
        self.cache_of.get(layer as usize).copied().unwrap_or(layer)
    }
}

/// The ops of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// What it is for.
    pub header: Header,
    /// In order.
    pub nodes: Vec<Node>,
}

/// One step of an unrolled program.
#[derive(Clone, Copy, Debug)]
pub struct StepView<'a> {
    /// Index of the pass, loops unrolled once (as in [`Site::pass`]).
    pub pass_index: u32,
    /// The pass.
    pub pass: &'a Pass,
    /// Step inside the pass.
    pub step: u32,
    /// Shift of the sequences.
    pub shift: u32,
}

impl Program {
    /// Visits the passes in order, each once, with how often the loops around it repeat it.
    pub fn visit_passes<'a>(&'a self, mut see: impl FnMut(u32, &'a Pass, f64)) {
        fn walk<'a>(
            nodes: &'a [Node],
            times: f64,
            next: &mut u32,
            see: &mut impl FnMut(u32, &'a Pass, f64),
        ) {
            for node in nodes {
                match node {
                    Node::Pass(pass) => {
                        see(*next, pass, times);
                        *next += 1;
                    }
                    Node::Loop { times: n, body, .. } => {
                        walk(body, times * f64::from(*n), next, see);
                    }
                }
            }
        }
        walk(&self.nodes, 1.0, &mut 0, &mut see);
    }

    /// Whether any cached token is dropped.
    #[must_use]
    pub fn drops(&self) -> bool {
        let mut drops = false;
        self.visit_passes(|_, pass, _| {
            let mut ops = pass.blocks().flat_map(|(_, block)| &block.ops);
            drops |= ops.any(|op| matches!(op.kind, OpKind::Evict { .. }));
        });
        drops
    }

    /// Visits every step of the unrolled program in the order of execution.
    pub fn visit_steps<'a, E>(
        &'a self,
        mut run: impl FnMut(StepView<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        fn walk<'a, E>(
            nodes: &'a [Node],
            shift: u32,
            first: u32,
            run: &mut impl FnMut(StepView<'a>) -> Result<(), E>,
        ) -> Result<u32, E> {
            let mut next = first;
            for node in nodes {
                match node {
                    Node::Pass(pass) => {
                        for step in 0..pass.steps {
                            run(StepView { pass_index: next, pass, step, shift })?;
                        }
                        next += 1;
                    }
                    Node::Loop { times, shift: by, body } => {
                        let start = next;
                        for i in 0..*times {
                            next = walk(body, shift + i * by, start, run)?;
                        }
                    }
                }
            }
            Ok(next)
        }
        walk(&self.nodes, 0, 0, &mut run).map(|_| ())
    }

    /// Steps of the unrolled program, and decode steps among them.
    #[must_use]
    pub fn steps(&self) -> (u64, u64) {
        let (mut all, mut decode) = (0.0, 0.0);
        self.visit_passes(|_, pass, times| {
            let steps = times * f64::from(pass.steps);
            all += steps;
            if pass.phase == Phase::Decode && !pass.only_speculates() {
                decode += steps;
            }
        });
        (all as u64, decode as u64)
    }
}

/// The site of an op.
#[must_use]
pub fn site(pass_index: u32, pass: &Pass, block_index: u32, block: &Block, op_index: u32) -> Site {
    Site {
        phase: pass.phase,
        pass: pass_index,
        block: block_index,
        op: op_index,
        layer: block.layers.map(|l| l.first),
        name: block.ops[op_index as usize].name,
    }
}
