//! Quantities with their unit in the type.
//!
//! Internally everything is an SI base unit; conversion and formatting happen at the edge.
//! FLOPs are `f64`: a 405B prefill over 1,000 x 128k tokens is 1e20, past `u64`.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use serde::{Deserialize, Serialize};

/// A number of tokens of one sequence.
pub type Tokens = u32;
/// Index of a decoder layer, from 0.
pub type Layer = u32;

macro_rules! float_unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub f64);

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self { Self(self.0 + other.0) }
        }
        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self { Self(self.0 - other.0) }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) { self.0 += other.0; }
        }
        impl Mul<f64> for $name {
            type Output = Self;
            fn mul(self, factor: f64) -> Self { Self(self.0 * factor) }
        }
        impl Div<f64> for $name {
            type Output = Self;
            fn div(self, divisor: f64) -> Self { Self(self.0 / divisor) }
        }
        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(iter: I) -> Self { Self(iter.map(|x| x.0).sum()) }
        }
    };
}

float_unit! {
    /// Time in seconds.
    Seconds
}
float_unit! {
    /// Floating-point operations; a multiply-add counts two.
    Flops
}

/// A number of bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `self - other`, or zero where `other` is larger.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// In GiB (2^30 bytes).
    #[must_use]
    pub fn gib(self) -> f64 {
        self.0 as f64 / f64::from(1u32 << 30)
    }
}

// Hostile descriptions may ask for 2^63 tokens: saturate, so that "does not fit" is the answer and not a panic.
impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}
impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}
impl Mul<u64> for Bytes {
    type Output = Self;
    fn mul(self, factor: u64) -> Self {
        Self(self.0.saturating_mul(factor))
    }
}
impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self(0), Add::add)
    }
}

impl fmt::Display for Bytes {
    /// Binary prefixes, three significant digits: `17.6 MiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1000.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = match (unit, value) {
            (0, _) => format!("{} B", self.0),
            (_, v) if v < 10.0 => format!("{v:.2} {}", UNITS[unit]),
            (_, v) if v < 100.0 => format!("{v:.1} {}", UNITS[unit]),
            (_, v) => format!("{v:.0} {}", UNITS[unit]),
        };
        f.pad(&text)
    }
}

impl fmt::Display for Seconds {
    /// A prefix that leaves one to three digits before the point: `17.6 ms`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0;
        let (value, unit) = match seconds.abs() {
            s if s >= 120.0 => (seconds / 60.0, "min"),
            s if s >= 1.0 => (seconds, "s"),
            s if s >= 1e-3 => (seconds * 1e3, "ms"),
            0.0 => (0.0, "s"),
            _ => (seconds * 1e6, "us"),
        };
        let text = match value.abs() {
            v if v < 10.0 => format!("{value:.2} {unit}"),
            v if v < 100.0 => format!("{value:.1} {unit}"),
            _ => format!("{value:.0} {unit}"),
        };
        f.pad(&text)
    }
}

/// Why a quantity typed by a user could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not {expected}")]
pub struct QuantityError {
    /// What was typed.
    pub text: String,
    /// What was expected, with examples.
    pub expected: &'static str,
}

fn split_number(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end =
        text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(text.len());
    let number: f64 = text[..end].replace('_', "").parse().ok()?;
    number.is_finite().then_some((number, text[end..].trim()))
}

/// Reads `64MB`, `1.5GiB`, `80G`, `4096`. `K M G T` and `KB MB GB TB` are decimal, `KiB ...` are binary.
pub fn parse_bytes(text: &str) -> Result<Bytes, QuantityError> {
    let fail =
        || QuantityError { text: text.to_owned(), expected: "a size in bytes (64MB, 1.5GiB, 80G)" };
    let (number, unit) = split_number(text).ok_or_else(fail)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        "tib" => 1_099_511_627_776.0,
        _ => return Err(fail()),
    };
    let bytes = number * factor;
    if bytes > u64::MAX as f64 {
        return Err(fail());
    }
    Ok(Bytes(bytes.round() as u64))
}

/// Reads `2048`, `2k` (2,048), `128k` (131,072), `1m`; `k` and `m` are binary, as the field uses them for contexts.
pub fn parse_tokens(text: &str) -> Result<Tokens, QuantityError> {
    let fail = || QuantityError {
        text: text.to_owned(),
        expected: "a number of tokens up to 4294967295 (2048, 2k, 128k)",
    };
    let (number, unit) = split_number(text).ok_or_else(fail)?;
    let factor = match unit {
        "" => 1.0,
        "k" | "K" => 1024.0,
        "m" | "M" => 1_048_576.0,
        _ => return Err(fail()),
    };
    let tokens = number * factor;
    if tokens.fract() != 0.0 || tokens > f64::from(Tokens::MAX) {
        return Err(fail());
    }
    Ok(tokens as Tokens)
}

/// Reads `500ms`, `1.5s`, `200us`, `2min`.
pub fn parse_seconds(text: &str) -> Result<Seconds, QuantityError> {
    let fail = || QuantityError {
        text: text.to_owned(),
        expected: "a time with its unit (500ms, 1.5s, 200us)",
    };
    let (number, unit) = split_number(text).ok_or_else(fail)?;
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "min" => 60.0,
        _ => return Err(fail()),
    };
    Ok(Seconds(number * factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_and_binary_prefixes_differ() {
        assert_eq!(parse_bytes("64MB"), Ok(Bytes(64_000_000)));
        assert_eq!(parse_bytes("64 MiB"), Ok(Bytes(67_108_864)));
        assert_eq!(parse_bytes("1.5G"), Ok(Bytes(1_500_000_000)));
        assert!(parse_bytes("-1").is_err());
        assert!(parse_bytes("12parsecs").is_err());
        assert!(parse_bytes("99999999999T").is_err());
    }

    #[test]
    fn tokens_use_binary_k() {
        assert_eq!(parse_tokens("2k"), Ok(2048));
        assert_eq!(parse_tokens("1.5k"), Ok(1536));
        assert!(parse_tokens("9223372036854775808").is_err());
        assert!(parse_tokens("0.3").is_err());
    }

    #[test]
    fn times_need_a_unit() {
        assert_eq!(parse_seconds("500ms"), Ok(Seconds(0.5)));
        assert!(parse_seconds("500").is_err());
    }

    #[test]
    fn display_keeps_three_digits() {
        assert_eq!(Bytes(23_040).to_string(), "22.5 KiB");
        assert_eq!(Bytes(64_000_000).to_string(), "61.0 MiB");
        assert_eq!(Seconds(0.0176).to_string(), "17.6 ms");
        assert_eq!(Seconds(0.0).to_string(), "0.00 s");
    }

    #[test]
    fn bytes_saturate_instead_of_wrapping() {
        assert_eq!(Bytes(u64::MAX) + Bytes(1), Bytes(u64::MAX));
        assert_eq!(Bytes(1 << 40) * (1 << 40), Bytes(u64::MAX));
    }
}
