//! Points: one measured kernel call a row, five tables.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::Result;
use batchmax_sim::profile::Gpu;

use super::output;
use super::summary::Summary;

/// The longest credible call: over it a unit was mistaken.
const LONGEST_US: f64 = 1e9;
/// 100 PFLOP/s, several times what any device reaches: a product that beats it was timed in another unit.
const HIGHEST_FLOPS_PER_US: f64 = 1e11;
/// The largest credible size: over it a column was mistaken.
const LARGEST_SIZE: i64 = 1 << 40;

/// A table, named as its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Matrix products.
    Gemm,
    /// Attention of prompts.
    AttnPrefill,
    /// Attention of single tokens.
    AttnDecode,
    /// Collectives.
    Comm,
    /// Memory-bound ops.
    Memops,
}

impl Table {
    /// The name of the file.
    pub fn file(self) -> &'static str {
        match self {
            Self::Gemm => "gemm.csv",
            Self::AttnPrefill => "attn_prefill.csv",
            Self::AttnDecode => "attn_decode.csv",
            Self::Comm => "comm.csv",
            Self::Memops => "memops.csv",
        }
    }

    /// The columns; all but the last two are the key.
    pub fn head(self) -> Vec<&'static str> {
        let key = match self {
            Self::Gemm => "gpu,dtype,framework,version,kernel,m,n,k",
            Self::AttnPrefill => {
                "gpu,framework,version,kernel,dtype,kv_dtype,batch,q_len,prefix_len,n_q_heads,n_kv_heads,head_dim"
            }
            Self::AttnDecode => {
                "gpu,framework,version,kernel,dtype,kv_dtype,batch,kv_len,n_q_heads,n_kv_heads,head_dim"
            }
            Self::Comm => "gpu,topology,n_gpus,op,kernel,version,dtype,bytes",
            Self::Memops => "gpu,op,dtype,tokens,width",
        };
        key.split(',').chain(["latency_us", "source"]).collect()
    }
}

/// A cell of a key: texts sort as texts, numbers as numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cell {
    /// A number.
    Number(u64),
    /// A text.
    Text(Rc<str>),
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<Rc<str>> for Cell {
    fn from(text: Rc<str>) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(n) => n.fmt(f),
            Self::Text(t) => t.fmt(f),
        }
    }
}

/// What becomes of several measurements of one key.
#[derive(Clone, Copy, Debug)]
pub enum Repeats {
    /// The first one stays.
    First,
    /// Their median.
    Median,
}

struct Point {
    key: Vec<Cell>,
    us: f64,
}

/// Points of one table and source, to be sorted and written.
pub struct Points {
    table: Table,
    repeats: Repeats,
    points: Vec<Point>,
}

impl Points {
    /// None yet.
    pub fn new(table: Table, repeats: Repeats) -> Self {
        Self { table, repeats, points: Vec::new() }
    }

    /// Adds one, unless no device is so fast; the latency is rounded to nanoseconds.
    pub fn add(&mut self, key: Vec<Cell>, us: f64) -> Result<(), &'static str> {
        debug_assert_eq!(key.len() + 2, self.table.head().len(), "{:?}", self.table);
        if self.table == Table::Gemm && flops(&key) > us * HIGHEST_FLOPS_PER_US {
            return Err("latency is too short for the work: another unit?");
        }
        self.points.push(Point { key, us: rounded(us) });
        Ok(())
    }

    /// One row per key, in order.
    fn merged(&mut self) -> impl Iterator<Item = (&[Cell], f64)> {
        self.points.sort_by(|a, b| a.key.cmp(&b.key));
        let repeats = self.repeats;
        self.points.chunk_by(|a, b| a.key == b.key).map(move |equal| {
            let us = match repeats {
                Repeats::First => equal[0].us,
                Repeats::Median => median(equal.iter().map(|p| p.us).collect()),
            };
            (equal[0].key.as_slice(), us)
        })
    }
}

/// The point files of an import.
pub struct PointFiles {
    dir: PathBuf,
    tables: BTreeMap<Table, output::Table>,
}

impl PointFiles {
    /// None yet.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), tables: BTreeMap::new() }
    }

    /// Writes points behind those that are there already.
    pub fn write(&mut self, mut points: Points, source: &str) -> Result<()> {
        if points.points.is_empty() {
            return Ok(());
        }
        let table = points.table;
        if !self.tables.contains_key(&table) {
            let file = output::Table::create(&self.dir.join(table.file()), Some(&table.head()))?;
            self.tables.insert(table, file);
        }
        let Some(file) = self.tables.get_mut(&table) else { return Ok(()) };
        for (key, us) in points.merged() {
            let cells = key.iter().map(ToString::to_string);
            file.write(cells.chain([six_digits(us), source.to_owned()]))?;
        }
        Ok(())
    }

    /// Gives the files their names.
    pub fn finish(self, summary: &mut Summary) -> Result<()> {
        for table in self.tables.into_values() {
            summary.files.push(table.finish()?);
        }
        Ok(())
    }
}

/// Microseconds if a call can have taken them, else why not.
pub fn latency_us(us: f64) -> Result<f64, &'static str> {
    match us {
        us if !us.is_finite() => Err("latency is not a number"),
        us if us <= 0.0 => Err("latency is not positive"),
        us if us > LONGEST_US => Err("latency is over 1000 s: another unit?"),
        us => Ok(us),
    }
}

/// A size if it can be one.
#[cfg_attr(
    not(feature = "import-parquet"),
    allow(dead_code, reason = "sizes of other sources are checked where they are read")
)]
pub fn size(value: i64) -> Option<u64> {
    (1..=LARGEST_SIZE).contains(&value).then_some(value.cast_unsigned())
}

/// The `gpu` key of the tables: names with underscores, as in the aliases of the descriptions.
pub fn gpu_key(gpu: &Gpu) -> &str {
    gpu.aliases.iter().find(|a| a.contains('_')).unwrap_or(&gpu.name)
}

/// FLOPs of a product: its key ends in m, n, k.
fn flops(key: &[Cell]) -> f64 {
    let sizes = key.iter().rev().take(3);
    2.0 * sizes.map(|c| if let Cell::Number(n) = c { *n as f64 } else { 0.0 }).product::<f64>()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { f64::midpoint(values[half - 1], values[half]) }
}

/// Nanoseconds are finer than any timer.
fn rounded(us: f64) -> f64 {
    format!("{us:.3}").parse().unwrap_or(us)
}

fn six_digits(us: f64) -> String {
    format!("{us:.5e}").parse::<f64>().unwrap_or(us).to_string()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn latencies_keep_six_digits_and_nanoseconds() {
        assert_eq!(six_digits(rounded(2.676_49)), "2.676");
        assert_eq!(six_digits(rounded(1_017.471_102)), "1017.47");
        assert_eq!(six_digits(rounded(924_092.7)), "924093");
        assert_eq!(six_digits(rounded(10.0)), "10");
        assert_eq!(six_digits(0.0), "0");
    }

    #[test]
    fn only_credible_latencies_pass() {
        assert_eq!(latency_us(1.5), Ok(1.5));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e12] {
            assert!(latency_us(bad).is_err(), "{bad}");
        }
        assert_eq!((size(0), size(-3), size(i64::MAX), size(7)), (None, None, None, Some(7)));
    }

    #[test]
    fn rows_are_sorted_by_number_and_equal_keys_become_one() {
        let key = |n: u64| vec![Cell::from("x"), "add".into(), "fp16".into(), n.into(), 8.into()];
        let mut first = Points::new(Table::Memops, Repeats::First);
        let mut middle = Points::new(Table::Memops, Repeats::Median);
        for (n, us) in [(10, 3.0), (9, 1.0), (10, 4.0)] {
            first.add(key(n), us).unwrap();
            middle.add(key(n), us).unwrap();
        }
        let times = |p: &mut Points| p.merged().map(|(_, us)| us).collect::<Vec<_>>();
        assert_eq!(times(&mut first), [1.0, 3.0]);
        assert_eq!(times(&mut middle), [1.0, 3.5]);
    }

    #[test]
    fn a_product_faster_than_any_device_is_refused() {
        let key: Vec<Cell> = ["g", "bf16", "f", "1", "k"].into_iter().map(Cell::from).collect();
        let key = [key, [4096, 4096, 4096].map(Cell::from).to_vec()].concat();
        let mut points = Points::new(Table::Gemm, Repeats::First);
        // 137 GFLOP: 200 us are 0.7 PFLOP/s, 0.2 us are 700.
        assert!(points.add(key.clone(), 200.0).is_ok() && points.add(key, 0.2).is_err());
    }

    #[test]
    fn the_key_of_a_device_is_its_alias_with_underscores() {
        let catalog = batchmax_sim::profile::Catalog::built_in();
        let key = |name| gpu_key(&catalog.gpu(name).unwrap()).to_owned();
        assert_eq!((key("h100"), key("l40s")), ("h100_sxm".to_owned(), "l40s".to_owned()));
    }
}
