//! What is asked of a plan: the placements, policies and schedules to try.

use anyhow::{Result, anyhow, bail};
use batchmax_sim::engine::Engine;
use batchmax_sim::load::{Hit, Schedule, Spread};
use batchmax_sim::lower::LowerError;
use batchmax_sim::op::DType;
use batchmax_sim::parallel::in_order;
use batchmax_sim::place::{Placement, runs_policy};
use batchmax_sim::plan::{Bound, Case, Host, Objective, Query, Slo, plan};
use batchmax_sim::policy::{Policy, Preset, Request, check_with_prefix};
use batchmax_sim::profile::{Lost, Model, Quality};
use batchmax_sim::units::{Bytes, Seconds, Tokens, parse_seconds, parse_tokens};

use super::Plan;
use crate::cli::PlanArgs;
use crate::setting::{self, Places, Wanted};

/// Chunks that are tried beside the preset's own.
const CHUNKS: [Tokens; 2] = [1 << 10, 1 << 12];

/// The model whose measured quality stands for those that were not measured.
const MEASURED: &str = "smollm2-135m";

/// A question; its public parts are what a change changes.
#[derive(Clone)]
pub struct Question<'a> {
    pub places: &'a Places,
    pub args: &'a PlanArgs,
    pub model: Model,
    /// Devices, as typed.
    pub gpus: Vec<String>,
    /// Devices that share a layer.
    pub tps: Vec<u32>,
    /// Whether these were typed: then one that can't be is an error, else it is passed over.
    pub tps_typed: bool,
    pub kvs: Vec<Option<DType>>,
    pub weights: Option<DType>,
    /// Devices there are.
    pub count: u32,
    /// Added to each device's memory.
    pub extra: Bytes,
    pub policies: Vec<Preset>,
    /// What was left out, and why.
    pub left_out: Vec<String>,
    pub schedules: Vec<Schedule>,
    pub isl: Tokens,
    pub osl: Tokens,
    pub spread: Spread,
    pub hit: Hit,
    pub slo: Slo,
    pub batch: Option<u32>,
    pub objective: Objective,
    pub prices: Vec<(String, f64)>,
    /// What policies were measured to lose, where a limit on that was typed.
    pub quality: Option<Quality>,
}

impl<'a> Question<'a> {
    /// From the flags.
    pub fn new(places: &'a Places, args: &'a PlanArgs) -> Result<Self> {
        let model = setting::model(places, &args.model)?;
        let gpus: Vec<String> = args.gpu.split(',').map(str::to_owned).collect();
        let typed = setting::tp_list(args.placement.tp.as_ref())?;
        let widest = typed.iter().max().copied().unwrap_or(1).saturating_mul(args.placement.pp);
        let count = args.gpus.unwrap_or(widest);
        if widest > count {
            bail!("--gpus {count}: --tp and --pp take {widest} GPUs");
        }
        let tps_typed = args.placement.tp.is_some();
        let tps = if tps_typed { typed } else { powers_of_two(count / args.placement.pp) };
        let limit = |text: &Option<String>, flag: &str| -> Result<Option<Seconds>> {
            text.as_ref().map(|t| parse_seconds(t).map_err(|e| anyhow!("{flag}: {e}"))).transpose()
        };
        let schedules = if args.schedule.is_empty() {
            vec![Schedule::Static, Schedule::Staggered { prefill_batch: 1 }]
        } else {
            args.schedule.iter().map(|s| setting::schedule(s)).collect::<Result<_>>()?
        };
        let weights = setting::choice(&args.memory, None, 1, 1)?.weights;
        let mut question = Self {
            places,
            args,
            gpus,
            tps,
            tps_typed,
            kvs: setting::kv_types(&args.memory)?,
            weights,
            count,
            extra: Bytes(0),
            policies: Vec::new(),
            left_out: Vec::new(),
            schedules,
            isl: setting::tokens(&args.isl, "--isl")?,
            osl: setting::tokens(&args.osl, "--osl")?,
            spread: setting::spread(&args.osl_spread)?,
            hit: setting::hit(&args.prefix_hit)?,
            slo: Slo { ttft: limit(&args.ttft, "--ttft")?, tpot: limit(&args.tpot, "--tpot")? },
            batch: setting::batch(&args.batch)?,
            objective: args.objective.parse().map_err(|e| anyhow!("--objective: {e}"))?,
            prices: prices(places, &args.price)?,
            quality: quality(places, args, &model)?,
            model,
        };
        question.choose_policies()?;
        Ok(question)
    }

    /// The policies that were named, or all that the engine can run, each with the budgets and chunks to try.
    fn choose_policies(&mut self) -> Result<()> {
        let args = self.args;
        let catalog = &self.places.catalog;
        let named = !args.policy.is_empty();
        let mut names =
            if named { setting::policies(&args.policy) } else { catalog.policy_names() };
        let engine = args.placement.engine.as_ref().filter(|_| !self.is_local());
        if let (false, Some(engine)) = (named, engine) {
            let engine: Engine = catalog.engine(engine)?;
            let (can, cannot): (Vec<_>, Vec<_>) =
                names.into_iter().partition(|n| runs_policy(&engine, n));
            if !cannot.is_empty() {
                self.left_out.push(format!("{} can't run {}", engine.name, cannot.join(", ")));
            }
            names = can;
        }
        let cache = self.kvs.first().copied().flatten().unwrap_or(DType::F16);
        let model = self.model.clone();
        let request = Request::new(&model, self.isl, cache).with_hit(self.hit.of(self.isl));
        for name in &names {
            for preset in self.variants(name)? {
                if !named && preset.policy.only_if_named() {
                    continue;
                }
                match check_with_prefix(preset.policy.as_ref(), &request) {
                    Err(why) if !named => {
                        self.left_out.push(format!("{}: {}", preset.name, why.problem));
                    }
                    Err(why) => return Err(why.into()),
                    Ok(()) => match self.too_lossy(&preset) {
                        Some(why) => self.left_out.push(format!("{}: {why}", preset.name)),
                        None => self.policies.push(preset),
                    },
                }
            }
        }
        if self.policies.is_empty() {
            bail!("no policy is left to try: {}", self.left_out.join("; "));
        }
        Ok(())
    }

    /// What a policy was measured to lose.
    pub fn lost(&self, policy: &dyn Policy) -> Option<Lost> {
        let cache = self.kvs.first().copied().flatten().unwrap_or(DType::F16);
        let token = Request::new(&self.model, self.isl, cache).token_bytes;
        self.quality.as_ref()?.lost(&policy.label(), policy.prefill_chunk(), self.isl, token)
    }

    /// Why a policy misses --max-kl or --min-recall. What drops nothing misses neither.
    pub fn too_lossy(&self, preset: &Preset) -> Option<String> {
        let quality = self.quality.as_ref()?;
        if !preset.policy.compresses() {
            return None;
        }
        let on = &quality.name;
        let Some(lost) = self.lost(preset.policy.as_ref()) else {
            return Some(format!("its quality was not measured (on {on})"));
        };
        match (self.args.max_kl, self.args.min_recall, lost.recall) {
            (Some(most), ..) if lost.kl > most => {
                Some(format!("KL {:.3} is over {most} (measured on {on})", lost.kl))
            }
            (_, Some(_), None) => Some(format!("its recall was not measured (on {on})")),
            (_, Some(least), Some(recall)) if recall < least => {
                Some(format!("recall {recall:.2} is under {least} (measured on {on})"))
            }
            _ => None,
        }
    }

    /// A preset with other budgets and chunks, where it has such parameters and they were not typed with it.
    fn variants(&self, name: &str) -> Result<Vec<Preset>> {
        let catalog = &self.places.catalog;
        let (base, typed) = name.split_once(':').unwrap_or((name, ""));
        let preset = Preset::parse(catalog, name)?;
        // What was put together by hand is tried as it is.
        if name.contains('+') {
            return Ok(vec![preset]);
        }
        let label = preset.policy.label();
        let open = |key: &str| label.contains(&format!("{key}=")) && !typed.contains(key);
        let listed = |text: &Option<String>| -> Vec<String> {
            text.as_ref().map_or_else(Vec::new, |t| t.split(',').map(str::to_owned).collect())
        };
        let budgets = if open("budget") { listed(&self.args.budget) } else { Vec::new() };
        let mut chunks = if open("chunk") { listed(&self.args.chunk) } else { Vec::new() };
        let own = preset.policy.prefill_chunk();
        if let (true, None, Some(own)) = (open("chunk"), &self.args.chunk, own) {
            let larger = CHUNKS.iter().filter(|c| **c > own && **c < self.isl);
            chunks = [own].iter().chain(larger).map(Tokens::to_string).collect();
        }
        let mut found: Vec<Preset> = Vec::new();
        for budget in some_or_none(&budgets) {
            for chunk in some_or_none(&chunks) {
                let mut changed = Vec::new();
                changed.extend((!typed.is_empty()).then(|| typed.to_owned()));
                changed.extend(budget.map(|b| format!("budget={b}")));
                let whole = |c: &&String| parse_tokens(c).ok() != own;
                changed.extend(chunk.filter(whole).map(|c| format!("chunk={c}")));
                let text = if changed.is_empty() {
                    base.to_owned()
                } else {
                    format!("{base}:{}", changed.join(","))
                };
                let mut preset = Preset::parse(catalog, &text)?;
                preset.name = text;
                if found.iter().all(|f| f.policy.label() != preset.policy.label()) {
                    found.push(preset);
                }
            }
        }
        Ok(found)
    }

    /// Whether it is about devices of this machine alone.
    pub fn is_local(&self) -> bool {
        self.gpus.iter().all(|g| setting::is_local(g))
    }

    /// A preset as typed.
    pub fn preset(&self, text: &str) -> Result<Preset> {
        Ok(Preset::parse(&self.places.catalog, text)?)
    }

    /// How a device was typed: a file is found by its path, not by the name inside it.
    pub fn typed_gpu<'b>(&'b self, name: &'b str) -> &'b str {
        let is = |typed: &&String| self.places.catalog.gpu(typed).is_ok_and(|gpu| gpu.name == name);
        self.gpus.iter().find(is).map_or(name, |typed| typed)
    }

    /// The same question about one candidate's policy and kind of device only.
    pub fn about(&self, preset: Preset, gpu: &str, kv: DType) -> Self {
        let mut only = self.clone();
        only.policies = vec![preset];
        only.gpus.retain(|g| self.resolved(g) == gpu);
        only.kvs = vec![Some(kv)];
        only
    }

    fn resolved(&self, gpu: &str) -> String {
        self.places.catalog.gpu(gpu).map_or_else(|_| gpu.to_owned(), |g| g.name)
    }

    /// All powers of two of devices to a layer, up to what there is.
    pub fn search_tp(&mut self) {
        self.tps = powers_of_two(self.count / self.args.placement.pp);
        self.tps_typed = false;
    }

    fn hosts(&self) -> Result<Vec<Host>> {
        let mut wanted = Vec::new();
        for gpu in &self.gpus {
            for &tp in &self.tps {
                wanted.extend(self.kvs.iter().map(|&kv| (gpu.as_str(), tp, kv)));
            }
        }
        // A device's kernels are unpacked and blended on the way.
        let host = |_: &mut (), index: usize| {
            let (gpu, tp, kv) = wanted[index];
            self.host(gpu, tp, kv)
        };
        let hosts = in_order(wanted.len(), threads(), || (), host)?;
        Ok(hosts.into_iter().flatten().collect())
    }

    /// The host of a placement; `None` where one that was not typed can't be.
    fn host(&self, gpu: &str, tp: u32, kv: Option<DType>) -> Result<Option<Host>> {
        let mut choice = setting::choice(&self.args.memory, kv, tp, self.args.placement.pp)?;
        choice.weights = self.weights;
        let wanted = Wanted {
            model: &self.model,
            gpu,
            engine: self.args.placement.engine.as_deref(),
            choice,
            policies: self.policies.iter().map(|p| p.name.as_str()).collect(),
            schedules: self.schedules.clone(),
            memory: &self.args.memory,
        };
        let mut host = match wanted.host(self.places) {
            Ok(host) => host,
            Err(_) if tp > 1 && !self.tps_typed => return Ok(None),
            Err(error) => return Err(error),
        };
        let limits = &mut host.placement.limits;
        limits.memory += self.extra;
        limits.kv_memory = limits.kv_memory.map(|kv| kv + self.extra);
        let name = &host.placement.gpu.name;
        let price = self.prices.iter().find(|(gpu, _)| gpu == name);
        host.usd_per_hour = price.map_or(host.usd_per_hour, |(_, usd)| Some(*usd));
        if self.objective == Objective::Cost && host.usd_per_hour.is_none() {
            bail!("--objective cost: {name} has no price; hint: --price {name}=USD (per hour)");
        }
        Ok(Some(host))
    }

    /// One of its configurations.
    pub fn case<'b>(
        &self,
        placement: &'b Placement,
        policy: &'b dyn Policy,
        schedule: Schedule,
    ) -> Case<'b> {
        let (isl, osl, spread, hit) = (self.isl, self.osl, self.spread, self.hit);
        Case { placement, policy, isl, osl, spread, hit, schedule }
    }

    /// Searches.
    pub fn plan(&self) -> Result<Plan> {
        let hosts = self.hosts()?;
        let query = Query {
            hosts: &hosts,
            gpus: self.count,
            isl: self.isl,
            osl: self.osl,
            spread: self.spread,
            hit: self.hit,
            slo: self.slo,
            policies: &self.policies,
            schedules: &self.schedules,
            batch: self.batch,
            smaller: self.args.pareto,
            objective: self.objective,
            threads: threads(),
        };
        let (refused, candidates): (Vec<_>, Vec<_>) =
            plan(&query)?.into_iter().partition(|c| c.bound == Bound::Refused);
        let mut left_out = self.left_out.clone();
        for c in refused {
            let Placement { gpu, setup, .. } = &hosts[c.host].placement;
            let preset = self.preset(&c.preset)?;
            let case = self.case(&hosts[c.host].placement, preset.policy.as_ref(), c.schedule);
            let Err(LowerError::Policy(why)) = case.lowered() else { continue };
            let line = format!("{} on {}, --tp {}: {}", c.preset, gpu.name, setup.tp, why.problem);
            if !left_out.contains(&line) {
                left_out.push(line);
            }
        }
        Ok(Plan { hosts, candidates, left_out })
    }
}

/// Cores of this machine: a plan answers the same on any number of them.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The measurements that --max-kl and --min-recall go by: of the model, else of the one that has some.
fn quality(places: &Places, args: &PlanArgs, model: &Model) -> Result<Option<Quality>> {
    let typed = [("--max-kl", args.max_kl, f64::MAX), ("--min-recall", args.min_recall, 1.0)];
    for (flag, value, most) in typed {
        if let Some(value) = value.filter(|v| !(0.0..=most).contains(v)) {
            bail!(
                "{flag} {value}: expected a number from 0{}",
                if most > 1.0 { "" } else { " to 1" }
            );
        }
    }
    if args.max_kl.is_none() && args.min_recall.is_none() {
        return Ok(None);
    }
    match quality_of(places, model)? {
        Some(quality) => Ok(Some(quality)),
        None => bail!(
            "--max-kl, --min-recall: no quality was measured; hint: batchmax quality --summary quality/{MEASURED}.toml"
        ),
    }
}

/// What policies were measured to lose on a model, else on the one that stands for those that were not measured.
pub fn quality_of(places: &Places, model: &Model) -> Result<Option<Quality>> {
    let catalog = &places.catalog;
    match catalog.quality(&model.name)? {
        Some(own) => Ok(Some(own)),
        None => Ok(catalog.quality(MEASURED)?),
    }
}

fn some_or_none(list: &[String]) -> Vec<Option<&String>> {
    if list.is_empty() { vec![None] } else { list.iter().map(Some).collect() }
}

fn powers_of_two(most: u32) -> Vec<u32> {
    (0..32).map(|i| 1u32 << i).take_while(|n| *n <= most.max(1)).collect()
}

fn prices(places: &Places, texts: &[String]) -> Result<Vec<(String, f64)>> {
    let read = |text: &String| {
        let (gpu, usd) = text
            .split_once('=')
            .ok_or_else(|| anyhow!("--price {text}: expected GPU=USD (h100-sxm=2.5)"))?;
        match usd.parse::<f64>() {
            Ok(usd) if usd.is_finite() && usd > 0.0 => Ok((places.catalog.gpu(gpu)?.name, usd)),
            _ => bail!("--price {text}: \"{usd}\" is not a price in USD per hour (2.5)"),
        }
    };
    texts.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::powers_of_two;

    #[test]
    fn devices_to_a_layer_are_powers_of_two() {
        assert_eq!(powers_of_two(0), [1]);
        assert_eq!(powers_of_two(1), [1]);
        assert_eq!(powers_of_two(7), [1, 2, 4]);
        assert_eq!(powers_of_two(8), [1, 2, 4, 8]);
    }
}
