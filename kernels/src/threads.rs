//! A pool of threads that stays alive between kernels.
//!
//! A kernel call takes microseconds at batch 1, so dispatch has to cost less than that: workers spin for a moment before
//! they park, tasks are claimed from one counter, and the caller works too. A worker that the system has descheduled
//! holds nobody up, because the caller only waits for tasks that somebody has begun.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker watches for work before it parks.
const SPIN: Duration = Duration::from_micros(40);

// The gate: bit 0 shuts the pool down, bit 1 says that a job is open, 2..32 count the workers inside it, 32..64 number
// the jobs. One word, so that a worker cannot enter a job that its caller has just closed.
const STOP: u64 = 1;
const OPEN: u64 = 2;
const INSIDE: u64 = 4;
const INSIDE_MASK: u64 = (u32::MAX as u64) & !(STOP | OPEN);
const EPOCH: u64 = 1 << 32;

type Payload = Box<dyn Any + Send>;

#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize),
    tasks: usize,
}

unsafe fn nothing(_: *const (), _: usize) {}

struct Shared {
    gate: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Job>,
    panic: Mutex<Option<Payload>>,
    busy: AtomicBool,
}

// SAFETY: `job` is written only by the caller that holds `busy`, while the gate is closed with nobody inside; it is read
// only by workers inside.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is used only between opening and closing the gate, while the caller keeps its target.
unsafe impl Send for Shared {}

impl Shared {
    fn work(&self, job: Job) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            // SAFETY: `data` is the closure that `call` was made for; the caller keeps it until nobody is inside.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.data, task) }));
            if let Err(payload) = result {
                self.next.store(job.tasks, Ordering::Relaxed);
                let mut slot = self.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                slot.get_or_insert(payload);
            }
        }
    }
}

struct Worker {
    parked: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// A pool of threads. Dropping it ends them.
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

impl Threads {
    /// A pool of `n` threads, the caller's included.
    ///
    /// # Panics
    /// If `n` is 0 or the system refuses a thread.
    #[must_use]
    pub fn new(n: usize) -> Self {
        assert!(n >= 1, "a pool needs at least one thread");
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { data: std::ptr::null(), call: nothing, tasks: 0 }),
            panic: Mutex::new(None),
            busy: AtomicBool::new(false),
        });
        let workers = (1..n)
            .map(|i| {
                let parked = Arc::new(AtomicBool::new(false));
                let (shared, flag) = (Arc::clone(&shared), Arc::clone(&parked));
                let handle = std::thread::Builder::new()
                    .name(format!("kernel-{i}"))
                    .spawn(move || serve(&shared, &flag))
                    .expect("the system refused a thread");
                Worker { parked, handle: Some(handle) }
            })
            .collect();
        Self { shared, workers }
    }

    /// Number of threads, the caller's included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` once for every task in `0..tasks` and returns when all are done. A panic in `f` is passed on, and tasks
    /// that nobody had begun by then are dropped. A call from inside a task, or beside another caller, runs inline.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, f: F) {
        unsafe fn call<F: Fn(usize)>(data: *const (), task: usize) {
            // SAFETY: `run` passes the address of its `f`.
            unsafe { (*data.cast::<F>())(task) }
        }
        let shared = &*self.shared;
        if tasks <= 1 || self.workers.is_empty() || shared.busy.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(f);
            return;
        }
        let job = Job { data: (&raw const f).cast(), call: call::<F>, tasks };
        // SAFETY: this caller holds `busy`, the gate is closed and nobody is inside.
        unsafe { *shared.job.get() = job };
        shared.next.store(0, Ordering::Relaxed);
        let gate = shared.gate.load(Ordering::Relaxed);
        // Sequentially consistent with a worker's `parked` flag: either it sees the job or we see the flag.
        shared.gate.store(gate.wrapping_add(EPOCH) | OPEN, Ordering::SeqCst);
        for worker in self.workers.iter().take(tasks - 1) {
            if worker.parked.load(Ordering::SeqCst)
                && let Some(handle) = &worker.handle
            {
                handle.thread().unpark();
            }
        }
        shared.work(job);
        shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.gate.load(Ordering::Acquire) & INSIDE_MASK != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let payload = shared.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        shared.busy.store(false, Ordering::Release);
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }

    /// Cuts `out` into groups of rows and calls `f(first row, group)` for each, in parallel where that pays.
    pub(crate) fn for_rows<T: Send>(
        &self,
        out: &mut [T],
        width: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        /// Elements that are worth a task, some microseconds of element-wise work.
        const WORTH: usize = 1 << 13;
        let rows = out.len() / width;
        let share = rows.div_ceil(self.count() * 4).max(WORTH.div_ceil(width)).max(1);
        let parts = Disjoint::new(out);
        self.run(rows.div_ceil(share), |task| {
            let (first, last) = (task * share, ((task + 1) * share).min(rows));
            // SAFETY: each task has rows of its own.
            f(first, unsafe { parts.slice_mut(first * width..last * width) });
        });
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.gate.fetch_or(STOP, Ordering::SeqCst);
        for worker in &mut self.workers {
            if let Some(handle) = worker.handle.take() {
                handle.thread().unpark();
                // A worker catches its tasks' panics, so it has none of its own to report.
                let _ = handle.join();
            }
        }
    }
}

/// A worker's life: wait for a job it has not served, enter, work, leave.
fn serve(shared: &Shared, parked: &AtomicBool) {
    let mut served = 0;
    loop {
        let Some(gate) = wait(shared, parked, served) else {
            return;
        };
        let entered = shared.gate.compare_exchange_weak(
            gate,
            gate + INSIDE,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        if entered.is_ok() {
            served = gate >> 32;
            // SAFETY: inside the gate the job stays as it is.
            let job = unsafe { *shared.job.get() };
            shared.work(job);
            shared.gate.fetch_sub(INSIDE, Ordering::Release);
        }
    }
}

/// Waits until a job other than `served` is open: the gate then, or `None` at the end.
fn wait(shared: &Shared, parked: &AtomicBool, served: u64) -> Option<u64> {
    let news = |gate: u64| gate & STOP != 0 || (gate & OPEN != 0 && gate >> 32 != served);
    let answer = |gate: u64| if gate & STOP != 0 { None } else { Some(gate) };
    loop {
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..32 {
                let gate = shared.gate.load(Ordering::Acquire);
                if news(gate) {
                    return answer(gate);
                }
                std::hint::spin_loop();
            }
        }
        parked.store(true, Ordering::SeqCst);
        while !news(shared.gate.load(Ordering::SeqCst)) {
            std::thread::park();
        }
        parked.store(false, Ordering::Relaxed);
    }
}

/// A mutable slice of which tasks take disjoint parts.
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are disjoint by the contract of `slice_mut`, so sharing is like sending each part to one thread.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as for the slice itself.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Of this slice.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements in `range`.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    #[must_use]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part outside the slice");
        // SAFETY: inside the slice by the check above; not aliased by the contract.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start)
        }
    }

    /// One element.
    ///
    /// # Safety
    /// As for [`Self::slice_mut`].
    #[must_use]
    pub unsafe fn item_mut(&self, index: usize) -> &'a mut T {
        assert!(index < self.len, "element outside the slice");
        // SAFETY: inside the slice by the check above; not aliased by the contract.
        unsafe { &mut *self.start.add(index) }
    }

    /// Address of the first element, for kernels that write strided parts.
    #[must_use]
    pub fn as_ptr(&self) -> *mut T {
        self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for n in [1, 2, 4] {
            let threads = Threads::new(n);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                threads.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_jobs_with_pauses_do_not_hang() {
        let threads = Threads::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..3000 {
            threads.run(4, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            if round % 100 == 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), 3000 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let threads = Threads::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            threads.run(64, |i| assert!(i != 13, "bad luck"));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        threads.run(10, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
    }

    #[test]
    fn a_nested_run_runs_inline() {
        let threads = Threads::new(2);
        let sum = AtomicUsize::new(0);
        threads.run(4, |_| {
            threads.run(3, |j| {
                sum.fetch_add(j, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.load(Ordering::Relaxed), 12);
    }

    #[test]
    fn disjoint_parts_are_written_in_parallel() {
        let threads = Threads::new(2);
        let mut data = vec![0usize; 100];
        let parts = Disjoint::new(&mut data);
        threads.run(10, |i| {
            // SAFETY: each task has ten elements of its own.
            let part = unsafe { parts.slice_mut(i * 10..(i + 1) * 10) };
            part.fill(i);
        });
        assert!(data.iter().enumerate().all(|(i, x)| *x == i / 10));
    }
}
