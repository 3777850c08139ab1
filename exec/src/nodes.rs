//! Memory nodes of the machine (NUMA): a run stays on one of them.
//!
//! Decode streams weights and caches; from another node's memory that is half as fast or slower, and the threads of a kernel
//! wait for the slowest. So a run takes the cores of one node, and its memory comes from there, since a page lies where it
//! was first written. Only who asks for more threads than a node has gets them all over the machine.

use std::fs;
use std::path::Path;

/// Where Linux lists its nodes.
const LISTED: &str = "/sys/devices/system/node";

/// CPUs of each node that this process may use; nodes without any are left out. Empty where the system does not say.
#[must_use]
pub fn nodes() -> Vec<Vec<usize>> {
    let allowed = allowed();
    let mut nodes = listed(Path::new(LISTED));
    for node in &mut nodes {
        node.retain(|cpu| allowed.is_empty() || allowed.contains(cpu));
    }
    nodes.retain(|node| !node.is_empty());
    nodes
}

/// Threads of a run where nobody asks for a number: the cores of the largest node, or all where there is one.
#[must_use]
pub fn usual_threads(nodes: &[Vec<usize>]) -> Option<usize> {
    nodes.iter().map(Vec::len).max().filter(|_| nodes.len() > 1)
}

/// The node on which `threads` threads run: the smallest that has as many CPUs. `None` where there is one node, or none is
/// large enough.
#[must_use]
pub fn node_for(nodes: &[Vec<usize>], threads: usize) -> Option<&[usize]> {
    let enough = nodes.iter().filter(|node| nodes.len() > 1 && node.len() >= threads);
    enough.min_by_key(|node| node.len()).map(Vec::as_slice)
}

/// Keeps this thread, and those that it will start, on `cpus`. Whether the system did so.
pub fn stay_on(cpus: &[usize]) -> bool {
    #[cfg(target_os = "linux")]
    {
        let mut set = rustix::thread::CpuSet::new();
        cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU).for_each(|c| set.set(*c));
        set.count() > 0 && rustix::thread::sched_setaffinity(None, &set).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = cpus;
        false
    }
}

/// CPUs that this thread may use; empty where the system does not say.
fn allowed() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    if let Ok(set) = rustix::thread::sched_getaffinity(None) {
        return (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect();
    }
    Vec::new()
}

/// The nodes that a directory lists, by their numbers.
fn listed(directory: &Path) -> Vec<Vec<usize>> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut nodes: Vec<(usize, Vec<usize>)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            let cpus = fs::read_to_string(entry.path().join("cpulist")).ok()?;
            Some((number, cpu_list(&cpus)?))
        })
        .collect();
    nodes.sort();
    nodes.into_iter().map(|(_, cpus)| cpus).collect()
}

/// `0-3,8,10-11`, as the kernel writes it; `None` for anything else.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    /// No machine has more; a longer list is no list of CPUs.
    const MOST: usize = 1 << 16;
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
        if to >= MOST || from > to {
            return None;
        }
        cpus.extend(from..=to);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(cpu_list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(cpu_list("\n"), Some(Vec::new()));
        for wrong in ["3-1", "a", "0-99999999999", "1-", "-1", "0-70000"] {
            assert_eq!(cpu_list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn nodes_are_read_in_their_order() {
        let directory = tempfile::tempdir().expect("a directory");
        for (name, cpus) in [("node10", "4-5"), ("node2", "0-3"), ("node3", "nonsense")] {
            let node = directory.path().join(name);
            fs::create_dir(&node).expect("made");
            fs::write(node.join("cpulist"), cpus).expect("written");
        }
        fs::write(directory.path().join("possible"), "0-10").expect("written");
        assert_eq!(listed(directory.path()), [vec![0, 1, 2, 3], vec![4, 5]]);
        assert_eq!(listed(&directory.path().join("none")), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn a_run_takes_the_smallest_node_that_is_large_enough() {
        let nodes = [vec![0, 1, 2, 3], vec![4, 5]];
        assert_eq!(usual_threads(&nodes), Some(4));
        assert_eq!(node_for(&nodes, 2), Some(&[4, 5][..]));
        assert_eq!(node_for(&nodes, 3), Some(&[0, 1, 2, 3][..]));
        assert_eq!(node_for(&nodes, 5), None);
        // One node is the whole machine: nobody is bound.
        assert_eq!((usual_threads(&nodes[..1]), node_for(&nodes[..1], 2)), (None, None));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_stays_where_it_is_put() {
        // On a thread of its own: affinity would stay with the others of this process.
        std::thread::spawn(|| {
            let all = allowed();
            let one = [*all.last().expect("a CPU")];
            assert!(stay_on(&one));
            assert_eq!(allowed(), one);
            // Threads that start now stay there, too.
            assert_eq!(std::thread::spawn(allowed).join().expect("it ran"), one);
            assert!(!stay_on(&[]));
        })
        .join()
        .expect("it ran");
    }
}
