//! The caches on a device: one piece of memory with a hard budget, and for every KV head what the host knows of it.
//!
//! Counts and tables are kept here by the rules of [`batchmax_kernels::kv`] and copied to the device when they have changed;
//! which tokens stay is decided there. What counts against the budget are the bytes that the CPU's halves have, which is what
//! the simulator predicts. A half on the device begins at a multiple of 64 bytes and has up to seven channels more where pruned
//! channels are no multiple of eight, so that the piece of memory is larger than the budget by as much at most, and by room
//! for what stands twice while a cache of several forms loses tokens ([`Pool::new`]).

use batchmax_kernels::cuda::{Address, Arg, CudaError};
use batchmax_kernels::kv::{BLOCK_TOKENS, Codec, KeyAxis, KvFormat, PoolFull};
use batchmax_sim::form::{self, Form};
use batchmax_sim::units::{Bytes, Tokens};

use super::memory::{Device, Kind, bytes_of};
use super::pool::Pool;
use crate::error::ExecError;

/// Forms of halves: the tables of a head, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    KeysWhole = 0,
    ValuesWhole = 1,
    KeysPacked = 2,
    ValuesPacked = 3,
    KeysPruned = 4,
}

/// Tables of a head where all tokens are whole, and where not: then whole and pruned halves have two, one for those that an
/// eviction leaves.
const PLAIN_TABLES: usize = 2;
const MIXED_TABLES: usize = 8;

/// How caches are stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) kind: Kind,
    pub(super) dim: usize,
    pub(super) kv_heads: usize,
    pub(super) codec: Option<Codec>,
    /// Channels that pruned keys keep.
    pub(super) channels: Option<usize>,
    /// Floats of a state.
    pub(super) state: usize,
}

pub(super) fn kind_of(format: KvFormat) -> Kind {
    match format {
        KvFormat::F32 => Kind::F32,
        KvFormat::F16 => Kind::F16,
        KvFormat::Bf16 => Kind::Bf16,
        KvFormat::Fp8 => Kind::Fp8,
    }
}

impl Layout {
    pub(super) fn new(format: KvFormat, dim: usize, kv_heads: usize) -> Self {
        Self { kind: kind_of(format), dim, kv_heads, codec: None, channels: None, state: 0 }
    }

    /// Takes in what a form needs beside whole halves.
    pub(super) fn add(&mut self, form: &Form) {
        if let Some(packed) = form.packed {
            let key_axis = match packed.keys {
                form::KeyAxis::Channel => KeyAxis::Channel,
                form::KeyAxis::Token => KeyAxis::Token,
            };
            let (bits, group) = (packed.bits as u8, packed.group as u16);
            self.codec = Some(Codec { bits, group, key_axis });
        }
        self.channels = self.channels.or(form.pruned.map(|p| p.channels as usize));
        if let Some(state) = form.state {
            self.state = state.rank as usize * (self.dim + 1);
        }
    }

    pub(super) fn is_plain(&self) -> bool {
        self.codec.is_none() && self.channels.is_none()
    }

    fn tables(&self) -> usize {
        if self.is_plain() { PLAIN_TABLES } else { MIXED_TABLES }
    }

    /// Channels of keys that are packed or pruned.
    pub(super) fn narrow(&self) -> usize {
        self.channels.unwrap_or(self.dim)
    }

    /// Bytes of a token's key and value.
    pub(super) fn token_bytes(&self) -> usize {
        2 * self.dim * self.kind.bytes() as usize
    }

    /// Bytes that a half of a form counts, and those that it takes on the device.
    pub(super) fn bytes(&self, part: Part) -> (u64, u64) {
        let pitch = self.narrow().next_multiple_of(8);
        let plain = |channels: usize| (channels * BLOCK_TOKENS) as u64 * self.kind.bytes();
        match (part, self.codec) {
            (Part::KeysPruned, _) => (plain(self.narrow()), plain(pitch)),
            (Part::KeysPacked, Some(codec)) => {
                let bytes = |channels| codec.key_half_bytes(channels) as u64;
                (bytes(self.narrow()), bytes(pitch))
            }
            (Part::ValuesPacked, Some(codec)) => {
                let bytes = codec.value_half_bytes(self.dim) as u64;
                (bytes, bytes)
            }
            _ => (plain(self.dim), plain(self.dim)),
        }
    }

    /// Numbers of the list of a head's channels.
    pub(super) fn kept_stride(&self) -> usize {
        self.channels.map_or(0, |c| c + self.dim)
    }
}

/// The keys or the values of a head.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Side {
    /// The first so many tokens are packed.
    pub(super) packed: usize,
    /// The first so many are packed or pruned.
    pub(super) narrow: usize,
    /// Halves of each form, reserved ones included.
    pub(super) halves: [usize; 3],
}

/// Halves of each form (packed, pruned, whole) once `tokens` are left, of which the first `packed` and `narrow` are that: as
/// `Halves::needed` of the CPU's caches.
pub(super) fn needed(packed: usize, narrow: usize, tokens: usize) -> [usize; 3] {
    let between = |from: usize, to: usize| {
        if to > from { to.div_ceil(BLOCK_TOKENS) - from / BLOCK_TOKENS } else { 0 }
    };
    [packed.div_ceil(BLOCK_TOKENS), between(packed, narrow), between(narrow, tokens)]
}

impl Side {
    /// The block of the first half of each form.
    pub(super) fn base(&self, form: usize) -> usize {
        [0, self.packed / BLOCK_TOKENS, self.narrow / BLOCK_TOKENS][form]
    }
}

/// What the host knows of the cache of a KV head.
#[derive(Clone, Debug, Default)]
pub(super) struct Head {
    pub(super) tokens: usize,
    pub(super) sides: [Side; 2],
    /// The first so many tokens have a tally; 0: nobody tallies.
    pub(super) tallied: usize,
    /// The place of its state, in units.
    pub(super) state: Option<u32>,
    /// Its channels have been chosen.
    pub(super) chosen: bool,
    /// Its whole and pruned halves are in their second tables.
    pub(super) second: bool,
}

impl Head {
    pub(super) fn is_plain(&self) -> bool {
        self.sides.iter().all(|side| side.narrow == 0)
    }
}

/// Caches of all layers and sequences: the ordinary ones, or partial ones beside them.
pub(super) struct Caches {
    pub(super) layout: Layout,
    layers: usize,
    pub(super) sequences: usize,
    /// Tokens between the numbers of heads in arrays by token.
    pub(super) stride: usize,
    heads: Vec<Head>,
    tables: Vec<u32>,
    /// What the device does not know yet, per layer: heads, and the changed range of tables.
    stale: Vec<bool>,
    changed: Vec<Option<(usize, usize)>>,
    at: At,
}

/// Where things are on the device.
#[derive(Clone, Copy)]
struct At {
    pool: Address,
    heads: Address,
    tables: Address,
    positions: Address,
    kept: Address,
}

/// Bytes of a head as kernels read it.
pub(super) const HEAD_BYTES: usize = 64;

impl Caches {
    /// Empty ones for up to `tokens` tokens a head.
    pub(super) fn new(
        device: &mut Device<'_>,
        pool: &Pool,
        layout: Layout,
        (layers, sequences): (usize, usize),
        tokens: usize,
    ) -> Result<Self, CudaError> {
        let stride = tokens.next_multiple_of(BLOCK_TOKENS).max(BLOCK_TOKENS);
        let count = layers * sequences * layout.kv_heads;
        let table = count * layout.tables() * (stride / BLOCK_TOKENS);
        let at = At {
            pool: pool.at(),
            heads: device.alloc((count * HEAD_BYTES) as u64)?,
            tables: device.alloc(4 * table as u64)?,
            positions: device.alloc((4 * count * stride) as u64)?,
            kept: match layout.kept_stride() {
                0 => Address::default(),
                numbers => device.alloc((2 * count * numbers) as u64)?,
            },
        };
        Ok(Self {
            layout,
            layers,
            sequences,
            stride,
            heads: vec![Head::default(); count],
            tables: vec![0; table],
            stale: vec![true; layers],
            changed: vec![None; layers],
            at,
        })
    }

    pub(super) fn layers(&self) -> usize {
        self.layers
    }

    fn blocks(&self) -> usize {
        self.stride / BLOCK_TOKENS
    }

    /// Heads of a layer.
    pub(super) fn per_layer(&self) -> usize {
        self.sequences * self.layout.kv_heads
    }

    /// Tokens of all heads of a layer in arrays by token.
    pub(super) fn plane(&self) -> usize {
        self.per_layer() * self.stride
    }

    pub(super) fn heads(&self, layer: usize, sequence: usize) -> &[Head] {
        let kv_heads = self.layout.kv_heads;
        let first = layer * self.per_layer() + sequence * kv_heads;
        &self.heads[first..first + kv_heads]
    }

    pub(super) fn head(&self, layer: usize, index: usize) -> &Head {
        &self.heads[layer * self.per_layer() + index]
    }

    /// Changes a head; the device learns of it before the next kernel of the layer.
    pub(super) fn change(&mut self, layer: usize, index: usize) -> &mut Head {
        self.stale[layer] = true;
        let per_layer = self.per_layer();
        &mut self.heads[layer * per_layer + index]
    }

    /// Changes of a head what kernels don't read, or what the device has done already.
    pub(super) fn follow(&mut self, layer: usize, index: usize) -> &mut Head {
        let per_layer = self.per_layer();
        &mut self.heads[layer * per_layer + index]
    }

    /// Whether the device knows the heads of a layer.
    pub(super) fn is_known(&self, layer: usize) -> bool {
        !self.stale[layer]
    }

    /// First entry of a table among those of its layer.
    fn table(&self, index: usize, part: Part, second: bool) -> usize {
        let kind = match part {
            _ if self.layout.is_plain() => part as usize,
            Part::KeysWhole if second => 5,
            Part::ValuesWhole if second => 6,
            Part::KeysPruned if second => 7,
            _ => part as usize,
        };
        (index * self.layout.tables() + kind) * self.blocks()
    }

    fn entry(&self, layer: usize, index: usize, part: Part, second: bool, block: usize) -> usize {
        let per_layer = self.per_layer() * self.layout.tables() * self.blocks();
        layer * per_layer + self.table(index, part, second) + block
    }

    pub(super) fn place(&self, layer: usize, index: usize, part: Part, block: usize) -> u32 {
        let second = self.head(layer, index).second;
        self.tables[self.entry(layer, index, part, second, block)]
    }

    pub(super) fn set_place(
        &mut self,
        (layer, index): (usize, usize),
        part: Part,
        second: bool,
        block: usize,
        place: u32,
    ) {
        let at = self.entry(layer, index, part, second, block);
        self.tables[at] = place;
        let range = self.changed[layer].get_or_insert((at, at + 1));
        *range = (range.0.min(at), range.1.max(at + 1));
    }

    /// The part of a side in a form: packed, pruned, whole.
    pub(super) fn part(side: usize, form: usize) -> Part {
        match (side, form) {
            (0, 0) => Part::KeysPacked,
            (0, 1) => Part::KeysPruned,
            (0, _) => Part::KeysWhole,
            (_, 0) => Part::ValuesPacked,
            _ => Part::ValuesWhole,
        }
    }

    /// Takes a half for a head, behind those that it has of the form.
    pub(super) fn push(
        &mut self,
        pool: &mut Pool,
        (layer, index): (usize, usize),
        (side, form): (usize, usize),
    ) -> Result<(), ExecError> {
        let part = Self::part(side, form);
        let (counted, bytes) = self.layout.bytes(part);
        let head = self.head(layer, index);
        let (of, second) = (head.sides[side], head.second);
        let block = of.base(form) + of.halves[form];
        if block >= self.blocks() {
            return Err(ExecError::LongCache { tokens: self.stride as Tokens });
        }
        let place = pool.take(counted, bytes)?;
        self.set_place((layer, index), part, second, block, place);
        self.follow(layer, index).sides[side].halves[form] += 1;
        Ok(())
    }

    /// Gives halves of a form back: `count` of them from the `first` on.
    pub(super) fn give_back(
        &mut self,
        pool: &mut Pool,
        (layer, index): (usize, usize),
        (side, form): (usize, usize),
        blocks: std::ops::Range<usize>,
    ) {
        let part = Self::part(side, form);
        let (counted, bytes) = self.layout.bytes(part);
        for block in blocks.rev() {
            pool.give(self.place(layer, index, part, block), counted, bytes);
        }
    }

    /// Takes whole halves until a head has room for `extra` tokens more.
    pub(super) fn reserve(
        &mut self,
        pool: &mut Pool,
        layer: usize,
        index: usize,
        extra: usize,
    ) -> Result<(), ExecError> {
        let missing = |head: &Head| {
            let tokens = head.tokens + extra;
            head.sides.map(|side| {
                let wanted = tokens.div_ceil(BLOCK_TOKENS) - side.base(2);
                if tokens <= side.narrow { 0 } else { wanted.saturating_sub(side.halves[2]) }
            })
        };
        let [mut keys, mut values] = missing(self.head(layer, index));
        let counted = self.layout.bytes(Part::KeysWhole).0;
        pool.check_room((keys + values) as u64 * counted)?;
        while keys + values > 0 {
            if keys >= values {
                self.push(pool, (layer, index), (0, 2))?;
                keys -= 1;
            } else {
                self.push(pool, (layer, index), (1, 2))?;
                values -= 1;
            }
        }
        Ok(())
    }

    /// Keeps the first `tokens` tokens of a head and gives back the halves that they don't need.
    pub(super) fn truncate(&mut self, pool: &mut Pool, layer: usize, index: usize, tokens: usize) {
        let mut head = self.head(layer, index).clone();
        head.tokens = head.tokens.min(tokens);
        head.tallied = head.tallied.min(tokens);
        for side in 0..2 {
            let old = head.sides[side];
            let (packed, narrow) = (old.packed.min(head.tokens), old.narrow.min(head.tokens));
            let mut new = Side { packed, narrow, halves: needed(packed, narrow, head.tokens) };
            for form in 0..3 {
                // Where a form has no tokens left, none of its halves stays, wherever they begin.
                let first = old.base(form);
                let stays = new.halves[form].min(old.halves[form]);
                self.give_back(
                    pool,
                    (layer, index),
                    (side, form),
                    first + stays..first + old.halves[form],
                );
                new.halves[form] = stays;
            }
            head.sides[side] = new;
        }
        if head.tokens == 0 {
            head.chosen = false;
        }
        *self.change(layer, index) = head;
    }

    /// Drops everything of a head.
    pub(super) fn clear(&mut self, pool: &mut Pool, layer: usize, index: usize) {
        self.truncate(pool, layer, index, 0);
        if let Some(place) = self.change(layer, index).state.take() {
            let bytes = 4 * self.layout.state as u64;
            pool.give(place, bytes, bytes);
        }
    }

    /// A head as kernels read it. `second`: with its whole and pruned halves in the other tables.
    pub(super) fn image(&self, index: usize, head: &Head, other: bool) -> [u32; 16] {
        let second = head.second != other;
        let table = |part| match (part, self.layout.is_plain()) {
            (Part::KeysWhole | Part::ValuesWhole, _) | (_, false) => {
                self.table(index, part, second) as u32
            }
            _ => 0,
        };
        let channels = if head.chosen { self.layout.narrow() } else { self.layout.dim };
        [
            head.tokens as u32,
            head.sides[0].packed as u32,
            head.sides[0].narrow as u32,
            head.sides[1].packed as u32,
            table(Part::KeysWhole),
            table(Part::KeysPacked),
            table(Part::KeysPruned),
            table(Part::ValuesWhole),
            table(Part::ValuesPacked),
            (index * self.stride) as u32,
            (index * self.layout.kept_stride()) as u32,
            channels as u32,
            head.state.unwrap_or(0),
            0,
            0,
            0,
        ]
    }

    /// All heads of a layer as kernels read them.
    pub(super) fn images(&self, layer: usize) -> Vec<u32> {
        let first = layer * self.per_layer();
        (0..self.per_layer())
            .flat_map(|index| self.image(index, &self.heads[first + index], false))
            .collect()
    }

    /// Tells the device what has changed in a layer.
    pub(super) fn sync(&mut self, device: &mut Device<'_>, layer: usize) -> Result<(), CudaError> {
        if let Some((from, to)) = self.changed[layer].take() {
            device
                .upload(self.at.tables.plus(4 * from as u64), &bytes_of(&self.tables[from..to]))?;
        }
        if std::mem::take(&mut self.stale[layer]) {
            let to = self.heads_at(layer);
            device.upload(to, &bytes_of(&self.images(layer)))?;
        }
        Ok(())
    }

    pub(super) fn heads_at(&self, layer: usize) -> Address {
        self.at.heads.plus((layer * self.per_layer() * HEAD_BYTES) as u64)
    }

    pub(super) fn positions_at(&self, layer: usize) -> Address {
        self.at.positions.plus(4 * (layer * self.plane()) as u64)
    }

    pub(super) fn kept_at(&self, layer: usize) -> Address {
        match self.layout.kept_stride() {
            0 => Address::default(),
            numbers => self.at.kept.plus((2 * layer * self.per_layer() * numbers) as u64),
        }
    }

    /// The argument that all kernels on caches take, with these heads.
    pub(super) fn arg_with(&self, layer: usize, heads: Address) -> Arg {
        let per_layer = self.per_layer() * self.layout.tables() * self.blocks();
        let addresses = [
            self.at.pool,
            self.at.tables.plus(4 * (layer * per_layer) as u64),
            heads,
            self.positions_at(layer),
            self.kept_at(layer),
        ];
        kv_arg(&addresses, &self.layout)
    }

    /// The same with the layer's own heads.
    pub(super) fn arg(&self, layer: usize) -> Arg {
        self.arg_with(layer, self.heads_at(layer))
    }
}

/// As kernels take caches by value: pool, tables, heads, positions, channels.
pub(super) fn kv_arg(addresses: &[Address; 5], layout: &Layout) -> Arg {
    let mut bytes: Vec<u8> = addresses.iter().flat_map(|a| a.0.to_ne_bytes()).collect();
    let (bits, group, axis) = layout.codec.map_or((0, 1, 0), |c| {
        (u32::from(c.bits), u32::from(c.group), u32::from(c.key_axis == KeyAxis::Token))
    });
    bytes.extend(bytes_of(&[
        layout.kv_heads as u32,
        layout.dim as u32,
        layout.kind as u32,
        bits,
        group,
        axis,
    ]));
    Arg::Bytes(bytes)
}

/// All caches of a run.
pub(super) struct KvStore {
    pub(super) pool: Pool,
    pub(super) main: Caches,
    /// Partial caches, from the first that a program fills on.
    pub(super) parts: Option<Caches>,
}

impl KvStore {
    /// Bytes held now.
    pub(super) fn held(&self) -> Bytes {
        Bytes(self.pool.held())
    }

    /// Positions kept by each KV head of each layer of a sequence.
    pub(super) fn kept(
        &self,
        device: &mut Device<'_>,
        sequence: usize,
    ) -> Result<Vec<Vec<Vec<Tokens>>>, CudaError> {
        let main = &self.main;
        let kv_heads = main.layout.kv_heads;
        let mut kept = Vec::with_capacity(main.layers());
        for layer in 0..main.layers() {
            let mut heads = Vec::with_capacity(kv_heads);
            for (h, head) in main.heads(layer, sequence).iter().enumerate() {
                let meta = (sequence * kv_heads + h) * main.stride;
                let at = main.positions_at(layer).plus(4 * meta as u64);
                heads.push(device.words(at, head.tokens)?);
            }
            kept.push(heads);
        }
        Ok(kept)
    }
}

/// The error of a budget that is spent.
pub(super) fn full(requested: u64, held: u64, budget: u64) -> ExecError {
    ExecError::PoolFull(PoolFull { requested, held, budget })
}
