//! Work that comes again is recorded. A decode step starts hundreds of kernels, each of which costs the host some
//! microseconds; a recording (a CUDA graph) is started at once and leaves no gaps between them.
//!
//! Nobody has to say which steps are alike: work is held back until the host wants something else of the device, and what
//! was held back is one stretch. A stretch that equals an earlier one in every address, number and grid does the same again,
//! whatever lies in memory now, so that starting the recording of the earlier one is right by construction.

use std::mem::take;

use batchmax_kernels::cuda::{Address, CudaError, Driver, Graph, Launch, Product};

use super::memory::MAIN;

/// Shorter stretches are started piece by piece.
const SHORTEST: usize = 4;
/// So many stretches are remembered; then all are forgotten, since those that come again are soon back.
const MOST: usize = 1024;

/// Something that the main queue does.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Work {
    Launch(Launch),
    Multiply(Product),
    Copy { from: Address, to: Address, bytes: u64 },
    Fill { at: Address, byte: u8, bytes: u64 },
}

impl Work {
    pub(super) fn start(&self, driver: &mut dyn Driver) -> Result<(), CudaError> {
        match self {
            Self::Launch(launch) => driver.launch(MAIN, launch),
            Self::Multiply(product) => driver.multiply(MAIN, product),
            Self::Copy { from, to, bytes } => driver.copy(MAIN, *from, *to, *bytes),
            Self::Fill { at, byte, bytes } => driver.fill(MAIN, *at, *byte, *bytes),
        }
    }
}

/// A stretch of work that was done before, and its recording once it came a second time.
struct Stretch {
    works: Vec<Work>,
    graph: Option<Graph>,
}

/// What is held back, and what is known.
#[derive(Default)]
pub(super) struct Recordings {
    /// Whether work is held back now.
    on: bool,
    pending: Vec<Work>,
    known: Vec<Stretch>,
    /// Which stretch is likely to come next: the one behind the last.
    next: usize,
}

impl Recordings {
    /// From here on work is held back, or no more; what is pending has to be started or dropped.
    pub(super) fn hold(&mut self, on: bool) {
        self.on = on;
    }

    /// Starts work, now or with the stretch that it belongs to.
    pub(super) fn add(&mut self, driver: &mut dyn Driver, work: Work) -> Result<(), CudaError> {
        if !self.on {
            return work.start(driver);
        }
        self.pending.push(work);
        Ok(())
    }

    /// Starts what was held back.
    pub(super) fn flush(&mut self, driver: &mut dyn Driver) -> Result<(), CudaError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let works = take(&mut self.pending);
        if works.len() < SHORTEST {
            return works.iter().try_for_each(|work| work.start(driver));
        }
        let count = self.known.len();
        let mut places = (self.next..count).chain(0..self.next.min(count));
        let Some(at) = places.find(|at| self.known[*at].works == works) else {
            if count >= MOST {
                self.forget(driver)?;
            }
            works.iter().try_for_each(|work| work.start(driver))?;
            self.known.push(Stretch { works, graph: None });
            self.next = self.known.len();
            return Ok(());
        };
        self.next = at + 1;
        let stretch = &mut self.known[at];
        let graph = match stretch.graph {
            Some(graph) => graph,
            None => *stretch.graph.insert(record(driver, &stretch.works)?),
        };
        // Its buffers are as good as new ones.
        self.pending = works;
        self.pending.clear();
        driver.launch_graph(MAIN, graph)
    }

    /// Drops what is pending and gives all recordings back; the first error, once all are given back.
    pub(super) fn forget(&mut self, driver: &mut dyn Driver) -> Result<(), CudaError> {
        self.pending.clear();
        self.next = 0;
        let graphs = self.known.drain(..).filter_map(|stretch| stretch.graph);
        graphs.map(|graph| driver.free_graph(graph)).fold(Ok(()), Result::and)
    }
}

/// Records work without doing it.
fn record(driver: &mut dyn Driver, works: &[Work]) -> Result<Graph, CudaError> {
    driver.begin_capture(MAIN)?;
    let started = works.iter().try_for_each(|work| work.start(driver));
    // Ended whatever came of it: a queue that is being recorded does nothing else.
    let ended = driver.end_capture(MAIN);
    match (started, ended) {
        (Ok(()), ended) => ended,
        (Err(why), Ok(graph)) => {
            // The error that led here says more than one of giving back.
            let _ = driver.free_graph(graph);
            Err(why)
        }
        (Err(why), Err(_)) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use batchmax_kernels::cuda::DeviceInfo;
    use batchmax_kernels::cuda::recording::{Call, Null, Recording};

    use super::*;

    #[test]
    fn what_comes_again_is_recorded_also_after_too_much_was_remembered() {
        let mut driver = Recording::new(Null::new(DeviceInfo {
            name: "none".into(),
            index: 0,
            capability: (8, 0),
            memory: 1 << 20,
            multiprocessors: 1,
            l2: 0,
            driver: 0,
        }));
        let log = driver.log();
        let at = driver.alloc(1 << 16).expect("room");
        let mut recordings = Recordings::default();
        recordings.hold(true);
        let mut does = |n: usize| {
            for byte in 0..SHORTEST as u8 {
                let work = Work::Fill { at: at.plus(n as u64), byte, bytes: 1 };
                recordings.add(&mut driver, work).expect("held back");
            }
            recordings.flush(&mut driver).expect("started");
        };
        let starts = || {
            let calls = log.calls();
            calls.iter().filter(|call| matches!(call, Call::LaunchGraph { .. })).count()
        };
        (0..3).for_each(|_| does(0));
        assert_eq!(starts(), 2, "the first time piece by piece");
        (1..=MOST).for_each(&mut does);
        assert!(log.calls().iter().any(|call| matches!(call, Call::FreeGraph { .. })));
        (0..2).for_each(|_| does(0));
        assert_eq!(starts(), 3, "forgotten, and recorded anew");
        does(MOST);
        assert_eq!(starts(), 4, "the last stretch came behind what was forgotten");
    }
}
