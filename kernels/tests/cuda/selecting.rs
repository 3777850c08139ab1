//! Choices of what a step reads, partial caches, clusters.

use batchmax_kernels::attend::AttendShape;
use batchmax_kernels::evict::Protect;
use batchmax_kernels::kv::KvFormat::{Bf16, F16, F32, Fp8};
use batchmax_kernels::kv::{BlockPool, HeadCache};
use batchmax_kernels::select::{
    ClusterItem, Clusters, IndexItem, LeavingOrder, PageChoice, PageIndex, PartItem, SelectItem,
    append_part, cluster, index, refresh, select_pages,
};

use super::evicting::{choose, scores_at};
use super::gpu::{Arg, Buffer, Gpu, available};
use super::mirror::{Mirror, Room, items, rows};
use super::ranking::{SHAPE, layer_in_use};
use super::testing::{Layer, noise};
use batchmax_kernels::cuda::emulated::shim::Moved;

/// Extremes of pages, and the bounds or shares that choices go by.
pub struct Index {
    low: Buffer,
    high: Buffer,
    pages: usize,
    page: usize,
}

impl Index {
    pub fn new(gpu: &mut Gpu, mirror: &Mirror, heads: usize, page: usize) -> Self {
        let pages = mirror.stride.div_ceil(page);
        let bytes = heads * pages * mirror.dim * 4;
        Self { low: gpu.output(bytes), high: gpu.output(bytes), pages, page }
    }

    pub fn update(&self, gpu: &mut Gpu, mirror: &Mirror, layer: &Layer, fresh: &[u32]) -> Moved {
        let (list, fresh) = (gpu.input(&items(layer)), gpu.input(fresh));
        let arguments = [
            mirror.kv(gpu),
            Arg::At(list),
            Arg::U32(self.page as u32),
            Arg::At(fresh),
            Arg::U32(self.pages as u32),
            Arg::At(self.low),
            Arg::At(self.high),
        ];
        let lanes = if mirror.dim <= 64 { 8 } else { 16 };
        let grid = [(self.pages * lanes).div_ceil(128), mirror.kv_heads, layer.caches.len()];
        gpu.launch("page_index", grid, 128, 0, &arguments)
    }
}

/// Lists of `most` numbers, of which as many as counted.
fn lists(gpu: &Gpu, chosen: Buffer, counts: Buffer, most: usize) -> Vec<Vec<u32>> {
    let (all, counts): (Vec<u32>, Vec<u32>) = (gpu.read(chosen), gpu.read(counts));
    all.chunks(most).zip(counts).map(|(list, count)| list[..count as usize].to_vec()).collect()
}

#[test]
fn pages_and_tokens_are_those_of_the_cpu() {
    if !available() {
        return;
    }
    let (dim, page, wanted) = (80, 8, [24usize, 200, 5]);
    let shape = AttendShape { head_dim: dim, ..SHAPE };
    let mut layer = layer_in_use(shape, Bf16, &[9, 30, 17]);
    let mut gpu = Gpu::default();
    let mirror = Mirror::new(&mut gpu, &layer, Room { tokens: 96, ..Room::default() });
    let found = Index::new(&mut gpu, &mirror, 6, page);
    found.update(&mut gpu, &mirror, &layer, &[u32::MAX; 3]);
    // A step later the index grows by a token.
    layer.feed(8, &[1, 1, 1]);
    super::writing::append(&mut gpu, &mirror, &layer);
    found.update(&mut gpu, &mirror, &layer, &[1; 3]);
    let (low, high): (Vec<f32>, Vec<f32>) = (gpu.read(found.low), gpu.read(found.high));
    for (n, head) in layer.caches.iter().flatten().enumerate() {
        for p in 0..head.tokens().div_ceil(page) {
            let keys: Vec<Vec<f32>> = (p * page..((p + 1) * page).min(head.tokens()))
                .map(|t| head.key(&layer.pool, t))
                .collect();
            for d in 0..dim {
                let at = (n * found.pages + p) * dim + d;
                let of = |pick: fn(f32, f32) -> f32| keys.iter().map(|k| k[d]).reduce(pick);
                assert_eq!((Some(low[at]), Some(high[at])), (of(f32::min), of(f32::max)));
            }
        }
    }
    let mut indices: Vec<Vec<PageIndex>> = vec![vec![PageIndex::new(page, dim); 2]; 3];
    let mut list: Vec<IndexItem<'_>> = (layer.caches.iter().flatten())
        .zip(indices.iter_mut().flatten())
        .map(|(head, pages)| IndexItem { head, pages })
        .collect();
    index(&layer.threads, &layer.pool, &mut list);
    let list = gpu.input(&items(&layer));
    let qkv = gpu.input(&layer.qkv);
    let tokens = gpu.input(&wanted.map(|w| w as u32));
    let most = mirror.stride;
    for choice in [
        PageChoice::Bound { per_query_head: false, newest: true },
        PageChoice::Bound { per_query_head: true, newest: false },
        PageChoice::Shares { channels: 10 },
    ] {
        let on_cpu: Vec<SelectItem<'_>> = (layer.caches.iter().zip(&indices).zip(wanted))
            .enumerate()
            .map(|(row, ((heads, pages), tokens))| SelectItem {
                heads,
                pages: pages.iter().collect(),
                row,
                tokens,
            })
            .collect();
        let expected =
            select_pages(&layer.threads, &on_cpu, choice, &shape, &layer.qkv, layer.width);
        let sets = expected.len() / 3;
        let (chosen, counts) = (gpu.output(3 * sets * most * 4), gpu.output(3 * sets * 4));
        let numbers = gpu.output(3 * sets * found.pages * 4);
        let out = [Arg::U32(most as u32), Arg::At(chosen), Arg::At(counts)];
        if let PageChoice::Bound { per_query_head, newest } = choice {
            let arguments = [
                mirror.kv(&gpu),
                Arg::At(list),
                rows(&gpu, qkv, F32, layer.width),
                Arg::U32(6),
                Arg::U32(per_query_head.into()),
                Arg::U32(page as u32),
                Arg::U32(found.pages as u32),
                Arg::At(found.low),
                Arg::At(found.high),
                Arg::At(numbers),
            ];
            let grid = [(found.pages * 16).div_ceil(128), 2, 3];
            gpu.launch("page_bounds", grid, 128, 0, &arguments);
            let mut arguments = vec![
                mirror.kv(&gpu),
                Arg::At(list),
                Arg::At(tokens),
                Arg::At(numbers),
                Arg::U32(page as u32),
                Arg::U32(found.pages as u32),
                Arg::U32(newest.into()),
            ];
            arguments.extend(out);
            gpu.launch("select_pages", [sets, 3, 1], 256, 1152, &arguments);
        } else {
            let mut arguments = vec![
                mirror.kv(&gpu),
                Arg::At(list),
                rows(&gpu, qkv, F32, layer.width),
                Arg::U32(6),
                Arg::At(tokens),
                Arg::U32(10),
                Arg::U32(page as u32),
                Arg::U32(found.pages as u32),
                Arg::At(found.low),
                Arg::At(found.high),
                Arg::At(numbers),
            ];
            arguments.extend(out);
            let shared = 1152 + 4 * (2 * dim + 16);
            gpu.launch("select_shares", [sets, 3, 1], 256, shared, &arguments);
        }
        assert_eq!(lists(&gpu, chosen, counts, most), expected, "{choice:?}");
    }
}

/// A layer whose caches are filled by `gather`: 3 items of `sets` heads.
fn empty(gpu: &mut Gpu, layer: &Layer, sets: usize, room: usize) -> Mirror {
    let shape = AttendShape { heads: sets, kv_heads: sets, ..layer.shape };
    let none = Layer::new(layer.caches.len(), shape, layer.pool.format());
    Mirror::new(gpu, &none, Room { tokens: room, ..Room::default() })
}

#[test]
fn chosen_tokens_stand_next_to_each_other() {
    if !available() {
        return;
    }
    for (format, sets) in [(F16, 2), (Fp8, 6)] {
        let layer = layer_in_use(SHAPE, format, &[9, 30, 17]);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let scratch = empty(&mut gpu, &layer, sets, 64);
        let most = 40;
        let chosen: Vec<u32> = (0..3 * sets * most).map(|i| (i % most) as u32 / 3).collect();
        let counts: Vec<u32> = (0..3 * sets).map(|i| (i * 7 % 17) as u32).collect();
        let (list, at) = (gpu.input(&items(&layer)), gpu.input(&chosen));
        let count = gpu.input(&counts);
        let arguments = [
            mirror.kv(&gpu),
            scratch.kv(&gpu),
            Arg::At(list),
            Arg::At(at),
            Arg::U32(most as u32),
            Arg::At(count),
        ];
        let grid = [(most * 2 * 8usize).div_ceil(256), sets, 3];
        gpu.launch("gather", grid, 256, 0, &arguments);
        let positions: Vec<u32> = gpu.read(scratch.positions);
        for place in 0..3 * sets {
            let head = &layer.caches[place / sets][place % sets * 2 / sets];
            for i in 0..counts[place] as usize {
                let token = chosen[place * most + i] as usize;
                assert_eq!(positions[place * scratch.stride + i], head.positions[token]);
                assert_eq!(scratch.key(&gpu, place, i), head.key(&layer.pool, token));
                assert_eq!(scratch.value(&gpu, place, i), head.value(&layer.pool, token));
            }
        }
    }
}

#[test]
fn partial_caches_take_the_newest_in_and_let_the_worst_go() {
    if !available() {
        return;
    }
    let (keep, room) = (10u32, 11usize);
    let mut layer = Layer::new(2, SHAPE, F16);
    layer.feed(3, &[40, 6]);
    let mut scores: Vec<Vec<f32>> =
        (0..4).map(|h| noise(h, layer.caches[h as usize / 2][0].tokens())).collect();
    scores[0][3] = scores[0][30];
    let mut gpu = Gpu::default();
    let mirror = Mirror::new(&mut gpu, &layer, Room { tokens: 64, ..Room::default() });
    let part = empty(&mut gpu, &layer, 2, 32);
    let counts = gpu.input(&[keep; 4]);
    let at = scores_at(&mut gpu, &mirror, &scores);
    let newest = Protect { sinks: 0, recent: 1 };
    let kept = choose(&mut gpu, &mirror, &layer, (at, counts), newest);
    let list = gpu.input(&items(&layer));
    let arguments = [
        mirror.kv(&gpu),
        part.kv(&gpu),
        Arg::At(list),
        Arg::At(kept),
        Arg::U32(0),
        Arg::At(counts),
    ];
    gpu.launch("gather", [1, 2, 2], 256, 0, &arguments);
    let (order, other) = (gpu.output(4 * room * 4), gpu.output(4 * room * 4));
    let arguments = [
        mirror.kv(&gpu),
        Arg::At(list),
        Arg::At(at),
        Arg::At(kept),
        Arg::At(counts),
        Arg::U32(room as u32),
        Arg::At(order),
        Arg::At(other),
    ];
    gpu.launch("part_order", [2, 2, 1], 256, 128, &arguments);

    let mut pool = BlockPool::new(64, F16, 1 << 24);
    std::mem::swap(&mut pool, &mut layer.pool);
    let mut parts: Vec<HeadCache> = (0..4).map(|_| HeadCache::default()).collect();
    let mut orders = vec![LeavingOrder::new(); 4];
    for step in 0..16u32 {
        let mut all: Vec<PartItem<'_>> = (layer.caches.iter().flatten())
            .zip(&mut parts)
            .zip(&mut orders)
            .map(|((head, part), order)| PartItem { head, part, order, keep: keep as usize })
            .collect();
        if step == 0 {
            refresh(&layer.threads, &mut pool, &mut all, &scores).expect("room");
        } else {
            append_part(&layer.threads, &mut pool, &mut all).expect("room");
            let (filled, added) = (gpu.input(&[10, 10, 6, 6u32]), gpu.input(&[step - 1; 4]));
            let list = gpu.input(&items(&layer));
            let arguments = [
                mirror.kv(&gpu),
                part.kv(&gpu),
                Arg::At(list),
                Arg::At(filled),
                Arg::At(added),
                Arg::U32(room as u32),
                Arg::At(order),
            ];
            gpu.launch("append_part", [2, 2, 1], 64, 0, &arguments);
        }
        let positions: Vec<u32> = gpu.read(part.positions);
        for (n, cache) in parts.iter().enumerate() {
            let found = &positions[n * part.stride..][..cache.tokens()];
            assert_eq!(found, cache.positions, "step {step}, head {n}");
            for slot in 0..cache.tokens() {
                assert_eq!(part.key(&gpu, n, slot), cache.key(&pool, slot));
                assert_eq!(part.value(&gpu, n, slot), cache.value(&pool, slot));
            }
        }
        std::mem::swap(&mut pool, &mut layer.pool);
        layer.feed(5, &[1, 1]);
        super::writing::append(&mut gpu, &mirror, &layer);
        std::mem::swap(&mut pool, &mut layer.pool);
    }
}

#[test]
fn clusters_and_their_choices_are_those_of_the_cpu() {
    if !available() {
        return;
    }
    let (sinks, most, rounds) = (4usize, 40usize, 6);
    let mut layer = Layer::new(2, SHAPE, F16);
    layer.feed(3, &[120, 21]);
    let wanted = [37usize, 90];
    let mut gpu = Gpu::default();
    let mirror = Mirror::new(&mut gpu, &layer, Room { tokens: 160, ..Room::default() });
    let list = gpu.input(&items(&layer));
    let counts = gpu.input(&wanted.map(|w| w as u32));
    let centres = gpu.output(4 * most * 64 * 4);
    let bytes = 4 * mirror.stride * 4;
    let (labels, places, sizes) = (gpu.output(bytes), gpu.output(bytes), gpu.output(4 * most * 4));
    let arguments = |gpu: &Gpu, more: &[Buffer]| {
        let mut all = vec![
            mirror.kv(gpu),
            Arg::At(list),
            Arg::U32(sinks as u32),
            Arg::At(counts),
            Arg::U32(most as u32),
            Arg::At(centres),
        ];
        all.extend(more.iter().map(|b| Arg::At(*b)));
        all
    };
    let tile = 4 * (64 * 68 + 32 * 33 + 32);
    let all = arguments(&gpu, &[]);
    gpu.launch("cluster_start", [most, 2, 2], 32, 0, &all);
    for round in 0..=rounds {
        let all = arguments(&gpu, &[labels]);
        gpu.launch("cluster_assign", [4, 2, 2], 128, tile, &all);
        if round < rounds {
            gpu.launch("cluster_update", [most, 2, 2], 128, 4096, &all);
        }
    }
    let all = arguments(&gpu, &[labels, places, sizes]);
    gpu.launch("cluster_places", [most, 2, 2], 128, 128, &all);
    let mut clusters = vec![Clusters::default(); 4];
    for (i, (found, head)) in clusters.iter_mut().zip(layer.caches.iter().flatten()).enumerate() {
        let mut one = [ClusterItem { head, clusters: found }];
        cluster(&layer.threads, &layer.pool, &mut one, sinks, wanted[i / 2], rounds);
    }
    let (label, place): (Vec<u32>, Vec<u32>) = (gpu.read(labels), gpu.read(places));
    for (n, found) in clusters.iter().enumerate() {
        for (c, members) in found.members().iter().enumerate() {
            for (i, t) in members.iter().enumerate() {
                let at = n * mirror.stride + *t as usize;
                assert_eq!((label[at], place[at]), (c as u32, i as u32), "token {t} of {n}");
            }
        }
    }
    // A few tokens later.
    let ends = gpu.input(&[120, 21u32]);
    layer.feed(4, &[3, 2]);
    super::writing::append(&mut gpu, &mirror, &layer);
    layer.feed(4, &[1, 1]);
    super::writing::append(&mut gpu, &mirror, &layer);
    let budgets: Vec<u32> = (0..12).map(|i| (i * 13 % 50) as u32).collect();
    let (list, qkv) = (gpu.input(&items(&layer)), gpu.input(&layer.qkv));
    let budget = gpu.input(&budgets);
    let (order, other) = (gpu.output(12 * most * 4), gpu.output(12 * most * 4));
    let (chosen, count) = (gpu.output(12 * mirror.stride * 4), gpu.output(48));
    let arguments = [
        mirror.kv(&gpu),
        Arg::At(list),
        rows(&gpu, qkv, F32, layer.width),
        Arg::U32(sinks as u32),
        Arg::At(counts),
        Arg::U32(most as u32),
        Arg::At(centres),
        Arg::At(labels),
        Arg::At(places),
        Arg::At(sizes),
        Arg::At(ends),
        Arg::At(budget),
        Arg::At(order),
        Arg::At(other),
        Arg::U32(mirror.stride as u32),
        Arg::At(chosen),
        Arg::At(count),
    ];
    gpu.launch("cluster_select", [6, 2, 1], 128, 128 + 8 * most, &arguments);
    let found = lists(&gpu, chosen, count, mirror.stride);
    for (set, found) in found.iter().enumerate() {
        let (row, h) = (set / 6, set % 6);
        let query = &layer.qkv[row * layer.width + h * 64..][..64];
        let tokens = layer.caches[row][h / 3].tokens();
        let wanted = clusters[row * 2 + h / 3].select(query, budgets[set] as usize, tokens);
        assert_eq!(*found, wanted, "set {set}");
    }
}
