//! The caches of a layer as the CUDA kernels hold them.

use batchmax_kernels::kv::{BLOCK_TOKENS, Codec, KeyAxis, KvFormat};
use half::{bf16, f16};

use super::gpu::{Arg, Buffer, Gpu, bytes_of};
use super::testing::{Layer, noise};

/// Bytes by which places in the pool are counted.
const UNIT: usize = 64;
/// Tables of a head: the forms of keys and values, and the spare ones.
pub const KINDS: usize = 8;
/// No such channel.
pub const DROPPED: u16 = u16::MAX;

/// As `Type` of `cuda/common.cuh`.
pub fn type_of(format: KvFormat) -> u32 {
    match format {
        KvFormat::F32 => 0,
        KvFormat::F16 => 1,
        KvFormat::Bf16 => 2,
        KvFormat::Fp8 => 3,
    }
}

/// As `Head` of `cuda/common.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    pub tokens: u32,
    pub key_packed: u32,
    pub key_narrow: u32,
    pub value_packed: u32,
    pub k_whole: u32,
    pub k_packed: u32,
    pub k_pruned: u32,
    pub v_whole: u32,
    pub v_packed: u32,
    pub meta: u32,
    pub kept: u32,
    pub channels: u32,
    pub state: u32,
    pub unused: [u32; 3],
}
impl super::gpu::Plain for Head {}

/// As `Item` of `cuda/common.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Item {
    pub sequence: u32,
    pub first_row: u32,
    pub rows: u32,
    pub seen: u32,
}
impl super::gpu::Plain for Item {}

/// Numbers of rows in a buffer, as `Rows` of `cuda/common.cuh`.
pub fn rows(gpu: &Gpu, buffer: Buffer, format: KvFormat, width: usize) -> Arg {
    let mut bytes = bytes_of(&[gpu.at(buffer)]);
    bytes.extend(bytes_of(&[type_of(format), width as u32]));
    Arg::Bytes(bytes)
}

/// Numbers rounded to a format, as bytes.
pub fn encoded(format: KvFormat, numbers: &[f32]) -> Vec<u8> {
    match format {
        KvFormat::F32 => bytes_of(numbers),
        KvFormat::F16 => {
            bytes_of(&numbers.iter().map(|x| f16::from_f32(*x).to_bits()).collect::<Vec<_>>())
        }
        KvFormat::Bf16 => {
            bytes_of(&numbers.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<_>>())
        }
        KvFormat::Fp8 => numbers.iter().map(|x| fp8_bits(*x)).collect(),
    }
}

/// The numbers of bytes of a format.
pub fn decoded(format: KvFormat, bytes: &[u8]) -> Vec<f32> {
    let word = |b: &[u8]| u16::from_ne_bytes([b[0], b[1]]);
    match format {
        KvFormat::F32 => {
            bytes.chunks(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        KvFormat::F16 => bytes.chunks(2).map(|b| f16::from_bits(word(b)).to_f32()).collect(),
        KvFormat::Bf16 => bytes.chunks(2).map(|b| bf16::from_bits(word(b)).to_f32()).collect(),
        KvFormat::Fp8 => bytes.iter().map(|b| fp8_value(*b)).collect(),
    }
}

/// The number of an e4m3 byte, from its definition.
pub fn fp8_value(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits >> 7 == 1 { -size } else { size }
}

/// The nearest one, ties to even, by looking at all.
fn fp8_bits(x: f32) -> u8 {
    let size = x.abs().min(448.0);
    let best = (0..0x7fu8).min_by(|a, b| {
        let far = |bits: u8| (fp8_value(bits) - size).abs();
        far(*a).total_cmp(&far(*b)).then((a & 1).cmp(&(b & 1)))
    });
    best.expect("there are numbers") | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// What is allocated for caches beside what they hold.
#[derive(Clone, Default)]
pub struct Room {
    /// Tokens that each head can hold at least.
    pub tokens: usize,
    /// Packed halves of this kind.
    pub codec: Option<Codec>,
    /// Kept channels of every head; pruned halves of so many.
    pub kept: Option<Vec<Vec<u16>>>,
    /// Floats of a state.
    pub state: usize,
    /// As many whole and pruned halves again: tables 5 to 7.
    pub spare: bool,
}

/// The caches of a layer in buffers.
pub struct Mirror {
    pub pool: Buffer,
    pub tables: Buffer,
    pub heads: Buffer,
    pub positions: Buffer,
    pub kept: Buffer,
    pub room: Room,
    pub format: KvFormat,
    pub dim: usize,
    pub kv_heads: usize,
    /// Tokens between the heads' numbers in `positions`.
    pub stride: usize,
    /// Blocks of a table.
    pub blocks: usize,
}

fn pitch(channels: usize) -> usize {
    channels.next_multiple_of(8)
}

impl Mirror {
    /// Copies of the caches of a layer, which must be whole.
    pub fn new(gpu: &mut Gpu, layer: &Layer, room: Room) -> Self {
        let (dim, format) = (layer.shape.head_dim, layer.pool.format());
        let heads: Vec<_> = layer.caches.iter().flatten().collect();
        let most = heads.iter().map(|h| h.tokens()).max().unwrap_or(0).max(room.tokens);
        let blocks = most.div_ceil(BLOCK_TOKENS).max(1);
        let channels = |h: usize| room.kept.as_ref().map_or(dim, |k| k[h].len());
        // Places of all halves, one after the other in an order by chance.
        let mut sizes = Vec::new();
        for h in 0..heads.len() {
            let key_groups = |c: Codec| match c.key_axis {
                KeyAxis::Channel => pitch(channels(h)),
                KeyAxis::Token => 32 * pitch(channels(h)).div_ceil(c.group.into()),
            };
            let key = |c: Codec| 4 * pitch(channels(h)) * usize::from(c.bits) + 4 * key_groups(c);
            let value =
                |c: Codec| 4 * dim * usize::from(c.bits) + 128 * dim.div_ceil(c.group.into());
            let pruned = room.kept.as_ref().map_or(0, |_| 32 * pitch(channels(h)) * format.bytes());
            let kinds = [
                format.half_bytes(dim),
                room.codec.map_or(0, key),
                pruned,
                format.half_bytes(dim),
                room.codec.map_or(0, value),
            ];
            let again = if room.spare { [kinds[0], kinds[2], kinds[3]] } else { [0; 3] };
            sizes.extend(
                kinds.into_iter().chain(again).flat_map(|bytes| vec![bytes.div_ceil(UNIT); blocks]),
            );
        }
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        let luck = noise(77, sizes.len());
        order.sort_by(|a, b| luck[*a].total_cmp(&luck[*b]));
        let mut places = vec![0u32; sizes.len()];
        let mut next = 0;
        for i in order {
            places[i] = next as u32;
            next += sizes[i];
        }
        let states = next;
        next += heads.len() * (4 * room.state).div_ceil(UNIT);
        let pool = gpu.output(next * UNIT);
        let stride = blocks * BLOCK_TOKENS;
        let mut kept = Vec::new();
        let mut all = Vec::new();
        let mut positions = vec![u32::MAX; heads.len() * stride];
        for (h, cache) in heads.iter().enumerate() {
            let table = |kind: usize| ((h * KINDS + kind) * blocks) as u32;
            all.push(Head {
                tokens: cache.tokens() as u32,
                k_whole: table(0),
                k_packed: table(1),
                k_pruned: table(2),
                v_whole: table(3),
                v_packed: table(4),
                meta: (h * stride) as u32,
                kept: kept.len() as u32,
                channels: channels(h) as u32,
                state: (states + h * (4 * room.state).div_ceil(UNIT)) as u32,
                ..Head::default()
            });
            if let Some(all) = &room.kept {
                kept.extend(&all[h]);
                let place = |d| all[h].iter().position(|c| *c == d).map_or(DROPPED, |p| p as u16);
                kept.extend((0..dim as u16).map(place));
            }
            positions[h * stride..][..cache.tokens()].copy_from_slice(&cache.positions);
            for token in 0..cache.tokens() {
                for (kind, row) in
                    [(0, cache.key(&layer.pool, token)), (3, cache.value(&layer.pool, token))]
                {
                    let place = places[table(kind) as usize + token / BLOCK_TOKENS] as usize;
                    let bytes = encoded(format, &row);
                    gpu.put(pool, place * UNIT + token % BLOCK_TOKENS * bytes.len(), &bytes);
                }
            }
        }
        let (tables, heads) = (gpu.input(&places), gpu.inout(&all));
        let (positions, kept) = (gpu.inout(&positions), gpu.inout(&kept));
        let kv_heads = layer.shape.kv_heads;
        Self { pool, tables, heads, positions, kept, room, format, dim, kv_heads, stride, blocks }
    }

    /// The argument that all kernels take.
    pub fn kv(&self, gpu: &Gpu) -> Arg {
        let buffers = [self.pool, self.tables, self.heads, self.positions, self.kept];
        let mut bytes = bytes_of(&buffers.map(|b| gpu.at(b)));
        let (bits, group, axis) = self.room.codec.map_or((0, 1, 0), |c| {
            (c.bits.into(), c.group.into(), u32::from(c.key_axis == KeyAxis::Token))
        });
        let numbers =
            [self.kv_heads as u32, self.dim as u32, type_of(self.format), bits, group, axis];
        bytes.extend(bytes_of(&numbers));
        Arg::Bytes(bytes)
    }

    /// The heads as they are now.
    pub fn all_heads(&self, gpu: &Gpu) -> Vec<Head> {
        gpu.read(self.heads)
    }

    /// Replaces them.
    pub fn put_heads(&self, gpu: &Gpu, heads: &[Head]) {
        gpu.put(self.heads, 0, &bytes_of(heads));
    }

    fn half<'a>(&self, gpu: &'a Gpu, table: u32, token: usize) -> &'a [u8] {
        let places: Vec<u32> = gpu.read(self.tables);
        let place = places[table as usize + token / BLOCK_TOKENS] as usize;
        &gpu.bytes(self.pool)[place * UNIT..]
    }

    fn plain(&self, half: &[u8], token: usize, channels: usize) -> Vec<f32> {
        let bytes = pitch(channels) * self.format.bytes();
        decoded(
            self.format,
            &half[token % BLOCK_TOKENS * bytes..][..channels * self.format.bytes()],
        )
    }

    fn unpacked(&self, half: &[u8], token: usize, channels: usize, by_channel: bool) -> Vec<f32> {
        let codec = self.room.codec.expect("a codec");
        let (bits, group, row) =
            (usize::from(codec.bits), usize::from(codec.group), token % BLOCK_TOKENS);
        let bytes = pitch(channels) * bits / 8;
        let level = |index: usize| {
            let at = BLOCK_TOKENS * bytes + 4 * index;
            let number = |at: usize| f16::from_bits(u16::from_ne_bytes([half[at], half[at + 1]]));
            (number(at).to_f32(), number(at + 2).to_f32())
        };
        (0..channels)
            .map(|d| {
                let code =
                    half[row * bytes + d * bits / 8] >> (d * bits % 8) & ((1u16 << bits) - 1) as u8;
                let groups = pitch(channels).div_ceil(group);
                let (scale, zero) = level(if by_channel { d } else { row * groups + d / group });
                f32::from(code) * scale + zero
            })
            .collect()
    }

    /// The key of a token of head `h` of all, as attention sees it.
    pub fn key(&self, gpu: &Gpu, h: usize, token: usize) -> Vec<f32> {
        let head = self.all_heads(gpu)[h];
        if token >= head.key_narrow as usize {
            return self.plain(self.half(gpu, head.k_whole, token), token, self.dim);
        }
        let channels = head.channels as usize;
        let narrow = if token < head.key_packed as usize {
            let by_channel = self.room.codec.is_some_and(|c| c.key_axis == KeyAxis::Channel);
            self.unpacked(self.half(gpu, head.k_packed, token), token, channels, by_channel)
        } else {
            self.plain(self.half(gpu, head.k_pruned, token), token, channels)
        };
        let Some(kept) = &self.room.kept else { return narrow };
        let mut key = vec![0.0; self.dim];
        kept[h].iter().zip(narrow).for_each(|(d, x)| key[usize::from(*d)] = x);
        key
    }

    /// Its value.
    pub fn value(&self, gpu: &Gpu, h: usize, token: usize) -> Vec<f32> {
        let head = self.all_heads(gpu)[h];
        if token < head.value_packed as usize {
            return self.unpacked(self.half(gpu, head.v_packed, token), token, self.dim, false);
        }
        self.plain(self.half(gpu, head.v_whole, token), token, self.dim)
    }

    /// Fails unless the caches are those of the layer, bit by bit.
    pub fn assert_same(&self, gpu: &Gpu, layer: &Layer, what: &str) {
        let positions: Vec<u32> = gpu.read(self.positions);
        for (h, cache) in layer.caches.iter().flatten().enumerate() {
            let head = self.all_heads(gpu)[h];
            assert_eq!(head.tokens as usize, cache.tokens(), "{what}: tokens of head {h}");
            let at = head.meta as usize;
            assert_eq!(positions[at..at + cache.tokens()], cache.positions, "{what}: head {h}");
            for token in 0..cache.tokens() {
                let found = (self.key(gpu, h, token), self.value(gpu, h, token));
                let wanted = (cache.key(&layer.pool, token), cache.value(&layer.pool, token));
                assert_eq!(found, wanted, "{what}: token {token} of head {h}");
            }
        }
    }
}

/// The sequences of a layer's last step.
pub fn items(layer: &Layer) -> Vec<Item> {
    let all = layer.step.iter().zip(&layer.seen).enumerate();
    all.map(|(i, ((first, rows), seen))| Item {
        sequence: i as u32,
        first_row: *first as u32,
        rows: *rows as u32,
        seen: *seen,
    })
    .collect()
}
