//! Arguments of the commands that set the program up.

use std::path::PathBuf;

use clap::Args;
use clap_complete::Shell;

use super::ConfigArgs;

/// `completions`.
#[derive(Args, Clone, Debug)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// `man`.
#[derive(Args, Clone, Debug)]
pub struct ManArgs {
    /// Directory for the pages, one per command
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// `doctor`.
#[derive(Args, Clone, Debug)]
pub struct DoctorArgs {
    /// Model whose weights and profile are looked for
    #[arg(long, short, default_value = "smollm2-135m")]
    pub model: String,
}

/// `config`.
#[derive(Args, Clone, Debug)]
pub struct ShowConfigArgs {
    #[command(flatten)]
    pub query: ConfigArgs,
}
