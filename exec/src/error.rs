//! Why a run could not start or go on: one line, with the way out.

use std::path::PathBuf;

use batchmax_kernels::cuda::CudaError;
use batchmax_kernels::kv::PoolFull;
use batchmax_sim::units::{Bytes, Tokens};

use crate::load::LoadError;

/// An executor error.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The checkpoint can't be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model has a part that this executor can't run.
    #[error("{model}: the executor can't run {part}; hint: plan and what-if can still predict it")]
    NotExecutable {
        /// The model.
        model: String,
        /// Which part.
        part: String,
    },
    /// The device or its driver failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// Devices can't share the layers of a model.
    #[error("{0}")]
    NotShared(String),
    /// Devices that run the same program chose other tokens, so that their caches no longer belong together.
    #[error(
        "two devices that share layers chose different tokens; hint: run on one device, and please report it with the command"
    )]
    DevicesDisagree,
    /// A cache got longer than its program says, so that its tables have no room.
    #[error(
        "a cache holds more than the {tokens} tokens that were planned for; please report it with the command"
    )]
    LongCache {
        /// Tokens that there is room for.
        tokens: Tokens,
    },
    /// The caches would not fit their budget.
    #[error(
        "the caches need {needed} at their peak, {budget} are allowed; \
         hint: lower --batch or the policy's budget, or raise --kv-memory"
    )]
    OverBudget {
        /// Predicted peak.
        needed: Bytes,
        /// The hard limit.
        budget: Bytes,
    },
    /// What goes to slower memory would not fit there.
    #[error(
        "offloaded tokens need {needed} of slower memory, {budget} are allowed; \
         hint: lower --batch or the prompt, or allow more"
    )]
    TierFull {
        /// Predicted peak.
        needed: Bytes,
        /// The hard limit.
        budget: Bytes,
    },
    /// The thread that moves tokens to slower memory and back has given up.
    #[error("offloaded tokens are lost; please report it with the command")]
    TierLost,
    /// The pool refused a block: the hard limit held, the prediction did not.
    #[error("{0}; hint: the program holds more than was predicted, please report it")]
    PoolFull(#[from] PoolFull),
    /// Predicted and held bytes differ.
    #[error(
        "step {step}: {held} of cache are held, {predicted} were predicted; please report it with the command"
    )]
    KvMismatch {
        /// Step of the unrolled program.
        step: usize,
        /// By the pool.
        held: Bytes,
        /// By the simulator.
        predicted: Bytes,
    },
    /// The prompts are not those the program was lowered for.
    #[error("the program is for {expected}, the prompts are {got}")]
    WrongPrompts {
        /// By the program.
        expected: String,
        /// By the caller.
        got: String,
    },
    /// Prompts are partly cached, and nothing says how those caches come about.
    #[error("the program starts behind cached prefixes, and no program reads them")]
    MissingPrefix,
    /// The forced tokens are not those of the prompts.
    #[error("the program generates {expected}, the forced tokens are {got}")]
    WrongForced {
        /// By the program.
        expected: String,
        /// By the caller.
        got: String,
    },
    /// Nothing says how dropped tokens are kept.
    #[error(
        "less has no trained networks for {model}; hint: batchmax prepare less --model {model} --out FILE trains them, --policy FILE takes them"
    )]
    MissingStateMaps {
        /// The model.
        model: String,
    },
    /// A program takes over what nothing has read.
    #[error(
        "the program reuses a chunk of text that was not read before; hint: this is a bug, please report it"
    )]
    MissingChunk,
    /// A file of networks that can't be used.
    #[error("{}: {problem}; hint: batchmax prepare less makes one for the model", path.display())]
    StateMaps {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// Networks can't be trained on what there is.
    #[error("{problem}; hint: more --samples or a longer --context")]
    Training {
        /// Why.
        problem: String,
    },
    /// A token that the model does not know.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: u32,
    },
    /// A file can't be read or written.
    #[error("{}: {problem}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        problem: std::io::Error,
    },
    /// The caller asked to stop.
    #[error("interrupted; nothing was written")]
    Interrupted,
}
