//! How far kernels are from what this machine can do: its peaks are measured first, then each kernel is held against the one
//! that binds, arithmetic or memory. `cargo bench -p batchmax-kernels --bench roofline [-- 'gemm Q4' decode]`.
//!
//! All of it takes some minutes; names of kernels or of rows (`'gemm Q4 512 x'`) choose among them. A shared machine's rate
//! changes from moment to moment, and other work only ever adds: every call is followed by as much of what binds it at its
//! peak, and a share is that of the least times of both. One thread's times are those that it spent on the processor, several threads' those of a clock. Weights and
//! caches are taken in turn from rings several times as large as the last cache, as a model's layers are.

#![expect(clippy::print_stdout, reason = "the table is what this is for")]

#[path = "roofline/clock.rs"]
mod clock;
#[path = "roofline/peaks.rs"]
mod peaks;

use std::hint::black_box;
use std::time::{Duration, Instant};

use batchmax_kernels::attend::{AttendItem, AttendShape, attend_decode, attend_prefill};
use batchmax_kernels::gemm::{Packed, WeightFormat, gemm, isa};
use batchmax_kernels::kv::{BlockPool, Codec, HeadCache, KeyAxis, KvFormat};
use batchmax_kernels::pack::{PackItem, pack};
use batchmax_kernels::threads::Threads;
use peaks::{Limit, Peaks};

/// The attention of a model of 135 million parameters, and its weights as N x K.
const SHAPE: AttendShape =
    AttendShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, softcap: None, window: None };
const WIDTH: usize = (9 + 2 * 3) * 64;
const WEIGHTS: [(usize, usize); 5] =
    [(960, 576), (576, 576), (3072, 576), (576, 1536), (49_152, 576)];
/// Bytes of a ring of weights or caches.
const RING: usize = 96 << 20;
/// Time for a row, and repetitions at least.
const SPAN: Duration = Duration::from_millis(240);
const LEAST: usize = 25;

/// The least time of a call on these threads, in seconds. Each call gets the next number.
pub(crate) fn least_time(threads: &Threads, mut call: impl FnMut(usize)) -> f64 {
    let (start, mut best, mut calls) = (Instant::now(), f64::INFINITY, 0);
    let span = SPAN * threads.count() as u32;
    while calls < LEAST || start.elapsed() < span {
        let begin = clock::now(threads);
        call(calls);
        best = best.min(clock::now(threads) - begin);
        calls += 1;
    }
    best
}

/// Whether the command line asks for a kernel, or for some of its rows.
fn wanted(kernel: &str) -> bool {
    let mut asked = std::env::args().skip(1).filter(|a| !a.starts_with('-')).peekable();
    asked.peek().is_none() || asked.any(|a| kernel.contains(&a) || a.contains(kernel))
}

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7123).sin()).collect()
}

/// What a kernel does: multiply-adds, the peak that they have, and bytes that come from memory.
struct Work {
    products: f64,
    integers: bool,
    bytes: f64,
}

/// Times a kernel in turn with what binds it, and prints a row of the table. Each call gets the next number.
fn report(
    (threads, peaks): &(Threads, Peaks),
    kernel: &str,
    shape: &str,
    work: &Work,
    mut call: impl FnMut(usize),
) {
    let (limit, peak) =
        if work.integers { (Limit::Integers, peaks.int8) } else { (Limit::Floats, peaks.f32) };
    let memory_binds = work.bytes / peaks.memory > work.products / peak;
    let (limit, amount) =
        if memory_binds { (Limit::Memory, work.bytes) } else { (limit, work.products) };
    if !wanted(&format!("{kernel} {shape}")) {
        return;
    }
    let (start, mut calls) = (Instant::now(), 0);
    let (mut time, mut best) = (f64::INFINITY, f64::INFINITY);
    while calls < LEAST || start.elapsed() < SPAN * threads.count() as u32 {
        let begin = clock::now(threads);
        call(calls);
        let between = clock::now(threads);
        let done = peaks.run(threads, limit, amount);
        best = best.min((clock::now(threads) - between) * amount / done);
        time = time.min(between - begin);
        calls += 1;
    }
    let share = best / time;
    println!(
        "| {kernel} | {shape} | {} | {:.1} | {:.1} | {:.1} | {limit:?} | {:.0} % |",
        threads.count(),
        time * 1e6,
        work.products / time * 1e-9,
        work.bytes / time * 1e-9,
        share * 100.0,
    );
}

fn products(pools: &[(Threads, Peaks)]) {
    for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q4, WeightFormat::Q8] {
        let kernel = format!("gemm {format:?}");
        if !wanted(&kernel) {
            continue;
        }
        for (n, k) in WEIGHTS {
            let first = Packed::synthetic(n, k, format, 0, 0.05);
            let bytes = first.bytes();
            let mut ring = vec![first];
            ring.extend(
                (1..RING / bytes).map(|seed| Packed::synthetic(n, k, format, seed as u64, 0.05)),
            );
            // Of the head no prompt needs more than its last row.
            for m in [1, 8, 32, 128, 512].into_iter().filter(|m| n < 10_000 || *m <= 32) {
                let (x, mut out) = (noise(m * k), vec![0.0; m * n]);
                for pool in pools {
                    let work = Work {
                        products: (m * n * k) as f64,
                        integers: format.code_bits().is_some(),
                        bytes: bytes as f64,
                    };
                    report(pool, &kernel, &format!("{m} x {n} x {k}"), &work, |i| {
                        let weights = &ring[i % ring.len()];
                        gemm(&pool.0, black_box(&x), m, weights, None, false, &mut out);
                    });
                }
            }
        }
    }
}

/// The caches of a layer's sequences.
struct Layer {
    pool: BlockPool,
    caches: Vec<Vec<HeadCache>>,
}

impl Layer {
    fn new(sequences: usize, tokens: usize, format: KvFormat, codec: Option<Codec>) -> Self {
        let mut pool = BlockPool::new(SHAPE.head_dim, format, 1 << 32);
        let mut caches = Vec::new();
        for _ in 0..sequences {
            let mut heads: Vec<HeadCache> =
                (0..SHAPE.kv_heads).map(|_| HeadCache::default()).collect();
            for head in &mut heads {
                head.fill(&mut pool, tokens).expect("room");
            }
            if let Some(codec) = codec {
                let mut items = [PackItem { heads: &mut heads, keys: tokens, values: tokens }];
                pack(&Threads::new(1), &mut pool, &mut items, codec).expect("room");
            }
            caches.push(heads);
        }
        Self { pool, caches }
    }

    fn items(&self, rows: usize) -> Vec<AttendItem<'_>> {
        let numbered = self.caches.iter().enumerate();
        numbered
            .map(|(i, heads)| AttendItem { heads, first_row: i * rows, rows, at: None })
            .collect()
    }
}

/// Forms of a cache, and what they are called.
fn forms() -> Vec<(String, KvFormat, Option<Codec>)> {
    let mut forms: Vec<_> = [KvFormat::F32, KvFormat::F16, KvFormat::Bf16]
        .into_iter()
        .map(|format| (format!("{format:?}"), format, None))
        .collect();
    for (name, key_axis) in [("channel", KeyAxis::Channel), ("token", KeyAxis::Token)] {
        for bits in [8, 4, 2] {
            let codec = Codec { bits, group: 32, key_axis };
            forms.push((format!("{bits} bits by {name}"), KvFormat::F16, Some(codec)));
        }
    }
    forms
}

fn decode(pools: &[(Threads, Peaks)]) {
    for tokens in [512, 2048] {
        for batch in [1, 8, 32] {
            for (name, format, codec) in forms() {
                let kernel = format!("decode {name}");
                if !wanted(&kernel) {
                    continue;
                }
                let first = Layer::new(batch, tokens, format, codec);
                let bytes = first.pool.held_bytes();
                let mut ring = vec![first];
                while ring.len() < RING / bytes as usize {
                    ring.push(Layer::new(batch, tokens, format, codec));
                }
                let (qkv, mut out) = (noise(batch * WIDTH), vec![0.0; batch * 9 * 64]);
                for pool in pools {
                    let work = Work {
                        products: (batch * tokens * SHAPE.heads * SHAPE.head_dim * 2) as f64,
                        integers: false,
                        bytes: bytes as f64,
                    };
                    report(pool, &kernel, &format!("{batch} x {tokens}"), &work, |i| {
                        let layer = &ring[i % ring.len()];
                        let (blocks, items) = (&layer.pool, layer.items(1));
                        attend_decode(&pool.0, blocks, &items, &SHAPE, &qkv, WIDTH, &mut out, None);
                    });
                }
            }
        }
    }
}

fn prefill(pools: &[(Threads, Peaks)]) {
    let codec = Codec { bits: 4, group: 32, key_axis: KeyAxis::Channel };
    for (name, format, codec) in [
        ("F32", KvFormat::F32, None),
        ("F16", KvFormat::F16, None),
        ("4 bits", KvFormat::F16, Some(codec)),
    ] {
        let kernel = format!("prefill {name}");
        if !wanted(&kernel) {
            continue;
        }
        for tokens in [512, 2048, 4096] {
            for chunk in [tokens, 512] {
                // A cache as each chunk finds it.
                let ends: Vec<usize> = (chunk..=tokens).step_by(chunk).collect();
                let layers: Vec<Layer> =
                    ends.iter().map(|end| Layer::new(1, *end, format, codec)).collect();
                let (qkv, mut out) = (noise(chunk * WIDTH), vec![0.0; chunk * 9 * 64]);
                for pool in pools {
                    let bytes = layers.iter().map(|l| l.pool.held_bytes()).sum::<u64>() as f64;
                    let seen = tokens * (tokens + 1) / 2;
                    let work = Work {
                        products: (seen * SHAPE.heads * SHAPE.head_dim * 2) as f64,
                        integers: false,
                        bytes,
                    };
                    let shape = format!("{tokens} in chunks of {chunk}");
                    report(pool, &kernel, &shape, &work, |_| {
                        for layer in &layers {
                            let (blocks, items) = (&layer.pool, layer.items(chunk));
                            attend_prefill(
                                &pool.0, blocks, &items, &SHAPE, &qkv, WIDTH, &mut out, None,
                            );
                        }
                    });
                }
                if tokens == 512 {
                    break;
                }
            }
        }
    }
}

fn main() {
    let all = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut pools = Vec::new();
    println!("{}, peaks (G multiply-adds a second; GB/s):\n", isa());
    println!("| threads | f32 | int8 | memory |\n|---|---|---|---|");
    for count in if all > 1 { vec![1, all] } else { vec![1] } {
        let threads = Threads::new(count);
        let peaks = Peaks::measure(&threads);
        let rates = [peaks.f32, peaks.int8, peaks.memory].map(|rate| rate * 1e-9);
        println!("| {count} | {:.1} | {:.1} | {:.1} |", rates[0], rates[1], rates[2]);
        pools.push((threads, peaks));
    }
    println!(
        "\n| kernel | shape | threads | us | G multiply-adds/s | GB/s | bound | share of it |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    products(&pools);
    decode(&pools);
    prefill(&pools);
}
