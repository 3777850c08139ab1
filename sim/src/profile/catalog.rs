//! Descriptions by name: built in, overridden by user directories, or read from a file that is named outright.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::engine::Engine;

use super::{Gpu, Model, ProfileError, Quality, gguf::model_from_gguf, hf::model_from_hf};

mod built_in {
    include!(concat!(env!("OUT_DIR"), "/built_in.rs"));
}

/// No description a person writes is larger.
const LARGEST_FILE: u64 = 1 << 20;
/// Names farther apart than this are not offered as a correction (Jaro-Winkler similarity).
const NEAR: f64 = 0.8;

/// Where descriptions come from.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    user_dirs: Vec<PathBuf>,
}

impl Catalog {
    /// What ships with the program.
    #[must_use]
    pub fn built_in() -> Self {
        Self::default()
    }

    /// `dir/gpus/*.toml`, `dir/models/*.toml` and `dir/policies/*.toml` override what was there before, by name.
    #[must_use]
    pub fn with_user_dir(mut self, dir: PathBuf) -> Self {
        self.user_dirs.push(dir);
        self
    }

    /// A device by name, alias or file.
    pub fn gpu(&self, name: &str) -> Result<Gpu, ProfileError> {
        let mut gpu: Gpu = self.described("gpus", "gpu", name, |g: &Gpu| &g.name)?;
        if gpu.label.is_empty() {
            gpu.label.clone_from(&gpu.name);
        }
        gpu.validate(&self.origin("gpus", name))?;
        Ok(gpu)
    }

    /// A model by name, alias or file: TOML, `config.json` or its directory, GGUF.
    pub fn model(&self, name: &str) -> Result<Model, ProfileError> {
        let path = Path::new(name);
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            return model_from_gguf(path);
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"))
            || path.join("config.json").is_file()
        {
            return model_from_hf(path);
        }
        let model: Model = self.described("models", "model", name, |m: &Model| &m.name)?;
        model.validate(&self.origin("models", name))?;
        Ok(model)
    }

    /// All devices, by name.
    pub fn gpus(&self) -> Result<Vec<Gpu>, ProfileError> {
        self.names("gpus").iter().map(|n| self.gpu(n)).collect()
    }

    /// All models, by name.
    pub fn models(&self) -> Result<Vec<Model>, ProfileError> {
        self.names("models").iter().map(|n| self.model(n)).collect()
    }

    /// An engine by name, alias or file.
    pub fn engine(&self, name: &str) -> Result<Engine, ProfileError> {
        let mut engine: Engine = self.described("engines", "engine", name, |e: &Engine| &e.name)?;
        if let Some(like) = engine.like.as_ref().filter(|_| engine.generations.is_empty()) {
            let other: Engine = self.described("engines", "engine", like, |e: &Engine| &e.name)?;
            engine.generations = other.generations;
        }
        engine.validate(&self.origin("engines", name))?;
        Ok(engine)
    }

    /// All engines, by name.
    pub fn engines(&self) -> Result<Vec<Engine>, ProfileError> {
        self.names("engines").iter().map(|n| self.engine(n)).collect()
    }

    /// What policies were measured to lose on a model, where that was measured.
    pub fn quality(&self, model: &str) -> Result<Option<Quality>, ProfileError> {
        if !self.names("quality").iter().any(|n| n == model) {
            return Ok(None);
        }
        let quality: Quality =
            self.described("quality", "quality", model, |q: &Quality| &q.name)?;
        quality.validate(&self.origin("quality", model))?;
        Ok(Some(quality))
    }

    /// Names of the policy presets.
    #[must_use]
    pub fn policy_names(&self) -> Vec<String> {
        self.names("policies")
    }

    /// A preset's origin and text.
    pub fn policy_text(&self, name: &str) -> Result<(String, String), ProfileError> {
        self.text("policies", "policy", name)
    }

    /// Where a description comes from: `built-in gpus/h100-sxm.toml`, or the user's file.
    #[must_use]
    pub fn origin(&self, kind: &str, name: &str) -> String {
        self.file(kind, name).map_or_else(
            || format!("built-in {kind}/{}.toml", resolve_alias(kind, name)),
            |path| path.display().to_string(),
        )
    }

    /// Where the user's file of a description lies, if it is one.
    #[must_use]
    pub fn folder(&self, kind: &str, name: &str) -> Option<PathBuf> {
        self.file(kind, name)?.parent().map(Path::to_owned)
    }

    fn described<T: DeserializeOwned>(
        &self,
        kind: &'static str,
        singular: &'static str,
        name: &str,
        name_of: impl Fn(&T) -> &String,
    ) -> Result<T, ProfileError> {
        let (origin, text) = self.text(kind, singular, name)?;
        let described: T = parse_toml(&origin, &text)?;
        let stem = Path::new(&origin).file_stem().map(|s| s.to_string_lossy().into_owned());
        if stem.as_deref() != Some(name_of(&described)) {
            return Err(ProfileError::Invalid {
                origin,
                key: "name".to_owned(),
                problem: format!(
                    "\"{0}\" is not the name of the file; hint: call the file {0}.toml, or change its name to the file's",
                    name_of(&described)
                ),
            });
        }
        Ok(described)
    }

    fn text(
        &self,
        kind: &'static str,
        singular: &'static str,
        name: &str,
    ) -> Result<(String, String), ProfileError> {
        if let Some(path) = self.file(kind, name) {
            return Ok((path.display().to_string(), read_text(&path)?));
        }
        let real = resolve_alias(kind, name);
        built_in::FILES
            .iter()
            .find(|(k, n, _)| *k == kind && *n == real)
            .map(|(_, n, text)| (format!("built-in {kind}/{n}.toml"), (*text).to_owned()))
            .ok_or_else(|| ProfileError::Unknown {
                kind: singular,
                name: name.to_owned(),
                hint: self.hint(kind, name),
            })
    }

    /// The file that a name means, if it is not a built-in one.
    fn file(&self, kind: &str, name: &str) -> Option<PathBuf> {
        let named = Path::new(name);
        if named.extension().is_some_and(|e| e == "toml") && named.is_file() {
            return Some(named.to_owned());
        }
        self.user_file(kind, name)
    }

    fn user_file(&self, kind: &str, name: &str) -> Option<PathBuf> {
        // A name is one component: nothing reaches out of the directory.
        if name.contains(['/', '\\']) || name.starts_with('.') {
            return None;
        }
        self.user_dirs
            .iter()
            .rev()
            .map(|dir| dir.join(kind).join(format!("{name}.toml")))
            .find(|path| path.is_file() && (kind != "models" || !is_registration(path)))
    }

    fn names(&self, kind: &str) -> Vec<String> {
        let mut names: BTreeMap<String, ()> = built_in::FILES
            .iter()
            .filter(|(k, ..)| *k == kind)
            .map(|(_, n, _)| ((*n).to_owned(), ()))
            .collect();
        for dir in &self.user_dirs {
            for entry in std::fs::read_dir(dir.join(kind)).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.extension().is_some_and(|e| e == "toml")
                    && (kind != "models" || !is_registration(&path))
                    && let Some(stem) = path.file_stem()
                {
                    names.insert(stem.to_string_lossy().into_owned(), ());
                }
            }
        }
        names.into_keys().collect()
    }

    fn hint(&self, kind: &str, name: &str) -> String {
        let wanted = name.to_lowercase();
        let aliases = built_in::ALIASES.iter().filter(|(k, ..)| *k == kind);
        let known = self.names(kind).into_iter().map(|n| (n.clone(), n));
        let candidates = known.chain(aliases.map(|(_, a, n)| ((*a).to_owned(), (*n).to_owned())));
        let nearest = candidates
            .map(|(typed, real)| (strsim::jaro_winkler(&wanted, &typed), real))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        match nearest {
            Some((similarity, real)) if similarity >= NEAR => format!("did you mean \"{real}\"?"),
            // No command lists engines: they are few.
            _ if kind == "engines" => {
                format!("known: {}; a file works too", self.names(kind).join(", "))
            }
            _ => format!("batchmax {kind} lists them; a file works too"),
        }
    }
}

/// A model file that only says where weights are (written when a local model is registered).
fn is_registration(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| !text.contains("layers"))
}

fn resolve_alias(kind: &str, name: &str) -> String {
    let lower = name.to_lowercase();
    if built_in::FILES.iter().any(|(k, n, _)| *k == kind && *n == lower) {
        return lower;
    }
    built_in::ALIASES
        .iter()
        .find(|(k, alias, _)| *k == kind && *alias == lower)
        .map_or_else(|| name.to_owned(), |(_, _, real)| (*real).to_owned())
}

fn read_text(path: &Path) -> Result<String, ProfileError> {
    let io = |problem| ProfileError::Io { path: path.to_owned(), problem };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > LARGEST_FILE {
        return Err(ProfileError::Invalid {
            origin: path.display().to_string(),
            key: "the file".to_owned(),
            problem: format!(
                "{size} bytes are more than a description needs (at most {LARGEST_FILE})"
            ),
        });
    }
    let bytes = std::fs::read(path).map_err(io)?;
    String::from_utf8(bytes).map_err(|e| ProfileError::Syntax {
        origin: path.display().to_string(),
        line: 1 + e.as_bytes()[..e.utf8_error().valid_up_to()]
            .iter()
            .filter(|b| **b == b'\n')
            .count(),
        problem: "not UTF-8 text".to_owned(),
    })
}

/// Parses TOML; an error is one line with file and line, and a suggestion for a misspelt key.
pub fn parse_toml<T: DeserializeOwned>(origin: &str, text: &str) -> Result<T, ProfileError> {
    toml::from_str(text).map_err(|error| {
        let line = error
            .span()
            .map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        let problem = explained(error.message());
        ProfileError::Syntax { origin: origin.to_owned(), line, problem }
    })
}

/// What serde said, in one line, and what to do; of the fields it would have expected only the one that was meant, where that
/// is clear.
pub(crate) fn explained(message: &str) -> String {
    let problem = message.trim().replace('\n', " ");
    if let Some(field) = problem.strip_prefix("missing field ") {
        return format!("{problem}; hint: add {field}");
    }
    if let Some((found, number)) = problem.split_once(", expected ").and_then(number) {
        let hint = if found.contains("string") {
            "; hint: a bare number, without quotes or units"
        } else {
            ""
        };
        return format!("{found}, expected {number}{hint}");
    }
    match (suggestion(&problem), problem.split_once(", expected")) {
        (Some(meant), Some((unknown, _))) => format!("{unknown}; did you mean `{meant}`?"),
        _ => problem,
    }
}

/// What was found, and in words the type that was expected, where it is one of numbers.
fn number<'a>((found, expected): (&'a str, &str)) -> Option<(&'a str, &'static str)> {
    match expected {
        "u32" => Some((found, "a whole number from 0 to 4294967295")),
        "u64" | "usize" => Some((found, "a whole number from 0 on")),
        "i32" | "i64" => Some((found, "a whole number")),
        "f32" | "f64" => Some((found, "a number")),
        _ => None,
    }
}

/// The expected word that is nearest to the unknown one, from serde's own message.
fn suggestion(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown ")?;
    let (wrong, expected) = rest.split_once('`')?.1.split_once('`')?;
    expected
        .split('`')
        .skip(1)
        .step_by(2)
        .map(|field| (strsim::jaro_winkler(wrong, field), field))
        .filter(|(similarity, _)| *similarity >= NEAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, field)| field.to_owned())
}
