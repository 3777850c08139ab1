//! How a layer stores what it keeps, as a function of how many tokens it holds.
//!
//! Between two steps a cache is *settled*: which of its tokens are packed into fewer bits, whose keys lack channels and
//! which heads hold less follows from its length alone. Inside a step the new tokens lie behind the settled ones as they
//! came. So memory, traffic and the work of packing are arithmetic on two lengths ([`Length`]), and the executor, which
//! does the packing, must arrive at the same bytes.

use crate::op::{DType, Heads};
use crate::units::{Bytes, Tokens};

/// Along what a key's minimum and maximum are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyAxis {
    /// Per channel, over neighbouring tokens (KIVI: keys have outlier channels).
    Channel,
    /// Per token, over neighbouring channels.
    Token,
}

/// Old tokens in fewer bits, with a 16-bit scale and a 16-bit zero per group; values are always packed per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packed {
    /// Bits of a code: 8, 4, 2 or 1.
    pub bits: u32,
    /// Elements that share a scale.
    pub group: u32,
    /// Groups of the keys.
    pub keys: KeyAxis,
    /// Newest tokens that stay whole (KIVI's R); a multiple of the block where keys are packed per channel.
    pub residual: Tokens,
}

/// Keys of old tokens without their least important channels (`ThinK`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pruned {
    /// Channels that stay.
    pub channels: u32,
    /// Queries whose square, channel by channel, weighs the channels: the last ones of the step that prunes first.
    pub window: Tokens,
    /// Newest tokens whose keys stay whole; beyond them whole blocks are pruned.
    pub recent: Tokens,
}

/// Some KV heads hold sinks and recent tokens only (`DuoAttention`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Short {
    /// How many.
    pub heads: u32,
    /// First tokens, which they keep.
    pub sinks: Tokens,
    /// Tokens that each of them holds once settled, at most.
    pub tokens: Tokens,
    /// Tokens over that at which it is cut again.
    pub slack: Tokens,
}

impl Short {
    /// Tokens such a head holds when the others hold `tokens`.
    #[must_use]
    pub fn of(self, tokens: Tokens) -> Tokens {
        if tokens <= self.tokens {
            return tokens;
        }
        self.tokens + (tokens - self.tokens) % self.slack.saturating_add(1)
    }
}

/// What dropped tokens leave behind in each head: sums of constant size, in 32 bits (`LESS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Rows of the sums, each as wide as a head, and a number more.
    pub rank: u32,
    /// Width of the networks through which keys are added and queries read.
    pub hidden: u32,
}

/// How a layer's cache stores what it keeps. The default: every token of every head as it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Form {
    /// Fewer bits.
    pub packed: Option<Packed>,
    /// Fewer channels.
    pub pruned: Option<Pruned>,
    /// Fewer tokens in some heads.
    pub short: Option<Short>,
    /// Something of what was dropped.
    pub state: Option<State>,
    /// Keys are rotated by their place in the cache, not in the text: an eviction turns those that move up, and new
    /// queries and keys stand behind what is cached (`StreamingLLM`).
    pub rerotated: bool,
}

/// Tokens of a cache inside a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// The settled ones, in front.
    pub settled: Tokens,
    /// All, new ones included.
    pub tokens: Tokens,
}

impl Length {
    /// Between two steps.
    #[must_use]
    pub fn settled(tokens: Tokens) -> Self {
        Self { settled: tokens, tokens }
    }

    /// With `rows` new tokens behind the settled ones.
    #[must_use]
    pub fn with_new(tokens: Tokens, rows: Tokens) -> Self {
        Self { settled: tokens.saturating_sub(rows), tokens }
    }
}

impl Form {
    /// Whether nothing has to be done to settle new tokens.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        Self { rerotated: false, ..*self } == Self::default()
    }

    /// What an eviction leaves: a settled cache, or, where channels have still to be chosen among the keys that stay, one
    /// that is not.
    #[must_use]
    pub fn after_eviction(&self, tokens: Tokens) -> Length {
        let settled = if self.pruned.is_some() { 0 } else { tokens };
        Length { settled, tokens }
    }

    /// Both forms at once, where they don't contradict each other.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            packed: self.packed.or(other.packed),
            pruned: self.pruned.or(other.pruned),
            short: self.short.or(other.short),
            state: self.state.or(other.state),
            rerotated: self.rerotated || other.rerotated,
        }
    }

    /// Tokens after which a growing cache repeats its rise and fall: no length holds less than one a period before.
    #[must_use]
    pub fn period(&self) -> Tokens {
        let packed = self.packed.map_or(1, |p| p.residual.max(1));
        let pruned = if self.pruned.is_some() { BLOCK } else { 1 };
        packed.max(pruned).saturating_mul(self.short.map_or(1, |s| s.slack.saturating_add(1)))
    }

    /// Tokens whose keys are packed, and tokens whose values are, in a settled cache of `tokens`.
    #[must_use]
    pub fn packed_of(&self, tokens: Tokens) -> (Tokens, Tokens) {
        let Some(packed) = self.packed else { return (0, 0) };
        let values = tokens.saturating_sub(packed.residual);
        match (packed.keys, packed.residual) {
            (KeyAxis::Channel, residual) if residual > 0 => (tokens / residual * residual, values),
            _ => (values, values),
        }
    }

    /// Tokens whose keys lack channels, in a settled cache of `tokens`: whole blocks; those that are packed, where keys
    /// are packed too.
    #[must_use]
    pub fn pruned_of(&self, tokens: Tokens) -> Tokens {
        match (self.pruned, self.packed) {
            (None, _) => 0,
            (Some(_), Some(_)) => self.packed_of(tokens).0,
            (Some(pruned), None) => tokens.saturating_sub(pruned.recent) / BLOCK * BLOCK,
        }
    }

    /// Tokens of a budget that this form can hold without taking packed tokens apart: keys that are packed in groups of
    /// tokens leave in whole groups.
    #[must_use]
    pub fn round_down(&self, tokens: Tokens) -> Tokens {
        match self.packed {
            Some(Packed { keys: KeyAxis::Channel, residual, .. })
                if residual > 0 && tokens >= residual =>
            {
                tokens / residual * residual
            }
            _ => tokens,
        }
    }

    /// KV heads and their lengths: the ordinary ones, then the short ones.
    #[must_use]
    pub fn heads(&self, kv_heads: u32, length: Length) -> [(u32, Length); 2] {
        let short = self.short.map_or((0, length), |s| {
            let settled = s.of(length.settled);
            let new = length.tokens - length.settled;
            (s.heads.min(kv_heads), Length { settled, tokens: settled + new })
        });
        [(kv_heads - short.0, length), short]
    }
}

/// Bytes of `tokens` keys (or values) of one head.
fn plain(dtype: DType, dim: u32, tokens: u64) -> u64 {
    dtype.bytes(u64::from(dim) * tokens).0
}

/// Bytes of packed keys of one head: codes, and 4 bytes a group.
fn packed_keys(packed: Packed, channels: u32, tokens: u64) -> u64 {
    match packed.keys {
        KeyAxis::Channel => {
            // A group of more than a block has its scale in each of its blocks.
            let group = u64::from(packed.group.min(BLOCK));
            let groups = tokens.div_ceil(group) * u64::from(channels);
            (tokens * u64::from(channels) * u64::from(packed.bits)).div_ceil(8) + 4 * groups
        }
        KeyAxis::Token => packed_values(packed, channels, tokens),
    }
}

/// Bytes of packed values of one head.
fn packed_values(packed: Packed, dim: u32, tokens: u64) -> u64 {
    let groups = u64::from(dim.div_ceil(packed.group));
    tokens * ((u64::from(dim) * u64::from(packed.bits)).div_ceil(8) + 4 * groups)
}

impl Heads {
    /// Bytes of K and V that a kernel reads which visits every token once; memory is held in blocks
    /// ([`crate::kv::KvLayout::held`]).
    #[must_use]
    pub fn stored(&self, length: Length) -> Bytes {
        self.in_blocks(length, 1)
    }

    /// Bytes of what dropped tokens leave behind, of one sequence and layer, from its first token on.
    #[must_use]
    pub fn state_bytes(&self) -> Bytes {
        let numbers = self.form.state.map_or(0, |s| u64::from(s.rank) * u64::from(self.dim + 1));
        DType::F32.bytes(u64::from(self.kv) * numbers)
    }

    /// Numbers of the networks of a layer through which queries read a state, and through which keys are added to it.
    #[must_use]
    pub fn map_elements(&self) -> (u64, u64) {
        let Some(State { rank, hidden }) = self.form.state else { return (0, 0) };
        let (rank, hidden) = (u64::from(rank), u64::from(hidden));
        let network = u64::from(self.dim) * hidden + hidden * rank;
        let keys = u64::from(self.kv) * (network + rank * rank + 2 * rank);
        (u64::from(self.query) * network, keys)
    }

    /// Tokens of all heads, as a share of what they would be if every head held `length`.
    #[must_use]
    pub fn share_of_tokens(&self, length: Length) -> f64 {
        let Some(_) = self.form.short else { return 1.0 };
        let held: f64 = (self.form.heads(self.kv, length).iter())
            .map(|(heads, length)| f64::from(*heads) * f64::from(length.tokens))
            .sum();
        held / (f64::from(self.kv) * f64::from(length.tokens)).max(1.0)
    }

    /// Bytes of K and V in blocks of `block` tokens per (KV head, K or V, way of storing).
    #[must_use]
    pub fn in_blocks(&self, length: Length, block: Tokens) -> Bytes {
        let whole = |tokens: Tokens| u64::from(tokens.div_ceil(block)) * u64::from(block);
        if self.form.is_plain() {
            return self.kv_bytes(whole(length.tokens));
        }
        let mut bytes = 0u64;
        for (heads, length) in self.form.heads(self.kv, length) {
            let (packed_k, packed_v) = self.form.packed_of(length.settled);
            let pruned = self.form.pruned_of(length.settled);
            let channels = self.form.pruned.map_or(self.dim, |p| p.channels);
            let rest = |tokens: Tokens| {
                if tokens >= length.tokens {
                    return 0;
                }
                plain(self.dtype, self.dim, whole(length.tokens) - front(tokens, block))
            };
            bytes = bytes.saturating_add(u64::from(heads).saturating_mul(match self.form.packed {
                Some(packed) => {
                    packed_keys(packed, channels, whole(packed_k))
                        + rest(packed_k)
                        + packed_values(packed, self.dim, whole(packed_v))
                        + rest(packed_v)
                }
                None => plain(self.dtype, channels, whole(pruned)) + rest(pruned) + rest(0),
            }));
        }
        Bytes(bytes)
    }
}

/// Tokens of a block of the executor, in which channels are pruned.
const BLOCK: Tokens = 32;

/// Tokens of the whole blocks in front of the first token that is not stored otherwise.
fn front(tokens: Tokens, block: Tokens) -> u64 {
    u64::from(tokens / block) * u64::from(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIVI: Packed = Packed { bits: 2, group: 32, keys: KeyAxis::Channel, residual: 128 };

    fn heads(form: Form) -> Heads {
        Heads { query: 9, kv: 3, dim: 64, dtype: DType::F16, form }
    }

    #[test]
    fn kivi_holds_what_its_formula_says() {
        let form = Form { packed: Some(KIVI), ..Form::default() };
        // 300 tokens: keys pack 256, values 172.
        assert_eq!(form.packed_of(300), (256, 172));
        // Keys: 256 x 64 x 2 bits = 4,096 B, 8 groups x 64 channels x 4 B = 2,048 B, 44 x 64 x 2 B = 5,632 B.
        // Values: 172 x (16 B + 2 groups x 4 B) = 4,128 B, 128 x 64 x 2 B = 16,384 B.
        let head = 4096 + 2048 + 5632 + 4128 + 16_384;
        assert_eq!(heads(form).stored(Length::settled(300)), Bytes(3 * head));
        // In blocks of 32: keys 8 packed and 2 whole, values 6 packed and blocks 5 to 9 whole.
        let blocks = 8 * 768 + 2 * 4096 + 6 * 768 + 5 * 4096;
        assert_eq!(heads(form).in_blocks(Length::settled(300), 32), Bytes(3 * blocks));
        // A new token is whole until the step has settled it.
        let during = heads(form).stored(Length { settled: 300, tokens: 301 });
        assert_eq!(during, Bytes(3 * (head + 256)));
    }

    #[test]
    fn fewer_bits_without_a_residual_pack_everything() {
        let packed = Packed { bits: 8, group: 64, keys: KeyAxis::Token, residual: 0 };
        let form = Form { packed: Some(packed), ..Form::default() };
        // Per token 64 codes and one group of 4 bytes, for K and V each.
        assert_eq!(heads(form).stored(Length::settled(10)), Bytes(3 * 10 * 2 * 68));
    }

    #[test]
    fn pruned_keys_lose_channels_and_nothing_else() {
        let form = Form {
            pruned: Some(Pruned { channels: 40, window: 32, recent: 32 }),
            ..Form::default()
        };
        // 256 tokens: 224 pruned keys of 40 channels, 32 whole ones; all values.
        let head = 224 * 40 * 2 + 32 * 64 * 2 + 256 * 64 * 2;
        assert_eq!(heads(form).stored(Length::settled(256)), Bytes(3 * head));
        assert_eq!(heads(form).in_blocks(Length::settled(256), 32), Bytes(3 * head));
    }

    #[test]
    fn short_heads_hold_sinks_and_recent_tokens() {
        let short = Short { heads: 2, sinks: 10, tokens: 100, slack: 4 };
        let form = Form { short: Some(short), ..Form::default() };
        assert_eq!(
            [99, 100, 101, 104, 105, 106].map(|n| short.of(n)),
            [99, 100, 101, 104, 100, 101]
        );
        assert_eq!(heads(form).stored(Length::settled(200)), Bytes((200 + 2 * 100) * 2 * 64 * 2));
    }
}
