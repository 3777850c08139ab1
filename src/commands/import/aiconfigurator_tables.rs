//! How the rows of aiconfigurator-core's tables read as keys of this project's.

use std::rc::Rc;

use super::package::TablePath;
use super::parquet_columns::Columns;
use super::points::{Cell, Repeats, Table, size};

/// Devices of a node; the topology of all collectives that stay in one.
const NODE: u64 = 8;

/// A row's key, or why it has none.
pub type Key = Result<Vec<Cell>, &'static str>;

/// How a table is read.
pub struct Reader {
    /// Where its rows go.
    pub table: Table,
    /// What becomes of rows with equal keys.
    pub repeats: Repeats,
    /// Columns to read.
    pub columns: &'static [&'static str],
    /// Columns at the end of `columns` that may be missing.
    optional: usize,
    /// The key of a row.
    pub row: fn(&TablePath, &Columns, usize) -> Key,
}

impl Reader {
    /// By the name of a table; none if no table of this project takes its rows.
    pub fn of(name: &str) -> Option<Self> {
        use Repeats::{First, Median};
        Some(match name {
            "gemm_perf" => Self::new(Table::Gemm, First, GEMM, 0, gemm),
            "context_attention_perf" => {
                Self::new(Table::AttnPrefill, Median, ATTENTION, 2, prefill)
            }
            "generation_attention_perf" => {
                Self::new(Table::AttnDecode, Median, ATTENTION, 2, decode)
            }
            "nccl_perf" | "oneccl_perf" => Self::new(Table::Comm, First, LIBRARY, 1, collective),
            "custom_allreduce_perf" => Self::new(Table::Comm, First, ALL_REDUCE, 0, collective),
            "computescale_perf" | "scale_matrix_perf" => {
                Self::new(Table::Memops, First, QUANTISATION, 0, quantisation)
            }
            _ => return None,
        })
    }

    fn new(
        table: Table,
        repeats: Repeats,
        columns: &'static [&'static str],
        optional: usize,
        row: fn(&TablePath, &Columns, usize) -> Key,
    ) -> Self {
        Self { table, repeats, columns, optional, row }
    }

    /// Columns that may not be missing.
    pub fn needed(&self) -> &'static [&'static str] {
        &self.columns[..self.columns.len() - self.optional]
    }
}

const GEMM: &[&str] = &["kernel_source", "gemm_dtype", "m", "n", "k", "latency"];
const QUANTISATION: &[&str] = &["quant_dtype", "m", "k", "latency"];
const ALL_REDUCE: &[&str] =
    &["kernel_source", "op_name", "allreduce_dtype", "num_gpus", "message_size", "latency"];
const LIBRARY: &[&str] =
    &["kernel_source", "op_name", "nccl_dtype", "num_gpus", "message_size", "latency", "version"];
const ATTENTION: &[&str] = &[
    "kernel_source",
    "attn_dtype",
    "kv_cache_dtype",
    "batch_size",
    "isl",
    "step",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
    "latency",
    "window_size",
    "beam_width",
];

fn gemm(path: &TablePath, columns: &Columns, row: usize) -> Key {
    let number = |column| number(columns, column, row, "m, n or k is not a size");
    let mut key = vec![
        path.gpu.as_str().into(),
        dtype(columns, "gemm_dtype", row)?,
        path.framework.as_str().into(),
        path.version.as_str().into(),
        kernel(columns, row)?,
    ];
    for column in ["m", "n", "k"] {
        key.push(number(column)?.into());
    }
    Ok(key)
}

fn prefill(path: &TablePath, columns: &Columns, row: usize) -> Key {
    let mut key = attention(path, columns, row)?;
    let prefix = columns.whole("step", row).filter(|s| *s >= 0).ok_or("step is not a length")?;
    key.push(number(columns, "isl", row, "isl is not a length")?.into());
    key.push(prefix.cast_unsigned().into());
    heads(&mut key, columns, row)
}

fn decode(path: &TablePath, columns: &Columns, row: usize) -> Key {
    let mut key = attention(path, columns, row)?;
    if columns.whole("isl", row) != Some(1) {
        return Err("decode with other than one token per sequence");
    }
    let history = columns.whole("step", row).filter(|s| (0..1 << 40).contains(s));
    key.push((history.ok_or("step is not a length")?.cast_unsigned() + 1).into());
    heads(&mut key, columns, row)
}

fn attention(path: &TablePath, columns: &Columns, row: usize) -> Key {
    if columns.whole("window_size", row).unwrap_or(0) != 0 {
        return Err("attention with a sliding window has no table");
    }
    if columns.whole("beam_width", row).unwrap_or(1) != 1 {
        return Err("beam search has no table");
    }
    Ok(vec![
        path.gpu.as_str().into(),
        path.framework.as_str().into(),
        path.version.as_str().into(),
        kernel(columns, row)?,
        dtype(columns, "attn_dtype", row)?,
        dtype(columns, "kv_cache_dtype", row)?,
        number(columns, "batch_size", row, "batch_size is not a number of sequences")?.into(),
    ])
}

fn heads(key: &mut Vec<Cell>, columns: &Columns, row: usize) -> Key {
    for column in ["num_heads", "num_key_value_heads", "head_dim"] {
        key.push(number(columns, column, row, "heads or head_dim is not a size")?.into());
    }
    Ok(std::mem::take(key))
}

fn collective(path: &TablePath, columns: &Columns, row: usize) -> Key {
    // The library's tests are in elements; bytes are what each rank holds.
    let types =
        if path.table == "custom_allreduce_perf" { "allreduce_dtype" } else { "nccl_dtype" };
    let (name, bytes) = match columns.text(types, row).as_deref() {
        Some("half" | "float16" | "bfloat16") => ("fp16", 2),
        Some("int8") => ("int8", 1),
        _ => return Err("collective of an unknown type"),
    };
    let ranks = number(columns, "num_gpus", row, "num_gpus is not a number of devices")?;
    if !(2..=NODE).contains(&ranks) {
        return Err("collective beyond a node");
    }
    // A library's table in an engine's folder names the library's version itself.
    let own = path.table == "nccl_perf" && path.framework != "nccl";
    let version = columns.text("version", row).filter(|_| own);
    Ok(vec![
        path.gpu.as_str().into(),
        "node8".into(),
        ranks.into(),
        columns.text("op_name", row).ok_or("op_name is missing")?.into(),
        kernel(columns, row)?,
        version.unwrap_or_else(|| path.version.as_str().into()).into(),
        name.into(),
        (number(columns, "message_size", row, "message_size is not a size")? * bytes).into(),
    ])
}

fn quantisation(path: &TablePath, columns: &Columns, row: usize) -> Key {
    if path.framework != "vllm" {
        return Err("quantisation of another engine than vllm: no column tells them apart");
    }
    let op = if path.table == "computescale_perf" { "fp8_dyn_scale" } else { "fp8_static_quant" };
    Ok(vec![
        path.gpu.as_str().into(),
        op.into(),
        dtype(columns, "quant_dtype", row)?,
        number(columns, "m", row, "m is not a size")?.into(),
        number(columns, "k", row, "k is not a size")?.into(),
    ])
}

fn number(
    columns: &Columns,
    column: &str,
    row: usize,
    why: &'static str,
) -> Result<u64, &'static str> {
    columns.whole(column, row).and_then(size).ok_or(why)
}

/// Names of types as the tables of this project spell them.
fn dtype(columns: &Columns, column: &str, row: usize) -> Result<Cell, &'static str> {
    let text = columns.text(column, row).filter(|t| !t.is_empty()).ok_or("a type is missing")?;
    Ok(match &*text {
        "bfloat16" => "bf16".into(),
        "float16" | "half" => "fp16".into(),
        "int8_wo" => "w8a16".into(),
        "int4_wo" => "w4a16".into(),
        "sq" => "int8".into(),
        _ => text.into(),
    })
}

/// Names of kernels as the tables of this project spell them.
fn kernel(columns: &Columns, row: usize) -> Result<Cell, &'static str> {
    let text: Rc<str> = columns
        .text("kernel_source", row)
        .filter(|t| !t.is_empty())
        .ok_or("kernel_source is missing")?;
    Ok(match &*text {
        "torch.nn.functional.linear" => "torch_linear".into(),
        "NCCL" => "nccl".into(),
        "oneCCL" => "oneccl".into(),
        long => match long.strip_suffix("LinearKernel") {
            Some(short) => short.into(),
            None => text.into(),
        },
    })
}
