//! Embeds `profiles/{gpus,models,policies,engines,quality}/*.toml`: a table of (kind, name, text) and one of aliases, so that a cold start
//! parses only what it needs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

const KINDS: [&str; 5] = ["gpus", "models", "policies", "engines", "quality"];

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
    let out = PathBuf::from(env::var("OUT_DIR").expect("set by cargo"));
    fs::write(out.join("built_in.rs"), format!("{table}];\n{aliases}];\n"))
        .expect("the output directory is writable");
    pack_surfaces(&root.join("kernels"), &out);
}

/// Packs `profiles/kernels/<device>/<framework>.toml`: the rows of all surfaces as binary, what stands above them as
/// text, so that a cold start unpacks only the surfaces it asks for.
fn pack_surfaces(dir: &Path, out: &Path) {
    println!("cargo:rerun-if-changed={}", dir.display());
    let mut blob: Vec<u8> = Vec::new();
    let mut table = String::from(
        "pub(super) struct Packed {\n    pub gpu: &'static str,\n    pub framework: &'static str,\n    \
         pub kernel: &'static str,\n    pub dtype: &'static str,\n    pub variant: &'static str,\n    \
         pub source: &'static str,\n    pub licence: &'static str,\n    pub date: &'static str,\n    \
         pub head: &'static str,\n    pub keys: usize,\n    pub start: usize,\n    pub end: usize,\n}\n\
         pub(super) static BLOB: &[u8] = include_bytes!(\"surfaces.bin\");\n\
         pub(super) static SURFACES: &[Packed] = &[\n",
    );
    let mut devices: Vec<_> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    devices.sort();
    for path in devices.iter().flat_map(|device| toml_files(device)) {
        println!("cargo:rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path).expect("it was listed");
        let file: toml::Table = text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let word = |table: &toml::Table, key: &str| {
            table.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned()
        };
        let surfaces = file["surface"].as_array().expect("a list of surfaces");
        for surface in surfaces {
            let mut head = surface.as_table().expect("a surface").clone();
            let rows = word(&head, "rows");
            head.remove("rows");
            let start = blob.len();
            let mut residuals = Vec::new();
            let mut keys = 0;
            for row in rows.lines().filter(|l| !l.trim().is_empty()) {
                let (key, values) = row.split_once(':').expect("key: residuals");
                for part in key.split_whitespace() {
                    let part: u32 = part.parse().expect("a size");
                    blob.extend_from_slice(&part.to_le_bytes());
                }
                for value in values.split_whitespace() {
                    let value: i16 =
                        if value == "." { i16::MIN } else { value.parse().expect("a residual") };
                    residuals.extend_from_slice(&value.to_le_bytes());
                }
                keys += 1;
            }
            blob.extend_from_slice(&residuals);
            writeln!(
                table,
                "    Packed {{ gpu: {:?}, framework: {:?}, kernel: {:?}, dtype: {:?}, variant: {:?}, \
                 source: {:?}, licence: {:?}, date: {:?}, head: {:?}, keys: {keys}, start: {start}, \
                 end: {} }},",
                word(&file, "gpu"),
                word(&file, "framework"),
                word(&head, "kernel"),
                word(&head, "dtype"),
                word(&head, "variant"),
                word(&file, "source"),
                word(&file, "licence"),
                word(&file, "date"),
                toml::to_string(&head).expect("it was TOML"),
                blob.len(),
            )
            .expect("a string");
        }
    }
    fs::write(out.join("surfaces.bin"), blob).expect("the output directory is writable");
    fs::write(out.join("surfaces.rs"), format!("{table}];\n"))
        .expect("the output directory is writable");
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
