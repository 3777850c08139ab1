//! A model's weights on a device, from those that the CPU has (or maps): the same numbers, rounded to the type of the
//! activations where they are not codes.

use batchmax_kernels::cuda::{Address, Arg, CudaError, Element, Product};
use batchmax_kernels::gemm::{CodeRow, Packed};
use batchmax_kernels::rope::RopeLayout;
use half::{bf16, f16};

use super::memory::{Device, Kind, Rows, bytes_of, bytes_of_floats};
use crate::state_maps::StateMaps;
use crate::weights::{LayerWeights, Weights};

/// Bytes that are uploaded at once; more only where a single row is longer.
const BAND_BYTES: usize = 16 << 20;
/// Rows up to which codes are multiplied where they are; with more it is cheaper to write numbers once.
const FEW_ROWS: usize = 8;

/// Rows that are multiplied in e4m3 at once: bounds the sums, which take 4 bytes by the columns a row (59 MB for 28,672 columns). With
/// more of them they would come back from memory, with fewer weights are read oftener. No device has said yet what is best.
const NARROW_ROWS: usize = 512;

/// A matrix of weights, row by row.
pub(super) struct Matrix {
    pub(super) n: usize,
    pub(super) k: usize,
    stored: Stored,
}

enum Stored {
    /// Numbers of the activations' type.
    Numbers(Address),
    /// e4m3 with a scale for each row.
    Narrow { numbers: Address, scales: Address },
    /// Codes with a scale and a minimum per 32.
    Codes { codes: Address, levels: Address, bits: u32 },
}

/// One decoder layer; norms and biases in single precision.
pub(super) struct DeviceLayer {
    pub(super) attention_norm: Address,
    pub(super) qkv: Matrix,
    pub(super) qkv_bias: Address,
    pub(super) qk_norm: Option<(Address, Address)>,
    pub(super) output: Matrix,
    pub(super) post_attention_norm: Address,
    pub(super) ffn_norm: Address,
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
    pub(super) post_ffn_norm: Address,
}

/// All weights of a model.
pub(super) struct DeviceWeights {
    /// Type of activations, and of numbers of matrices.
    pub(super) kind: Kind,
    pub(super) embedding: Matrix,
    pub(super) head: Option<Matrix>,
    pub(super) final_norm: Address,
    pub(super) layers: Vec<DeviceLayer>,
    pub(super) interleaved: bool,
}

fn vector(device: &mut Device<'_>, numbers: &[f32]) -> Result<Address, CudaError> {
    device.alloc_of(&bytes_of_floats(numbers))
}

fn optional(device: &mut Device<'_>, numbers: Option<&[f32]>) -> Result<Address, CudaError> {
    numbers.map_or(Ok(Address::default()), |numbers| vector(device, numbers))
}

/// Numbers as bytes of a type.
pub(super) fn put_numbers(kind: Kind, numbers: &[f32], out: &mut Vec<u8>) {
    match kind {
        Kind::F32 => out.extend(numbers.iter().flat_map(|x| x.to_ne_bytes())),
        Kind::F16 => out.extend(numbers.iter().flat_map(|x| f16::from_f32(*x).to_ne_bytes())),
        Kind::Bf16 | Kind::Fp8 => {
            out.extend(numbers.iter().flat_map(|x| bf16::from_f32(*x).to_ne_bytes()));
        }
    }
}

impl Matrix {
    fn of(
        device: &mut Device<'_>,
        from: &Packed,
        kind: Kind,
        narrow: bool,
    ) -> Result<Self, CudaError> {
        let (n, k) = (from.n(), from.k());
        let stored = match from.format().code_bits() {
            Some(bits) => coded(device, from, bits)?,
            None if narrow => narrowed(device, from, kind)?,
            None => {
                let row_bytes = k as u64 * kind.bytes();
                let at = device.alloc(n as u64 * row_bytes)?;
                bands(from, kind, |first, _, bytes| {
                    device.upload(at.plus(first as u64 * row_bytes), bytes)
                })?;
                Stored::Numbers(at)
            }
        };
        Ok(Self { n, k, stored })
    }

    /// `y = x W^T (+ bias)`, or `y += ...`, in e4m3, band after band of rows.
    fn multiply_narrow(
        &self,
        device: &mut Device<'_>,
        (numbers, scales): (Address, Address),
        (x, rows): (Rows, usize),
        (columns, bias, accumulate): (usize, Address, bool),
        y: Rows,
    ) -> Result<(), CudaError> {
        for first in (0..rows).step_by(NARROW_ROWS) {
            let count = NARROW_ROWS.min(rows - first);
            let [x, y] = [x, y].map(|r| Rows { at: r.at.plus(r.bytes(first)), ..r });
            let bytes = device.scratch("narrow", (count * self.k) as u64)?;
            let of_rows = device.scratch("narrow-scales", 4 * count as u64)?;
            let sums = device.scratch("narrow-sums", 4 * (count * columns) as u64)?;
            narrow_rows(device, x, count, (bytes, of_rows))?;
            device.multiply(&Product {
                m: count as u32,
                n: columns as u32,
                k: self.k as u32,
                x: bytes,
                x_stride: self.k as u32,
                w: numbers,
                element: Element::Fp8,
                scale: 1.0,
                bias: Address::default(),
                y: sums,
                y_stride: columns as u32,
                out: Element::F32,
                accumulate: false,
            })?;
            let args = vec![
                Arg::At(sums),
                Arg::At(of_rows),
                Arg::At(scales),
                Arg::U32(count as u32),
                Arg::U32(columns as u32),
                Arg::At(bias),
                Arg::U32(accumulate.into()),
                y.arg(),
            ];
            let grid = [(count * columns / 8).div_ceil(256), 1, 1];
            device.launch("scale_rows", grid, (256, 0), args)?;
        }
        Ok(())
    }

    /// Rows `ids` times `scale`.
    pub(super) fn embed(
        &self,
        device: &mut Device<'_>,
        kind: Kind,
        (ids, rows): (Address, usize),
        scale: f32,
        out: Rows,
    ) -> Result<(), CudaError> {
        let grid = [(rows * self.k / 8).div_ceil(256), 1, 1];
        let (name, mut args) = match self.stored {
            Stored::Numbers(at) => {
                let table = Rows { at, kind, width: self.k as u32 };
                ("embed", vec![table.arg()])
            }
            // The embedding is never one of these.
            Stored::Narrow { .. } => return Err(no_embedding()),
            Stored::Codes { codes, levels, bits } => {
                ("embed_codes", vec![Arg::At(codes), Arg::At(levels), Arg::U32(bits)])
            }
        };
        args.extend([Arg::At(ids), Arg::U32(rows as u32), Arg::F32(scale), out.arg()]);
        device.launch(name, grid, (256, 0), args)
    }

    /// `y = x W^T (+ bias)`, or `y += ...`, for the first `columns` rows of the matrix.
    pub(super) fn multiply(
        &self,
        device: &mut Device<'_>,
        (x, rows): (Rows, usize),
        columns: usize,
        bias: Address,
        accumulate: bool,
        y: Rows,
    ) -> Result<(), CudaError> {
        let w = match self.stored {
            Stored::Numbers(at) => at,
            Stored::Narrow { numbers, scales } => {
                let how = (columns, bias, accumulate);
                return self.multiply_narrow(device, (numbers, scales), (x, rows), how, y);
            }
            Stored::Codes { codes, levels, bits }
                if rows <= FEW_ROWS && self.k.is_multiple_of(32) =>
            {
                let args = vec![
                    x.arg(),
                    Arg::U32(rows as u32),
                    Arg::At(codes),
                    Arg::At(levels),
                    Arg::U32(bits),
                    Arg::U32(columns as u32),
                    Arg::At(bias),
                    Arg::U32(accumulate.into()),
                    y.arg(),
                ];
                let grid = [columns.div_ceil(8), rows.div_ceil(4), 1];
                return device.launch("gemv_codes", grid, (256, 0), args);
            }
            Stored::Codes { codes, levels, bits } => {
                let bytes = (columns * self.k) as u64 * x.kind.bytes();
                let at = device.scratch("weights", bytes)?;
                let out = Rows { at, kind: x.kind, width: self.k as u32 };
                let args = vec![
                    Arg::At(codes),
                    Arg::At(levels),
                    Arg::U32(bits),
                    Arg::U32(columns as u32),
                    out.arg(),
                ];
                let grid = [(columns * self.k / 8).div_ceil(256), 1, 1];
                device.launch("dequantise", grid, (256, 0), args)?;
                at
            }
        };
        device.multiply(&Product {
            m: rows as u32,
            n: columns as u32,
            k: self.k as u32,
            x: x.at,
            x_stride: x.width,
            w,
            element: x.kind.element(),
            scale: 1.0,
            bias,
            y: y.at,
            y_stride: y.width,
            out: y.kind.element(),
            accumulate,
        })
    }
}

fn no_embedding() -> CudaError {
    CudaError::Failed { call: "an embedding".into(), why: "its numbers are e4m3".into() }
}

/// Hands the rows of a matrix out as bytes of a type, band after band: the first row, how many, and their bytes.
fn bands(
    from: &Packed,
    kind: Kind,
    mut take: impl FnMut(usize, usize, &[u8]) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    let (mut row, mut bytes, mut first) = (vec![0.0; from.k()], Vec::new(), 0);
    for i in 0..from.n() {
        from.row(i, &mut row);
        put_numbers(kind, &row, &mut bytes);
        if bytes.len() >= BAND_BYTES || i + 1 == from.n() {
            take(first, i + 1 - first, &bytes)?;
            first = i + 1;
            bytes.clear();
        }
    }
    Ok(())
}

/// Rows as e4m3, each with a scale.
fn narrow_rows(
    device: &mut Device<'_>,
    rows: Rows,
    count: usize,
    (bytes, scales): (Address, Address),
) -> Result<(), CudaError> {
    let threads = if rows.width > 4096 { 256 } else { 128 };
    let args = vec![rows.arg(), Arg::At(bytes), Arg::At(scales)];
    device.launch("narrow_rows", [count, 1, 1], (threads, 64), args)
}

/// A matrix of numbers as e4m3, made on the device by the kernel that makes activations so.
fn narrowed(device: &mut Device<'_>, from: &Packed, kind: Kind) -> Result<Stored, CudaError> {
    let (n, k) = (from.n() as u64, from.k() as u64);
    let (numbers, scales) = (device.alloc(n * k)?, device.alloc(4 * n)?);
    bands(from, kind, |first, count, bytes| {
        let at = device.scratch("wide", bytes.len() as u64)?;
        device.upload(at, bytes)?;
        let (first, width) = (first as u64, k as u32);
        let to = (numbers.plus(first * k), scales.plus(4 * first));
        narrow_rows(device, Rows { at, kind, width }, count, to)
    })?;
    Ok(Stored::Narrow { numbers, scales })
}

/// Codes row by row, the first in the lowest bits, and their scales and minima.
fn coded(device: &mut Device<'_>, from: &Packed, bits: usize) -> Result<Stored, CudaError> {
    let (n, k) = (from.n(), from.k());
    let (mut codes, mut levels) = (Vec::with_capacity(n * k * bits / 8), Vec::new());
    let mut row = CodeRow::zero(k);
    for i in 0..n {
        from.code_row(i, &mut row);
        if bits == 8 {
            codes.extend_from_slice(&row.codes[..k]);
        } else {
            codes
                .extend(row.codes[..k].chunks(2).map(|two| two[0] | two.get(1).unwrap_or(&0) << 4));
        }
        let pairs = row.scales.iter().zip(&row.minima);
        levels.extend(pairs.map(|(scale, least)| u32::from(*scale) | u32::from(*least) << 16));
    }
    let (codes, levels) = (device.alloc_of(&codes)?, device.alloc_of(&bytes_of(&levels))?);
    Ok(Stored::Codes { codes, levels, bits: bits as u32 })
}

impl DeviceLayer {
    fn of(
        device: &mut Device<'_>,
        from: &LayerWeights,
        kind: Kind,
        narrow: bool,
    ) -> Result<Self, CudaError> {
        let mut matrix = |of: &Packed| Matrix::of(device, of, kind, narrow);
        let (qkv, output) = (matrix(&from.qkv)?, matrix(&from.output)?);
        let (gate_up, down) = (matrix(&from.gate_up)?, matrix(&from.down)?);
        Ok(Self {
            attention_norm: vector(device, &from.attention_norm)?,
            qkv,
            qkv_bias: optional(device, from.qkv_bias.as_deref())?,
            qk_norm: match &from.qk_norm {
                Some((query, key)) => Some((vector(device, query)?, vector(device, key)?)),
                None => None,
            },
            output,
            post_attention_norm: optional(device, from.post_attention_norm.as_deref())?,
            ffn_norm: vector(device, &from.ffn_norm)?,
            gate_up,
            down,
            post_ffn_norm: optional(device, from.post_ffn_norm.as_deref())?,
        })
    }
}

impl DeviceWeights {
    /// Uploads all of them; numbers become those of `kind`.
    pub(super) fn of(
        device: &mut Device<'_>,
        from: &Weights,
        kind: Kind,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            kind,
            embedding: Matrix::of(device, &from.embedding, kind, false)?,
            head: match &from.head {
                Some(head) => Some(Matrix::of(device, head, kind, false)?),
                None => None,
            },
            final_norm: vector(device, &from.final_norm)?,
            layers: (from.layers.iter())
                .map(|layer| DeviceLayer::of(device, layer, kind, from.narrow))
                .collect::<Result<_, _>>()?,
            interleaved: from.rope_layout == RopeLayout::Interleaved,
        })
    }
}

/// The networks of a layer: those of the keys, those of the queries.
pub(super) type DeviceMaps = (Address, Address);

/// Uploads the networks through which dropped tokens are added to a state and read.
pub(super) fn upload_maps(
    device: &mut Device<'_>,
    maps: &StateMaps,
) -> Result<Vec<DeviceMaps>, CudaError> {
    let one = |maps: &batchmax_kernels::state::Maps| -> [Vec<f32>; 2] {
        let key = |k: &batchmax_kernels::state::KeyMap| {
            [&k.network.first, &k.network.second, &k.mix, &k.scale, &k.gate]
                .into_iter()
                .flatten()
                .copied()
                .collect::<Vec<_>>()
        };
        let queries = maps.queries.iter().flat_map(|n| [&n.first, &n.second]).flatten().copied();
        [maps.keys.iter().flat_map(key).collect(), queries.collect()]
    };
    (maps.layers.iter())
        .map(|layer| {
            let [keys, queries] = one(layer);
            Ok((vector(device, &keys)?, vector(device, &queries)?))
        })
        .collect()
}
