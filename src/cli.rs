//! What people type. The same flag means the same in every command.

mod calibrate;
pub mod examples;
mod first_hour;
pub mod import;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use calibrate::{
    CalibrateArgs, CalibrateCommand, CheckArgs, EnginesArgs, PointFilter, RunFiles, ScoreArgs,
};
pub use first_hour::{CompletionsArgs, DoctorArgs, ManArgs, ShowConfigArgs};

const EXAMPLES: &str = "\
Examples:
  batchmax                                           the planner to look at
  batchmax compare                                   run the whole loop on this machine
  batchmax plan --model llama-3.1-8b --gpu h100-sxm --isl 32k --osl 512
  batchmax what-if --model qwen2.5-7b --gpu l40s --isl 2k..32k --batch 1,2,4,8
  batchmax validate --policy batch-max --isl 2k --osl 256 --kv-memory 64MB

Exit codes: 0 answered, 1 the answer is no, 2 usage or bad input, 3 device failure.";

/// Plan, run and validate LLM inference with KV-cache compression.
#[derive(Debug, Parser)]
#[command(name = "batchmax", version, after_help = EXAMPLES)]
pub struct Cli {
    /// The command; none opens the planner on a terminal.
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub global: Global,
}

/// Flags of every command.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Directory with gpus/, models/, policies/, engines/ that override the built-in descriptions
    #[arg(long, global = true, value_name = "DIR", env = "BATCHMAX_PROFILES")]
    pub profiles: Option<PathBuf>,
    /// Where models and this machine's profiles are kept [default: the XDG data directory]
    #[arg(long, global = true, value_name = "DIR", env = "BATCHMAX_DATA")]
    pub data_dir: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress on stderr
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Say on stderr which files count and how long the answer took
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    pub verbose: bool,
    /// Defaults of flags (TOML) [default: batchmax/config.toml in the XDG configuration directory]
    #[arg(long, global = true, value_name = "FILE", env = "BATCHMAX_CONFIG")]
    pub config: Option<PathBuf>,
    /// auto (none where NO_COLOR is set), or never
    #[arg(long, alias = "color", global = true, value_name = "WHEN", default_value = "auto", value_parser = ["auto", "never"])]
    pub colour: String,
    /// Progress of runs as lines on stderr, for programs: progress DONE TOTAL LABEL
    #[arg(long, global = true, hide = true)]
    pub progress_lines: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Which batch, policy and schedule is the fastest that fits
    Plan(PlanCommand),
    /// The planner to look at: the same answers, redrawn with every key
    Tui(TuiArgs),
    /// What one configuration, a sweep or a CSV of scenarios would do
    WhatIf(WhatIfArgs),
    /// Print the program of a configuration: every op with its shape, FLOPs and bytes
    Explain(ConfigArgs),
    /// Obtain the default model, or register a local one
    Fetch(FetchArgs),
    /// Turn data of other programs into points (measured kernels) and runs (measured end to end)
    Import(import::ImportArgs),
    /// Time this machine's kernels
    #[cfg(feature = "exec")]
    Profile(ProfileArgs),
    /// Fit the cost models to measured kernels
    Calibrate(CalibrateArgs),
    /// Predict published runs and show the errors
    Score(ScoreArgs),
    /// Really run a configuration
    #[cfg(feature = "exec")]
    Run(RunArgs),
    /// Predict a configuration, run it, and show the error
    #[cfg(feature = "exec")]
    Validate(ValidateArgs),
    /// The main job: plan, run full, one-shot and chunked compression and the control, show the speedups
    #[cfg(feature = "exec")]
    Compare(CompareArgs),
    /// Measure what KV-cache policies lose on a loaded model: KL, retrieval, quoting, against the bytes they keep
    #[cfg(feature = "exec")]
    Quality(QualityArgs),
    /// Find on a loaded model what a policy needs to know beforehand; the result is a preset
    #[cfg(feature = "exec")]
    Prepare(PrepareArgs),
    /// List or show model descriptions
    Models(ListArgs),
    /// What of this machine can run: its CPU, and CUDA devices or why there are none
    #[cfg(feature = "exec")]
    Devices,
    /// List or show device descriptions
    Gpus(ListArgs),
    /// List or show serving engines
    Engines(ListArgs),
    /// List or show policy presets
    Policies(ListArgs),
    /// What is here, what is missing, and the command that mends it
    Doctor(DoctorArgs),
    /// Show every setting and where it comes from
    Config(ShowConfigArgs),
    /// Print the completions of a shell
    Completions(CompletionsArgs),
    /// Write the manual, a page a command
    Man(ManArgs),
}

/// One configuration.
#[derive(Args, Clone, Debug)]
pub struct ConfigArgs {
    /// Model: a name, a config.json or its directory, a GGUF or TOML file
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
    /// Device: a name, a TOML file, or cpu for this machine
    #[arg(long, short, default_value = "cpu")]
    pub gpu: String,
    /// Policy preset, with changed parameters: batch-max:budget=512,chunk=256
    #[arg(long, short, default_value = "full")]
    pub policy: String,
    /// Prompt tokens of each sequence (2048, 2k)
    #[arg(long, default_value = "2k")]
    pub isl: String,
    /// Generated tokens of each sequence
    #[arg(long, default_value = "256")]
    pub osl: String,
    /// How far the lengths of answers lie apart: they are spread evenly from this share below --osl to as much above it
    #[arg(long, value_name = "SHARE", default_value = "0")]
    pub osl_spread: String,
    /// First tokens of each prompt that a cache holds from an earlier request (prefix caching): tokens or a share (4k, 75%).
    /// Only the others are read
    #[arg(long, value_name = "TOKENS|SHARE", default_value = "0")]
    pub prefix_hit: String,
    /// Sequences, or max for the largest batch that fits (`run` without a limit of memory: 1)
    #[arg(long, short, default_value = "max")]
    pub batch: String,
    #[command(flatten)]
    pub placement: PlacementArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// static (read together, then generate together), staggered (read one prompt after another), staggered:N (N at a time),
    /// continuous (requests join and leave; each place of the batch serves 4 in turn), continuous:N (N in turn)
    #[arg(long, default_value = "static")]
    pub schedule: String,
}

/// What it runs under, and on how many devices.
#[derive(Args, Clone, Debug)]
pub struct PlacementArgs {
    /// Engine: a name or a TOML file. On a GPU vllm where it can run what is asked; else batchmax, a hypothetical engine
    /// with vllm's kernels, overheads and memory that runs every policy [default: vllm or batchmax]
    #[arg(long)]
    pub engine: Option<String>,
    /// GPUs that share each layer
    #[arg(long, value_name = "N")]
    pub tp: Option<String>,
    /// Groups of GPUs that hold a part of the layers each; they share reading and take turns generating
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub pp: u32,
}

/// Memory and types.
#[derive(Args, Clone, Debug)]
pub struct MemoryArgs {
    /// Memory of each device for everything (64MB, 1.5GiB) [default: the engine's share; 90 % of a CPU's]
    #[arg(long)]
    pub memory: Option<String>,
    /// Memory of each device for the KV caches alone: a hard limit when running
    #[arg(long)]
    pub kv_memory: Option<String>,
    /// Type of the weights: f32, bf16, or q8 and q4, codes of 8 and 4 bits in blocks of 32 (with q4 the embedding and the
    /// head have 8) [default: what the model's file holds on a CPU, else f32; the model's own on a GPU]
    #[arg(long)]
    pub weight_dtype: Option<String>,
    /// Type of the cache; several, separated by commas, for plan and what-if [default: f16 on a CPU, bf16 on a GPU]
    #[arg(long)]
    pub kv_dtype: Option<String>,
    /// CPU threads [default: all cores]
    #[arg(long, short)]
    pub threads: Option<usize>,
}

/// Where an answer goes beside or instead of tables.
#[derive(Args, Clone, Debug, Default)]
pub struct OutputArgs {
    /// Write the answer as one HTML page with plots, without outside requests
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write the first plot as SVG
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print Markdown
    #[arg(long, conflicts_with = "csv")]
    pub markdown: bool,
    /// Print CSV
    #[arg(long)]
    pub csv: bool,
}

/// `plan`.
#[derive(Args, Clone, Debug)]
pub struct PlanCommand {
    #[command(flatten)]
    pub plan: PlanArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What `plan` asks.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// Model: a name, a config.json or its directory, a GGUF or TOML file
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
    /// Devices to choose from, separated by commas: names, TOML files, or cpu for this machine
    #[arg(long, short, default_value = "cpu")]
    pub gpu: String,
    /// Policy presets to try, separated by spaces or commas [default: all presets]
    #[arg(long, short, num_args = 1..)]
    pub policy: Vec<String>,
    /// Prompt tokens of each sequence
    #[arg(long, default_value = "2k")]
    pub isl: String,
    /// Generated tokens of each sequence
    #[arg(long, default_value = "256")]
    pub osl: String,
    /// How far the lengths of answers lie apart: they are spread evenly from this share below --osl to as much above it
    #[arg(long, value_name = "SHARE", default_value = "0")]
    pub osl_spread: String,
    /// First tokens of each prompt that a cache holds from an earlier request (prefix caching): tokens or a share (4k, 75%).
    /// Only the others are read
    #[arg(long, value_name = "TOKENS|SHARE", default_value = "0")]
    pub prefix_hit: String,
    /// Sequences, or max for the largest batch that fits
    #[arg(long, short, default_value = "max")]
    pub batch: String,
    #[command(flatten)]
    pub placement: PlacementArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Schedules to try [default: static and staggered]
    #[arg(long, num_args = 1..)]
    pub schedule: Vec<String>,
    /// Budgets to try where a policy has one (512,25%) [default: the preset's; quality is not predicted]
    #[arg(long)]
    pub budget: Option<String>,
    /// Chunks to try where a policy reads by chunks (256,1k) [default: the preset's, 1k and 4k]
    #[arg(long)]
    pub chunk: Option<String>,
    /// GPUs there are at most; as many copies run as fit, and --tp is searched in powers of two
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub gpus: Option<u32>,
    /// What counts: output (tokens/s of all GPUs), per-gpu, cost (USD per million output tokens)
    #[arg(long, default_value = "output")]
    pub objective: String,
    /// Rent of a GPU per hour, USD (h100-sxm=2.5), instead of its description's
    #[arg(long, value_name = "GPU=USD", num_args = 1..)]
    pub price: Vec<String>,
    /// Print only what no other candidate beats, with smaller batches: rate against TPOT, rate against memory
    #[arg(long)]
    pub pareto: bool,
    /// Longest time to the last sequence's first token (500ms)
    #[arg(long)]
    pub ttft: Option<String>,
    /// Longest time per output token (50ms)
    #[arg(long)]
    pub tpot: Option<String>,
    /// Largest measured KL from no compression (0.1, nats of the next token); what was not measured is left out
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
    /// Least measured share of right digits of hidden numbers (0.8); what was not measured is left out
    #[arg(long, value_name = "SHARE")]
    pub min_recall: Option<f64>,
}

/// `tui`.
#[derive(Args, Clone, Debug)]
pub struct TuiArgs {
    #[command(flatten)]
    pub plan: PlanArgs,
    /// Draw with ASCII only [default: by the locale]
    #[arg(long)]
    pub ascii: bool,
}

/// `what-if`.
#[derive(Args, Clone, Debug)]
pub struct WhatIfArgs {
    /// Models, separated by commas
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
    /// Devices, separated by commas
    #[arg(long, short, default_value = "cpu")]
    pub gpu: String,
    /// Policies, separated by spaces or commas
    #[arg(long, short, num_args = 1.., default_value = "full")]
    pub policy: Vec<String>,
    /// Prompt tokens: a value, a list 1k,2k or a range 2k..32k (doubling)
    #[arg(long, default_value = "2k")]
    pub isl: String,
    /// Generated tokens: a value, a list or a range
    #[arg(long, default_value = "256")]
    pub osl: String,
    /// How far the lengths of answers lie apart: they are spread evenly from this share below --osl to as much above it
    #[arg(long, value_name = "SHARE", default_value = "0")]
    pub osl_spread: String,
    /// First tokens of each prompt that a cache holds from an earlier request (prefix caching): tokens or a share (4k, 75%).
    /// Only the others are read
    #[arg(long, value_name = "TOKENS|SHARE", default_value = "0")]
    pub prefix_hit: String,
    /// Batches: values, lists, ranges, or max
    #[arg(long, short, default_value = "max")]
    pub batch: String,
    #[command(flatten)]
    pub placement: PlacementArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Schedules, separated by spaces
    #[arg(long, num_args = 1.., default_value = "static")]
    pub schedule: Vec<String>,
    /// A CSV of scenarios instead, answered as CSV or --json: id,gpu,tp,model,weight_dtype,kv_dtype,engine,schedule,batch,input_len,output_len,prefix_hit,policy
    #[arg(long, value_name = "FILE")]
    pub scenarios: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `fetch`.
#[derive(Args, Clone, Debug)]
pub struct FetchArgs {
    /// smollm2-135m, or a GGUF file or safetensors directory to register
    #[arg(default_value = "smollm2-135m")]
    pub what: String,
    /// Name for a registered model [default: the file's]
    #[arg(long)]
    pub name: Option<String>,
}

/// `models`, `gpus`, `policies`.
#[derive(Args, Clone, Debug)]
pub struct ListArgs {
    /// Show one in full
    pub name: Option<String>,
}

/// Where weights come from.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct WeightArgs {
    /// Weights: auto (the fetched model, else synthetic), real, or synthetic
    #[arg(long, default_value = "auto")]
    pub weights: String,
}

/// What runs.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// What of this machine runs: auto (its first GPU that can, else its CPU), cpu, cuda (the first GPU), cuda:N as `batchmax
    /// devices` lists them, or cuda:N,M, which share each layer
    #[arg(long, value_name = "auto|cpu|cuda|cuda:N,M", default_value = "auto")]
    pub device: String,
}

/// `profile`.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct ProfileArgs {
    /// Model whose shapes are timed
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
    /// Policy whose own kernels are timed beside what all share; may be repeated [default: every preset]
    #[arg(long, value_name = "PRESET[:KEY=VALUE,…]")]
    pub policy: Vec<String>,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Where the measurements go [default: the data directory]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Passes over all kernels, of which medians count: a moment in which others slow the machine then bends none of them
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: u32,
    /// Forget an interrupted profile instead of resuming it
    #[arg(long)]
    pub restart: bool,
}

/// `run`.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Prompt text; --isl is then its length
    #[arg(long)]
    pub prompt: Option<String>,
    /// Wrap the prompt in the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Slower memory for offloaded tokens (specache) and stored chunks (cacheblend): a hard limit [default: none]
    #[arg(long, value_name = "SIZE")]
    pub tier_memory: Option<String>,
    /// Directory in whose files offloaded tokens lie [default: memory]
    #[arg(long, value_name = "DIR")]
    pub tier_dir: Option<PathBuf>,
    /// Prompts as token ids: a JSON list of lists
    #[arg(long, value_name = "FILE")]
    pub ids: Option<PathBuf>,
    /// Write logits, tokens and kept positions as JSON
    #[arg(long, value_name = "FILE")]
    pub dump: Option<PathBuf>,
    /// Temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw from the smallest set of tokens that reaches this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Generate all --osl tokens even past the end of the answer
    #[arg(long)]
    pub ignore_stop: bool,
}

/// `validate`.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct ValidateArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Largest acceptable error of the total time; beyond it the exit code is 1
    #[arg(long, default_value = "25%")]
    pub tolerance: String,
    /// Also write the result as JSON: device, versions and numbers, nothing of who ran it; to be sent to others, who read it with
    /// `batchmax import batchmax-validate`
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `compare`.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct CompareArgs {
    /// Model: a name, a config.json or its directory, a GGUF or TOML file
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
    /// Prompt tokens of each sequence
    #[arg(long, default_value = "2k")]
    pub isl: String,
    /// Generated tokens of each sequence
    #[arg(long, default_value = "256")]
    pub osl: String,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// `prepare`.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct PrepareArgs {
    /// What to find: the tokens that DBudgetKV's layers keep, DuoAttention's streaming heads, the layer behind which
    /// FastKV drops rows, the layers that KVSharer lets share, or the networks of LESS (minutes). With parameters where they
    /// are not to be the preset's: duoattention:retrieval=0.75
    #[arg(value_name = "dbudgetkv|duoattention|fastkv|kvsharer|less[:KEY=VALUE,…]")]
    pub policy: String,
    /// Model: a name, a GGUF file or a safetensors directory
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
    /// Prompt tokens of each excerpt [default: 1k; 64 for kvsharer, 512 for less]
    #[arg(long)]
    pub context: Option<String>,
    /// Excerpts of the text [default: 4; 30 for kvsharer, 32 for less]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub samples: Option<u32>,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub weights: WeightArgs,
    /// Where the preset goes (TOML); --policy takes it [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// `quality`.
#[cfg(feature = "exec")]
#[derive(Args, Clone, Debug)]
pub struct QualityArgs {
    /// Model: a name, a GGUF file or a safetensors directory
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
    /// Policy presets, separated by spaces or commas [default: every preset that this machine can run]
    #[arg(long, short, num_args = 1..)]
    pub policy: Vec<String>,
    /// Prompt tokens: a list (512,1k,2k) or a range; the default set takes minutes, longer prompts much more
    #[arg(long, default_value = "512")]
    pub context: String,
    /// Budgets, where a policy has one that was not typed with it
    #[arg(long, default_value = "50%,25%")]
    pub budget: String,
    /// Measure evicting policies with a cut every 256 prompt tokens too, not just after the whole prompt
    #[arg(long)]
    pub chunked: bool,
    /// Excerpts of the text; the same for every policy
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub samples: u32,
    /// Of the four numbers hidden in each excerpt, how many are asked for, each of a prompt of its own; 0: plain prose
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=4))]
    pub questions: u32,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub weights: WeightArgs,
    /// Keep the measurements here (JSON), row by row; those that it has already are not repeated
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write the means as a description that plan reads: quality/MODEL.toml in the data or --profiles directory
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}
