//! `batchmax config`: what holds, and where it comes from.

use anyhow::Result;
use clap::ArgMatches;
use clap::parser::ValueSource;
use serde_json::json;

use crate::cli::Global;
use crate::commands::Outcome;
use crate::config::{Config, KEYS};
use crate::report::{answer, json, table};

/// Shows every setting with its origin.
pub fn run(config: &Config, matches: &ArgMatches, global: &Global) -> Result<Outcome> {
    let own = matches.subcommand_matches("config").unwrap_or(matches);
    let rows: Vec<[String; 3]> = KEYS.iter().map(|key| row(config, own, key)).collect();
    if global.json {
        let list: Vec<_> = rows
            .iter()
            .map(|[key, value, origin]| json!({ "key": key, "value": value, "origin": origin }))
            .collect();
        let file = config.path.as_ref().map(|p| p.display().to_string());
        answer(&json::document("config", json!({ "file": file, "settings": list })));
    } else {
        let file = match &config.path {
            Some(path) => path.display().to_string(),
            None => "none; usually ~/.config/batchmax/config.toml".to_owned(),
        };
        let rows = rows.into_iter().map(|row| row.to_vec()).collect();
        let table = table::table(&["setting", "value", "from"], rows, 3);
        answer(&format!("file: {file}\n\n{table}"));
    }
    Ok(Outcome::Answered)
}

fn row(config: &Config, matches: &ArgMatches, key: &str) -> [String; 3] {
    let raw = matches.try_get_raw(key).ok().flatten();
    let value = raw.map(|values| {
        let words: Vec<String> = values.map(|v| v.to_string_lossy().into_owned()).collect();
        words.join(" ")
    });
    let entry = config.entries.iter().find(|e| e.key == key);
    let origin = match (matches.value_source(key), entry) {
        (Some(ValueSource::CommandLine), _) => "flag".to_owned(),
        (Some(ValueSource::EnvVariable), _) => "environment".to_owned(),
        (Some(_), Some(entry)) => {
            let file = config.path.as_ref().map(|p| p.display().to_string());
            format!("{}:{}", file.unwrap_or_default(), entry.line)
        }
        _ => "default".to_owned(),
    };
    [key.to_owned(), value.unwrap_or_else(|| "by the command".to_owned()), origin]
}
