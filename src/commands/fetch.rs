//! `batchmax fetch`: the default model, or a local one under a name.

use anyhow::{Result, bail};

use crate::cli::{FetchArgs, Global};
use crate::commands::Outcome;
use crate::setting::Places;

/// The model that is fetched by name.
#[cfg(feature = "exec")]
const DEFAULT: &str = "smollm2-135m";

/// Fetches or registers.
#[cfg(feature = "exec")]
pub fn run(places: &Places, args: &FetchArgs, global: &Global) -> Result<Outcome> {
    use crate::report::{answer, json};
    use std::path::Path;

    let path = if args.what == DEFAULT {
        crate::commands::local::fetch_default(places, global)?
    } else if Path::new(&args.what).exists() {
        batchmax_exec::fetch::register(
            &places.data_dir,
            Path::new(&args.what),
            args.name.as_deref(),
        )?
        .path
    } else {
        bail!(
            "{}: no such file, and not a model that can be fetched; hint: fetch {DEFAULT}, a GGUF file or a safetensors directory",
            args.what
        );
    };
    if global.json {
        answer(&json::document("fetch", serde_json::json!({ "path": path })));
    } else {
        answer(&path.display().to_string());
    }
    Ok(Outcome::Answered)
}

/// Without the executor there is nothing to fetch for.
#[cfg(not(feature = "exec"))]
pub fn run(_places: &Places, args: &FetchArgs, _global: &Global) -> Result<Outcome> {
    bail!("{}: this build has no executor; hint: build with the default features", args.what)
}
