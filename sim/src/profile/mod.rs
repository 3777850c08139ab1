//! Descriptions as data: models, devices, policy presets and fitted kernel profiles, read from TOML, a Hugging Face
//! `config.json` or a GGUF header.
//!
//! The only place in this crate that touches the file system. User directories override what is built in; unknown
//! keys are errors that name file and line.

pub mod catalog;
pub mod gguf;
pub mod gpu;
pub mod hf;
pub mod model;
pub mod quality;

use std::path::PathBuf;

pub use catalog::Catalog;
pub use gguf::{GgmlType, GgufHeader, GgufTensor, GgufValue, model_from_gguf};
pub use gpu::{Gpu, Peaks};
pub use hf::model_from_hf;
pub use model::{Activation, Model, RopeScaling, SlidingWindow};
pub use quality::{Lost, Quality, QualityRow};

/// Why a description could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file can't be read.
    #[error("{}: {problem}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        problem: std::io::Error,
    },
    /// The text is not what the format asks for; `problem` is one line.
    #[error("{origin}:{line}: {problem}")]
    Syntax {
        /// File or `built-in ...`.
        origin: String,
        /// Line, from 1.
        line: usize,
        /// What was wrong.
        problem: String,
    },
    /// A value that can't be.
    #[error("{origin}: {key}: {problem}")]
    Invalid {
        /// File or `built-in ...`.
        origin: String,
        /// The key.
        key: String,
        /// What was wrong and what was expected.
        problem: String,
    },
    /// A name that no profile bears.
    #[error("no {kind} \"{name}\"{}", hint_text(hint))]
    Unknown {
        /// `model`, `gpu`, `policy`, ...
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// The nearest known name, if one is near, else where to look.
        hint: String,
    },
}

fn hint_text(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!("; hint: {hint}") }
}
