//! What is asked of a model: prose that goes on, a passage to quote, numbers hidden in the prose.

use anyhow::{Result, bail};
use batchmax_exec::load::Tokenizer;

/// Public domain, see its head.
const NOVEL: &str = include_str!("../../../profiles/text/novel.txt");
/// Continuation tokens whose distributions are compared.
pub const CONTINUATION: usize = 64;
/// Tokens of a passage that are given again, and tokens that must then follow.
pub const CUE: usize = 12;
pub const QUOTE: usize = 36;
/// Numbers hidden in a prompt.
pub const NEEDLES: usize = 4;
const CITIES: [&str; 16] = [
    "Lisbon", "Vienna", "Oslo", "Cairo", "Lima", "Dublin", "Athens", "Prague", "Madrid", "Havana",
    "Berlin", "Tokyo", "Geneva", "Boston", "Naples", "Warsaw",
];

/// A question about a number hidden in a prompt.
#[derive(Clone)]
pub struct Question {
    /// The question up to the answer.
    pub question: Vec<u32>,
    /// The tokens of the answer, one a digit.
    pub answer: Vec<u32>,
}

/// One sample at one context: a prompt, and what is forced behind it, each time as if nothing else had been.
pub struct Sample {
    pub prompt: Vec<u32>,
    /// How the prose goes on: one token more than [`CONTINUATION`] (the first comes from the prompt's own pass, which
    /// one-shot compression does not touch).
    pub continuation: Vec<u32>,
    /// A passage of the prompt: [`CUE`] tokens and [`QUOTE`] more.
    pub passage: Vec<u32>,
    /// Empty without a tokeniser.
    pub questions: Vec<Question>,
}

impl Sample {
    /// What is forced behind the prompt: the continuation, the passage, or a question with its answer.
    pub fn forced(&self, task: usize) -> Vec<u32> {
        match task {
            0 => self.continuation.clone(),
            1 => self.passage.clone(),
            _ => {
                let Question { question, answer } = &self.questions[task - 2];
                [question.as_slice(), answer].concat()
            }
        }
    }
}

/// Where tokens come from.
pub struct Source<'a> {
    ids: Vec<u32>,
    tokenizer: Option<&'a Tokenizer>,
}

impl<'a> Source<'a> {
    /// The novel, or made-up tokens (no questions then) where there is no tokeniser.
    pub fn new(tokenizer: Option<&'a Tokenizer>, vocab: u32) -> Result<Self> {
        let ids = match tokenizer {
            Some(tokenizer) => {
                let text: Vec<&str> = NOVEL.lines().filter(|l| !l.starts_with('#')).collect();
                tokenizer.encode(&text.join("\n\n"), false)?
            }
            None => (0..20_000).map(|i| (mixed(i) % u64::from(vocab)) as u32).collect(),
        };
        Ok(Self { ids, tokenizer })
    }

    /// `count` excerpts of `context` tokens, evenly spread over the text.
    pub fn excerpts(&self, context: usize, count: usize) -> Result<Vec<Vec<u32>>> {
        let Some(spare) = self.ids.len().checked_sub(context).filter(|_| context > 0) else {
            bail!(
                "--context {context}: the text has {} tokens; hint: 64 are usual",
                self.ids.len()
            );
        };
        let from = |index: usize| if count > 1 { spare * index / (count - 1) } else { 0 };
        Ok((0..count).map(|index| self.ids[from(index)..][..context].to_vec()).collect())
    }

    /// `count` samples of `context` tokens, evenly spread over the text; `questions` of each sample's numbers are asked for,
    /// `hides`: whether there are any.
    pub fn samples(
        &self,
        context: usize,
        count: usize,
        questions: usize,
        hides: bool,
    ) -> Result<Vec<Sample>> {
        let needed = context + CONTINUATION + 1;
        if needed > self.ids.len() {
            bail!(
                "--context {context}: the text has {} tokens; hint: at most {}",
                self.ids.len(),
                self.ids.len() - CONTINUATION - 1
            );
        }
        let spare = self.ids.len() - needed;
        let mut samples = Vec::with_capacity(count);
        for index in 0..count {
            let from = if count > 1 { spare * index / (count - 1) } else { 0 };
            let text = &self.ids[from..from + needed];
            let hidden = Self::hidden(index as u64);
            let needles = if hides { self.needles(&hidden)? } else { Vec::new() };
            let prompt = match self.tokenizer {
                Some(tokenizer) => {
                    hide(text, &needles, context, &tokenizer.encode("\n\n", false)?)?
                }
                None => text[..context].to_vec(),
            };
            let read = context - needles.iter().map(Vec::len).sum::<usize>();
            let continuation = text[read..=read + CONTINUATION].to_vec();
            // A quarter, a half and three quarters into the prompt in turn: numbers are hidden in between.
            let at = (context * (1 + index % 3) / 4).min(context.saturating_sub(CUE + QUOTE));
            let passage = prompt[at..at + CUE + QUOTE].to_vec();
            let asked = hidden.iter().take(questions);
            let questions = asked
                .map(|h| self.question(h))
                .filter_map(Result::transpose)
                .collect::<Result<_>>()?;
            samples.push(Sample { prompt, continuation, passage, questions });
        }
        Ok(samples)
    }

    /// The cities and their numbers.
    fn hidden(sample: u64) -> Vec<(&'static str, u64)> {
        let of = |k| {
            let index = sample * NEEDLES as u64 + k;
            let city = CITIES[(index % CITIES.len() as u64) as usize];
            (city, 10_000 + mixed(1_000 + index) % 90_000)
        };
        (0..NEEDLES as u64).map(of).collect()
    }

    fn needles(&self, hidden: &[(&str, u64)]) -> Result<Vec<Vec<u32>>> {
        let Some(tokenizer) = self.tokenizer else { return Ok(Vec::new()) };
        let text = |(city, number): &(&str, u64)| {
            format!("The special magic number for {city} is {number}.\n\n")
        };
        Ok(hidden.iter().map(|h| tokenizer.encode(&text(h), false)).collect::<Result<_, _>>()?)
    }

    fn question(&self, (city, number): &(&str, u64)) -> Result<Option<Question>> {
        let Some(tokenizer) = self.tokenizer else { return Ok(None) };
        let text = format!(
            "\n\nQuestion: What is the special magic number for {city}? Answer: The special magic number for {city} is"
        );
        let mut question = tokenizer.encode(&text, false)?;
        let mut answer = tokenizer.encode(&format!(" {number}"), false)?;
        // A blank that is a token of its own belongs to the question.
        while answer.len() > 1 && tokenizer.decode(&answer[..1])?.trim().is_empty() {
            question.push(answer.remove(0));
        }
        Ok(Some(Question { question, answer }))
    }
}

/// `prose` with needles that cut it into equal parts, each between the two paragraphs that meet nearest to its place (at its
/// place where none meet nearer to it than to another's); `context` tokens in all. `breaks`: the tokens between paragraphs.
fn hide(prose: &[u32], needles: &[Vec<u32>], context: usize, breaks: &[u32]) -> Result<Vec<u32>> {
    let taken: usize = needles.iter().map(Vec::len).sum();
    if taken * 2 > context {
        bail!("--context {context}: too short for {} hidden numbers; hint: 256", needles.len());
    }
    let prose = &prose[..context - taken];
    // Places in halves of a part.
    let place = |halves: usize| prose.len() * halves / (2 * (needles.len() + 1));
    let mut out = Vec::with_capacity(context);
    let mut copied = 0;
    for (k, needle) in needles.iter().enumerate() {
        let (from, place, to) = (place(2 * k + 1), place(2 * k + 2), place(2 * k + 3));
        let at = (from..to)
            .filter(|at| prose[..*at].ends_with(breaks))
            .min_by_key(|at| at.abs_diff(place))
            .unwrap_or(place);
        out.extend_from_slice(&prose[copied..at]);
        out.extend_from_slice(needle);
        copied = at;
    }
    out.extend_from_slice(&prose[copied..]);
    Ok(out)
}

/// Well mixed bits of a number (SplitMix64).
fn mixed(index: u64) -> u64 {
    let mut z = index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_stand_between_paragraphs_and_the_length_is_kept() {
        // 9 ends a paragraph, in the first half only.
        let prose: Vec<u32> = (0..100).map(|i| if i < 45 && i % 10 == 9 { 9 } else { 1 }).collect();
        let needles = vec![vec![7; 5], vec![8; 5]];
        let out = hide(&prose, &needles, 100, &[9]).expect("room");
        assert_eq!(out.len(), 100);
        // 90 tokens of prose in three parts: one paragraph ends at 30 itself; near 60 none does, so there it is, behind the
        // five tokens of the first needle.
        assert_eq!(out[29], 9);
        assert_eq!(out[30..35], [7; 5]);
        assert_eq!(out[60 + 5..65 + 5], [8; 5]);
        assert_eq!(out.iter().filter(|t| **t == 1 || **t == 9).count(), 90);
        assert!(hide(&prose, &needles, 19, &[9]).is_err());
    }

    #[test]
    fn samples_are_spread_and_carry_what_follows() {
        let source = Source::new(None, 512).expect("made up");
        let samples = source.samples(128, 3, 4, true).expect("fits");
        for sample in &samples {
            let lengths = [&sample.prompt, &sample.continuation, &sample.passage].map(Vec::len);
            assert_eq!(lengths, [128, CONTINUATION + 1, CUE + QUOTE]);
            assert!(sample.prompt.windows(CUE + QUOTE).any(|w| w == sample.passage));
            assert!(sample.questions.is_empty());
        }
        assert_ne!(samples[0].prompt, samples[1].prompt);
        assert!(source.samples(20_000, 1, 4, true).is_err());
    }
}
