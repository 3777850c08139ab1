//! Start-up logs of vLLM: how large the cache became, how many requests fit, what the weights take.
//!
//! Wordings, all of them found anywhere in a line (prefixes differ from version to version):
//!
//! - `GPU KV cache size: 2,042,016 tokens`, since 0.7.4; before it `# GPU blocks: 1381` (`# cuda blocks`, `# ROCM blocks`);
//! - `Maximum concurrency for 2,048 tokens per request: 10.79x`, on a line of its own or behind the size;
//! - `Loading model weights took 14.98 GB`, `Model loading took 14.98 GB`, `Model loading took 14.98 GiB memory`: GiB
//!   all of them;
//! - `Initializing a V1 LLM engine (v0.8.3) with config: model='...', ..., tensor_parallel_size=2, ...` begins a start-up.
//!
//! Ranks repeat lines with slightly different numbers: the smallest cache counts, since the scheduler goes by it, and the
//! largest weights.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};
use batchmax_sim::profile::Catalog;

use crate::cli::import::{RunFacts, VllmLogArgs};

use super::runs::{self, Run, credible, kv_policy};
use super::summary::{Summary, tame};

/// Longer lines are progress bars or dumps: only their beginning is looked at.
const LONGEST_LINE: u64 = 1 << 16;
const GIB: f64 = (1u64 << 30) as f64;

/// Imports.
pub fn import(
    catalog: &Catalog,
    args: &VllmLogArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let gpu = catalog.gpu(&args.facts.gpu)?.name;
    let mut rows = Vec::new();
    for path in &args.files {
        let place = path.display().to_string();
        let file = File::open(path).with_context(|| place.clone())?;
        let before = rows.len();
        for start in starts(&mut BufReader::new(file)).with_context(|| place.clone())? {
            rows.extend(start.runs(args, &gpu, path, summary));
        }
        if rows.len() == before {
            summary.leave_out("no start-up lines of vLLM in the log", || place.clone());
        }
    }
    runs::write(dir, "vllm-log", rows, summary)
}

/// What one start of an engine said.
#[derive(Clone, Debug, Default, PartialEq)]
struct Start {
    version: String,
    config: String,
    kv_tokens: Option<f64>,
    blocks: Option<f64>,
    block_size: Option<f64>,
    concurrency: Option<(f64, f64)>,
    weights_gib: Option<f64>,
}

/// Reads a log to its end.
fn starts(log: &mut impl BufRead) -> std::io::Result<Vec<Start>> {
    let (mut all, mut now) = (Vec::new(), Start::default());
    let mut line = Vec::new();
    loop {
        line.clear();
        if log.take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let text = String::from_utf8_lossy(&line);
        if text.contains("Initializing a") && text.contains(" with config:") && now.says_something()
        {
            // The line of the server's version stands before the engine's.
            let version = now.version.clone();
            all.push(std::mem::replace(&mut now, Start { version, ..Start::default() }));
        }
        now.read(&text);
    }
    all.push(now);
    all.retain(Start::says_something);
    Ok(all)
}

impl Start {
    fn says_something(&self) -> bool {
        self.kv_tokens.is_some()
            || self.blocks.is_some()
            || self.concurrency.is_some()
            || self.weights_gib.is_some()
    }

    fn read(&mut self, line: &str) {
        let least = |old: Option<f64>, new: f64| Some(old.map_or(new, |o| o.min(new)));
        if let Some((head, config)) =
            line.split_once(" with config:").filter(|_| line.contains("Initializing a"))
        {
            self.config = config.trim().to_owned();
            if let Some((_, version)) = head.rsplit_once("(v") {
                self.version = word(version.trim_end_matches(')'));
            }
        } else if let Some((_, version)) = line.split_once("API server version ") {
            self.version = word(version);
        }
        if let Some(tokens) = number_after(line, "GPU KV cache size: ") {
            self.kv_tokens = least(self.kv_tokens, tokens);
        }
        if let Some(blocks) = device_blocks(line) {
            self.blocks = least(self.blocks, blocks);
        }
        for wording in ["block_size=", "'block_size': "] {
            if let Some(size) = number_after(line, wording) {
                self.block_size.get_or_insert(size);
            }
        }
        if let Some((_, rest)) = line.split_once("Maximum concurrency for ")
            && let Some(tokens) = leading_number(rest)
            && let Some(times) = number_after(rest, "per request: ")
            && self.concurrency.is_none_or(|(_, old)| times < old)
        {
            self.concurrency = Some((tokens, times));
        }
        for wording in ["Loading model weights took ", "Model loading took "] {
            if let Some(gib) = number_after(line, wording) {
                self.weights_gib = Some(self.weights_gib.map_or(gib, |old| old.max(gib)));
            }
        }
        // Two digits only: for want of the others.
        if self.weights_gib.is_none() {
            self.weights_gib = number_after(line, "model weights take ");
        }
    }

    /// The value of a key in the engine's configuration.
    fn config(&self, key: &str) -> &str {
        let at = self
            .config
            .split(", ")
            .find_map(|part| part.trim().strip_prefix(key)?.strip_prefix('='));
        at.map_or("", |value| value.trim_matches(['\'', '"', ' ']))
    }

    fn runs(&self, args: &VllmLogArgs, gpu: &str, path: &Path, summary: &mut Summary) -> Vec<Run> {
        let run = self.run(&args.facts, gpu, path);
        let mut rows = Vec::new();
        let mut add =
            |metric: &str, value: f64, note: String, input_len: String| match credible(value) {
                Ok(value) => {
                    rows.push(Run { notes: note, input_len, ..run.with(metric, value) });
                }
                Err(why) => {
                    summary.leave_out(&format!("{metric}: {why}"), || path.display().to_string());
                }
            };
        match (self.kv_tokens, self.blocks) {
            (Some(tokens), _) => add("kv_tokens", tokens, String::new(), String::new()),
            (None, Some(blocks)) => {
                let size = self.block_size.unwrap_or(f64::from(args.block_size));
                let note = format!("{blocks} blocks of {size} tokens");
                add("kv_tokens", blocks * size, note, String::new());
            }
            (None, None) => {}
        }
        if let Some((tokens, times)) = self.concurrency {
            add(
                "max_concurrency",
                times,
                "requests of input_len tokens in all".to_owned(),
                tokens.to_string(),
            );
        }
        if let Some(gib) = self.weights_gib {
            add("weights_gb", gib * GIB / 1e9, "per GPU, 1e9 bytes".to_owned(), String::new());
        }
        rows
    }

    /// What all rows share. Flags go before the log.
    fn run(&self, facts: &RunFacts, gpu: &str, path: &Path) -> Run {
        let given = |flag: &Option<String>, said: &str| flag.clone().unwrap_or_else(|| tame(said));
        let degree = |flag: Option<u32>, key: &str| {
            flag.or_else(|| self.config(key).parse().ok()).filter(|n| *n > 0).unwrap_or(1)
        };
        let tp = degree(facts.tp, "tensor_parallel_size");
        let pp = degree(facts.pp, "pipeline_parallel_size");
        let weights = match self.config("quantization") {
            "" | "None" => match self.config("dtype") {
                "torch.bfloat16" => "bf16",
                "torch.float16" => "fp16",
                "torch.float32" => "fp32",
                _ => "",
            },
            quantised => quantised,
        };
        let kv_dtype = given(&facts.kv_dtype, self.config("kv_cache_dtype"));
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Run {
            source: format!("vllm log {}", tame(&name)),
            gpu: gpu.to_owned(),
            n_gpus: u64::from(tp).saturating_mul(u64::from(pp)).to_string(),
            tp: tp.to_string(),
            pp: pp.to_string(),
            model: given(&facts.model, self.config("model")),
            weight_dtype: given(&facts.weight_dtype, weights),
            kv_policy: kv_policy(&kv_dtype).to_owned(),
            kv_dtype,
            engine: "vllm".to_owned(),
            engine_version: given(&facts.engine_version, &self.version),
            mode: "start-up".to_owned(),
            ..Run::default()
        }
    }
}

fn word(text: &str) -> String {
    tame(text.split([' ', ')', ',', '\n']).next().unwrap_or(""))
}

/// `2,042,016 tokens` -> 2042016.
fn leading_number(text: &str) -> Option<f64> {
    let end =
        text.find(|c: char| !c.is_ascii_digit() && c != ',' && c != '.').unwrap_or(text.len());
    text[..end].replace(',', "").trim_end_matches('.').parse().ok()
}

/// `# GPU blocks: 1952, # CPU blocks: 2048` -> 1952; the device's name differs from build to build.
fn device_blocks(line: &str) -> Option<f64> {
    line.split("# ").skip(1).find_map(|part| {
        let (device, rest) = part.split_once(" blocks: ")?;
        let is_device = device != "CPU" && device.chars().all(char::is_alphanumeric);
        if is_device { leading_number(rest) } else { None }
    })
}

fn number_after(text: &str, wording: &str) -> Option<f64> {
    leading_number(text.split_once(wording)?.1)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const V1: &str = "\
INFO 07-01 10:00:00 [api_server.py:1393] vLLM API server version 0.9.1
INFO 07-01 10:00:01 [core.py:69] Initializing a V1 LLM engine (v0.9.1) with config: model='Qwen/Qwen3-32B', tokenizer='x', dtype=torch.bfloat16, max_seq_len=40960, tensor_parallel_size=2, pipeline_parallel_size=1, quantization=None, kv_cache_dtype=auto, seed=0
(VllmWorker rank=0) INFO [gpu_model_runner.py:1600] Model loading took 30.5894 GiB and 12.1 seconds
(VllmWorker rank=1) INFO [gpu_model_runner.py:1600] Model loading took 30.5895 GiB memory and 12.1 seconds
INFO [kv_cache_utils.py:715] GPU KV cache size: 330,416 tokens
INFO [kv_cache_utils.py:719] Maximum concurrency for 40,960 tokens per request: 8.07x
INFO [kv_cache_utils.py:715] GPU KV cache size: 330,000 tokens
INFO [kv_cache_utils.py:719] Maximum concurrency for 40,960 tokens per request: 8.06x
";
    const V0: &str = "\
INFO 12-20 00:49:35 llm_engine.py:237] Initializing an LLM engine (v0.6.3) with config: model='m/M', dtype=torch.float16, tensor_parallel_size=1, quantization=awq, kv_cache_dtype=fp8
INFO 12-20 model_runner.py:1115] Loading model weights took 14.9888 GB
INFO 12-20 executor_base.py:111] # cuda blocks: 1952, # CPU blocks: 2048
INFO 12-20 executor_base.py:116] Maximum concurrency for 20000 tokens per request: 1.56x
";

    fn imported(text: &[u8]) -> Result<(String, Summary)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.log");
        std::fs::write(&path, text).unwrap();
        let facts = RunFacts {
            gpu: "h100".to_owned(),
            model: None,
            tp: None,
            pp: None,
            weight_dtype: None,
            kv_dtype: None,
            engine_version: None,
        };
        let args = VllmLogArgs { files: vec![path], facts, block_size: 16 };
        let mut summary = Summary::default();
        import(&Catalog::built_in(), &args, dir.path(), &mut summary)?;
        let text = std::fs::read_to_string(dir.path().join("runs.csv")).unwrap_or_default();
        Ok((text, summary))
    }

    #[test]
    fn two_starts_are_six_facts() {
        let (text, summary) = imported(format!("{V1}{V0}").as_bytes()).unwrap();
        let rows: Vec<&str> = text.lines().skip(1).collect();
        let new =
            "vllm log serve.log,,h100-sxm,2,2,1,Qwen/Qwen3-32B,bf16,auto,vllm,0.9.1,start-up,,";
        let old = "vllm log serve.log,,h100-sxm,1,1,1,m/M,awq,fp8,vllm,0.6.3,start-up,,";
        let expected = [
            format!("vllm-log-00001,{new},,none,kv_tokens,330000,"),
            format!(
                "vllm-log-00002,{new}40960,,none,max_concurrency,8.06,requests of input_len tokens in all"
            ),
            // 30.5895 GiB.
            format!("vllm-log-00003,{new},,none,weights_gb,32.84523,\"per GPU, 1e9 bytes\""),
            format!("vllm-log-00004,{old},,fp8-kv,kv_tokens,31232,1952 blocks of 16 tokens"),
            format!(
                "vllm-log-00005,{old}20000,,fp8-kv,max_concurrency,1.56,requests of input_len tokens in all"
            ),
            format!("vllm-log-00006,{old},,fp8-kv,weights_gb,16.0941,\"per GPU, 1e9 bytes\""),
        ];
        assert_eq!(rows, expected);
        assert_eq!(summary.rows_left_out(), 0);
    }

    #[test]
    fn one_line_with_both_facts_is_read() {
        let line = "GPU KV cache size: 123,456 tokens, Maximum concurrency for 4,096 tokens per request: 30.14x";
        let start = &starts(&mut line.as_bytes()).unwrap()[0];
        assert_eq!((start.kv_tokens, start.concurrency), (Some(123_456.0), Some((4096.0, 30.14))));
    }

    #[test]
    fn blocks_of_the_host_do_not_count() {
        assert_eq!(device_blocks("# CPU blocks: 7, # HPU blocks: 12"), Some(12.0));
        assert_eq!(device_blocks("# CPU blocks: 7"), None);
        let take = "Model loading took 0.4678 GB and 1 seconds\nmodel weights take 0.47GiB; x\n";
        let start = &starts(&mut take.as_bytes()).unwrap()[0];
        assert_eq!(start.weights_gib, Some(0.4678));
    }

    #[test]
    fn nonsense_is_left_out() {
        let (text, summary) =
            imported(b"GPU KV cache size: 0 tokens\n\xff\xfe # GPU blocks: ,,\n").unwrap();
        assert_eq!((text.as_str(), summary.rows_left_out()), ("", 2), "{:?}", summary.lines());
        assert!(imported(b"").unwrap().1.lines()[0].contains("no start-up lines"));
    }
}
