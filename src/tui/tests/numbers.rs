//! The numbers on the screens are those of `--json` for the same query.

use serde_json::Value;

use super::{Desk, QUERY};
use crate::commands::plan::{Advice, Question, show};
use crate::report::table;
use crate::tui::answer::Found;
use crate::tui::worker::plan_args;
use batchmax_sim::plan::marks;
use batchmax_sim::units::{Bytes, Seconds};

fn document(desk: &Desk, args: &[String]) -> Value {
    let args = plan_args(args).expect("a query");
    let question = Question::new(&desk.places, &args).expect("a question");
    let plan = question.plan().expect("a plan");
    let marks = marks(&plan.candidates, question.objective);
    let advice = Advice::of(&question, &plan).expect("advice");
    serde_json::from_str(&show::document(&question, &plan, &marks, &advice)).expect("JSON")
}

/// Numbers that went through text may lose their last bit.
fn close(json: &Value, own: f64) {
    let read = json.as_f64().expect("a number");
    assert!((read - own).abs() <= 1e-14 * own.abs(), "{read} {own}");
}

fn same(found: &Found, rows: &[Value]) {
    assert_eq!(found.candidates.len(), rows.len());
    for (c, row) in found.candidates.iter().zip(rows) {
        assert_eq!(row["preset"], c.preset.as_str());
        let Some(a) = &c.answer else {
            assert!(row["answer"].is_null());
            continue;
        };
        let (metrics, memory) = (&row["answer"]["metrics"], &row["answer"]["memory"]);
        close(&row["output_tok_s"], c.throughput());
        assert_eq!(row["answer"]["batch"], a.batch);
        close(&metrics["ttft_s"], a.metrics.ttft.0);
        close(&metrics["tpot_s"], a.metrics.tpot.0);
        close(&metrics["error"], a.metrics.error);
        assert_eq!(memory["kv_prefill_peak_bytes"], a.footprint.kv_prefill_peak.0);
        assert_eq!(memory["kv_decode_peak_bytes"], a.footprint.kv_decode_peak.0);
        assert_eq!(memory["total_bytes"], a.footprint.total().0);
    }
}

#[test]
fn rankings_are_those_of_json() {
    for query in
        [QUERY, "--model plain-7b --gpu slate-80 --isl 4k --osl 64 --tpot 60ms --budget 20%"]
    {
        let mut desk = Desk::new(query);
        let args = desk.app.values.arguments();
        let json = document(&desk, &args);
        let rows = json["candidates"].as_array().expect("candidates");
        same(desk.app.found().expect("an answer").0, rows);
        // And what is read off the screen is these numbers.
        let (found, c) = desk.app.candidate().expect("a candidate");
        let row = &rows[found.shown[0]];
        assert_eq!(row["preset"], c.preset.as_str());
        let number = |path: &str| row.pointer(path).and_then(Value::as_f64).expect("a number");
        let bytes = |path: &str| Bytes(number(path) as u64).to_string();
        let screen = desk.text(200, 60);
        for text in [
            table::rate(number("/output_tok_s")),
            Seconds(number("/answer/metrics/ttft_s")).to_string(),
            Seconds(number("/answer/metrics/tpot_s")).to_string(),
            bytes("/answer/memory/kv_prefill_peak_bytes"),
            bytes("/answer/memory/kv_decode_peak_bytes"),
            bytes("/answer/memory/total_bytes"),
            bytes("/answer/memory/weights_bytes"),
        ] {
            assert!(screen.contains(&text), "{text} is not on\n{screen}");
        }
        desk.press("3");
        let mut pareto = args.clone();
        pareto.push("--pareto".to_owned());
        let json = document(&desk, &pareto);
        let rows = json["candidates"].as_array().expect("candidates");
        let (_, found) = desk.app.answers.frontier.as_ref().expect("a front");
        let on = found.marks.iter().filter(|m| m.tpot || m.memory).count();
        assert_eq!(rows.len(), on);
    }
}

#[test]
fn curves_and_ops_end_where_the_ranking_does() {
    let mut desk = Desk::new(QUERY);
    let (_, of, curves) = desk.app.answers.curves.as_ref().expect("curves");
    assert_eq!(*of, desk.app.selected);
    let (_, c) = desk.app.candidate().expect("a candidate");
    let batch = c.answer.as_ref().map(|a| a.batch);
    assert_eq!(curves[0].points.last().map(|p| p.0), batch);
    // Every point of a curve is what plan says at that batch.
    for (batch, rate) in &curves[0].points {
        let mut args = desk.app.values.arguments_but(&["policy", "batch", "schedule"]);
        let (preset, schedule) = (c.preset.clone(), c.schedule.to_string());
        let more = ["--policy", &preset, "--schedule", &schedule, "--batch", &batch.to_string()];
        args.extend(more.map(str::to_owned));
        let json = document(&desk, &args);
        close(&json["candidates"][0]["output_tok_s"], *rate);
    }
    desk.press("2");
    let (_, _, ops) = desk.app.answers.ops.as_ref().expect("ops");
    let ops = ops.as_ref().expect("it fits");
    let sum: f64 = ops.rows.iter().map(|r| r.time.0).sum::<f64>()
        + ops.overhead.iter().map(|s| s.0).sum::<f64>();
    let total = ops.answer.metrics.total.0;
    assert!((sum - total).abs() <= 1e-9 * total, "{sum} {total}");
    let (_, c) = desk.app.candidate().expect("a candidate");
    let answer = c.answer.as_ref().expect("it fits");
    assert_eq!(answer.metrics.total.0, total);
}

#[test]
fn cells_of_the_map_are_plans() {
    let mut desk = Desk::new(QUERY);
    desk.press("4");
    let (_, axes) = desk.app.answers.axes.as_ref().expect("axes");
    assert!(desk.app.answers.columns.iter().all(Option::is_some));
    for (column, row) in [axes.own, (0, 2), (axes.contexts.len() - 1, 0), (2, 8)] {
        let mut args = desk.app.values.arguments_but(&["isl", "memory"]);
        let (isl, memory) = (axes.contexts[column].to_string(), axes.memories[row].0);
        args.extend(["--isl".into(), isl, "--memory".into(), format!("{memory}B")]);
        let json = document(&desk, &args);
        let best = &json["candidates"][0];
        let cell = desk.app.answers.columns[column].as_ref().and_then(|c| c[row].as_ref());
        match cell {
            None => assert!(best["answer"].is_null(), "{best}"),
            Some(winner) => {
                close(&best["output_tok_s"], winner.rate);
                assert_eq!(best["preset"], winner.preset.as_str());
                assert_eq!(best["answer"]["batch"], winner.batch);
            }
        }
    }
}
