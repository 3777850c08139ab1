//! The default model's tokenizer and weights against values from other programs.
//!
//! The model is looked for in `BATCHMAX_TEST_MODEL`, then in the user's data directory, then fetched. Without it these
//! tests pass, and say so.

use std::path::PathBuf;

use batchmax_exec::fetch::{Stage, fetch_default};
use batchmax_exec::load::{Checkpoint, Role};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

fn data_dir() -> Option<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base =
        absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")))?;
    Some(base.join("batchmax"))
}

#[expect(clippy::print_stderr, reason = "a skipped test must not pass in silence")]
fn checkpoint() -> Option<Checkpoint> {
    let path = match std::env::var_os("BATCHMAX_TEST_MODEL") {
        Some(path) => Ok(PathBuf::from(path)),
        None => data_dir().ok_or_else(|| "no home directory".to_owned()).and_then(|data| {
            fetch_default(&data, &mut |stage| {
                if let Stage::Line(line) = stage {
                    eprintln!("{line}");
                }
            })
            .map_err(|e| e.to_string())
        }),
    };
    match path {
        Ok(path) => Some(Checkpoint::open(&path).expect("the model opens")),
        Err(problem) => {
            eprintln!("SKIPPED: the default model is not here and can't be fetched: {problem}");
            None
        }
    }
}

#[test]
fn all_fifty_texts_have_their_golden_ids_and_come_back() {
    let Some(checkpoint) = checkpoint() else { return };
    let tokenizer = checkpoint.tokenizer().expect("a tokenizer");
    let golden = include_str!("../../tests/golden/tokenizer.json");
    let cases: Vec<Case> = serde_json::from_str(golden).expect("golden values");
    assert_eq!(cases.len(), 50);
    for case in cases {
        // With and without special tokens: this model adds none.
        for add_special in [false, true] {
            assert_eq!(
                tokenizer.encode(&case.text, add_special).expect("ids"),
                case.ids,
                "{:?}",
                case.text
            );
        }
        assert_eq!(tokenizer.decode(&case.ids).expect("text"), case.text);
    }
    assert_eq!(tokenizer.stop_tokens(), [0, 2]);
    let chat = tokenizer.chat("What is the capital of France?").expect("ChatML");
    assert!(chat.ends_with(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ));
}

#[test]
fn the_default_model_is_described_and_read_as_published() {
    let Some(checkpoint) = checkpoint() else { return };
    let model = checkpoint.model();
    assert_eq!(model.name, "smollm2-135m");
    assert_eq!(
        (model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim),
        (30, 576, 9, 3, 64)
    );
    assert_eq!((model.ffn, model.vocab, model.context), (1536, 49_152, 8192));
    assert!(model.tied_embeddings && checkpoint.rope_is_interleaved());
    assert_eq!(checkpoint.rope_factors(), None);

    let mut values = Vec::new();
    let shape =
        checkpoint.read_rows(Role::Down, Some(29), &mut |_, row| values.extend_from_slice(row));
    assert_eq!(shape.expect("rows"), (576, 1536));
    // A linear layer's weights: centred, small, none the same everywhere.
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
    let spread =
        (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
    assert!(mean.abs() < 0.01 && (0.02..0.5).contains(&spread), "{mean} {spread}");
}
