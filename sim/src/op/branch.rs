//! Ops whose sequences are known only when they run.

/// Which sequences of its lanes an op works on. Shares are thousandths: what is expected, for times; every sequence
/// finds its own branch when it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Branch {
    /// All of them.
    #[default]
    All,
    /// Those whose partial cache the last comparison found stale.
    Stale {
        /// Expected.
        share: u32,
    },
    /// The others.
    Fresh {
        /// Expected.
        share: u32,
    },
}

impl Branch {
    /// The expected part of the sequences.
    #[must_use]
    pub fn share(self) -> f64 {
        match self {
            Self::All => 1.0,
            Self::Stale { share } | Self::Fresh { share } => f64::from(share.min(1000)) / 1000.0,
        }
    }
}
