//! `batchmax validate`: one program, predicted and run.

use anyhow::{Result, anyhow};
use batchmax_exec::RunOptions;
use batchmax_exec::machine;
use batchmax_exec::profile::Pace;
use batchmax_sim::cost::calibrated::Provenance;
use batchmax_sim::cost::predict;
use batchmax_sim::memory::{Footprint, kv_shortfall};
use batchmax_sim::metrics::Metrics;
use batchmax_sim::op::{OpKind, Phase};
use batchmax_sim::plan::Case;
use batchmax_sim::probe::yardsticks;
use batchmax_sim::program::Program;
use batchmax_sim::timeline::{Comparison, compare, relative_error};
use batchmax_sim::units::{Bytes, Seconds};
use serde_json::{Value, json};

use crate::cli::{ConfigArgs, Global, ValidateArgs};
use crate::commands::Outcome;
use crate::commands::local::{self, Prose, Trial};
use crate::commands::run::figures;
use crate::commands::target::Target;
use crate::paths::write_whole;
use crate::report::output::csv;
use crate::report::{answer, json, remark, table, typed};
use crate::setting::{self, Configuration, Places};

mod report;

use report::report;

/// Predicts, runs, compares.
pub fn run(places: &Places, args: &ValidateArgs, global: &Global) -> Result<Outcome> {
    let mut target = Target::of(&args.device, global)?;
    target.check_gpu(&args.config.gpu)?;
    let config = ConfigArgs { gpu: target.name().to_owned(), ..args.config.clone() };
    let tolerance = tolerance(&args.tolerance)?;
    // Nobody should profile the machine for a model that it can't run.
    let model = setting::model(places, &args.config.model)?;
    target.check(
        &model,
        setting::setup_here(places, target.name(), &model, &args.config.memory)?.weights,
    )?;
    let configuration = Configuration::resolve(places, &config)?;
    let batch = configuration.batch()?;
    let program = configuration.case().program(batch)?;
    local::check_memory(&configuration, &program)?;
    let prefix = configuration.case().prefix(batch);
    local::check_prefix(prefix.as_ref(), configuration.host.placement.limits.kv_memory)?;
    let wanted = args.weights.weights.as_str();
    let checkpoint = local::checkpoint(places, &args.config.model, wanted)?;
    let threads = target.threads(&args.config.memory)?;
    let weights = local::weights(
        places,
        &args.config.model,
        wanted,
        checkpoint.as_ref(),
        &model,
        configuration.host.placement.setup,
        global,
    )?;
    let synthetic = weights.synthetic;
    let prose = Prose::new(places, checkpoint.as_ref(), &model)?;
    let prompts = prose.prompts(local::requests(&program), configuration.isl);
    drop(checkpoint);
    let activations = configuration.host.placement.setup.activations;
    let place = target.label();
    let held = configuration.host.placement.setup.weights;
    let provenance = target.provenance(&model.name, threads, held);
    let mut executor = target.executor(&model, weights, activations, threads)?;
    let options = RunOptions {
        kv_budget: configuration.host.placement.limits.kv_memory,
        prefix,
        // Where the text decides how much stays, how much did.
        keep_details: kv_shortfall(&program).0 > 0,
        ..RunOptions::default()
    };
    let cost = configuration.host.cost.as_ref();
    let yardsticks = yardsticks(configuration.model(), configuration.host.placement.setup);
    let before = Pace::now(executor.as_mut(), &yardsticks, cost)?;
    // What the yardsticks took is no part of the run's peak.
    if !machine::reset_peak_rss() {
        remark(
            global.quiet,
            "this system keeps no peak of one run: the process's memory is that of all passes",
        );
    }
    let mut trial = local::trial(
        executor.as_mut(),
        &configuration,
        program,
        &prompts,
        &options,
        global,
        &configuration.preset.name,
    )?;
    let pace = before.between(Pace::now(executor.as_mut(), &yardsticks, cost)?);
    let drift = Drift::of(&configuration, &mut trial);
    let comparison = compare(&trial.predicted, &trial.result.timeline);
    let verdict = Verdict::of(&trial, &comparison, pace, tolerance);
    let said = text(&trial, &comparison, &verdict, drift.as_ref(), args.output.markdown);
    if args.output.html.is_some() || args.output.svg.is_some() {
        args.output.write(&report(&trial, &comparison, &said, &place, typed()))?;
    }
    let ran = Ran { configuration: &configuration, provenance, synthetic };
    let result = || document(&trial, &comparison, &verdict, drift.as_ref(), &ran);
    if let Some(path) = &args.out {
        write_whole(path, result())?;
    }
    if global.json {
        answer(&result());
    } else if args.output.csv {
        answer(&csv(&TIMES, &times(&trial, &comparison))?);
    } else {
        answer(&said);
    }
    Ok(if verdict.within { Outcome::Answered } else { Outcome::No })
}

fn tolerance(text: &str) -> Result<f64> {
    let (number, scale) = text.strip_suffix('%').map_or((text, 1.0), |n| (n, 0.01));
    match number.trim().parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value * scale),
        _ => Err(anyhow!("--tolerance {text}: expected a share (0.1) or a percentage (10%)")),
    }
}

/// What the process holds: slower memory is this machine's, too.
fn process(footprint: &Footprint) -> Bytes {
    footprint.total() + footprint.away
}

/// How the whole came out.
struct Verdict {
    total_error: f64,
    /// How the machine's pace has changed since its profile.
    pace: Pace,
    /// The error that would be left at the pace of now.
    error_at_pace: f64,
    kv_equal: bool,
    memory_error: f64,
    tolerance: f64,
    within: bool,
}

impl Verdict {
    fn of(trial: &Trial, comparison: &Comparison, pace: Pace, tolerance: f64) -> Self {
        let result = &trial.result;
        let measured = result.prefill + result.decode;
        let total_error = relative_error(trial.predicted.total().0, measured.0);
        // Equal to the byte, or as far apart as lengths that depend on the text can be.
        let (footprint, result) = (&trial.footprint, &trial.result);
        let kv_equal = footprint.allows(footprint.kv_prefill_peak, result.kv_prefill_peak)
            && footprint.allows(footprint.kv_decode_peak, result.kv_decode_peak);
        Self {
            total_error,
            pace,
            error_at_pace: relative_error(pace.total(&trial.predicted).0, measured.0),
            kv_equal,
            memory_error: relative_error(
                process(&trial.footprint).0 as f64,
                result.peak_rss.0 as f64,
            ),
            tolerance,
            within: total_error.abs() <= tolerance && kv_equal && comparison.unmatched.is_empty(),
        }
    }
}

/// What the text decided otherwise than expected, apart from how long things took.
struct Drift {
    /// Tokens that a layer was expected to keep of a prompt, the mean.
    expected: f64,
    /// Those that it kept.
    kept: f64,
    /// The prediction at the expected counts; that of the trial is made anew for what was kept.
    expected_time: Seconds,
}

impl Drift {
    /// Predicts the run again for the tokens that it really kept.
    fn of(configuration: &Configuration, trial: &mut Trial) -> Option<Self> {
        let kept: Vec<_> = trial.result.sequences.iter().filter_map(|s| s.kept.as_ref()).collect();
        let prompt = f64::from(configuration.isl);
        let layers = kept.first()?.len();
        // All KV heads of a layer, all sequences.
        let share = |layer: usize| {
            let heads = kept.iter().flat_map(|s| &s[layer]);
            let (sum, count) = heads.fold((0, 0), |(sum, n), h| (sum + h.len(), n + 1));
            sum as f64 / f64::from(count.max(1)) / prompt
        };
        let shares: Vec<f64> = (0..layers).map(share).collect();
        let policy = configuration.preset.policy.expecting(&shares, configuration.model())?;
        let case = Case { policy: policy.as_ref(), ..configuration.case() };
        let sequences = u32::try_from(trial.program.header.load.batch()).ok()?;
        let program = case.program(sequences).ok()?;
        let again = predict(configuration.host.cost.as_ref(), &program);
        let expected_time = std::mem::replace(&mut trial.predicted, again).total();
        let mean = |program: &Program| {
            let (mut sum, mut count) = (0.0, 0.0);
            program.visit_passes(|_, pass, _| {
                for (_, block) in pass.blocks() {
                    for op in block.ops.iter().filter(|o| matches!(o.kind, OpKind::Evict { .. })) {
                        for lane in op.lanes.as_slice() {
                            let weight = f64::from(block.times()) * f64::from(lane.sequences);
                            sum += weight * f64::from(lane.keep);
                            count += weight;
                        }
                    }
                }
            });
            sum / f64::max(count, 1.0)
        };
        Some(Self { expected: mean(&trial.program), kept: mean(&program), expected_time })
    }
}

fn document(
    trial: &Trial,
    comparison: &Comparison,
    verdict: &Verdict,
    drift: Option<&Drift>,
    ran: &Ran<'_>,
) -> String {
    let predicted = Metrics::of(&trial.program, &trial.predicted);
    let body = json!({
        "run": ran.document(),
        "predicted": { "metrics": json::metrics(&predicted), "memory": json::footprint(&trial.footprint) },
        "measured": figures(&trial.program, &trial.result),
        "comparison": json::comparison(comparison),
        "total_error": verdict.total_error,
        "pace": { "prefill": verdict.pace.0[0], "decode": verdict.pace.0[1] },
        "error_at_pace": verdict.error_at_pace,
        "memory_error": verdict.memory_error,
        "kv_bytes_equal": verdict.kv_equal,
        "drift": drift.map(|d| json!({
            "expected_tokens": d.expected,
            "kept_tokens": d.kept,
            "expected_time_s": d.expected_time,
        })),
        "tolerance": verdict.tolerance,
        "within_tolerance": verdict.within,
        "synthetic": ran.synthetic,
    });
    json::document("validate", body)
}

/// What ran, and on what.
struct Ran<'a> {
    configuration: &'a Configuration,
    provenance: Provenance,
    synthetic: bool,
}

impl Ran<'_> {
    fn document(&self) -> Value {
        let Configuration { host, preset, isl, osl, hit, schedule, .. } = self.configuration;
        let (placement, on) = (&host.placement, &self.provenance);
        json!({
            "date": on.date,
            "version": on.version,
            "device": placement.gpu.name,
            "devices": placement.setup.tp,
            "processor": on.processor,
            "isa": on.isa,
            "threads": on.threads,
            "model": on.model,
            "preset": preset.name,
            "schedule": schedule.to_string(),
            "isl": isl,
            "osl": osl,
            "prefix_hit": hit.of(*isl),
            "weight_dtype": placement.setup.weights,
            "kv_dtype": placement.setup.kv.dtype,
        })
    }
}

/// Heads of [`times`].
const TIMES: [&str; 7] = ["phase", "op", "predicted", "measured", "error", "share", ""];
/// Heads of [`sizes`].
const SIZES: [&str; 4] = ["memory", "predicted", "measured", "error"];

/// Prediction beside measurement, op by op, and their sums.
fn times(trial: &Trial, comparison: &Comparison) -> Vec<Vec<String>> {
    let measured_total = trial.result.prefill + trial.result.decode;
    let line = |phase: &str, op: &str, p: Seconds, m: Seconds, sign: &str| {
        vec![
            phase.to_owned(),
            op.to_owned(),
            p.to_string(),
            m.to_string(),
            table::percent(relative_error(p.0, m.0)),
            format!("{:.1} %", 100.0 * m.0 / measured_total.0),
            sign.to_owned(),
        ]
    };
    let mut rows = Vec::new();
    for phase in [Phase::Prefill, Phase::Decode] {
        for row in comparison.rows.iter().filter(|r| r.phase == phase) {
            let sign = table::sign(row.source);
            rows.push(line(phase.name(), row.family.name(), row.predicted, row.measured, sign));
        }
        let overhead = |t: &batchmax_sim::timeline::Timeline| t.overhead[phase as usize];
        let (p, m) = (overhead(&trial.predicted), overhead(&trial.result.timeline));
        rows.push(line(phase.name(), "launch", p, m, ""));
        let measured = match phase {
            Phase::Prefill => trial.result.prefill,
            Phase::Decode => trial.result.decode,
        };
        rows.push(line(phase.name(), "all", trial.predicted.phase(phase), measured, ""));
    }
    rows.push(line("total", "", trial.predicted.total(), measured_total, ""));
    rows
}

/// Memory, predicted and measured.
fn sizes(trial: &Trial) -> Vec<Vec<String>> {
    let memory_line = |name: &str, p: Bytes, m: Bytes| {
        let error = table::percent(relative_error(p.0 as f64, m.0 as f64));
        vec![name.to_owned(), p.to_string(), m.to_string(), error]
    };
    let (footprint, result) = (&trial.footprint, &trial.result);
    vec![
        memory_line("kv, prefill peak", footprint.kv_prefill_peak, result.kv_prefill_peak),
        memory_line("kv, decode peak", footprint.kv_decode_peak, result.kv_decode_peak),
        memory_line("process", process(footprint), result.peak_rss),
    ]
}

fn text(
    trial: &Trial,
    comparison: &Comparison,
    verdict: &Verdict,
    drift: Option<&Drift>,
    markdown: bool,
) -> String {
    let rows = times(trial, comparison);
    let memory = sizes(trial);
    let footprint = &trial.footprint;
    let (times, sizes) = if markdown {
        (table::markdown(&TIMES, &rows), table::markdown(&SIZES, &memory))
    } else {
        (table::table(&TIMES, rows, 2), table::table(&SIZES, memory, 1))
    };
    let load = &trial.program.header.load;
    let unmatched = match comparison.unmatched.len() {
        0 => String::new(),
        n => format!("\n{n} ops are on one side only: this is a bug, please report it"),
    };
    let drifted = drift.map_or_else(String::new, |d| {
        format!(
            "\nlayers kept {:.0} tokens of a prompt, {:.0} were expected ({}): the times above are predicted for what was kept, {} for what was expected",
            d.kept,
            d.expected,
            table::percent(relative_error(d.expected, d.kept)),
            d.expected_time,
        )
    });
    let [prefill, decode] = verdict.pace.0;
    let paced = format!(
        "\nbefore and after, the machine took {prefill:.2} times as long to read and {decode:.2} times as long to generate as in its profile; at that pace the error is {}",
        table::percent(verdict.error_at_pace)
    );
    format!(
        "{} · {} · batch {}{} · {} schedule\n\n{times}\n\n{sizes}\n{unmatched}{drifted}{paced}\n{} total time {} (tolerance {:.0} %), KV bytes {}",
        trial.program.header.model,
        trial.program.header.policy,
        load.batch(),
        local::in_turn(load),
        load.schedule,
        if verdict.within { "within tolerance:" } else { "beyond tolerance:" },
        table::percent(verdict.total_error),
        verdict.tolerance * 100.0,
        match (verdict.kv_equal, footprint.kv_spread.0) {
            (true, 0) => "equal".to_owned(),
            (true, _) => format!("within the spread of {}", footprint.kv_spread),
            (false, _) => "differ".to_owned(),
        },
    )
}
