//! What a step keeps and what it reads: how budgets are shared among heads, and how tokens to read are chosen.

use super::Heads;
use crate::units::Tokens;

/// How a layer's budget is shared among its KV heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Choice {
    /// Every head keeps the same number.
    #[default]
    PerHead,
    /// The layer keeps the best of all heads together (`AdaKV`): `Lane::keep` is the mean, how much each head keeps is
    /// known only when it runs.
    AcrossHeads {
        /// Thousandths of the mean that every head keeps in any case.
        guaranteed: u32,
    },
    /// All heads of a layer keep the same number, the fewest at which the newest query's attention loses no more than
    /// `loss` (`DBudgetKV`): `Lane::keep` is the expectation.
    Within {
        /// Millionths of the length of the attention weights that may be lost, the sinks' weights apart.
        loss: u32,
        /// Tokens that stay at most, whatever is lost: what memory is planned for.
        most: Tokens,
    },
}

impl Choice {
    /// Whether lengths depend on the data.
    #[must_use]
    pub fn is_ragged(self) -> bool {
        self != Self::PerHead
    }
}

/// How a step chooses the cached tokens that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pick {
    /// Whole pages, by an upper bound of the products with their keys.
    Bounds {
        /// Tokens of a page.
        page: Tokens,
        /// Every query head chooses for itself; otherwise the bounds of a group are added up.
        per_query_head: bool,
        /// The newest page is always chosen.
        newest: bool,
    },
    /// Tokens, by their page's extremes in the queries' largest channels.
    Shares {
        /// Tokens of a page.
        page: Tokens,
        /// Channels that count.
        channels: u32,
    },
    /// Per query head the tokens of the clusters whose centres it likes best, beside the sinks and all tokens that came
    /// after the clusters.
    Clusters {
        /// First tokens, always read.
        sinks: Tokens,
        /// Tokens of a cluster, on the average.
        per_cluster: Tokens,
    },
}

impl Pick {
    /// Sets of chosen tokens per layer and sequence.
    #[must_use]
    pub fn sets(self, heads: Heads) -> u32 {
        match self {
            Self::Bounds { per_query_head: true, .. } | Self::Clusters { .. } => heads.query,
            Self::Bounds { .. } | Self::Shares { .. } => heads.kv,
        }
    }

    /// Tokens read after `grown` more steps, where `keep` were read at first.
    #[must_use]
    pub fn chosen(self, keep: Tokens, grown: Tokens) -> Tokens {
        match self {
            Self::Clusters { .. } => keep.saturating_add(grown),
            Self::Bounds { .. } | Self::Shares { .. } => keep,
        }
    }

    /// The name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bounds { .. } => "pages by bounds",
            Self::Shares { .. } => "tokens by shares",
            Self::Clusters { .. } => "clusters",
        }
    }
}
