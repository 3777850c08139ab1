//! Packing into codes of a few bits.

use batchmax_kernels::kv::{Codec, KeyAxis, KvFormat};
use batchmax_kernels::pack::{PackItem, pack};

use super::cases;
use super::decode::{layer_of, shape_of};
use super::gpu::{Arg, Gpu, available};
use super::mirror::{Mirror, Room};
use super::testing::Layer;
use batchmax_kernels::cuda::emulated::shim::Moved;

/// Packs the first tokens of each head, counted by its length: in the mirror.
pub fn run(gpu: &mut Gpu, mirror: &Mirror, counts: impl Fn(usize) -> (usize, usize)) -> Moved {
    let codec = mirror.room.codec.expect("a codec");
    let mut heads = mirror.all_heads(gpu);
    let which: Vec<u32> = (0..heads.len() as u32).collect();
    let targets: Vec<(usize, usize)> = heads.iter().map(|h| counts(h.tokens as usize)).collect();
    let to: Vec<u32> = targets.iter().flat_map(|(k, v)| [*k as u32, *v as u32]).collect();
    let units =
        |from: u32, to: usize, unit: usize| to.div_ceil(unit).saturating_sub(from as usize / unit);
    let group = match codec.key_axis {
        KeyAxis::Channel => usize::from(codec.group),
        KeyAxis::Token => 32,
    };
    let all = || heads.iter().zip(&targets);
    let keys = all().map(|(h, to)| units(h.key_packed, to.0, group)).max().unwrap_or(0).max(1);
    let values = all().map(|(h, to)| units(h.value_packed, to.1, 32)).max().unwrap_or(0).max(1);
    let pitch = mirror.dim;
    let shared = 4 * 32 * (pitch + pitch / 4);
    let (which, to) = (gpu.input(&which), gpu.input(&to));
    let arguments = |gpu: &Gpu| vec![mirror.kv(gpu), Arg::At(which), Arg::At(to)];
    let with = |gpu: &Gpu, side| {
        let mut all = arguments(gpu);
        all.push(Arg::U32(side));
        all
    };
    let mut moved = match codec.key_axis {
        KeyAxis::Channel => {
            let (all, shared) = (arguments(gpu), 4 * (group * pitch + 16 * 256));
            gpu.launch("pack_channels", [keys, heads.len(), 1], 256, shared, &all)
        }
        KeyAxis::Token => {
            let all = with(gpu, 0);
            gpu.launch("pack_tokens", [keys, heads.len(), 1], 256, shared, &all)
        }
    };
    let all = with(gpu, 1);
    let more = gpu.launch("pack_tokens", [values, heads.len(), 1], 256, shared, &all);
    moved.loaded += more.loaded;
    moved.stored += more.stored;
    for (head, to) in heads.iter_mut().zip(targets) {
        head.key_packed = head.key_packed.max(to.0.min(head.tokens as usize) as u32);
        head.key_narrow = head.key_narrow.max(head.key_packed);
        head.value_packed = head.value_packed.max(to.1.min(head.tokens as usize) as u32);
    }
    mirror.put_heads(gpu, &heads);
    moved
}

/// In the layer.
pub fn on_cpu(layer: &mut Layer, codec: Codec, counts: impl Fn(usize) -> (usize, usize)) {
    for head in layer.caches.iter_mut().flatten() {
        let (keys, values) = counts(head.tokens());
        let mut items = [PackItem { heads: std::slice::from_mut(head), keys, values }];
        pack(&layer.threads, &mut layer.pool, &mut items, codec).expect("room");
    }
}

/// In both.
pub fn both(
    gpu: &mut Gpu,
    mirror: &Mirror,
    layer: &mut Layer,
    codec: Codec,
    counts: impl Fn(usize) -> (usize, usize),
) -> Moved {
    on_cpu(layer, codec, &counts);
    run(gpu, mirror, counts)
}

#[test]
fn codes_are_those_of_the_cpu_and_each_byte_moves_once() {
    if !available() {
        return;
    }
    for case in cases::of("pack") {
        for key_axis in [KeyAxis::Channel, KeyAxis::Token] {
            let (bits, group) = case.codes.expect("codes");
            let codec = Codec { bits, group, key_axis };
            let mut layer = layer_of(shape_of(&case), case.format, case.tokens);
            let mut gpu = Gpu::default();
            let room = Room { codec: Some(codec), ..Room::default() };
            let mirror = Mirror::new(&mut gpu, &layer, room);
            let moved = both(&mut gpu, &mirror, &mut layer, codec, |tokens| (tokens, tokens));
            mirror.assert_same(&gpu, &layer, &format!("{codec:?}"));
            let share = moved.bytes() / case.bytes();
            assert!(share > 0.9 && share < 1.1, "{case:?} {key_axis:?}: {share} of the floor");
        }
    }
}

#[test]
fn counts_that_end_inside_of_blocks_and_groups_grow_step_by_step() {
    if !available() {
        return;
    }
    for (bits, group, key_axis) in [
        (2, 32, KeyAxis::Channel),
        (4, 64, KeyAxis::Channel),
        (1, 128, KeyAxis::Channel),
        (8, 32, KeyAxis::Token),
        (4, 48, KeyAxis::Token),
    ] {
        for format in [KvFormat::F16, KvFormat::Bf16, KvFormat::Fp8] {
            let codec = Codec { bits, group, key_axis };
            let case = &cases::of("pack")[2];
            let mut layer = layer_of(shape_of(case), format, &[150, 1, 40]);
            let mut gpu = Gpu::default();
            let room = Room { codec: Some(codec), ..Room::default() };
            let mirror = Mirror::new(&mut gpu, &layer, room);
            for parts in [(9, 5), (6, 6), (2, 4), (0, 0)] {
                let counts = |t: usize| (t - t * parts.0 / 10, t - t * parts.1 / 10);
                both(&mut gpu, &mirror, &mut layer, codec, counts);
                mirror.assert_same(&gpu, &layer, &format!("{codec:?} {format:?} {parts:?}"));
            }
        }
    }
}
