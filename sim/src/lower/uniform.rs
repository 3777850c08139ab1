//! Runs of equal sequences, lowered once for all batches.
//!
//! What a policy does to a sequence does not depend on how many there are: a batch only writes another number into the
//! lanes, and, where prompts are read in groups, other counts around them.

use super::{LowerError, Setup, lower};
use crate::load::{Load, Schedule};
use crate::op::{Lanes, Phase};
use crate::policy::Policy;
use crate::profile::Model;
use crate::program::{Block, Node, Pass, Program};

/// The program of equal sequences, for any number of them.
#[derive(Clone, Debug)]
pub struct Uniform {
    program: Program,
    /// Nodes that read the prompt of one sequence.
    prefill: Vec<Node>,
    /// Nodes of the program that generate; they stand last.
    decode: usize,
    /// How the nodes before those are put together now.
    groups: Groups,
}

/// Groups of sequences whose prompts are read one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Groups {
    /// Sequences of a group.
    each: u32,
    /// Groups of so many.
    times: u32,
    /// Sequences of a last, smaller group.
    rest: u32,
}

impl Groups {
    fn of(batch: u32, schedule: Schedule) -> Self {
        match schedule {
            // A continuous schedule is no run of equal sequences: `plan::Lowered` lowers it for each batch.
            Schedule::Static | Schedule::Continuous { .. } => {
                Self { each: batch, times: 1, rest: 0 }
            }
            Schedule::Staggered { prefill_batch } => {
                let each = prefill_batch.clamp(1, batch);
                Self { each, times: batch / each, rest: batch % each }
            }
        }
    }

    /// Whether the nodes are the same but for their numbers.
    fn alike(self, other: Self) -> bool {
        (self.times > 1, self.rest > 0) == (other.times > 1, other.rest > 0)
    }
}

impl Uniform {
    /// Lowers one sequence of `load`, which must be of equal ones.
    ///
    /// # Errors
    /// Those of [`lower`].
    pub fn new(
        model: &Model,
        policy: &dyn Policy,
        load: &Load,
        setup: Setup,
    ) -> Result<Self, LowerError> {
        let one = load.groups.iter().take(1).map(|g| crate::load::Group { sequences: 1, ..*g });
        let one = Load::new(one.collect(), load.schedule);
        let program = lower(model, policy, &one, setup)?;
        let reads = program.nodes.iter().take_while(|n| phase(n) == Phase::Prefill).count();
        Ok(Self {
            prefill: program.nodes[..reads].to_vec(),
            decode: program.nodes.len() - reads,
            groups: Groups { each: 1, times: 1, rest: 0 },
            program,
        })
    }

    /// The program of `batch` sequences: what [`lower`] makes of them.
    ///
    /// # Errors
    /// Where the batch is empty or larger than an index can count.
    pub fn at(&mut self, batch: u32) -> Result<&Program, LowerError> {
        if batch == 0 {
            return Err(LowerError::EmptyLoad);
        }
        if batch > u32::MAX / 2 {
            return Err(LowerError::TooManySequences(batch.into()));
        }
        let header = &mut self.program.header;
        for group in &mut header.load.groups {
            group.sequences = batch;
        }
        for held in &mut header.held {
            held.sequences = batch;
        }
        let groups = Groups::of(batch, header.load.schedule);
        if !groups.alike(self.groups) {
            self.assemble(groups);
        }
        self.groups = groups;
        let reads = self.program.nodes.len() - self.decode;
        let (prefill, decode) = self.program.nodes.split_at_mut(reads);
        let rest = if groups.rest > 0 { self.prefill.len() } else { 0 };
        let (whole, rest) = prefill.split_at_mut(reads - rest);
        match whole {
            [Node::Loop { times, shift, body }] if groups.times > 1 => {
                (*times, *shift) = (groups.times, groups.each);
                count(body, 0, groups.each);
            }
            once => count(once, 0, groups.each),
        }
        count(rest, groups.each * groups.times, groups.rest);
        count(decode, 0, batch);
        Ok(&self.program)
    }

    /// Puts the nodes together for other groups; the numbers in them are written later.
    fn assemble(&mut self, groups: Groups) {
        let decode = self.program.nodes.split_off(self.program.nodes.len() - self.decode);
        let nodes = &mut self.program.nodes;
        nodes.clear();
        if groups.times > 1 {
            let body = self.prefill.clone();
            nodes.push(Node::Loop { times: groups.times, shift: groups.each, body });
        } else {
            nodes.extend_from_slice(&self.prefill);
        }
        if groups.rest > 0 {
            nodes.extend_from_slice(&self.prefill);
        }
        nodes.extend(decode);
    }
}

/// The phase of a node: no loop holds both.
fn phase(node: &Node) -> Phase {
    match node {
        Node::Pass(pass) => pass.phase,
        Node::Loop { body, .. } => body.first().map_or(Phase::Decode, phase),
    }
}

/// Writes a number of sequences, and the first of them, into all lanes.
fn count(nodes: &mut [Node], first: u32, sequences: u32) {
    for node in nodes {
        match node {
            Node::Loop { body, .. } => count(body, first, sequences),
            Node::Pass(pass) => {
                let Pass { before, layers, after_layers, after, .. } = pass.as_mut();
                let inside = layers.iter_mut().chain(after_layers);
                for Block { ops, .. } in [before, after].into_iter().chain(inside) {
                    for op in ops {
                        let lanes = match &mut op.lanes {
                            Lanes::One(lane) => std::slice::from_mut(lane),
                            Lanes::Many(lanes) => lanes,
                        };
                        for lane in lanes {
                            (lane.first, lane.sequences) = (first, sequences);
                        }
                    }
                }
            }
        }
    }
}
