//! GGUF headers: what a file says about itself, without its weights.
//!
//! A header is hostile until it is parsed: every length is checked against the bytes that are left before anything is
//! allocated, and every tensor against the size of the file, so that a download that broke off is named as such
//! instead of being read past its end.

mod describe;
mod ggml_type;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

pub(super) use describe::kebab;
pub use describe::{describe_gguf, model_from_gguf};
pub use ggml_type::GgmlType;

use super::ProfileError;

/// Longest string; chat templates are the longest in practice, with some 100 kB.
const MAX_TEXT: u64 = 4 << 20;
/// Array elements in the whole header: three times what the largest known vocabulary needs.
const MAX_ELEMENTS: u64 = 4 << 20;
/// Metadata keys, and tensors.
const MAX_ENTRIES: u64 = 1 << 16;
/// Arrays within arrays.
const MAX_DEPTH: u32 = 3;

/// One metadata value; integers and floats are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// u8 to u64.
    Unsigned(u64),
    /// i8 to i64.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A flag.
    Bool(bool),
    /// A UTF-8 string.
    Text(String),
    /// Values of one type.
    Array(Vec<GgufValue>),
}

impl GgufValue {
    /// The value as a non-negative integer.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// The value as a number.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Signed(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// The value as text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// The value as a list.
    #[must_use]
    pub fn as_array(&self) -> Option<&[Self]> {
        if let Self::Array(items) = self { Some(items) } else { None }
    }
}

/// Where a tensor lies and how its elements are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name, such as `blk.3.ffn_up.weight`.
    pub name: String,
    /// Dimensions in GGUF order: the fastest first, so a matrix is (columns, rows).
    pub shape: Vec<u64>,
    /// Element type.
    pub kind: GgmlType,
    /// First byte, from [`GgufHeader::data_start`].
    pub offset: u64,
}

impl GgufTensor {
    /// Elements; `None` when the shape overflows.
    #[must_use]
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |product, d| product.checked_mul(*d))
    }

    /// Bytes in the file; `None` for a type whose layout is not known here.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        let (block, bytes) = self.kind.layout()?;
        (self.elements()? / block).checked_mul(bytes)
    }
}

/// Everything in front of the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufHeader {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Keys and values.
    pub metadata: BTreeMap<String, GgufValue>,
    /// Tensors in file order.
    pub tensors: Vec<GgufTensor>,
    /// First byte of the tensor data.
    pub data_start: u64,
}

impl GgufHeader {
    /// Reads the header of a file and checks that every tensor lies within it.
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let io = |problem| ProfileError::Io { path: path.to_owned(), problem };
        let file = File::open(path).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        if !about.is_file() {
            return Err(invalid(&path.display().to_string(), "file", "expected a GGUF file"));
        }
        Self::parse(BufReader::new(file), about.len(), &path.display().to_string())
    }

    /// Parses a header from `source`, which holds `file_bytes` in all; `origin` names it in errors.
    pub fn parse(source: impl Read, file_bytes: u64, origin: &str) -> Result<Self, ProfileError> {
        let mut reader = Reader { source, at: 0, end: file_bytes, elements: 0, origin };
        if reader.bytes::<4>("the magic number")? != *b"GGUF" {
            return Err(invalid(origin, "magic", "expected GGUF; is it a GGUF file?"));
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            let problem = format!("GGUF versions 2 and 3 are read (little-endian), got {version}");
            return Err(invalid(origin, "version", problem));
        }
        let tensor_count = reader.count("tensors", MAX_ENTRIES, 24)?;
        let key_count = reader.count("metadata keys", MAX_ENTRIES, 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = reader.text("a metadata key")?;
            let kind = reader.u32(&key)?;
            let value = reader.value(&key, kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(invalid(origin, &key, "the key occurs twice"));
            }
        }
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(reader.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(value) => value
                .as_u64()
                .filter(|a| a.is_power_of_two() && *a <= 1 << 20)
                .ok_or_else(|| {
                    invalid(origin, "general.alignment", "expected a power of two up to 1048576")
                })?,
        };
        let data_start = reader.at.next_multiple_of(alignment);
        let header = Self { version, metadata, tensors, data_start };
        header.check_tensors(alignment, file_bytes, origin)?;
        Ok(header)
    }

    fn check_tensors(
        &self,
        alignment: u64,
        file_bytes: u64,
        origin: &str,
    ) -> Result<(), ProfileError> {
        let mut names = BTreeSet::new();
        let mut spans = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            let name = &tensor.name;
            if !names.insert(name) {
                return Err(invalid(origin, name, "the tensor occurs twice"));
            }
            if !tensor.offset.is_multiple_of(alignment) {
                let problem = format!("offset {} is not a multiple of {alignment}", tensor.offset);
                return Err(invalid(origin, name, problem));
            }
            if let Some((block, _)) = tensor.kind.layout()
                && !tensor.shape[0].is_multiple_of(block)
            {
                let problem = format!(
                    "rows of {} elements can't be stored in {} blocks of {block}",
                    tensor.shape[0], tensor.kind
                );
                return Err(invalid(origin, name, problem));
            }
            // The size of a type that is not known here can't be checked; using such a tensor is an error anyway.
            let bytes = if tensor.kind.layout().is_some() { tensor.bytes() } else { Some(0) };
            let start = self.data_start.checked_add(tensor.offset);
            let (Some(start), Some(end)) =
                (start, start.zip(bytes).and_then(|(s, b)| s.checked_add(b)))
            else {
                return Err(invalid(
                    origin,
                    name,
                    format!("shape {:?} is too large", tensor.shape),
                ));
            };
            if end > file_bytes {
                let problem = format!(
                    "tensor {name} ends at byte {end}, the file has {file_bytes}; fetch it again"
                );
                return Err(invalid(origin, "truncated", problem));
            }
            spans.push((start, end, name));
        }
        spans.sort_unstable();
        for pair in spans.windows(2) {
            if pair[0].1 > pair[1].0 {
                let problem = format!("overlaps tensor {}", pair[1].2);
                return Err(invalid(origin, pair[0].2, problem));
            }
        }
        Ok(())
    }

    /// A tensor by name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// A text value.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.get(key)?.as_str()
    }

    /// The divisors of the rotary frequencies (tensor `rope_freqs.weight`), if the file has them.
    pub fn rope_factors(&self, path: &Path) -> Result<Option<Vec<f32>>, ProfileError> {
        let Some(tensor) = self.tensor("rope_freqs.weight") else { return Ok(None) };
        let origin = path.display().to_string();
        let count = tensor.elements().unwrap_or(u64::MAX);
        if tensor.kind != GgmlType::F32 || count > 4096 {
            let problem =
                format!("expected up to 4096 values in F32, got {count} in {}", tensor.kind);
            return Err(invalid(&origin, &tensor.name, problem));
        }
        let io = |problem| ProfileError::Io { path: path.to_owned(), problem };
        let mut file = File::open(path).map_err(io)?;
        file.seek(SeekFrom::Start(self.data_start + tensor.offset)).map_err(io)?;
        let mut factors = Vec::new();
        for _ in 0..count {
            let mut raw = [0; 4];
            file.read_exact(&mut raw).map_err(io)?;
            let factor = f32::from_le_bytes(raw);
            if !(factor.is_finite() && factor > 0.0) {
                return Err(invalid(
                    &origin,
                    &tensor.name,
                    format!("expected positive numbers, got {factor}"),
                ));
            }
            factors.push(factor);
        }
        Ok(Some(factors))
    }
}

pub(in crate::profile) fn invalid(
    origin: &str,
    key: &str,
    problem: impl Into<String>,
) -> ProfileError {
    ProfileError::Invalid {
        origin: origin.to_owned(),
        key: printable(key),
        problem: problem.into(),
    }
}

/// Names come from the file: an error message stays one short line whatever they hold.
pub(in crate::profile) fn printable(name: &str) -> String {
    let mut text: String =
        name.chars().take(100).map(|c| if c.is_control() { '?' } else { c }).collect();
    if name.chars().nth(100).is_some() {
        text.push_str("...");
    }
    text
}

/// Knows how much is left.
struct Reader<'a, R> {
    source: R,
    at: u64,
    end: u64,
    elements: u64,
    origin: &'a str,
}

impl<R: Read> Reader<'_, R> {
    fn fail<T>(&self, key: &str, problem: impl Into<String>) -> Result<T, ProfileError> {
        Err(invalid(self.origin, key, problem))
    }

    fn truncated<T>(&self, what: &str) -> Result<T, ProfileError> {
        let problem = format!(
            "the file ends at byte {} within {}; fetch it again",
            self.end,
            printable(what)
        );
        self.fail("truncated", problem)
    }

    fn fill(&mut self, buffer: &mut [u8], what: &str) -> Result<(), ProfileError> {
        if buffer.len() as u64 > self.end.saturating_sub(self.at) {
            return self.truncated(what);
        }
        if let Err(problem) = self.source.read_exact(buffer) {
            if problem.kind() == std::io::ErrorKind::UnexpectedEof {
                return self.truncated(what);
            }
            return Err(ProfileError::Io { path: self.origin.into(), problem });
        }
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ProfileError> {
        let mut raw = [0; N];
        self.fill(&mut raw, what)?;
        Ok(raw)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ProfileError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ProfileError> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    /// A count of things that take at least `least` bytes each.
    fn count(&mut self, what: &str, most: u64, least: u64) -> Result<u64, ProfileError> {
        let count = self.u64(what)?;
        if count > most {
            return self.fail(what, format!("expected at most {most}, got {count}"));
        }
        if count * least > self.end.saturating_sub(self.at) {
            return self.truncated(what);
        }
        Ok(count)
    }

    fn text(&mut self, what: &str) -> Result<String, ProfileError> {
        let length = self.count(what, MAX_TEXT, 1)?;
        let mut raw = vec![0; length as usize];
        self.fill(&mut raw, what)?;
        String::from_utf8(raw).or_else(|_| self.fail(what, "not UTF-8"))
    }

    fn value(&mut self, key: &str, kind: u32, depth: u32) -> Result<GgufValue, ProfileError> {
        Ok(match kind {
            0 => GgufValue::Unsigned(self.bytes::<1>(key)?[0].into()),
            1 => GgufValue::Signed(i8::from_le_bytes(self.bytes(key)?).into()),
            2 => GgufValue::Unsigned(u16::from_le_bytes(self.bytes(key)?).into()),
            3 => GgufValue::Signed(i16::from_le_bytes(self.bytes(key)?).into()),
            4 => GgufValue::Unsigned(self.u32(key)?.into()),
            5 => GgufValue::Signed(i32::from_le_bytes(self.bytes(key)?).into()),
            6 => GgufValue::Float(f32::from_le_bytes(self.bytes(key)?).into()),
            7 => match self.bytes::<1>(key)? {
                [0] => GgufValue::Bool(false),
                [1] => GgufValue::Bool(true),
                [other] => {
                    return self.fail(key, format!("expected a flag of 0 or 1, got {other}"));
                }
            },
            8 => GgufValue::Text(self.text(key)?),
            9 => self.array(key, depth)?,
            10 => GgufValue::Unsigned(self.u64(key)?),
            11 => GgufValue::Signed(i64::from_le_bytes(self.bytes(key)?)),
            12 => GgufValue::Float(f64::from_le_bytes(self.bytes(key)?)),
            other => return self.fail(key, format!("value type {other} is not known")),
        })
    }

    fn array(&mut self, key: &str, depth: u32) -> Result<GgufValue, ProfileError> {
        if depth >= MAX_DEPTH {
            return self.fail(key, format!("arrays are nested more than {MAX_DEPTH} deep"));
        }
        let kind = self.u32(key)?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => return self.fail(key, format!("value type {other} is not known")),
        };
        let count = self.count(key, MAX_ELEMENTS, least)?;
        self.elements += count;
        if self.elements > MAX_ELEMENTS {
            return self
                .fail(key, format!("the header holds more than {MAX_ELEMENTS} array elements"));
        }
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(self.value(key, kind, depth + 1)?);
        }
        Ok(GgufValue::Array(items))
    }

    fn tensor(&mut self) -> Result<GgufTensor, ProfileError> {
        let name = self.text("a tensor name")?;
        let dimensions = self.u32(&name)?;
        if !(1..=4).contains(&dimensions) {
            return self.fail(&name, format!("expected 1 to 4 dimensions, got {dimensions}"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(&name)?);
        }
        if shape.contains(&0) {
            return self.fail(&name, format!("shape {shape:?} has an empty dimension"));
        }
        let kind = GgmlType::from_code(self.u32(&name)?);
        let offset = self.u64(&name)?;
        Ok(GgufTensor { name, shape, kind, offset })
    }
}

#[cfg(test)]
pub(crate) mod tests;
