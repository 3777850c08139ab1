//! Kernel timings from CSV files.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;

use super::shape::{Hardware, Kernel, NumberType, Shape};
use super::{AXES, KEYS, SurfaceId};
use crate::profile::Catalog;

/// No single launch takes longer than this, microseconds.
const LONGEST_US: f64 = 1e8;
/// Faster than the peak by more than this factor is not a measurement: boost clocks and sheets differ by less.
const ABOVE_PEAK: f64 = 1.35;
/// Last-level caches are at most this much faster than the memory behind them.
const CACHE_OVER_MEMORY: f64 = 12.0;

/// One timing.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Which kernel.
    pub id: SurfaceId,
    /// Its key.
    pub key: [u32; KEYS],
    /// Its place on the axes.
    pub at: [u64; AXES],
    /// Seconds of one launch.
    pub seconds: f64,
    /// Who measured it.
    pub source: String,
}

/// What is wrong with a file of timings, or with one of its rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}:{line}: {problem}")]
pub struct PointError {
    /// The file.
    pub origin: String,
    /// Its line, from 1.
    pub line: u64,
    /// What is wrong.
    pub problem: String,
}

/// Columns of a layout: where each name stands.
struct Columns<'a> {
    header: &'a csv::StringRecord,
}

impl Columns<'_> {
    fn find(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|h| h.trim() == name)
    }
}

/// Reads timings. The header decides which kernels a file holds; GPU names are resolved in `catalog`. Rows that can't be
/// used come back beside the others, each with its reason; an unusable file is an error.
pub fn read_points(
    origin: &str,
    reader: impl Read,
    catalog: &Catalog,
) -> Result<(Vec<Sample>, Vec<PointError>), PointError> {
    let at = |line: u64, problem: String| PointError { origin: origin.to_owned(), line, problem };
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(reader);
    let header = reader.headers().map_err(|e| at(1, one_line(&e)))?.clone();
    if header.is_empty() || header.iter().all(|h| h.trim().is_empty()) {
        return Err(at(1, "the file is empty; expected a header and timings".to_owned()));
    }
    let columns = Columns { header: &header };
    let layout = Layout::of(&columns).map_err(|problem| at(1, problem))?;
    let (mut samples, mut refused) = (Vec::new(), Vec::new());
    let mut gpus = Gpus { catalog, known: Vec::new() };
    let mut seen = HashSet::new();
    for (index, record) in reader.records().enumerate() {
        let line = index as u64 + 2;
        let record = match record {
            Ok(record) => record,
            Err(e) => {
                refused.push(at(line, one_line(&e)));
                continue;
            }
        };
        let line = record.position().map_or(line, csv::Position::line);
        match layout.sample(&record, &mut gpus, &mut seen) {
            Ok(sample) => samples.push(sample),
            Err(problem) => refused.push(at(line, problem)),
        }
    }
    if samples.is_empty() && refused.is_empty() {
        return Err(at(2, "no timing below the header".to_owned()));
    }
    Ok((samples, refused))
}

fn one_line(error: &csv::Error) -> String {
    error.to_string().replace('\n', " ")
}

/// GPU names as written, with what the catalog says of them.
struct Gpus<'a> {
    catalog: &'a Catalog,
    known: Vec<(String, Result<crate::profile::Gpu, String>)>,
}

impl Gpus<'_> {
    fn get(&mut self, name: &str) -> Result<&crate::profile::Gpu, String> {
        let index = match self.known.iter().position(|(n, _)| n == name) {
            Some(index) => index,
            None => {
                let found = self.catalog.gpu(name).map_err(|e| e.to_string());
                self.known.push((name.to_owned(), found));
                self.known.len() - 1
            }
        };
        self.known[index].1.as_ref().map_err(Clone::clone)
    }
}

/// The layouts of timing files.
enum Family {
    Gemm,
    Attention(Kernel),
    Collective,
    Memory,
}

struct Layout {
    family: Family,
    key: Vec<usize>,
    axes: Vec<Option<usize>>,
    gpu: usize,
    dtype: usize,
    kv_dtype: Option<usize>,
    framework: Option<usize>,
    op: Option<usize>,
    /// What keeps collectives apart.
    variant: Vec<usize>,
    /// What keeps repeated rows apart.
    tags: Vec<usize>,
    latency: usize,
    source: Option<usize>,
}

impl Layout {
    fn of(columns: &Columns<'_>) -> Result<Self, String> {
        let has = |name: &str| columns.find(name).is_some();
        let need =
            |name: &str| columns.find(name).ok_or_else(|| format!("column \"{name}\" is missing"));
        let heads = ["n_q_heads", "n_kv_heads", "head_dim"];
        let (family, key, axes): (Family, &[&str], &[&str]) = if has("m") || has("n") || has("k") {
            (Family::Gemm, &["n", "k"], Kernel::Gemm.axis_names())
        } else if has("n_decode") {
            let kernel = Kernel::AttnMixed;
            (Family::Attention(kernel), &heads, kernel.axis_names())
        } else if has("n_q_heads") && has("q_len") {
            let kernel = Kernel::AttnPrefill;
            (Family::Attention(kernel), &heads, kernel.axis_names())
        } else if has("n_q_heads") {
            let kernel = Kernel::AttnDecode;
            (Family::Attention(kernel), &heads, kernel.axis_names())
        } else if has("n_gpus") {
            (Family::Collective, &["n_gpus"], &["bytes"])
        } else if has("tokens") && has("width") {
            (Family::Memory, &["width"], &["tokens"])
        } else if has("experts") || has("n_heads") {
            return Err("mixture-of-experts and latent-attention timings are not modelled; \
                        dense kernels are"
                .to_owned());
        } else {
            return Err(
                "not a layout of kernel timings: expected m,n,k or n_q_heads or n_gpus or \
                        tokens,width"
                    .to_owned(),
            );
        };
        let op = match family {
            Family::Collective | Family::Memory => Some(need("op")?),
            _ => None,
        };
        let all = |names: &[&str]| -> Vec<usize> {
            names.iter().filter_map(|n| columns.find(n)).collect()
        };
        Ok(Self {
            key: key.iter().map(|n| need(n)).collect::<Result<_, _>>()?,
            axes: axes
                .iter()
                .map(|n| if *n == "prefix_len" { Ok(columns.find(n)) } else { need(n).map(Some) })
                .collect::<Result<_, _>>()?,
            gpu: need("gpu")?,
            dtype: need("dtype")?,
            kv_dtype: columns.find("kv_dtype"),
            framework: columns.find("framework"),
            op,
            variant: if matches!(family, Family::Collective) {
                all(&["topology", "kernel", "version"])
            } else {
                Vec::new()
            },
            tags: all(&["version", "kernel", "source", "topology"]),
            latency: need("latency_us")?,
            source: columns.find("source"),
            family,
        })
    }

    fn sample(
        &self,
        record: &csv::StringRecord,
        gpus: &mut Gpus<'_>,
        seen: &mut HashSet<u64>,
    ) -> Result<Sample, String> {
        let cell = |i: usize| record.get(i).map(str::trim).unwrap_or_default();
        let size = |i: usize, name: &str, least: u64| -> Result<u64, String> {
            let text = cell(i);
            let value: u64 =
                text.parse().map_err(|_| format!("{name}: \"{text}\" is not a size"))?;
            if value < least || value > 1 << 42 {
                return Err(format!("{name}: {value} is not between {least} and 2^42"));
            }
            Ok(value)
        };
        let kernel = match self.family {
            Family::Gemm => Kernel::Gemm,
            Family::Attention(kernel) => kernel,
            Family::Collective | Family::Memory => {
                let name = self.op.map(cell).unwrap_or_default();
                Kernel::from_name(name).ok_or_else(|| format!("op: \"{name}\" is not modelled"))?
            }
        };
        let gpu = gpus.get(cell(self.gpu))?.clone();
        let math = cell(self.dtype);
        let dtype = match self.kv_dtype.map(cell) {
            Some(kv) if !kv.is_empty() && kv != math => format!("{math}/{kv}"),
            _ => math.to_owned(),
        };
        let number =
            NumberType::parse(&dtype).ok_or_else(|| format!("dtype: \"{dtype}\" is unknown"))?;
        let mut key = [0u32; KEYS];
        for (slot, index) in key.iter_mut().zip(&self.key) {
            let value = size(*index, "key", 1)?;
            *slot = u32::try_from(value).map_err(|_| format!("{value} is too large a shape"))?;
        }
        if kernel.is_attention() && !key[0].is_multiple_of(key[1]) {
            return Err(format!("{} query heads can't share {} KV heads", key[0], key[1]));
        }
        let mut at = [0u64; AXES];
        for ((slot, index), name) in at.iter_mut().zip(&self.axes).zip(kernel.axis_names()) {
            let least = u64::from(*name != "prefix_len");
            *slot = index.map_or(Ok(0), |i| size(i, name, least))?;
        }
        let text = cell(self.latency);
        let microseconds: f64 =
            text.parse().map_err(|_| format!("latency_us: \"{text}\" is not a number"))?;
        let framework = match self.family {
            Family::Collective => "collectives".to_owned(),
            _ => match self.framework.map(cell) {
                Some(name) if !name.is_empty() => name.to_owned(),
                _ => "-".to_owned(),
            },
        };
        let variant = self.variant.iter().map(|i| cell(*i)).collect::<Vec<_>>().join(" ");
        let shape = Shape { kernel, key: key.map(f64::from), at: at.map(|v| v as f64) };
        plausible(&shape, microseconds, &Hardware::of(&gpu, number), number)?;
        let id = SurfaceId { gpu: gpu.name.clone(), framework, kernel, dtype, variant };
        let mut hasher = DefaultHasher::new();
        (&id, key, at).hash(&mut hasher);
        self.tags.iter().for_each(|i| cell(*i).hash(&mut hasher));
        if !seen.insert(hasher.finish()) {
            return Err("the same shape of the same source was there before".to_owned());
        }
        let source = self.source.map(cell).unwrap_or_default().to_owned();
        Ok(Sample { id, key, at, seconds: microseconds * 1e-6, source })
    }
}

/// Whether a time can be one: positive, finite, not faster than the hardware.
fn plausible(
    shape: &Shape,
    microseconds: f64,
    hardware: &Hardware,
    number: NumberType,
) -> Result<(), String> {
    if !microseconds.is_finite() || microseconds <= 0.0 {
        return Err(format!("latency_us: {microseconds} is not a positive time"));
    }
    if microseconds > LONGEST_US {
        return Err(format!(
            "latency_us: {microseconds} is over {LONGEST_US:e}; is the unit microseconds?"
        ));
    }
    let (flops, bytes) = shape.work(number);
    let floor = if shape.kernel.is_collective() {
        0.0
    } else {
        let memory = bytes / (hardware.bandwidth * CACHE_OVER_MEMORY);
        (flops / (hardware.flops * ABOVE_PEAK)).max(memory)
    };
    if microseconds < floor {
        return Err(format!(
            "latency_us: {microseconds} is faster than the hardware, which needs {floor:.3}; \
             is the unit microseconds?"
        ));
    }
    Ok(())
}
