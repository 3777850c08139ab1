//! What the commands that run on this machine share: weights, prompts, progress, Ctrl-C.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use batchmax_exec::fetch::{FetchError, Stage};
use batchmax_exec::load::Checkpoint;
use batchmax_exec::weights::{Keeping, Weights};
use batchmax_exec::{Engine, Executor, RunOptions, RunResult, fetch};
use batchmax_exec::{machine, nodes};

use batchmax_sim::cost::predict;
use batchmax_sim::load::Load;
use batchmax_sim::lower::Setup;
use batchmax_sim::memory::{Footprint, kv_peaks, kv_spread};
use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;
use batchmax_sim::timeline::Timeline;
use batchmax_sim::units::Bytes;
use serde::{Deserialize, Serialize};

use crate::cli::{Global, MemoryArgs};
use crate::paths::write_whole;
use crate::report::{progress, remark};
use crate::setting::{self, Configuration, Places};

/// English prose for prompts that nobody gave: public domain, see its head.
const PROSE: &str = include_str!("../../profiles/text/prose.txt");

/// Set by Ctrl-C; runs look at it between steps.
pub fn interrupted() -> &'static AtomicBool {
    static FLAG: AtomicBool = AtomicBool::new(false);
    static HANDLER: OnceLock<bool> = OnceLock::new();
    HANDLER.get_or_init(|| {
        ctrlc::set_handler(|| {
            // A second Ctrl-C ends the process where the first one is not seen in time.
            if FLAG.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        })
        .is_ok()
    });
    &FLAG
}

/// Progress as a line, where a program looks at it.
pub fn progress_line(global: &Global, done: u64, total: u64, label: &str) {
    if global.progress_lines {
        remark(false, &format!("progress {done} {total} {label}"));
    }
}

/// Threads of a run. Where the machine has several memory nodes, this thread and those to come stay on one that has cores
/// enough: to be called before weights are read, so that they lie there.
pub fn threads(memory: &MemoryArgs) -> Result<usize> {
    let threads = setting::threads(memory)?;
    if let Some(cpus) = nodes::node_for(&nodes::nodes(), threads) {
        // Where the system refuses, the run is slower, not wrong.
        nodes::stay_on(cpus);
    }
    Ok(threads)
}

/// Where a model's weights are, if they are here.
pub fn checkpoint_path(places: &Places, name: &str) -> Option<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Some(path.to_owned());
    }
    fetch::locate(&places.data_dir, name)
}

/// The checkpoint that `--weights` asks for, if it is here.
pub fn checkpoint(places: &Places, name: &str, wanted: &str) -> Result<Option<Checkpoint>> {
    let path = match wanted {
        "synthetic" => None,
        "real" | "auto" => checkpoint_path(places, name),
        other => bail!("--weights {other}: expected auto, real or synthetic"),
    };
    match path {
        Some(path) if path.extension().is_none_or(|e| e != "toml") => {
            let checkpoint = Checkpoint::open(&path)?;
            places.know_stored(&path, checkpoint.model().stored);
            Ok(Some(checkpoint))
        }
        _ if wanted == "real" => bail!(
            "no weights of {name} are here; hint: batchmax fetch {name}, batchmax fetch FILE, or --weights synthetic"
        ),
        _ => Ok(None),
    }
}

/// Brings the default model here, with a bar while it comes.
pub fn fetch_default(places: &Places, global: &Global) -> Result<PathBuf, FetchError> {
    let mut bar = None;
    fetch::fetch_default(&places.data_dir, &mut |stage| match stage {
        Stage::Line(line) => {
            bar = None::<progress::Bytes>;
            remark(global.quiet, line);
        }
        Stage::Bytes { done, total } => {
            bar.get_or_insert_with(|| progress::Bytes::new(global, total, "downloading")).at(done);
        }
    })
}

/// The weights of a checkpoint, packed now or before; without one those that `--weights` asks for instead.
pub fn weights(
    places: &Places,
    name: &str,
    wanted: &str,
    checkpoint: Option<&Checkpoint>,
    model: &Model,
    setup: Setup,
    global: &Global,
) -> Result<Weights> {
    let Some(checkpoint) = checkpoint else {
        if wanted == "auto" {
            remark(
                global.quiet,
                &format!(
                    "no weights of {name} are here: synthetic ones of its shape (speed and memory are real, text is not)"
                ),
            );
        }
        return Ok(Weights::synthetic_with_head(model, setup.weights, setup.head)?);
    };
    let directory = places.data_dir.join("packed");
    let (weights, keeping) = Weights::load_kept(checkpoint, setup.weights, setup.head, &directory)?;
    match keeping {
        Keeping::Found => {}
        Keeping::Written { path, bytes, instead } => {
            let why = instead.map(|why| format!(" anew ({why})")).unwrap_or_default();
            let path = path.display();
            let text = format!("weights packed{why} and kept for the next start: {path}, {bytes}");
            remark(global.quiet, &text);
        }
        Keeping::NotKept(why) => {
            remark(global.quiet, &format!("the packed weights are not kept: {why}"));
        }
    }
    Ok(weights)
}

/// Tokens that prompts nobody gave are cut from.
#[derive(Deserialize, Serialize)]
pub struct Prose {
    /// What they follow from.
    of: String,
    ids: Vec<u32>,
}

impl Prose {
    /// Raised where the same tokeniser gives other tokens of the same text than before.
    const VERSION: u32 = 1;

    /// English prose, or made-up tokens without a tokeniser. To build a tokeniser takes longer than all else at the start
    /// of a run, so the tokens are kept beside the packed weights.
    pub fn new(places: &Places, checkpoint: Option<&Checkpoint>, model: &Model) -> Result<Self> {
        let Some(checkpoint) = checkpoint else { return Ok(Self::made_up(model)) };
        let text: String =
            PROSE.lines().filter(|l| !l.starts_with('#')).collect::<Vec<_>>().join("\n");
        let mut hash = DefaultHasher::new();
        text.hash(&mut hash);
        let of = format!("{} {:016x}\n{}", Self::VERSION, hash.finish(), checkpoint.identity()?);
        let name = format!("{}.tokens.json", checkpoint.file_name());
        let path = places.data_dir.join("packed").join(name);
        let kept = std::fs::read(&path).ok().and_then(|raw| serde_json::from_slice(&raw).ok());
        let known = |id: &u32| *id < model.vocab;
        if let Some(kept) = kept.filter(|kept: &Self| {
            kept.of == of && !kept.ids.is_empty() && kept.ids.iter().all(known)
        }) {
            return Ok(kept);
        }
        let Ok(tokenizer) = checkpoint.tokenizer() else { return Ok(Self::made_up(model)) };
        let prose = Self { of, ids: tokenizer.encode(&text, false)? };
        // Where it can't be kept it is made again.
        write_whole(&path, serde_json::to_vec(&prose)?).ok();
        Ok(prose)
    }

    fn made_up(model: &Model) -> Self {
        let id = |i: u64| ((i * 2_654_435_761) % u64::from(model.vocab)) as u32;
        Self { of: String::new(), ids: (0..4096).map(id).collect() }
    }

    /// `batch` prompts of `isl` tokens, each from another place.
    pub fn prompts(&self, batch: u32, isl: u32) -> Vec<Vec<u32>> {
        let prompt = |sequence: usize| {
            // A prime stride starts every sequence at another word.
            let from = (sequence * 211) % self.ids.len();
            self.ids.iter().cycle().skip(from).take(isl as usize).copied().collect()
        };
        (0..batch as usize).map(prompt).collect()
    }
}

/// Sequences of a program, those that wait included.
pub fn requests(program: &Program) -> u32 {
    u32::try_from(program.header.load.sequences()).unwrap_or(u32::MAX)
}

/// How many requests share the places of a batch, where some wait.
pub fn in_turn(load: &Load) -> String {
    if load.sequences() > load.batch() {
        format!(" ({} requests)", load.sequences())
    } else {
        String::new()
    }
}

/// The engine of a configuration.
pub fn engine(model: &Model, weights: Weights, threads: usize) -> Engine {
    Engine::new(model.clone(), weights, threads)
}

/// What a run may take where no limit is given: most of the machine's memory, or anything where the system does not say.
pub fn machine_memory() -> Bytes {
    match machine::memory() {
        Bytes(0) => Bytes(u64::MAX),
        Bytes(all) => Bytes(all / 10 * 9),
    }
}

/// Refuses what would not fit before any weight is read.
pub fn check_memory(configuration: &Configuration, program: &Program) -> Result<Footprint> {
    let limits = &configuration.host.placement.limits;
    let needed = configuration.host.placement.footprint(program);
    if needed.weights > limits.memory {
        bail!(
            "the weights alone take {}, the memory is {}; hint: raise --memory, or --weight-dtype bf16",
            needed.weights,
            limits.memory
        );
    }
    if let Some(over) = configuration.case().over(&needed) {
        bail!(
            "batch {} does not fit: {over}; hint: --batch max takes the largest that fits",
            program.header.load.batch()
        );
    }
    Ok(needed)
}

/// Refuses a prefix whose reading takes more than the caches' own limit: it is read before the clock starts, sequence by
/// sequence, but in the same memory.
pub fn check_prefix(prefix: Option<&Program>, limit: Option<Bytes>) -> Result<()> {
    let (Some(prefix), Some(limit)) = (prefix, limit) else { return Ok(()) };
    let peaks = kv_peaks(prefix);
    let needed = peaks.prefill.max(peaks.decode) + kv_spread(prefix);
    if needed > limit {
        bail!(
            "reading the cached prefixes takes {needed} of caches, --kv-memory is {limit}; hint: a shorter --prefix-hit or a smaller --batch"
        );
    }
    Ok(())
}

/// A program, what was predicted for it and what was measured.
pub struct Trial {
    /// The program.
    pub program: Program,
    /// Prediction.
    pub predicted: Timeline,
    /// Predicted memory.
    pub footprint: Footprint,
    /// Measurement.
    pub result: RunResult,
}

/// Predicts and runs one program.
pub fn trial(
    executor: &mut dyn Executor,
    configuration: &Configuration,
    program: Program,
    prompts: &[Vec<u32>],
    options: &RunOptions,
    global: &Global,
    label: &str,
) -> Result<Trial> {
    let footprint = check_memory(configuration, &program)?;
    let predicted = predict(configuration.host.cost.as_ref(), &program);
    let (steps, _) = program.steps();
    let bar = progress::bar(global, steps, label);
    let mut drawn = Instant::now();
    let result = executor.run(&program, prompts, options, interrupted(), &mut |done, _| {
        // Drawing costs more than a small op: ten times a second is enough.
        if drawn.elapsed() > Duration::from_millis(100) {
            bar.set_position(done);
            progress_line(global, done, steps, label);
            drawn = Instant::now();
        }
    });
    bar.finish_and_clear();
    let result = result.map_err(|e| anyhow!(e))?;
    Ok(Trial { program, predicted, footprint, result })
}
