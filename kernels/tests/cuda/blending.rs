//! Caches of chunks, rows that go on, queries compared over time, and rankings by distributions.

use batchmax_kernels::append::{AppendItem, append};
use batchmax_kernels::attend::AttendShape;
use batchmax_kernels::blend::{Columns, deviation};
use batchmax_kernels::evict::{Protect, best};
use batchmax_kernels::kv::KvFormat::{Bf16, F16, F32, Fp8};
use batchmax_kernels::rank::{RankItem, Rotation, Scorer, expected_attention};
use batchmax_kernels::rope::{RopeLayout, RopeTable, rope};

use super::elementwise::angles;
use super::evicting::scores_at;
use super::gpu::{Arg, Gpu, available, bytes_of};
use super::mirror::{Mirror, Room, items, rows};
use super::ranking::{SHAPE, assert_scores, layer_in_use, on_cpu};
use super::testing::{Layer, assert_close, noise};

#[test]
fn stored_rows_and_new_ones_make_a_cache() {
    if !available() {
        return;
    }
    let (dim, kv, chunk) = (64usize, 2usize, 16u32);
    let tokens = [40usize, 23];
    let width = 2 * kv * dim;
    for (layout, format, pairs, factor) in
        [(RopeLayout::Half, F16, 32, 1.25f32), (RopeLayout::Interleaved, Bf16, 24, 1.0)]
    {
        let inverse: Vec<f32> = (0..pairs).map(|i| 0.8f32.powi(i)).collect();
        let table = RopeTable::new(&inverse, 128, factor);
        let mut layer = Layer::new(2, SHAPE, format);
        layer.width = (6 + 2 * kv) * dim;
        let staged = noise(3, 63 * width);
        layer.qkv = noise(4, 9 * layer.width);
        layer.step = vec![(0, 5), (5, 4)];
        // Where the step's rows stand.
        let at: [&[u32]; 2] = [&[0, 17, 18, 30, 39], &[1, 2, 21, 22]];
        let mut row_of = vec![u32::MAX; 63];
        for (i, at) in at.iter().enumerate() {
            for (n, p) in at.iter().enumerate() {
                row_of[40 * i + *p as usize] = (5 * i + n) as u32;
            }
        }
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room { tokens: 40, ..Room::default() });
        let mut heads = mirror.all_heads(&gpu);
        heads.iter_mut().enumerate().for_each(|(h, head)| head.tokens = tokens[h / 2] as u32);
        mirror.put_heads(&gpu, &heads);
        let (list, qkv) = (gpu.input(&items(&layer)), gpu.input(&layer.qkv));
        let (stored, from) = (gpu.input(&staged), gpu.input(&[0u32, 40]));
        let (of, turns) = (gpu.input(&row_of), gpu.input(&angles(&inverse, 128, factor)));
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            rows(&gpu, qkv, F32, layer.width),
            Arg::U32((6 * dim) as u32),
            rows(&gpu, stored, F32, width),
            Arg::At(from),
            Arg::At(of),
            Arg::U32(chunk),
            Arg::At(turns),
            Arg::U32(pairs as u32),
            Arg::U32(u32::from(layout == RopeLayout::Interleaved)),
            Arg::F32(factor),
        ];
        gpu.launch("blend", [(40 * dim).div_ceil(256), 2, 2], 256, 0, &arguments);
        for (i, count) in tokens.into_iter().enumerate() {
            let mut own = staged[40 * i * width..][..count * width].to_vec();
            let starts: Vec<u32> = (0..count as u32).map(|t| t / chunk * chunk).collect();
            rope(&layer.threads, &mut own, width, kv, dim, &starts, &table, layout);
            own.chunks_exact_mut(width)
                .for_each(|row| row[..kv * dim].iter_mut().for_each(|k| *k /= factor));
            for (n, p) in at[i].iter().enumerate() {
                let new = &layer.qkv[(5 * i + n) * layer.width + 6 * dim..][..width];
                own[*p as usize * width..][..width].copy_from_slice(new);
            }
            let positions: Vec<u32> = (0..count as u32).collect();
            let heads = &mut layer.caches[i];
            let mut all = [AppendItem { heads, first_row: 0, rows: count, positions: &positions }];
            append(&layer.threads, &mut layer.pool, &mut all, &own, width, 0, kv * dim, dim)
                .expect("room");
        }
        let positions: Vec<u32> = gpu.read(mirror.positions);
        for (h, cache) in layer.caches.iter().flatten().enumerate() {
            assert_eq!(positions[h * mirror.stride..][..cache.tokens()], cache.positions);
            for token in 0..cache.tokens() {
                let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
                let key = wide(&cache.key(&layer.pool, token));
                assert_close(&mirror.key(&gpu, h, token), &key, 0.01, "turned keys");
                assert_eq!(mirror.value(&gpu, h, token), cache.value(&layer.pool, token));
            }
        }
    }
}

#[test]
fn values_are_as_far_from_stored_ones_as_on_the_cpu() {
    if !available() {
        return;
    }
    for format in [F16, Fp8] {
        let mut layer = Layer::new(2, SHAPE, format);
        layer.feed(3, &[30, 12]);
        let (width, known) = (256, [21usize, 12]);
        let stored = noise(4, 33 * width);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (qkv, store) = (gpu.input(&layer.qkv), gpu.input(&stored));
        let (from, compared) = (gpu.input(&[0u32, 21]), gpu.input(&known.map(|k| k as u32)));
        let more = vec![
            rows(&gpu, qkv, F32, layer.width),
            Arg::U32(8 * 64),
            rows(&gpu, store, F32, width),
            Arg::At(from),
            Arg::At(compared),
        ];
        // A score per row, which are all tokens here.
        let list = gpu.input(&items(&layer));
        let out = gpu.output(4 * mirror.stride * 4);
        let mut arguments = vec![mirror.kv(&gpu), Arg::At(list)];
        arguments.extend(more);
        arguments.push(Arg::At(out));
        gpu.launch("deviate", [2, 2, 2], 128, 0, &arguments);
        let found: Vec<f32> = gpu.read(out);
        let mut first = 0;
        for (i, (row, count)) in layer.step.iter().enumerate() {
            let at = Columns {
                width: layer.width,
                values: 8 * 64,
                stored_width: width,
                stored_values: 128,
                head_dim: 64,
                kv_heads: 2,
            };
            let new = &layer.qkv[row * layer.width..][..count * layer.width];
            let expected = deviation(format, new, &stored[first * width..][..known[i] * width], at);
            let found: Vec<Vec<f32>> =
                (0..2).map(|h| found[(2 * i + h) * mirror.stride..][..*count].to_vec()).collect();
            assert_scores(&found, &expected, 1e-5, "deviation");
            first += known[i];
        }
    }
}

#[test]
fn the_best_rows_go_on() {
    if !available() {
        return;
    }
    let mut layer = Layer::new(2, SHAPE, F16);
    layer.feed(3, &[50, 9]);
    let (keep, width, most) = ([20usize, 30], 24usize, 32usize);
    let scores: Vec<Vec<f32>> =
        (layer.caches.iter().flatten().zip(0..)).map(|(c, h)| noise(h, c.tokens())).collect();
    let positions: Vec<u32> = (0..50).chain(0..9).collect();
    let residual = noise(8, 59 * width);
    let mut gpu = Gpu::default();
    let mirror = Mirror::new(&mut gpu, &layer, Room::default());
    let (at, list) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(&items(&layer)));
    let (places, wanted) = (gpu.input(&positions), gpu.input(&keep.map(|k| k as u32)));
    let chosen = gpu.output(2 * most * 4);
    let arguments = [
        mirror.kv(&gpu),
        Arg::At(list),
        Arg::At(at),
        Arg::At(places),
        Arg::At(wanted),
        Arg::U32(4),
        Arg::U32(most as u32),
        Arg::At(chosen),
    ];
    gpu.launch("forward_choose", [2, 1, 1], 256, 1152, &arguments);
    let (input, to) = (gpu.input(&residual), gpu.input(&[0u32, 20]));
    let (out, out_positions) = (gpu.output(29 * width * 4), gpu.output(29 * 4));
    let arguments = [
        Arg::At(list),
        Arg::At(chosen),
        Arg::U32(most as u32),
        Arg::At(wanted),
        Arg::At(to),
        rows(&gpu, input, F32, width),
        Arg::At(places),
        rows(&gpu, out, F32, width),
        Arg::At(out_positions),
    ];
    gpu.launch("forward_rows", [1, 2, 1], 256, 0, &arguments);
    let (mut expected, mut expected_positions) = (Vec::new(), Vec::new());
    for (i, (first, count)) in layer.step.iter().enumerate() {
        let sums: Vec<f32> = (0..*count).map(|r| scores[2 * i][r] + scores[2 * i + 1][r]).collect();
        let own = &positions[*first..first + count];
        let seen = own[count - 1] + 1;
        for row in best(&sums, own, seen, keep[i], Protect { sinks: 0, recent: 4 }) {
            let from = first + row as usize;
            expected.extend_from_slice(&residual[from * width..][..width]);
            expected_positions.push(positions[from]);
        }
    }
    assert_eq!(gpu.read::<f32>(out), expected);
    assert_eq!(gpu.read::<u32>(out_positions), expected_positions);
}

#[test]
fn queries_are_compared_with_those_noted() {
    if !available() {
        return;
    }
    let dim = 80;
    let (qkv, width) = (noise(3, 7 * 500), 500);
    let sum = |row: usize, d: usize| (0..6).map(|h| qkv[row * width + h * dim + d]).sum::<f32>();
    // The same, another, none, a vector of zeros.
    let last = [1usize, 2, 4, 6];
    let list: Vec<u32> = [(3, 0, 2), (1, 2, 1), (0, 3, 2), (2, 5, 2)]
        .iter()
        .flat_map(|(s, f, r)| [*s, *f, *r, 0u32])
        .collect();
    let mut noted = vec![0.0f32; 4 * dim];
    (0..dim).for_each(|d| noted[3 * dim + d] = 2.0 * sum(1, d));
    (0..dim).for_each(|d| noted[dim + d] = sum(2, d) + if d < 40 { 3.0 } else { -1.0 });
    let mut gpu = Gpu::default();
    let (items, rows_at) = (gpu.input(&list), gpu.input(&qkv));
    let (known, before) = (gpu.input(&[0u32, 1, 1, 1]), gpu.input(&noted));
    let (now, stale) = (gpu.output(4 * dim * 4), gpu.output(16));
    let arguments = [
        Arg::At(items),
        rows(&gpu, rows_at, F32, width),
        Arg::U32(6),
        Arg::U32(dim as u32),
        Arg::Bytes(bytes_of(&[0.9f64])),
        Arg::At(known),
        Arg::At(before),
        Arg::At(now),
        Arg::At(stale),
    ];
    gpu.launch("compare", [4, 1, 1], 256, 2048, &arguments);
    assert_eq!(gpu.read::<u32>(stale), [0, 1, 1, 0]);
    let now: Vec<f32> = gpu.read(now);
    for (sequence, row) in [3usize, 1, 0, 2].into_iter().zip(last) {
        let exact: Vec<f64> = (0..dim).map(|d| f64::from(sum(row, d))).collect();
        assert_close(&now[sequence * dim..][..dim], &exact, 1e-6, "noted");
    }
}

#[test]
fn by_variation_against_later_tokens() {
    if !available() {
        return;
    }
    for (dim, lag, sinks) in [(64, 9, 4), (80, 40, 0), (64, 1, 2)] {
        let shape = AttendShape { head_dim: dim, ..SHAPE };
        let mut layer = layer_in_use(shape, Bf16, &[3, 1, 40]);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (out, list) = (gpu.output(6 * mirror.stride * 4), gpu.input(&items(&layer)));
        let arguments =
            [mirror.kv(&gpu), Arg::At(list), Arg::U32(lag as u32), Arg::U32(sinks), Arg::At(out)];
        let grid = [mirror.stride.div_ceil(lag) + 1, 2, 3];
        gpu.launch("rank_lag", grid, 128, 4 * (2 * dim + 3 * lag + 4), &arguments);
        let all: Vec<f32> = gpu.read(out);
        let found: Vec<Vec<f32>> = (mirror.all_heads(&gpu).iter())
            .map(|h| all[h.meta as usize..][..h.tokens as usize].to_vec())
            .collect();
        let scorer = Scorer::Lag { lag: lag as u32, sinks };
        assert_scores(&found, &on_cpu(&mut layer, scorer), 0.0, &format!("lag {lag}"));
    }
}

#[test]
fn by_the_attention_that_may_be_expected() {
    if !available() {
        return;
    }
    let (sinks, future) = (4, 20);
    for (layout, pairs) in [(RopeLayout::Half, 32usize), (RopeLayout::Interleaved, 20)] {
        let shape = AttendShape { scale: 0.05, ..SHAPE };
        let layer = layer_in_use(shape, F16, &[3, 1, 33]);
        let inverse: Vec<f32> = (0..pairs as i32).map(|i| 0.8f32.powi(i)).collect();
        let table = RopeTable::new(&inverse, 256, 1.1);
        let mut positions = Vec::new();
        for ((_, rows), seen) in layer.step.iter().zip(&layer.seen) {
            positions.extend(seen - *rows as u32..*seen);
        }
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let ahead: Vec<f32> = (layer.seen.iter())
            .flat_map(|seen| {
                let turns = table.mean_turn(*seen, future);
                let (cos, sin): (Vec<f32>, Vec<f32>) = turns.into_iter().unzip();
                [cos, sin].concat()
            })
            .collect();
        let (list, qkv) = (gpu.input(&items(&layer)), gpu.input(&layer.qkv));
        let (at, turns) = (gpu.input(&positions), gpu.input(&ahead));
        let angle = gpu.input(&angles(&inverse, 256, 1.1));
        let moments = gpu.output(18 * (64 + 64 * 64) * 4);
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            rows(&gpu, qkv, F32, layer.width),
            Arg::At(at),
            Arg::U32(sinks),
            Arg::At(angle),
            Arg::U32(pairs as u32),
            Arg::U32(u32::from(layout == RopeLayout::Interleaved)),
            Arg::F32(1.0 / (1.1 * 1.1)),
            Arg::At(turns),
            Arg::At(moments),
        ];
        gpu.launch("query_moments", [6, 3, 1], 256, 4 * 10 * 64, &arguments);
        let plane = 6 * mirror.stride;
        let logits = gpu.output(3 * plane * 4);
        let stride = || Arg::Bytes(bytes_of(&[plane as u64]));
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            Arg::U32(sinks),
            Arg::F32(shape.scale),
            Arg::At(moments),
            Arg::At(logits),
            stride(),
        ];
        let shared = 4 * (33 * 68 + 128);
        gpu.launch("expected_logits", [mirror.stride / 32, 6, 3], 128, shared, &arguments);
        let out = gpu.output(plane * 4);
        let arguments =
            [mirror.kv(&gpu), Arg::At(list), Arg::U32(3), Arg::At(logits), stride(), Arg::At(out)];
        gpu.launch("expected_scores", [2, 3, 1], 256, 4 * (16 * 3 + 64), &arguments);
        let all: Vec<f32> = gpu.read(out);
        let found: Vec<Vec<f32>> = (mirror.all_heads(&gpu).iter())
            .map(|h| all[h.meta as usize..][..h.tokens as usize].to_vec())
            .collect();
        let mut layer = layer;
        let on_cpu: Vec<RankItem<'_>> = (layer.caches.iter_mut().zip(&layer.step).zip(&layer.seen))
            .map(|((heads, step), seen)| RankItem {
                heads,
                first_row: step.0,
                rows: step.1,
                seen: *seen,
            })
            .collect();
        let rotation = Rotation { positions: &positions, table: &table, layout };
        let mut expected = Vec::new();
        expected_attention(
            &layer.threads,
            &layer.pool,
            &on_cpu,
            &shape,
            &layer.qkv,
            layer.width,
            rotation,
            (sinks, future),
            &mut expected,
        );
        assert_scores(&found, &expected, 2e-5, "expected");
    }
}
