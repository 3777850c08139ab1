//! One layer's cache as arithmetic: how many tokens, never which.

use serde::{Deserialize, Serialize};

use crate::form::Length;
use crate::op::{Choice, DType, Heads, OpKind, Protect, Score};
use crate::units::{Bytes, Tokens};

/// How an engine lays a cache out in memory: blocks of `block_tokens` tokens per (sequence, layer, KV head).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvLayout {
    /// Element type.
    pub dtype: DType,
    /// Tokens per block; memory is taken and returned in whole blocks.
    pub block_tokens: Tokens,
    /// Sequences that begin alike hold the whole blocks of that prefix once, as long as nothing changes them.
    pub shares_prefix: bool,
}

impl KvLayout {
    /// Bytes that a cache of this length holds of one sequence and layer, all KV heads, whole blocks, with what dropped
    /// tokens leave behind.
    #[must_use]
    pub fn held(&self, heads: Heads, length: Length) -> Bytes {
        let state = if length.tokens > 0 { heads.state_bytes() } else { Bytes(0) };
        heads.in_blocks(length, self.block_tokens) + state
    }
}

/// One verb a policy spoke: the op to record, over a cache of `kv` tokens of which `keep` stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verb {
    /// The op's name in tables.
    pub name: &'static str,
    /// The op.
    pub kind: OpKind,
    /// The cache when it starts.
    pub length: Length,
    /// Tokens that stay (evictions).
    pub keep: Tokens,
}

/// The cache of one layer while a policy works on it. Every verb records the op that does it.
#[derive(Debug)]
pub struct KvTape<'a> {
    heads: Heads,
    length: Length,
    protect: Protect,
    verbs: &'a mut Vec<Verb>,
}

impl<'a> KvTape<'a> {
    /// A cache of this length; verbs are appended to `verbs`.
    pub fn new(heads: Heads, length: Length, verbs: &'a mut Vec<Verb>) -> Self {
        Self { heads, length, protect: Protect::default(), verbs }
    }

    /// Tokens resident per KV head.
    #[must_use]
    pub fn tokens(&self) -> Tokens {
        self.length.tokens
    }

    /// The resident tokens, and which of them are settled.
    #[must_use]
    pub fn length(&self) -> Length {
        self.length
    }

    fn record(&mut self, name: &'static str, kind: OpKind, keep: Tokens) {
        self.verbs.push(Verb { name, kind, length: self.length, keep });
    }

    /// Adds this step's attention to each key's running sum.
    pub fn tally(&mut self) {
        self.record("tally", OpKind::Tally { heads: self.heads }, 0);
    }

    /// Attention reads what dropped tokens have left behind.
    pub fn read_state(&mut self) {
        self.record("read_state", OpKind::ReadState { heads: self.heads }, 0);
    }

    /// Scores every resident token; `protect` is exempt from the next [`Self::keep`].
    pub fn rank(&mut self, by: Score, protect: Protect) -> &mut Self {
        self.protect = protect;
        self.record("rank", OpKind::Rank { heads: self.heads, by }, 0);
        self
    }

    /// Keeps the `tokens` best of the last ranking, drops the others and frees their memory.
    pub fn keep(&mut self, tokens: Tokens) {
        self.keep_by(tokens, self.protect, Choice::PerHead);
    }

    /// As [`Self::keep`], where the ranking was recorded by an earlier hook (eviction after the whole prefill), or heads
    /// share a budget. A form that packs keys in groups of tokens keeps whole groups.
    pub fn keep_by(&mut self, tokens: Tokens, protect: Protect, choice: Choice) {
        let form = self.heads.form;
        let tokens = form.round_down(tokens);
        if tokens < self.length.tokens {
            // The newest tokens are the residual that is not packed yet.
            let residual = form.packed.map_or(0, |p| p.residual);
            let protect = Protect { recent: protect.recent.max(residual), ..protect };
            if form.state.is_some() {
                let kind = OpKind::Accumulate { heads: self.heads, protect, choice };
                self.record("accumulate", kind, tokens);
            }
            self.record("evict", OpKind::Evict { heads: self.heads, protect, choice }, tokens);
            self.length = form.after_eviction(tokens);
        }
    }

    /// Keeps, by the last ranking, as few tokens as the newest query's attention allows: see [`Choice::Within`]. `tokens`
    /// is what is expected; the eviction takes place even if that is all.
    pub fn keep_within(&mut self, tokens: Tokens, protect: Protect, loss: u32, most: Tokens) {
        let choice = Choice::Within { loss, most };
        let tokens = tokens.min(self.length.tokens);
        self.record("evict", OpKind::Evict { heads: self.heads, protect, choice }, tokens);
        self.length = self.heads.form.after_eviction(tokens);
    }

    /// Settles the new tokens: prunes, then packs, where the cache's form does.
    pub(crate) fn settle(&mut self) {
        let form = self.heads.form;
        if self.length.settled < self.length.tokens {
            if form.short.is_some() {
                self.record("trim", OpKind::Trim { heads: self.heads }, 0);
            }
            if form.pruned.is_some() {
                self.record("prune_channels", OpKind::PruneChannels { heads: self.heads }, 0);
            }
            if form.packed.is_some() {
                self.record("pack", OpKind::Pack { heads: self.heads }, 0);
            }
        }
        self.length = Length::settled(self.length.tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_held_in_whole_blocks() {
        let heads = Heads { query: 9, kv: 3, dim: 64, dtype: DType::F16, form: Default::default() };
        let layout = KvLayout { dtype: DType::F16, block_tokens: 32, shares_prefix: false };
        // 33 tokens take two blocks: 64 tokens x 2 x 3 heads x 64 channels x 2 bytes.
        assert_eq!(layout.held(heads, Length::settled(33)), Bytes(49_152));
        assert_eq!(layout.held(heads, Length::settled(32)), Bytes(24_576));
        assert_eq!(layout.held(heads, Length::settled(0)), Bytes(0));
    }
}
