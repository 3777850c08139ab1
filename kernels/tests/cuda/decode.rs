//! Attention of one row per sequence.

use batchmax_kernels::attend::{AttendShape, attend_decode};
use batchmax_kernels::kv::{Codec, KeyAxis, KvFormat};
use batchmax_kernels::reference;

use super::cases::{self, Case};
use super::gpu::{Arg, Buffer, Gpu, available};
use super::mirror::{Mirror, Room, items, rows};
use super::testing::{Layer, assert_close};
use batchmax_kernels::cuda::emulated::shim::Moved;

pub const PART: usize = 256;

/// Queries of a tile.
pub fn tile_of(group: usize) -> usize {
    let tiles = group.div_ceil(8);
    group.div_ceil(tiles).next_power_of_two()
}

/// Bytes of shared memory of `attend_decode_*`.
fn shared_bytes(tile: usize, dim: usize, plain: bool) -> usize {
    let queries = tile * dim * if plain { 1 } else { 2 };
    let slots = 128 / (dim / 8);
    4 * (queries + PART * tile + 6 * tile).max(slots * tile * dim + 2 * tile)
}

/// Outputs and logarithms of denominators.
pub struct Attended {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub moved: Moved,
}

fn name(format: KvFormat) -> &'static str {
    match format {
        KvFormat::F16 => "f16",
        KvFormat::Bf16 => "bf16",
        _ => "fp8",
    }
}

/// Runs the kernels over the caches of a mirror.
pub fn run(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &Layer,
    without: Option<(Buffer, Buffer)>,
) -> Attended {
    let shape = layer.shape;
    let (count, dim) = (layer.rows(), shape.head_dim);
    let longest = mirror.all_heads(gpu).iter().map(|h| h.tokens as usize).max().unwrap_or(0);
    let parts = longest.div_ceil(PART).max(1);
    let plain = mirror.room.codec.is_none() && mirror.room.kept.is_none();
    let tile = tile_of(shape.group());
    let tiles = shape.group().div_ceil(tile);
    let (qkv, list) = (gpu.input(&layer.qkv), gpu.input(&items(layer)));
    let (out, lse) =
        (gpu.output(count * shape.heads * dim * 4), gpu.output(count * shape.heads * 4));
    let partial = gpu.output(layer.caches.len() * shape.heads * parts * (dim + 8) * 4);
    let end = if plain { "" } else { "_any" };
    let (a, b) = without.map_or((Arg::Null, Arg::Null), |(a, b)| (Arg::At(a), Arg::At(b)));
    let out_rows = |gpu: &Gpu| rows(gpu, out, KvFormat::F32, shape.heads * dim);
    let arguments = [
        mirror.kv(gpu),
        Arg::At(list),
        rows(gpu, qkv, KvFormat::F32, layer.width),
        Arg::U32(shape.heads as u32),
        Arg::F32(shape.scale),
        Arg::F32(shape.softcap.unwrap_or(0.0)),
        Arg::U32(shape.window.unwrap_or(0)),
        Arg::U32(PART as u32),
        a,
        b,
        out_rows(gpu),
        Arg::At(lse),
        Arg::At(partial),
    ];
    let moved = gpu.launch(
        &format!("attend_decode_{}_{tile}{end}", name(mirror.format)),
        [parts, shape.kv_heads * tiles, layer.caches.len()],
        128,
        shared_bytes(tile, dim, plain),
        &arguments,
    );
    let arguments = [
        mirror.kv(gpu),
        Arg::At(list),
        Arg::U32(shape.heads as u32),
        Arg::U32(PART as u32),
        Arg::U32(parts as u32),
        Arg::At(partial),
        out_rows(gpu),
        Arg::At(lse),
    ];
    gpu.launch("attend_join", [shape.heads, layer.caches.len(), 1], 32, 0, &arguments);
    Attended { out: gpu.read(out), lse: gpu.read(lse), moved }
}

pub fn shape_of(case: &Case) -> AttendShape {
    let (heads, kv_heads, head_dim) = case.heads;
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttendShape { heads, kv_heads, head_dim, scale, softcap: None, window: None }
}

/// A layer whose sequences have these tokens, the last of them in a step of its own.
pub fn layer_of(shape: AttendShape, format: KvFormat, tokens: &[usize]) -> Layer {
    let mut layer = Layer::new(tokens.len(), shape, format);
    let before: Vec<usize> = tokens.iter().map(|t| t - 1).collect();
    layer.feed(31, &before);
    layer.feed(31, &vec![1; tokens.len()]);
    layer
}

/// Compares with double precision and with the CPU's kernel.
pub fn check(layer: &Layer, found: &Attended, tolerance: f64, what: &str) {
    let shape = layer.shape;
    let per_row = shape.heads * shape.head_dim;
    for (i, item) in layer.items().iter().enumerate() {
        let (out, lse) = reference::attend(&layer.pool, item, &shape, &layer.qkv, layer.width);
        assert_close(&found.out[i * per_row..][..per_row], &out, tolerance, what);
        let found = &found.lse[i * shape.heads..][..shape.heads];
        assert_close(found, &lse, tolerance, &format!("{what}: lse"));
    }
    let mut out = vec![0.0; found.out.len()];
    attend_decode(
        &layer.threads,
        &layer.pool,
        &layer.items(),
        &shape,
        &layer.qkv,
        layer.width,
        &mut out,
        None,
    );
    let out: Vec<f64> = out.iter().map(|x| f64::from(*x)).collect();
    assert_close(&found.out, &out, 2.0 * tolerance, &format!("{what}: CPU"));
}

#[test]
fn whole_caches_by_the_definition_and_each_byte_once() {
    if !available() {
        return;
    }
    for case in cases::of("attend-decode").iter().filter(|c| c.codes.is_none()) {
        let layer = layer_of(shape_of(case), case.format, case.tokens);
        let mut gpu = Gpu::default();
        let mirror = Mirror::new(&mut gpu, &layer, Room::default());
        let found = run(&mut gpu, &mirror, &layer, None);
        check(&layer, &found, case.tolerance, &format!("{case:?}"));
        // Groups of more than eight queries read the cache twice, from nearer memory then.
        let tiles = layer.shape.group().div_ceil(8) as f64;
        let share = found.moved.bytes() / (tiles * case.bytes() + around(&layer));
        assert!(share > 0.97 && share < 1.1, "{case:?}: {share} of the floor");
        assert!(case.flops() > 0.0);
    }
}

/// Bytes beside the cache: each part reads its queries and what describes it, and writes its results.
fn around(layer: &Layer) -> f64 {
    let shape = layer.shape;
    let heads = layer.caches.iter().flatten();
    let parts: usize = heads.map(|head| head.tokens().div_ceil(PART).max(1)).sum();
    let tiles = shape.group().div_ceil(8);
    (parts * (shape.group() * (2 * shape.head_dim + 2) * 4 + tiles * 80)) as f64
}

/// As the tokens of a settled cache are packed.
fn packed(case: &Case, key_axis: KeyAxis) -> Codec {
    let (bits, group) = case.codes.expect("codes");
    Codec { bits, group, key_axis }
}

#[test]
fn packed_caches_by_the_definition_and_each_byte_once() {
    if !available() {
        return;
    }
    for case in cases::of("attend-decode").iter().filter(|c| c.codes.is_some()) {
        for axis in [KeyAxis::Channel, KeyAxis::Token] {
            let codec = packed(case, axis);
            let mut layer = layer_of(shape_of(case), case.format, case.tokens);
            let mut gpu = Gpu::default();
            let room = Room { codec: Some(codec), ..Room::default() };
            let mirror = Mirror::new(&mut gpu, &layer, room);
            super::packing::both(&mut gpu, &mirror, &mut layer, codec, |tokens| (tokens, tokens));
            let found = run(&mut gpu, &mirror, &layer, None);
            check(&layer, &found, case.tolerance, &format!("{case:?} {axis:?}"));
            let share = found.moved.bytes() / (case.bytes() + around(&layer));
            assert!(share > 0.97 && share < 1.1, "{case:?} {axis:?}: {share} of the floor");
        }
    }
}
