//! Attention against a naive reference, and bit for bit against itself.

use proptest::prelude::*;

use super::decode::decode_with;
use super::prefill::prefill_with;
use super::*;
use crate::kv::KvFormat;
use crate::reference;
use crate::simd::{Isa, isa};
use crate::testing::{Layer, assert_close, bits};
use crate::threads::Threads;

fn shape(group: usize, kv_heads: usize, head_dim: usize) -> AttendShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttendShape { heads: group * kv_heads, kv_heads, head_dim, scale, softcap: None, window: None }
}

/// Outputs and log-sum-exps of the layer's last step.
fn attend(layer: &Layer, isa: Isa, threads: &Threads, decode: bool) -> (Vec<f32>, Vec<f32>) {
    attend_items(layer, isa, threads, decode, &layer.items())
}

fn attend_items(
    layer: &Layer,
    isa: Isa,
    threads: &Threads,
    decode: bool,
    items: &[AttendItem<'_>],
) -> (Vec<f32>, Vec<f32>) {
    let shape = &layer.shape;
    let mut out = vec![0.0; layer.rows() * shape.heads * shape.head_dim];
    let mut lse = vec![0.0; layer.rows() * shape.heads];
    let job =
        Job::new(&layer.pool, items, shape, &layer.qkv, layer.width, &mut out, Some(&mut lse));
    if decode {
        decode_with(isa, threads, &job);
    } else {
        prefill_with(isa, threads, &job);
    }
    (out, lse)
}

pub(crate) fn check(layer: &Layer, decode: bool) {
    check_within(layer, decode, 5e-6);
}

fn check_within(layer: &Layer, decode: bool, tolerance: f64) {
    let exact: Vec<_> = layer
        .items()
        .iter()
        .map(|item| reference::attend(&layer.pool, item, &layer.shape, &layer.qkv, layer.width))
        .collect();
    let out_exact: Vec<f64> = exact.iter().flat_map(|e| e.0.clone()).collect();
    let lse_exact: Vec<f64> = exact.iter().flat_map(|e| e.1.clone()).collect();
    let one = Threads::new(1);
    for isa in Isa::available() {
        let (out, lse) = attend(layer, isa, &layer.threads, decode);
        assert_close(&out, &out_exact, tolerance, &format!("{isa} out"));
        assert_close(&lse, &lse_exact, tolerance, &format!("{isa} lse"));
        // Each sequence alone, on one thread, has the same bits.
        for item in layer.items() {
            let (width, rows) = (
                layer.shape.heads * layer.shape.head_dim,
                item.first_row..item.first_row + item.rows,
            );
            let alone = attend_items(layer, isa, &one, decode, std::slice::from_ref(&item));
            let part = rows.start * width..rows.end * width;
            assert_eq!(bits(&alone.0[part.clone()]), bits(&out[part]), "{isa} alone");
            let part = rows.start * layer.shape.heads..rows.end * layer.shape.heads;
            assert_eq!(bits(&alone.1[part.clone()]), bits(&lse[part]), "{isa} alone");
        }
    }
}

#[test]
fn two_keys_by_hand() {
    // Keys (1, 0, ..) and (0, 1, ..), values 3 and 5 in channel 0; scores ln 2 and 0: weights 2/3 and 1/3.
    let mut layer = Layer::new(1, AttendShape { scale: 1.0, ..shape(1, 1, 8) }, KvFormat::F32);
    layer.feed(1, &[2]);
    let row = |q: f32, k: [f32; 2], v: f32| {
        let mut row = vec![0.0; 24];
        (row[0], row[8], row[9], row[16]) = (q, k[0], k[1], v);
        row
    };
    layer.qkv = [row(0.0, [1.0, 0.0], 3.0), row(2f32.ln(), [0.0, 1.0], 5.0)].concat();
    layer.caches[0][0].clear(&mut layer.pool);
    let mut items = [crate::append::AppendItem {
        heads: &mut layer.caches[0],
        first_row: 0,
        rows: 2,
        positions: &[0, 1],
    }];
    crate::append::append(&layer.threads, &mut layer.pool, &mut items, &layer.qkv, 24, 8, 16, 8)
        .expect("room");
    for decode in [false, true] {
        if decode {
            layer.step[0] = (1, 1);
        }
        let (out, lse) = attend(&layer, isa(), &layer.threads, decode);
        assert!((out[8] - 11.0 / 3.0).abs() < 1e-6);
        assert!((lse[1] - 3f32.ln()).abs() < 1e-6);
    }
    // The first row sees the first key only.
    layer.step[0] = (0, 2);
    let (out, lse) = attend(&layer, isa(), &layer.threads, false);
    assert_eq!((out[0], lse[0]), (3.0, 0.0));
}

#[test]
fn an_empty_cache_gives_zeros() {
    let layer = {
        let mut layer = Layer::new(2, shape(2, 1, 16), KvFormat::F16);
        layer.feed(1, &[1, 1]);
        layer.caches[0][0].clear(&mut layer.pool);
        layer
    };
    for decode in [false, true] {
        let (out, lse) = attend(&layer, isa(), &layer.threads, decode);
        assert!(out[..32].iter().all(|x| x.to_bits() == 0));
        assert!(lse[..2].iter().all(|x| *x == f32::NEG_INFINITY));
        assert!(lse[2].is_finite());
    }
}

#[test]
fn chunks_of_a_prompt_have_the_bits_of_the_whole() {
    for (dim, window) in [(64, None), (80, Some(37)), (64, Some(1000))] {
        let shape = AttendShape { window, ..shape(3, 2, dim) };
        let width = shape.heads * dim;
        let mut whole = Layer::new(1, shape, KvFormat::F16);
        whole.feed(3, &[217]);
        for isa in Isa::available() {
            let (out, lse) = attend(&whole, isa, &whole.threads, false);
            for cuts in [[1, 32, 31, 100, 53], [64, 64, 64, 24, 1], [7, 200, 5, 4, 1]] {
                let mut layer = Layer::new(1, shape, KvFormat::F16);
                let mut first = 0;
                for rows in cuts {
                    layer.feed(3, &[rows]);
                    let (part, part_lse) = attend(&layer, isa, &layer.threads, false);
                    assert_eq!(
                        bits(&part),
                        bits(&out[first * width..(first + rows) * width]),
                        "{isa} {cuts:?}"
                    );
                    assert_eq!(
                        bits(&part_lse),
                        bits(&lse[first * shape.heads..(first + rows) * shape.heads])
                    );
                    first += rows;
                }
            }
        }
    }
}

#[test]
fn long_caches_join_their_parts() {
    for (format, window) in
        [(KvFormat::F16, None), (KvFormat::F32, Some(700)), (KvFormat::Bf16, Some(40))]
    {
        let mut layer = Layer::new(2, AttendShape { window, ..shape(2, 1, 64) }, format);
        layer.feed(5, &[1700, 511]);
        layer.feed(5, &[1, 1]);
        check(&layer, true);
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut layer = Layer::new(1, AttendShape { scale: 40.0, ..shape(2, 1, 64) }, KvFormat::F32);
    layer.feed(8, &[70]);
    // Scores of hundreds have errors of 1e-5, and so have the exponents.
    check_within(&layer, false, 1e-3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn attention_matches_the_reference(
        seed in any::<u64>(),
        group in 1usize..=8,
        kv_heads in 1usize..=2,
        dim in prop::sample::select(vec![8usize, 64, 72, 80, 96, 128, 256]),
        format in prop::sample::select(vec![KvFormat::F32, KvFormat::F16, KvFormat::Bf16, KvFormat::Fp8]),
        softcap in prop::option::of(5.0f32..50.0),
        window in prop::option::of(1u32..90),
        before in prop::collection::vec(0usize..90, 3),
        kept in 1usize..90,
        rows in prop::collection::vec(1usize..40, 3),
    ) {
        let mut layer = Layer::new(3, AttendShape { softcap, window, ..shape(group, kv_heads, dim) }, format);
        layer.feed(seed, &before);
        layer.thin(seed, &[kept, 1000, 0]);
        layer.feed(seed, &rows);
        check(&layer, false);
        layer.feed(seed, &[1, 1, 1]);
        check(&layer, true);
    }
}

/// Rows that are named by their positions have the bits that they have among all rows.
#[test]
fn scattered_rows_see_what_stands_before_them() {
    for format in [KvFormat::F32, KvFormat::F16] {
        let mut layer = Layer::new(1, shape(3, 2, 16), format);
        layer.feed(4, &[75]);
        let (all, lse) = attend(&layer, isa(), &layer.threads, false);
        let chosen: Vec<u32> = (0..75).filter(|p| p % 7 == 3 || *p > 68).collect();
        let whole = layer.items();
        let (width, out_width) = (layer.width, 6 * 16);
        // The chosen rows, next to each other.
        let mut part = Layer::new(1, shape(3, 2, 16), format);
        part.feed(4, &[75]);
        for (to, from) in chosen.iter().enumerate() {
            let row = layer.qkv[*from as usize * width..][..width].to_vec();
            part.qkv[to * width..(to + 1) * width].copy_from_slice(&row);
        }
        let item = AttendItem {
            heads: whole[0].heads,
            first_row: 0,
            rows: chosen.len(),
            at: Some(&chosen),
        };
        let (some, some_lse) =
            attend_items(&part, isa(), &part.threads, false, std::slice::from_ref(&item));
        for (row, position) in chosen.iter().enumerate() {
            let at = *position as usize;
            assert_eq!(
                bits(&some[row * out_width..][..out_width]),
                bits(&all[at * out_width..][..out_width]),
                "{format:?} row {at}"
            );
            assert_eq!(bits(&some_lse[row * 6..][..6]), bits(&lse[at * 6..][..6]));
        }
    }
}
