//! What people mean: names resolved, quantities read, defaults filled in.

mod host;
mod places;

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use batchmax_sim::load::{Hit, Schedule, Spread};
use batchmax_sim::op::DType;
use batchmax_sim::plan::{Case, Host, LARGEST_BATCH};
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::Model;
use batchmax_sim::units::{Tokens, parse_tokens};

pub use host::{Hosts, Wanted, choice, setup_here, threads};
#[cfg(feature = "exec")]
pub use host::{exact_setup, threads_on};
pub use places::Places;

use crate::cli::{ConfigArgs, MemoryArgs, PlacementArgs};

/// The device that is this machine's processor.
pub const LOCAL: &str = "cpu";
/// How the names of this machine's GPUs begin, once they have been timed here.
const CUDA: &str = "cuda-";
/// The policy that compression is compared with.
pub const UNCOMPRESSED: &str = "full";

/// Whether a device is one of this machine: timed here, and able to run.
pub fn is_local(device: &str) -> bool {
    device == LOCAL || device.starts_with(CUDA)
}

/// GPUs of this machine that share each layer under a name: 2 of `cuda-2x-nvidia-h100-80gb-hbm3`.
pub fn devices_of(device: &str) -> u32 {
    let count = device.strip_prefix(CUDA).and_then(|rest| rest.split_once("x-"));
    count.and_then(|(count, _)| count.parse().ok()).unwrap_or(1)
}

/// What `--device` calls a device of this machine; of GPUs the first ones.
pub fn device_flag(device: &str) -> String {
    match devices_of(device) {
        _ if device == LOCAL => LOCAL.to_owned(),
        1 => "cuda".to_owned(),
        count => {
            format!("cuda:{}", (0..count).map(|i| i.to_string()).collect::<Vec<_>>().join(","))
        }
    }
}

/// The part of a model that each device of a name has.
pub fn part(device: &str, model: &Model) -> Result<Model> {
    model.shard_layers(devices_of(device)).map_err(|why| anyhow!("--device: {why}"))
}

/// What a GPU of this machine is called where devices are named: `cuda-nvidia-h100-80gb-hbm3`; several that share each layer,
/// `2x NVIDIA H100 80GB HBM3`, are `cuda-2x-...`.
#[cfg(feature = "exec")]
pub fn cuda_name(card: &str) -> String {
    let words = card.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty());
    format!("{CUDA}{}", words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-"))
}

/// One token count.
pub fn tokens(text: &str, flag: &str) -> Result<Tokens> {
    let tokens = parse_tokens(text).map_err(|e| anyhow!("{flag}: {e}"))?;
    if tokens == 0 {
        bail!("{flag} 0: at least one token is needed");
    }
    Ok(tokens)
}

/// `1,2,4`, `2k..32k` (doubling from the first to the last) or both mixed.
pub fn token_list(text: &str, flag: &str) -> Result<Vec<Tokens>> {
    let mut list = Vec::new();
    for part in text.split(',') {
        match part.split_once("..") {
            Some((from, to)) => {
                let (mut at, to) = (tokens(from, flag)?, tokens(to, flag)?);
                if at > to {
                    bail!("{flag} {part}: a range goes from the smaller to the larger");
                }
                while at < to {
                    list.push(at);
                    at = at.saturating_mul(2);
                }
                list.push(to);
            }
            None => list.push(tokens(part, flag)?),
        }
    }
    Ok(list)
}

/// A batch, or `None` for the largest that fits.
pub fn batch(text: &str) -> Result<Option<u32>> {
    if text == "max" {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(0) => bail!("--batch 0: at least one sequence is needed"),
        Ok(n) if n <= LARGEST_BATCH => Ok(Some(n)),
        Ok(n) => bail!("--batch {n}: at most {LARGEST_BATCH} sequences are searched"),
        Err(_) => bail!("--batch {text}: expected a number of sequences, or max"),
    }
}

/// Names of policies: a comma parts them, unless a parameter of the same policy follows.
pub fn policies(typed: &[String]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for text in typed {
        let mut first = true;
        for part in text.split(',') {
            let parameter = part.split_once('=').is_some_and(|(key, _)| !key.contains(':'));
            match all.last_mut() {
                Some(last) if parameter && !first => {
                    last.push(',');
                    last.push_str(part);
                }
                _ => all.push(part.trim().to_owned()),
            }
            first = false;
        }
    }
    all
}

/// Batches: `1,2,4`, `1..64` (doubling), or max.
pub fn batch_list(text: &str) -> Result<Vec<Option<u32>>> {
    let mut list = Vec::new();
    for part in text.split(',') {
        let Some((from, to)) = part.split_once("..") else {
            list.push(batch(part)?);
            continue;
        };
        let (Some(mut at), Some(to)) = (batch(from)?, batch(to)?) else {
            bail!("--batch {part}: a range goes from a number to a number");
        };
        if at > to {
            bail!("--batch {part}: a range goes from the smaller to the larger");
        }
        while at < to {
            list.push(Some(at));
            at = at.saturating_mul(2);
        }
        list.push(Some(to));
    }
    Ok(list)
}

/// Numbers of devices that share a layer; 1 where none is given.
pub fn tp_list(text: Option<&String>) -> Result<Vec<u32>> {
    let Some(text) = text else { return Ok(vec![1]) };
    text.split(',')
        .map(|part| match part.parse() {
            Ok(n) if (1..=1024).contains(&n) => Ok(n),
            _ => Err(anyhow!("--tp {part}: expected a number of GPUs from 1 to 1024")),
        })
        .collect()
}

/// Types of the cache; `None` is the default.
pub fn kv_types(memory: &MemoryArgs) -> Result<Vec<Option<DType>>> {
    let Some(text) = &memory.kv_dtype else { return Ok(vec![None]) };
    text.split(',').map(|part| dtype(Some(&part.to_owned()), "--kv-dtype")).collect()
}

fn dtype(text: Option<&String>, flag: &str) -> Result<Option<DType>> {
    text.map(|t| t.parse().map_err(|e| anyhow!("{flag}: {e}"))).transpose()
}

/// Refuses what this machine's CPU has not: other engines, more devices.
pub fn refuse_devices(placement: &PlacementArgs) -> Result<()> {
    let tps = tp_list(placement.tp.as_ref())?;
    let most = tps.into_iter().max().unwrap_or(1);
    host::check_local(placement.engine.as_deref(), most, placement.pp)
}

/// What of this machine runs.
#[cfg(feature = "exec")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// The best there is.
    Auto,
    /// Its processor.
    Cpu,
    /// GPUs, by their indices; several share each layer.
    Cuda(Vec<u32>),
}

/// `auto`, `cpu`, `cuda`, `cuda:1` or `cuda:0,1`.
#[cfg(feature = "exec")]
pub fn device(text: &str) -> Result<Device> {
    let indices = match text.split_once(':') {
        None if text == "auto" => return Ok(Device::Auto),
        None if text == LOCAL => return Ok(Device::Cpu),
        None if text == "cuda" => Some(vec![0]),
        Some(("cuda", indices)) => indices.split(',').map(|i| i.parse().ok()).collect(),
        _ => None,
    };
    let Some(indices) = indices else {
        bail!(
            "--device {text}: expected auto, cpu, cuda, cuda:N or cuda:N,M; hint: batchmax devices lists what there is"
        )
    };
    let mut sorted = indices.clone();
    sorted.sort_unstable();
    match sorted.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => bail!("--device {text}: cuda:{} is named twice", two[0]),
        None => Ok(Device::Cuda(indices)),
    }
}

/// How much of each prompt is cached.
pub fn hit(text: &str) -> Result<Hit> {
    text.parse().map_err(|e| anyhow!("--prefix-hit: {e}"))
}

/// How far answers lie apart.
pub fn spread(text: &str) -> Result<Spread> {
    text.parse().map_err(|e| anyhow!("--osl-spread: {e}"))
}

/// A schedule.
pub fn schedule(text: &str) -> Result<Schedule> {
    text.parse().map_err(|e| anyhow!("--schedule: {e}"))
}

/// One resolved configuration.
pub struct Configuration {
    /// Where it runs.
    pub host: Host,
    /// The policy.
    pub preset: Preset,
    /// Prompt tokens.
    pub isl: Tokens,
    /// Generated tokens, the mean.
    pub osl: Tokens,
    /// How far answers lie apart.
    pub spread: Spread,
    /// How much of each prompt is cached.
    pub hit: Hit,
    /// The batch, or the largest that fits.
    pub batch: Option<u32>,
    /// Who runs when.
    pub schedule: Schedule,
}

impl Configuration {
    /// From the flags.
    pub fn resolve(places: &Places, args: &ConfigArgs) -> Result<Self> {
        let model = model(places, &args.model)?;
        let preset = Preset::parse(&places.catalog, &args.policy)?;
        let schedule = schedule(&args.schedule)?;
        let wanted = Wanted::of(args, &model, &preset, schedule)?;
        Ok(Self {
            host: wanted.host(places)?,
            isl: tokens(&args.isl, "--isl")?,
            osl: tokens(&args.osl, "--osl")?,
            spread: spread(&args.osl_spread)?,
            hit: hit(&args.prefix_hit)?,
            batch: batch(&args.batch)?,
            schedule,
            preset,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.host.placement.model
    }

    /// As the planner's case.
    pub fn case(&self) -> Case<'_> {
        Case {
            placement: &self.host.placement,
            policy: self.preset.policy.as_ref(),
            isl: self.isl,
            osl: self.osl,
            spread: self.spread,
            hit: self.hit,
            schedule: self.schedule,
        }
    }

    /// The batch that was asked for, or the largest that fits; an error where nothing fits.
    pub fn batch(&self) -> Result<u32> {
        if let Some(batch) = self.batch {
            return Ok(batch);
        }
        let (largest, over) = self.case().largest_batch(LARGEST_BATCH)?;
        if largest == 0 {
            bail!(
                "not even one sequence fits: {} more {} is needed; hint: a policy with a smaller budget, or more memory",
                over.by,
                over.bound.name()
            );
        }
        Ok(largest)
    }
}

/// A model by name: built in, the user's, fetched, or a file.
pub fn model(places: &Places, name: &str) -> Result<Model> {
    match places.catalog.model(name) {
        Ok(model) => Ok(model),
        Err(error) => match located(places, name) {
            Some(path) => Ok(places.catalog.model(&path.display().to_string())?),
            None => Err(error.into()),
        },
    }
}

#[cfg(feature = "exec")]
fn located(places: &Places, name: &str) -> Option<PathBuf> {
    batchmax_exec::fetch::locate(&places.data_dir, name)
}

#[cfg(not(feature = "exec"))]
fn located(_places: &Places, _name: &str) -> Option<PathBuf> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_part_policies_not_their_parameters() {
        let typed = [
            "full,batch-max:budget=25%,chunk=256,kivi".to_owned(),
            "snapkv+kivi:bits=4".to_owned(),
        ];
        let wanted = ["full", "batch-max:budget=25%,chunk=256", "kivi", "snapkv+kivi:bits=4"];
        assert_eq!(policies(&typed), wanted);
        assert_eq!(
            policies(&["a=b".to_owned()]),
            ["a=b"],
            "what has no name is told as it was typed"
        );
    }

    #[test]
    fn lists_and_ranges() {
        assert_eq!(token_list("1k,2k", "--isl").expect("list"), [1024, 2048]);
        assert_eq!(token_list("2k..16k", "--isl").expect("range"), [2048, 4096, 8192, 16384]);
        assert_eq!(token_list("3..10", "--isl").expect("range"), [3, 6, 10]);
        assert!(token_list("8k..2k", "--isl").is_err());
        assert!(token_list("0", "--isl").is_err());
    }

    #[test]
    fn several_batches_are_named_as_such() {
        assert_eq!(batch_list("1,4,max").expect("list"), [Some(1), Some(4), None]);
        assert_eq!(batch_list("2..9").expect("range"), [Some(2), Some(4), Some(8), Some(9)]);
        let error = |text: &str| batch_list(text).expect_err("refused").to_string();
        assert_eq!(error("0"), "--batch 0: at least one sequence is needed");
        assert_eq!(error("1,65537"), "--batch 65537: at most 65536 sequences are searched");
        assert!(error("8..2").contains("from the smaller") && error("1..max").contains("number"));
    }

    #[cfg(feature = "exec")]
    #[test]
    fn devices() {
        assert_eq!(device("cpu").expect("cpu"), Device::Cpu);
        assert_eq!(device("cuda").expect("cuda"), Device::Cuda(vec![0]));
        assert_eq!(device("cuda:12").expect("cuda"), Device::Cuda(vec![12]));
        assert_eq!(device("cuda:1,0").expect("two"), Device::Cuda(vec![1, 0]));
        assert_eq!(devices_of(&cuda_name("2x NVIDIA H100 80GB HBM3")), 2);
        assert_eq!(devices_of(&cuda_name("NVIDIA H100 80GB HBM3")), 1);
        assert_eq!(devices_of(LOCAL), 1);
        let flags = [LOCAL, "cuda-nvidia-l4", "cuda-3x-nvidia-l4"].map(device_flag);
        assert_eq!(flags, ["cpu", "cuda", "cuda:0,1,2"]);
        for flag in flags {
            device(&flag).expect("one that is understood");
        }
        assert_eq!(device("auto").expect("a choice"), Device::Auto);
        let twice = device("cuda:3,1,3").expect_err("twice").to_string();
        assert!(twice.contains("cuda:3 is named twice"), "{twice}");
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "h100-sxm"] {
            assert!(device(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn batches() {
        assert_eq!(batch("max").expect("max"), None);
        assert_eq!(batch("12").expect("12"), Some(12));
        assert!(batch("0").is_err() && batch("-1").is_err() && batch("9999999").is_err());
    }
}
