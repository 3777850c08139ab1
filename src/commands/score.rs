//! `batchmax score`: published runs, predicted.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use batchmax_sim::engine::Generation;
use batchmax_sim::engine_fit::{Observed, leave_clusters_out};
use batchmax_sim::runs::{BadLines, Metric, Prediction, Predictor, Question, Row, read_rows};
use batchmax_sim::surface::Library;
use serde_json::json;

use crate::cli::{Global, RunFiles, ScoreArgs};
use crate::commands::Outcome;
use crate::paths::write_whole;
use crate::report::output::csv;
use crate::report::{answer, json, progress, table, typed};
use crate::setting::Places;

mod report;

use report::report;

/// What groups runs.
const BY_TIER: [&str; 3] = ["tier", "devices", "metric"];
/// The same, and who measured what.
const BY_CLUSTER: [&str; 6] = ["tier", "devices", "metric", "engine", "device", "mode"];

/// A predicted row with what groups it.
struct Scored {
    tier: String,
    single: bool,
    cluster: (String, String),
    mode: String,
    prediction: Prediction,
}

/// Scores.
pub fn run(places: &Places, args: &ScoreArgs, global: &Global) -> Result<Outcome> {
    let Files { rows, bad, tiers, without } = Files::read(&args.files)?;
    let library = Library::new(places.catalog.clone(), places.own_surfaces()?);
    let mut predictor = Predictor::new(&places.catalog, &library);
    let understood = understand(places, &rows, &without);
    let generations = if args.cross_validate {
        let mut bar = progress::Late::new(global, rows.len() as u64, "fitting engines");
        let observed =
            observe(&rows, &understood, &mut predictor, &tiers, None, &mut || bar.step());
        Some(leave_clusters_out(&observed))
    } else {
        None
    };
    let bar = progress::bar(global, understood.len() as u64, "predicting");
    let answers: Vec<Result<Prediction, String>> = understood
        .iter()
        .map(|question| {
            bar.inc(1);
            let q = question.as_ref().map_err(Clone::clone)?;
            let shipped = q.engine.generation(q.year);
            let key = (q.gpu.name.clone(), q.engine.name.clone(), shipped.since);
            let generation = generations.as_ref().and_then(|g| g.get(&key)).unwrap_or(shipped);
            predictor.predict(q, generation)
        })
        .collect();
    bar.finish_and_clear();
    let mut scored = Vec::new();
    for ((row, question), prediction) in rows.iter().zip(&understood).zip(&answers) {
        if let (Ok(q), Ok(prediction)) = (question, prediction) {
            let tier = tiers.get(&row.id).cloned().unwrap_or_default();
            scored.push(Scored {
                tier,
                single: q.setup.tp * q.pp == 1 && q.replicas < 1.5,
                cluster: (q.gpu.name.clone(), q.engine.name.clone()),
                mode: row.mode.clone(),
                prediction: *prediction,
            });
        }
    }
    if let Some(out) = &args.out {
        write_whole(out, &predictions_csv(&rows, &answers)?)?;
    }
    let refused = refusals(&answers, &bad, &args.files.runs);
    let page = match args.output.wants_report() {
        true => Some(report(&scored, &refused, typed())),
        false => None,
    };
    if let Some(page) = &page {
        args.output.write(page)?;
    }
    if global.json {
        answer(&json::document("score", document(&scored, &refused)));
    } else if args.output.csv {
        let head: Vec<&str> = BY_CLUSTER.iter().copied().chain(FIGURES).collect();
        answer(&csv(&head, &cells(&groupings(&scored).1))?);
    } else if let Some(page) = page.filter(|_| args.output.markdown) {
        answer(&page.markdown());
    } else {
        answer(&text(&scored, &refused));
    }
    Ok(if scored.is_empty() { Outcome::No } else { Outcome::Answered })
}

/// Resolves every row, or says why not.
pub fn understand(
    places: &Places,
    rows: &[Row],
    without: &HashSet<String>,
) -> Vec<Result<Question, String>> {
    rows.iter()
        .map(|row| {
            if without.contains(&row.id) {
                return Err("left out by --without".to_owned());
            }
            if row.notes.starts_with("moe") {
                return Err("a mixture of experts is not modelled".to_owned());
            }
            row.understand(&places.catalog)
        })
        .collect()
}

/// Runs and what is known of them, read.
pub struct Files {
    /// The runs.
    pub rows: Vec<Row>,
    /// Lines that are none.
    pub bad: BadLines,
    /// Tiers by id.
    pub tiers: HashMap<String, String>,
    /// Ids to leave out.
    pub without: HashSet<String>,
}

impl Files {
    /// Reads them.
    pub fn read(files: &RunFiles) -> Result<Self> {
        let (rows, bad) = read(&files.runs)?;
        Ok(Self {
            rows,
            bad,
            tiers: files.tiers.as_deref().map(read_tiers).transpose()?.unwrap_or_default(),
            without: files.without.as_deref().map(read_ids).transpose()?.unwrap_or_default(),
        })
    }
}

/// The rows of a file of runs, and the lines that are none.
fn read(path: &Path) -> Result<(Vec<Row>, BadLines)> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    read_rows(&path.display().to_string(), BufReader::new(file)).map_err(|e| anyhow!(e))
}

/// Tiers by id.
fn read_tiers(path: &Path) -> Result<HashMap<String, String>> {
    let mut reader = csv::Reader::from_path(path).with_context(|| path.display().to_string())?;
    let header = reader.headers()?.clone();
    let column = |name: &str| header.iter().position(|h| h == name);
    let (Some(id), Some(tier)) = (column("id"), column("tier")) else {
        bail!("{}:1: expected the columns id and tier", path.display());
    };
    let mut tiers = HashMap::new();
    for record in reader.records() {
        let record = record.with_context(|| path.display().to_string())?;
        tiers.insert(record[id].to_owned(), record[tier].to_owned());
    }
    Ok(tiers)
}

/// Ids to leave out; rows whose reason says that only the outcome is odd stay in.
fn read_ids(path: &Path) -> Result<HashSet<String>> {
    let mut reader = csv::Reader::from_path(path).with_context(|| path.display().to_string())?;
    let header = reader.headers()?.clone();
    let Some(id) = header.iter().position(|h| h == "id") else {
        bail!("{}:1: column \"id\" is missing", path.display());
    };
    let reason = header.iter().position(|h| h == "reason");
    let mut ids = HashSet::new();
    for record in reader.records() {
        let record = record.with_context(|| path.display().to_string())?;
        let stays = reason.is_some_and(|r| record[r].starts_with("OUTCOME ONLY"));
        if !stays {
            ids.insert(record[id].to_owned());
        }
    }
    Ok(ids)
}

/// The rows that a fit may use: tiers A and B (all where no tier is given), with what their time is made of. `step` is called
/// once per row.
pub fn observe(
    rows: &[Row],
    understood: &[Result<Question, String>],
    predictor: &mut Predictor<'_>,
    tiers: &HashMap<String, String>,
    generations: Option<&BTreeMap<(String, u32), Generation>>,
    step: &mut dyn FnMut(),
) -> Vec<Observed> {
    let mut observed = Vec::new();
    for (row, question) in rows.iter().zip(understood) {
        step();
        let sound =
            tiers.is_empty() || matches!(tiers.get(&row.id).map(String::as_str), Some("A" | "B"));
        let Ok(q) = question else { continue };
        if !sound || !q.metric.is_speed() {
            continue;
        }
        let shipped = q.engine.generation(q.year);
        let generation = generations
            .and_then(|g| g.get(&(q.engine.name.clone(), shipped.since)))
            .unwrap_or(shipped);
        if let Ok(run) = predictor.run(q, generation) {
            observed.push(Observed::new(&row.id, q, &run));
        }
    }
    observed
}

fn predictions_csv(rows: &[Row], answers: &[Result<Prediction, String>]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "id",
        "metric",
        "measured",
        "predicted",
        "low",
        "high",
        "source",
        "refused",
    ])?;
    for (row, answer) in rows.iter().zip(answers) {
        let cells = match answer {
            Ok(p) => vec![
                p.predicted.to_string(),
                p.low.to_string(),
                p.high.to_string(),
                p.source.name().to_owned(),
                String::new(),
            ],
            Err(why) => {
                vec![String::new(), String::new(), String::new(), String::new(), why.clone()]
            }
        };
        let first = [row.id.clone(), row.metric.clone(), row.value.clone()];
        writer.write_record(first.into_iter().chain(cells))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// Reasons with their number of rows, the most frequent first.
fn refusals(
    answers: &[Result<Prediction, String>],
    bad: &[(u64, String)],
    path: &Path,
) -> Vec<(String, usize)> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for why in answers.iter().filter_map(|a| a.as_ref().err()) {
        *counts.entry(why.clone()).or_default() += 1;
    }
    for (line, why) in bad {
        counts.insert(format!("{}:{line}: {why}", path.display()), 1);
    }
    let mut list: Vec<_> = counts.into_iter().collect();
    list.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    list
}

/// Which figure of a run a metric is, for tables.
fn class(metric: Metric) -> &'static str {
    match metric {
        Metric::OutputTokS | Metric::TotalTokS => "tokens/s",
        Metric::DecodeTokS | Metric::TpotMs => "decode",
        Metric::PrefillTokS | Metric::TtftMs => "prefill",
        Metric::E2eS => "end to end",
        Metric::MaxBatch => "largest batch",
        Metric::PeakMemGb => "peak memory",
    }
}

struct Line {
    group: Vec<String>,
    n: usize,
    clusters: usize,
    median: f64,
    p90: f64,
    bias: f64,
    coverage: f64,
    /// Median and 90th percentile where every cluster weighs the same.
    weighted: (f64, f64),
}

fn weighted_quantile(values: &mut [(f64, f64)], q: f64) -> f64 {
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = values.iter().map(|v| v.1).sum();
    let mut sum = 0.0;
    for (value, weight) in values.iter() {
        sum += weight;
        if sum >= q * total {
            return *value;
        }
    }
    values.last().map_or(0.0, |v| v.0)
}

fn lines(scored: &[Scored], group_of: impl Fn(&Scored) -> Vec<String>) -> Vec<Line> {
    let mut groups: BTreeMap<Vec<String>, Vec<&Scored>> = BTreeMap::new();
    for row in scored {
        groups.entry(group_of(row)).or_default().push(row);
    }
    groups
        .into_iter()
        .map(|(group, rows)| {
            let mut sizes: HashMap<&(String, String), f64> = HashMap::new();
            for row in &rows {
                *sizes.entry(&row.cluster).or_default() += 1.0;
            }
            let error = |p: &Prediction| p.predicted / p.measured - 1.0;
            let each = |equal: bool, absolute: bool| -> Vec<(f64, f64)> {
                rows.iter()
                    .map(|r| {
                        let e = error(&r.prediction);
                        let weight = if equal { 1.0 / sizes[&r.cluster] } else { 1.0 };
                        (if absolute { e.abs() } else { e }, weight)
                    })
                    .collect()
            };
            let inside = rows
                .iter()
                .filter(|r| {
                    let p = &r.prediction;
                    (p.low..=p.high).contains(&p.measured)
                })
                .count();
            Line {
                n: rows.len(),
                clusters: sizes.len(),
                median: weighted_quantile(&mut each(false, true), 0.5),
                p90: weighted_quantile(&mut each(false, true), 0.9),
                bias: weighted_quantile(&mut each(false, false), 0.5),
                coverage: inside as f64 / rows.len() as f64,
                weighted: (
                    weighted_quantile(&mut each(true, true), 0.5),
                    weighted_quantile(&mut each(true, true), 0.9),
                ),
                group,
            }
        })
        .collect()
}

fn devices(single: bool) -> String {
    if single { "one" } else { "several" }.to_owned()
}

/// Heads of what is said of a group, behind its names.
const FIGURES: [&str; 8] =
    ["n", "median", "p90", "bias", "coverage", "clusters", "equal median", "equal p90"];

fn table_of(head: &[&str], lines: &[Line]) -> String {
    let all: Vec<&str> = head.iter().copied().chain(FIGURES).collect();
    table::table(&all, cells(lines), head.len())
}

/// A row a group.
fn cells(lines: &[Line]) -> Vec<Vec<String>> {
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    lines
        .iter()
        .map(|l| {
            let mut row = l.group.clone();
            row.extend([
                l.n.to_string(),
                percent(l.median),
                percent(l.p90),
                table::percent(l.bias),
                format!("{:.0} %", 100.0 * l.coverage),
                l.clusters.to_string(),
                percent(l.weighted.0),
                percent(l.weighted.1),
            ]);
            row
        })
        .collect()
}

fn groupings(scored: &[Scored]) -> (Vec<Line>, Vec<Line>) {
    let metric = |s: &Scored| class(s.prediction.metric).to_owned();
    let by_tier = lines(scored, |s| vec![s.tier.clone(), devices(s.single), metric(s)]);
    let by_cluster = lines(scored, |s| {
        let (gpu, engine) = s.cluster.clone();
        vec![s.tier.clone(), devices(s.single), metric(s), engine, gpu, s.mode.clone()]
    });
    (by_tier, by_cluster)
}

fn text(scored: &[Scored], refused: &[(String, usize)]) -> String {
    let (by_tier, by_cluster) = groupings(scored);
    let total: usize = refused.iter().map(|(_, n)| n).sum();
    let mut out = table_of(&BY_TIER, &by_tier);
    out += "\n\n";
    out += &table_of(&BY_CLUSTER, &by_cluster);
    out += &format!(
        "\n\n{} runs predicted, {total} refused; coverage of the 90 % interval; equal: every (device, engine) \
         cluster weighs the same",
        scored.len()
    );
    for (why, n) in refused.iter().take(12) {
        out += &format!("\n  {n:5}  {why}");
    }
    out
}

fn document(scored: &[Scored], refused: &[(String, usize)]) -> serde_json::Value {
    let (by_tier, by_cluster) = groupings(scored);
    let list = |names: &[&str], lines: &[Line]| -> Vec<serde_json::Value> {
        lines
            .iter()
            .map(|l| {
                let mut entry = json!({
                    "n": l.n, "median": l.median, "p90": l.p90, "bias": l.bias,
                    "coverage": l.coverage, "clusters": l.clusters,
                    "equal_median": l.weighted.0, "equal_p90": l.weighted.1,
                });
                if let Some(map) = entry.as_object_mut() {
                    for (name, value) in names.iter().zip(&l.group) {
                        map.insert((*name).to_owned(), json!(value));
                    }
                }
                entry
            })
            .collect()
    };
    json!({
        "predicted": scored.len(),
        "groups": list(&BY_TIER, &by_tier),
        "clusters": list(&BY_CLUSTER, &by_cluster),
        "refused": refused.iter().map(|(why, n)| json!({ "reason": why, "rows": n })).collect::<Vec<_>>(),
    })
}
