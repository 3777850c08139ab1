//! What is reported of a run.

use batchmax_sim::units::Tokens;

use super::{Replay, RunOptions, SequenceResult};
use crate::error::ExecError;
use crate::interpreter::SequenceState;

/// Positions kept per layer and KV head.
pub(crate) type Kept = Vec<Vec<Vec<Tokens>>>;

/// Notes what is cached of prompts that have been read since the last time.
pub(super) fn note_kept(
    replay: &mut dyn Replay,
    options: &RunOptions,
    kept: &mut [Option<Kept>],
) -> Result<(), ExecError> {
    if !options.keep_details {
        return Ok(());
    }
    for (index, kept) in kept.iter_mut().enumerate() {
        if kept.is_none() && !replay.sequences()[index].generated.is_empty() {
            *kept = Some(replay.kept(index)?);
        }
    }
    Ok(())
}

/// The sequences' outcomes, cut where a stop token came.
pub(super) fn finish(
    sequences: Vec<SequenceState>,
    kept: Vec<Option<Kept>>,
    stop_tokens: &[u32],
) -> Vec<SequenceResult> {
    sequences
        .into_iter()
        .zip(kept)
        .map(|(mut s, kept)| {
            if let Some(end) = s.generated.iter().position(|t| stop_tokens.contains(t)) {
                s.generated.truncate(end);
                s.gaps.truncate(end);
            }
            SequenceResult {
                generated: s.generated,
                gaps: s.gaps,
                prompt_logits: s.prompt_logits,
                refreshed: s.refreshed,
                guesses: s.guesses,
                forwarded: s.forwarded,
                kept,
            }
        })
        .collect()
}
