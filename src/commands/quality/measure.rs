//! Runs one policy over the samples of one context.

use anyhow::Result;
use batchmax_exec::quality::{kl, mean, nll, top};
use batchmax_exec::{Chosen, Engine, RunOptions, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::{Setup, lower};
use batchmax_sim::policy::Policy;
use batchmax_sim::units::Tokens;
use indicatif::ProgressBar;

use super::results::Measured;
use super::tasks::{CONTINUATION, CUE, QUOTE, Question, Sample};
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

/// Logits of `full`: [sample][continuation token][vocab].
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
        self.prose(full, samples, &mut measured, &mut |sample, _, logits| {
            reference[sample].push(logits.to_vec());
            (0.0, 1.0)
        })?;
        self.questions(full, samples, &mut measured)?;
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
        self.prose(policy, samples, &mut measured, &mut |sample, at, logits| {
            compared(&reference[sample][at], logits)
        })?;
        self.questions(policy, samples, &mut measured)?;
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
        self.prose(policy, samples, &mut measured, &mut |sample, at, logits| {
            compared(&reference[sample][at], logits)
        })?;
        Ok(measured.kl)
    }

    /// Continuation and quote. `compare` sees (sample, continuation token, logits) and says KL and agreement.
    fn prose(
        &self,
        policy: &dyn Policy,
        samples: &[Sample],
        measured: &mut Measured,
        compare: &mut Compare<'_>,
    ) -> Result<()> {
        let prompts: Vec<&[u32]> = samples.iter().map(|s| s.prose.prompt.as_slice()).collect();
        let forced: Vec<&[u32]> = samples.iter().map(|s| s.prose.forced.as_slice()).collect();
        let quote = CONTINUATION + 1 + CUE;
        let bytes = self.run(policy, &prompts, &forced, &mut |sample, c| {
            if (1..=CONTINUATION).contains(&c.index) {
                let (kl, agrees) = compare(sample, c.index - 1, c.logits);
                measured.kl[sample] += kl / CONTINUATION as f64;
                measured.top1[sample] += agrees / CONTINUATION as f64;
            } else if c.index >= quote {
                let token = forced[sample][c.index];
                let right = f64::from(u8::from(top(c.logits) == token));
                measured.copy_nll[sample] += nll(c.logits, token) / QUOTE as f64;
                measured.copy_top1[sample] += right / QUOTE as f64;
            }
        })?;
        let tokens: usize = prompts.iter().map(|p| p.len()).sum();
        measured.kv_bytes_per_token = bytes as f64 / tokens as f64;
        Ok(())
    }

    /// Digits that would be chosen behind the true ones before them, and likelihoods of the true ones.
    fn questions(
        &self,
        policy: &dyn Policy,
        samples: &[Sample],
        measured: &mut Measured,
    ) -> Result<()> {
        let asked: Vec<(usize, &Question)> = samples
            .iter()
            .enumerate()
            .flat_map(|(i, s)| s.questions.iter().map(move |q| (i, q)))
            .collect();
        if asked.is_empty() {
            return Ok(());
        }
        // Whole answers are forced: each digit is judged behind the true ones, so that a number that is mistaken for
        // another by its first digit does not count as five mistakes.
        let forced: Vec<Vec<u32>> =
            asked.iter().map(|(_, q)| [q.question.as_slice(), &q.answer].concat()).collect();
        let mut nlls = vec![0.0; asked.len()];
        let mut right = vec![0.0; asked.len()];
        let prompts: Vec<&[u32]> = asked.iter().map(|(_, q)| q.prompt.as_slice()).collect();
        let lists: Vec<&[u32]> = forced.iter().map(Vec::as_slice).collect();
        self.run(policy, &prompts, &lists, &mut |at, c| {
            let question = asked[at].1;
            // Sequences of a batch are as long as the longest.
            let Some(&token) = c
                .index
                .checked_sub(question.question.len())
                .and_then(|digit| question.answer.get(digit))
            else {
                return;
            };
            nlls[at] += nll(c.logits, token) / question.answer.len() as f64;
            let share = 1.0 / question.answer.len() as f64;
            right[at] += if top(c.logits) == token { share } else { 0.0 };
        })?;
        let mut digits: Vec<Vec<f64>> = vec![Vec::new(); samples.len()];
        let mut likelihoods: Vec<Vec<f64>> = vec![Vec::new(); samples.len()];
        for (((sample, _), right), nll) in asked.iter().zip(&right).zip(&nlls) {
            digits[*sample].push(*right);
            likelihoods[*sample].push(*nll);
        }
        measured.digits = Some(digits.iter().map(|d| mean(d)).collect());
        measured.answer_nll = Some(likelihoods.iter().map(|l| mean(l)).collect());
        Ok(())
    }

    /// Batch after batch; `watch` sees the index of the prompt. The caches' bytes when all prompts were read.
    fn run(
        &self,
        policy: &dyn Policy,
        prompts: &[&[u32]],
        forced: &[&[u32]],
        watch: &mut dyn FnMut(usize, Chosen<'_>),
    ) -> Result<u64> {
        let context = prompts.iter().map(|p| p.len()).max().unwrap_or(1);
        let together = (TOGETHER / context).max(1);
        let mut bytes = 0;
        for (batch, (prompts, forced)) in
            prompts.chunks(together).zip(forced.chunks(together)).enumerate()
        {
            let prompts: Vec<Vec<u32>> = prompts.iter().map(|p| p.to_vec()).collect();
            let forced: Vec<Vec<u32>> = forced.iter().map(|f| f.to_vec()).collect();
            let osl = forced.iter().map(Vec::len).max().unwrap_or(0);
            let load = load_of(&prompts, osl as Tokens, Schedule::Static);
            let program = lower(&self.engine.model, policy, &load, self.setup)?;
            let options = RunOptions { forced, ..RunOptions::default() };
            let result = self.engine.run_watched(
                &program,
                &prompts,
                &options,
                local::interrupted(),
                &mut |_, _| self.bar.tick(),
                &mut |c| watch(batch * together + c.sequence, c),
            )?;
            bytes += result.kv_after_prefill.0;
            self.bar.inc(prompts.len() as u64);
        }
        Ok(bytes)
    }
}

fn compared(full: &[f32], logits: &[f32]) -> (f64, f64) {
    (kl(full, logits), f64::from(u8::from(top(full) == top(logits))))
}
