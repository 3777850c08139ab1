//! Kernels on whole caches move each byte once: the rows of the table whose families have no file of their own.

use super::cases::{self, Case};
use super::decode::{layer_of, shape_of};
use super::gpu::{Arg, Gpu, available};
use super::mirror::{Mirror, Room, items};
use super::ranking::{mass, scored};
use super::selecting::Index;
use super::testing::Layer;
use super::writing::append;
use batchmax_kernels::cuda::emulated::shim::Moved;

/// Runs the kernel of a case.
fn run(case: &Case) -> Moved {
    let mut layer = layer_of(shape_of(case), case.format, case.tokens);
    let mut gpu = Gpu::default();
    let (_, kv_heads, dim) = case.heads;
    let longest = case.tokens.iter().copied().max().unwrap_or(0);
    match case.family {
        "append" => {
            let empty = Layer::new(case.tokens.len(), layer.shape, case.format);
            let mirror = Mirror::new(&mut gpu, &empty, Room { tokens: longest, ..Room::default() });
            layer = empty;
            layer.feed(31, case.tokens);
            append(&mut gpu, &mirror, &layer)
        }
        "norms" => {
            let mirror = Mirror::new(&mut gpu, &layer, Room::default());
            scored(&mut gpu, &mirror, &layer, "rank_norms", vec![]).0
        }
        "mass" => {
            let mirror = Mirror::new(&mut gpu, &layer, Room::default());
            let sums = gpu.output(case.tokens.len() * kv_heads * mirror.stride * 4);
            let counted = vec![(1, u32::MAX, 1.0); case.tokens.len()];
            mass(&mut gpu, &mirror, &layer, &counted, sums, 0)
        }
        "index" => {
            let mirror = Mirror::new(&mut gpu, &layer, Room::default());
            let index = Index::new(&mut gpu, &mirror, case.tokens.len() * kv_heads, cases::PAGE);
            index.update(&mut gpu, &mirror, &layer, &vec![u32::MAX; case.tokens.len()])
        }
        "rows-out" => {
            let mirror = Mirror::new(&mut gpu, &layer, Room::default());
            let bytes = layer.pool.token_bytes();
            // All tokens, as if they had come with this step.
            layer.step = case.tokens.iter().map(|t| (0, *t)).collect();
            let mut from = Vec::new();
            let mut next = 0u32;
            for tokens in case.tokens {
                for _ in 0..kv_heads {
                    from.push(next);
                    next += *tokens as u32;
                }
            }
            let (list, from) = (gpu.input(&items(&layer)), gpu.input(&from));
            let rows = gpu.output(next as usize * bytes);
            let arguments = [mirror.kv(&gpu), Arg::At(list), Arg::At(from), Arg::At(rows)];
            let grid = [(longest * bytes / 8).div_ceil(256), kv_heads, case.tokens.len()];
            gpu.launch("rows_out", grid, 256, 0, &arguments)
        }
        "gather" => {
            let mirror = Mirror::new(&mut gpu, &layer, Room::default());
            let none = Layer::new(case.tokens.len(), layer.shape, case.format);
            let scratch = Mirror::new(&mut gpu, &none, Room { tokens: longest, ..Room::default() });
            let sets = case.tokens.len() * kv_heads;
            // Every second token.
            let chosen: Vec<u32> =
                (0..sets).flat_map(|_| (0..longest as u32).map(|i| 2 * i)).collect();
            let counts: Vec<u32> =
                case.tokens.iter().flat_map(|t| vec![*t as u32 / 2; kv_heads]).collect();
            let (list, at) = (gpu.input(&items(&layer)), gpu.input(&chosen));
            let counts = gpu.input(&counts);
            let arguments = [
                mirror.kv(&gpu),
                scratch.kv(&gpu),
                Arg::At(list),
                Arg::At(at),
                Arg::U32(longest as u32),
                Arg::At(counts),
            ];
            let grid = [(longest / 2 * 2 * dim / 8).div_ceil(256), kv_heads, case.tokens.len()];
            gpu.launch("gather", grid, 256, 0, &arguments)
        }
        other => panic!("{other} has a file of its own"),
    }
}

#[test]
fn each_byte_moves_once() {
    if !available() {
        return;
    }
    // Each block of `mass` reads the queries anew, from nearer memory: a quarter of 32 keys where four heads share them.
    let families = [("append", 1.1), ("norms", 1.1), ("mass", 1.3), ("index", 1.1)];
    let mut wrong = Vec::new();
    for (family, most) in families.into_iter().chain([("rows-out", 1.1), ("gather", 1.1)]) {
        let cases = cases::of(family);
        assert!(!cases.is_empty(), "{family}");
        for case in cases {
            let share = run(&case).bytes() / case.bytes();
            if share < 0.97 || share > most {
                wrong.push(format!("{case:?}: {share} of the floor"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
