//! Rates of the kernels that matter: products, attention, eviction.

use std::hint::black_box;
use std::time::{Duration, Instant};

use batchmax_kernels::append::{AppendItem, append};
use batchmax_kernels::attend::{AttendItem, AttendShape, attend_decode, attend_prefill};
use batchmax_kernels::evict::{EvictItem, Protect, evict};
use batchmax_kernels::gemm::{Packed, WeightFormat, gemm};
use batchmax_kernels::kv::{BlockPool, Codec, HeadCache, KeyAxis, KvFormat};
use batchmax_kernels::pack::{PackItem, pack};
use batchmax_kernels::threads::Threads;
use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};

/// The attention of a model of 135 million parameters.
const SHAPE: AttendShape =
    AttendShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, softcap: None, window: None };
const WIDTH: usize = (9 + 2 * 3) * 64;

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7123).sin()).collect()
}

const FORMATS: [WeightFormat; 4] =
    [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q4, WeightFormat::Q8];

/// Products: one element is one multiply-add, so 1 Gelem/s is 2 GFLOP/s.
fn products(c: &mut Criterion) {
    for threads in [1, 2] {
        let pool = Threads::new(threads);
        let mut group = c.benchmark_group(format!("gemm/{threads} threads"));
        for (n, k) in [(1536, 576), (576, 1536)] {
            for format in FORMATS {
                let w = Packed::synthetic(n, k, format, 1, 0.05);
                for m in [1, 8, 32, 512] {
                    let (x, mut out) = (noise(m * k), vec![0.0; m * n]);
                    group.throughput(Throughput::Elements((m * n * k) as u64));
                    group.bench_function(BenchmarkId::new(format!("{n}x{k} {format:?}"), m), |b| {
                        b.iter(|| gemm(&pool, black_box(&x), m, &w, None, false, &mut out));
                    });
                }
            }
        }
        // Larger than any cache: the rate of the memory.
        for format in FORMATS {
            let w = Packed::synthetic(32_768, 4096, format, 1, 0.05);
            for m in [1, 4] {
                let (x, mut out) = (noise(m * 4096), vec![0.0; m * 32_768]);
                group.throughput(Throughput::Bytes(w.bytes() as u64));
                group.bench_function(BenchmarkId::new(format!("32768x4096 {format:?}"), m), |b| {
                    b.iter(|| gemm(&pool, black_box(&x), m, &w, None, false, &mut out));
                });
            }
        }
        group.finish();
    }
}

fn caches(pool: &mut BlockPool, sequences: usize, tokens: usize) -> Vec<Vec<HeadCache>> {
    let mut all = Vec::new();
    for _ in 0..sequences {
        let mut heads: Vec<HeadCache> = (0..3).map(|_| HeadCache::default()).collect();
        for head in &mut heads {
            head.fill(pool, tokens).expect("room");
        }
        all.push(heads);
    }
    all
}

fn items(caches: &[Vec<HeadCache>], rows: usize) -> Vec<AttendItem<'_>> {
    caches
        .iter()
        .enumerate()
        .map(|(i, heads)| AttendItem { heads, first_row: i * rows, rows, at: None })
        .collect()
}

fn attention(c: &mut Criterion) {
    for threads in [1, 2] {
        let workers = Threads::new(threads);
        let mut group = c.benchmark_group(format!("attention/{threads} threads"));
        for (sequences, tokens) in [(1, 2048), (64, 512), (64, 4096)] {
            let mut pool = BlockPool::new(64, KvFormat::F16, 1 << 32);
            let caches = caches(&mut pool, sequences, tokens);
            let (qkv, mut out) = (noise(sequences * WIDTH), vec![0.0; sequences * 9 * 64]);
            group.throughput(Throughput::Bytes(pool.held_bytes()));
            group.bench_function(BenchmarkId::new(format!("decode {sequences}"), tokens), |b| {
                let items = items(&caches, 1);
                b.iter(|| {
                    attend_decode(&workers, &pool, &items, &SHAPE, &qkv, WIDTH, &mut out, None);
                });
            });
        }
        for (sequences, tokens) in [(1, 2048), (64, 2048)] {
            packed_decode(&mut group, &workers, sequences, tokens);
        }
        for rows in [256, 2048] {
            let mut pool = BlockPool::new(64, KvFormat::F16, 1 << 30);
            let caches = caches(&mut pool, 1, rows);
            let (qkv, mut out) = (noise(rows * WIDTH), vec![0.0; rows * 9 * 64]);
            // Multiply-adds of the visible half: 1 Gelem/s is 2 GFLOP/s.
            group.throughput(Throughput::Elements((9 * 64 * rows * (rows + 1)) as u64));
            group.bench_function(BenchmarkId::new("prefill", rows), |b| {
                let items = items(&caches, rows);
                b.iter(|| {
                    attend_prefill(&workers, &pool, &items, &SHAPE, &qkv, WIDTH, &mut out, None);
                });
            });
        }
        group.finish();
    }
}

/// Decode over caches of the same tokens in every form; a rate would not compare, so times only.
fn packed_decode(
    group: &mut BenchmarkGroup<'_, WallTime>,
    workers: &Threads,
    sequences: usize,
    tokens: usize,
) {
    let (qkv, mut out) = (noise(sequences * WIDTH), vec![0.0; sequences * 9 * 64]);
    for bits in [16, 8, 4, 2, 1] {
        for (name, key_axis) in [("channel", KeyAxis::Channel), ("token", KeyAxis::Token)] {
            let format = if bits == 16 && name == "token" { KvFormat::Fp8 } else { KvFormat::F16 };
            let mut pool = BlockPool::new(64, format, 1 << 32);
            let mut caches = caches(&mut pool, sequences, tokens);
            if bits < 16 {
                let codec = Codec { bits, group: 32, key_axis };
                let mut items: Vec<PackItem<'_>> = caches
                    .iter_mut()
                    .map(|heads| PackItem { heads, keys: tokens, values: tokens })
                    .collect();
                pack(workers, &mut pool, &mut items, codec).expect("room");
            }
            let name = if bits == 16 { format!("{format:?}") } else { format!("{bits} {name}") };
            group.throughput(Throughput::Bytes(pool.held_bytes()));
            let id = BenchmarkId::new(format!("decode {sequences} {name}"), tokens);
            group.bench_function(id, |b| {
                let items = items(&caches, 1);
                b.iter(|| {
                    attend_decode(workers, &pool, &items, &SHAPE, &qkv, WIDTH, &mut out, None);
                });
            });
        }
    }
}

fn cache_upkeep(c: &mut Criterion) {
    let workers = Threads::new(1);
    let mut group = c.benchmark_group("cache/1 thread");
    let qkv = noise(256 * WIDTH);
    let positions: Vec<u32> = (0..256).collect();
    group.bench_function("append 256 rows", |b| {
        let mut pool = BlockPool::new(64, KvFormat::F16, 1 << 30);
        let mut heads: Vec<HeadCache> = (0..3).map(|_| HeadCache::default()).collect();
        b.iter(|| {
            heads.iter_mut().for_each(|h| h.clear(&mut pool));
            let mut items =
                [AppendItem { heads: &mut heads, first_row: 0, rows: 256, positions: &positions }];
            append(&workers, &mut pool, &mut items, &qkv, WIDTH, 9 * 64, 12 * 64, 64)
                .expect("room");
        });
    });
    let scores = vec![noise(4096); 3];
    group.bench_function("evict 4096 to 1024", |b| {
        let mut pool = BlockPool::new(64, KvFormat::F16, 1 << 30);
        let mut heads = caches(&mut pool, 1, 4096).remove(0);
        b.iter_batched(
            || (),
            |()| {
                heads.iter_mut().for_each(|h| h.fill(&mut pool, 0).expect("room"));
                for head in &mut heads {
                    head.reserve(&mut pool, 4096).expect("room");
                    head.positions.extend(0..4096);
                }
                let mut items = [EvictItem { keep: vec![1024; 3], heads: &mut heads, seen: 4096 }];
                evict(
                    &workers,
                    &mut pool,
                    &mut items,
                    &scores,
                    Protect { sinks: 4, recent: 32 },
                    None,
                )
                .expect("room");
            },
            BatchSize::PerIteration,
        );
    });
    for (bits, key_axis) in [(4, KeyAxis::Channel), (8, KeyAxis::Token)] {
        group.bench_function(format!("pack 2048 to {bits} bits {key_axis:?}"), |b| {
            let mut pool = BlockPool::new(64, KvFormat::F16, 1 << 30);
            let mut heads = caches(&mut pool, 1, 2048).remove(0);
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    heads.iter_mut().for_each(|h| h.fill(&mut pool, 2048).expect("room"));
                    let mut items = [PackItem { heads: &mut heads, keys: 2048, values: 2048 }];
                    let codec = Codec { bits, group: 32, key_axis };
                    let start = Instant::now();
                    pack(&workers, &mut pool, &mut items, codec).expect("room");
                    spent += start.elapsed();
                }
                spent
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(15)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(600));
    targets = products, attention, cache_upkeep
}
criterion_main!(benches);
