//! Runs one policy over the samples of one context.

use anyhow::Result;
use batchmax_exec::quality::{kl, mean, nll, top};
use batchmax_exec::{Chosen, Engine, RunOptions, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::{Setup, lower};
use batchmax_sim::memory::offloaded;
use batchmax_sim::policy::Policy;
use batchmax_sim::units::Tokens;
use indicatif::ProgressBar;

use super::results::Measured;
use super::tasks::{CONTINUATION, CUE, QUOTE, Sample};
use crate::commands::local;

/// Of a sequence's step and its logits: what is measured of them.
type Compare<'a> = dyn FnMut(usize, usize, &[f32]) -> (f64, f64) + 'a;

/// Prompt tokens that are read together, so that activations stay small.
const TOGETHER: usize = 8192;

/// What measures.
pub struct Bench<'a> {
    pub engine: &'a Engine,
    pub setup: Setup,
    pub bar: &'a ProgressBar,
}

/// Logits of `full`: `[sample][continuation token][vocab]`.
pub type Reference = Vec<Vec<Vec<f32>>>;

impl Bench<'_> {
    /// The logits that others are compared with, and what `full` itself can do.
    pub fn reference(
        &self,
        full: &dyn Policy,
        samples: &[Sample],
    ) -> Result<(Reference, Measured)> {
        let mut reference: Reference = vec![Vec::new(); samples.len()];
        let mut measured = Measured::new(samples.len());
        self.run(full, samples, usize::MAX, &mut measured, &mut |sample, _, logits| {
            reference[sample].push(logits.to_vec());
            (0.0, 1.0)
        })?;
        Ok((reference, measured))
    }

    /// What a policy loses.
    pub fn measure(
        &self,
        policy: &dyn Policy,
        samples: &[Sample],
        reference: &Reference,
    ) -> Result<Measured> {
        let mut measured = Measured::new(samples.len());
        self.run(policy, samples, usize::MAX, &mut measured, &mut |sample, at, logits| {
            compared(&reference[sample][at], logits)
        })?;
        Ok(measured)
    }

    /// KL(full || policy) alone, per sample.
    pub fn divergence(
        &self,
        policy: &dyn Policy,
        samples: &[Sample],
        reference: &Reference,
    ) -> Result<Vec<f64>> {
        let mut measured = Measured::new(samples.len());
        self.run(policy, samples, 1, &mut measured, &mut |sample, at, logits| {
            compared(&reference[sample][at], logits)
        })?;
        Ok(measured.kl)
    }

    /// Reads each prompt once and forces behind it, each time on a copy of what that left, the first `tasks` of: the
    /// continuation, the passage, the questions. `compare` sees (sample, continuation token, logits) and says KL and
    /// agreement.
    fn run(
        &self,
        policy: &dyn Policy,
        samples: &[Sample],
        tasks: usize,
        measured: &mut Measured,
        compare: &mut Compare<'_>,
    ) -> Result<()> {
        let context = samples.iter().map(|s| s.prompt.len()).max().unwrap_or(1);
        let together = (TOGETHER / context).max(1);
        let (mut bytes, mut tokens) = (0, 0);
        let mut asked = vec![(Vec::new(), Vec::new()); samples.len()];
        for (batch, batched) in samples.chunks(together).enumerate() {
            let tasks = tasks.min(2 + batched[0].questions.len());
            let count = batched.len();
            let branches = (0..tasks).flat_map(|t| batched.iter().map(move |s| (s, t)));
            let (prompts, forced): (Vec<Vec<u32>>, Vec<Vec<u32>>) =
                branches.map(|(s, t)| (s.prompt.clone(), s.forced(t))).unzip();
            let osl = forced.iter().map(Vec::len).max().unwrap_or(0);
            let schedule = Schedule::Staggered { prefill_batch: count as u32 };
            let load = load_of(&prompts, osl as Tokens, schedule);
            let program = lower(&self.engine.model, policy, &load, self.setup)?;
            // Slower memory has no copies: those prompts are read for each task.
            let read_once = (offloaded(&program).0 == 0).then_some(count as u32);
            let options = RunOptions { forced, read_once, ..RunOptions::default() };
            let watch = &mut |c: Chosen<'_>| {
                let sample = batch * together + c.sequence % count;
                match c.sequence / count {
                    0 => {
                        if (1..=CONTINUATION).contains(&c.index) {
                            let (kl, agrees) = compare(sample, c.index - 1, c.logits);
                            measured.kl[sample] += kl / CONTINUATION as f64;
                            measured.top1[sample] += agrees / CONTINUATION as f64;
                        }
                    }
                    1 => {
                        if let Some(token) =
                            samples[sample].passage.get(c.index).filter(|_| c.index >= CUE)
                        {
                            let right = f64::from(u8::from(top(c.logits) == *token));
                            measured.copy_nll[sample] += nll(c.logits, *token) / QUOTE as f64;
                            measured.copy_top1[sample] += right / QUOTE as f64;
                        }
                    }
                    task => {
                        // Each digit is judged behind the true ones: a number mistaken for another by its first digit
                        // is one mistake, not five.
                        let question = &samples[sample].questions[task - 2];
                        let digit = c.index.checked_sub(question.question.len());
                        if let Some(&token) = digit.and_then(|d| question.answer.get(d)) {
                            let share = 1.0 / question.answer.len() as f64;
                            let right = if top(c.logits) == token { share } else { 0.0 };
                            let (digits, nlls): &mut (Vec<f64>, Vec<f64>) = &mut asked[sample];
                            digits.resize(digits.len().max(task - 1), 0.0);
                            nlls.resize(digits.len(), 0.0);
                            digits[task - 2] += right;
                            nlls[task - 2] += nll(c.logits, token) * share;
                        }
                    }
                }
            };
            let result = self.engine.run_watched(
                &program,
                &prompts,
                &options,
                local::interrupted(),
                &mut |_, _| self.bar.tick(),
                watch,
            )?;
            bytes += result.kv_after_prefill.0;
            tokens += prompts.iter().map(Vec::len).sum::<usize>();
            self.bar.inc(count as u64);
        }
        measured.kv_bytes_per_token = bytes as f64 / tokens as f64;
        if asked.iter().any(|(digits, _)| !digits.is_empty()) {
            measured.digits = Some(asked.iter().map(|(digits, _)| mean(digits)).collect());
            measured.answer_nll = Some(asked.iter().map(|(_, nlls)| mean(nlls)).collect());
        }
        Ok(())
    }
}

fn compared(full: &[f32], logits: &[f32]) -> (f64, f64) {
    (kl(full, logits), f64::from(u8::from(top(full) == top(logits))))
}
