//! `batchmax profile`: times this machine's kernels and fits them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use batchmax_exec::devices;
use batchmax_exec::profile::{Condition, Measurements, calibrate};
use batchmax_exec::weights::Weights;
use batchmax_sim::cost::calibrated::KernelProfile;
use batchmax_sim::policy::Preset;
use batchmax_sim::probe::{GridLimits, Probe, grid};
use serde_json::json;

use crate::cli::{Global, MemoryArgs, ProfileArgs};
use crate::commands::target::{Target, described, measured_device};
use crate::commands::{Outcome, local};
use crate::paths::write_whole;
use crate::report::{answer, json, progress, remark, table};
use crate::setting::{self, LOCAL, Places};

/// Layers of the synthetic model that is timed: enough that no weight stays in the caches between two uses.
const LAYERS: u32 = 12;
/// How often a GPU is asked at what it runs.
const CONDITIONS: usize = 16;

/// Profiles and calibrates.
pub fn run(places: &Places, args: &ProfileArgs, global: &Global) -> Result<Outcome> {
    let mut target = Target::of(&args.device, global)?;
    let threads = setting::threads_on(target.name(), &args.memory)?;
    let model = setting::model(places, &args.model)?;
    let weights = setting::setup_here(places, target.name(), &model, &args.memory)?.weights;
    let path = args
        .out
        .clone()
        .unwrap_or_else(|| places.measurements_path(target.name(), threads, weights));
    let names = if args.policy.is_empty() {
        places.catalog.policy_names()
    } else {
        setting::policies(&args.policy)
    };
    let (rounds, restart) = (args.rounds, args.restart);
    let wanted = Wanted { model: &args.model, policies: &names, rounds, restart };
    let profile = measure(places, &mut target, &wanted, &args.memory, &path, global)?;
    if global.json {
        answer(&json::document("profile", json!({ "profile": profile })));
    } else {
        answer(&summary(&profile));
    }
    Ok(Outcome::Answered)
}

/// What is to be timed.
pub struct Wanted<'a> {
    /// The model whose shapes are timed.
    pub model: &'a str,
    /// Policies whose own kernels are timed.
    pub policies: &'a [String],
    /// Passes over all kernels.
    pub rounds: u32,
    /// Forget an interrupted profile.
    pub restart: bool,
}

/// Times the grid (going on where an interrupted profile stopped), fits it and writes both files.
pub fn measure(
    places: &Places,
    target: &mut Target,
    wanted: &Wanted<'_>,
    memory: &MemoryArgs,
    path: &Path,
    global: &Global,
) -> Result<KernelProfile> {
    let threads = target.threads(memory)?;
    let mut model = setting::model(places, wanted.model)?;
    let policies = wanted
        .policies
        .iter()
        .map(|name| Ok(Preset::parse(&places.catalog, name)?.policy))
        .collect::<Result<Vec<_>>>()?;
    let setup = setting::setup_here(places, target.name(), &model, memory)?;
    target.check(&model, setup.weights)?;
    let runtime = target.in_use()?;
    model.layers = model.layers.min(LAYERS);
    let part = setting::part(target.name(), &model)?;
    let weights = setup.weights.bytes(part.parameters());
    let most = target.memory()?;
    if weights > most {
        bail!(
            "{LAYERS} layers of {} take {weights}, {} may take {most}; hint: a smaller model, or --weight-dtype bf16",
            model.name,
            target.label(),
        );
    }
    let grid = || grid(&part, setup, GridLimits::default(), &policies);
    let probes: Vec<Probe> = (0..wanted.rounds).flat_map(|_| grid()).collect();
    let provenance = target.provenance(&model.name, threads, setup.weights);
    let partial = path.with_extension("partial.json");
    let resumed = if wanted.restart { None } else { read_partial(&partial) };
    let mut measurements = match resumed {
        Some(old) if old.matches(&provenance, probes.len()) => {
            remark(
                global.quiet,
                &format!("going on after {} of {} probes", old.done, probes.len()),
            );
            old
        }
        _ => Measurements::new(provenance, probes.len(), runtime),
    };
    let index = target.index();
    let weights = Weights::synthetic_with_head(&model, setup.weights, setup.head)?;
    let label = format!("profiling {}", target.label());
    let mut executor = target.executor(&model, weights, setup.activations, threads)?;
    let total: f64 = probes.iter().map(|p| p.weight).sum();
    let done: Vec<f64> = probes
        .iter()
        .scan(0.0, |sum, p| {
            *sum += p.weight;
            Some(*sum)
        })
        .collect();
    let bar = progress::bar(global, 1000, &label);
    // Asked between probes, when the clocks are still those of the work.
    let mut conditions = Vec::new();
    let timed = measurements.go_on(executor.as_mut(), &probes, local::interrupted(), &mut |now| {
        let thousandths = (1000.0 * done[now.done - 1] / total) as u64;
        bar.set_position(thousandths);
        if now.done % now.probes.div_ceil(CONDITIONS).max(1) == 0 {
            let found = index.and_then(devices::conditions);
            conditions.extend(found.map(|found| Condition::of(now.done, found)));
        }
        local::progress_line(global, thousandths, 1000, "timing this machine");
    });
    bar.finish_and_clear();
    drop(executor);
    measurements.conditions.extend(conditions);
    if let Err(error) = timed {
        if measurements.done > 0 {
            write_whole(&partial, &serde_json::to_string(&measurements)?)?;
            // What it was decides the exit code.
            let kept = format!(
                "{} of {} probes are kept; hint: the same command goes on from there",
                measurements.done, measurements.probes
            );
            return Err(anyhow::Error::new(error).context(kept));
        }
        return Err(error.into());
    }
    write_whole(path, &serde_json::to_string_pretty(&measurements)?)?;
    std::fs::remove_file(&partial).ok();
    store(places, &measurements, Some(target))
}

/// An interrupted profile; a file that can't be read starts over.
fn read_partial(path: &Path) -> Option<Measurements> {
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

/// Fits measurements and writes the profile and the description of the device, which keeps what it was described as where the
/// device itself (`target`) is not here.
pub fn store(
    places: &Places,
    measurements: &Measurements,
    target: Option<&Target>,
) -> Result<KernelProfile> {
    let device = measured_device(&measurements.measured);
    let profile = calibrate(measurements, &device);
    let threads = measurements.measured.threads as usize;
    let gpu = match target {
        Some(target) => described(&profile, target),
        None if device == LOCAL => described(&profile, &Target::cpu()),
        None => places.catalog.gpu(&device).with_context(|| {
            format!("measurements of {device}; hint: its description goes to gpus/{device}.toml")
        })?,
    };
    let path = places.kernel_profile_path(&device, threads, measurements.measured.weights);
    write_whole(&path, &toml::to_string(&profile)?)?;
    let path = places.data_dir.join("gpus").join(format!("{device}.toml"));
    write_whole(&path, &toml::to_string(&gpu)?)?;
    Ok(profile)
}

/// What was fitted, and how well.
pub fn summary(profile: &KernelProfile) -> String {
    let m = &profile.measured;
    let rows = profile.families.iter().map(|f| {
        vec![
            f.family.name().to_owned(),
            f.points.len().to_string(),
            format!("{:.1} us", f.launch_s * 1e6),
            format!("{:.1}", f.flops_per_s / 1e9),
            format!("{:.1}", f.bytes_per_s / 1e9),
            f.left_out.points.to_string(),
            format!("{:.1} %", f.left_out.median * 100.0),
            format!("{:.1} %", f.left_out.p90 * 100.0),
        ]
    });
    let head = ["op", "points", "launch", "GFLOP/s", "GB/s", "left out", "median", "p90"];
    format!(
        "{} · {} threads · {} · {} · weights {}\n\n{}\n\nmedian and p90: error on points that their own prediction did not see",
        m.processor,
        m.threads,
        m.isa,
        m.date,
        m.weights,
        table::table(&head, rows.collect(), 1)
    )
}
