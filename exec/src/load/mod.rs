//! Weights on disk, a tensor at a time.
//!
//! A [`Checkpoint`] is a GGUF file or a Hugging Face directory behind one set of [`Role`]s: names, fused tensors, block
//! formats and the conventions of each converter end here. Tensors are read in bands of rows with ordinary reads, so
//! the peak is a few megabytes beyond what the caller keeps. A file is hostile until it is parsed: sizes are checked
//! against the file before anything is allocated, shapes against the description, values for NaN.

mod chat;
mod codes;
mod identity;
mod names;
mod open;
mod pre_tokenizer;
mod rows;
mod stored;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use batchmax_kernels::gemm::CodeRow;
use batchmax_sim::profile::{GgufHeader, Model, ProfileError};

pub(crate) use identity::hex;
use names::Part;
use stored::{Shard, Stored};
pub use tokenizer::Tokenizer;

/// Why a checkpoint can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The header or configuration does not describe a model.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A file can't be read.
    #[error("{}: {problem}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        problem: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What was wrong and what to do.
        problem: String,
    },
    /// A tensor is missing, misshapen, unreadable or not a number.
    #[error("{}: {tensor} {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was wrong: `is ...`, `holds ...`.
        problem: String,
    },
    /// Text can't become token ids or the reverse.
    #[error("{}: {problem}; hint: token ids can be given instead of text", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        problem: String,
    },
}

/// What a tensor is for, whatever its file calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token embedding, vocab x hidden.
    Embedding,
    /// Norm before attention.
    AttentionNorm,
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Bias of the queries.
    QueryBias,
    /// Bias of the keys.
    KeyBias,
    /// Bias of the values.
    ValueBias,
    /// Norm of the queries per head.
    QueryNorm,
    /// Norm of the keys per head.
    KeyNorm,
    /// Attention's output projection.
    Output,
    /// Norm behind attention.
    PostAttentionNorm,
    /// Norm before the feed-forward block.
    FfnNorm,
    /// Gate projection.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
    /// Norm behind the feed-forward block.
    PostFfnNorm,
    /// Norm before the head.
    FinalNorm,
    /// Output head, vocab x hidden.
    Head,
}

impl Role {
    /// Roles with one tensor per layer.
    const LAYERED: [Self; 16] = [
        Self::AttentionNorm,
        Self::Query,
        Self::Key,
        Self::Value,
        Self::QueryBias,
        Self::KeyBias,
        Self::ValueBias,
        Self::QueryNorm,
        Self::KeyNorm,
        Self::Output,
        Self::PostAttentionNorm,
        Self::FfnNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
        Self::PostFfnNorm,
    ];

    fn is_norm(self) -> bool {
        use Role::{
            AttentionNorm, FfnNorm, FinalNorm, KeyNorm, PostAttentionNorm, PostFfnNorm, QueryNorm,
        };
        matches!(
            self,
            AttentionNorm
                | FfnNorm
                | FinalNorm
                | KeyNorm
                | PostAttentionNorm
                | PostFfnNorm
                | QueryNorm
        )
    }

    /// (rows, columns) in this model; `None` when the model has no such tensor.
    fn shape_in(self, model: &Model) -> Option<(usize, usize)> {
        let (hidden, ffn, vocab) =
            (model.hidden as usize, model.ffn as usize, model.vocab as usize);
        let head = model.head_dim as usize;
        let (q, kv) = (model.heads as usize * head, model.kv_heads as usize * head);
        let (present, shape) = match self {
            Self::Embedding => (true, (vocab, hidden)),
            Self::Head => (!model.tied_embeddings, (vocab, hidden)),
            Self::AttentionNorm | Self::FfnNorm | Self::FinalNorm => (true, (1, hidden)),
            Self::PostAttentionNorm | Self::PostFfnNorm => (model.post_norms, (1, hidden)),
            Self::Query => (true, (q, hidden)),
            Self::Key | Self::Value => (true, (kv, hidden)),
            Self::QueryBias => (model.attention_bias, (1, q)),
            Self::KeyBias | Self::ValueBias => (model.attention_bias, (1, kv)),
            Self::QueryNorm | Self::KeyNorm => (model.qk_norm, (1, head)),
            Self::Output => (true, (hidden, q)),
            Self::Gate => (model.gated_ffn, (ffn, hidden)),
            Self::Up => (true, (ffn, hidden)),
            Self::Down => (true, (hidden, ffn)),
        };
        present.then_some(shape)
    }
}

/// An open checkpoint.
pub struct Checkpoint {
    path: PathBuf,
    model: Model,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Stored>,
    /// `None`: a Hugging Face directory.
    header: Option<GgufHeader>,
    rope_factors: Option<Vec<f32>>,
    interleaved: bool,
    /// Gemma stores norm weights minus one; only GGUF converters add it back.
    norms_lack_one: bool,
    /// What tensor names start with, where the file is not GGUF.
    prefix: &'static str,
}

impl Checkpoint {
    /// Opens a GGUF file, a directory with `config.json` and safetensors, or a directory with one GGUF file, and checks
    /// that every tensor the model needs is there in its shape.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let checkpoint = open::open(path)?;
        // A model that can't be run may hold its weights in ways that the roles don't cover.
        if checkpoint.model.not_executable.is_none() {
            for role in [Role::Embedding, Role::FinalNorm, Role::Head] {
                checkpoint.part(role, None)?;
            }
            for layer in 0..checkpoint.model.layers {
                for role in Role::LAYERED {
                    checkpoint.part(role, Some(layer))?;
                }
            }
        }
        Ok(checkpoint)
    }

    /// The file or directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's description, from the header or configuration.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Whether rotated pairs are neighbours (channels 2i and 2i + 1) and not halves (i and i + dim / 2).
    ///
    /// Converters to GGUF permute the rows of Q and K of Llama-like architectures; nobody else does.
    #[must_use]
    pub fn rope_is_interleaved(&self) -> bool {
        self.interleaved
    }

    /// Divisors of the rotary frequencies, one per pair, if the file has them.
    #[must_use]
    pub fn rope_factors(&self) -> Option<Vec<f32>> {
        self.rope_factors.clone()
    }

    /// (rows, columns) of a tensor; `None` when the model has none (a tied head, no biases).
    pub fn shape(
        &self,
        role: Role,
        layer: Option<u32>,
    ) -> Result<Option<(usize, usize)>, LoadError> {
        Ok(self.part(role, layer)?.map(|part| (part.rows, part.columns)))
    }

    /// Calls `row` with the index and the values of each row, in order, and returns (rows, columns). A vector is one
    /// row.
    pub fn read_rows(
        &self,
        role: Role,
        layer: Option<u32>,
        row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(usize, usize), LoadError> {
        let Some(part) = self.part(role, layer)? else {
            return Err(self.tensor_error(&format!("{role:?}"), "is no part of this model"));
        };
        let stored = &self.tensors[&part.name];
        let add = if self.norms_lack_one && role.is_norm() { 1.0 } else { 0.0 };
        rows::read(&self.shards[stored.shard], stored, &part, add, row)?;
        Ok((part.rows, part.columns))
    }

    /// The same as codes of `bits` bits (4 or 8): those of the file where it has such, else the nearest ones.
    pub fn read_codes(
        &self,
        role: Role,
        layer: Option<u32>,
        bits: usize,
        row: &mut dyn FnMut(usize, &CodeRow),
    ) -> Result<(usize, usize), LoadError> {
        let Some(part) = self.part(role, layer)? else {
            return Err(self.tensor_error(&format!("{role:?}"), "is no part of this model"));
        };
        let stored = &self.tensors[&part.name];
        codes::read(&self.shards[stored.shard], stored, &part, bits, row)?;
        Ok((part.rows, part.columns))
    }

    /// The tokenizer that comes with the weights.
    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        match &self.header {
            Some(header) => Tokenizer::from_gguf(header, &self.path),
            None => Tokenizer::from_file(&self.path.join("tokenizer.json")),
        }
    }

    /// Where a role's rows lie, after checking that they do.
    fn part(&self, role: Role, layer: Option<u32>) -> Result<Option<Part>, LoadError> {
        let Some((rows, columns)) = role.shape_in(&self.model) else { return Ok(None) };
        let layered = Role::LAYERED.contains(&role);
        if layered != layer.is_some() || layer.is_some_and(|l| l >= self.model.layers) {
            let problem = format!("is not in layer {layer:?}; the model has {}", self.model.layers);
            return Err(self.tensor_error(&format!("{role:?}"), &problem));
        }
        let exists = |name: &str| self.tensors.contains_key(name);
        let part = if self.header.is_some() {
            names::gguf(role, layer, &self.model, exists)
        } else {
            names::hugging_face(role, layer, &self.model, self.prefix, exists)
        };
        let part = Part { rows, columns, ..part };
        let Some(stored) = self.tensors.get(&part.name) else {
            return Err(self.tensor_error(
                &part.name,
                "is missing; the file is incomplete or of another model",
            ));
        };
        let expected = if rows == 1 { (1, part.of) } else { (part.of, columns) };
        if (stored.rows, stored.columns) != expected {
            let says = if self.header.is_some() { "the header" } else { "config.json" };
            let problem = format!(
                "is {} x {}, {says} says {} x {}",
                stored.rows, stored.columns, expected.0, expected.1
            );
            return Err(self.tensor_error(&part.name, &problem));
        }
        Ok(Some(part))
    }

    fn tensor_error(&self, tensor: &str, problem: &str) -> LoadError {
        LoadError::Tensor {
            path: self.path.clone(),
            tensor: tensor.to_owned(),
            problem: problem.to_owned(),
        }
    }
}

#[cfg(test)]
pub(crate) mod test_files;
#[cfg(test)]
mod tests;
