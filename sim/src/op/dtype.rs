//! Element types.

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// Element types of weights, activations and caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit float.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit float.
    Fp8,
    /// 8-bit integer.
    Int8,
    /// 4-bit integer.
    Int4,
    /// 2-bit integer.
    Int2,
    /// Codes of 8 bits in blocks of 32, each with a binary16 scale and minimum, as GGUF files hold weights.
    Q8,
    /// Codes of 4 bits in such blocks.
    Q4,
}

impl DType {
    /// Every type, for parsing and for help texts.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Fp8,
        Self::Int8,
        Self::Int4,
        Self::Int2,
        Self::Q8,
        Self::Q4,
    ];

    /// Bits of one element; scales are counted where a type says what they are.
    #[must_use]
    pub fn bits(self) -> u64 {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Fp8 | Self::Int8 => 8,
            Self::Int4 => 4,
            Self::Int2 => 2,
            Self::Q8 => 9,
            Self::Q4 => 5,
        }
    }

    /// Bytes of `elements`, rounded up.
    #[must_use]
    pub fn bytes(self, elements: u64) -> Bytes {
        Bytes(elements.saturating_mul(self.bits()).div_ceil(8))
    }

    /// The name in files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int2 => "int2",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        Self::ALL.into_iter().find(|d| d.name() == lower).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|d| d.name()).collect();
            format!("\"{text}\" is not a type; known: {}", known.join(", "))
        })
    }
}
