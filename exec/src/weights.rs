//! A model's weights, packed for the kernels: read from a checkpoint, kept packed from an earlier run, or made up.

mod kept;
mod part;

use batchmax_kernels::gemm::{CodeRow, Packed, WeightFormat};
use batchmax_kernels::rope::{RopeLayout, RopeTable};
use batchmax_sim::op::DType;
use batchmax_sim::profile::{Model, RopeScaling};
use batchmax_sim::units::Bytes;

use crate::error::ExecError;
use crate::load::{Checkpoint, Role};
pub use kept::Keeping;
pub use part::Rank;

/// One decoder layer.
pub struct LayerWeights {
    /// Norm before attention.
    pub attention_norm: Vec<f32>,
    /// Q, K and V, fused.
    pub qkv: Packed,
    /// Their bias.
    pub qkv_bias: Option<Vec<f32>>,
    /// Norms of queries and keys per head.
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// Attention's output.
    pub output: Packed,
    /// Norm behind attention.
    pub post_attention_norm: Option<Vec<f32>>,
    /// Norm before the feed-forward block.
    pub ffn_norm: Vec<f32>,
    /// Gate and up, fused.
    pub gate_up: Packed,
    /// Down.
    pub down: Packed,
    /// Norm behind the feed-forward block.
    pub post_ffn_norm: Option<Vec<f32>>,
}

/// All weights of a model.
pub struct Weights {
    /// Embedding; also the head where they are tied.
    pub embedding: Packed,
    /// The head, unless tied.
    pub head: Option<Packed>,
    /// Norm before the head.
    pub final_norm: Vec<f32>,
    /// The layers.
    pub layers: Vec<LayerWeights>,
    /// Rotary table.
    pub rope: RopeTable,
    /// Which channels form a rotated pair.
    pub rope_layout: RopeLayout,
    /// Whether the values mean anything.
    pub synthetic: bool,
    /// Whether a device holds the layers' matrices as e4m3, and multiplies in it (weights in fp8). A CPU refuses such weights.
    pub narrow: bool,
}

/// The type in which a host holds weights of a type: what a device has as e4m3 it makes itself, from brain floats.
#[must_use]
pub fn host_type(weights: DType) -> DType {
    if weights == DType::Fp8 { DType::Bf16 } else { weights }
}

/// The packed format of a weight type.
pub fn format_of(dtype: DType) -> Option<WeightFormat> {
    match dtype {
        DType::F32 => Some(WeightFormat::F32),
        DType::Bf16 => Some(WeightFormat::Bf16),
        DType::Q4 => Some(WeightFormat::Q4),
        DType::Q8 => Some(WeightFormat::Q8),
        _ => None,
    }
}

/// Says which part of a model this executor can't run, if any.
pub fn check_executable(model: &Model, weights: DType) -> Result<(), ExecError> {
    let part = if let Some(part) = &model.not_executable {
        part.clone()
    } else if let RopeScaling::Other { name } = &model.rope_scaling {
        format!("rope scaling \"{name}\"")
    } else if !model.gated_ffn {
        "a feed-forward block without gate".to_owned()
    } else if format_of(weights).is_none() {
        format!("weights in {weights} (it has f32, bf16, q8 and q4)")
    } else if !model.head_dim.is_multiple_of(8) || model.head_dim > 256 {
        format!("heads of {} channels (multiples of 8 up to 256 work)", model.head_dim)
    } else {
        return Ok(());
    };
    Err(ExecError::NotExecutable { model: model.name.clone(), part })
}

impl Weights {
    /// Reads and packs a checkpoint. `dtype` is the type of the layers, `head` that of the embedding and the head.
    pub fn load(checkpoint: &Checkpoint, dtype: DType, head: DType) -> Result<Self, ExecError> {
        let held = host_type(dtype);
        let weights = assemble(checkpoint, held, head, &mut Reading(checkpoint))?;
        Ok(Self { narrow: dtype == DType::Fp8, ..weights })
    }

    /// Small pseudo-random weights of the model's shape: they take the time and the memory of real ones.
    pub fn synthetic(model: &Model, dtype: DType) -> Result<Self, ExecError> {
        Self::synthetic_with_head(model, dtype, dtype)
    }

    /// The same with an embedding and a head of another type.
    pub fn synthetic_with_head(
        model: &Model,
        dtype: DType,
        head: DType,
    ) -> Result<Self, ExecError> {
        let (narrow, dtype) = (dtype == DType::Fp8, host_type(dtype));
        check_executable(model, dtype)?;
        check_executable(model, head)?;
        let format = format_of(dtype).unwrap_or(WeightFormat::F32);
        let head_format = format_of(head).unwrap_or(WeightFormat::F32);
        let hidden = model.hidden as usize;
        let attention = (model.heads * model.head_dim) as usize;
        let (qkv, ffn) = (model.qkv_width() as usize, model.ffn as usize);
        let made_in = |format: WeightFormat, n: usize, k: usize, seed: u64| {
            // Variance 1/k keeps the residual stream of one size through the layers.
            let scale = (3.0 / k as f32).sqrt();
            Packed::synthetic(n, k, format, seed, scale)
        };
        let made = |n, k, seed| made_in(format, n, k, seed);
        let ones = |n: usize| vec![1.0f32; n];
        let layers = (0..model.layers)
            .map(|layer| {
                let seed = u64::from(layer) * 8;
                LayerWeights {
                    attention_norm: ones(hidden),
                    qkv: made(qkv, hidden, seed + 10),
                    qkv_bias: model.attention_bias.then(|| vec![0.0; qkv]),
                    qk_norm: model
                        .qk_norm
                        .then(|| (ones(model.head_dim as usize), ones(model.head_dim as usize))),
                    output: made(hidden, attention, seed + 11),
                    post_attention_norm: model.post_norms.then(|| ones(hidden)),
                    ffn_norm: ones(hidden),
                    gate_up: made(2 * ffn, hidden, seed + 12),
                    down: made(hidden, ffn, seed + 13),
                    post_ffn_norm: model.post_norms.then(|| ones(hidden)),
                }
            })
            .collect();
        let vocab = model.vocab as usize;
        Ok(Self {
            embedding: made_in(head_format, vocab, hidden, 1),
            head: (!model.tied_embeddings).then(|| made_in(head_format, vocab, hidden, 2)),
            final_norm: ones(hidden),
            layers,
            rope: rope_table(model, None),
            rope_layout: RopeLayout::Half,
            synthetic: true,
            narrow,
        })
    }

    /// Bytes of the packed matrices.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let layers: usize = self
            .layers
            .iter()
            .map(|l| l.qkv.bytes() + l.output.bytes() + l.gate_up.bytes() + l.down.bytes())
            .sum();
        let head = self.head.as_ref().map_or(0, Packed::bytes);
        Bytes((layers + self.embedding.bytes() + head) as u64)
    }
}

/// Where packed tensors come from. They are asked for in the order of [`assemble`].
trait Source {
    /// Matrices of the same width below each other, packed.
    fn matrix(
        &mut self,
        format: WeightFormat,
        roles: &[Role],
        layer: Option<u32>,
    ) -> Result<Packed, ExecError>;

    /// Vectors behind each other.
    fn vector(&mut self, roles: &[Role], layer: Option<u32>) -> Result<Vec<f32>, ExecError>;
}

/// All weights of a checkpoint's model. The largest tensors come first, so that the staging copy of a tensor never adds to
/// the final peak.
fn assemble(
    checkpoint: &Checkpoint,
    dtype: DType,
    head: DType,
    source: &mut dyn Source,
) -> Result<Weights, ExecError> {
    let model = checkpoint.model();
    check_executable(model, dtype)?;
    check_executable(model, head)?;
    let format = format_of(dtype).unwrap_or(WeightFormat::F32);
    let head_format = format_of(head).unwrap_or(WeightFormat::F32);
    let embedding = source.matrix(head_format, &[Role::Embedding], None)?;
    let head = match checkpoint.shape(Role::Head, None)? {
        Some(_) => Some(source.matrix(head_format, &[Role::Head], None)?),
        None => None,
    };
    let mut layers = Vec::with_capacity(model.layers as usize);
    for layer in 0..model.layers {
        layers.push(assemble_layer(checkpoint, format, layer, source)?);
    }
    let interleaved = checkpoint.rope_is_interleaved();
    Ok(Weights {
        embedding,
        head,
        final_norm: source.vector(&[Role::FinalNorm], None)?,
        layers,
        rope: rope_table(model, checkpoint.rope_factors().as_deref()),
        rope_layout: if interleaved { RopeLayout::Interleaved } else { RopeLayout::Half },
        synthetic: false,
        narrow: false,
    })
}

fn assemble_layer(
    checkpoint: &Checkpoint,
    format: WeightFormat,
    layer: u32,
    source: &mut dyn Source,
) -> Result<LayerWeights, ExecError> {
    let at = Some(layer);
    let optional = |source: &mut dyn Source, roles: &[Role]| match checkpoint.shape(roles[0], at)? {
        Some(_) => source.vector(roles, at).map(Some),
        None => Ok(None),
    };
    let query_norm = optional(source, &[Role::QueryNorm])?;
    let key_norm = optional(source, &[Role::KeyNorm])?;
    Ok(LayerWeights {
        attention_norm: source.vector(&[Role::AttentionNorm], at)?,
        qkv: source.matrix(format, &[Role::Query, Role::Key, Role::Value], at)?,
        qkv_bias: optional(source, &[Role::QueryBias, Role::KeyBias, Role::ValueBias])?,
        qk_norm: query_norm.zip(key_norm),
        output: source.matrix(format, &[Role::Output], at)?,
        post_attention_norm: optional(source, &[Role::PostAttentionNorm])?,
        ffn_norm: source.vector(&[Role::FfnNorm], at)?,
        gate_up: source.matrix(format, &[Role::Gate, Role::Up], at)?,
        down: source.matrix(format, &[Role::Down], at)?,
        post_ffn_norm: optional(source, &[Role::PostFfnNorm])?,
    })
}

/// (rows, columns) of matrices below each other.
fn stacked(
    checkpoint: &Checkpoint,
    roles: &[Role],
    layer: Option<u32>,
) -> Result<(usize, usize), ExecError> {
    let (mut n, mut k) = (0, 0);
    for role in roles {
        let (rows, width) = checkpoint.shape(*role, layer)?.unwrap_or_default();
        n += rows;
        k = width;
    }
    Ok((n, k))
}

/// Reads and packs.
struct Reading<'a>(&'a Checkpoint);

impl Source for Reading<'_> {
    fn matrix(
        &mut self,
        format: WeightFormat,
        roles: &[Role],
        layer: Option<u32>,
    ) -> Result<Packed, ExecError> {
        let checkpoint = self.0;
        let (n, k) = stacked(checkpoint, roles, layer)?;
        if let Some(bits) = format.code_bits() {
            let mut packed = Packed::zeroed(n, k, format);
            let mut first = 0;
            for role in roles {
                let mut put = |i: usize, row: &CodeRow| packed.put_codes(first + i, row);
                first += checkpoint.read_codes(*role, layer, bits, &mut put)?.0;
            }
            return Ok(packed);
        }
        let mut staged = Vec::new();
        for role in roles {
            checkpoint.read_rows(*role, layer, &mut |_, row| staged.extend_from_slice(row))?;
        }
        Ok(Packed::pack(n, k, format, |i, out| out.copy_from_slice(&staged[i * k..(i + 1) * k])))
    }

    fn vector(&mut self, roles: &[Role], layer: Option<u32>) -> Result<Vec<f32>, ExecError> {
        let mut values = Vec::new();
        for role in roles {
            self.0.read_rows(*role, layer, &mut |_, row| values.extend_from_slice(row))?;
        }
        Ok(values)
    }
}

/// Rotary frequencies, with the model's scaling. `factors` divide the frequencies one by one (GGUF `rope_freqs`).
fn rope_table(model: &Model, factors: Option<&[f32]>) -> RopeTable {
    let rotary = ((f64::from(model.head_dim) * model.rotary_share) as usize) & !1;
    let inverse: Vec<f32> = (0..rotary / 2)
        .map(|i| {
            let frequency = model.rope_theta.powf(-2.0 * i as f64 / rotary as f64);
            let scaled = match (&model.rope_scaling, factors) {
                (_, Some(factors)) => frequency / f64::from(factors.get(i).copied().unwrap_or(1.0)),
                (scaling, None) => scale_frequency(frequency, scaling),
            };
            scaled as f32
        })
        .collect();
    RopeTable::new(&inverse, model.context as usize, 1.0)
}

fn scale_frequency(frequency: f64, scaling: &RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None | RopeScaling::Other { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wavelength = std::f64::consts::TAU / frequency;
            let turns = f64::from(*original_context) / wavelength;
            let blend =
                ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            frequency * blend + frequency / factor * (1.0 - blend)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        // Wavelength 6.28 tokens: far under 8192 / 4.
        assert!((scale_frequency(1.0, &scaling) - 1.0).abs() < 1e-12);
        // Wavelength 62,832 tokens: over 8192.
        assert!((scale_frequency(1e-4, &scaling) - 1.25e-5).abs() < 1e-15);
        // Half-way: wavelength 8192 / 2.5, blend 0.5.
        let middle = std::f64::consts::TAU * 2.5 / 8192.0;
        let expected = middle * 0.5 + middle / 8.0 * 0.5;
        assert!((scale_frequency(middle, &scaling) - expected).abs() < 1e-12);
    }
}
