//! Kernel timings of GPUs as surfaces: an analytic core times an interpolated log-residual.
//!
//! A [`Surface`] holds one kernel of one framework on one device in one type. Its *keys* are shapes that a model fixes
//! (the (n, k) of a matrix product, the heads of an attention); its *axes* are sizes that a load changes (rows, batch,
//! cached tokens). The core ([`Shape::seconds`]) is a p-norm of the compute and the memory side with five numbers; what
//! it misses is stored as log-residuals on the grid keys x axes. A key that was never timed borrows the residuals of its
//! neighbours by simple kriging (mean zero), so that far from everything measured only the core is left. The weights
//! depend on the key alone: a model's shapes are blended once ([`Curve`]), and a look-up costs an interpolation.

mod check;
mod curve;
mod few_shot;
mod fit;
mod kriging;
mod library;
mod points;
mod remembered;
mod shape;
mod text;

#[cfg(test)]
mod tests;

pub(crate) use check::check_model;
pub use check::{Group, HoldOut, Report, Score, check, check_held_out, fit_all};
pub use curve::{Curve, Estimate};
pub use few_shot::{Adapted, FEW, adapt, few_shot};
pub use fit::{FitErrors, fit, score_left_out};
pub use kriging::Kriging;
pub(crate) use kriging::solve_spd;
pub use library::{Library, Model, is_nvidia};
pub use points::{PointError, Sample, read_points};
pub use shape::{Core, Hardware, Kernel, NumberType, Shape};
pub use text::{from_text, to_text};

use serde::{Deserialize, Serialize};

/// Which kernel, of which framework, on which device, in which type.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SurfaceId {
    /// Device, by its profile name.
    pub gpu: String,
    /// Whose kernels: `vllm`, `sglang`, `trtllm`; `nccl` and the like for collectives; `-` where no one says.
    pub framework: String,
    /// What it does.
    pub kernel: Kernel,
    /// Type of weights and activations, and of the cache where there is one: `bf16`, `w4a16`, `bf16/fp8`.
    pub dtype: String,
    /// What else keeps timings apart (topology and version of a collective); empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

impl std::fmt::Display for SurfaceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {} {}", self.gpu, self.framework, self.kernel.name(), self.dtype)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, " {}", self.variant) }
    }
}

/// Where a surface's timings come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Who measured, with versions.
    pub source: String,
    /// Licence of the timings.
    pub licence: String,
    /// Day of the fit, ISO 8601.
    pub date: String,
}

/// Axes a kernel can have at most.
pub const AXES: usize = 4;
/// Sizes that make a key.
pub const KEYS: usize = 3;
/// A missing cell of a grid.
pub(crate) const MISSING: i16 = i16::MIN;
/// Residuals are stored in steps of half a percent.
pub(crate) const STEP: f64 = 0.005;

/// A fitted kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Surface {
    /// Which.
    pub id: SurfaceId,
    /// Where from.
    pub origin: Origin,
    /// The analytic part.
    pub core: Core,
    /// How its keys borrow from each other.
    pub kriging: Kriging,
    /// Timed keys.
    pub keys: Vec<[u32; KEYS]>,
    /// Sizes along each axis, ascending; as many as the kernel has.
    pub axes: Vec<Vec<u64>>,
    /// ln(measured / core) in steps of half a percent, key by key, the last axis fastest; the least value where nobody measured.
    pub residuals: Vec<i16>,
    /// Errors on keys (or axis points) left out of their own prediction.
    pub errors: FitErrors,
}

impl Surface {
    /// Cells of one key's grid.
    #[must_use]
    pub fn cells(&self) -> usize {
        self.axes.iter().map(Vec::len).product()
    }

    /// Measured cells.
    #[must_use]
    pub fn points(&self) -> usize {
        self.residuals.iter().filter(|r| **r != MISSING).count()
    }
}
