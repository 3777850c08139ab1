//! One verb a file.

mod calibrate;
#[cfg(feature = "exec")]
mod compare;
mod config;
#[cfg(feature = "exec")]
mod devices;
mod doctor;
mod explain;
mod fetch;
mod import;
mod list;
#[cfg(feature = "exec")]
mod local;
pub mod plan;
#[cfg(feature = "exec")]
mod prepare;
#[cfg(feature = "exec")]
mod profile;
#[cfg(feature = "exec")]
mod quality;
#[cfg(feature = "exec")]
mod run;
mod scenarios;
mod score;
mod shell;
#[cfg(feature = "exec")]
mod target;
#[cfg(feature = "exec")]
mod validate;
mod what_if;

use anyhow::Result;
use clap::{ArgMatches, FromArgMatches};

use crate::cli::{Cli, Command, Global};
use crate::config::Config;
use crate::report::remark;
use crate::setting::Places;
use crate::tui;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Answered,
    /// The answer is no: nothing fits, or a tolerance is exceeded.
    No,
}

/// Whether nothing that was typed is at fault: the executor itself could not keep to its program, or the device failed.
#[cfg(feature = "exec")]
pub fn failed_in_the_run(error: &anyhow::Error) -> bool {
    use batchmax_exec::ExecError;
    use batchmax_exec::devices::CudaError;
    matches!(
        error.downcast_ref::<ExecError>(),
        Some(
            ExecError::PoolFull(_)
                | ExecError::KvMismatch { .. }
                | ExecError::LongCache { .. }
                | ExecError::Cuda(_)
        )
    ) || error.is::<CudaError>()
}

/// Without the executor nothing runs.
#[cfg(not(feature = "exec"))]
pub fn failed_in_the_run(_error: &anyhow::Error) -> bool {
    false
}

/// On a terminal the planner, else the help, as where a command is missing.
fn without_command(places: &Places, config: &Config, global: &Global) -> Result<Outcome> {
    use std::io::IsTerminal;
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let kind = clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        let mut command = config.command();
        let help = command.render_help();
        command.error(kind, help).exit();
    }
    let matches = config.command().try_get_matches_from(["batchmax", "tui"])?;
    let Some(Command::Tui(args)) = Cli::from_arg_matches(&matches)?.command else {
        return Ok(Outcome::No);
    };
    tui::run(places, &args, global)
}

/// Runs what was typed.
pub fn run(cli: &Cli, config: &Config, matches: &ArgMatches) -> Result<Outcome> {
    let start = std::time::Instant::now();
    let places = Places::new(&cli.global)?;
    if cli.global.verbose {
        let file = config.path.as_ref().map_or("none".to_owned(), |p| p.display().to_string());
        remark(false, &format!("configuration: {file}; data: {}", places.data_dir.display()));
    }
    let Some(command) = &cli.command else { return without_command(&places, config, &cli.global) };
    let outcome = match command {
        Command::Doctor(args) => doctor::run(&places, args, config, &cli.global),
        Command::Config(_) => config::run(config, matches, &cli.global),
        Command::Completions(args) => shell::completions(args),
        Command::Man(args) => shell::man(args),
        Command::Tui(args) => tui::run(&places, args, &cli.global),
        Command::Plan(args) => plan::run(&places, args, &cli.global),
        Command::WhatIf(args) => what_if::run(&places, args, &cli.global),
        Command::Explain(args) => explain::run(&places, args, &cli.global),
        Command::Fetch(args) => fetch::run(&places, args, &cli.global),
        Command::Import(args) => import::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Profile(args) => profile::run(&places, args, &cli.global),
        Command::Calibrate(args) => calibrate::run(&places, args, &cli.global),
        Command::Score(args) => score::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Run(args) => run::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Validate(args) => validate::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Compare(args) => compare::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Quality(args) => quality::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Prepare(args) => prepare::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Devices => devices::run(&cli.global),
        Command::Models(args) => list::models(&places, args, &cli.global),
        Command::Gpus(args) => list::gpus(&places, args, &cli.global),
        Command::Engines(args) => list::engines(&places, args, &cli.global),
        Command::Policies(args) => list::policies(&places, args, &cli.global),
    };
    if cli.global.verbose {
        remark(false, &format!("took {:.2} s", start.elapsed().as_secs_f64()));
    }
    outcome
}

#[cfg(all(test, feature = "exec"))]
mod tests {
    use super::failed_in_the_run;
    use batchmax_exec::ExecError;
    use batchmax_sim::units::Bytes;

    #[test]
    fn broken_promises_of_the_executor_are_not_the_users_fault() {
        let (held, predicted) = (Bytes(2), Bytes(1));
        let mismatch = ExecError::KvMismatch { step: 3, held, predicted };
        assert!(failed_in_the_run(&anyhow::Error::from(mismatch).context("a run")));
        let over = ExecError::OverBudget { needed: Bytes(2), budget: Bytes(1) };
        assert!(!failed_in_the_run(&over.into()));
        assert!(!failed_in_the_run(&anyhow::anyhow!("--batch 0")));
    }
}
