//! Candidates kept side by side.

use super::answer::Found;
use super::app::{App, Pin, Screen};
use super::command;
use crate::commands::plan::show;
use crate::report::table;
use batchmax_sim::plan::Candidate;

/// Candidates that can be kept.
pub const MOST: usize = 4;

/// Keeps what is under the cursor, or lets it go.
pub fn pin(app: &mut App) {
    let chosen = match app.screen {
        Screen::Frontier => {
            let index = app.front().get(app.rows[1]).copied();
            app.answers.frontier.as_ref().zip(index).map(|((_, f), i)| (f.as_ref(), i))
        }
        _ => app.found().map(|(found, _)| (found, app.selected)),
    };
    let Some((found, index)) = chosen else { return };
    let Some(c) = found.candidates.get(index) else { return };
    let Some(facts) = facts(app, found, c) else {
        return app.say("what does not fit can't be compared", true);
    };
    if let Some(at) = app.pins.iter().position(|p| p.facts == facts) {
        app.pins.remove(at);
        return app.say("unpinned", false);
    }
    if app.pins.len() == MOST {
        return app.say("four are pinned: unpin one on the Frontier first", true);
    }
    let letter = ('A'..='D').find(|l| app.pins.iter().all(|p| p.letter != *l)).unwrap_or('D');
    let answer = c.answer.as_ref();
    let point = answer.map_or((0.0, 0.0, 0.0), |a| {
        (a.metrics.tpot.0, a.footprint.total().0 as f64, c.throughput())
    });
    let command = command::of(app);
    app.pins.push(Pin { letter, command, facts, point });
    app.say(&format!("pinned as {letter}: compare on the Frontier (3)"), false);
}

fn facts(app: &App, found: &Found, c: &Candidate) -> Option<Vec<(&'static str, String)>> {
    let answer = c.answer.as_ref()?;
    let host = found.host(c);
    let (m, f) = (&answer.metrics, &answer.footprint);
    Some(vec![
        ("policy", c.preset.clone()),
        ("model", app.values.of_flag("model").to_owned()),
        ("gpu", if c.gpus > 1 { format!("{} x {}", c.gpus, host.gpu) } else { host.gpu.clone() }),
        ("tokens", format!("{} in, {} out", app.values.of_flag("isl"), app.values.of_flag("osl"))),
        ("schedule", c.schedule.to_string()),
        ("batch", answer.batch.to_string()),
        ("tokens/s", format!("{} {}", table::rate(c.throughput()), table::plus_minus(m.error))),
        ("TTFT", m.ttft.to_string()),
        ("TPOT", m.tpot.to_string()),
        ("KV prefill", f.kv_prefill_peak.to_string()),
        ("KV decode", f.kv_decode_peak.to_string()),
        ("total", f.total().to_string()),
        ("limited by", show::limited(c)),
        ("source", table::sign(m.source).to_owned()),
    ])
}
