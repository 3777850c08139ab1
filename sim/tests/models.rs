//! The shipped descriptions against what the models' cards say.

use batchmax_sim::profile::Catalog;

/// Parameters in billions: the card's own figure, with the digits it gives (or those of its list of tensors).
const PUBLISHED: &[(&str, f64)] = &[
    ("bloom-176b", 176.25),
    ("bloom-7b1", 7.07),
    ("codellama-34b", 33.7),
    ("decilm-7b", 7.04),
    ("falcon-180b", 180.0),
    ("gemma-2-27b", 27.2),
    ("gemma-2-2b", 2.61),
    ("gemma-2-9b", 9.24),
    ("gpt-j-6b", 6.05),
    ("internlm-20b", 20.1),
    ("internlm2-7b", 7.74),
    ("llama-2-13b", 13.0),
    ("llama-2-70b", 69.0),
    ("llama-2-7b", 6.74),
    ("llama-3-70b", 70.6),
    ("llama-3-8b", 8.03),
    ("llama-3.1-405b", 406.0),
    ("llama-3.1-70b", 70.6),
    ("llama-3.1-8b", 8.03),
    ("llama-3.2-1b", 1.24),
    ("llama-3.2-3b", 3.21),
    ("llama-3.3-70b", 70.6),
    ("llama-7b", 6.74),
    ("mistral-7b-v0.1", 7.24),
    ("mistral-7b-v0.2", 7.24),
    ("mistral-7b-v0.3", 7.25),
    ("mistral-large-123b", 123.0),
    ("mistral-nemo-12b", 12.2),
    ("mistral-small-24b", 23.6),
    ("opt-30b", 30.0),
    ("opt-6.7b", 6.7),
    ("phi-3-medium-4k", 14.0),
    ("phi-3-mini-4k", 3.82),
    ("phi-4", 14.7),
    ("qwen-7b", 7.72),
    ("qwen1.5-7b", 7.72),
    ("qwen2-72b", 72.7),
    ("qwen2-7b", 7.62),
    ("qwen2.5-0.5b", 0.49),
    ("qwen2.5-1.5b", 1.54),
    ("qwen2.5-14b", 14.7),
    ("qwen2.5-32b", 32.5),
    ("qwen2.5-3b", 3.09),
    ("qwen2.5-72b", 72.7),
    ("qwen2.5-7b", 7.61),
    ("qwen3-0.6b", 0.6),
    ("qwen3-1.7b", 1.7),
    ("qwen3-14b", 14.8),
    ("qwen3-32b", 32.8),
    ("qwen3-4b", 4.0),
    ("qwen3-8b", 8.2),
    ("smollm2-1.7b", 1.71),
    ("smollm2-135m", 0.135),
    ("smollm2-360m", 0.362),
    ("tinyllama-1.1b", 1.1),
    ("yi-34b", 34.4),
];

/// 1 % for the description; half a percent is what two digits of a card round away.
const TOLERANCE: f64 = 0.015;

#[test]
fn parameter_counts_are_those_published() {
    let models = Catalog::built_in().models().expect("built-in models are valid");
    for model in &models {
        let Some((_, billions)) = PUBLISHED.iter().find(|(name, _)| *name == model.name) else {
            panic!("{}: add the published count to this table", model.name);
        };
        let counted = model.parameters() as f64 / 1e9;
        let error = counted / billions - 1.0;
        assert!(
            error.abs() <= TOLERANCE,
            "{}: {counted:.3} B by its shapes, {billions} B published ({:+.2} %)",
            model.name,
            100.0 * error
        );
    }
    assert_eq!(models.len(), PUBLISHED.len(), "a model of the table is not shipped");
}

#[test]
fn hugging_face_ids_are_names_too_in_any_case() {
    let catalog = Catalog::built_in();
    for (id, name) in [
        ("bigscience/bloom", "bloom-176b"),
        ("BIGSCIENCE/BLOOM-7B1", "bloom-7b1"),
        ("tiiuae/falcon-180b", "falcon-180b"),
        ("EleutherAI/gpt-j-6b", "gpt-j-6b"),
        ("EleutherAI/GPT-J-6B", "gpt-j-6b"),
        ("facebook/opt-30b", "opt-30b"),
        ("facebook/opt-6.7b", "opt-6.7b"),
        ("internlm/internlm-20b", "internlm-20b"),
        ("internlm/internlm2-chat-7b", "internlm2-7b"),
        ("Qwen/Qwen1.5-7B", "qwen1.5-7b"),
        ("Qwen/Qwen-7B-Chat", "qwen-7b"),
        ("Qwen/Qwen2-7B", "qwen2-7b"),
        ("Qwen/Qwen2-72B", "qwen2-72b"),
        ("huggyllama/llama-7b", "llama-7b"),
        ("TheBloke/LLaMa-7B-GPTQ", "llama-7b"),
        ("Deci/DeciLM-7B", "decilm-7b"),
        ("NousResearch/Llama-2-7b-hf", "llama-2-7b"),
        ("NousResearch/Llama-2-13b-hf", "llama-2-13b"),
        ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-70B", "llama-3-70b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("nvidia/Qwen3-32B-NVFP4", "qwen3-32b"),
    ] {
        let model = catalog.model(id).unwrap_or_else(|e| panic!("{id}: {e}"));
        assert_eq!(model.name, name, "{id}");
    }
}

#[test]
fn no_alias_stands_for_two_models() {
    let models = Catalog::built_in().models().expect("built-in models are valid");
    let mut names: Vec<String> = models
        .iter()
        .flat_map(|m| m.aliases.iter().chain([&m.name]))
        .map(|name| name.to_lowercase())
        .collect();
    names.sort();
    let twice: Vec<_> = names.windows(2).filter(|w| w[0] == w[1]).map(|w| &w[0]).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

#[test]
fn models_without_a_gate_are_marked_as_not_executable() {
    for model in Catalog::built_in().models().expect("built-in models are valid") {
        assert!(model.gated_ffn || model.not_executable.is_some(), "{}", model.name);
    }
}
