//! The configuration file: defaults of flags. A flag that is typed counts, else the environment, else this file, else what
//! is built in.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;
use batchmax_sim::units::{parse_bytes, parse_tokens};
use clap::{Arg, ColorChoice, Command, CommandFactory};
use toml::{Spanned, Value};

use crate::cli::{Cli, examples};
use crate::setting;

/// What the file may set: the flag with that name, `_` for `-`.
pub const KEYS: [&str; 18] = [
    "model",
    "gpu",
    "engine",
    "policy",
    "isl",
    "osl",
    "batch",
    "schedule",
    "memory",
    "kv_memory",
    "weight_dtype",
    "kv_dtype",
    "threads",
    "profiles",
    "data_dir",
    "colour",
    "quiet",
    "verbose",
];
/// What commands that only predict take a device from; others run here.
const PREDICTING: [&str; 5] = ["plan", "tui", "what-if", "explain", "config"];
/// Built-in defaults of what means the same in every command that has exactly this default.
const BUILT_IN: [(&str, &str); 7] = [
    ("model", "smollm2-135m"),
    ("gpu", "cpu"),
    ("policy", "full"),
    ("isl", "2k"),
    ("osl", "256"),
    ("batch", "max"),
    ("schedule", "static"),
];
/// How alike a misspelt key must be to what was meant.
const NEAR: f64 = 0.7;

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// One of [`KEYS`].
    pub key: &'static str,
    /// As it would be typed.
    pub value: String,
    /// Where it stands, from 1.
    pub line: usize,
}

/// The file's content; empty where there is none.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The file that was read.
    pub path: Option<PathBuf>,
    /// Its lines.
    pub entries: Vec<Entry>,
}

impl Config {
    /// The file that is named by `--config` or `BATCHMAX_CONFIG`, which must be there, else the user's if there is one.
    ///
    /// # Errors
    /// A file that can't be read, a key that is unknown, a value that is none.
    pub fn load(args: &[OsString]) -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let named = typed(args).or_else(|| variable("BATCHMAX_CONFIG")).map(PathBuf::from);
        let usual = || {
            let own = variable("XDG_CONFIG_HOME").map(PathBuf::from);
            let home = || Some(PathBuf::from(variable("HOME")?).join(".config"));
            Some(own.or_else(home)?.join("batchmax/config.toml"))
        };
        let must_be = named.is_some();
        let Some(path) = named.or_else(usual) else { return Ok(Self::default()) };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !must_be => {
                return Ok(Self::default());
            }
            Err(e) => bail!("--config {}: {e}", path.display()),
        };
        Ok(Self { entries: entries(&path, &text)?, path: Some(path) })
    }

    /// The parser of the command line, with the file's values as defaults.
    pub fn command(&self) -> Command {
        let mut command = examples::first(Cli::command());
        for entry in &self.entries {
            if (entry.key, entry.value.as_str()) == ("colour", "never") {
                command = command.color(ColorChoice::Never);
            }
            command = with_default(command, entry, true);
        }
        command
    }
}

/// What follows `--config`. The file decides how the rest is read, so this is looked for first.
fn typed(args: &[OsString]) -> Option<OsString> {
    let mut words = args.iter().skip(1).take_while(|w| *w != "--");
    while let Some(word) = words.next() {
        if word == "--config" {
            return words.next().cloned();
        }
        if let Some(path) = word.to_str().and_then(|w| w.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    None
}

fn entries(path: &Path, text: &str) -> Result<Vec<Entry>> {
    let line_of = |at: usize| 1 + text[..at.min(text.len())].matches('\n').count();
    let place = |line: usize| format!("{}:{line}", path.display());
    let table: BTreeMap<Spanned<String>, Spanned<Value>> =
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(span.start));
            anyhow!("{}: {}", place(line), error.message().replace('\n', " "))
        })?;
    let mut entries = Vec::new();
    for (key, value) in table {
        let line = line_of(key.span().start);
        let Some(known) = KEYS.into_iter().find(|k| k == key.get_ref()) else {
            let near = |k: &&str| strsim::jaro_winkler(key.get_ref(), k);
            let nearest = KEYS.into_iter().max_by(|a, b| near(a).total_cmp(&near(b)));
            let hint = match nearest.filter(|k| near(k) >= NEAR) {
                Some(meant) => format!("did you mean \"{meant}\"?"),
                None => format!("known: {}", KEYS.join(", ")),
            };
            bail!("{}: unknown key \"{}\"; hint: {hint}", place(line), key.get_ref());
        };
        let value = match value.into_inner() {
            Value::String(text) => text,
            Value::Integer(number) => number.to_string(),
            Value::Boolean(flag) => flag.to_string(),
            _ => bail!("{}: {known}: expected text, a number, true or false", place(line)),
        };
        check(known, &value).map_err(|e| anyhow!("{}: {known} = {value}: {e}", place(line)))?;
        entries.push(Entry { key: known, value, line });
    }
    entries.sort_by_key(|e| e.line);
    Ok(entries)
}

/// What can be said of a value without anything else.
fn check(key: &str, value: &str) -> Result<()> {
    let one_of = |known: &[&str]| match known.contains(&value) {
        true => Ok(()),
        false => Err(anyhow!("expected {}", known.join(" or "))),
    };
    match key {
        "isl" | "osl" => drop(parse_tokens(value)?),
        "batch" => drop(setting::batch(value)?),
        "schedule" => drop(value.parse::<Schedule>().map_err(|e| anyhow!("{e}"))?),
        "memory" | "kv_memory" => drop(parse_bytes(value)?),
        "weight_dtype" | "kv_dtype" => {
            for part in value.split(',') {
                part.parse::<DType>().map_err(|e| anyhow!("{e}"))?;
            }
        }
        "threads" => {
            value.parse::<usize>().map_err(|_| anyhow!("expected a number of threads"))?;
        }
        "colour" => one_of(&["auto", "never"])?,
        "quiet" | "verbose" => one_of(&["true", "false"])?,
        _ => {}
    }
    Ok(())
}

fn with_default(mut command: Command, entry: &Entry, root: bool) -> Command {
    let name = command.get_name().to_owned();
    if command.get_arguments().any(|arg| takes(&name, arg, entry.key, root)) {
        // A few words that live as long as the process.
        let value: &'static str = Box::leak(entry.value.clone().into_boxed_str());
        command = command.mut_arg(entry.key, |arg| arg.default_value(value));
    }
    let names: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    for name in names {
        command = command.mut_subcommand(&name, |c| with_default(c, entry, false));
    }
    command
}

/// Whether a command's argument is the one that the file means.
fn takes(command: &str, arg: &Arg, key: &str, root: bool) -> bool {
    if arg.get_id() != key || (["gpu", "engine"].contains(&key) && !PREDICTING.contains(&command)) {
        return false;
    }
    let own = arg.get_default_values();
    match BUILT_IN.iter().find(|(name, _)| *name == key) {
        Some((_, built_in)) => matches!(own, [one] if one == *built_in),
        // Flags of every command stand at the root.
        None => root || own.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config> {
        let path = PathBuf::from("c.toml");
        Ok(Config { entries: entries(&path, text)?, path: Some(path) })
    }

    fn values(config: &Config, line: &str, key: &str) -> Vec<String> {
        let command = config.command();
        let matches = command.try_get_matches_from(line.split(' ')).expect("accepted");
        let (_, sub) = matches.subcommand().expect("a command");
        let found = sub.get_raw(key).into_iter().flatten();
        found.map(|v| v.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn the_file_comes_before_defaults_and_behind_flags() {
        let config =
            read("model = \"llama-3.1-8b\"\ngpu = \"h100-sxm\"\nisl = 4096\n").expect("read");
        assert_eq!(values(&config, "batchmax plan", "model"), ["llama-3.1-8b"]);
        assert_eq!(values(&config, "batchmax what-if", "isl"), ["4096"]);
        assert_eq!(values(&config, "batchmax what-if --isl 1k", "isl"), ["1k"]);
        assert_eq!(values(&config, "batchmax plan", "osl"), ["256"]);
        assert_eq!(values(&config, "batchmax explain", "gpu"), ["h100-sxm"]);
        // Filters of other commands have the same name and another meaning.
        assert!(values(&config, "batchmax calibrate", "gpu").is_empty());
        // A search over all policies stays one.
        let one = read("policy = \"snapkv\"").expect("read");
        assert!(values(&one, "batchmax plan", "policy").is_empty());
        assert_eq!(values(&one, "batchmax what-if", "policy"), ["snapkv"]);
        let quiet = read("quiet = true").expect("read");
        assert_eq!(values(&quiet, "batchmax models", "quiet"), ["true"]);
    }

    #[cfg(feature = "exec")]
    #[test]
    fn a_default_device_does_not_keep_this_machine_from_running() {
        let config = read("gpu = \"h100-sxm\"").expect("read");
        assert_eq!(values(&config, "batchmax validate", "gpu"), ["cpu"]);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, said) in [
            (
                "model = \"a\"\nmodle = \"b\"\n",
                "c.toml:2: unknown key \"modle\"; hint: did you mean \"model\"?",
            ),
            ("\n\nzzz = 1\n", "c.toml:3: unknown key \"zzz\"; hint: known: model, gpu"),
            ("isl = \"long\"\n", "c.toml:1: isl = long:"),
            ("threads = \"many\"\n", "c.toml:1: threads = many: expected a number"),
            ("quiet = 3\n", "c.toml:1: quiet = 3: expected true or false"),
            ("colour = \"pink\"\n", "c.toml:1: colour = pink: expected auto or never"),
            ("gpu = [1]\n", "c.toml:1: gpu: expected text"),
            ("gpu = \n", "c.toml:1: "),
            ("gpu = \"a\"\ngpu = \"b\"\n", "c.toml:2: "),
        ] {
            let error = read(text).expect_err("refused").to_string();
            assert!(error.starts_with(said), "{text}: {error}");
        }
    }

    #[test]
    fn the_file_is_found_among_the_words() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(typed(&words("batchmax plan --config a.toml")), Some("a.toml".into()));
        assert_eq!(typed(&words("batchmax --config=b.toml plan")), Some("b.toml".into()));
        assert_eq!(typed(&words("batchmax plan --isl 2k")), None);
        assert_eq!(typed(&words("batchmax run -- --config x")), None);
    }
}
