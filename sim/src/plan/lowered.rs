//! The programs of a case at any batch.

use super::Case;
use crate::load::Schedule;
use crate::lower::{LowerError, Uniform};
use crate::program::Program;

/// The programs of a case: lowered once where a batch is of equal sequences from beginning to end, else for each batch anew.
#[derive(Clone)]
pub struct Lowered<'a> {
    case: Case<'a>,
    kept: Kept,
}

#[derive(Clone)]
enum Kept {
    Uniform(Uniform),
    /// The newest, with its batch.
    Each(u32, Program),
}

impl<'a> Lowered<'a> {
    /// Of `case`.
    ///
    /// # Errors
    /// Where not even one sequence has a program.
    pub fn new(case: Case<'a>) -> Result<Self, LowerError> {
        let apart = !case.spread.is_none() || matches!(case.schedule, Schedule::Continuous { .. });
        let kept = if apart {
            Kept::Each(1, case.program(1)?)
        } else {
            let placement = case.placement;
            let uniform =
                Uniform::new(&placement.model, case.policy, &case.load(1), placement.setup)?;
            Kept::Uniform(uniform)
        };
        Ok(Self { case, kept })
    }

    /// The program of a batch.
    ///
    /// # Errors
    /// Where the batch is empty or larger than an index can count.
    pub fn at(&mut self, batch: u32) -> Result<&Program, LowerError> {
        match &mut self.kept {
            Kept::Uniform(uniform) => uniform.at(batch),
            Kept::Each(at, program) => {
                if *at != batch {
                    (*at, *program) = (batch, self.case.program(batch)?);
                }
                Ok(program)
            }
        }
    }
}
