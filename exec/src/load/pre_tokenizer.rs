//! How text is cut before byte pairs are merged: one expression per family, as llama.cpp names the families.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

/// A family's way with text.
pub(super) struct PreTokenizer {
    /// Cuts, in order.
    pub(super) cut: PreTokenizerWrapper,
    /// Unicode normalisation, where the family has one.
    pub(super) normalizer: Option<NFC>,
    /// A piece that is a token as it stands is not merged.
    pub(super) ignore_merges: bool,
    /// Whether text starts with BOS when the file does not say.
    pub(super) bos_by_default: bool,
}

const DIGIT: &str = r"\p{N}";
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    /// The family of `tokenizer.ggml.pre`; an error is one line.
    pub(super) fn of(family: &str) -> Result<Self, String> {
        let cuts: &[&str] = match family {
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" => &[DIGIT, GPT2],
            "gpt-2" | "phi-2" | "olmo" | "mpt" | "jais" | "trillion" | "granite-docling" => &[GPT2],
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" | "dbrx" | "smaug-bpe" => {
                &[LLAMA3]
            }
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" => &[QWEN2],
            "tekken" => &[TEKKEN],
            "gpt-4o" | "llama4" => &[GPT4O],
            "default" => &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", THREE_DIGITS],
            "falcon" => &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, THREE_DIGITS],
            other => {
                let name: String = other.chars().filter(|c| !c.is_control()).take(40).collect();
                return Err(format!("the pre-tokenizer \"{name}\" is not known"));
            }
        };
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for cut in cuts {
            let pattern = SplitPattern::Regex((*cut).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|e| e.to_string())?;
            steps.push(split.into());
        }
        // Cutting is done; this maps bytes to the letters of the vocabulary.
        steps.push(ByteLevel::new(false, false, false).into());
        let llama3 = matches!(family, "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral");
        Ok(Self {
            cut: Sequence::new(steps).into(),
            normalizer: matches!(family, "qwen2" | "deepseek-r1-qwen").then_some(NFC),
            ignore_merges: llama3 || family == "tekken",
            bos_by_default: llama3 || family == "tekken",
        })
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::tokenizer::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _,
    };

    use super::*;

    fn pieces(family: &str, text: &str) -> Vec<String> {
        let cut = PreTokenizer::of(family).expect("a known family").cut;
        let mut pieces = PreTokenizedString::from(text);
        cut.pre_tokenize(&mut pieces).expect("pieces");
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(piece, ..)| piece.to_owned()).collect()
    }

    #[test]
    fn families_differ_in_how_they_cut_digits() {
        assert_eq!(pieces("smollm", "a 1234"), ["a", "Ġ", "1", "2", "3", "4"]);
        assert_eq!(pieces("gpt-2", "a 1234"), ["a", "Ġ1234"]);
        assert_eq!(pieces("llama-bpe", "a 1234"), ["a", "Ġ", "123", "4"]);
        assert_eq!(pieces("qwen2", "a 1234"), ["a", "Ġ", "1", "2", "3", "4"]);
    }

    #[test]
    fn contractions_and_line_breaks_are_cut_as_published() {
        assert_eq!(pieces("llama-bpe", "I'LL go!\n\nx"), ["I", "'LL", "Ġgo", "!ĊĊ", "x"]);
        assert_eq!(pieces("gpt-2", "I'll go!\n\nx"), ["I", "'ll", "Ġgo", "!", "Ċ", "Ċ", "x"]);
    }

    #[test]
    fn every_family_compiles_and_unknown_ones_are_named() {
        for family in
            ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "default", "falcon"]
        {
            assert!(!pieces(family, "Hello, wörld 42").is_empty());
        }
        assert_eq!(
            PreTokenizer::of("x\ny").err().as_deref(),
            Some("the pre-tokenizer \"xy\" is not known")
        );
    }
}
