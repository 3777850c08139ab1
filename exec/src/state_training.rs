//! Trains the networks of [`crate::state_maps`], layer by layer, on what a model's own attention makes of text.
//!
//! Each layer learns by itself: with its queries, keys and values over some excerpts, H2O's choice of what is dropped is
//! played through token by token, and the networks are to make the layer's output out of what stays and the state what it is
//! with all tokens. Loss and reports are mean squared errors behind the output projection, of queries for which something
//! has been dropped; a tenth of the excerpts is held out, and the networks that do best there are taken. As in the paper:
//! Adam at 1e-3, halved every ten epochs. Unlike it: the state starts with the share of attention that dropped tokens have on
//! average, not with next to none, since minutes on a CPU are too few steps to get there; no dropout; each step sees some of
//! an excerpt's queries.

mod attention;
mod network;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use batchmax_kernels::gemm::gemm;
use batchmax_kernels::state::Maps;
use batchmax_kernels::threads::Threads;
use batchmax_sim::form::State;
use batchmax_sim::op::Protect;
use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;
use candle_core::{Device, Result, Tensor};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::engine::Engine;
use crate::error::ExecError;
use crate::observe::Seen;
use crate::state_maps::StateMaps;
use attention::{Excerpt, Shape};
use network::{Adam, Networks};

/// Excerpts whose gradients are averaged in a step.
const BATCH: usize = 2;
/// Queries of an excerpt that a step sees.
const QUERIES: usize = 64;
const RATE: f64 = 1e-3;
/// Epochs after which the rate is halved.
const HALVED: u32 = 10;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// The state.
    pub state: State,
    /// Tokens that stay.
    pub budget: u32,
    /// Those of them that stay in any case.
    pub protect: Protect,
    /// Tokens that take the memory of a state, rounded up.
    pub tokens_of_state: u32,
    /// Walks over the excerpts.
    pub epochs: u32,
}

/// Mean squared errors of a layer's output on text that was not trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Learned {
    /// Of eviction alone.
    pub eviction: f64,
    /// Of eviction that keeps half of the state's rank more tokens, as the paper compares.
    pub more: f64,
    /// Of eviction that keeps as many more as take the state's memory.
    pub equal: f64,
    /// With the state; never more than eviction alone, since a layer that learns nothing adds nothing.
    pub trained: f64,
}

/// A layer's networks and what they are worth, once they are trained.
type Done = Option<Result<(Maps, Learned)>>;

/// Rows of queries, keys and values: `[layer][excerpt]`.
type Rows = Vec<Vec<Vec<f16>>>;

/// Trains the networks of all layers of a model on `excerpts` of equal length; `program` reads one of them and keeps
/// everything. `progress` counts excerpts that have been read, then layers that have been trained.
///
/// # Errors
/// As [`Engine::run`]; if there are too few excerpts, or too short ones; if it is interrupted.
pub fn train(
    engine: &Engine,
    program: &Program,
    excerpts: &[Vec<u32>],
    training: &Training,
    stop: &AtomicBool,
    progress: &(dyn Fn() + Sync),
) -> std::result::Result<(StateMaps, Vec<Learned>), ExecError> {
    let tokens = excerpts.first().map_or(0, Vec::len);
    if excerpts.len() < 2 || tokens < training.budget as usize + 16 {
        return Err(ExecError::Training {
            problem: format!(
                "{} excerpts of {tokens} tokens, of which {} stay, teach nothing",
                excerpts.len(),
                training.budget
            ),
        });
    }
    let layers = engine.model.layers as usize;
    let mut rows: Rows = vec![Vec::with_capacity(excerpts.len()); layers];
    for excerpt in excerpts {
        engine.observe(program, std::slice::from_ref(excerpt), stop, &mut |seen| {
            if let Seen::Qkv { layer, rows: seen } = seen {
                rows[layer as usize].push(seen.iter().map(|x| f16::from_f32(*x)).collect());
            }
        })?;
        progress();
    }
    let outputs: Vec<Vec<f32>> = (0..layers).map(|l| output_projection(engine, l)).collect();
    let done: Vec<Mutex<Done>> = (0..layers).map(|_| Mutex::default()).collect();
    engine.threads.run(layers, |layer| {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let found = one_layer(&engine.model, &rows[layer], &outputs[layer], layer, training, stop);
        *done[layer].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(found);
        progress();
    });
    let mut maps = StateMaps { layers: Vec::with_capacity(layers) };
    let mut learned = Vec::with_capacity(layers);
    for found in done {
        let found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let found = found.filter(|_| !stop.load(Ordering::Relaxed));
        let (layer, errors) = found
            .ok_or(ExecError::Interrupted)?
            .map_err(|e| ExecError::Training { problem: e.to_string() })?;
        maps.layers.push(layer);
        learned.push(errors);
    }
    Ok((maps, learned))
}

/// `[heads x dim][hidden]`: what becomes of each channel of attention.
fn output_projection(engine: &Engine, layer: usize) -> Vec<f32> {
    let w = &engine.weights.layers[layer].output;
    let width = w.k();
    let mut unit = vec![0.0; width * width];
    unit.iter_mut().step_by(width + 1).for_each(|x| *x = 1.0);
    let mut out = vec![0.0; width * w.n()];
    // The pool is left to those who train.
    gemm(&Threads::new(1), &unit, width, w, None, false, &mut out);
    out
}

/// One layer's networks, and what they are worth.
fn one_layer(
    model: &Model,
    rows: &[Vec<f16>],
    output: &[f32],
    layer: usize,
    training: &Training,
    stop: &AtomicBool,
) -> Result<(Maps, Learned)> {
    let device = &Device::Cpu;
    let width = (model.heads + 2 * model.kv_heads) as usize * model.head_dim as usize;
    let shape = Shape::of(model, training, rows.first().map_or(0, Vec::len) / width);
    let held_out = (rows.len() / 10).max(1);
    let excerpts: Vec<Excerpt> =
        rows.iter().map(|rows| Excerpt::new(&shape, rows)).collect::<Result<_>>()?;
    let output =
        Tensor::from_slice(output, (shape.heads * shape.dim, model.hidden as usize), device)?;
    let (known, unknown) = excerpts.split_at(excerpts.len() - held_out);
    let error = |out: &Tensor, target: &Tensor| -> Result<Tensor> {
        // [heads][queries][dim] to [queries][heads x dim].
        let apart = (out - target)?.transpose(0, 1)?.flatten_from(1)?;
        apart.matmul(&output)?.sqr()?.mean_all()
    };
    let mean = |of: &dyn Fn(usize) -> Result<Tensor>| -> Result<f64> {
        let mut sum = 0.0;
        for index in 0..held_out {
            sum += f64::from(of(index)?.to_scalar::<f32>()?);
        }
        Ok(sum / held_out as f64)
    };
    let alone = |extra: u32| {
        mean(&|i| {
            let (e, rows) = (&unknown[i], &rows[known.len() + i]);
            let kept = if extra == 0 { e.kept.clone() } else { shape.keeping(extra, rows)? };
            error(&kept, &e.target)
        })
    };
    let mut learned = Learned {
        eviction: alone(0)?,
        more: alone(training.state.rank.div_ceil(2))?,
        equal: alone(training.tokens_of_state)?,
        ..Learned::default()
    };
    learned.trained = learned.eviction;
    let mut random = ChaCha8Rng::seed_from_u64(layer as u64);
    let networks = Networks::new(&shape, training.state, known, &mut random)?;
    let mut best = networks.nothing()?;
    let mut adam = Adam::new(&networks.variables)?;
    let queries = shape.queries();
    let mut order: Vec<usize> = (0..known.len()).collect();
    for epoch in 0..training.epochs {
        let now = mean(&|i| error(&networks.output(&unknown[i], None)?, &unknown[i].target))?;
        if now < learned.trained {
            (learned.trained, best) = (now, networks.maps()?);
        }
        if stop.load(Ordering::Relaxed) || !now.is_finite() {
            break;
        }
        let rate = RATE * 0.5f64.powi((epoch / HALVED) as i32);
        for i in (1..order.len()).rev() {
            order.swap(i, random.random_range(0..=i));
        }
        for batch in order.chunks(BATCH) {
            let mut loss = Tensor::zeros((), candle_core::DType::F32, device)?;
            for excerpt in batch.iter().map(|i| &known[*i]) {
                let some: Vec<u32> = (0..QUERIES.min(queries))
                    .map(|_| random.random_range(0..queries as u32))
                    .collect();
                let some = Tensor::new(some, device)?;
                let out = networks.output(excerpt, Some(&some))?;
                loss = (loss + error(&out, &excerpt.target.index_select(&some, 1)?)?)?;
            }
            // Layers differ in size; what counts is what eviction loses.
            let loss = (loss / (batch.len() as f64 * learned.eviction.max(1e-20)))?;
            adam.step(&networks.variables, &loss.backward()?, rate)?;
        }
    }
    Ok((best, learned))
}
