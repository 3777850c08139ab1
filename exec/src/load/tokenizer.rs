//! Text to token ids and back, for the byte-level BPE vocabularies of GGUF files and for `tokenizer.json`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use batchmax_sim::profile::hf::read_json;
use batchmax_sim::profile::{GgufHeader, GgufValue};
use serde_json::Value;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::tokenizer::AddedToken;

use super::LoadError;
use super::chat::ChatMl;
use super::open::one_line;
use super::pre_tokenizer::PreTokenizer;

/// The largest published `tokenizer.json` has some 35 MB.
const MAX_BYTES: u64 = 128 << 20;
/// As many tokens as a model may have.
const MAX_ID: u64 = 1 << 24;
/// Tokens that end an answer whatever the file names as its end, as in llama.cpp.
const ENDS: [&str; 7] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<EOT>",
];
/// `tokenizer.ggml.token_type` of tokens that are matched before text is cut.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// A vocabulary and its rules.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    origin: PathBuf,
    /// Put in front by us; a `tokenizer.json` does so itself.
    bos: Option<u32>,
    stops: Vec<u32>,
    chat: Option<ChatMl>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF header describes.
    pub fn from_gguf(header: &GgufHeader, origin: &Path) -> Result<Self, LoadError> {
        build(header)
            .map(|built| Self { origin: origin.to_owned(), ..built })
            .map_err(|problem| error(origin, problem))
    }

    /// Reads a `tokenizer.json`, and stop tokens and chat template from the files beside it.
    pub fn from_file(path: &Path) -> Result<Self, LoadError> {
        let io = |problem| LoadError::Io { path: path.to_owned(), problem };
        let mut text = Vec::new();
        File::open(path).map_err(io)?.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(error(path, format!("longer than {MAX_BYTES} bytes; is it a tokenizer?")));
        }
        check_model(&text).map_err(|problem| error(path, problem))?;
        let inner = tokenizers::Tokenizer::from_bytes(&text)
            .map_err(|e| error(path, format!("not a tokenizer: {}", one_line(&e.to_string()))))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut stops = ends(&inner);
        for file in ["config.json", "generation_config.json"] {
            // Optional, and not what the caller asked for: what can't be read is passed over.
            let Ok(config) = read_json(&folder.join(file)) else { continue };
            let ids = match config.get("eos_token_id") {
                Some(Value::Array(ids)) => ids.as_slice(),
                Some(id) => std::slice::from_ref(id),
                None => &[],
            };
            stops.extend(ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
        }
        let template = read_json(&folder.join("tokenizer_config.json"))
            .ok()
            .and_then(|config| Some(config.get("chat_template")?.as_str()?.to_owned()));
        let chat = template.as_deref().and_then(ChatMl::recognise);
        Ok(Self {
            inner,
            origin: path.to_owned(),
            bos: None,
            stops: stops.into_iter().collect(),
            chat,
        })
    }

    /// Token ids of a text. `add_special`: with the tokens that the model expects around every text, if any.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, LoadError> {
        let encoding = self.inner.encode(text, add_special && self.bos.is_none());
        let encoding = encoding.map_err(|e| error(&self.origin, one_line(&e.to_string())))?;
        let bos = self.bos.filter(|_| add_special);
        Ok(bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// The text of token ids, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String, LoadError> {
        if let Some(id) = ids.iter().find(|id| self.inner.id_to_token(**id).is_none()) {
            return Err(error(&self.origin, format!("token id {id} is not in the vocabulary")));
        }
        self.inner.decode(ids, false).map_err(|e| error(&self.origin, one_line(&e.to_string())))
    }

    /// Tokens that end an answer, ascending.
    #[must_use]
    pub fn stop_tokens(&self) -> Vec<u32> {
        self.stops.clone()
    }

    /// The prompt of a conversation's first turn; `None` when the model's chat format is not ChatML.
    ///
    /// It holds special tokens in writing: encode it without further ones.
    #[must_use]
    pub fn chat(&self, user_text: &str) -> Option<String> {
        Some(self.chat.as_ref()?.render(user_text))
    }
}

fn error(path: &Path, problem: String) -> LoadError {
    LoadError::Tokenizer { path: path.to_owned(), problem }
}

fn build(header: &GgufHeader) -> Result<Tokenizer, String> {
    let list = |key: &str| header.metadata.get(key).and_then(GgufValue::as_array);
    let texts = |key: &str| -> Result<Vec<&str>, String> {
        let items =
            list(key).ok_or_else(|| format!("{key} is missing; the file has no tokenizer"))?;
        items
            .iter()
            .map(GgufValue::as_str)
            .collect::<Option<_>>()
            .ok_or_else(|| format!("{key}: expected texts"))
    };
    match header.text("tokenizer.ggml.model") {
        Some("gpt2") => {}
        Some(other) => {
            let known = match other {
                "llama" => "SentencePiece",
                "bert" => "WordPiece",
                "t5" => "Unigram",
                _ => other,
            };
            return Err(format!(
                "{} vocabularies of GGUF files are not read, only byte-level BPE",
                one_line(known)
            ));
        }
        None => return Err("tokenizer.ggml.model is missing; the file has no tokenizer".to_owned()),
    }
    let pre = PreTokenizer::of(header.text("tokenizer.ggml.pre").unwrap_or("default"))?;
    let tokens = texts("tokenizer.ggml.tokens")?;
    let mut vocab = Vocab::with_capacity(tokens.len());
    for (id, token) in (0u32..).zip(&tokens) {
        if let Some(before) = vocab.insert((*token).to_owned(), id) {
            return Err(format!("tokens {before} and {id} are the same text"));
        }
    }
    let pairs = texts("tokenizer.ggml.merges")?;
    let (mut merges, mut merged) = (Vec::with_capacity(pairs.len()), String::new());
    for merge in pairs {
        // A token may begin with a space only in vocabularies that are not byte-level.
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(format!("merge \"{}\" is not a pair", one_line(merge)));
        };
        // The tokenizers crate would index past its buffer.
        merged.clear();
        merged.extend([left, right]);
        if !vocab.contains_key(&merged) {
            return Err(format!("merge \"{}\" yields no token", one_line(merge)));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let bpe =
        BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges).build();
    let mut inner = tokenizers::Tokenizer::new(bpe.map_err(|e| one_line(&e.to_string()))?);
    inner.with_pre_tokenizer(Some(pre.cut));
    inner.with_decoder(Some(ByteLevel::new(false, false, false)));
    inner.with_normalizer(pre.normalizer).map_err(|e| one_line(&e.to_string()))?;
    let types = list("tokenizer.ggml.token_type").unwrap_or_default();
    let added = tokens.iter().zip(types).filter_map(|(token, kind)| match kind.as_u64() {
        Some(CONTROL) => Some(AddedToken::from(*token, true).normalized(false)),
        Some(USER_DEFINED) => Some(AddedToken::from(*token, false).normalized(false)),
        _ => None,
    });
    inner.add_tokens(added).map_err(|e| one_line(&e.to_string()))?;

    let id = |key: &str| -> Result<Option<u32>, String> {
        let Some(value) = header.metadata.get(&format!("tokenizer.ggml.{key}")) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(id) if id < tokens.len() as u64 => Ok(Some(id as u32)),
            _ => Err(format!("tokenizer.ggml.{key} is not in the vocabulary of {}", tokens.len())),
        }
    };
    let add_bos = match header.metadata.get("tokenizer.ggml.add_bos_token") {
        Some(GgufValue::Bool(add)) => *add,
        _ => pre.bos_by_default,
    };
    let bos = id("bos_token_id")?.filter(|_| add_bos);
    let mut stops = ends(&inner);
    stops.extend(id("eos_token_id")?);
    stops.extend(id("eot_token_id")?);
    let chat = header.text("tokenizer.chat_template").and_then(ChatMl::recognise);
    Ok(Tokenizer { inner, origin: PathBuf::new(), bos, stops: stops.into_iter().collect(), chat })
}

/// The special tokens that are known to end an answer.
fn ends(inner: &tokenizers::Tokenizer) -> BTreeSet<u32> {
    let added = inner.get_added_tokens_decoder();
    ENDS.iter()
        .filter_map(|text| inner.token_to_id(text))
        .filter(|id| added.contains_key(id))
        .collect()
}

/// What makes the tokenizers crate panic is refused here: a merge longer than every token, and ids at the end of u32.
fn check_model(text: &[u8]) -> Result<(), String> {
    let json: Value = serde_json::from_slice(text)
        .map_err(|e| format!("line {}: {}", e.line(), one_line(&e.to_string())))?;
    let model = json.get("model");
    let vocab = model.and_then(|m| m.get("vocab")).and_then(Value::as_object);
    let added = json.get("added_tokens").and_then(Value::as_array);
    let ids = vocab.into_iter().flat_map(|map| map.values());
    let ids = ids.chain(added.into_iter().flatten().filter_map(|token| token.get("id")));
    if let Some(id) = ids.filter_map(Value::as_u64).find(|id| *id >= MAX_ID) {
        return Err(format!("token id {id} is too large"));
    }
    let merges = model.and_then(|m| m.get("merges")).and_then(Value::as_array);
    let (Some(vocab), Some(merges)) = (vocab, merges) else { return Ok(()) };
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let prefix = model
        .and_then(|m| m.get("continuing_subword_prefix"))
        .and_then(Value::as_str)
        .unwrap_or("");
    for merge in merges {
        let pair = match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => {
                    Some((left.as_str(), right.as_str()))
                }
                _ => None,
            },
            _ => None,
        };
        if pair.is_none_or(|(left, right)| {
            left.len() + right.len() > longest + prefix.len()
                || !right.is_char_boundary(prefix.len())
        }) {
            return Err(format!(
                "merge {} is not a pair of tokens that yields a token",
                one_line(&merge.to_string())
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
