//! `batchmax models`, `gpus`, `policies`: what there is, or one in full.

use anyhow::Result;
use batchmax_sim::op::DType;
use batchmax_sim::policy::Preset;
use serde_json::json;

use crate::cli::{Global, ListArgs};
use crate::commands::Outcome;
use crate::report::{answer, json, table};
use crate::setting::{self, Places};

/// Models.
pub fn models(places: &Places, args: &ListArgs, global: &Global) -> Result<Outcome> {
    let models = match &args.name {
        Some(name) => vec![setting::model(places, name)?],
        None => places.catalog.models()?,
    };
    if global.json {
        answer(&json::document("models", json!({ "models": models })));
    } else if args.name.is_some() {
        for model in &models {
            answer(&toml::to_string(model)?);
        }
    } else {
        let rows = models.iter().map(|m| {
            let kv = m.kv_elements_per_token_layer() * u64::from(m.layers);
            vec![
                m.name.clone(),
                format!("{:.2} B", m.parameters() as f64 / 1e9),
                m.layers.to_string(),
                m.hidden.to_string(),
                format!("{}/{}", m.heads, m.kv_heads),
                m.head_dim.to_string(),
                m.context.to_string(),
                DType::F16.bytes(kv).to_string(),
            ]
        });
        let head = [
            "model",
            "parameters",
            "layers",
            "hidden",
            "heads/kv",
            "head dim",
            "context",
            "KV/token f16",
        ];
        answer(&table::table(&head, rows.collect(), 1));
    }
    Ok(Outcome::Answered)
}

/// Devices.
pub fn gpus(places: &Places, args: &ListArgs, global: &Global) -> Result<Outcome> {
    let gpus = match &args.name {
        Some(name) => vec![places.catalog.gpu(name)?],
        None => places.catalog.gpus()?,
    };
    if global.json {
        answer(&json::document("gpus", json!({ "gpus": gpus })));
    } else if args.name.is_some() {
        for gpu in &gpus {
            answer(&toml::to_string(gpu)?);
        }
    } else {
        let tera =
            |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{:.0}", v / 1e12));
        let rows = gpus.iter().map(|g| {
            let peaks = &g.peak_flops_per_s;
            vec![
                g.name.clone(),
                g.label.clone(),
                format!("{:.0} GB", g.memory_bytes.0 as f64 / 1e9),
                format!("{:.0}", g.bandwidth_bytes_per_s / 1e9),
                tera(peaks.of(DType::Bf16)),
                tera(peaks.fp8),
                g.unsure.join(" "),
            ]
        });
        let head = ["gpu", "name", "memory", "GB/s", "bf16 TFLOP/s", "fp8 TFLOP/s", "unsure"];
        answer(&table::table(&head, rows.collect(), 2));
    }
    Ok(Outcome::Answered)
}

/// Engines.
pub fn engines(places: &Places, args: &ListArgs, global: &Global) -> Result<Outcome> {
    let engines = match &args.name {
        Some(name) => vec![places.catalog.engine(name)?],
        None => places.catalog.engines()?,
    };
    if global.json {
        answer(&json::document("engines", json!({ "engines": engines })));
    } else if args.name.is_some() {
        for engine in &engines {
            answer(&toml::to_string(engine)?);
        }
    } else {
        let mut rows = Vec::new();
        for engine in &engines {
            for g in &engine.generations {
                let error = |e: f64| match g.fit.rows {
                    0 => "-".to_owned(),
                    _ => format!("{:.1} %", 100.0 * e),
                };
                rows.push(vec![
                    engine.name.clone(),
                    g.since.to_string(),
                    engine.policies.join(" "),
                    g.devices.keys().cloned().collect::<Vec<_>>().join(" "),
                    g.fit.rows.to_string(),
                    error(g.fit.held_out_median),
                    error(g.fit.held_out_p90),
                ]);
            }
        }
        let head = ["engine", "since", "policies", "seen on", "runs", "held out", "p90"];
        answer(&table::table(&head, rows, 4));
    }
    Ok(Outcome::Answered)
}

/// Policy presets.
pub fn policies(places: &Places, args: &ListArgs, global: &Global) -> Result<Outcome> {
    let names = match &args.name {
        Some(name) => vec![name.clone()],
        None => places.catalog.policy_names(),
    };
    let presets: Vec<Preset> =
        names.iter().map(|n| Preset::parse(&places.catalog, n)).collect::<Result<_, _>>()?;
    if global.json {
        let list: Vec<_> = presets
            .iter()
            .map(|p| json!({ "name": p.name, "about": p.about, "paper": p.paper, "policy": p.policy.label() }))
            .collect();
        answer(&json::document("policies", json!({ "policies": list })));
    } else if let (Some(_), [preset]) = (&args.name, presets.as_slice()) {
        let (origin, text) = places.catalog.policy_text(&preset.name)?;
        answer(&format!("# {origin}\n{}\n# {}\n", text.trim_end(), preset.policy.label()));
    } else {
        let rows = presets
            .iter()
            .map(|p| vec![p.name.clone(), p.about.clone(), p.paper.clone().unwrap_or_default()]);
        answer(&table::table(&["policy", "what it does", "paper"], rows.collect(), 3));
    }
    Ok(Outcome::Answered)
}
