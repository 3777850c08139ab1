//! A program as a person can read it.

use std::fmt::Write;

use crate::op::{Branch, Choice, Lanes, Op, OpKind};
use crate::profile::Model;
use crate::program::{Block, Node, Pass, Program};
use crate::units::{Bytes, Flops};

/// The listing that `batchmax explain` prints. Sizes are of the first step of a pass and of one layer.
#[must_use]
pub fn explain(model: &Model, program: &Program) -> String {
    let mut out = String::new();
    let header = &program.header;
    let load = &header.load;
    let _ = writeln!(
        out,
        "{} · {} · {} sequences · {} schedule",
        header.model,
        header.policy,
        load.sequences(),
        load.schedule
    );
    /// Groups that are listed one by one.
    const LISTED: usize = 8;
    for group in load.groups.iter().take(LISTED) {
        let cached = match group.hit {
            0 => String::new(),
            hit => format!(", the first {hit} cached"),
        };
        let _ = writeln!(
            out,
            "  {} x ({} prompt + {} generated tokens{cached})",
            group.sequences, group.isl, group.osl
        );
    }
    if load.groups.len() > LISTED {
        let (more, tokens) = (load.groups.len() - LISTED, load.output_tokens());
        let _ = writeln!(out, "  and {more} more groups; {tokens} generated tokens in all");
    }
    let _ = writeln!(
        out,
        "  weights {}, cache {} in blocks of {} tokens, activations {}; {} layers",
        header.weights, header.kv.dtype, header.kv.block_tokens, header.activations, model.layers
    );
    let mut index = 0;
    nodes(&mut out, &program.nodes, 0, &mut index);
    let (steps, decode) = program.steps();
    let _ = writeln!(out, "\n{steps} steps, {decode} of them decode");
    out
}

fn nodes(out: &mut String, list: &[Node], depth: usize, index: &mut u32) {
    let pad = "  ".repeat(depth);
    for node in list {
        match node {
            Node::Pass(pass) => {
                let plural = if pass.steps == 1 { "" } else { "s" };
                let _ = writeln!(
                    out,
                    "\n{pad}pass {index}: {}, {} step{plural}",
                    pass.phase.name(),
                    pass.steps
                );
                *index += 1;
                one_pass(out, pass, &pad);
            }
            Node::Loop { times, shift, body } => {
                let moving = match shift {
                    0 => String::new(),
                    n => format!(", {n} sequences on each time"),
                };
                let _ = writeln!(out, "\n{pad}{times} times{moving}:");
                nodes(out, body, depth + 1, index);
            }
        }
    }
}

fn one_pass(out: &mut String, pass: &Pass, pad: &str) {
    let growing = pass.steps > 1;
    for (_, block) in pass.blocks() {
        if block.ops.is_empty() {
            continue;
        }
        if let Some(layers) = block.layers {
            let stride = match layers.stride {
                1 => String::new(),
                n => format!(" (every {n} from {})", layers.first),
            };
            let _ = writeln!(out, "{pad}  {} layers{stride}", layers.count);
        }
        block_lines(out, block, pad, growing);
    }
}

fn block_lines(out: &mut String, block: &Block, pad: &str, growing: bool) {
    for op in &block.ops {
        let work = op.work(0);
        let _ = writeln!(
            out,
            "{pad}    {:<20} {:<44} {:>10} {:>10}",
            op.name,
            shape(op, growing),
            flops(work.flops),
            if work.bytes() == Bytes(0) { String::new() } else { work.bytes().to_string() },
        );
    }
}

fn flops(flops: Flops) -> String {
    const UNITS: [&str; 6] = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"];
    let (mut value, mut unit) = (flops.0, 0);
    if value == 0.0 {
        return String::new();
    }
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn tokens(lanes: &Lanes, growing: bool, kept: bool) -> String {
    let plus = if growing { "+" } else { "" };
    let parts: Vec<String> = lanes
        .as_slice()
        .iter()
        .take(4)
        .map(|l| {
            let keep = if kept { format!(" -> {}", l.keep) } else { String::new() };
            format!("{}x{}{plus}{keep}", l.sequences, l.kv)
        })
        .collect();
    let more = lanes.as_slice().len().saturating_sub(4);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", parts.join(", "))
}

/// The shape column of an op.
#[must_use]
pub fn shape(op: &Op, growing: bool) -> String {
    let sizes = sizes(op, growing);
    match op.branch {
        Branch::All => sizes,
        Branch::Stale { share } => format!("{sizes}, if stale ({}%)", f64::from(share) / 10.0),
        Branch::Fresh { share } => format!("{sizes}, if not ({}%)", f64::from(share) / 10.0),
    }
}

fn sizes(op: &Op, growing: bool) -> String {
    let rows = op.lanes.rows();
    match op.kind {
        OpKind::Embed { width }
        | OpKind::RmsNorm { width, .. }
        | OpKind::AllReduce { width }
        | OpKind::Softcap { width } => {
            format!("{rows} x {width}")
        }
        OpKind::Gemm { n, k, weights, accumulate } => {
            let add = if accumulate { ", adds" } else { "" };
            format!("{rows} x {n} x {k} {weights}{add}")
        }
        OpKind::QkNorm { heads } | OpKind::Rope { heads } => {
            format!("{rows} x {} heads x {}", heads.query + heads.kv, heads.dim)
        }
        OpKind::Append { heads } => format!("{rows} tokens x {} kv heads", heads.kv),
        OpKind::Attend { heads, window } => {
            let window = window.map_or_else(String::new, |w| format!(", window {w}"));
            format!(
                "{rows} q x {}h/{}kv over {}{window}",
                heads.query,
                heads.kv,
                tokens(&op.lanes, growing, false)
            )
        }
        OpKind::Tally { .. } => format!("{rows} q over {}", tokens(&op.lanes, growing, false)),
        OpKind::Rank { by, .. } => {
            format!("{} over {}", by.name(), tokens(&op.lanes, growing, false))
        }
        OpKind::Evict { heads, protect, choice } => format!(
            "{}, {} sinks and {} recent stay{}{}",
            tokens(&op.lanes, growing, true),
            protect.sinks,
            protect.recent,
            match choice {
                Choice::PerHead => String::new(),
                Choice::AcrossHeads { .. } => ", heads share".to_owned(),
                Choice::Within { loss, most } => {
                    let loss = f64::from(loss) / 1e4;
                    format!(", expected at a loss of {loss} %, {most} at most")
                }
            },
            if heads.form.rerotated { ", keys turned to their places" } else { "" }
        ),
        OpKind::Accumulate { heads, .. } => format!(
            "{} into {} rows a head",
            tokens(&op.lanes, growing, true),
            heads.form.state.map_or(0, |s| s.rank)
        ),
        OpKind::ReadState { heads } => format!(
            "{rows} q x {}h over {} rows a head",
            heads.query,
            heads.form.state.map_or(0, |s| s.rank)
        ),
        OpKind::Gated { ffn } => format!("{rows} x {ffn}"),
        OpKind::Sample { vocab } => format!("{rows} x {vocab}"),
        OpKind::Release { .. } => tokens(&op.lanes, growing, false),
        OpKind::Index { page, .. } => format!("{rows} tokens in pages of {page}"),
        OpKind::Cluster { sinks, .. } => {
            format!("{} clusters behind {sinks} sinks", tokens(&op.lanes, growing, true))
        }
        OpKind::Select { by, .. } => {
            format!("{} of {}", by.name(), tokens(&op.lanes, growing, true))
        }
        OpKind::AttendChosen { heads, by } => format!(
            "{rows} q x {}h/{} sets over chosen {}",
            heads.query,
            by.sets(heads),
            tokens(&op.lanes, growing, true)
        ),
        OpKind::Compare { below, .. } => {
            format!("{rows} q, stale below {:.3}", f64::from(below) / 1000.0)
        }
        OpKind::Refresh { .. } => format!("the best of {}", tokens(&op.lanes, growing, true)),
        OpKind::AppendPart { heads } => format!("{rows} tokens x {} kv heads", heads.kv),
        OpKind::AttendPart { heads } => format!(
            "{rows} q x {}h/{}kv over the best of {}",
            heads.query,
            heads.kv,
            tokens(&op.lanes, growing, true)
        ),
        OpKind::ReleasePart { .. } => tokens(&op.lanes, growing, true),
        OpKind::Offload { heads } => format!("{rows} tokens x {} kv heads, beside", heads.kv),
        OpKind::AttendAhead { heads } => format!(
            "{} q x {}h/{}kv over {} whole of {}",
            rows + op.lanes.sequences(),
            heads.query,
            heads.kv,
            op.lanes.as_slice().first().map_or(0, |l| l.keep.min(l.kv)),
            tokens(&op.lanes, growing, false)
        ),
        OpKind::Load { heads, chunk } => {
            format!("{rows} tokens x {} kv heads, chunks of {chunk}, beside", heads.kv)
        }
        OpKind::Deviate { heads } => format!("{rows} values x {} kv heads", heads.kv),
        OpKind::Blend { .. } => format!(
            "{rows} rows among {} tokens",
            op.lanes
                .as_slice()
                .iter()
                .map(|l| u64::from(l.sequences) * u64::from(l.keep))
                .sum::<u64>()
        ),
        OpKind::AttendRows { heads } => format!(
            "{rows} q x {}h/{}kv, anywhere in {}",
            heads.query,
            heads.kv,
            tokens(&op.lanes, growing, false)
        ),
        OpKind::Foresee { .. } => format!("by attention {}", tokens(&op.lanes, growing, true)),
        OpKind::Fetch { .. } => format!("{}, beside", tokens(&op.lanes, growing, true)),
        OpKind::Pack { heads } => {
            let bits = heads.form.packed.map_or(0, |p| p.bits);
            format!("{} to {bits} bits", tokens(&op.lanes, growing, false))
        }
        OpKind::PruneChannels { heads } => {
            let channels = heads.form.pruned.map_or(heads.dim, |p| p.channels);
            format!("{} to {channels} channels", tokens(&op.lanes, growing, false))
        }
        OpKind::Trim { heads } => {
            let short = heads.form.short.map_or((0, 0), |s| (s.heads, s.tokens));
            format!("{} of {} KV heads to {} tokens", short.0, heads.kv, short.1)
        }
        OpKind::Forward { width, .. } => {
            let kept: u64 = (op.lanes.as_slice().iter())
                .map(|l| u64::from(l.sequences) * u64::from(l.keep))
                .sum();
            format!("{rows} -> {kept} rows x {width}")
        }
    }
}
