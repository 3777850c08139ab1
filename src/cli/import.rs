//! What people type after `import`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// What to read.
    #[command(subcommand)]
    pub from: ImportFrom,
    /// Where the CSV files go, replacing those of equal names [default: imports/SOURCE in the data directory]
    #[arg(long, global = true, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// The sources.
#[derive(Clone, Debug, Subcommand)]
pub enum ImportFrom {
    /// Kernel timings of the Python package aiconfigurator-core -> points
    Aiconfigurator(PackageArgs),
    /// Measured serving runs of the same package -> runs
    AiconfiguratorRuns(PackageArgs),
    /// Profiling CSVs of Vidur: mlp, attention, all_reduce, send_recv -> points
    Vidur(VidurArgs),
    /// Start-up logs of vLLM: cache size, concurrency, weights -> runs
    VllmLog(VllmLogArgs),
    /// Result files of vllm bench serve, throughput or latency -> runs
    VllmBench(VllmBenchArgs),
    /// Measurements of batchmax profile -> points
    BatchmaxProfile(BatchmaxProfileArgs),
    /// Results of batchmax validate --out -> runs
    BatchmaxValidate(BatchmaxValidateArgs),
}

impl ImportFrom {
    /// The name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Aiconfigurator(_) => "aiconfigurator",
            Self::AiconfiguratorRuns(_) => "aiconfigurator-runs",
            Self::Vidur(_) => "vidur",
            Self::VllmLog(_) => "vllm-log",
            Self::VllmBench(_) => "vllm-bench",
            Self::BatchmaxProfile(_) => "batchmax-profile",
            Self::BatchmaxValidate(_) => "batchmax-validate",
        }
    }
}

/// The package aiconfigurator-core.
#[derive(Args, Clone, Debug)]
pub struct PackageArgs {
    /// The wheel (pip download aiconfigurator-core --no-deps), or the folder it was installed to
    #[arg(value_name = "WHEEL_OR_DIR")]
    pub package: PathBuf,
    /// Only this device [default: all]
    #[arg(long, short)]
    pub gpu: Option<String>,
}

/// `import vidur`.
#[derive(Args, Clone, Debug)]
pub struct VidurArgs {
    /// mlp.csv, attention.csv, all_reduce.csv, send_recv.csv
    #[arg(required = true, value_name = "CSV")]
    pub files: Vec<PathBuf>,
    /// The device they were measured on
    #[arg(long, short)]
    pub gpu: String,
    /// The model they were measured with; collectives need none
    #[arg(long, short)]
    pub model: Option<String>,
}

/// What a result leaves unsaid.
#[derive(Args, Clone, Debug)]
pub struct RunFacts {
    /// The device
    #[arg(long, short)]
    pub gpu: String,
    /// The model [default: as the file says]
    #[arg(long, short)]
    pub model: Option<String>,
    /// GPUs that share each layer [default: as the file says, else 1]
    #[arg(long)]
    pub tp: Option<u32>,
    /// Pipeline stages [default: as the file says, else 1]
    #[arg(long)]
    pub pp: Option<u32>,
    /// Type of the weights
    #[arg(long)]
    pub weight_dtype: Option<String>,
    /// Type of the cache
    #[arg(long)]
    pub kv_dtype: Option<String>,
    /// Version of the engine
    #[arg(long)]
    pub engine_version: Option<String>,
}

/// `import vllm-log`.
#[derive(Args, Clone, Debug)]
pub struct VllmLogArgs {
    /// Logs
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub facts: RunFacts,
    /// Tokens per block, for logs that count blocks
    #[arg(long, default_value_t = 16)]
    pub block_size: u32,
}

/// `import vllm-bench`.
#[derive(Args, Clone, Debug)]
pub struct VllmBenchArgs {
    /// JSON files
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub facts: RunFacts,
    /// Prompt tokens, for throughput and latency results
    #[arg(long)]
    pub isl: Option<u64>,
    /// Generated tokens, for throughput and latency results
    #[arg(long)]
    pub osl: Option<u64>,
    /// Sequences, for latency results
    #[arg(long, short)]
    pub batch: Option<u64>,
}

/// `import batchmax-profile`.
#[derive(Args, Clone, Debug)]
pub struct BatchmaxProfileArgs {
    /// JSON of batchmax profile --out
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Name of the machine
    #[arg(long, short, default_value = "cpu")]
    pub gpu: String,
}

/// `import batchmax-validate`.
#[derive(Args, Clone, Debug)]
pub struct BatchmaxValidateArgs {
    /// JSON of batchmax validate --out
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// What the device is called here [default: as there]
    #[arg(long, short)]
    pub gpu: Option<String>,
}
