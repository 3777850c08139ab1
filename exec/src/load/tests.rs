//! Whole and broken checkpoints.

use super::test_files::{
    GgufFile, TINY_TENSORS, safetensors, tiny, tiny_config, write_hugging_face,
};
use super::*;

fn open(file: &GgufFile) -> Result<Checkpoint, LoadError> {
    open_bytes(&file.bytes())
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, LoadError> {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, bytes).expect("writable");
    // The checkpoint keeps its file open, so the directory may go.
    Checkpoint::open(&path)
}

fn message<T>(result: Result<T, LoadError>) -> String {
    result.err().map(|e| e.to_string()).unwrap_or_default()
}

fn values(
    checkpoint: &Checkpoint,
    role: Role,
    layer: Option<u32>,
) -> Result<Vec<Vec<f32>>, LoadError> {
    let mut rows = Vec::new();
    checkpoint.read_rows(role, layer, &mut |i, row| {
        assert_eq!(i, rows.len());
        rows.push(row.to_vec());
    })?;
    Ok(rows)
}

#[test]
fn rows_come_in_order_with_their_values() {
    let checkpoint = open(&tiny("llama")).expect("a checkpoint");
    assert_eq!(checkpoint.shape(Role::Key, Some(0)).expect("a shape"), Some((16, 32)));
    let rows = values(&checkpoint, Role::Key, Some(0)).expect("rows");
    assert_eq!(rows.len(), 16);
    assert_eq!((rows[0][0], rows[15][31]), (4.0, 4.0 + 511.0));
    let norm = values(&checkpoint, Role::FfnNorm, Some(0)).expect("rows");
    assert_eq!((norm.len(), norm[0].len(), norm[0][31]), (1, 32, 38.0));
    assert!(checkpoint.rope_is_interleaved());
    assert_eq!(checkpoint.shape(Role::Head, None).expect("a shape"), None);
    assert_eq!(checkpoint.shape(Role::QueryBias, Some(0)).expect("a shape"), None);
}

#[test]
fn long_tensors_are_read_in_bands() {
    // 40,000 rows of 128 bytes: five bands.
    let file =
        tiny("llama").without("token_embd.weight").counted("token_embd.weight", &[32, 40_000], 0.0);
    let checkpoint = open(&file).expect("a checkpoint");
    let mut sum = 0.0f64;
    let shape = checkpoint.read_rows(Role::Embedding, None, &mut |i, row| {
        assert_eq!(row[0], (i * 32) as f32);
        sum += f64::from(row[31]);
    });
    assert_eq!(shape.expect("a shape"), (40_000, 32));
    assert_eq!(sum, 40_000.0 * 31.0 + 32.0 * 39_999.0 * 20_000.0);
}

#[test]
fn fused_projections_are_split() {
    let file = ["q", "k", "v"]
        .iter()
        .fold(tiny("phi3"), |file, p| file.without(&format!("blk.0.attn_{p}.weight")));
    let file = file
        .without("blk.0.ffn_gate.weight")
        .without("blk.0.ffn_up.weight")
        .counted("blk.0.attn_qkv.weight", &[32, 64], 0.0)
        .counted("blk.0.ffn_up.weight", &[32, 128], 0.0);
    let checkpoint = open(&file).expect("a checkpoint");
    let first = |role| {
        values(&checkpoint, role, Some(0)).map(|rows| (rows.len(), rows[0][0])).expect("rows")
    };
    assert_eq!(first(Role::Query), (32, 0.0));
    assert_eq!(first(Role::Key), (16, 32.0 * 32.0));
    assert_eq!(first(Role::Value), (16, 48.0 * 32.0));
    assert_eq!(first(Role::Gate), (64, 0.0));
    assert_eq!(first(Role::Up), (64, 64.0 * 32.0));
    assert!(!checkpoint.rope_is_interleaved());
}

#[test]
fn biases_of_a_qwen2_file_are_read() {
    let file = tiny("qwen2")
        .counted("blk.0.attn_q.bias", &[32], 0.0)
        .counted("blk.0.attn_k.bias", &[16], 1.0)
        .counted("blk.0.attn_v.bias", &[16], 2.0);
    let checkpoint = open(&file).expect("a checkpoint");
    let bias = values(&checkpoint, Role::KeyBias, Some(0)).expect("rows");
    assert_eq!((bias.len(), bias[0].len(), bias[0][15]), (1, 16, 16.0));
    let half = tiny("qwen2").counted("blk.0.attn_q.bias", &[32], 0.0);
    assert!(message(open(&half)).contains("blk.0.attn_k.bias is missing"));
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let missing = message(open(&tiny("llama").without("blk.0.ffn_down.weight")));
    assert!(missing.contains("tiny.gguf: blk.0.ffn_down.weight is missing"), "{missing}");
    let file =
        tiny("llama").without("blk.0.ffn_up.weight").counted("blk.0.ffn_up.weight", &[16, 64], 0.0);
    let misshapen = message(open(&file));
    assert!(
        misshapen.contains("blk.0.ffn_up.weight is 64 x 16, the header says 64 x 32"),
        "{misshapen}"
    );
    let stranger = tiny("llama").without("blk.0.ffn_up.weight").tensor(
        "blk.0.ffn_up.weight",
        &[32, 64],
        20,
        vec![0; 9],
    );
    let checkpoint = open(&stranger).expect("a checkpoint");
    let unread = message(values(&checkpoint, Role::Up, Some(0)));
    assert!(
        unread.contains("blk.0.ffn_up.weight is stored as IQ4_NL, which is not read"),
        "{unread}"
    );
}

#[test]
fn weights_that_are_no_numbers_are_errors() {
    let mut data = vec![0u8; 32 * 64 * 4];
    data[4 * 32 * 5..4 * 32 * 5 + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let file = tiny("llama").without("blk.0.ffn_up.weight").tensor(
        "blk.0.ffn_up.weight",
        &[32, 64],
        0,
        data,
    );
    let error = message(values(&open(&file).expect("a checkpoint"), Role::Up, Some(0)));
    assert!(error.contains("blk.0.ffn_up.weight holds NaN in row 5"), "{error}");
    // A Q4_1 block with an infinite scale.
    let mut data = vec![0u8; 64 * 20];
    data[1] = 0x7c;
    let file = tiny("llama").without("blk.0.ffn_up.weight").tensor(
        "blk.0.ffn_up.weight",
        &[32, 64],
        3,
        data,
    );
    let error = message(values(&open(&file).expect("a checkpoint"), Role::Up, Some(0)));
    assert!(error.contains("in row 0; the file is damaged"), "{error}");
}

#[test]
fn every_prefix_of_a_gguf_file_is_an_error() {
    let whole = tiny("llama").bytes();
    // The header has some 1,300 bytes; within the data every cut is alike.
    for length in (0..whole.len()).filter(|l| *l < 2000 || l % 97 == 0) {
        assert!(open_bytes(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn flipped_bits_never_panic() {
    let whole = tiny("llama").bytes();
    let mut state = 1u64;
    for _ in 0..2000 {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (at, bit) = ((state >> 33) as usize % 1800, (state >> 20) & 7);
        let mut broken = whole.clone();
        broken[at] ^= 1 << bit;
        if let Ok(checkpoint) = open_bytes(&broken) {
            for role in [Role::Query, Role::Down, Role::AttentionNorm] {
                let _ = values(&checkpoint, role, Some(0));
            }
        }
    }
}

#[test]
fn a_hugging_face_directory_is_read() {
    for dtype in ["F32", "BF16"] {
        let folder = tempfile::tempdir().expect("a directory");
        write_hugging_face(folder.path(), "LlamaForCausalLM", &TINY_TENSORS, dtype);
        let checkpoint = Checkpoint::open(folder.path()).expect("a checkpoint");
        assert!(!checkpoint.rope_is_interleaved());
        let rows = values(&checkpoint, Role::Value, Some(0)).expect("rows");
        assert_eq!((rows.len(), rows[2][3]), (16, 67.0));
        let norm = values(&checkpoint, Role::FinalNorm, None).expect("rows");
        assert_eq!(norm[0][31], 31.0);
        assert!(Checkpoint::open(&folder.path().join("model.safetensors")).is_ok());
    }
}

#[test]
fn gemma_norms_get_their_one_from_safetensors_but_not_from_gguf() {
    let folder = tempfile::tempdir().expect("a directory");
    write_hugging_face(folder.path(), "GemmaForCausalLM", &TINY_TENSORS, "F32");
    let checkpoint = Checkpoint::open(folder.path()).expect("a checkpoint");
    let first =
        |checkpoint: &Checkpoint, role, layer| values(checkpoint, role, layer).expect("rows")[0][0];
    assert_eq!(first(&checkpoint, Role::FinalNorm, None), 1.0);
    assert_eq!(first(&checkpoint, Role::Up, Some(0)), 0.0);
    let gguf = open(&tiny("gemma")).expect("a checkpoint");
    assert_eq!(first(&gguf, Role::AttentionNorm, Some(0)), 2.0);
}

#[test]
fn several_files_are_joined_by_their_index() {
    let folder = tempfile::tempdir().expect("a directory");
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("config.json"), tiny_config("LlamaForCausalLM")).expect("writable");
    std::fs::write(at("a.safetensors"), safetensors(&TINY_TENSORS[..5], "F32")).expect("writable");
    std::fs::write(at("b.safetensors"), safetensors(&TINY_TENSORS[5..], "F32")).expect("writable");
    assert!(message(Checkpoint::open(folder.path())).contains("holds 2 safetensors files but no"));
    let index =
        |file: &str| format!(r#"{{"weight_map": {{"x": "a.safetensors", "y": "{file}"}}}}"#);
    std::fs::write(at("model.safetensors.index.json"), index("b.safetensors")).expect("writable");
    assert!(Checkpoint::open(folder.path()).is_ok());
    std::fs::write(at("model.safetensors.index.json"), index("../b.safetensors"))
        .expect("writable");
    assert!(message(Checkpoint::open(folder.path())).contains("beside the index"));
    std::fs::write(at("model.safetensors.index.json"), index("c.safetensors")).expect("writable");
    assert!(message(Checkpoint::open(folder.path())).contains("c.safetensors: No such file"));
    std::fs::copy(at("a.safetensors"), at("c.safetensors")).expect("writable");
    assert!(message(Checkpoint::open(folder.path())).contains("occurs in more than one file"));
}

#[test]
fn every_prefix_and_many_flipped_bits_of_safetensors_are_survived() {
    let folder = tempfile::tempdir().expect("a directory");
    write_hugging_face(folder.path(), "LlamaForCausalLM", &TINY_TENSORS, "F32");
    let file = folder.path().join("model.safetensors");
    let whole = std::fs::read(&file).expect("readable");
    for length in (0..whole.len()).filter(|l| *l < 1300 || l % 501 == 0) {
        std::fs::write(&file, &whole[..length]).expect("writable");
        let error = message(Checkpoint::open(folder.path()));
        assert!(error.contains("fetch it again"), "{length}: {error}");
    }
    for at in 0..1000 {
        let mut broken = whole.clone();
        broken[at] ^= 1 << (at % 8);
        std::fs::write(&file, &broken).expect("writable");
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            let _ = values(&checkpoint, Role::Up, Some(0));
        }
    }
}

/// A whole file with several faults at once: bytes changed, put in, taken out, and lengths blown up.
fn damaged(whole: &[u8], header: usize, state: &mut u64) -> Vec<u8> {
    let mut next = |below: usize| {
        *state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) as usize % below
    };
    let mut broken = whole.to_vec();
    for _ in 0..=next(4) {
        let at = next(header);
        match next(5) {
            0 => broken[at] = next(256) as u8,
            1 => broken.insert(at, next(256) as u8),
            2 => drop(broken.drain(at..at + next(16))),
            3 => {
                let value = [0, 1, u64::MAX, 1 << 63, u64::from(u32::MAX)][next(5)];
                broken[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            // Digits are what lengths in text are made of.
            _ => broken[at..at + 8].copy_from_slice(b"99999999"),
        }
    }
    broken
}

#[test]
fn several_faults_at_once_never_panic() {
    let mut state = 7;
    let whole = tiny("llama").bytes();
    for _ in 0..1000 {
        if let Ok(checkpoint) = open_bytes(&damaged(&whole, 1300, &mut state)) {
            let _ = values(&checkpoint, Role::Up, Some(0));
        }
    }
    let folder = tempfile::tempdir().expect("a directory");
    write_hugging_face(folder.path(), "LlamaForCausalLM", &TINY_TENSORS, "F32");
    let file = folder.path().join("model.safetensors");
    let whole = std::fs::read(&file).expect("readable");
    for _ in 0..1000 {
        std::fs::write(&file, damaged(&whole, 1100, &mut state)).expect("writable");
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            let _ = values(&checkpoint, Role::Up, Some(0));
        }
    }
}

#[test]
fn a_shape_that_overflows_beside_an_empty_dimension_is_survived() {
    let folder = tempfile::tempdir().expect("a directory");
    std::fs::write(folder.path().join("config.json"), tiny_config("LlamaForCausalLM"))
        .expect("writable");
    let header =
        r#"{"x":{"dtype":"F32","shape":[0,9223372036854775808,4,1],"data_offsets":[0,0]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    std::fs::write(folder.path().join("model.safetensors"), file).expect("writable");
    let error = message(Checkpoint::open(folder.path()));
    assert!(error.contains("is missing"), "{error}");
}

#[test]
fn types_without_weights_in_them_are_refused() {
    let folder = tempfile::tempdir().expect("a directory");
    write_hugging_face(folder.path(), "LlamaForCausalLM", &TINY_TENSORS, "F64");
    let checkpoint = Checkpoint::open(folder.path()).expect("a checkpoint");
    assert!(
        message(values(&checkpoint, Role::Up, Some(0)))
            .contains("is stored as F64, which is not read")
    );
}

#[test]
fn a_directory_says_what_it_lacks() {
    let folder = tempfile::tempdir().expect("a directory");
    let at = |name: &str| folder.path().join(name);
    assert!(message(Checkpoint::open(&at("nowhere"))).contains("No such file"));
    assert!(
        message(Checkpoint::open(folder.path())).contains("holds no model; expected a GGUF file")
    );
    std::fs::write(at("pytorch_model.bin"), "x").expect("writable");
    assert!(message(Checkpoint::open(folder.path())).contains("PyTorch weights only"));
    std::fs::write(at("a.gguf"), tiny("llama").bytes()).expect("writable");
    assert!(Checkpoint::open(folder.path()).is_ok());
    std::fs::write(at("b.gguf"), "x").expect("writable");
    assert!(
        message(Checkpoint::open(folder.path()))
            .contains("holds 2 GGUF files; name one of them, such as a.gguf")
    );
}

#[test]
fn a_layer_beyond_the_model_is_an_error() {
    let checkpoint = open(&tiny("llama")).expect("a checkpoint");
    assert!(checkpoint.shape(Role::Key, Some(1)).is_err());
    assert!(checkpoint.shape(Role::Key, None).is_err());
    assert!(checkpoint.shape(Role::Embedding, Some(0)).is_err());
}
