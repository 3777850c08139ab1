//! Element types of GGUF tensors.

use std::fmt;

use crate::op::DType;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(non_camel_case_types, reason = "the names that ggml and every model card use")]
pub enum GgmlType {
    /// 32-bit float.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    BF16,
    /// 4 bits, a scale for 32 elements.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32 elements.
    Q4_1,
    /// 5 bits, a scale for 32 elements.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32 elements.
    Q5_1,
    /// 8 bits, a scale for 32 elements.
    Q8_0,
    /// 2 bits in super-blocks of 256.
    Q2_K,
    /// 3 bits in super-blocks of 256.
    Q3_K,
    /// 4 bits in super-blocks of 256.
    Q4_K,
    /// 5 bits in super-blocks of 256.
    Q5_K,
    /// 6 bits in super-blocks of 256.
    Q6_K,
    /// A type that is not read here, by its number.
    Other(u32),
}

impl GgmlType {
    /// The type of a number in a tensor's header.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            other => Self::Other(other),
        }
    }

    /// (elements, bytes) of a block; `None` for types that are not read here.
    #[must_use]
    pub fn layout(self) -> Option<(u64, u64)> {
        Some(match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
            Self::Other(_) => return None,
        })
    }

    /// The nearest type of a model description, rounded up in bits.
    #[must_use]
    pub fn dtype(self) -> Option<DType> {
        Some(match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::Bf16,
            Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Q5_K | Self::Q6_K => DType::Int8,
            Self::Q4_0 | Self::Q4_1 | Self::Q3_K | Self::Q4_K => DType::Int4,
            Self::Q2_K => DType::Int2,
            Self::Other(_) => return None,
        })
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(code) => {
                let known = [
                    (9, "Q8_1"),
                    (15, "Q8_K"),
                    (16, "IQ2_XXS"),
                    (17, "IQ2_XS"),
                    (18, "IQ3_XXS"),
                    (19, "IQ1_S"),
                    (20, "IQ4_NL"),
                    (21, "IQ3_S"),
                    (22, "IQ2_S"),
                    (23, "IQ4_XS"),
                    (24, "I8"),
                    (25, "I16"),
                    (26, "I32"),
                    (27, "I64"),
                    (28, "F64"),
                    (29, "IQ1_M"),
                    (34, "TQ1_0"),
                    (35, "TQ2_0"),
                    (39, "MXFP4"),
                ];
                match known.iter().find(|(number, _)| number == code) {
                    Some((_, name)) => f.pad(name),
                    None => write!(f, "type {code}"),
                }
            }
            known => write!(f, "{known:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_q4_1_block_takes_five_bits_an_element() {
        assert_eq!(GgmlType::from_code(3).layout(), Some((32, 20)));
    }

    #[test]
    fn types_that_are_not_read_still_have_a_name() {
        assert_eq!(GgmlType::from_code(20).to_string(), "IQ4_NL");
        assert_eq!(GgmlType::from_code(777).to_string(), "type 777");
        assert_eq!(GgmlType::Q4_1.to_string(), "Q4_1");
        assert_eq!(GgmlType::from_code(20).layout(), None);
    }
}
