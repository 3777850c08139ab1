//! Channels of keys, and what dropped tokens leave behind.

use batchmax_kernels::attend::AttendShape;
use batchmax_kernels::evict::{EvictItem, Protect};
use batchmax_kernels::kv::KvFormat::{Bf16, F16, F32};
use batchmax_kernels::kv::{Codec, KeyAxis};
use batchmax_kernels::prune::{ChannelItem, PruneItem, prune, rank_channels};
use batchmax_kernels::state::{KeyMap, Maps, Network, accumulate, read_state};

use super::decode;
use super::evicting::{choose, scores_at};
use super::gpu::{Arg, Gpu, available};
use super::mirror::{Mirror, Room, items, rows};
use super::ranking::{SHAPE, layer_in_use, lse_of};
use super::testing::{Layer, assert_close, noise};

#[test]
fn channels_are_chosen_dropped_and_not_missed() {
    if !available() {
        return;
    }
    for (dim, drop, codec) in [
        (64, 24, None),
        (80, 21, None),
        (64, 24, Some(Codec { bits: 2, group: 32, key_axis: KeyAxis::Channel })),
        (80, 21, Some(Codec { bits: 4, group: 32, key_axis: KeyAxis::Token })),
    ] {
        let shape = AttendShape { head_dim: dim, ..SHAPE };
        let mut layer = Layer::new(2, shape, F16);
        layer.feed(3, &[100, 45]);
        let list: Vec<ChannelItem<'_>> = (layer.caches.iter().zip(&layer.step))
            .map(|(heads, step)| ChannelItem { heads, first_row: step.0, rows: step.1 })
            .collect();
        let (threads, pool) = (&layer.threads, &layer.pool);
        let kept = rank_channels(threads, pool, &list, 8, drop, &shape, &layer.qkv, layer.width);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let (list, qkv) = (gpu.input(&items(&layer)), gpu.input(&layer.qkv));
        let partial = gpu.output(4 * 4 * dim * 4);
        let arguments = [mirror.kv(&gpu), Arg::At(list), Arg::U32(32), Arg::At(partial)];
        gpu.launch("channel_squares", [4, 2, 2], 128, 4096, &arguments);
        let chosen = gpu.output(4 * (2 * dim - drop) * 2);
        let arguments = [
            mirror.kv(&gpu),
            Arg::At(list),
            rows(&gpu, qkv, F32, layer.width),
            Arg::U32(6),
            Arg::U32(8),
            Arg::U32(drop as u32),
            Arg::U32(32),
            Arg::U32(4),
            Arg::At(partial),
            Arg::At(chosen),
        ];
        gpu.launch("choose_channels", [2, 2, 1], 256, 1024, &arguments);
        let mut gpu_lists = Vec::new();
        for (list, kept) in gpu.read::<u16>(chosen).chunks(2 * dim - drop).zip(&kept) {
            assert_eq!(list[..dim - drop], **kept);
            gpu_lists.extend_from_slice(list);
        }
        // The same channels for the caches, whose keys are whole up to now.
        let mut gpu = Gpu::default();
        let room = Room { kept: Some(kept.clone()), codec, tokens: 128, ..Room::default() };
        let mirror = Mirror::new(&mut gpu, &layer, room);
        assert_eq!(gpu.read::<u16>(mirror.kept), gpu_lists, "as the caches have them");
        let counts = [64u32, 64, 32, 20];
        let (which, to) = (gpu.input(&[0u32, 1, 2, 3]), gpu.input(&counts));
        let arguments = [mirror.kv(&gpu), Arg::At(which), Arg::At(to)];
        gpu.launch("prune", [(64 * dim / 8).div_ceil(256), 4, 1], 256, 0, &arguments);
        let mut heads = mirror.all_heads(&gpu);
        heads.iter_mut().zip(counts).for_each(|(head, count)| head.key_narrow = count);
        mirror.put_heads(&gpu, &heads);
        for (h, head) in layer.caches.iter_mut().flatten().enumerate() {
            let kept = std::slice::from_ref(&kept[h]);
            let heads = std::slice::from_mut(head);
            let mut all = [PruneItem { heads, kept, tokens: counts[h] as usize }];
            prune(&layer.threads, &mut layer.pool, &mut all).expect("room");
        }
        mirror.assert_same(&gpu, &layer, "pruned");
        if let Some(codec) = codec {
            let counts = |tokens: usize| (tokens / 32 * 32, tokens - 9);
            super::packing::both(&mut gpu, &mirror, &mut layer, codec, counts);
            mirror.assert_same(&gpu, &layer, "pruned and packed");
        }
        layer.feed(4, &[1, 1]);
        super::writing::append(&mut gpu, &mirror, &layer);
        let found = decode::run(&mut gpu, &mirror, &layer, None);
        decode::check(&layer, &found, 4e-6, &format!("{dim} less {drop}, {codec:?}"));
        // Kernels that read keys channel by channel see zeros where channels are missing.
        let norms = super::ranking::scores(&mut gpu, &mirror, &layer, "rank_norms", vec![]);
        let scorer = batchmax_kernels::rank::Scorer::KeyNorm;
        super::ranking::assert_scores(
            &norms,
            &super::ranking::on_cpu(&mut layer, scorer),
            1e-6,
            "",
        );
        let (out, _) = super::prefill::run(&mut gpu, &mirror, &layer, None);
        let exact: Vec<f64> = found.out.iter().map(|x| f64::from(*x)).collect();
        assert_close(&out, &exact, 5e-6, "one row as a chunk");
    }
}

fn maps(rank: usize, hidden: usize, dim: usize) -> Maps {
    let network = |seed| Network {
        first: noise(seed, dim * hidden),
        second: noise(seed + 1, hidden * rank).iter().map(|x| x * 0.3).collect(),
    };
    let key = |seed| KeyMap {
        network: network(seed),
        mix: noise(seed + 2, rank * rank),
        scale: noise(seed + 3, rank),
        gate: noise(seed + 4, rank),
    };
    let queries = (0..6).map(|h| network(10 + 10 * h)).collect();
    Maps { rank, hidden, queries, keys: (0..2).map(|h| key(100 + 10 * h)).collect() }
}

#[test]
fn states_take_up_what_is_dropped_and_are_read() {
    if !available() {
        return;
    }
    let (rank, hidden, dim) = (5usize, 40usize, 64usize);
    let maps = maps(rank, hidden, dim);
    let mut layer = layer_in_use(SHAPE, Bf16, &[5, 1, 30]);
    for head in layer.caches.iter_mut().flatten() {
        head.open_state(&mut layer.pool, rank).expect("room");
    }
    let floats = rank * (dim + 1);
    let mut gpu = Gpu::default();
    let mirror = Mirror::new(&mut gpu, &layer, Room { state: floats, ..Room::default() });
    for head in mirror.all_heads(&gpu) {
        gpu.put(mirror.pool, head.state as usize * 64, &vec![0; 4 * floats]);
    }
    let scores: Vec<Vec<f32>> =
        (layer.caches.iter().flatten().zip(0..)).map(|(c, h)| noise(h, c.tokens())).collect();
    let keep = [20u32, 31, 37, 38, 7, 0];
    let protect = Protect { sinks: 2, recent: 3 };
    let (at, stay) = (scores_at(&mut gpu, &mirror, &scores), gpu.input(&keep));
    let kept = choose(&mut gpu, &mirror, &layer, (at, stay), protect);
    let key_maps: Vec<f32> = (maps.keys.iter())
        .flat_map(|k| [&k.network.first, &k.network.second, &k.mix, &k.scale, &k.gate])
        .flatten()
        .copied()
        .collect();
    let (list, networks) = (gpu.input(&items(&layer)), gpu.input(&key_maps));
    let psi = gpu.output(6 * mirror.stride * rank * 4);
    let arguments = [
        mirror.kv(&gpu),
        Arg::At(list),
        Arg::At(stay),
        Arg::At(kept),
        Arg::At(networks),
        Arg::U32(hidden as u32),
        Arg::U32(rank as u32),
        Arg::At(psi),
    ];
    let shared = 32 * (dim + hidden + 2 * rank);
    gpu.launch("state_psi", [mirror.stride / 8, 2, 3], 128, shared, &arguments);
    let arguments = [
        mirror.kv(&gpu),
        Arg::At(list),
        Arg::At(stay),
        Arg::At(kept),
        Arg::U32(rank as u32),
        Arg::At(psi),
    ];
    gpu.launch("state_fold", [rank, 2, 3], 96, 0, &arguments);
    let on_cpu: Vec<EvictItem<'_>> = (layer.caches.iter_mut().zip(&layer.seen).enumerate())
        .map(|(i, (heads, seen))| EvictItem {
            heads,
            seen: *seen,
            keep: keep[2 * i..2 * i + 2].iter().map(|k| *k as usize).collect(),
        })
        .collect();
    accumulate(&layer.threads, &layer.pool, &on_cpu, &scores, protect, &maps);
    for (head, cache) in mirror.all_heads(&gpu).iter().zip(layer.caches.iter().flatten()) {
        let bytes = &gpu.bytes(mirror.pool)[head.state as usize * 64..][..4 * floats];
        let found = super::mirror::decoded(F32, bytes);
        let exact: Vec<f64> =
            cache.state(&layer.pool).expect("a state").iter().map(|x| f64::from(*x)).collect();
        assert_close(&found, &exact, 1e-5, "state");
    }

    let count = layer.rows();
    let before = noise(50, count * 6 * dim);
    let lse = lse_of(&layer);
    let query_maps: Vec<f32> =
        maps.queries.iter().flat_map(|n| [&n.first, &n.second]).flatten().copied().collect();
    let item_of: Vec<u32> =
        layer.step.iter().zip(0..).flat_map(|((_, rows), i)| vec![i; *rows]).collect();
    let (networks, of) = (gpu.input(&query_maps), gpu.input(&item_of));
    let (qkv, logs, out) = (gpu.input(&layer.qkv), gpu.input(&lse), gpu.inout(&before));
    let arguments = [
        mirror.kv(&gpu),
        Arg::At(list),
        Arg::At(of),
        rows(&gpu, qkv, F32, layer.width),
        Arg::U32(count as u32),
        Arg::At(networks),
        Arg::U32(hidden as u32),
        Arg::U32(rank as u32),
        rows(&gpu, out, F32, 6 * dim),
        Arg::At(logs),
    ];
    let shared = 32 * (dim + hidden + rank);
    gpu.launch("state_read", [count.div_ceil(8), 6, 1], 128, shared, &arguments);
    let mut expected = before;
    read_state(
        &layer.threads,
        &layer.pool,
        &layer.items(),
        &layer.shape,
        &layer.qkv,
        layer.width,
        &mut expected,
        &lse,
        &maps,
    );
    let exact: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
    assert_close(&gpu.read::<f32>(out), &exact, 1e-5, "read");
}
