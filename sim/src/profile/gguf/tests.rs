//! GGUF files made by hand, whole and broken.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::op::DType;
use crate::profile::{Activation, RopeScaling, SlidingWindow};

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &GgufValue, with_type: bool) {
    let (kind, raw): (u32, Vec<u8>) = match value {
        GgufValue::Unsigned(v) => (4, (*v as u32).to_le_bytes().into()),
        GgufValue::Signed(v) => (5, (*v as i32).to_le_bytes().into()),
        GgufValue::Float(v) => (6, (*v as f32).to_le_bytes().into()),
        GgufValue::Bool(v) => (7, vec![u8::from(*v)]),
        GgufValue::Text(text) => {
            let mut raw = Vec::new();
            put_text(&mut raw, text);
            (8, raw)
        }
        GgufValue::Array(items) => {
            let mut raw = Vec::new();
            for item in items {
                put_value(&mut raw, item, false);
            }
            let kind: u32 = match items.first() {
                Some(GgufValue::Text(_)) => 8,
                Some(GgufValue::Array(_)) => 9,
                Some(GgufValue::Float(_)) => 6,
                _ => 4,
            };
            let mut whole = kind.to_le_bytes().to_vec();
            whole.extend((items.len() as u64).to_le_bytes());
            whole.extend(raw);
            (9, whole)
        }
    };
    if with_type {
        out.extend(kind.to_le_bytes());
    }
    out.extend(raw);
}

/// (name, shape, type code, data).
type Written = (&'static str, Vec<u64>, u32, Vec<u8>);

fn write(keys: &[(&str, GgufValue)], tensors: &[Written]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        put_text(&mut out, key);
        put_value(&mut out, value, true);
    }
    let mut offset = 0u64;
    for (name, shape, kind, data) in tensors {
        put_text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = (offset + data.len() as u64).next_multiple_of(32);
    }
    for (_, _, _, data) in tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
    }
    out
}

fn text(value: &str) -> GgufValue {
    GgufValue::Text(value.to_owned())
}

fn keys_of(arch: &str) -> Vec<(String, GgufValue)> {
    let key = |name: &str, value: GgufValue| (format!("{arch}.{name}"), value);
    let n = GgufValue::Unsigned;
    vec![
        ("general.architecture".to_owned(), text(arch)),
        ("general.name".to_owned(), text("Tiny Test 1.5B")),
        key("block_count", n(2)),
        key("context_length", n(4096)),
        key("embedding_length", n(64)),
        key("feed_forward_length", n(96)),
        key("attention.head_count", n(4)),
        key("attention.head_count_kv", n(2)),
        key("attention.layer_norm_rms_epsilon", GgufValue::Float(1e-6)),
        key("rope.freq_base", GgufValue::Float(500_000.0)),
    ]
}

fn tiny(arch: &str, more: &[(&str, GgufValue)], tensors: &[Written]) -> Vec<u8> {
    let mut keys = keys_of(arch);
    keys.extend(more.iter().map(|(k, v)| ((*k).to_owned(), v.clone())));
    let keys: Vec<_> = keys.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    write(&keys, tensors)
}

fn embedding() -> Written {
    ("token_embd.weight", vec![64, 10], 8, vec![0; 64 * 10 / 32 * 34])
}

fn parse(bytes: &[u8]) -> Result<GgufHeader, ProfileError> {
    GgufHeader::parse(bytes, bytes.len() as u64, "x.gguf")
}

fn described(bytes: &[u8]) -> Result<crate::profile::Model, ProfileError> {
    describe_gguf(&parse(bytes)?, None, Path::new("x.gguf"))
}

fn message<T>(result: Result<T, ProfileError>) -> String {
    result.err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn a_llama_header_becomes_a_model() {
    let model = described(&tiny("llama", &[], &[embedding()])).expect("a model");
    assert_eq!(model.name, "tiny-test-1.5b");
    assert_eq!(
        (model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim),
        (2, 64, 4, 2, 16)
    );
    assert_eq!((model.ffn, model.vocab, model.context), (96, 10, 4096));
    assert!(model.tied_embeddings);
    assert_eq!(model.norm_eps, 1e-6);
    assert_eq!(model.rope_theta, 500_000.0);
    assert_eq!(model.weight_dtype, DType::Int8);
    assert_eq!(model.not_executable, None);
    // Nothing but an embedding says nothing of the layers.
    assert_eq!(model.stored, None);
}

#[test]
fn gemma2_slides_on_even_layers_and_scales_its_embedding() {
    let more = [
        ("gemma2.attention.sliding_window", GgufValue::Unsigned(128)),
        ("gemma2.attn_logit_softcapping", GgufValue::Float(50.0)),
        ("gemma2.final_logit_softcapping", GgufValue::Float(30.0)),
    ];
    let model = described(&tiny("gemma2", &more, &[embedding()])).expect("a model");
    assert_eq!(model.sliding_window, Some(SlidingWindow { tokens: 128, every: 2, full_at: 1 }));
    assert_eq!((model.window_of(0), model.window_of(1)), (Some(128), None));
    assert_eq!(model.embedding_scale, Some(8.0));
    assert_eq!((model.attention_softcap, model.logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!(model.activation, Activation::GeluTanh);
    assert!(model.post_norms);
}

#[test]
fn rope_factors_tell_the_llama3_scaling() {
    let header = parse(&tiny("llama", &[], &[embedding()])).expect("a header");
    let model = describe_gguf(&header, Some(&[1.0, 2.5, 32.0]), Path::new("x")).expect("a model");
    assert!(matches!(model.rope_scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
}

#[test]
fn yarn_is_described_but_not_executable() {
    let more = [
        ("qwen2.rope.scaling.type", text("yarn")),
        ("qwen2.rope.scaling.factor", GgufValue::Float(4.0)),
    ];
    let model = described(&tiny("qwen2", &more, &[embedding()])).expect("a model");
    assert_eq!(model.not_executable.as_deref(), Some("rope scaling \"yarn\""));
}

#[test]
fn what_is_not_described_is_refused_by_name() {
    let moe = tiny("llama", &[("llama.expert_count", GgufValue::Unsigned(8))], &[embedding()]);
    assert!(message(described(&moe)).contains("mixture of experts (expert_count = 8)"));
    assert!(
        message(described(&tiny("mamba", &[], &[])))
            .contains("\"mamba\" is not described yet; known: gemma")
    );
    let no_heads: Vec<_> =
        keys_of("llama").into_iter().filter(|(k, _)| k != "llama.attention.head_count").collect();
    let no_heads: Vec<_> = no_heads.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    assert!(
        message(described(&write(&no_heads, &[]))).contains("llama.attention.head_count: missing")
    );
}

#[test]
fn every_prefix_of_a_file_is_an_error() {
    let more = [
        ("tokenizer.ggml.tokens", GgufValue::Array(vec![text("a"), text("b")])),
        ("a.nested", GgufValue::Array(vec![GgufValue::Array(vec![GgufValue::Unsigned(1)])])),
        ("a.flag", GgufValue::Bool(true)),
    ];
    let whole = tiny("llama", &more, &[embedding()]);
    assert!(parse(&whole).is_ok());
    for length in 0..whole.len() {
        let error = message(parse(&whole[..length]));
        assert!(
            error.contains("truncated") && error.contains("fetch it again"),
            "{length}: {error}"
        );
    }
    let cut = message(parse(&whole[..whole.len() - 1]));
    let expected = format!(
        "tensor token_embd.weight ends at byte {}, the file has {}",
        whole.len(),
        whole.len() - 1
    );
    assert!(cut.contains(&expected), "{cut}");
}

#[test]
fn flipped_bits_never_panic() {
    let more = [("tokenizer.ggml.tokens", GgufValue::Array(vec![text("a"), text("b")]))];
    let whole = tiny("llama", &more, &[embedding()]);
    let header_bytes = whole.len() - 680;
    for at in 0..header_bytes {
        for bit in 0..8 {
            let mut broken = whole.clone();
            broken[at] ^= 1 << bit;
            let _ = described(&broken);
        }
    }
}

/// One fault in a header: where, and what.
#[derive(Clone, Debug)]
enum Fault {
    Byte(u8),
    Insert(u8),
    Remove(usize),
    /// A length or a count becomes this.
    Word(u64),
}

fn fault() -> impl Strategy<Value = (usize, Fault)> {
    let kind = prop_oneof![
        any::<u8>().prop_map(Fault::Byte),
        any::<u8>().prop_map(Fault::Insert),
        (1usize..40).prop_map(Fault::Remove),
        prop_oneof![Just(0), Just(u64::MAX), Just(1 << 63), Just(1 << 32), 0u64..64, any::<u64>()]
            .prop_map(Fault::Word),
    ];
    (any::<prop::sample::Index>().prop_map(|i| i.index(1 << 16)), kind)
}

proptest! {
    #[test]
    fn faults_never_panic_and_tensors_stay_within_the_file(
        faults in prop::collection::vec(fault(), 1..6),
        arch in prop_oneof![Just("llama"), Just("gemma2"), Just("phi3")],
    ) {
        let more = [("tokenizer.ggml.tokens", GgufValue::Array(vec![text("a"), text("b")]))];
        let mut bytes = tiny(arch, &more, &[embedding()]);
        for (at, fault) in faults {
            // The last 680 bytes are the tensor: there is nothing to misread.
            let at = at % bytes.len().saturating_sub(680).max(1);
            match fault {
                Fault::Byte(byte) => bytes[at] = byte,
                Fault::Insert(byte) => bytes.insert(at, byte),
                Fault::Remove(count) => drop(bytes.drain(at..at + count)),
                Fault::Word(word) => bytes[at..at + 8].copy_from_slice(&word.to_le_bytes()),
            }
        }
        let _ = described(&bytes);
        if let Ok(header) = parse(&bytes) {
            for tensor in header.tensors.iter().filter(|t| t.kind.layout().is_some()) {
                let size = tensor.bytes().expect("checked by the parser");
                prop_assert!(header.data_start + tensor.offset + size <= bytes.len() as u64);
            }
        }
    }
}

#[test]
fn huge_counts_are_refused_before_anything_is_allocated() {
    for at in [8, 16] {
        let mut broken = tiny("llama", &[], &[embedding()]);
        broken[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(message(parse(&broken)).contains("expected at most 65536"));
    }
    let mut long_key = tiny("llama", &[], &[]);
    long_key[24..32].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert!(message(parse(&long_key)).contains("expected at most 4194304"));
}

#[test]
fn tensors_that_overlap_or_repeat_are_refused() {
    let mut overlap = tiny("llama", &[], &[embedding(), ("b", vec![64], 0, vec![0; 256])]);
    let at = overlap.windows(8).rposition(|w| w == 704u64.to_le_bytes()).expect("the offset of b");
    overlap[at..at + 8].copy_from_slice(&32u64.to_le_bytes());
    assert!(message(parse(&overlap)).contains("token_embd.weight: overlaps tensor b"));
    assert!(
        message(parse(&tiny("llama", &[], &[embedding(), embedding()]))).contains("occurs twice")
    );
}

#[test]
fn shapes_that_overflow_or_split_blocks_are_refused() {
    let overflow = ("t", vec![1 << 40, 1 << 40], 0, Vec::new());
    assert!(message(parse(&tiny("llama", &[], &[overflow]))).contains("is too large"));
    let ragged = ("t", vec![33, 2], 3, vec![0; 60]);
    assert!(
        message(parse(&tiny("llama", &[], &[ragged])))
            .contains("rows of 33 elements can't be stored in Q4_1")
    );
    let empty = ("t", vec![0, 2], 0, Vec::new());
    assert!(message(parse(&tiny("llama", &[], &[empty]))).contains("empty dimension"));
}

#[test]
fn other_formats_and_versions_are_named() {
    assert!(message(parse(b"PK\x03\x04 a zip file")).contains("is it a GGUF file?"));
    let mut old = tiny("llama", &[], &[]);
    old[4] = 1;
    assert!(message(parse(&old)).contains("versions 2 and 3 are read"));
}
