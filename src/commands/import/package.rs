//! The Python package aiconfigurator-core: a wheel, or the folder it was installed to. Nothing of it is run or unpacked
//! to the disk.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use zip::ZipArchive;

use super::summary::tame;

/// The largest member that is read; the tables have at most a few megabytes. A wheel may claim any size.
const LARGEST_MEMBER: u64 = 256 << 20;
/// The name of the installed package.
const NAME: &str = "aiconfigurator_core";

/// A table of the package: `data/GPU/FAMILY/FRAMEWORK/VERSION/TABLE.parquet` under `systems/`.
#[cfg_attr(
    not(feature = "import-parquet"),
    allow(dead_code, reason = "only its reader lists tables")
)]
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TablePath {
    /// Device.
    pub gpu: String,
    /// Kind of kernel.
    pub family: String,
    /// Engine or library.
    pub framework: String,
    /// Its version.
    pub version: String,
    /// Name of the table.
    pub table: String,
    /// Path under `systems/`.
    pub path: String,
}

impl TablePath {
    fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').collect();
        let ["data", gpu, family, framework, version, file] = parts.as_slice() else { return None };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+');
        let name =
            |p: &str| !p.is_empty() && !p.starts_with('.') && p.len() < 100 && p.chars().all(plain);
        if !parts.iter().all(|p| name(p)) {
            return None;
        }
        let table = file.strip_suffix(".parquet")?.to_owned();
        let [gpu, family, framework, version] =
            [gpu, family, framework, version].map(|s| (*s).to_owned());
        Some(Self { gpu, family, framework, version, table, path: path.to_owned() })
    }
}

/// Where the files are.
enum Store {
    Folder { systems: PathBuf },
    Wheel { archive: ZipArchive<BufReader<File>>, systems: String },
}

/// The package.
pub struct Package {
    name: String,
    version: Option<String>,
    store: Store,
}

impl Package {
    /// Opens a wheel or a folder.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        if path.is_dir() {
            let candidates =
                ["", "systems", "aiconfigurator_core/systems", "aiconfigurator/systems"];
            let found = candidates.iter().map(|c| path.join(c)).find(|systems| {
                systems.join("data").is_dir() || systems.join("silicon_sample.csv").is_file()
            });
            let Some(systems) = found else {
                bail!(
                    "{name}: no systems/ in this folder; hint: give the wheel, or the folder {NAME}"
                );
            };
            let version = versions_beside(&systems);
            return Ok(Self { name, version, store: Store::Folder { systems } });
        }
        let file = File::open(path).with_context(|| name.clone())?;
        let archive = ZipArchive::new(BufReader::new(file))
            .map_err(|e| anyhow::anyhow!("{name}: not a wheel: {}", tame(&e.to_string())))?;
        let names: Vec<&str> =
            archive.file_names_raw().filter_map(|n| str::from_utf8(n).ok()).collect();
        let version = names.iter().find_map(|n| version_in(n.split('/').next()?));
        let found = names.iter().find_map(|n| {
            let at = n.find("/systems/data/").or_else(|| n.find("/systems/silicon_sample.csv"))?;
            Some(n[..at].to_owned() + "/systems/")
        });
        let Some(systems) = found else {
            bail!(
                "{name}: no systems/ in this wheel; hint: pip download aiconfigurator-core --no-deps"
            );
        };
        Ok(Self { name, version, store: Store::Wheel { archive, systems } })
    }

    /// What rows call it.
    pub fn label(&self) -> String {
        self.version.as_ref().map_or_else(|| NAME.to_owned(), |v| format!("{NAME}-{v}"))
    }

    /// The path that was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All Parquet tables, sorted.
    #[cfg_attr(
        not(feature = "import-parquet"),
        allow(dead_code, reason = "only its reader lists tables")
    )]
    pub fn tables(&self) -> Vec<TablePath> {
        let mut tables: Vec<TablePath> = match &self.store {
            Store::Wheel { archive, systems } => archive
                .file_names_raw()
                .filter_map(|n| str::from_utf8(n).ok()?.strip_prefix(systems.as_str()))
                .filter_map(TablePath::parse)
                .collect(),
            Store::Folder { systems } => {
                let mut paths = vec!["data".to_owned()];
                for _ in 0..5 {
                    paths = paths.iter().flat_map(|p| entries(systems, p)).collect();
                }
                paths.iter().filter_map(|p| TablePath::parse(p)).collect()
            }
        };
        tables.sort();
        tables
    }

    /// The bytes of a file under `systems/`.
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        let place = format!("{}: {path}", self.name);
        let mut bytes = Vec::new();
        let read = |source: &mut dyn Read, bytes: &mut Vec<u8>| {
            source.take(LARGEST_MEMBER + 1).read_to_end(bytes).map(|_| ())
        };
        let outcome = match &mut self.store {
            Store::Folder { systems } => {
                File::open(systems.join(path)).and_then(|mut f| read(&mut f, &mut bytes))
            }
            Store::Wheel { archive, systems } => {
                let mut member = archive
                    .by_name(&format!("{systems}{path}"))
                    .map_err(|e| anyhow::anyhow!("{place}: {}", tame(&e.to_string())))?;
                read(&mut member, &mut bytes)
            }
        };
        outcome.map_err(|e| anyhow::anyhow!("{place}: {}", tame(&e.to_string())))?;
        if bytes.len() as u64 > LARGEST_MEMBER {
            bail!("{place}: over {} MB, too large", LARGEST_MEMBER >> 20);
        }
        Ok(bytes)
    }
}

/// The entries of a folder, as paths under `systems`; what can't be listed has none.
fn entries(systems: &Path, path: &str) -> Vec<String> {
    let list = std::fs::read_dir(systems.join(path)).into_iter().flatten().flatten();
    list.filter_map(|e| Some(format!("{path}/{}", e.file_name().to_str()?))).collect()
}

/// `aiconfigurator_core-0.12.0.dist-info` -> `0.12.0`.
fn version_in(folder: &str) -> Option<String> {
    let version = folder.strip_prefix(NAME)?.strip_prefix('-')?.strip_suffix(".dist-info")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+');
    (version.len() < 40 && version.chars().all(plain)).then(|| version.to_owned())
}

fn versions_beside(systems: &Path) -> Option<String> {
    let site = systems.parent()?.parent()?;
    let list = std::fs::read_dir(site).into_iter().flatten().flatten();
    list.filter_map(|e| version_in(e.file_name().to_str()?)).next()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
pub mod tests {
    use std::io::Write;

    use super::*;

    /// A wheel with the given members.
    pub fn wheel(dir: &Path, members: &[(&str, &[u8])]) -> PathBuf {
        let path = dir.join("p.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in members {
            zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        path
    }

    #[test]
    fn a_wheel_and_its_folder_hold_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let table = "aiconfigurator_core/systems/data/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet";
        let about = "aiconfigurator_core-0.12.0.dist-info/METADATA";
        let evil = "aiconfigurator_core/systems/data/../x/vllm/1/a b.parquet";
        let path = wheel(dir.path(), &[(table, b"abc"), (about, b""), (evil, b"")]);
        for name in [table, about] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, if name == table { "abc" } else { "" }).unwrap();
        }
        for place in [path, dir.path().to_owned(), dir.path().join("aiconfigurator_core")] {
            let mut package = Package::open(&place).unwrap();
            assert_eq!(package.label(), "aiconfigurator_core-0.12.0");
            let tables = package.tables();
            assert_eq!(tables.len(), 1, "{place:?}");
            assert_eq!(
                (tables[0].gpu.as_str(), tables[0].table.as_str()),
                ("h100_sxm", "gemm_perf")
            );
            assert_eq!(package.read(&tables[0].path).unwrap(), b"abc");
            assert!(package.read("data/none").is_err());
        }
    }

    #[test]
    fn what_is_no_package_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = wheel(dir.path(), &[("a/b", b"x")]);
        let whole = std::fs::read(&path).unwrap();
        let cut = dir.path().join("cut.whl");
        std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        for (place, part) in
            [(&path, "no systems/"), (&cut, "not a wheel"), (&empty, "no systems/")]
        {
            let error = Package::open(place).err().expect("refused").to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{error}");
        }
    }
}
