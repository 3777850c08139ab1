//! Where files are kept, by the XDG conventions.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// The data directory: `--data-dir`, else `$XDG_DATA_HOME/batchmax`, else `~/.local/share/batchmax`.
pub fn data_dir(given: Option<&PathBuf>) -> Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir.clone());
    }
    if let Some(dir) = std::env::var_os("XDG_DATA_HOME").filter(|d| !d.is_empty()) {
        return Ok(PathBuf::from(dir).join("batchmax"));
    }
    let home = std::env::var_os("HOME")
        .filter(|h| !h.is_empty())
        .context("neither XDG_DATA_HOME nor HOME is set; hint: give --data-dir DIR")?;
    Ok(PathBuf::from(home).join(".local/share/batchmax"))
}

/// Writes a file whole or not at all: to a neighbour first, then renamed.
pub fn write_whole(path: &std::path::Path, content: impl AsRef<[u8]>) -> Result<()> {
    let problem = |e: std::io::Error| {
        let hint = "give a path in a directory that you may write to";
        anyhow::anyhow!("{}: {e}; hint: {hint}", path.display())
    };
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(problem)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written =
        std::fs::write(&temporary, content).and_then(|()| std::fs::rename(&temporary, path));
    if let Err(e) = written {
        // The first error is the one to report; a leftover that can't be removed changes nothing.
        std::fs::remove_file(&temporary).ok();
        return Err(problem(e));
    }
    Ok(())
}
