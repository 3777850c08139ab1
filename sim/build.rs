//! Embeds `profiles/{gpus,models,policies}/*.toml`: a table of (kind, name, text) and one of aliases, so that a cold start
//! parses only what it needs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

const KINDS: [&str; 3] = ["gpus", "models", "policies"];

fn main() {
    let root =
        PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../profiles");
    let mut table = String::from("pub(super) const FILES: &[(&str, &str, &str)] = &[\n");
    let mut aliases = String::from("pub(super) const ALIASES: &[(&str, &str, &str)] = &[\n");
    for kind in KINDS {
        let dir = root.join(kind);
        println!("cargo:rerun-if-changed={}", dir.display());
        for path in toml_files(&dir) {
            println!("cargo:rerun-if-changed={}", path.display());
            let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
            let path = path.canonicalize().expect("it was listed");
            writeln!(table, "    ({kind:?}, {name:?}, include_str!({path:?})),").expect("a string");
            for alias in aliases_of(&path) {
                let alias = alias.to_lowercase();
                writeln!(aliases, "    ({kind:?}, {alias:?}, {name:?}),").expect("a string");
            }
        }
    }
    let out = PathBuf::from(env::var("OUT_DIR").expect("set by cargo")).join("built_in.rs");
    fs::write(out, format!("{table}];\n{aliases}];\n")).expect("the output directory is writable");
}

fn toml_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "toml"))
        .collect();
    files.sort();
    files
}

fn aliases_of(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).expect("it was listed");
    let table: toml::Table = text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    match table.get("aliases") {
        Some(toml::Value::Array(list)) => {
            list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
        }
        _ => Vec::new(),
    }
}
