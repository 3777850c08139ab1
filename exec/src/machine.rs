//! The machine at hand, in its own words.

use std::fs;

use batchmax_sim::units::Bytes;

/// The processor's name, or the architecture where the system does not say.
#[must_use]
pub fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|l| {
            l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// The instruction set that the kernels use here.
#[must_use]
pub fn isa() -> String {
    batchmax_kernels::gemm::isa().to_string()
}

/// Cores that this process may use.
#[must_use]
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Memory of the machine, bytes; 0 where the system does not say.
#[must_use]
pub fn memory() -> Bytes {
    Bytes(kib_line("/proc/meminfo", "MemTotal:").unwrap_or(0) * 1024)
}

/// The last level cache, bytes, where the system says.
#[must_use]
pub fn last_level_cache() -> Option<Bytes> {
    (0..8).rev().find_map(|i| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size");
        let text = fs::read_to_string(path).ok()?;
        let kib: u64 = text.trim().strip_suffix('K')?.parse().ok()?;
        Some(Bytes(kib * 1024))
    })
}

/// Largest resident size of this process since its start or the last [`reset_peak_rss`].
#[must_use]
pub fn peak_rss() -> Bytes {
    Bytes(kib_line("/proc/self/status", "VmHWM:").unwrap_or(0) * 1024)
}

/// Resident size of this process now.
#[must_use]
pub fn rss() -> Bytes {
    Bytes(kib_line("/proc/self/status", "VmRSS:").unwrap_or(0) * 1024)
}

/// Forgets the peak so far, so that a later [`peak_rss`] is that of one run. `false` where the system can't.
#[must_use]
pub fn reset_peak_rss() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn kib_line(path: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|l| l.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}
