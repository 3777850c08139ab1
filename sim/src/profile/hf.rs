//! Hugging Face `config.json` to the description of a model.
//!
//! A configuration leaves out what its model class implies; that is one row of `FAMILIES` each.
//! Models that the description can't express are refused by name rather than costed wrongly.

mod layers;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::gguf::{invalid, kebab, printable};
use super::{Activation, Model, ProfileError, RopeScaling};
use crate::op::DType;

/// Configurations are a few kilobytes; more is not one.
const MAX_BYTES: u64 = 4 << 20;

/// What a model class implies beyond its configuration.
#[derive(Clone, Copy)]
struct Family {
    class: &'static str,
    tied: bool,
    /// Q, K and V have a bias whatever `attention_bias` says.
    qkv_bias: bool,
    qk_norm: bool,
    gemma: bool,
    post_norms: bool,
    /// Why the executor can't run it.
    refused: Option<&'static str>,
}

const PLAIN: Family = Family {
    class: "LlamaForCausalLM",
    tied: false,
    qkv_bias: false,
    qk_norm: false,
    gemma: false,
    post_norms: false,
    refused: None,
};

const FAMILIES: [Family; 9] = [
    PLAIN,
    Family { class: "MistralForCausalLM", ..PLAIN },
    Family { class: "Qwen2ForCausalLM", qkv_bias: true, ..PLAIN },
    Family { class: "Qwen3ForCausalLM", qk_norm: true, ..PLAIN },
    Family { class: "Phi3ForCausalLM", ..PLAIN },
    Family { class: "GemmaForCausalLM", tied: true, gemma: true, ..PLAIN },
    Family { class: "Gemma2ForCausalLM", tied: true, gemma: true, post_norms: true, ..PLAIN },
    Family { class: "GraniteForCausalLM", refused: Some("scaled residuals and logits"), ..PLAIN },
    Family {
        class: "Olmo2ForCausalLM",
        qk_norm: true,
        refused: Some("norms behind the blocks only, and over all heads at once"),
        ..PLAIN
    },
];

/// Describes the model of a `config.json`, or of the directory that holds one.
pub fn model_from_hf(path: &Path) -> Result<Model, ProfileError> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let origin = file.display().to_string();
    let config = read_json(&file)?;
    describe(&Config { map: &config, origin: &origin }, &name_of(&file))
}

/// Reads a JSON object of bounded size.
pub fn read_json(file: &Path) -> Result<Map<String, Value>, ProfileError> {
    let io = |problem| ProfileError::Io { path: file.to_owned(), problem };
    let origin = file.display().to_string();
    let mut text = Vec::new();
    File::open(file).map_err(io)?.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(invalid(
            &origin,
            "file",
            format!("longer than {MAX_BYTES} bytes; is it a configuration?"),
        ));
    }
    parse_json(&text, &origin)
}

fn parse_json(text: &[u8], origin: &str) -> Result<Map<String, Value>, ProfileError> {
    serde_json::from_slice(text).map_err(|e| {
        // serde_json ends its texts with the position, which the error shows in front already.
        let text = e.to_string();
        let problem = printable(text.split(" at line ").next().unwrap_or(&text));
        ProfileError::Syntax { origin: origin.to_owned(), line: e.line().max(1), problem }
    })
}

struct Config<'a> {
    map: &'a Map<String, Value>,
    origin: &'a str,
}

impl Config<'_> {
    /// `null` counts as absent: configurations write it for every default.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn invalid(&self, key: &str, problem: impl Into<String>) -> ProfileError {
        invalid(self.origin, key, problem)
    }

    fn whole(&self, key: &str) -> Result<u32, ProfileError> {
        self.optional_whole(key)?.ok_or_else(|| self.invalid(key, "missing; expected an integer"))
    }

    fn optional_whole(&self, key: &str) -> Result<Option<u32>, ProfileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|v| u32::try_from(v).ok()) {
            Some(whole) => Ok(Some(whole)),
            None => Err(self.invalid(
                key,
                format!("expected an integer up to 4294967295, got {}", short(value)),
            )),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ProfileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|v| v.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.invalid(key, format!("expected a number, got {}", short(value)))),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ProfileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => Err(self.invalid(key, format!("expected true or false, got {}", short(value)))),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ProfileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => Err(self.invalid(key, format!("expected a text, got {}", short(value)))),
        }
    }

    fn family(&self) -> Result<Family, ProfileError> {
        self.refuse_parts()?;
        let class = match self.get("architectures") {
            Some(Value::Array(list)) => list.first().and_then(Value::as_str),
            Some(other) => {
                return Err(
                    self.invalid("architectures", format!("expected a list, got {}", short(other)))
                );
            }
            None => None,
        };
        let Some(class) = class else {
            return Err(
                self.invalid("architectures", "missing; expected the name of a model class")
            );
        };
        FAMILIES.into_iter().find(|f| f.class == class).ok_or_else(|| {
            let known = FAMILIES.map(|f| f.class.trim_end_matches("ForCausalLM")).join(", ");
            self.invalid(
                "architectures",
                format!(
                    "\"{}\" is not described yet; known: {known} (ForCausalLM)",
                    printable(class)
                ),
            )
        })
    }

    fn refuse_parts(&self) -> Result<(), ProfileError> {
        for key in ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"] {
            if let Some(experts) = self.optional_whole(key)?
                && experts > 1
            {
                let problem = format!(
                    "the model is a mixture of experts ({key} = {experts}): not described yet"
                );
                return Err(self.invalid(key, problem));
            }
        }
        if let Some(rank) = self.optional_whole("kv_lora_rank")? {
            let problem = format!(
                "the model has latent attention (kv_lora_rank = {rank}): not described yet"
            );
            return Err(self.invalid("kv_lora_rank", problem));
        }
        if self.flag("is_encoder_decoder")? == Some(true) {
            let problem = "the model has an encoder; only decoders are described";
            return Err(self.invalid("is_encoder_decoder", problem));
        }
        if self.get("text_config").is_some() {
            let problem = "the model reads more than text; give the configuration of its language model alone";
            return Err(self.invalid("text_config", problem));
        }
        Ok(())
    }

    fn activation(&self) -> Result<Activation, ProfileError> {
        let (key, name) = match self.text("hidden_activation")? {
            Some(name) => ("hidden_activation", name),
            None => ("hidden_act", self.text("hidden_act")?.unwrap_or("silu")),
        };
        match name {
            "silu" | "swish" => Ok(Activation::Silu),
            // Gemma's first configurations say "gelu" and mean the approximation.
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            "gelu" if self.text("model_type")? == Some("gemma") => Ok(Activation::GeluTanh),
            other => Err(self.invalid(
                key,
                format!(
                    "\"{}\" is not described yet; known: silu, gelu_pytorch_tanh",
                    printable(other)
                ),
            )),
        }
    }

    /// Newer configurations keep theta and the scaling together in `rope_parameters`.
    fn rope(&self) -> Result<(f64, RopeScaling), ProfileError> {
        let (key, inner) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(value), _) => ("rope_parameters", Some(value)),
            (None, value) => ("rope_scaling", value),
        };
        let Some(inner) = inner else {
            return Ok((self.number("rope_theta")?.unwrap_or(10_000.0), RopeScaling::None));
        };
        let Value::Object(map) = inner else {
            return Err(self.invalid(key, format!("expected an object, got {}", short(inner))));
        };
        let scaling = Config { map, origin: self.origin };
        let theta = match scaling.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let required = |name: &str| {
            scaling.number(name)?.filter(|v| *v > 0.0).ok_or_else(|| {
                self.invalid(
                    &format!("{key}.{name}"),
                    "missing or not positive; expected a positive number",
                )
            })
        };
        let kind = match scaling.text("rope_type")? {
            Some(kind) => Some(kind),
            None => scaling.text("type")?,
        };
        let scaling = match kind {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: required("factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_context: scaling.whole("original_max_position_embeddings")?,
            },
            Some(other) => RopeScaling::Other { name: printable(other) },
        };
        Ok((theta, scaling))
    }

    /// Type of the published weights, and what a quantised checkpoint was made with.
    fn weights(&self) -> Result<(DType, Option<String>), ProfileError> {
        if let Some(Value::Object(map)) = self.get("quantization_config") {
            let quantised = Config { map, origin: self.origin };
            let method = printable(quantised.text("quant_method")?.unwrap_or("an unnamed method"));
            let dtype = match (quantised.optional_whole("bits")?, method.as_str()) {
                (Some(4), _) => DType::Int4,
                (Some(8), _) => DType::Int8,
                (_, "fp8" | "fbgemm_fp8") => DType::Fp8,
                _ if quantised.flag("load_in_4bit")? == Some(true) => DType::Int4,
                _ if quantised.flag("load_in_8bit")? == Some(true) => DType::Int8,
                _ => {
                    let problem = format!("weights quantised by {method} are not described yet");
                    return Err(self.invalid("quantization_config", problem));
                }
            };
            return Ok((dtype, Some(format!("weights quantised by {method}"))));
        }
        let (key, name) = match self.text("dtype")? {
            Some(name) => ("dtype", Some(name)),
            None => ("torch_dtype", self.text("torch_dtype")?),
        };
        match name {
            Some("bfloat16") => Ok((DType::Bf16, None)),
            Some("float16") => Ok((DType::F16, None)),
            // The library's default where nothing is said.
            Some("float32") | None => Ok((DType::F32, None)),
            Some(other) => Err(self.invalid(
                key,
                format!("expected float32, float16 or bfloat16, got \"{}\"", printable(other)),
            )),
        }
    }
}

fn describe(config: &Config<'_>, name: &str) -> Result<Model, ProfileError> {
    let family = config.family()?;
    let hidden = config.whole("hidden_size")?;
    let heads = config.whole("num_attention_heads")?;
    if heads == 0 {
        return Err(config.invalid("num_attention_heads", "expected at least 1, got 0"));
    }
    let layers = config.whole("num_hidden_layers")?;
    let context = config.whole("max_position_embeddings")?;
    let head_dim = config.optional_whole("head_dim")?.unwrap_or(hidden / heads);
    let (rope_theta, rope_scaling) = config.rope()?;
    let (weight_dtype, quantised) = config.weights()?;
    let attention_bias = config.flag("attention_bias")?.unwrap_or(false);
    let scaling_name =
        if let RopeScaling::Other { name } = &rope_scaling { Some(name) } else { None };
    let not_executable = if let Some(name) = scaling_name {
        Some(format!("rope scaling \"{name}\""))
    } else if let Some(part) = family.refused {
        Some(part.to_owned())
    } else if attention_bias || config.flag("mlp_bias")? == Some(true) {
        // These classes then have a bias on attention's output too.
        Some("biases behind attention or in the feed-forward block".to_owned())
    } else {
        quantised
    };
    let query_scalar = config.number("query_pre_attn_scalar")?.filter(|v| *v > 0.0);
    let gemma_scale = query_scalar.map(|scalar| scalar.sqrt().recip());
    let model = Model {
        name: name.to_owned(),
        source: format!("{} (Hugging Face configuration, {})", config.origin, family.class),
        aliases: Vec::new(),
        layers,
        hidden,
        heads,
        kv_heads: config.optional_whole("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        ffn: config.whole("intermediate_size")?,
        vocab: config.whole("vocab_size")?,
        context,
        tied_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(family.tied),
        attention_bias: family.qkv_bias || attention_bias,
        qk_norm: family.qk_norm,
        post_norms: family.post_norms,
        activation: if family.gemma && config.get("hidden_activation").is_none() {
            Activation::GeluTanh
        } else {
            config.activation()?
        },
        gated_ffn: true,
        norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rotary_share: config.number("partial_rotary_factor")?.unwrap_or(1.0),
        rope_scaling,
        sliding_window: layers::sliding_window(config, family.class, layers, context)?,
        attention_softcap: config.number("attn_logit_softcapping")?,
        logit_softcap: config.number("final_logit_softcapping")?,
        attention_scale: gemma_scale.or(config.number("attention_multiplier")?),
        embedding_scale: if family.gemma {
            Some(f64::from(hidden).sqrt())
        } else {
            config.number("embedding_multiplier")?
        },
        weight_dtype,
        not_executable,
        stored: None,
    };
    model.validate(config.origin)?;
    Ok(model)
}

/// Values come from the file: a message shows their beginning.
fn short(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        other => printable(&other.to_string()),
    }
}

/// The directory's name; in the hub's cache, where that is a hash, the repository's.
fn name_of(file: &Path) -> String {
    let folder = file.parent().map(PathBuf::from).unwrap_or_default();
    // "." and the like have no name of their own.
    let folder =
        if folder.file_name().is_none() { folder.canonicalize().unwrap_or(folder) } else { folder };
    let parts: Vec<_> = folder.iter().map(|part| part.to_string_lossy()).collect();
    let cached =
        parts.iter().rev().find_map(|part| part.strip_prefix("models--")?.rsplit("--").next());
    let name = kebab(cached.or(parts.last().map(|p| &**p)).unwrap_or_default());
    if name.is_empty() { "model".to_owned() } else { name }
}

#[cfg(test)]
mod tests;
