//! The residuals of one key over the axes, ready to be interpolated.

use super::kriging::{self, Kriging};
use super::shape::{Hardware, Kernel, NumberType, Shape};
use super::{AXES, KEYS, MISSING, STEP, Surface};
use crate::timeline::Source;

/// Octaves outside the measured range over which a residual fades by 1/e.
const FADE_OCTAVES: f64 = 8.0;
/// An octave outside the measured range widens the interval by this share of itself.
const WIDEN_PER_OCTAVE: f64 = 0.35;
/// Cached tokens below this are alike: added before the logarithm, so that an empty prefix has a place on the axis.
const PREFIX_SHIFT: f64 = 64.0;

/// A time, how far to trust it, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Seconds of one launch.
    pub seconds: f64,
    /// Standard deviation of the logarithm of the time.
    pub log_stddev: f64,
    /// Where it comes from.
    pub source: Source,
}

/// A surface unpacked: gaps in its grid filled, sizes as logarithms.
#[derive(Clone, Debug)]
pub struct Prepared {
    kriging: Kriging,
    keys: Vec<[f64; KEYS]>,
    axes: Vec<Vec<f64>>,
    /// Added to a size on each axis before the logarithm.
    shifts: [f64; AXES],
    /// Residuals key by key, gaps filled from their neighbours in the grid.
    filled: Vec<f32>,
}

/// One key's residuals.
#[derive(Clone, Debug)]
pub struct Curve {
    residuals: Vec<f32>,
    /// Share of the residuals' variance that the neighbours explain; 1 for a key that was timed.
    pub explained: f64,
}

fn log_key(kernel: Kernel, key: &[f64; KEYS]) -> [f64; KEYS] {
    let scales = kernel.key_scales();
    let mut key = *key;
    if kernel == Kernel::AttnDecode {
        // Decode kernels are chosen by how many queries share a KV head.
        key[0] /= key[1].max(1.0);
    }
    std::array::from_fn(|i| key[i].max(1.0).log2() / scales[i])
}

/// The first point of an axis that is not below `x`, which lies on it. Points are about evenly spaced, so a guess is near.
fn upper(axis: &[f64], x: f64) -> usize {
    let last = axis.len() - 1;
    let (low, high) = (axis[0], axis[last]);
    let share = if high > low { (x - low) / (high - low) } else { 0.0 };
    let mut at = ((share * last as f64) as usize).min(last);
    while at < last && axis[at] < x {
        at += 1;
    }
    while at > 0 && axis[at - 1] >= x {
        at -= 1;
    }
    at
}

fn shifts(kernel: Kernel) -> [f64; AXES] {
    let mut shifts = [0.0; AXES];
    for (shift, name) in shifts.iter_mut().zip(kernel.axis_names()) {
        *shift = if *name == "prefix_len" { PREFIX_SHIFT } else { 0.0 };
    }
    shifts
}

fn coordinate(shift: f64, value: f64) -> f64 {
    (value + shift).max(1e-3).log2()
}

impl Prepared {
    /// Unpacks.
    #[must_use]
    pub fn new(surface: &Surface) -> Self {
        let kernel = surface.id.kernel;
        let keys: Vec<[f64; KEYS]> =
            surface.keys.iter().map(|k| log_key(kernel, &k.map(f64::from))).collect();
        let shifts = shifts(kernel);
        let axes: Vec<Vec<f64>> = (surface.axes.iter().zip(shifts))
            .map(|(values, shift)| values.iter().map(|v| coordinate(shift, *v as f64)).collect())
            .collect();
        let mut filled: Vec<f32> = surface
            .residuals
            .iter()
            .map(|r| if *r == MISSING { f32::NAN } else { (f64::from(*r) * STEP) as f32 })
            .collect();
        let cells = surface.cells();
        if cells > 0 {
            filled.chunks_mut(cells).for_each(|grid| fill_lines(grid, &axes, true));
            let mut held = filled.clone();
            held.chunks_mut(cells).for_each(|grid| fill_lines(grid, &axes, false));
            // At the far end of its axis a matrix product is bound by the same thing whatever its shape, but some types
            // change kernels on the way: the shares are those that predict the largest sizes best when these are held out.
            if kernel == Kernel::Gemm {
                let sixteen_bits = matches!(surface.id.dtype.as_str(), "bf16" | "fp16");
                let share = if sixteen_bits { 0.75 } else { 0.25 };
                borrow_missing(&mut filled, &held, &keys, cells, surface.kriging.reach, share);
            }
            filled.chunks_mut(cells).for_each(|grid| fill_lines(grid, &axes, false));
        }
        Self { kriging: surface.kriging, keys, axes, shifts, filled }
    }

    /// With other kriging parameters.
    #[must_use]
    pub fn with_kriging(mut self, kriging: Kriging) -> Self {
        self.kriging = kriging;
        self
    }

    fn cells(&self) -> usize {
        self.axes.iter().map(Vec::len).product()
    }

    /// The residuals at `key`, its own or its neighbours'; `skip` leaves a timed key out.
    #[must_use]
    pub fn curve(&self, kernel: Kernel, key: &[f64; KEYS], skip: Option<usize>) -> Curve {
        let cells = self.cells();
        let (weights, explained) =
            kriging::weights(&self.keys, &log_key(kernel, key), skip, self.kriging);
        let mut residuals = vec![0.0f32; cells];
        for (index, weight) in weights {
            let grid = &self.filled[index * cells..(index + 1) * cells];
            for (sum, value) in residuals.iter_mut().zip(grid) {
                *sum += weight as f32 * value;
            }
        }
        Curve { residuals, explained }
    }

    /// The residual of `curve` at a place on the axes, octaves outside the measured range, and whether the place is a
    /// grid point.
    #[must_use]
    pub fn at(&self, kernel: Kernel, curve: &Curve, at: &[f64; AXES]) -> (f64, f64, bool) {
        let at = self.without_prefix(kernel, at);
        let mut cells = [(0usize, 0.0f64); AXES];
        let (mut outside, mut on_point) = (0.0, true);
        for (a, axis) in self.axes.iter().enumerate() {
            let x = coordinate(self.shifts[a], at[a]);
            let (low, high) = (axis[0], axis[axis.len() - 1]);
            outside += (low - x).max(0.0) + (x - high).max(0.0);
            let x = x.clamp(low, high);
            let upper = upper(axis, x);
            cells[a] = if upper == 0 || (axis[upper] - x).abs() < 1e-9 {
                (upper, 0.0)
            } else {
                on_point = false;
                let (left, right) = (axis[upper - 1], axis[upper]);
                (upper - 1, (x - left) / (right - left))
            };
        }
        let value = self.interpolate(curve, &cells[..self.axes.len()]);
        let faded = if outside > 0.0 { value * (-outside / FADE_OCTAVES).exp() } else { value };
        (faded, outside, on_point && outside < 1e-9)
    }

    /// Surfaces that were timed without a prefix: a chunk over cached tokens does the work of a longer chunk without,
    /// and its kernel is as efficient as that one's.
    fn without_prefix(&self, kernel: Kernel, at: &[f64; AXES]) -> [f64; AXES] {
        if kernel == Kernel::AttnPrefill && self.axes.len() == 3 && self.axes[2].len() == 1 {
            let equal_work = (at[1] * (at[1] + 2.0 * at[2])).sqrt();
            [at[0], equal_work, 0.0, 0.0]
        } else {
            *at
        }
    }

    /// Multilinear between the corners of a cell.
    fn interpolate(&self, curve: &Curve, cells: &[(usize, f64)]) -> f64 {
        let mut sum = 0.0;
        for corner in 0..1usize << cells.len() {
            let (mut weight, mut index) = (1.0, 0);
            for (a, (cell, share)) in cells.iter().enumerate() {
                let upper = corner >> a & 1;
                weight *= if upper == 1 { *share } else { 1.0 - share };
                index = index * self.axes[a].len() + (cell + upper).min(self.axes[a].len() - 1);
            }
            if weight > 0.0 {
                sum += weight * f64::from(curve.residuals[index]);
            }
        }
        sum
    }
}

/// Cells beyond a key's measured range (too large for its memory or the patience of who measured) take what near keys
/// measured there for `share`, and what `held` says for the rest.
fn borrow_missing(
    filled: &mut [f32],
    held: &[f32],
    keys: &[[f64; KEYS]],
    cells: usize,
    reach: f64,
    share: f64,
) {
    let measured = filled.to_vec();
    for (k, key) in keys.iter().enumerate() {
        let own = &measured[k * cells..(k + 1) * cells];
        if own.iter().all(|v| !v.is_nan()) {
            continue;
        }
        let weights: Vec<f64> = keys
            .iter()
            .map(|other| {
                let d: f64 = key.iter().zip(other).map(|(a, b)| (a - b).abs()).sum();
                (-2.0 * d / reach).exp()
            })
            .collect();
        for cell in (0..cells).filter(|c| own[*c].is_nan()) {
            let (mut sum, mut total) = (0.0, 0.0);
            for (other, weight) in weights.iter().enumerate() {
                let value = measured[other * cells + cell];
                if !value.is_nan() {
                    sum += weight * f64::from(value);
                    total += weight;
                }
            }
            if total > 1e-3 {
                let own = f64::from(held[k * cells + cell]);
                filled[k * cells + cell] = (own + share * (sum / total - own)) as f32;
            }
        }
    }
}

/// `inner`: gaps between measured cells are interpolated along each axis in turn; else what is missing takes the nearest
/// value along an axis.
fn fill_lines(grid: &mut [f32], axes: &[Vec<f64>], inner: bool) {
    if grid.iter().all(|v| v.is_nan()) {
        if !inner {
            grid.fill(0.0);
        }
        return;
    }
    // One round fills lines that have something; a round per axis reaches every cell from any other.
    for _ in 0..axes.len() {
        // Most keys were timed at all of their sizes.
        if grid.iter().all(|v| !v.is_nan()) {
            return;
        }
        let mut stride = grid.len();
        for axis in axes {
            let block = stride;
            stride /= axis.len();
            for first in (0..grid.len()).step_by(block) {
                for start in first..first + stride {
                    fill_line(grid, start, stride, axis, inner);
                }
            }
        }
    }
}

fn fill_line(grid: &mut [f32], start: usize, stride: usize, axis: &[f64], inner: bool) {
    let mut last: Option<usize> = None;
    for i in 0..axis.len() {
        let value = grid[start + i * stride];
        if value.is_nan() {
            continue;
        }
        match last {
            Some(from) if i - from > 1 => {
                let left = grid[start + from * stride];
                for gap in from + 1..i {
                    let share = (axis[gap] - axis[from]) / (axis[i] - axis[from]);
                    grid[start + gap * stride] = left + (value - left) * share as f32;
                }
            }
            None if !inner => (0..i).for_each(|gap| grid[start + gap * stride] = value),
            _ => {}
        }
        last = Some(i);
    }
    if let Some(from) = last
        && !inner
    {
        let value = grid[start + from * stride];
        (from + 1..axis.len()).for_each(|gap| grid[start + gap * stride] = value);
    }
}

impl Surface {
    /// The time of a shape whose residuals are `curve`.
    #[must_use]
    pub fn estimate(
        &self,
        prepared: &Prepared,
        curve: &Curve,
        shape: &Shape,
        hardware: &Hardware,
        number: NumberType,
    ) -> Estimate {
        let (residual, outside, on_point) = prepared.at(shape.kernel, curve, &shape.at);
        let core = shape.seconds(&self.core, hardware, number);
        let seconds = core * residual.exp();
        let timed = curve.explained >= 1.0;
        let source = match (outside > 0.05 || curve.explained < 0.3, timed && on_point) {
            (true, _) => Source::Extrapolated,
            (_, true) => Source::Measured,
            _ => Source::Interpolated,
        };
        let measured = self.errors.log_stddev(seconds);
        let unexplained = self.errors.core_stddev * (1.0 - curve.explained).max(0.0).sqrt();
        // The left-out errors already contain the usual distance to a neighbour; only what is farther widens.
        let usual = self.errors.core_stddev * (1.0 - self.errors.explained).max(0.0).sqrt();
        let far = (unexplained - usual).max(0.0);
        let log_stddev =
            (measured * measured + far * far).sqrt() * (1.0 + WIDEN_PER_OCTAVE * outside);
        Estimate { seconds, log_stddev, source }
    }
}
