//! `batchmax completions` and `batchmax man`: what a shell and a reader of manuals need.

use anyhow::{Result, anyhow};

use crate::cli::{CompletionsArgs, ManArgs};
use crate::commands::Outcome;
use crate::config::Config;
use crate::report::answer;

/// Prints the completions of a shell.
pub fn completions(args: &CompletionsArgs) -> Result<Outcome> {
    let mut command = Config::default().command();
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "batchmax", &mut text);
    answer(&String::from_utf8(text)?);
    Ok(Outcome::Answered)
}

/// Writes the manual, a page a command.
pub fn man(args: &ManArgs) -> Result<Outcome> {
    let command = Config::default().command().disable_help_subcommand(true);
    let problem = |e: std::io::Error| {
        anyhow!("--out {}: {e}; hint: a directory that you may write to", args.out.display())
    };
    std::fs::create_dir_all(&args.out).map_err(problem)?;
    clap_mangen::generate_to(command, &args.out).map_err(problem)?;
    answer(&args.out.display().to_string());
    Ok(Outcome::Answered)
}
