//! Matrix products `y = x W^T` with packed weights.
//!
//! Weights lie in panels of 32 output columns, so that the inner loop reads them front to back. Each output is summed over
//! k in order in one accumulator; where k is cut into blocks, the accumulator is stored and loaded again, which does not
//! change it. So neither the number of rows nor the split between threads changes a bit of a result.

mod codes;
#[cfg(test)]
mod mapped_tests;
mod packed;
#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::buffer::Scratch;
use crate::simd::{Bf16, F32, LANES, Simd, Source, multiversion};
pub use crate::simd::{Isa, isa};
use crate::threads::{Disjoint, Threads};
use crate::tile::{PANEL, Tile, fits};
pub use packed::{CodeRow, Packed, WeightFormat};

/// Bytes of a block of a panel: what stays in half of an L2 cache of 1 MiB while rows pass by.
const BLOCK_BYTES: usize = 512 << 10;
/// Bytes ahead of the loads that products of few rows ask for.
const AHEAD: isize = 4096;
/// Tiles of rows that bring a share of the next panel each: where there are more, memory is fast enough by itself.
const MOST_SHARES: usize = 8;
/// Rows that share a block of a panel. More would read panels less often, but leave less to share between threads.
const ROW_BLOCK: usize = 192;
/// Multiplications that a task should have at least, some 10 microseconds.
const TASK_WORK: usize = 1 << 19;

/// `out = (accumulate ? out : 0) + (x W^T + bias)`, where `x` is `m` rows of `w.k()` and `out` is `m` rows of `w.n()`.
///
/// # Panics
/// If a slice does not have the size that the shapes give.
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

/// The first `columns` of [`gemm`]'s, rounded up to whole panels; the others of `out` stay as they are.
///
/// # Panics
/// As [`gemm`], or if there are fewer columns.
pub fn gemm_first(
    threads: &Threads,
    x: &[f32],
    m: usize,
    w: &Packed,
    columns: usize,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    assert!(columns <= w.n(), "{columns} columns of {}", w.n());
    columns_with(isa(), threads, x, m, w, columns, bias, false, out);
}

/// [`gemm`] with a given instruction set, which has to be one of [`Isa::available`].
///
/// # Panics
/// As [`gemm`].
#[expect(clippy::too_many_arguments, reason = "the product's own parameters")]
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
    columns_with(isa, threads, x, m, w, w.n(), bias, accumulate, out);
}

#[expect(clippy::too_many_arguments, reason = "the product's own parameters")]
fn columns_with(
    isa: Isa,
    threads: &Threads,
    x: &[f32],
    m: usize,
    w: &Packed,
    columns: usize,
    bias: Option<&[f32]>,
    accumulate: bool,
    out: &mut [f32],
) {
    let (n, k) = (w.n(), w.k());
    assert_eq!(x.len(), m * k, "x is not m x k");
    assert_eq!(out.len(), m * n, "out is not m x n");
    assert!(bias.is_none_or(|b| b.len() == n), "bias is not n long");
    if m == 0 || columns == 0 {
        return;
    }
    let split = Split::new(m, columns, k, threads.count());
    let out = Disjoint::new(out);
    if let Some(bits) = w.format().code_bits() {
        let mut scratch = codes::scratch(m, k);
        let x = codes::quantise(isa, threads, x, (m, k), bits, scratch.floats());
        let job = codes::Job { x, w, bits, bias, accumulate, out: &out };
        codes::run(isa, threads, &split, &job);
        return;
    }
    let job = Job { x, w, bias, accumulate, out: &out, k, n };
    threads.run(split.tasks(), |task| {
        let (panels, rows) = split.part(task);
        // SAFETY: parts are disjoint in the output and inside the shapes checked above; the caller's `isa` is available.
        unsafe {
            match w.format() {
                WeightFormat::F32 => run::<F32>(isa, &job, panels, rows),
                _ => run::<Bf16>(isa, &job, panels, rows),
            }
        }
    });
}

/// How the output is cut into tasks: panel groups times row blocks.
struct Split {
    m: usize,
    panels: usize,
    group: usize,
    row_block: usize,
}

impl Split {
    fn new(m: usize, n: usize, k: usize, threads: usize) -> Self {
        let panels = n.div_ceil(PANEL);
        let row_blocks = m.div_ceil(ROW_BLOCK);
        let row_block = m.div_ceil(row_blocks);
        let panel_work = row_block * k * PANEL;
        // Several tasks per thread even out threads of different speed; one thread needs no more than one task.
        let wanted = if threads == 1 { 1 } else { (threads * 6).div_ceil(row_blocks) };
        let least = TASK_WORK.div_ceil(panel_work.max(1));
        let mut group = panels.div_ceil(wanted).max(least).clamp(1, panels);
        if m <= 6 && group > 4 {
            // Few rows take several panels at a time.
            group = group.next_multiple_of(4);
        }
        Self { m, panels, group, row_block }
    }

    fn groups(&self) -> usize {
        self.panels.div_ceil(self.group)
    }

    fn tasks(&self) -> usize {
        self.groups() * self.m.div_ceil(self.row_block)
    }

    fn part(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let (block, group) = (task / self.groups(), task % self.groups());
        let panel = group * self.group;
        let row = block * self.row_block;
        (panel..(panel + self.group).min(self.panels), row..(row + self.row_block).min(self.m))
    }
}

struct Job<'a> {
    x: &'a [f32],
    w: &'a Packed,
    bias: Option<&'a [f32]>,
    accumulate: bool,
    out: &'a Disjoint<'a, f32>,
    k: usize,
    n: usize,
}

multiversion! {
    /// # Safety
    /// Panels and rows inside the job's shape, and no other task at work on the same ones.
    unsafe fn run<B: Source>(job: &Job<'_>, panels: Range<usize>, rows: Range<usize>) = part
}

#[inline(always)]
unsafe fn part<S: Simd, B: Source>(s: S, job: &Job<'_>, panels: Range<usize>, rows: Range<usize>) {
    let tile_rows = rows.len().min(S::TILE_ROWS);
    let mut at = panels.start;
    while at < panels.end {
        // Few rows need several panels at a time for enough independent sums.
        let mut together = 4;
        while together > 1 && (!fits::<S>(tile_rows, together * 2) || at + together > panels.end) {
            together /= 2;
        }
        // SAFETY: the caller's contract.
        unsafe { strip::<S, B>(s, job, at..at + together, rows.clone()) };
        at += together;
    }
}

/// Some neighbouring panels times all rows of the task, block of k after block of k.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn strip<S: Simd, B: Source>(s: S, job: &Job<'_>, panels: Range<usize>, rows: Range<usize>) {
    let width = panels.len() * PANEL;
    let tiles = rows.len().div_ceil(S::TILE_ROWS);
    let most = BLOCK_BYTES / (PANEL * B::BYTES);
    // With one tile of rows there is nothing that would pass by a second time.
    let blocks = if tiles == 1 { 1 } else { job.k.div_ceil(most).max(1) };
    let block = job.k.div_ceil(blocks).max(1);
    let kept = if blocks > 1 { rows.len() * width } else { 0 };
    let mut scratch = Scratch::take(kept);
    let sums = scratch.floats();
    for index in 0..blocks {
        let from = index * block;
        let len = job.k.saturating_sub(from).min(block);
        for tile in 0..tiles {
            // Tiles of nearly equal height, rather than a short one at the end.
            let first = rows.len() * tile / tiles;
            let last = rows.len() * (tile + 1) / tiles;
            let step = Step {
                rows: last - first,
                first: rows.start + first,
                from,
                len,
                sums: if kept == 0 {
                    std::ptr::null_mut()
                } else {
                    sums[first * width..].as_mut_ptr()
                },
                begins: index == 0,
                ends: index + 1 == blocks,
                share: (tile, tiles),
            };
            // SAFETY: the caller's contract.
            unsafe { multiply::<S, B>(s, job, &panels, &step) };
        }
    }
}

/// One tile of rows times one block of k.
struct Step {
    rows: usize,
    first: usize,
    from: usize,
    len: usize,
    sums: *mut f32,
    begins: bool,
    ends: bool,
    /// Which tile of how many it is.
    share: (usize, usize),
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn multiply<S: Simd, B: Source>(s: S, job: &Job<'_>, panels: &Range<usize>, step: &Step) {
    let width = panels.len() * PANEL;
    let column = panels.start * PANEL;
    let panel_len = job.k * PANEL;
    // All the strip's vectors at once if the registers have room, else as many as there is room for.
    let mut vectors = width / LANES;
    while !fits::<S>(step.rows, vectors) {
        vectors /= 2;
    }
    for at in (0..width).step_by(vectors * LANES) {
        let columns = (job.n - column).saturating_sub(at).min(vectors * LANES);
        if columns == 0 {
            break;
        }
        let (panel, inside) = (panels.start + at / PANEL, at % PANEL);
        // SAFETY: the addresses lie inside the packed weights, the rows, the output part and the scratch space.
        unsafe {
            let (out, out_stride) = if step.ends {
                (job.out.as_ptr().add(step.first * job.n + column + at), job.n)
            } else {
                (step.sums.add(at), width)
            };
            let b = job.w.as_ptr().add((panel * panel_len + step.from * PANEL + inside) * B::BYTES);
            // Tiles that read what the first one brought from memory bring what comes next, each a part.
            let (index, tiles) = step.share;
            let (next, next_step) = if tiles > 1 && tiles <= MOST_SHARES {
                let parts = tiles * (width / (vectors * LANES));
                let part = index * (width / (vectors * LANES)) + at / (vectors * LANES);
                let bytes = step.len * width * B::BYTES;
                let next =
                    b.wrapping_sub(inside * B::BYTES).wrapping_add(bytes + bytes * part / parts);
                (next, (width * B::BYTES).div_ceil(parts))
            } else {
                (std::ptr::null(), 0)
            };
            let tile = Tile {
                rows: step.rows,
                vectors,
                k: step.len,
                a: job.x.as_ptr().add(step.first * job.k + step.from),
                a_stride: job.k,
                b,
                b_stride: PANEL,
                b_pair: panel_len,
                init: if step.begins { std::ptr::null() } else { step.sums.add(at) },
                scale: std::ptr::null(),
                init_stride: width,
                out,
                out_stride,
                columns: if step.ends { columns } else { vectors * LANES },
                accumulate: step.ends && job.accumulate,
                bias: match job.bias {
                    Some(bias) if step.ends => bias.as_ptr().add(column + at),
                    _ => std::ptr::null(),
                },
                ahead: if next.is_null() { AHEAD } else { 0 },
                next,
                next_step,
            };
            s.tile::<B>(&tile);
        }
    }
}
