//! The networks as tensors that learn, and Adam.

use batchmax_kernels::state::{KeyMap, Maps, Network};
use batchmax_sim::form::State;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::attention::{Excerpt, Shape};
use crate::state_maps::START;

/// Numbers from which on candle wakes threads of its own for a sum or a product of tensors.
const PART: usize = (64 << 10) - 1;

/// The networks of a layer while they learn.
pub(super) struct Networks {
    /// `queries.first`, `queries.second`, `keys.first`, `keys.second`, `mix`, `scale`, `gate`, as in the file, vectors as
    /// `[KV heads][1][rank]`.
    pub(super) variables: [Var; 7],
    /// What scales are multiples of, by KV head.
    unit: Vec<f32>,
    /// Logarithm of the attention that tokens that stay have on average, by KV head: weights are taken in its unit.
    log: Vec<f32>,
    state: State,
    shape: Shape,
}

/// As [`batchmax_kernels::state`] has it, in terms that gradients know.
fn gelu(x: &Tensor) -> Result<Tensor> {
    let inner = ((x.sqr()? * x)?.affine(0.044_715, 0.0)? + x)?.affine(0.797_884_6, 0.0)?;
    (inner.tanh()?.affine(0.5, 0.5)? * x)?.contiguous()
}

fn network(x: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    gelu(&gelu(&x.matmul(first)?)?.matmul(second)?)
}

/// Root of the mean square of all numbers.
fn size(tensors: &mut dyn Iterator<Item = &Tensor>) -> Result<f32> {
    let (mut sum, mut count) = (0.0, 0.0);
    for tensor in tensors {
        sum += f64::from(tensor.sqr()?.mean_all()?.to_scalar::<f32>()?);
        count += 1.0;
    }
    Ok((sum / f64::max(count, 1.0)).sqrt().max(1e-6) as f32)
}

impl Networks {
    /// Random ones, so scaled that dropped tokens get the attention that they have on average.
    pub(super) fn new(
        shape: &Shape,
        state: State,
        excerpts: &[Excerpt],
        random: &mut ChaCha8Rng,
    ) -> Result<Self> {
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.dim);
        let (hidden, rank) = (state.hidden as usize, state.rank as usize);
        // What comes out has the variance of a normalised input.
        let mut uniform = |shape: (usize, usize, usize), input: f32| -> Result<Var> {
            let reach = (3.0 / shape.1 as f32).sqrt() / input;
            let count = shape.0 * shape.1 * shape.2;
            let numbers: Vec<f32> =
                (0..count).map(|_| (random.random::<f32>() * 2.0 - 1.0) * reach).collect();
            Var::from_tensor(&Tensor::from_vec(numbers, shape, &Device::Cpu)?)
        };
        let constant =
            |value: f32| Var::from_tensor(&Tensor::full(value, (kv_heads, 1, rank), &Device::Cpu)?);
        let queries = size(&mut excerpts.iter().map(|e| &e.queries))?;
        let keys = size(&mut excerpts.iter().map(|e| &e.keys))?;
        let variables = [
            uniform((heads, dim, hidden), queries)?,
            uniform((heads, hidden, rank), 1.0)?,
            uniform((kv_heads, dim, hidden), keys)?,
            uniform((kv_heads, hidden, rank), 1.0)?,
            uniform((kv_heads, rank, rank), 1.0)?,
            constant(1.0)?,
            constant(START)?,
        ];
        let by_head = |of: &dyn Fn(&Excerpt) -> Vec<f32>| -> Vec<f32> {
            let mut sums = vec![0.0f64; kv_heads];
            let mut count = 0.0;
            for numbers in excerpts.iter().map(of) {
                let part = (numbers.len() / kv_heads).max(1);
                for (sum, part) in sums.iter_mut().zip(numbers.chunks_exact(part)) {
                    *sum += part.iter().map(|x| f64::from(*x)).sum::<f64>() / part.len() as f64;
                }
                count += 1.0;
            }
            sums.into_iter().map(|s| (s / f64::max(count, 1.0)) as f32).collect()
        };
        let log = by_head(&|e| e.kept_log.clone());
        let mut networks = Self { variables, unit: vec![1.0; kv_heads], log, state, shape: *shape };
        let excess = by_head(&|e| e.excess.clone());
        let weights: Vec<Vec<f32>> = excerpts
            .iter()
            .map(|e| networks.parts(e, None)?.1.flatten_all()?.to_vec1())
            .collect::<Result<_>>()?;
        let mut weights = weights.into_iter();
        let mut sums = vec![0.0f64; kv_heads];
        for numbers in weights.by_ref() {
            let part = (numbers.len() / kv_heads).max(1);
            for (sum, part) in sums.iter_mut().zip(numbers.chunks_exact(part)) {
                *sum += part.iter().map(|x| f64::from(*x)).sum::<f64>() / part.len() as f64;
            }
        }
        for ((unit, excess), sum) in networks.unit.iter_mut().zip(excess).zip(sums) {
            let mean = sum / excerpts.len().max(1) as f64;
            *unit = (f64::from(excess) / mean.max(1e-20)) as f32;
        }
        Ok(networks)
    }

    /// What queries, all or some, find in the state: values times weights `[heads][queries][dim]`, and weights, for 1 of all
    /// that stays, `[heads][queries][1]`.
    fn parts(&self, excerpt: &Excerpt, some: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let taken = |of: &Tensor| some.map_or_else(|| Ok(of.clone()), |s| of.index_select(s, 1));
        let (queries, dropped) = (taken(&excerpt.queries)?, taken(&excerpt.dropped)?);
        let heads: Vec<Tensor> = (0..self.shape.kv_heads)
            .map(|head| self.head(head, &queries, &dropped, excerpt))
            .collect::<Result<_>>()?;
        let found = Tensor::cat(&heads, 0)?.broadcast_mul(&taken(&self.inverse(excerpt)?)?)?;
        let dim = self.shape.dim;
        Ok((found.narrow(2, 0, dim)?, found.narrow(2, dim, 1)?))
    }

    /// The same for the queries of one KV head, both in one tensor, in the KV head's unit.
    fn head(
        &self,
        head: usize,
        queries: &Tensor,
        dropped: &Tensor,
        excerpt: &Excerpt,
    ) -> Result<Tensor> {
        let Shape { heads, kv_heads, dim, .. } = self.shape;
        let group = heads / kv_heads;
        let [q1, q2, k1, k2, mix, scale, gate] = &self.variables;
        let one = |of: &Tensor| of.get(head);
        let scale = (one(scale)?.abs()? * f64::from(self.unit[head]))?;
        let keys = network(&one(&excerpt.keys)?, &one(k1)?, &one(k2)?)?.broadcast_mul(&scale)?;
        let psi = (keys.matmul(&one(mix)?)?.broadcast_mul(&one(gate)?)? + &keys)?.abs()?;
        let psi = psi.t()?.contiguous()?;
        let values = one(&excerpt.values)?;
        let all = |of: &Tensor| of.narrow(0, head * group, group);
        let phi = network(&all(queries)?, &all(q1)?, &all(q2)?)?.abs()?;
        let (count, rank, tokens) = (phi.dim(1)?, phi.dim(2)?, psi.dim(1)?);
        let dropped = one(dropped)?;
        // Products of this size stay on this thread: layers are what runs beside each other.
        let part = (PART / (group * tokens)).max(1);
        let mut found = Vec::with_capacity(count.div_ceil(part));
        for from in (0..count).step_by(part) {
            let some = part.min(count - from);
            let phi = phi.narrow(1, from, some)?.reshape((group * some, rank))?;
            let weights = phi.matmul(&psi)?.reshape((group, some, tokens))?;
            let weights = weights.broadcast_mul(&dropped.narrow(0, from, some)?.unsqueeze(0)?)?;
            let weights = weights.reshape((group * some, tokens))?;
            found.push(weights.matmul(&values)?.reshape((group, some, dim + 1))?);
        }
        Tensor::cat(&found, 1)
    }

    /// One over the attention of what stays, in the KV head's unit: `[heads][queries][1]`.
    fn inverse(&self, excerpt: &Excerpt) -> Result<Tensor> {
        let Shape { heads, kv_heads, .. } = self.shape;
        let queries = excerpt.kept_log.len() / heads;
        let of = |(row, log): (usize, &f32)| {
            (self.log[row / queries / (heads / kv_heads)] - log).clamp(-60.0, 60.0).exp()
        };
        let all: Vec<f32> = excerpt.kept_log.iter().enumerate().map(of).collect();
        Tensor::from_vec(all, (heads, queries, 1), &Device::Cpu)
    }

    /// The layer's attention with the state.
    pub(super) fn output(&self, excerpt: &Excerpt, some: Option<&Tensor>) -> Result<Tensor> {
        let (values, weights) = self.parts(excerpt, some)?;
        let kept =
            some.map_or_else(|| Ok(excerpt.kept.clone()), |s| excerpt.kept.index_select(s, 1))?;
        (values + kept)?.broadcast_div(&(weights + 1.0)?)
    }

    /// As the executor runs them.
    pub(super) fn maps(&self) -> Result<Maps> {
        let of = |variable: usize| -> Result<Vec<Vec<f32>>> {
            let all = self.variables[variable].flatten_from(1)?;
            all.to_vec2::<f32>()
        };
        let networks = |first: usize| -> Result<Vec<Network>> {
            let parts = of(first)?.into_iter().zip(of(first + 1)?);
            Ok(parts.map(|(first, second)| Network { first, second }).collect())
        };
        let (mix, scale, gate) = (of(4)?, of(5)?, of(6)?);
        let keys = networks(2)?.into_iter().zip(mix).zip(scale.into_iter().zip(gate));
        let keys = keys.enumerate().map(|(head, ((network, mix), (scale, gate)))| {
            let unit = f64::from(self.unit[head]) * f64::from(self.log[head]).exp();
            let scaled = |s: f32| (f64::from(s.abs()) * unit).min(1e30) as f32;
            KeyMap { network, mix, scale: scale.into_iter().map(scaled).collect(), gate }
        });
        Ok(Maps {
            rank: self.state.rank as usize,
            hidden: self.state.hidden as usize,
            queries: networks(0)?,
            keys: keys.collect(),
        })
    }

    /// The same with keys that add nothing.
    pub(super) fn nothing(&self) -> Result<Maps> {
        let mut maps = self.maps()?;
        for key in &mut maps.keys {
            key.scale.fill(0.0);
            key.gate.fill(0.0);
        }
        Ok(maps)
    }
}

/// Adam's moments.
pub(super) struct Adam {
    moments: Vec<(Tensor, Tensor)>,
    steps: i32,
}

impl Adam {
    pub(super) fn new(variables: &[Var]) -> Result<Self> {
        let zeros = |v: &Var| Tensor::zeros(v.shape(), DType::F32, &Device::Cpu);
        let moments =
            variables.iter().map(|v| Ok((zeros(v)?, zeros(v)?))).collect::<Result<_>>()?;
        Ok(Self { moments, steps: 0 })
    }

    pub(super) fn step(&mut self, variables: &[Var], grads: &GradStore, rate: f64) -> Result<()> {
        const FIRST: f64 = 0.9;
        const SECOND: f64 = 0.999;
        self.steps += 1;
        let unbiased = |beta: f64| 1.0 / (1.0 - beta.powi(self.steps));
        for (variable, (mean, square)) in variables.iter().zip(&mut self.moments) {
            let Some(grad) = grads.get(variable) else { continue };
            let grad = grad.detach();
            *mean = ((&*mean * FIRST)? + (&grad * (1.0 - FIRST))?)?;
            *square = ((&*square * SECOND)? + (grad.sqr()? * (1.0 - SECOND))?)?;
            let root = ((&*square * unbiased(SECOND))?.sqrt()? + 1e-8)?;
            let step = ((&*mean * (rate * unbiased(FIRST)))? / root)?;
            variable.set(&(variable.as_tensor().detach() - step)?)?;
        }
        Ok(())
    }
}
