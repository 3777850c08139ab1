//! What people type after `calibrate` and `score`: measurements, and published runs.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::OutputArgs;

/// `calibrate`.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct CalibrateArgs {
    #[command(subcommand)]
    pub command: Option<CalibrateCommand>,
    /// Measurements of `batchmax profile` (JSON), or kernel timings of GPUs (CSV, several files)
    /// [default: this machine's newest profile]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub points: Vec<PathBuf>,
    /// CPU threads the measurements were made with [default: all cores]
    #[arg(long, short)]
    pub threads: Option<usize>,
    #[command(flatten)]
    pub filter: PointFilter,
    /// Directory for the fitted files, one per device and framework [default: the data directory]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Who measured, for the fitted files [default: by the timings' own source column]
    #[arg(long, value_name = "TEXT")]
    pub source: Option<String>,
    /// Fit every kernel on its own, however few its timings; else fewer than 200 bend what is known of
    /// other devices
    #[arg(long)]
    pub alone: bool,
    /// Licence of the timings
    #[arg(long, value_name = "TEXT", default_value = "unstated")]
    pub licence: String,
}

/// Which timings count.
#[derive(Args, Clone, Debug, Default)]
pub struct PointFilter {
    /// Only timings of this device
    #[arg(long)]
    pub gpu: Option<String>,
    /// Only timings of this framework (vllm, sglang, trtllm ...)
    #[arg(long)]
    pub framework: Option<String>,
    /// Only timings of this type (bf16, fp8, bf16/fp8 ...)
    #[arg(long)]
    pub dtype: Option<String>,
}

/// What `calibrate` can do beside fitting.
#[derive(Subcommand, Clone, Debug)]
pub enum CalibrateCommand {
    /// Score the fitted kernels on timings
    Check(CheckArgs),
    /// Fit the engines' overheads to published runs
    Engines(EnginesArgs),
}

/// Published runs and what is known of them.
#[derive(Args, Clone, Debug)]
pub struct RunFiles {
    /// Published runs (CSV): id, gpu, model, engine, mode, input_len, metric, value ...
    #[arg(long, value_name = "FILE")]
    pub runs: PathBuf,
    /// Quality tier of each run (CSV: id, tier); fits use the tiers A and B
    #[arg(long, value_name = "FILE")]
    pub tiers: Option<PathBuf>,
    /// Runs to leave out (CSV: id ...), for a fault visible in their data
    #[arg(long, value_name = "FILE")]
    pub without: Option<PathBuf>,
}

/// `calibrate engines`.
#[derive(Args, Clone, Debug)]
pub struct EnginesArgs {
    #[command(flatten)]
    pub files: RunFiles,
    /// Directory for the fitted descriptions [default: engines in the data directory]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// `score`.
#[derive(Args, Clone, Debug)]
pub struct ScoreArgs {
    #[command(flatten)]
    pub files: RunFiles,
    /// Where the prediction of each run goes (CSV)
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Fit each engine anew without the device that is scored, and score that
    #[arg(long)]
    pub cross_validate: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `calibrate check`.
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// Kernel timings (CSV)
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub points: Vec<PathBuf>,
    #[command(flatten)]
    pub filter: PointFilter,
    /// Fit anew without a part of the timings and score on that part: keys, largest, devices, or
    /// devices:POINTS (each device known by so many timings of each kernel)
    #[arg(long, value_name = "PART")]
    pub hold_out: Option<batchmax_sim::surface::HoldOut>,
}
