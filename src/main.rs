//! `batchmax`: which batch, KV-cache policy and schedule give the most tokens per second, how sure is that, and does it
//! hold when really run?
//!
//! The map: [`cli`] is what people type, [`setting`] what they mean, [`commands`] one verb a file, [`report`] one format
//! a file, [`tui`] the planner to look at. Everything that is computed is computed in `batchmax-sim`; everything that is run, in `batchmax-exec`.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(feature = "exec"),
    allow(dead_code, reason = "parts that only the executor's commands use")
)]

mod cli;
mod commands;
mod config;
mod dates;
mod paths;
mod report;
mod setting;
mod tui;

use std::process::ExitCode;

use clap::FromArgMatches;
use clap::error::ErrorKind::{
    DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand as MissingArgumentOrHelp, DisplayVersion,
};

use crate::commands::Outcome;

fn main() -> ExitCode {
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let config = match config::Config::load(&args) {
        Ok(config) => config,
        Err(error) => {
            report::complain(&error);
            return ExitCode::from(2);
        }
    };
    let parsed = config.command().try_get_matches_from(args);
    let parsed = parsed.and_then(|m| cli::Cli::from_arg_matches(&m).map(|cli| (cli, m)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error)
            if matches!(error.kind(), DisplayHelp | DisplayVersion | MissingArgumentOrHelp) =>
        {
            error.exit()
        }
        Err(error) => {
            report::complain_usage(&error);
            return ExitCode::from(2);
        }
    };
    match commands::run(&cli, &config, &matches) {
        Ok(Outcome::Answered) => ExitCode::SUCCESS,
        Ok(Outcome::No) => ExitCode::from(1),
        Err(error) => {
            report::complain(&error);
            ExitCode::from(if commands::failed_in_the_run(&error) { 3 } else { 2 })
        }
    }
}
