//! What a dense decoder-only model multiplies: shapes, not weights.

use serde::{Deserialize, Serialize};

use super::ProfileError;
use crate::op::DType;
use crate::units::{Layer, Tokens};

/// The gate's non-linearity in the feed-forward block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// x * sigmoid(x).
    #[default]
    Silu,
    /// GELU by its tanh approximation (Gemma).
    GeluTanh,
}

/// How rotary frequencies are stretched past the trained context.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Frequencies as trained.
    #[default]
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor, >= 1.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, with a smooth transition.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths over `original_context / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths under `original_context / high` are kept.
        high_freq_factor: f64,
        /// Context length of the pre-training, tokens.
        original_context: Tokens,
    },
    /// Anything the simulator may cost but the executor can't run (yarn, longrope, dynamic).
    Other {
        /// The name in the model's own configuration.
        name: String,
    },
}

/// Layers whose queries see only the newest tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindow {
    /// Tokens a query sees, itself included.
    pub tokens: Tokens,
    /// Layer `l` slides when `l % every != full_at`; 1 with `full_at = 1` means every layer slides.
    pub every: u32,
    /// The residue that marks a layer with full attention.
    pub full_at: u32,
}

/// A dense decoder-only transformer: grouped-query attention and a gated feed-forward block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Kebab-case name, unique among the profiles.
    pub name: String,
    /// Where the figures were read.
    pub source: String,
    /// Other names people type (Hugging Face ids).
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Decoder layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// KV heads; divides `heads`.
    pub kv_heads: u32,
    /// Channels per head.
    pub head_dim: u32,
    /// Width of the feed-forward block (one of gate and up).
    pub ffn: u32,
    /// Rows of the embedding.
    pub vocab: u32,
    /// Longest context, tokens.
    pub context: Tokens,
    /// The output head is the embedding.
    #[serde(default)]
    pub tied_embeddings: bool,
    /// Q, K and V projections have a bias (Qwen2).
    #[serde(default)]
    pub attention_bias: bool,
    /// Queries and keys are normalised per head before RoPE (Qwen3).
    #[serde(default)]
    pub qk_norm: bool,
    /// Norms after attention and after the feed-forward block too (Gemma-2).
    #[serde(default)]
    pub post_norms: bool,
    /// Gate activation.
    #[serde(default)]
    pub activation: Activation,
    /// The feed-forward block has a gate; `false`: up, activation, down.
    #[serde(default = "yes")]
    pub gated_ffn: bool,
    /// Epsilon of the RMS norms.
    #[serde(default = "default_eps")]
    pub norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Share of the head's channels that are rotated, 0-1.
    #[serde(default = "one")]
    pub rotary_share: f64,
    /// Frequency scaling.
    #[serde(default)]
    pub rope_scaling: RopeScaling,
    /// Sliding-window layers.
    #[serde(default)]
    pub sliding_window: Option<SlidingWindow>,
    /// tanh cap of the attention scores (Gemma-2: 50).
    #[serde(default)]
    pub attention_softcap: Option<f64>,
    /// tanh cap of the logits (Gemma-2: 30).
    #[serde(default)]
    pub logit_softcap: Option<f64>,
    /// Scores are q.k times this; default 1/sqrt(head_dim).
    #[serde(default)]
    pub attention_scale: Option<f64>,
    /// Embeddings are multiplied by this (Gemma: sqrt(hidden)).
    #[serde(default)]
    pub embedding_scale: Option<f64>,
    /// Type in which the weights are published.
    pub weight_dtype: DType,
    /// What the description leaves out that an executor would need, or empty.
    #[serde(default)]
    pub not_executable: Option<String>,
    /// The type in which a file on this machine holds the weights of the layers, where it is one that kernels read.
    #[serde(skip)]
    pub stored: Option<DType>,
}

fn yes() -> bool {
    true
}
fn one() -> f64 {
    1.0
}
fn default_eps() -> f64 {
    1e-5
}

impl Model {
    /// Checks what types can't say; `origin` names the file in the error.
    pub fn validate(&self, origin: &str) -> Result<(), ProfileError> {
        let fail = |key: &'static str, problem: String| {
            Err(ProfileError::Invalid { origin: origin.to_owned(), key: key.to_owned(), problem })
        };
        for (key, value, most) in [
            ("layers", self.layers, 1 << 12),
            ("hidden", self.hidden, 1 << 20),
            ("heads", self.heads, 1 << 14),
            ("kv_heads", self.kv_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 12),
            ("ffn", self.ffn, 1 << 22),
            ("vocab", self.vocab, 1 << 24),
            ("context", self.context, 1 << 30),
        ] {
            if value == 0 || value > most {
                return fail(key, format!("expected 1 to {most}, got {value}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail(
                "kv_heads",
                format!("{} does not divide {} query heads", self.kv_heads, self.heads),
            );
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return fail(
                "rope_theta",
                format!("expected a positive number, got {}", self.rope_theta),
            );
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return fail("norm_eps", format!("expected 0 to 1, got {}", self.norm_eps));
        }
        if !(self.rotary_share > 0.0 && self.rotary_share <= 1.0) {
            return fail("rotary_share", format!("expected 0 to 1, got {}", self.rotary_share));
        }
        for (key, value) in [
            ("attention_softcap", self.attention_softcap),
            ("logit_softcap", self.logit_softcap),
            ("attention_scale", self.attention_scale),
            ("embedding_scale", self.embedding_scale),
        ] {
            if let Some(value) = value.filter(|v| !(v.is_finite() && *v > 0.0)) {
                return fail(key, format!("expected a positive number, got {value}"));
            }
        }
        let factors = match &self.rope_scaling {
            RopeScaling::Linear { factor } => vec![*factor],
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
                if low_freq_factor >= high_freq_factor {
                    let problem = format!(
                        "low_freq_factor {low_freq_factor} must be below {high_freq_factor}"
                    );
                    return fail("rope_scaling", problem);
                }
                vec![*factor, *low_freq_factor, *high_freq_factor]
            }
            RopeScaling::None | RopeScaling::Other { .. } => Vec::new(),
        };
        if let Some(bad) = factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
            return fail("rope_scaling", format!("expected positive factors, got {bad}"));
        }
        if let Some(window) = self.sliding_window
            && (window.tokens == 0 || window.every == 0)
        {
            return fail("sliding_window", "tokens and every must be at least 1".to_owned());
        }
        Ok(())
    }

    /// One device's part where `tp` devices share each layer: heads, feed-forward width and vocabulary divided, KV heads
    /// repeated where there are fewer than devices.
    ///
    /// # Errors
    /// When `tp` does not divide the query heads, or neither divides the KV heads nor is a multiple of them.
    pub fn shard(&self, tp: u32) -> Result<Self, String> {
        if tp <= 1 {
            return Ok(self.clone());
        }
        if !self.heads.is_multiple_of(tp) {
            return Err(format!(
                "{tp} devices can't share the {0} heads of {1}; hint: a number that divides {0}",
                self.heads, self.name
            ));
        }
        if !self.kv_heads.is_multiple_of(tp) && !tp.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{tp} devices can't share the {0} KV heads of {1}; hint: a number that divides {0}, or a multiple of it",
                self.kv_heads, self.name
            ));
        }
        Ok(Self {
            heads: self.heads / tp,
            kv_heads: (self.kv_heads / tp).max(1),
            ffn: self.ffn.div_ceil(tp),
            vocab: self.vocab.div_ceil(tp),
            ..self.clone()
        })
    }

    /// [`Self::shard`] with the whole vocabulary on each device, so that each knows the next token by itself: what this
    /// project's executor runs.
    ///
    /// # Errors
    /// As there; also when `tp` does not divide the feed-forward width.
    pub fn shard_layers(&self, tp: u32) -> Result<Self, String> {
        if tp > 1 && !self.ffn.is_multiple_of(tp) {
            return Err(format!(
                "{tp} devices can't share the feed-forward width {0} of {1}; hint: a number that divides {0}",
                self.ffn, self.name
            ));
        }
        Ok(Self { vocab: self.vocab, ..self.shard(tp)? })
    }

    /// Query heads per KV head.
    #[must_use]
    pub fn group(&self) -> u32 {
        self.heads / self.kv_heads
    }

    /// Elements of K and V of one token in one layer: 2 x kv_heads x head_dim.
    #[must_use]
    pub fn kv_elements_per_token_layer(&self) -> u64 {
        2 * u64::from(self.kv_heads) * u64::from(self.head_dim)
    }

    /// Width of the fused Q, K, V projection.
    #[must_use]
    pub fn qkv_width(&self) -> u64 {
        (u64::from(self.heads) + 2 * u64::from(self.kv_heads)) * u64::from(self.head_dim)
    }

    /// The window of a layer, if it slides.
    #[must_use]
    pub fn window_of(&self, layer: Layer) -> Option<Tokens> {
        let window = self.sliding_window?;
        (layer % window.every != window.full_at).then_some(window.tokens)
    }

    /// Parameters of the linear layers of one decoder layer.
    #[must_use]
    pub fn layer_linear_parameters(&self) -> u64 {
        let hidden = u64::from(self.hidden);
        let attention =
            hidden * self.qkv_width() + u64::from(self.heads) * u64::from(self.head_dim) * hidden;
        let feed_forward = hidden * u64::from(self.ffn) * if self.gated_ffn { 3 } else { 2 };
        attention + feed_forward
    }

    /// All parameters that multiply or look up: linear layers, embedding, head. Norms and biases are left out.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let embedding = u64::from(self.vocab) * u64::from(self.hidden);
        u64::from(self.layers) * self.layer_linear_parameters()
            + embedding * if self.tied_embeddings { 1 } else { 2 }
    }

    /// The factor on q.k.
    #[must_use]
    pub fn attention_scale(&self) -> f64 {
        self.attention_scale.unwrap_or_else(|| f64::from(self.head_dim).sqrt().recip())
    }
}

#[cfg(test)]
mod tests {
    use crate::profile::Catalog;

    #[test]
    fn devices_share_heads_they_can_divide() {
        let mut model = Catalog::built_in().model("llama-3.1-8b").expect("built in");
        // 32 query heads, 8 KV heads, feed-forward width 14,336, vocabulary 128,256.
        let part = model.shard(4).expect("it divides");
        assert_eq!((part.heads, part.kv_heads, part.ffn, part.vocab), (8, 2, 3584, 32_064));
        let part = model.shard(16).expect("two devices to a KV head");
        assert_eq!((part.heads, part.kv_heads), (2, 1));
        let part = model.shard_layers(4).expect("it divides");
        assert_eq!((part.heads, part.ffn, part.vocab), (8, 3584, 128_256));
        let refused = model.shard(3).expect_err("32 heads");
        assert!(refused.contains("32 heads"), "{refused}");
        (model.heads, model.kv_heads) = (12, 4);
        // Three devices would have four query heads each, but those of one and a third KV heads.
        let refused = model.shard(3).expect_err("4 KV heads");
        assert!(refused.contains("4 KV heads"), "{refused}");
        (model.heads, model.kv_heads, model.ffn) = (12, 6, 100);
        let refused = model.shard_layers(3).expect_err("100 / 3");
        assert!(refused.contains("feed-forward width 100"), "{refused}");
    }
}
