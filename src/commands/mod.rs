//! One verb a file.

#[cfg(feature = "exec")]
mod calibrate;
#[cfg(feature = "exec")]
mod compare;
mod explain;
mod fetch;
mod import;
mod list;
#[cfg(feature = "exec")]
mod local;
mod plan;
#[cfg(feature = "exec")]
mod profile;
#[cfg(feature = "exec")]
mod run;
mod scenarios;
#[cfg(feature = "exec")]
mod validate;
mod what_if;

use anyhow::Result;

use crate::cli::{Cli, Command};
use crate::setting::Places;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Answered,
    /// The answer is no: nothing fits, or a tolerance is exceeded.
    No,
}

/// Runs what was typed.
pub fn run(cli: &Cli) -> Result<Outcome> {
    let places = Places::new(&cli.global)?;
    match &cli.command {
        Command::Plan(args) => plan::run(&places, args, &cli.global),
        Command::WhatIf(args) => what_if::run(&places, args, &cli.global),
        Command::Explain(args) => explain::run(&places, args, &cli.global),
        Command::Fetch(args) => fetch::run(&places, args, &cli.global),
        Command::Import(args) => import::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Profile(args) => profile::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Calibrate(args) => calibrate::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Run(args) => run::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Validate(args) => validate::run(&places, args, &cli.global),
        #[cfg(feature = "exec")]
        Command::Compare(args) => compare::run(&places, args, &cli.global),
        Command::Models(args) => list::models(&places, args, &cli.global),
        Command::Gpus(args) => list::gpus(&places, args, &cli.global),
        Command::Policies(args) => list::policies(&places, args, &cli.global),
    }
}
