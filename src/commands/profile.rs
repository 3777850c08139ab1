//! `batchmax profile`: times this machine's kernels and fits them.

use std::path::Path;

use anyhow::{Result, bail};
use batchmax_exec::machine;
use batchmax_exec::profile::{Measurements, calibrate};
use batchmax_exec::weights::{Weights, check_executable};
use batchmax_sim::cost::calibrated::KernelProfile;
use batchmax_sim::op::{DType, Family};
use batchmax_sim::policy::Preset;
use batchmax_sim::probe::{GridLimits, Probe, grid};
use batchmax_sim::profile::{Gpu, Peaks};
use batchmax_sim::units::Bytes;
use serde_json::json;

use crate::cli::{Global, MemoryArgs, ProfileArgs};
use crate::commands::{Outcome, devices, local};
use crate::paths::write_whole;
use crate::report::{answer, json, progress, remark, table};
use crate::setting::{self, LOCAL, Places};

/// Layers of the synthetic model that is timed: enough that no weight stays in the caches between two uses.
const LAYERS: u32 = 12;

/// Profiles and calibrates.
pub fn run(places: &Places, args: &ProfileArgs, global: &Global) -> Result<Outcome> {
    devices::ready(&args.device)?;
    let threads = setting::threads(&args.memory)?;
    let model = setting::model(places, &args.model)?;
    let weights = setting::setup_here(places, LOCAL, &model, &args.memory)?.weights;
    let path =
        args.out.clone().unwrap_or_else(|| places.measurements_path(LOCAL, threads, weights));
    let names = if args.policy.is_empty() {
        places.catalog.policy_names()
    } else {
        setting::policies(&args.policy)
    };
    let (rounds, restart) = (args.rounds, args.restart);
    let wanted = Wanted { model: &args.model, policies: &names, rounds, restart };
    let profile = measure(places, &wanted, &args.memory, &path, global)?;
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
    wanted: &Wanted<'_>,
    memory: &MemoryArgs,
    path: &Path,
    global: &Global,
) -> Result<KernelProfile> {
    let threads = local::threads(memory)?;
    let mut model = setting::model(places, wanted.model)?;
    let policies = wanted
        .policies
        .iter()
        .map(|name| Ok(Preset::parse(&places.catalog, name)?.policy))
        .collect::<Result<Vec<_>>>()?;
    let setup = setting::setup_here(places, LOCAL, &model, memory)?;
    check_executable(&model, setup.weights)?;
    let runtime = machine::rss();
    model.layers = model.layers.min(LAYERS);
    let weights = setup.weights.bytes(model.parameters());
    if weights > local::machine_memory() {
        bail!(
            "{LAYERS} layers of {} take {weights}, this machine has {}; hint: a smaller model, or --weight-dtype bf16",
            model.name,
            machine::memory()
        );
    }
    let grid = || grid(&model, setup, GridLimits::default(), &policies);
    let probes: Vec<Probe> = (0..wanted.rounds).flat_map(|_| grid()).collect();
    let provenance = local::provenance(&model.name, threads, setup.weights);
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
    let mut executor = local::engine(
        &model,
        Weights::synthetic_with_head(&model, setup.weights, setup.head)?,
        threads,
    );
    let total: f64 = probes.iter().map(|p| p.weight).sum();
    let done: Vec<f64> = probes
        .iter()
        .scan(0.0, |sum, p| {
            *sum += p.weight;
            Some(*sum)
        })
        .collect();
    let bar = progress::bar(global, 1000, "profiling this machine");
    let timed = measurements.go_on(&mut executor, &probes, local::interrupted(), &mut |now| {
        let thousandths = (1000.0 * done[now.done - 1] / total) as u64;
        bar.set_position(thousandths);
        local::progress_line(global, thousandths, 1000, "timing this machine");
    });
    bar.finish_and_clear();
    if let Err(error) = timed {
        if measurements.done > 0 {
            write_whole(&partial, &serde_json::to_string(&measurements)?)?;
            bail!(
                "{error}: {} of {} probes are kept; hint: the same command goes on from there",
                measurements.done,
                measurements.probes
            );
        }
        return Err(error.into());
    }
    write_whole(path, &serde_json::to_string_pretty(&measurements)?)?;
    std::fs::remove_file(&partial).ok();
    store(places, &measurements)
}

/// An interrupted profile; a file that can't be read starts over.
fn read_partial(path: &Path) -> Option<Measurements> {
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

/// Fits measurements and writes the profile and the description of this machine.
pub fn store(places: &Places, measurements: &Measurements) -> Result<KernelProfile> {
    let profile = calibrate(measurements, LOCAL);
    let threads = measurements.measured.threads as usize;
    let path = places.kernel_profile_path(LOCAL, threads, measurements.measured.weights);
    write_whole(&path, &toml::to_string(&profile)?)?;
    let gpu = this_machine(&profile);
    let path = places.data_dir.join("gpus").join(format!("{LOCAL}.toml"));
    write_whole(&path, &toml::to_string(&gpu)?)?;
    Ok(profile)
}

/// The machine as a device: its peaks are what its own kernels reached.
fn this_machine(profile: &KernelProfile) -> Gpu {
    let best = |rate: fn(&batchmax_sim::cost::calibrated::Point) -> f64| {
        profile
            .families
            .iter()
            .filter(|f| matches!(f.family, Family::Gemm | Family::AttendDecode))
            .flat_map(|f| &f.points)
            .map(|p| rate(p) / p.seconds)
            .fold(1.0, f64::max)
    };
    Gpu {
        name: LOCAL.to_owned(),
        label: profile.measured.processor.clone(),
        aliases: Vec::new(),
        arch: std::env::consts::ARCH.to_owned(),
        memory_bytes: machine::memory().max(Bytes(1)),
        bandwidth_bytes_per_s: best(|p| p.bytes),
        peak_flops_per_s: Peaks { f32: Some(best(|p| p.flops)), ..Peaks::default() },
        processors: machine::cores() as u32,
        l2_bytes: machine::last_level_cache(),
        clock_hz: None,
        power_w: None,
        link: None,
        link_bytes_per_s: None,
        host_link: None,
        usd_per_hour: None,
        source: format!("batchmax profile, {}", profile.measured.date),
        unsure: Vec::new(),
    }
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
        DType::F32,
        table::table(&head, rows.collect(), 1)
    )
}
