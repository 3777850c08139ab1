//! Sequences that go on from where another one is.

use batchmax_kernels::cuda::{Address, CudaError};

use super::interpreter::Interpreter;
use super::kv::Caches;
use super::memory::Device;
use super::pool::Pool;
use crate::error::ExecError;

impl Interpreter<'_, '_> {
    /// Lets the sequence `to` go on from where `from` is: what it cached, counted and chose.
    pub(super) fn copy_sequence(&mut self, from: usize, to: usize) -> Result<(), ExecError> {
        copy_caches(self.device, &mut self.kv.main, &mut self.kv.pool, from, to)?;
        if let Some(parts) = &mut self.kv.parts {
            copy_caches(self.device, parts, &mut self.kv.pool, from, to)?;
        }
        self.copy_beside(from, to)?;
        let copied = self.sequences[from].copied();
        self.sequences[to].take_over(copied);
        Ok(())
    }

    fn copy_beside(&mut self, from: usize, to: usize) -> Result<(), CudaError> {
        let (layers, sequences) = (self.kv.main.layers(), self.kv.main.sequences);
        let (kv_heads, dim) = (self.kv.main.layout.kv_heads, self.kv.main.layout.dim);
        let tokens = (4 * kv_heads * self.kv.main.stride) as u64;
        let mut copies: Vec<(Address, u64)> = Vec::new();
        copies.extend(self.beside.tallies.map(|at| (at, tokens)));
        if let Some(pages) = &mut self.beside.pages {
            let bytes = (4 * kv_heads * pages.most * dim) as u64;
            copies.extend([(pages.low, bytes), (pages.high, bytes)]);
            take_over(&mut pages.covered, kv_heads, sequences, from, to);
        }
        if let Some(clusters) = &mut self.beside.clusters {
            let heads = (4 * kv_heads * clusters.most) as u64;
            copies.extend([(clusters.centres, heads * dim as u64), (clusters.sizes, heads)]);
            copies.extend([(clusters.labels, tokens), (clusters.places, tokens)]);
            take_over(&mut clusters.made, 1, sequences, from, to);
        }
        if let Some(order) = &mut self.beside.order {
            copies.push((order.at, (4 * kv_heads * order.room) as u64));
            take_over(&mut order.counts, kv_heads, sequences, from, to);
        }
        if let Some(noted) = &mut self.beside.noted {
            let bytes = (4 * dim) as u64;
            copies.extend([(noted.now, bytes), (noted.filled, bytes)]);
            take_over(&mut noted.known, 1, sequences, from, to);
        }
        for (at, bytes) in copies {
            for layer in 0..layers {
                let place = |sequence: usize| (layer * sequences + sequence) as u64 * bytes;
                self.device.copy(at.plus(place(from)), at.plus(place(to)), bytes)?;
            }
        }
        Ok(())
    }
}

/// What is known per layer, sequence and `each` of it.
fn take_over<T: Copy>(all: &mut [T], each: usize, sequences: usize, from: usize, to: usize) {
    for layer in all.chunks_mut(sequences * each) {
        layer.copy_within(from * each..(from + 1) * each, to * each);
    }
}

/// Gives the sequence `to`, which holds nothing, copies of all halves that the sequence `from` holds.
fn copy_caches(
    device: &mut Device<'_>,
    caches: &mut Caches,
    pool: &mut Pool,
    from: usize,
    to: usize,
) -> Result<(), ExecError> {
    let kv_heads = caches.layout.kv_heads;
    for layer in 0..caches.layers() {
        for h in 0..kv_heads {
            let (source, target) = (from * kv_heads + h, to * kv_heads + h);
            let head = caches.head(layer, source).clone();
            let mut copy = super::kv::Head { state: None, ..head.clone() };
            for side in 0..2 {
                for form in 0..3 {
                    let part = Caches::part(side, form);
                    let (counted, bytes) = caches.layout.bytes(part);
                    let first = head.sides[side].base(form);
                    for block in first..first + head.sides[side].halves[form] {
                        let place = pool.take(counted, bytes)?;
                        let old = caches.place(layer, source, part, block);
                        device.copy(pool.address(old), pool.address(place), bytes)?;
                        caches.set_place((layer, target), part, head.second, block, place);
                    }
                }
            }
            if let Some(old) = head.state {
                let bytes = 4 * caches.layout.state as u64;
                let place = pool.take_behind(bytes, bytes)?;
                device.copy(pool.address(old), pool.address(place), bytes)?;
                copy.state = Some(place);
            }
            *caches.change(layer, target) = copy;
        }
        let positions = (4 * kv_heads * caches.stride) as u64;
        let at = caches.positions_at(layer);
        device.copy(at.plus(from as u64 * positions), at.plus(to as u64 * positions), positions)?;
        let kept = (2 * kv_heads * caches.layout.kept_stride()) as u64;
        let at = caches.kept_at(layer);
        device.copy(at.plus(from as u64 * kept), at.plus(to as u64 * kept), kept)?;
    }
    Ok(())
}
