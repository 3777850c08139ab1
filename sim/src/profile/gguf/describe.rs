//! From a GGUF header to the description of a model.
//!
//! Shapes come from the keys, and what the keys leave out (a tied head, biases, per-head norms) from the tensors'
//! names. Architectures that the description can't express are refused by name rather than costed wrongly.

use std::collections::BTreeMap;
use std::path::Path;

use super::{GgmlType, GgufHeader, GgufValue, invalid, printable};
use crate::op::DType;
use crate::profile::{Activation, Model, ProfileError, RopeScaling, SlidingWindow};

/// Architectures that are read, as GGUF names them.
const KNOWN: [&str; 8] =
    ["gemma", "gemma2", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3"];

/// Describes the model in a GGUF file.
pub fn model_from_gguf(path: &Path) -> Result<Model, ProfileError> {
    let header = GgufHeader::read(path)?;
    let factors = header.rope_factors(path)?;
    describe_gguf(&header, factors.as_deref(), path)
}

/// Describes the model of a header that was read already; `rope_factors` are those of [`GgufHeader::rope_factors`].
pub fn describe_gguf(
    header: &GgufHeader,
    rope_factors: Option<&[f32]>,
    path: &Path,
) -> Result<Model, ProfileError> {
    let origin = path.display().to_string();
    let Some(arch) = header.text("general.architecture") else {
        return Err(invalid(&origin, "general.architecture", "missing; is this a language model?"));
    };
    if !KNOWN.contains(&arch) {
        let problem =
            format!("\"{}\" is not described yet; known: {}", printable(arch), KNOWN.join(", "));
        return Err(invalid(&origin, "general.architecture", problem));
    }
    let keys = Keys { header, arch, origin: &origin };
    keys.refuse_parts()?;
    let hidden = keys.whole("embedding_length")?;
    let heads = keys.whole("attention.head_count")?;
    if heads == 0 {
        return Err(keys.invalid("attention.head_count", "expected at least 1, got 0"));
    }
    let head_dim = keys.whole_or("attention.key_length", || hidden / heads)?;
    let value_dim = keys.whole_or("attention.value_length", || head_dim)?;
    if value_dim != head_dim {
        let problem =
            format!("{value_dim} channels of values and {head_dim} of keys: not described yet");
        return Err(keys.invalid("attention.value_length", problem));
    }
    let layers = keys.whole("block_count")?;
    let context = keys.whole("context_length")?;
    let rotary = keys.whole_or("rope.dimension_count", || head_dim)?;
    let gemma = arch.starts_with("gemma");
    let has = |name: &str| header.tensor(name).is_some();
    let model = Model {
        name: name_of(header, path),
        source: format!(
            "{origin} (GGUF, {})",
            main_type(header).map_or("no weights".to_owned(), |t| t.0)
        ),
        aliases: Vec::new(),
        layers,
        hidden,
        heads,
        kv_heads: keys.whole_or("attention.head_count_kv", || heads)?,
        head_dim,
        ffn: keys.whole("feed_forward_length")?,
        vocab: keys.vocab()?,
        context,
        tied_embeddings: gemma || !has("output.weight"),
        attention_bias: has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias"),
        qk_norm: has("blk.0.attn_q_norm.weight"),
        post_norms: arch == "gemma2",
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        gated_ffn: true,
        norm_eps: keys.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
        rope_theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
        rotary_share: f64::from(rotary) / f64::from(head_dim.max(1)),
        rope_scaling: keys.rope_scaling(rope_factors, context)?,
        sliding_window: keys.sliding_window(context)?,
        attention_softcap: keys.number("attn_logit_softcapping")?,
        logit_softcap: keys.number("final_logit_softcapping")?,
        attention_scale: keys.attention_scale(layers, hidden, heads)?,
        embedding_scale: if gemma {
            Some(f64::from(hidden).sqrt())
        } else {
            keys.number("embedding_scale")?
        },
        weight_dtype: main_type(header).and_then(|t| t.1).unwrap_or(DType::F16),
        not_executable: None,
        stored: stored_type(header),
    };
    let not_executable = if let RopeScaling::Other { name } = &model.rope_scaling {
        Some(format!("rope scaling \"{name}\""))
    } else if arch == "granite" {
        Some("scaled residuals and logits".to_owned())
    } else if has("blk.0.attn_output.bias") || has("blk.0.ffn_up.bias") {
        Some("biases behind attention or in the feed-forward block".to_owned())
    } else {
        None
    };
    let model = Model { not_executable, ..model };
    model.validate(&origin)?;
    Ok(model)
}

/// The keys of one architecture.
struct Keys<'a> {
    header: &'a GgufHeader,
    arch: &'a str,
    origin: &'a str,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&GgufValue> {
        self.header.metadata.get(&format!("{}.{key}", self.arch))
    }

    fn invalid(&self, key: &str, problem: impl Into<String>) -> ProfileError {
        invalid(self.origin, &format!("{}.{key}", self.arch), problem)
    }

    fn whole(&self, key: &str) -> Result<u32, ProfileError> {
        match self.get(key) {
            Some(value) => self.to_whole(key, value),
            None => Err(self.invalid(key, "missing; expected an integer")),
        }
    }

    fn whole_or(&self, key: &str, default: impl Fn() -> u32) -> Result<u32, ProfileError> {
        self.get(key).map_or_else(|| Ok(default()), |value| self.to_whole(key, value))
    }

    fn to_whole(&self, key: &str, value: &GgufValue) -> Result<u32, ProfileError> {
        // Some files give a figure per layer; the description has one for all.
        let first = match value.as_array() {
            Some([first, rest @ ..]) if rest.iter().all(|other| other == first) => first,
            Some(_) => {
                return Err(self.invalid(key, "layers of different sizes are not described yet"));
            }
            None => value,
        };
        first
            .as_u64()
            .and_then(|v| u32::try_from(v).ok())
            .ok_or_else(|| self.invalid(key, "expected an integer up to 4294967295"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ProfileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            // An f32 in the file: 1e-5 shall read as 1e-5, not as 9.999999747378752e-6.
            Some(number) if number.is_finite() => {
                Ok(Some((number as f32).to_string().parse().unwrap_or(number)))
            }
            _ => Err(self.invalid(key, "expected a finite number")),
        }
    }

    fn refuse_parts(&self) -> Result<(), ProfileError> {
        let experts = self.whole_or("expert_count", || 0)?;
        if experts > 0 {
            let problem = format!(
                "the model is a mixture of experts (expert_count = {experts}): not described yet"
            );
            return Err(self.invalid("expert_count", problem));
        }
        if self.get("attention.kv_lora_rank").is_some() {
            return Err(
                self.invalid("attention.kv_lora_rank", "latent attention is not described yet")
            );
        }
        let parts =
            self.header.metadata.get("split.count").and_then(GgufValue::as_u64).unwrap_or(1);
        if parts > 1 {
            let problem = format!(
                "the file is one of {parts} parts; join them with llama-gguf-split --merge"
            );
            return Err(invalid(self.origin, "split.count", problem));
        }
        Ok(())
    }

    fn vocab(&self) -> Result<u32, ProfileError> {
        // The embedding may be padded beyond the tokenizer's list: its rows are what is multiplied.
        let rows = self.header.tensor("token_embd.weight").and_then(|t| t.shape.get(1).copied());
        let tokens = || {
            let list = self.header.metadata.get("tokenizer.ggml.tokens")?.as_array()?;
            Some(list.len() as u64)
        };
        match rows.or_else(tokens) {
            Some(vocab) => u32::try_from(vocab)
                .map_err(|_| self.invalid("vocab_size", format!("{vocab} is too large"))),
            None => self.whole("vocab_size"),
        }
    }

    fn rope_scaling(
        &self,
        factors: Option<&[f32]>,
        context: u32,
    ) -> Result<RopeScaling, ProfileError> {
        if let Some(factors) = factors {
            // The file has the finished divisors; the largest is the factor. The other figures are those of every
            // Llama 3.1 and 3.2, and matter only where the divisors themselves are not at hand.
            let factor = factors.iter().copied().fold(1.0f32, f32::max);
            return Ok(if factor > 1.0 {
                RopeScaling::Llama3 {
                    factor: factor.into(),
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_context: 8192.min(context),
                }
            } else {
                RopeScaling::None
            });
        }
        if self.header.tensor("rope_factors_long.weight").is_some() {
            return Ok(RopeScaling::Other { name: "longrope".to_owned() });
        }
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        let kind = self.get("rope.scaling.type").map(|v| v.as_str().unwrap_or("unreadable"));
        match (kind, factor) {
            (Some("none"), _) | (None, None) => Ok(RopeScaling::None),
            (Some("linear") | None, Some(factor)) if (1.0..=1e6).contains(&factor) => {
                Ok(if factor > 1.0 { RopeScaling::Linear { factor } } else { RopeScaling::None })
            }
            (Some("linear") | None, _) => {
                Err(self.invalid("rope.scaling.factor", "expected a number of at least 1"))
            }
            (Some(name), _) => Ok(RopeScaling::Other { name: printable(name) }),
        }
    }

    fn sliding_window(&self, context: u32) -> Result<Option<SlidingWindow>, ProfileError> {
        let tokens = self.whole_or("attention.sliding_window", || 0)?;
        // Qwen files carry a window that the model does not use.
        if tokens == 0 || tokens >= context || self.arch.starts_with("qwen") {
            return Ok(None);
        }
        let every = if self.arch == "gemma2" { 2 } else { 1 };
        Ok(Some(SlidingWindow { tokens, every, full_at: 1 }))
    }

    fn attention_scale(
        &self,
        layers: u32,
        hidden: u32,
        heads: u32,
    ) -> Result<Option<f64>, ProfileError> {
        // Gemma-2 27B scales by its width per head, not by its head_dim, and the file does not say so.
        if self.arch == "gemma2" && layers == 46 {
            return Ok(Some((f64::from(hidden) / f64::from(heads)).sqrt().recip()));
        }
        self.number("attention.scale")
    }
}

/// Name and nearest description of the type that most weights have; vectors don't count.
fn main_type(header: &GgufHeader) -> Option<(String, Option<DType>)> {
    let mut elements: BTreeMap<String, (u64, Option<DType>)> = BTreeMap::new();
    for tensor in header.tensors.iter().filter(|t| t.shape.len() > 1) {
        let entry = elements.entry(tensor.kind.to_string()).or_insert((0, tensor.kind.dtype()));
        entry.0 = entry.0.saturating_add(tensor.elements().unwrap_or(0));
    }
    elements
        .into_iter()
        .max_by_key(|(_, (count, _))| *count)
        .map(|(name, (_, dtype))| (name, dtype))
}

/// The type in which the layers' matrices can be held as they are stored, or nearly so; `None` where that is as wide as
/// single precision.
fn stored_type(header: &GgufHeader) -> Option<DType> {
    let mut all = header
        .tensors
        .iter()
        .filter(|t| t.shape.len() > 1 && t.name.starts_with("blk."))
        .peekable();
    all.peek()?;
    let kinds: Vec<GgmlType> = all.map(|t| t.kind).collect();
    let every = |holds: fn(&GgmlType) -> bool| kinds.iter().all(holds);
    if every(|k| matches!(k, GgmlType::Q4_0 | GgmlType::Q4_1)) {
        Some(DType::Q4)
    } else if every(|k| {
        !matches!(k, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::Other(_))
    }) {
        Some(DType::Q8)
    } else if every(|k| *k == GgmlType::BF16) {
        Some(DType::Bf16)
    } else {
        None
    }
}

/// `general.basename` and `general.size_label`, else `general.name`, else the file's name.
fn name_of(header: &GgufHeader, path: &Path) -> String {
    let base = header.text("general.basename").zip(header.text("general.size_label"));
    let stem = || path.file_stem().map(|s| s.to_string_lossy().into_owned());
    let named = base
        .map(|(base, size)| format!("{base} {size}"))
        .or_else(|| header.text("general.name").map(str::to_owned))
        .map(|text| kebab(&text))
        .filter(|text| !text.is_empty());
    named
        .or_else(|| stem().map(|s| kebab(&s)))
        .filter(|s| !s.is_empty())
        .unwrap_or_else(|| "model".to_owned())
}

/// Lower case, with single hyphens between runs of letters, digits, dots and underscores; 64 characters at most.
pub(in crate::profile) fn kebab(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(64) {
        if c.is_ascii_alphanumeric() || c == '_' || c == '.' {
            out.push(c.to_ascii_lowercase());
        } else if !out.is_empty() && !out.ends_with('-') {
            out.push('-');
        }
    }
    out.trim_matches(['-', '.']).to_owned()
}
