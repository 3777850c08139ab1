//! Configurations of published models, cut to the keys that matter, and broken ones.

use super::*;
use crate::profile::SlidingWindow;

const LLAMA: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "hidden_act": "silu", "hidden_size": 4096,
  "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256
}"#;

fn described(text: &str) -> Result<Model, ProfileError> {
    let map = parse_json(text.as_bytes(), "config.json")?;
    describe(&Config { map: &map, origin: "config.json" }, "test")
}

/// The Llama configuration with some keys changed; `null` takes one away.
fn changed(changes: &str) -> Result<Model, ProfileError> {
    let mut map = parse_json(LLAMA.as_bytes(), "config.json")?;
    map.extend(parse_json(changes.as_bytes(), "changes")?);
    describe(&Config { map: &map, origin: "config.json" }, "test")
}

fn message(result: Result<Model, ProfileError>) -> String {
    result.err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn llama_3_1_is_described_as_published() {
    let model = described(LLAMA).expect("a model");
    assert_eq!(
        (model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim),
        (32, 4096, 32, 8, 128)
    );
    assert_eq!(model.parameters(), 8_029_995_008);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    assert_eq!(model.rope_scaling, scaling);
    assert_eq!(model.weight_dtype, DType::Bf16);
    assert_eq!(model.not_executable, None);
    assert_eq!(model.sliding_window, None);
}

#[test]
fn mistral_slides_on_every_layer_and_qwen2_only_when_told() {
    let mistral = r#"{"architectures": ["MistralForCausalLM"], "sliding_window": 4096}"#;
    let window = Some(SlidingWindow { tokens: 4096, every: 1, full_at: 1 });
    assert_eq!(changed(mistral).expect("a model").sliding_window, window);
    let qwen = r#"{"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": false}"#;
    let model = changed(qwen).expect("a model");
    assert_eq!(model.sliding_window, None);
    assert!(model.attention_bias);
    let partly = r#"{"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": true,
        "max_window_layers": 28}"#;
    assert!(message(changed(partly)).contains("alternate irregularly"));
}

#[test]
fn gemma2_alternates_caps_and_scales() {
    let model = changed(
        r#"{"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256,
            "hidden_size": 2304, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": null,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_scaling": null}"#,
    )
    .expect("a model");
    assert_eq!(model.sliding_window, Some(SlidingWindow { tokens: 4096, every: 2, full_at: 1 }));
    assert_eq!((model.attention_scale, model.embedding_scale), (Some(1.0 / 16.0), Some(48.0)));
    assert!(model.post_norms && model.tied_embeddings);
    assert_eq!(model.activation, Activation::GeluTanh);
}

#[test]
fn rope_parameters_of_newer_configurations_are_read() {
    let model = changed(
        r#"{"rope_scaling": null, "rope_theta": null, "dtype": "float16", "torch_dtype": null,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}"#,
    )
    .expect("a model");
    assert_eq!((model.rope_theta, model.rope_scaling), (1e6, RopeScaling::None));
    assert_eq!(model.weight_dtype, DType::F16);
}

#[test]
fn what_the_executor_lacks_is_noted_and_still_described() {
    let yarn = changed(r#"{"rope_scaling": {"type": "yarn", "factor": 4.0}}"#).expect("a model");
    assert_eq!(yarn.not_executable.as_deref(), Some("rope scaling \"yarn\""));
    let biased = changed(r#"{"attention_bias": true}"#).expect("a model");
    assert!(biased.attention_bias && biased.not_executable.is_some());
    let awq =
        changed(r#"{"quantization_config": {"quant_method": "awq", "bits": 4}}"#).expect("a model");
    assert_eq!(awq.weight_dtype, DType::Int4);
    assert_eq!(awq.not_executable.as_deref(), Some("weights quantised by awq"));
}

#[test]
fn what_is_not_described_is_refused_by_name() {
    for (changes, expected) in [
        (
            r#"{"num_local_experts": 8}"#,
            "the model is a mixture of experts (num_local_experts = 8): not described yet",
        ),
        (r#"{"kv_lora_rank": 512}"#, "latent attention (kv_lora_rank = 512)"),
        (r#"{"is_encoder_decoder": true}"#, "has an encoder"),
        (r#"{"text_config": {}}"#, "reads more than text"),
        (
            r#"{"architectures": ["BertModel"]}"#,
            "\"BertModel\" is not described yet; known: Llama, Mistral",
        ),
        (r#"{"hidden_act": "relu2"}"#, "hidden_act: \"relu2\" is not described yet"),
    ] {
        let error = message(changed(changes));
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn missing_and_mistyped_keys_are_named() {
    for (changes, expected) in [
        (r#"{"hidden_size": null}"#, "config.json: hidden_size: missing; expected an integer"),
        (r#"{"hidden_size": -1}"#, "hidden_size: expected an integer up to 4294967295, got -1"),
        (r#"{"num_attention_heads": 0}"#, "num_attention_heads: expected at least 1, got 0"),
        (r#"{"num_key_value_heads": 5}"#, "kv_heads: 5 does not divide 32"),
        (r#"{"rms_norm_eps": "x"}"#, "rms_norm_eps: expected a number, got \"x\""),
        (
            r#"{"rope_scaling": {"rope_type": "linear"}}"#,
            "rope_scaling.factor: missing or not positive",
        ),
        (r#"{"torch_dtype": "float64"}"#, "expected float32, float16 or bfloat16, got \"float64\""),
        (r#"{"architectures": null}"#, "architectures: missing"),
    ] {
        let error = message(changed(changes));
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn every_prefix_and_every_flipped_bit_is_survived() {
    let bytes = LLAMA.as_bytes();
    for length in 0..bytes.len() {
        assert!(parse_json(&bytes[..length], "config.json").is_err(), "{length}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut broken = bytes.to_vec();
            broken[at] ^= 1 << bit;
            let _ = parse_json(&broken, "c")
                .and_then(|map| describe(&Config { map: &map, origin: "c" }, "x"));
        }
    }
}

#[test]
fn a_syntax_error_names_file_and_line() {
    let error = message(described("{\n  \"hidden_size\": 12,\n  oops\n}"));
    assert_eq!(error, "config.json:3: key must be a string");
}

#[test]
fn the_name_is_the_directory_or_the_cached_repository() {
    let cached = Path::new("/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f/config.json");
    assert_eq!(name_of(cached), "llama-3.1-8b");
    assert_eq!(name_of(Path::new("/models/Qwen3 4B/config.json")), "qwen3-4b");
}
