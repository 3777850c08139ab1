//! One verb a file.

mod calibrate;
#[cfg(feature = "exec")]
mod compare;
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
#[cfg(feature = "exec")]
mod validate;
mod what_if;

use anyhow::Result;
use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command, Global};
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

/// Whether nothing that was typed is at fault: the executor itself could not keep to its program.
#[cfg(feature = "exec")]
pub fn failed_in_the_run(error: &anyhow::Error) -> bool {
    use batchmax_exec::ExecError;
    matches!(
        error.downcast_ref::<ExecError>(),
        Some(
            ExecError::PoolFull(_)
                | ExecError::KvMismatch { .. }
                | ExecError::LongCache { .. }
                | ExecError::Cuda(_)
        )
    )
}

/// Without the executor nothing runs.
#[cfg(not(feature = "exec"))]
pub fn failed_in_the_run(_error: &anyhow::Error) -> bool {
    false
}

/// On a terminal the planner, else the help, as where a command is missing.
fn without_command(places: &Places, global: &Global) -> Result<Outcome> {
    use std::io::IsTerminal;
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let kind = clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        let mut command = Cli::command();
        let help = command.render_help();
        command.error(kind, help).exit();
    }
    let Some(Command::Tui(args)) = Cli::parse_from(["batchmax", "tui"]).command else {
        return Ok(Outcome::No);
    };
    tui::run(places, &args, global)
}

/// Runs what was typed.
pub fn run(cli: &Cli) -> Result<Outcome> {
    let places = Places::new(&cli.global)?;
    let Some(command) = &cli.command else { return without_command(&places, &cli.global) };
    match command {
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
        Command::Models(args) => list::models(&places, args, &cli.global),
        Command::Gpus(args) => list::gpus(&places, args, &cli.global),
        Command::Engines(args) => list::engines(&places, args, &cli.global),
        Command::Policies(args) => list::policies(&places, args, &cli.global),
    }
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
