//! Time that others on the machine take away from as little as can be.

use std::sync::OnceLock;
use std::time::Instant;

use batchmax_kernels::threads::Threads;

/// Seconds since some moment: of this thread's work if it is the only one, else of the clock.
pub(crate) fn now(threads: &Threads) -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let own = if threads.count() == 1 { own_time() } else { None };
    own.unwrap_or_else(|| START.get_or_init(Instant::now).elapsed().as_secs_f64())
}

/// Seconds that this thread has spent on a processor.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn own_time() -> Option<f64> {
    #[repr(C)]
    struct TimeSpec {
        seconds: i64,
        nanoseconds: i64,
    }
    unsafe extern "C" {
        fn clock_gettime(clock: i32, time: *mut TimeSpec) -> i32;
    }
    /// `CLOCK_THREAD_CPUTIME_ID`.
    const OWN: i32 = 3;
    let mut time = TimeSpec { seconds: 0, nanoseconds: 0 };
    // SAFETY: the structure is the system's for 64-bit Linux, and the C library is linked by the standard library.
    let failed = unsafe { clock_gettime(OWN, &mut time) } != 0;
    (!failed).then_some(time.seconds as f64 + time.nanoseconds as f64 * 1e-9)
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
fn own_time() -> Option<f64> {
    None
}
