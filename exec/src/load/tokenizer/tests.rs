//! Vocabularies of a dozen tokens; the golden test in `tests/` has a real one.

use super::*;
use crate::load::test_files::GgufFile;

const TOKENS: [&str; 9] = ["<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "Ġa", "1", "system"];

fn file(model: &str, pre: &str, merges: &[&str]) -> GgufFile {
    GgufFile::default()
        .text("tokenizer.ggml.model", model)
        .text("tokenizer.ggml.pre", pre)
        .texts("tokenizer.ggml.tokens", &TOKENS)
        .wholes("tokenizer.ggml.token_type", &[3, 3, 1, 1, 1, 1, 1, 1, 1])
        .texts("tokenizer.ggml.merges", merges)
        .whole("tokenizer.ggml.bos_token_id", 0)
        .whole("tokenizer.ggml.eos_token_id", 1)
}

fn tokenizer(file: &GgufFile) -> Result<Tokenizer, LoadError> {
    let bytes = file.bytes();
    let header =
        GgufHeader::parse(bytes.as_slice(), bytes.len() as u64, "x.gguf").expect("a header");
    Tokenizer::from_gguf(&header, Path::new("x.gguf"))
}

fn message(file: &GgufFile) -> String {
    tokenizer(file).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn merges_and_special_tokens_are_applied() {
    let tokenizer = tokenizer(&file("gpt2", "smollm", &["a b", "Ġ a"])).expect("a tokenizer");
    let ids = tokenizer.encode("<|im_start|>ab a1<|im_end|>", true).expect("ids");
    assert_eq!(ids, [0, 4, 6, 7, 1]);
    assert_eq!(tokenizer.decode(&ids).expect("text"), "<|im_start|>ab a1<|im_end|>");
    assert_eq!(tokenizer.stop_tokens(), [1]);
    assert_eq!(tokenizer.chat("hi"), None);
    assert!(tokenizer.decode(&[9]).is_err());
}

#[test]
fn bos_is_added_only_where_file_or_family_say_so() {
    let merges = ["a b"];
    for (file, expected) in [
        (file("gpt2", "smollm", &merges), vec![4]),
        (file("gpt2", "llama-bpe", &merges), vec![0, 4]),
        (file("gpt2", "llama-bpe", &merges).flag("tokenizer.ggml.add_bos_token", false), vec![4]),
        (file("gpt2", "smollm", &merges).flag("tokenizer.ggml.add_bos_token", true), vec![0, 4]),
    ] {
        let tokenizer = tokenizer(&file).expect("a tokenizer");
        assert_eq!(tokenizer.encode("ab", true).expect("ids"), expected);
        assert_eq!(tokenizer.encode("ab", false).expect("ids"), [4]);
    }
}

#[test]
fn what_is_not_read_is_said_with_the_way_out() {
    let error = message(&file("llama", "default", &[]));
    assert_eq!(
        error,
        "x.gguf: SentencePiece vocabularies of GGUF files are not read, only byte-level BPE; \
         hint: token ids can be given instead of text"
    );
    assert!(
        message(&file("gpt2", "klingon", &[]))
            .contains("the pre-tokenizer \"klingon\" is not known")
    );
    assert!(message(&GgufFile::default()).contains("the file has no tokenizer"));
}

#[test]
fn broken_merges_are_errors() {
    assert!(message(&file("gpt2", "smollm", &["ab"])).contains("merge \"ab\" is not a pair"));
    assert!(message(&file("gpt2", "smollm", &["systema systema"])).contains("yields no token"));
    let twice = file("gpt2", "smollm", &[]);
    let same = GgufFile::default()
        .text("tokenizer.ggml.model", "gpt2")
        .texts("tokenizer.ggml.tokens", &["a", "a"])
        .texts("tokenizer.ggml.merges", &[]);
    assert!(message(&same).contains("tokens 0 and 1 are the same text"));
    assert!(
        message(&twice.whole("tokenizer.ggml.eot_token_id", 99))
            .contains("eot_token_id is not in the vocabulary")
    );
}

#[test]
fn a_tokenizer_json_takes_its_stop_tokens_from_the_files_beside_it() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("tokenizer.json");
    let built = tokenizer(&file("gpt2", "smollm", &["a b"])).expect("a tokenizer");
    let json = built.inner.to_string(false).expect("json");
    std::fs::write(&path, &json).expect("writable");
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [7, 1]}"#)
        .expect("writable");
    let read = Tokenizer::from_file(&path).expect("a tokenizer");
    assert_eq!(read.encode("ab", true).expect("ids"), [4]);
    assert_eq!(read.stop_tokens(), [1, 7]);
    for length in (0..json.len()).step_by(7) {
        std::fs::write(&path, &json[..json.floor_char_boundary(length)]).expect("writable");
        assert!(Tokenizer::from_file(&path).is_err(), "{length}");
    }
    std::fs::write(&path, json.replace(r#"["a","b"]"#, r#"["systema","systema"]"#))
        .expect("writable");
    assert!(Tokenizer::from_file(&path).is_err());
    std::fs::write(&path, json.replace(r#""id":1,"#, r#""id":4294967295,"#)).expect("writable");
    let error = Tokenizer::from_file(&path).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("token id 4294967295 is too large"), "{error}");
}
