//! Families of kernels.

use serde::{Deserialize, Serialize};

/// The family of kernels an op belongs to: the row of a validation table and the unit of calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Matrix products.
    Gemm,
    /// Attention of prompt chunks.
    AttendPrefill,
    /// Attention of single tokens.
    AttendDecode,
    /// Embedding look-up.
    Embed,
    /// Norms.
    Norm,
    /// Rotary embedding.
    Rope,
    /// Cache writes.
    Append,
    /// Running attention sums.
    Tally,
    /// Ranking by position.
    RankRecency,
    /// Ranking by key norm.
    RankKeyNorm,
    /// Ranking by distance from the mean key.
    RankKeydiff,
    /// Ranking by the window's attention.
    RankWindow,
    /// Ranking by tallied attention.
    RankTally,
    /// Ranking by the newest query's attention.
    RankLast,
    /// Ranking by chance.
    RankRandom,
    /// Ranking by variation against later tokens.
    RankLag,
    /// Ranking by expected attention.
    RankExpected,
    /// Compaction.
    Evict,
    /// Adding dropped tokens to what they leave behind.
    Accumulate,
    /// Attention over that.
    ReadState,
    /// Extremes of pages of keys.
    Index,
    /// Clusters of keys.
    Cluster,
    /// Choice of the tokens to read.
    Select,
    /// Attention over chosen tokens.
    AttendChosen,
    /// Comparison of queries over time.
    Compare,
    /// Copies of chosen tokens that are read for several steps.
    Refresh,
    /// To slower memory and back.
    Transfer,
    /// Packing into fewer bits.
    Pack,
    /// Dropping channels of keys.
    PruneChannels,
    /// Cutting short heads.
    Trim,
    /// Choice of the rows that go on.
    Forward,
    /// Sums over devices.
    Collective,
    /// Gate activation.
    Gated,
    /// Logit cap.
    Softcap,
    /// Sampling.
    Sample,
    /// Freeing.
    Release,
}

impl Family {
    /// Every family, in the order of tables.
    pub const ALL: [Self; 36] = [
        Self::Gemm,
        Self::AttendPrefill,
        Self::AttendDecode,
        Self::Embed,
        Self::Norm,
        Self::Rope,
        Self::Append,
        Self::Tally,
        Self::RankRecency,
        Self::RankKeyNorm,
        Self::RankKeydiff,
        Self::RankWindow,
        Self::RankTally,
        Self::RankLast,
        Self::RankRandom,
        Self::RankLag,
        Self::RankExpected,
        Self::Evict,
        Self::Accumulate,
        Self::ReadState,
        Self::Index,
        Self::Cluster,
        Self::Select,
        Self::AttendChosen,
        Self::Compare,
        Self::Refresh,
        Self::Transfer,
        Self::Pack,
        Self::PruneChannels,
        Self::Trim,
        Self::Forward,
        Self::Collective,
        Self::Gated,
        Self::Softcap,
        Self::Sample,
        Self::Release,
    ];

    /// The name in tables and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::AttendPrefill => "attend-prefill",
            Self::AttendDecode => "attend-decode",
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Rope => "rope",
            Self::Append => "append",
            Self::Tally => "tally",
            Self::RankRecency => "rank-recency",
            Self::RankKeyNorm => "rank-key-norm",
            Self::RankKeydiff => "rank-keydiff",
            Self::RankWindow => "rank-window",
            Self::RankTally => "rank-tally",
            Self::RankLast => "rank-last",
            Self::RankRandom => "rank-random",
            Self::RankLag => "rank-lag",
            Self::RankExpected => "rank-expected",
            Self::Evict => "evict",
            Self::Accumulate => "accumulate",
            Self::ReadState => "read-state",
            Self::Index => "index",
            Self::Cluster => "cluster",
            Self::Select => "select",
            Self::AttendChosen => "attend-chosen",
            Self::Compare => "compare",
            Self::Refresh => "refresh",
            Self::Transfer => "transfer",
            Self::Pack => "pack",
            Self::PruneChannels => "prune-channels",
            Self::Trim => "trim",
            Self::Forward => "forward",
            Self::Collective => "collective",
            Self::Gated => "gated",
            Self::Softcap => "softcap",
            Self::Sample => "sample",
            Self::Release => "release",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Family;

    #[test]
    fn families_are_listed_in_their_order() {
        assert!(Family::ALL.iter().enumerate().all(|(i, f)| *f as usize == i));
    }
}
