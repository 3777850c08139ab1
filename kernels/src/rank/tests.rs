//! Scores against their definitions.

use proptest::prelude::*;

use super::*;
use crate::attend::{AttendItem, attend_decode, attend_prefill};
use crate::kv::KvFormat;
use crate::reference;
use crate::testing::{Layer, assert_close, bits};

fn shape(group: usize, kv_heads: usize, head_dim: usize) -> AttendShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttendShape { heads: group * kv_heads, kv_heads, head_dim, scale, softcap: None, window: None }
}

fn attend(layer: &Layer, decode: bool) -> Vec<f32> {
    let shape = &layer.shape;
    let mut out = vec![0.0; layer.rows() * shape.heads * shape.head_dim];
    let mut lse = vec![0.0; layer.rows() * shape.heads];
    let run = if decode { attend_decode } else { attend_prefill };
    run(
        &layer.threads,
        &layer.pool,
        &layer.items(),
        shape,
        &layer.qkv,
        layer.width,
        &mut out,
        Some(&mut lse),
    );
    lse
}

fn rank_all(isa: Isa, layer: &mut Layer, scorer: Scorer, lse: &[f32]) -> Vec<Vec<f32>> {
    let step = Step { shape: &layer.shape, qkv: &layer.qkv, qkv_width: layer.width, lse };
    let mut items: Vec<RankItem<'_>> = layer
        .caches
        .iter_mut()
        .zip(&layer.step)
        .zip(&layer.seen)
        .map(|((heads, step), seen)| RankItem {
            heads,
            first_row: step.0,
            rows: step.1,
            seen: *seen,
        })
        .collect();
    let mut scores = vec![vec![9.0; 3]; 7];
    rank_with(isa, &layer.threads, &layer.pool, &mut items, scorer, &step, &mut scores);
    scores
}

fn tally_all(isa: Isa, layer: &mut Layer, lse: &[f32]) {
    let step = Step { shape: &layer.shape, qkv: &layer.qkv, qkv_width: layer.width, lse };
    let mut items: Vec<TallyItem<'_>> = layer
        .caches
        .iter_mut()
        .zip(&layer.step)
        .map(|(heads, step)| TallyItem { heads, first_row: step.0, rows: step.1 })
        .collect();
    tally_with(isa, &layer.threads, &layer.pool, &mut items, &step);
}

/// Mass by the reference for every head of every sequence.
fn masses(layer: &Layer, last: usize) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    for item in layer.items() {
        for head in 0..layer.shape.kv_heads {
            let item = AttendItem { heads: item.heads, ..item };
            let last = last.min(item.rows);
            all.push(reference::attention_mass(
                &layer.pool,
                &item,
                head,
                &layer.shape,
                &layer.qkv,
                layer.width,
                last,
            ));
        }
    }
    all
}

#[test]
fn averages_by_hand() {
    let values = [1.0, 2.0, 4.0, 8.0, 16.0];
    let mut out = [0.0; 5];
    smooth(Pooling::Mean, &values, 5, 3, &mut out);
    assert_eq!(out.map(|x| x * 3.0), [3.0, 7.0, 14.0, 28.0, 24.0]);
    // Without the last two; those keep their values.
    smooth(Pooling::Mean, &values, 3, 3, &mut out);
    assert_eq!(
        [out[0] * 3.0, out[1] * 3.0, out[2] * 3.0, out[3], out[4]],
        [3.0, 7.0, 6.0, 8.0, 16.0]
    );
    smooth(Pooling::Mean, &values, 5, 1, &mut out);
    assert_eq!(out, values);
    // Of an even number of neighbours one more lies before.
    smooth(Pooling::Mean, &values, 5, 2, &mut out);
    assert_eq!(out, [0.5, 1.5, 3.0, 6.0, 12.0]);
}

#[test]
fn maxima_by_hand() {
    let values = [-3.0, -5.0, 4.0, 1.0, 16.0];
    let mut out = [0.0; 5];
    // What is missing at the ends is no zero.
    smooth(Pooling::Max, &values, 5, 3, &mut out);
    assert_eq!(out, [-3.0, 4.0, 4.0, 16.0, 16.0]);
    smooth(Pooling::Max, &values, 4, 3, &mut out);
    assert_eq!(out, [-3.0, 4.0, 4.0, 4.0, 16.0]);
    smooth(Pooling::Max, &values, 2, 63, &mut out);
    assert_eq!(out, [-3.0, -3.0, 4.0, 1.0, 16.0]);
    // Of an even number of neighbours one more lies before.
    smooth(Pooling::Max, &values, 5, 2, &mut out);
    assert_eq!(out, [-3.0, -3.0, 4.0, 4.0, 16.0]);
}

#[test]
fn key_scores_match_their_definitions() {
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Bf16, KvFormat::Fp8] {
        for (dim, tokens) in [(8, 1), (64, 45), (80, 100)] {
            let mut layer = Layer::new(1, shape(1, 2, dim), format);
            layer.feed(4, &[tokens]);
            for isa in Isa::available() {
                let norms = rank_all(isa, &mut layer, Scorer::KeyNorm, &[]);
                let differences = rank_all(isa, &mut layer, Scorer::KeyDiff, &[]);
                let recency = rank_all(isa, &mut layer, Scorer::Recency, &[]);
                assert_eq!((norms.len(), recency[0][tokens - 1]), (2, (tokens - 1) as f32));
                for (h, head) in layer.caches[0].iter().enumerate() {
                    let keys: Vec<Vec<f64>> = (0..tokens)
                        .map(|t| head.key(&layer.pool, t).iter().map(|x| f64::from(*x)).collect())
                        .collect();
                    let length = |k: &[f64]| k.iter().map(|x| x * x).sum::<f64>().sqrt();
                    let anchor: Vec<f64> = (0..dim)
                        .map(|d| keys.iter().map(|k| k[d] / length(k)).sum::<f64>() / tokens as f64)
                        .collect();
                    let exact: Vec<f64> = keys.iter().map(|k| -length(k)).collect();
                    assert_close(&norms[h], &exact, 1e-6, "norm");
                    let cosine = |k: &Vec<f64>| {
                        let dot: f64 = k.iter().zip(&anchor).map(|(a, b)| a * b).sum();
                        -dot / length(k) / length(&anchor)
                    };
                    assert_close(
                        &differences[h],
                        &keys.iter().map(cosine).collect::<Vec<_>>(),
                        3e-6,
                        "cosine",
                    );
                }
            }
        }
    }
}

#[test]
fn window_attention_is_replaced_by_prompts_and_grows_in_decode() {
    let (window, pool) = (4u32, 3u32);
    for isa in Isa::available() {
        for exclude_window in [false, true] {
            let mut layer = Layer::new(2, shape(2, 2, 16), KvFormat::F16);
            let pooling = Pooling::Mean;
            let scorer = Scorer::WindowAttention { window, pool, pooling, exclude_window };
            layer.feed(6, &[40, 3]);
            let lse = attend(&layer, false);
            let scores = rank_all(isa, &mut layer, scorer, &lse);
            let mut state = masses(&layer, window as usize);
            for (i, state) in state.iter_mut().enumerate() {
                // The second sequence has three rows, fewer than the window.
                state.iter_mut().for_each(|x| *x /= if i < 2 { 4.0 } else { 3.0 });
            }
            for (head, state) in layer.caches.iter().flatten().zip(&state) {
                assert_close(&head.tally, state, 1e-6, "state");
            }
            let end = if exclude_window { 36 } else { 40 };
            let exact: Vec<f64> = (0..end)
                .map(|i: usize| {
                    state[0][i.saturating_sub(1)..(i + 2).min(end)].iter().sum::<f64>() / 3.0
                })
                .collect();
            assert_close(&scores[0][..end], &exact, 1e-6, "scores");
            layer.feed(6, &[1, 1]);
            let lse = attend(&layer, true);
            rank_all(isa, &mut layer, scorer, &lse);
            for ((head, state), newest) in
                layer.caches.iter().flatten().zip(&mut state).zip(masses(&layer, 1))
            {
                state.push(0.0);
                state.iter_mut().zip(newest).for_each(|(x, p)| *x += p / 4.0);
                assert_close(&head.tally, state, 1e-6, "state after a step");
            }
        }
    }
}

#[test]
fn the_last_row_s_attention_is_averaged_over_the_layer() {
    for isa in Isa::available() {
        for (rows, decode) in [([40, 3], false), ([1, 1], true)] {
            let mut layer = Layer::new(2, shape(3, 2, 16), KvFormat::F32);
            layer.feed(6, &[70, 20]);
            // The heads lose different tokens.
            layer.thin(6, &[50, 1000]);
            layer.feed(6, &rows);
            let lse = attend(&layer, decode);
            let scores = rank_all(isa, &mut layer, Scorer::LastAttention, &lse);
            let masses = masses(&layer, 1);
            for (i, found) in scores.iter().enumerate() {
                let heads = &layer.caches[i / 2];
                let of = |h: usize, position: u32| {
                    let token = heads[h].positions.iter().position(|p| *p == position);
                    token.map_or(0.0, |t| masses[i / 2 * 2 + h][t])
                };
                let exact: Vec<f64> =
                    heads[i % 2].positions.iter().map(|p| (of(0, *p) + of(1, *p)) / 2.0).collect();
                assert_close(found, &exact, 1e-6, "last row");
                assert!(heads[i % 2].tally.is_empty());
            }
            // Where the heads hold the same tokens, they have the same scores, and all of the attention.
            assert_eq!(bits(&scores[2]), bits(&scores[3]));
            assert!((scores[2].iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }
}

#[test]
fn chance_goes_by_position_whatever_a_head_has_lost() {
    let mut layer = Layer::new(2, shape(1, 2, 8), KvFormat::F32);
    layer.feed(6, &[40, 40]);
    let scorer = Scorer::Random { seed: 5, layer: 3 };
    let isa = Isa::available()[0];
    let whole = rank_all(isa, &mut layer, scorer, &[]);
    assert_eq!(whole[0], whole[2]);
    assert_ne!(whole[0], whole[1]);
    assert_ne!(whole, rank_all(isa, &mut layer, Scorer::Random { seed: 5, layer: 4 }, &[]));
    layer.thin(6, &[20, 20]);
    for (i, scores) in rank_all(isa, &mut layer, scorer, &[]).iter().enumerate() {
        let positions = &layer.caches[i / 2][i % 2].positions;
        let same: Vec<f32> = positions.iter().map(|p| whole[i][*p as usize]).collect();
        assert_eq!(*scores, same);
    }
}

#[test]
fn a_tally_is_the_same_in_chunks_and_whole() {
    for isa in Isa::available() {
        let mut whole = Layer::new(1, shape(3, 2, 64), KvFormat::F16);
        whole.feed(2, &[150]);
        let lse = attend(&whole, false);
        tally_all(isa, &mut whole, &lse);
        let mut parts = Layer::new(1, shape(3, 2, 64), KvFormat::F16);
        for rows in [33, 1, 64, 52] {
            parts.feed(2, &[rows]);
            let lse = attend(&parts, false);
            tally_all(isa, &mut parts, &lse);
        }
        for (a, b) in whole.caches[0].iter().zip(&parts.caches[0]) {
            assert_eq!(bits(&a.tally), bits(&b.tally));
        }
        // All probability goes somewhere: 150 rows of weight 1.
        let total: f32 = whole.caches[0][0].tally.iter().sum();
        assert!((total - 150.0).abs() < 1e-3);
        let scores = rank_all(isa, &mut whole, Scorer::Tallied { mean: true }, &[]);
        assert_eq!(scores[0][149], whole.caches[0][0].tally[149]);
        assert_eq!(scores[0][50], whole.caches[0][0].tally[50] / 100.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn tallies_match_the_reference(
        seed in any::<u64>(),
        group in 1usize..=8,
        dim in prop::sample::select(vec![8usize, 64, 80, 128]),
        format in prop::sample::select(vec![KvFormat::F32, KvFormat::F16, KvFormat::Bf16, KvFormat::Fp8]),
        softcap in prop::option::of(5.0f32..50.0),
        window in prop::option::of(1u32..90),
        before in prop::collection::vec(0usize..90, 2),
        kept in 0usize..90,
        rows in prop::collection::vec(1usize..40, 2),
    ) {
        let mut layer = Layer::new(2, AttendShape { softcap, window, ..shape(group, 2, dim) }, format);
        layer.feed(seed, &before);
        layer.thin(seed, &[kept, 1000]);
        layer.feed(seed, &rows);
        let lse = attend(&layer, false);
        let exact = masses(&layer, usize::MAX);
        for isa in Isa::available() {
            layer.caches.iter_mut().flatten().for_each(|h| h.tally.clear());
            tally_all(isa, &mut layer, &lse);
            for (head, exact) in layer.caches.iter().flatten().zip(&exact) {
                assert_close(&head.tally, exact, 5e-6, "tally");
            }
        }
    }
}
