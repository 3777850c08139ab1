//! Caches of chunks of text that were read alone, by their tokens: what later prompts with the same chunks take over.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use batchmax_kernels::blend::StoredRows;
use batchmax_sim::program::Program;
use batchmax_sim::units::{Bytes, Layer, Tokens};

use crate::clock::Clock;
use crate::engine::{Engine, RunOptions};
use crate::error::ExecError;

/// Keys, rotated by their place in the chunk, and values of each layer: a row per token, all KV heads' keys, then their
/// values.
pub type ChunkCache = Vec<StoredRows>;

/// Caches of chunks. Equal chunks are held once.
#[derive(Debug, Default)]
pub struct ChunkStore {
    caches: HashMap<Vec<u32>, ChunkCache>,
}

impl ChunkStore {
    /// The cache of a chunk in a layer, if it is here.
    #[must_use]
    pub fn get(&self, chunk: &[u32], layer: Layer) -> Option<&StoredRows> {
        self.caches.get(chunk)?.get(layer as usize)
    }

    /// Chunks held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.caches.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.caches.is_empty()
    }

    /// Bytes of all layers of all chunks.
    #[must_use]
    pub fn held(&self) -> Bytes {
        Bytes(self.caches.values().flatten().map(StoredRows::bytes).sum())
    }
}

/// The chunks of a prompt whose first `tokens` stand in chunks of `chunk`.
pub(crate) fn cut(prompt: &[u32], tokens: Tokens, chunk: Tokens) -> impl Iterator<Item = &[u32]> {
    prompt[..tokens as usize].chunks(chunk.max(1) as usize)
}

impl ChunkStore {
    /// Reads what `program` reuses of `prompts`, each chunk once, by `read`.
    pub(crate) fn fill(
        program: &Program,
        prompts: &[Vec<u32>],
        read: &mut dyn FnMut(&[u32]) -> Result<ChunkCache, ExecError>,
    ) -> Result<Self, ExecError> {
        let mut store = Self::default();
        if program.header.chunks.is_empty() {
            return Ok(store);
        }
        for (sequence, tokens, chunk) in reused(program) {
            let Some(prompt) = prompts.get(sequence) else { continue };
            for ids in cut(prompt, tokens, chunk) {
                if !store.caches.contains_key(ids) {
                    store.caches.insert(ids.to_vec(), read(ids)?);
                }
            }
        }
        Ok(store)
    }
}

/// The program that reads a chunk of so many tokens alone.
pub(crate) fn alone(program: &Program, tokens: usize) -> Result<&Program, ExecError> {
    let of_length =
        |p: &&Program| p.header.load.groups.first().is_some_and(|g| g.isl as usize == tokens);
    program.header.chunks.iter().find(of_length).ok_or(ExecError::MissingChunk)
}

impl Engine {
    /// Reads the chunks of `prompts` that `program` reuses, each alone and once, by the programs that it brings for them.
    pub(crate) fn chunk_store(
        &self,
        program: &Program,
        prompts: &[Vec<u32>],
        stop: &AtomicBool,
    ) -> Result<ChunkStore, ExecError> {
        ChunkStore::fill(program, prompts, &mut |ids| self.read_chunk(program, ids, stop))
    }

    fn read_chunk(
        &self,
        program: &Program,
        ids: &[u32],
        stop: &AtomicBool,
    ) -> Result<ChunkCache, ExecError> {
        let alone = alone(program, ids.len())?;
        let prompts = [ids.to_vec()];
        let mut interpreter = self.interpreter(alone, &prompts, &RunOptions::default(), stop)?;
        let mut clock = Clock::new(alone, false);
        alone.visit_steps(|view| {
            if stop.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(ExecError::Interrupted);
            }
            interpreter.step(&view, &mut clock)
        })?;
        let kv = &interpreter.kv;
        Ok((0..self.model.layers as usize)
            .map(|layer| StoredRows::of_caches(&kv.pool, kv.heads(layer, 0)))
            .collect())
    }
}

/// Which sequences take chunks over: their tokens in chunks, and the tokens of one.
fn reused(program: &Program) -> Vec<(usize, Tokens, Tokens)> {
    use batchmax_sim::op::OpKind;
    let mut found = Vec::new();
    let walked: Result<(), std::convert::Infallible> = program.visit_steps(|view| {
        for op in view.pass.layers.iter().flat_map(|b| &b.ops) {
            if let OpKind::Load { chunk, .. } = op.kind {
                for lane in op.lanes_at(view.step, view.shift).as_slice() {
                    let sequences = lane.first..lane.first + lane.sequences;
                    found.extend(sequences.map(|s| (s as usize, lane.rows, chunk)));
                }
            }
        }
        Ok(())
    });
    match walked {
        Ok(()) => found.sort_unstable(),
    }
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interpreter::Interpreter;
    use crate::load_of;
    use crate::weights::Weights;
    use batchmax_sim::kv::KvLayout;
    use batchmax_sim::load::Schedule;
    use batchmax_sim::lower::{Setup, lower};
    use batchmax_sim::op::{DType, Op, OpKind, Score};
    use batchmax_sim::policy::{CacheBlend, Full, Policy};
    use batchmax_sim::profile::Catalog;
    use batchmax_sim::program::Node;

    fn small() -> Engine {
        let mut model = Catalog::built_in().model("smollm2-135m").expect("built in");
        model.name = "small".to_owned();
        (model.layers, model.vocab, model.hidden, model.ffn) = (5, 512, 192, 320);
        (model.heads, model.kv_heads, model.head_dim) = (6, 2, 32);
        let weights = Weights::synthetic(&model, DType::F32).expect("executable");
        Engine::new(model, weights, 2)
    }

    /// The caches of one prompt behind its prefill: per layer the keys and values of all heads.
    fn caches(engine: &Engine, policy: &dyn Policy, prompt: &[u32]) -> Vec<Vec<f32>> {
        caches_of(engine, policy, prompt, |_| ())
    }

    /// The same, where something of the program is changed.
    fn caches_of(
        engine: &Engine,
        policy: &dyn Policy,
        prompt: &[u32],
        change: impl Fn(&mut Op),
    ) -> Vec<Vec<f32>> {
        let setup = Setup {
            kv: KvLayout { dtype: DType::F32, block_tokens: 32, shares_prefix: false },
            weights: DType::F32,
            activations: DType::F32,
            head: DType::F32,
            tp: 1,
        };
        let prompts = [prompt.to_vec()];
        let load = load_of(&prompts, 1, Schedule::Static);
        let mut program = lower(&engine.model, policy, &load, setup).expect("lowers");
        for node in &mut program.nodes {
            let Node::Pass(pass) = node else { continue };
            pass.layers.iter_mut().flat_map(|block| &mut block.ops).for_each(&change);
        }
        let stop = AtomicBool::new(false);
        let mut interpreter: Interpreter<'_> = engine
            .interpreter(&program, &prompts, &RunOptions::default(), &stop)
            .expect("an interpreter");
        let mut clock = Clock::new(&program, false);
        program.visit_steps(|view| interpreter.step(&view, &mut clock)).expect("runs");
        let kv = &interpreter.kv;
        let of = |layer| {
            let heads = kv.heads(layer, 0);
            let stored = StoredRows::of_caches(&kv.pool, heads);
            let mut rows = vec![0.0; stored.rows() * 2 * 2 * 32];
            stored.read(&engine.threads, &mut rows);
            rows
        };
        (0..engine.model.layers as usize).map(of).collect()
    }

    fn prompt(tokens: u32) -> Vec<u32> {
        (0..tokens).map(|i| (i * 7919 + i * i * 31) % 512).collect()
    }

    fn apart(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum()
    }

    fn blend(recompute: f64, check: Layer) -> CacheBlend {
        CacheBlend { recompute, suffix: 20, chunk: 64, check }
    }

    /// Nothing before a layer's keys and values of the first layer but the token itself: those of a chunk, turned to
    /// wherever it stands, are those of a prefill. With the check at layer 0 the first layer above still differs.
    #[test]
    fn the_first_layers_keys_turn_to_any_place() {
        let engine = small();
        let prompt = prompt(3 * 64 + 20);
        let full = caches(&engine, &Full::default(), &prompt);
        for chunk in 0..3 {
            let alone = caches(&engine, &Full::default(), &prompt[chunk * 64..][..64]);
            let mut rows = alone[0].clone();
            let places = vec![chunk as u32 * 64; 64];
            let (table, layout) = (&engine.weights.rope, engine.weights.rope_layout);
            batchmax_kernels::rope::rope(
                &engine.threads,
                &mut rows,
                128,
                2,
                32,
                &places,
                table,
                layout,
            );
            let there = &full[0][chunk * 64 * 128..][..64 * 128];
            let worst = rows.iter().zip(there).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "chunk {chunk}: {worst}");
        }
    }

    #[test]
    fn caches_come_nearer_the_more_is_computed_anew() {
        let engine = small();
        let prompt = prompt(3 * 64 + 20);
        let full = caches(&engine, &Full::default(), &prompt);
        let mut last = [f64::INFINITY; 5];
        for recompute in [0.0, 0.2, 0.5, 0.8, 1.0] {
            let blended = caches(&engine, &blend(recompute, 1), &prompt);
            assert!(blended[0] == full[0] && blended[1] == full[1], "{recompute}: read whole");
            for layer in 2..5 {
                let now = apart(&blended[layer], &full[layer]);
                assert!(now < last[layer] || now == 0.0, "layer {layer}, {recompute}: {now}");
                last[layer] = now;
            }
        }
        assert_eq!(last[4], 0.0, "all computed anew is a plain prefill");
    }

    #[test]
    fn what_deviates_most_is_a_better_choice_than_chance() {
        let engine = small();
        let prompt = prompt(3 * 64 + 20);
        let full = caches(&engine, &Full::default(), &prompt);
        let blended = caches(&engine, &blend(0.2, 1), &prompt);
        let mut by_chance = [0.0; 5];
        for seed in 0..5 {
            let chance = |op: &mut Op| {
                if let OpKind::Deviate { heads } = op.kind {
                    op.kind = OpKind::Rank { heads, by: Score::Random { seed } };
                }
            };
            let caches = caches_of(&engine, &blend(0.2, 1), &prompt, chance);
            assert_ne!(caches, blended, "seed {seed} chose the same");
            for layer in 2..5 {
                by_chance[layer] += apart(&caches[layer], &full[layer]) / 5.0;
            }
        }
        for layer in 2..5 {
            let chosen = apart(&blended[layer], &full[layer]);
            assert!(chosen < by_chance[layer], "layer {layer}: {chosen}, {}", by_chance[layer]);
        }
    }

    /// The tokens whose values at the check layer are farthest go on: what is left there is less than by any other choice,
    /// and in the layer above less than by choosing the nearest.
    #[test]
    fn what_deviates_most_is_computed_anew() {
        let engine = small();
        let prompt = prompt(3 * 64 + 20);
        let full = caches(&engine, &Full::default(), &prompt);
        let blended = caches(&engine, &blend(0.25, 1), &prompt);
        // Of the layer above: rows that went on have keys and values of the prefill's first order, the others the chunk's.
        let row =
            |caches: &[Vec<f32>], layer: usize, t: usize| caches[layer][t * 128..][..128].to_vec();
        let alone: Vec<Vec<Vec<f32>>> =
            (0..3).map(|c| caches(&engine, &Full::default(), &prompt[c * 64..][..64])).collect();
        let value = |t: usize| {
            let (new, old) = (row(&full, 1, t), row(&alone[t / 64], 1, t % 64));
            apart(&new[64..], &old[64..])
        };
        let taken_over = |t: usize| {
            let (now, old) = (row(&blended, 2, t), row(&alone[t / 64], 2, t % 64));
            now[64..] == old[64..]
        };
        let (over, anew): (Vec<usize>, Vec<usize>) = (0..192).partition(|t| taken_over(*t));
        // The first chunk stands where it stood: nothing of it deviates.
        assert!(anew.iter().all(|t| *t >= 64), "{anew:?}");
        assert_eq!(anew.len(), 48);
        let least = anew.iter().map(|t| value(*t)).fold(f64::INFINITY, f64::min);
        let most = over.iter().map(|t| value(*t)).fold(0.0, f64::max);
        assert!(least >= most, "{least} {most}");
    }

    #[test]
    fn equal_chunks_are_held_once() {
        let engine = small();
        let chunk = prompt(64);
        let text: Vec<u32> = [chunk.clone(), chunk.clone(), prompt(20)].concat();
        let load = load_of(&[text.clone(), text.clone()], 1, Schedule::Static);
        let setup = Setup {
            kv: KvLayout { dtype: DType::F16, block_tokens: 32, shares_prefix: false },
            weights: DType::F32,
            activations: DType::F32,
            head: DType::F32,
            tp: 1,
        };
        let program = lower(&engine.model, &blend(0.1, 1), &load, setup).expect("lowers");
        let stop = AtomicBool::new(false);
        let store = engine.chunk_store(&program, &[text.clone(), text], &stop).expect("reads");
        assert_eq!(store.len(), 1);
        // 64 tokens x 5 layers x 2 heads x 32 channels, keys and values, 2 bytes.
        assert_eq!(store.held(), Bytes(64 * 5 * 2 * 32 * 2 * 2));
        assert!(store.get(&chunk, 4).is_some() && store.get(&chunk, 5).is_none());
        assert!(store.get(&chunk[1..], 0).is_none() && !store.is_empty());
    }
}
