//! What users ask about, from a program and its timeline.

use serde::Serialize;

use crate::program::Program;
use crate::timeline::{Source, Timeline};
use crate::units::Seconds;

/// Times and rates of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// Until the last sequence has its first token.
    pub ttft: Seconds,
    /// Mean time per output token after the first.
    pub tpot: Seconds,
    /// Until the last token.
    pub total: Seconds,
    /// Prompt tokens that are read (not found in a cache) per second of prefill.
    pub prefill_tokens_per_s: f64,
    /// Tokens generated in decode per second of decode.
    pub decode_tokens_per_s: f64,
    /// Generated tokens per second of the whole run.
    pub output_tokens_per_s: f64,
    /// Prompt and generated tokens per second of the whole run.
    pub total_tokens_per_s: f64,
    /// Half width of the 90 % interval of the total time, relative.
    pub error: f64,
    /// Where the times come from.
    pub source: Source,
}

impl Metrics {
    /// From a timeline of `program`.
    #[must_use]
    pub fn of(program: &Program, timeline: &Timeline) -> Self {
        let load = &program.header.load;
        let [prefill, decode] = timeline.phases();
        let total = prefill + decode;
        let (_, decode_steps) = program.steps();
        let outputs = load.output_tokens() as f64;
        let decoded = outputs - load.sequences() as f64;
        let rate = |tokens: f64, time: Seconds| if time.0 > 0.0 { tokens / time.0 } else { 0.0 };
        Self {
            ttft: prefill,
            tpot: if decode_steps > 0 { decode / decode_steps as f64 } else { Seconds(0.0) },
            total,
            prefill_tokens_per_s: rate(load.read_tokens() as f64, prefill),
            decode_tokens_per_s: rate(decoded, decode),
            output_tokens_per_s: rate(outputs, total),
            total_tokens_per_s: rate(outputs + load.input_tokens() as f64, total),
            error: timeline.half_width_of(total, None),
            source: timeline.weakest_source_of(total),
        }
    }
}
