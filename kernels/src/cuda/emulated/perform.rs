//! What a pretended device does when its turn comes.

use std::time::Instant;

use super::product;
use super::shim::{self, Moved};
use super::work::Work;
use super::{Emulated, bytes_of, shared_limit};
use crate::cuda::{CudaError, Event, Launch, Stream};

impl Emulated {
    pub(super) fn perform(&mut self, work: &Work) -> Result<(), CudaError> {
        let done = match work {
            Work::Upload { to, bytes } => {
                self.memory.write(to.0, bytes.len() as u64).map(|to| to.copy_from_slice(bytes))
            }
            Work::Copy { from, to, bytes } => {
                let copied = self.memory.read(from.0, *bytes).map(<[u8]>::to_vec);
                copied
                    .and_then(|b| self.memory.write(to.0, *bytes).map(|to| to.copy_from_slice(&b)))
            }
            Work::Out { from, to, bytes } => {
                let from = self.memory.read(from.0, *bytes);
                from.and_then(|b| self.pinned.write(*to, *bytes).map(|to| to.copy_from_slice(b)))
            }
            Work::In { from, to, bytes } => {
                let from = self.pinned.read(*from, *bytes);
                from.and_then(|b| self.memory.write(to.0, *bytes).map(|to| to.copy_from_slice(b)))
            }
            Work::Fill { at, byte, bytes } => {
                self.memory.write(at.0, *bytes).map(|at| at.fill(*byte))
            }
            Work::Launch(launch) => self.run(launch),
            Work::Multiply(product) => product::multiply(product, &mut self.memory),
            Work::Record { event, ticket } => {
                let mark = &mut self.marks[event.0 as usize];
                (mark.done, mark.at) = (*ticket, Some(Instant::now()));
                Ok(())
            }
            Work::Wait { event, ticket, source } => return self.reach(*event, *ticket, *source),
            Work::Graph(graph) => return graph.iter().try_for_each(|work| self.perform(work)),
            Work::AllReduce { at, count, element } => {
                let (meeting, rank) = &self.meeting;
                let part = self.memory.read(at.0, count * element.bytes()).map(<[u8]>::to_vec);
                let sum = part.and_then(|part| meeting.add(*rank, *element, part));
                sum.and_then(|sum| {
                    self.memory.write(at.0, sum.len() as u64).map(|at| at.copy_from_slice(&sum))
                })
            }
        };
        done.map_err(|why| {
            let fault = CudaError::Failed { call: work.to_string(), why };
            self.fault = Some(fault.clone());
            fault
        })
    }

    /// Does the work of a stream up to a mark.
    pub(super) fn reach(
        &mut self,
        event: Event,
        ticket: u64,
        source: Stream,
    ) -> Result<(), CudaError> {
        while self.marks[event.0 as usize].done < ticket
            && let Some(work) = self.queue(source)?.pop_front()
        {
            self.perform(&work)?;
        }
        Ok(())
    }

    fn run(&mut self, launch: &Launch) -> Result<(), String> {
        let arguments: Vec<Vec<u8>> = launch.args.iter().map(bytes_of).collect();
        let start = shim::Start {
            grid: launch.grid,
            block: launch.block,
            shared: launch.shared,
            order: self.settings.order,
            ranges: self.memory.ranges(),
        };
        let Moved { loaded, stored } = self.library.launch(launch.kernel, &start, &arguments)?;
        self.ledger.change(|live| {
            live.launches += 1;
            live.moved.loaded += loaded;
            live.moved.stored += stored;
        });
        Ok(())
    }

    /// What a driver refuses at once.
    pub(super) fn check(&self, launch: &Launch) -> Result<(), String> {
        let sizes: Vec<usize> = launch.args.iter().map(|arg| bytes_of(arg).len()).collect();
        self.library.check(launch.kernel, &sizes)?;
        let [x, y, z] = launch.grid;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65_535 || z > 65_535 {
            return Err(format!("a grid of {x} x {y} x {z} blocks"));
        }
        if launch.block == 0 || launch.block > 1024 {
            return Err(format!("{} threads in a block", launch.block));
        }
        let most = shared_limit(self.settings.capability);
        if launch.shared > most {
            return Err(format!("{} bytes of shared memory, a block has {most}", launch.shared));
        }
        Ok(())
    }
}
