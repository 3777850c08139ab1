//! A persistent pool of threads for short parallel loops.
//!
//! A decode step runs some three hundred loops of a few microseconds: waking sleeping threads for each would cost more
//! than the work. Workers therefore spin for a moment before they park. Tasks are claimed one by one from a counter, so
//! a worker that the system has taken off its core holds up nothing but the task it has in hand.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a worker looks for the next loop before it parks. Longer than the serial work between two ops of a step.
const SPIN: Duration = Duration::from_micros(60);

/// The loop at work, as the workers see it.
struct Job {
    call: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

struct Shared {
    /// Odd while a loop is published, even between loops; never the same twice.
    epoch: AtomicUsize,
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    /// Workers that are inside the published loop.
    inside: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

// SAFETY: `job` is written only while no worker is inside a loop (`inside` is 0 and `epoch` is even), and read only by
// workers that have counted themselves into `inside` and have seen the odd epoch afterwards.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is only used during the call to `run` that published it.
unsafe impl Send for Shared {}

/// The pool.
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

fn nothing(_: usize) {}

impl Threads {
    /// `count` threads, the caller's included; at least one.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let idle: &(dyn Fn(usize) + Sync) = &nothing;
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { call: std::ptr::from_ref(idle), tasks: 0 }),
            next: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers: Vec<_> = (1..count.max(1))
            .map(|_| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || work(&shared))
            })
            .collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Self { shared, workers, handles }
    }

    /// Threads, the caller's included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` once for every task in `0..tasks`, in any order and on any thread; returns when all are done.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            for task in 0..tasks {
                f(task);
            }
            return;
        }
        let shared = &*self.shared;
        let call: &(dyn Fn(usize) + Sync) = &f;
        // SAFETY: the lifetime of `f` is erased; workers leave the loop before `run` returns, see the wait below.
        let call: *const (dyn Fn(usize) + Sync) = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(
                std::ptr::from_ref(call),
            )
        };
        // SAFETY: the epoch is even and no worker is inside, so nobody reads `job`.
        unsafe { *shared.job.get() = Job { call, tasks } };
        shared.next.store(0, Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for handle in &self.handles {
            handle.unpark();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| claim(shared, tasks, &f)));
        if mine.is_err() {
            shared.next.store(tasks, Ordering::Relaxed);
        }
        // Closes the loop: a worker that counts itself in from now on sees an even epoch and leaves.
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        let mut spins = 0u32;
        while shared.inside.load(Ordering::SeqCst) != 0 {
            spins += 1;
            if spins < 10_000 {
                std::hint::spin_loop();
            } else {
                // The worker has lost its core: give it ours.
                std::thread::yield_now();
            }
        }
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        let theirs = shared.panic.lock().map_or(None, |mut p| p.take());
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }
}

fn claim(shared: &Shared, tasks: usize, f: &(impl Fn(usize) + Sync + ?Sized)) {
    loop {
        let task = shared.next.fetch_add(1, Ordering::Relaxed);
        if task >= tasks {
            return;
        }
        f(task);
    }
}

fn work(shared: &Shared) {
    let mut seen = 0;
    let mut idle_since = Instant::now();
    let mut looks = 0u32;
    while !shared.stop.load(Ordering::Relaxed) {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch % 2 == 1 && epoch != seen {
            seen = epoch;
            shared.inside.fetch_add(1, Ordering::SeqCst);
            // Still the same loop after counting in: `run` now waits for this worker.
            if shared.epoch.load(Ordering::SeqCst) == epoch {
                // SAFETY: see above; `job` is not written while this worker is inside.
                let (call, tasks) = unsafe {
                    let job = &*shared.job.get();
                    (&*job.call, job.tasks)
                };
                let done = catch_unwind(AssertUnwindSafe(|| claim(shared, tasks, call)));
                if let Err(panic) = done {
                    shared.next.store(tasks, Ordering::Relaxed);
                    if let Ok(mut slot) = shared.panic.lock() {
                        *slot = Some(panic);
                    }
                }
            }
            shared.inside.fetch_sub(1, Ordering::SeqCst);
            idle_since = Instant::now();
            looks = 0;
            continue;
        }
        std::hint::spin_loop();
        looks += 1;
        if looks.is_multiple_of(64) && idle_since.elapsed() > SPIN {
            std::thread::park_timeout(Duration::from_millis(50));
            looks = 0;
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for handle in &self.handles {
            handle.unpark();
        }
        for worker in self.workers.drain(..) {
            // A worker's panic was handed to `run`; there is nothing left to report.
            worker.join().ok();
        }
    }
}

/// A mutable slice of which tasks take parts that do not overlap.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the parts that threads take do not overlap, by the contract of `part`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// The address of an element, for writes that no rectangle of rows describes.
    ///
    /// # Safety
    /// No two threads may write the same element.
    pub(crate) unsafe fn pointer(&self, at: usize) -> *mut T {
        assert!(at <= self.len);
        // SAFETY: in bounds by the assertion.
        unsafe { self.start.add(at) }
    }
}

/// Runs `f` over row blocks of a matrix with `width` columns, `block` rows a task.
pub(crate) fn for_row_blocks(
    threads: &Threads,
    out: &mut [f32],
    width: usize,
    block: usize,
    f: impl Fn(usize, &mut [f32]) + Sync,
) {
    let rows = out.len() / width.max(1);
    let out = Disjoint::new(out);
    threads.run(rows.div_ceil(block), |task| {
        let rows = task * block..((task + 1) * block).min(rows);
        // SAFETY: row blocks of different tasks do not overlap.
        let part = unsafe { out.part(rows.start * width..rows.end * width) };
        f(rows.start, part);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for count in [1, 2, 4] {
            let threads = Threads::new(count);
            for tasks in [0usize, 1, 2, 3, 17, 1000] {
                let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                threads.run(tasks, |t| {
                    hits[t].fetch_add(1, Ordering::Relaxed);
                });
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1), "{count} {tasks}");
            }
        }
    }

    #[test]
    fn many_short_loops_and_pauses() {
        let threads = Threads::new(3);
        let sum = AtomicUsize::new(0);
        for i in 0..20_000 {
            threads.run(4, |t| {
                sum.fetch_add(t, Ordering::Relaxed);
            });
            if i % 5000 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), 20_000 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let threads = Threads::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            threads.run(100, |t| assert!(t != 50, "task 50"));
        }));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        threads.run(10, |t| {
            sum.fetch_add(t, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
    }
}
