//! Matrix products y = x W^T with weights packed once.
//!
//! Weights lie in panels of 32 output columns, `[ceil(n/32)][k][32]`, so that a tile reads them in one stream. bf16 weights
//! are widened exactly to f32 as they are loaded; activations stay f32.

use crate::simd::{Brain, Element, Isa, Simd, dispatch};
use crate::threads::{Disjoint, Threads};
use crate::tile::{multiply, tile_rows, with_rows};

pub use crate::simd::isa;

/// Output columns of a panel.
pub const PANEL: usize = 32;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
}

impl WeightFormat {
    /// Bytes of one weight.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<Brain>),
}

/// An n x k weight matrix, packed.
pub struct Packed {
    n: usize,
    k: usize,
    panels: Panels,
}

impl Packed {
    /// Packs; `row(i, out)` fills row i (k values).
    #[must_use]
    pub fn pack(
        n: usize,
        k: usize,
        format: WeightFormat,
        row: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let panels = match format {
            WeightFormat::F32 => Panels::F32(pack_panels(n, k, row)),
            WeightFormat::Bf16 => Panels::Bf16(pack_panels(n, k, row)),
        };
        Self { n, k, panels }
    }

    /// Deterministic weights, uniform in [-scale, scale].
    #[must_use]
    pub fn synthetic(n: usize, k: usize, format: WeightFormat, seed: u64, scale: f32) -> Self {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Self::pack(n, k, format, |_, out| {
            for value in out {
                // xorshift64: fast, and nothing here needs more.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                *value = unit * scale;
            }
        })
    }

    /// Output columns.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inner dimension.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// How it is stored.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        match self.panels {
            Panels::F32(_) => WeightFormat::F32,
            Panels::Bf16(_) => WeightFormat::Bf16,
        }
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        Self::bytes_for(self.n, self.k, self.format())
    }

    /// Bytes that a matrix would hold.
    #[must_use]
    pub fn bytes_for(n: usize, k: usize, format: WeightFormat) -> usize {
        n.div_ceil(PANEL) * PANEL * k * format.bytes()
    }

    /// Row i, unpacked: the embedding of a token.
    ///
    /// # Panics
    /// If `i` is not below n or `out` is not k long.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n && out.len() == self.k, "row {i} of {} x {}", self.n, self.k);
        let start = (i / PANEL) * self.k * PANEL + i % PANEL;
        match &self.panels {
            Panels::F32(values) => {
                for (out, value) in out.iter_mut().zip(values[start..].iter().step_by(PANEL)) {
                    *out = *value;
                }
            }
            Panels::Bf16(values) => {
                for (out, value) in out.iter_mut().zip(values[start..].iter().step_by(PANEL)) {
                    *out = value.widen();
                }
            }
        }
    }
}

fn pack_panels<E: Element>(n: usize, k: usize, mut row: impl FnMut(usize, &mut [f32])) -> Vec<E> {
    let mut panels = vec![E::narrow(0.0); n.div_ceil(PANEL) * PANEL * k];
    let mut values = vec![0.0f32; k];
    for i in 0..n {
        row(i, &mut values);
        let start = (i / PANEL) * k * PANEL + i % PANEL;
        for (to, value) in panels[start..].iter_mut().step_by(PANEL).zip(&values) {
            *to = E::narrow(*value);
        }
    }
    panels
}

/// The raw parts of one task: rows of x against panels of W.
struct Task<E> {
    x: *const f32,
    rows: usize,
    k: usize,
    n: usize,
    /// First panel and one past the last.
    panels: (usize, usize),
    weights: *const E,
    bias: *const f32,
    accumulate: bool,
    out: *mut f32,
}

#[inline(always)]
unsafe fn task_body<S: Simd, E: Element>(task: &Task<E>) {
    let wide = 2 * S::LANES;
    let most = tile_rows::<S>();
    // SAFETY: the task's parts were checked against the shapes by `gemm_with`.
    unsafe {
        for panel in task.panels.0..task.panels.1 {
            let weights = task.weights.add(panel * task.k * PANEL);
            for half in 0..PANEL / wide {
                let column = panel * PANEL + half * wide;
                if column >= task.n {
                    break;
                }
                let b = weights.add(half * wide);
                let mut row = 0;
                while row < task.rows {
                    let count = most.min(task.rows - row);
                    with_rows!(count, ROWS => {
                        let mut acc = [[S::zero(); 2]; ROWS];
                        let a = task.x.add(row * task.k);
                        multiply::<S, E, ROWS>(a, task.k, b, PANEL, task.k, &mut acc);
                        write::<S, E, ROWS>(task, row, column, &acc);
                    });
                    row += count;
                }
            }
        }
    }
}
dispatch!(unsafe fn run_task<E: Element>(task: &Task<E>) = task_body);

#[inline(always)]
unsafe fn write<S: Simd, E: Element, const ROWS: usize>(
    task: &Task<E>,
    row: usize,
    column: usize,
    acc: &[[S::V; 2]; ROWS],
) {
    let wide = 2 * S::LANES;
    let columns = wide.min(task.n - column);
    for (r, acc) in acc.iter().enumerate() {
        // SAFETY: the row is below the task's rows; columns past n are cut below.
        unsafe {
            let to = task.out.add((row + r) * task.n + column);
            if columns == wide {
                for (half, sum) in acc.iter().enumerate() {
                    let mut sum = *sum;
                    let at = half * S::LANES;
                    if !task.bias.is_null() {
                        sum = S::add(sum, S::load(task.bias.add(column + at)));
                    }
                    if task.accumulate {
                        sum = S::add(S::load(to.add(at)), sum);
                    }
                    S::store(to.add(at), sum);
                }
            } else {
                let mut lanes = [0.0f32; 32];
                S::store(lanes.as_mut_ptr(), acc[0]);
                S::store(lanes.as_mut_ptr().add(S::LANES), acc[1]);
                for (i, sum) in lanes[..columns].iter().enumerate() {
                    let mut sum = *sum;
                    if !task.bias.is_null() {
                        sum += *task.bias.add(column + i);
                    }
                    let to = to.add(i);
                    *to = if task.accumulate { *to + sum } else { sum };
                }
            }
        }
    }
}

/// out (m x n) = [out +] x (m x k) W^T [+ bias], on the fastest path of this machine.
///
/// # Panics
/// If the slices do not have the sizes of the shapes.
pub fn gemm(
    threads: &Threads,
    x: &[f32],
    m: usize,
    w: &Packed,
    bias: Option<&[f32]>,
    accumulate: bool,
    out: &mut [f32],
) {
    gemm_with(isa(), threads, x, m, w, bias, accumulate, out);
}

/// [`gemm`] on a given path, which must be one of [`Isa::available`].
///
/// # Panics
/// If the slices do not have the sizes of the shapes, or the path is not available.
#[expect(clippy::too_many_arguments, reason = "a matrix product and where to run it")]
pub fn gemm_with(
    isa: Isa,
    threads: &Threads,
    x: &[f32],
    m: usize,
    w: &Packed,
    bias: Option<&[f32]>,
    accumulate: bool,
    out: &mut [f32],
) {
    assert!(x.len() == m * w.k && out.len() == m * w.n, "x {m} x {}, out {m} x {}", w.k, w.n);
    assert!(bias.is_none_or(|b| b.len() == w.n), "bias of {}", w.n);
    assert!(isa == crate::simd::isa() || Isa::available().contains(&isa), "{isa} is not available");
    match &w.panels {
        Panels::F32(panels) => split(isa, threads, x, m, w, panels, bias, accumulate, out),
        Panels::Bf16(panels) => split(isa, threads, x, m, w, panels, bias, accumulate, out),
    }
}

/// Rows of x that one task works on: with k = 1536 they fill half of a 1 MiB cache beside a panel.
const TASK_ROWS: usize = 96;

#[expect(clippy::too_many_arguments, reason = "a matrix product and where to run it")]
fn split<E: Element>(
    isa: Isa,
    threads: &Threads,
    x: &[f32],
    m: usize,
    w: &Packed,
    panels: &[E],
    bias: Option<&[f32]>,
    accumulate: bool,
    out: &mut [f32],
) {
    let panel_count = w.n.div_ceil(PANEL);
    let row_blocks = m.div_ceil(TASK_ROWS);
    // Some four tasks a thread balance uneven cores; with few rows one task still streams several panels.
    let wanted = (4 * threads.count()).div_ceil(row_blocks.max(1));
    let per_task =
        if threads.count() == 1 { panel_count } else { panel_count.div_ceil(wanted) }.max(1);
    let panel_groups = panel_count.div_ceil(per_task);
    let shared = Disjoint::new(out);
    // An address, so that the closure can be shared between threads.
    let bias = bias.map_or(0, |b| b.as_ptr() as usize);
    threads.run(panel_groups * row_blocks, |index| {
        let (block, group) = (index / panel_groups, index % panel_groups);
        let rows = block * TASK_ROWS..((block + 1) * TASK_ROWS).min(m);
        // SAFETY: tasks share rows of `out` but never an element: each writes the columns of its own panels.
        let start = unsafe { shared.pointer(rows.start * w.n) };
        let task = Task {
            x: x[rows.start * w.k..].as_ptr(),
            rows: rows.len(),
            k: w.k,
            n: w.n,
            panels: (group * per_task, ((group + 1) * per_task).min(panel_count)),
            weights: panels.as_ptr(),
            bias: bias as *const f32,
            accumulate,
            out: start,
        };
        // SAFETY: sizes were asserted by `gemm_with`, the path is available.
        unsafe { run_task::<E>(isa, &task) };
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn made(len: usize, seed: u64) -> Vec<f32> {
        let w = Packed::synthetic(1, len, WeightFormat::F32, seed, 1.0);
        let mut out = vec![0.0; len];
        w.row(0, &mut out);
        out
    }

    fn product(x: &[f32], m: usize, w: &Packed) -> Vec<f64> {
        let mut out = vec![0.0; m * w.n()];
        let mut row = vec![0.0; w.k()];
        for j in 0..w.n() {
            w.row(j, &mut row);
            for i in 0..m {
                out[i * w.n() + j] =
                    (0..w.k()).map(|p| f64::from(x[i * w.k() + p]) * f64::from(row[p])).sum();
            }
        }
        out
    }

    #[test]
    fn two_by_two_by_hand() {
        let rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]];
        let w = Packed::pack(2, 3, WeightFormat::F32, |i, out| out.copy_from_slice(&rows[i]));
        let x = [1.0, 0.0, -1.0, 2.0, 1.0, 0.0];
        let mut out = [10.0; 4];
        gemm(&Threads::new(1), &x, 2, &w, Some(&[0.5, 0.0]), true, &mut out);
        // 1 - 3, 4 - 6; 2 + 2, 8 + 5; each on top of 10, the first column plus 0.5.
        assert_eq!(out, [8.5, 8.0, 14.5, 23.0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn agrees_with_f64_on_every_path(
            m in 1..40usize, n in 1..140usize, k in 1..90usize, bf16: bool, seed in 0..1000u64,
        ) {
            let format = if bf16 { WeightFormat::Bf16 } else { WeightFormat::F32 };
            let w = Packed::synthetic(n, k, format, seed, 1.0);
            let x = made(m * k, seed + 1);
            let exact = product(&x, m, &w);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; m * n];
                gemm_with(isa, &Threads::new(2), &x, m, &w, None, false, &mut out);
                for (got, want) in out.iter().zip(&exact) {
                    prop_assert!((f64::from(*got) - want).abs() < 1e-5 * (k as f64), "{isa}: {got} {want}");
                }
            }
        }

        #[test]
        fn a_row_does_not_depend_on_the_others(m in 2..230usize, n in 1..100usize, k in 1..80usize, seed in 0..1000u64) {
            let w = Packed::synthetic(n, k, WeightFormat::F32, seed, 1.0);
            let x = made(m * k, seed + 1);
            for isa in Isa::available() {
                let mut all = vec![0.0; m * n];
                gemm_with(isa, &Threads::new(3), &x, m, &w, None, false, &mut all);
                let i = seed as usize % m;
                let mut one = vec![0.0; n];
                gemm_with(isa, &Threads::new(1), &x[i * k..(i + 1) * k], 1, &w, None, false, &mut one);
                prop_assert_eq!(&all[i * n..(i + 1) * n], &one[..]);
            }
        }
    }
}
