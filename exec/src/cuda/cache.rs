//! Ops that write caches and attend to them.

use batchmax_kernels::cuda::{Address, Arg};
use batchmax_sim::op::{Heads, Lanes, Phase};

use super::interpreter::{Interpreter, Items};
use super::memory::{Kind, Rows, bytes_of};
use crate::error::ExecError;

/// Tokens of a part of a decode step's attention, whatever the batch.
const PART: usize = 512;
/// Widths of heads for which there are kernels on tensor cores.
const TENSOR_DIMS: [u32; 5] = [64, 80, 96, 128, 256];

/// Caches that are attended to.
#[derive(Clone)]
pub(super) struct Attended {
    /// As kernels take them.
    pub(super) kv: Arg,
    /// Their KV heads.
    pub(super) kv_heads: u32,
    /// Tokens of the longest one.
    pub(super) longest: usize,
    /// All of their tokens are whole.
    pub(super) plain: bool,
}

/// Where attention goes.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) rows: Rows,
    pub(super) lse: Address,
}

/// Queries of a tile of a decode step.
fn tile_of(group: usize) -> usize {
    let tiles = group.div_ceil(8).max(1);
    group.div_ceil(tiles).next_power_of_two()
}

/// Lanes that read a row of a head together.
pub(super) fn lanes_of(dim: usize) -> usize {
    match dim {
        ..=64 => 8,
        65..=128 => 16,
        _ => 32,
    }
}

/// Bytes of shared memory of kernels that multiply 32 rows by 32 keys, `more` floats beside both.
pub(super) fn tile_bytes(dim: usize, more: usize) -> usize {
    4 * (64 * (dim + 4) + more)
}

fn decode_kernel(kind: Kind, tile: usize, plain: bool) -> Option<&'static str> {
    macro_rules! names {
        ($format:literal) => {
            match (tile, plain) {
                (1, true) => concat!("attend_decode_", $format, "_1"),
                (2, true) => concat!("attend_decode_", $format, "_2"),
                (4, true) => concat!("attend_decode_", $format, "_4"),
                (_, true) => concat!("attend_decode_", $format, "_8"),
                (1, false) => concat!("attend_decode_", $format, "_1_any"),
                (2, false) => concat!("attend_decode_", $format, "_2_any"),
                (4, false) => concat!("attend_decode_", $format, "_4_any"),
                (_, false) => concat!("attend_decode_", $format, "_8_any"),
            }
        };
    }
    Some(match kind {
        Kind::F16 => names!("f16"),
        Kind::Bf16 => names!("bf16"),
        Kind::Fp8 => names!("fp8"),
        Kind::F32 => return None,
    })
}

fn tensor_kernel(kind: Kind, dim: u32) -> Option<&'static str> {
    macro_rules! names {
        ($format:literal) => {
            match dim {
                64 => concat!("attend_prefill_", $format, "_64"),
                80 => concat!("attend_prefill_", $format, "_80"),
                96 => concat!("attend_prefill_", $format, "_96"),
                128 => concat!("attend_prefill_", $format, "_128"),
                _ => concat!("attend_prefill_", $format, "_256"),
            }
        };
    }
    match kind {
        Kind::F16 if TENSOR_DIMS.contains(&dim) => Some(names!("f16")),
        Kind::Bf16 if TENSOR_DIMS.contains(&dim) => Some(names!("bf16")),
        _ => None,
    }
}

impl Interpreter<'_, '_> {
    pub(super) fn scale(&self) -> Arg {
        Arg::F32(self.model.attention_scale() as f32)
    }

    pub(super) fn attention_cap(&self) -> Arg {
        Arg::F32(self.model.attention_softcap.unwrap_or(0.0) as f32)
    }

    pub(super) fn qk_norm(
        &mut self,
        heads: Heads,
        rows: usize,
        layer: usize,
    ) -> Result<(), ExecError> {
        let Some((query, key)) = self.weights.layers[layer].qk_norm else { return Ok(()) };
        let lanes = lanes_of(heads.dim as usize);
        for (offset, count, weight) in [(0, heads.query, query), (heads.query, heads.kv, key)] {
            let args = vec![
                self.slots.qkv.arg(),
                Arg::U32(rows as u32),
                Arg::U32(offset * heads.dim),
                Arg::U32(count),
                Arg::U32(heads.dim),
                Arg::At(weight),
                Arg::U32(Kind::F32 as u32),
                Arg::F32(self.model.norm_eps as f32),
            ];
            let grid = [(rows * count as usize * lanes).div_ceil(128), 1, 1];
            self.device.launch("qk_norm", grid, (128, 0), args)?;
        }
        Ok(())
    }

    pub(super) fn rotate(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let positions = if heads.form.rerotated {
            let places = self.places(lanes, layer);
            self.device.put("places", &bytes_of(&places))?
        } else {
            self.positions()?
        };
        let (table, pairs) = self.turns;
        let (rows, count) = (lanes.rows() as usize, heads.query + heads.kv);
        let args = vec![
            self.slots.qkv.arg(),
            Arg::U32(rows as u32),
            Arg::U32(count),
            Arg::U32(heads.dim),
            Arg::At(positions),
            Arg::At(table),
            Arg::U32(pairs),
            Arg::U32(self.weights.interleaved.into()),
        ];
        let pieces = if pairs.is_multiple_of(8) { pairs / 8 } else { pairs };
        let grid = [(rows * (count * pieces) as usize).div_ceil(256), 1, 1];
        Ok(self.device.launch("rope", grid, (256, 0), args)?)
    }

    /// Where the step's rows will stand in their caches, which do not hold them yet.
    fn places(&self, lanes: &Lanes, layer: usize) -> Vec<u32> {
        let of = |lane: &batchmax_sim::op::Lane| {
            let (rows, sequences) = (lane.rows, lane.first..lane.first + lane.sequences);
            sequences.flat_map(move |s| {
                let heads = self.kv.main.heads(layer, s as usize);
                let first = heads.first().map_or(0, |head| head.tokens) as u32;
                first..first + rows
            })
        };
        lanes.as_slice().iter().flat_map(of).collect()
    }

    pub(super) fn append(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.kept_items(lanes)?;
        let kv_heads = heads.kv as usize;
        let counted = self.advanced.get(layer).copied().unwrap_or(false)
            && self.kv.main.is_known(layer)
            && heads.form.state.is_none();
        self.open_states(heads, &items, layer)?;
        for item in &items.list {
            for head in 0..kv_heads {
                let index = item.sequence * kv_heads + head;
                self.kv.main.reserve(&mut self.kv.pool, layer, index, item.rows)?;
                let head = if counted {
                    self.kv.main.follow(layer, index)
                } else {
                    self.kv.main.change(layer, index)
                };
                head.tokens += item.rows;
            }
        }
        let kv = self.caches(layer)?;
        self.append_to(heads, kv, &items)
    }

    /// Writes the keys and values of the items' rows behind what caches hold, which counts them already.
    pub(super) fn append_to(
        &mut self,
        heads: Heads,
        kv: Arg,
        items: &Items,
    ) -> Result<(), ExecError> {
        let positions = self.positions()?;
        let key = heads.query * heads.dim;
        let args = vec![
            kv,
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32(key),
            Arg::U32(key + heads.kv * heads.dim),
            Arg::At(positions),
        ];
        let pieces = items.most_rows() * (heads.kv * 2 * heads.dim / 8) as usize;
        let grid = [pieces.div_ceil(256), items.list.len(), 1];
        Ok(self.device.launch("append", grid, (256, 0), args)?)
    }

    /// The ordinary caches of a layer.
    pub(super) fn attended(&mut self, layer: usize, items: &Items) -> Result<Attended, ExecError> {
        Ok(Attended {
            kv: self.caches(layer)?,
            kv_heads: self.model.kv_heads,
            longest: self.longest(layer, items),
            plain: self.kv.main.layout.is_plain(),
        })
    }

    pub(super) fn out(&self) -> Out {
        Out { rows: self.slots.attention, lse: self.slots.log_sum_exp }
    }

    pub(super) fn attend(
        &mut self,
        phase: Phase,
        heads: Heads,
        window: Option<u32>,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let caches = self.attended(layer, &items)?;
        let out = self.out();
        match phase {
            Phase::Prefill => self.attend_prefill(heads, &caches, &items, window, None, out),
            Phase::Decode => self.attend_decode(heads, &caches, &items, window, None, out),
        }
    }

    /// Attention of one row per item. `without`: lists of tokens that it leaves out, and where they begin.
    pub(super) fn attend_decode(
        &mut self,
        heads: Heads,
        caches: &Attended,
        items: &Items,
        window: Option<u32>,
        without: Option<(Address, Address)>,
        out: Out,
    ) -> Result<(), ExecError> {
        let (dim, kv_heads) = (heads.dim as usize, caches.kv_heads as usize);
        let group = heads.query as usize / kv_heads;
        let tile = tile_of(group);
        let kind = self.kv.main.layout.kind;
        let Some(kernel) = decode_kernel(kind, tile, caches.plain) else {
            return Err(self.no_such_cache());
        };
        let parts = caches.longest.div_ceil(PART).max(1);
        let count = items.list.len();
        let query = heads.query as usize;
        let partial =
            self.device.scratch("partial", (count * query * parts * (dim + 8) * 4) as u64)?;
        let (without, from) = without.unwrap_or_default();
        let args = vec![
            caches.kv.clone(),
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32(heads.query),
            self.scale(),
            self.attention_cap(),
            Arg::U32(window.unwrap_or(0)),
            Arg::U32(PART as u32),
            Arg::At(without),
            Arg::At(from),
            out.rows.arg(),
            Arg::At(out.lse),
            Arg::At(partial),
        ];
        let queries = tile * dim * if caches.plain { 1 } else { 2 };
        let sums = 128 / (dim / 8) * tile * dim + 2 * tile;
        let shared = 4 * (queries + PART * tile + 6 * tile).max(sums);
        let grid = [parts, kv_heads * group.div_ceil(tile), count];
        self.device.launch(kernel, grid, (128, shared), args)?;
        if parts < 2 {
            return Ok(());
        }
        let args = vec![
            caches.kv.clone(),
            Arg::At(items.at),
            Arg::U32(heads.query),
            Arg::U32(PART as u32),
            Arg::U32(parts as u32),
            Arg::At(partial),
            out.rows.arg(),
            Arg::At(out.lse),
        ];
        Ok(self.device.launch("attend_join", [query, count, 1], (32, 0), args)?)
    }

    /// Attention of all rows of each item. `at`: their positions, where they don't stand at the end.
    pub(super) fn attend_prefill(
        &mut self,
        heads: Heads,
        caches: &Attended,
        items: &Items,
        window: Option<u32>,
        at: Option<Address>,
        out: Out,
    ) -> Result<(), ExecError> {
        let dim = heads.dim as usize;
        let (kernel, queries, shared) = match tensor_kernel(self.slots.qkv.kind, heads.dim) {
            Some(kernel) => (kernel, 64, 2 * 128 * (dim + 8) + 512),
            None => ("attend_prefill", 32, tile_bytes(dim, 32 * 34 + 96)),
        };
        let args = vec![
            caches.kv.clone(),
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32(heads.query),
            self.scale(),
            self.attention_cap(),
            Arg::U32(window.unwrap_or(0)),
            Arg::At(at.unwrap_or_default()),
            out.rows.arg(),
            Arg::At(out.lse),
        ];
        let group = (heads.query / caches.kv_heads) as usize;
        let tiles = (items.most_rows() * group).div_ceil(queries);
        let grid = [tiles, caches.kv_heads as usize, items.list.len()];
        Ok(self.device.launch(kernel, grid, (128, shared), args)?)
    }

    pub(super) fn no_such_cache(&self) -> ExecError {
        ExecError::NotExecutable {
            model: self.model.name.clone(),
            part: "a cache in f32 on a CUDA device (it has f16, bf16 and fp8)".to_owned(),
        }
    }
}
