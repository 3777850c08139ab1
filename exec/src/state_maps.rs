//! The networks through which dropped tokens are added to a state and queries read it (`LESS`): their file, and stand-ins.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use batchmax_kernels::state::{KeyMap, Maps, Network};
use batchmax_sim::form::State;
use batchmax_sim::profile::Model;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::error::ExecError;

/// Where gates and scales of keys start: nearly nothing is added.
pub(crate) const START: f32 = 1e-4;

/// The networks of all layers.
#[derive(Clone, Debug, PartialEq)]
pub struct StateMaps {
    /// By layer.
    pub layers: Vec<Maps>,
}

/// The tensors of a layer: name, shape.
fn shapes(model: &Model, state: State) -> [(&'static str, Vec<usize>); 7] {
    let (heads, kv_heads) = (model.heads as usize, model.kv_heads as usize);
    let (dim, hidden, rank) = (model.head_dim as usize, state.hidden as usize, state.rank as usize);
    [
        ("queries.first", vec![heads, dim, hidden]),
        ("queries.second", vec![heads, hidden, rank]),
        ("keys.first", vec![kv_heads, dim, hidden]),
        ("keys.second", vec![kv_heads, hidden, rank]),
        ("keys.mix", vec![kv_heads, rank, rank]),
        ("keys.scale", vec![kv_heads, rank]),
        ("keys.gate", vec![kv_heads, rank]),
    ]
}

/// One layer from the numbers of its tensors, in the order of [`shapes`].
fn layer(model: &Model, state: State, tensors: &[Vec<f32>; 7]) -> Maps {
    let part = |tensor: usize, head: usize, heads: u32| -> Vec<f32> {
        let size = tensors[tensor].len() / heads.max(1) as usize;
        tensors[tensor][head * size..(head + 1) * size].to_vec()
    };
    let network = |first: usize, head: usize, heads: u32| Network {
        first: part(first, head, heads),
        second: part(first + 1, head, heads),
    };
    Maps {
        rank: state.rank as usize,
        hidden: state.hidden as usize,
        queries: (0..model.heads as usize).map(|h| network(0, h, model.heads)).collect(),
        keys: (0..model.kv_heads as usize)
            .map(|h| KeyMap {
                network: network(2, h, model.kv_heads),
                mix: part(4, h, model.kv_heads),
                scale: part(5, h, model.kv_heads),
                gate: part(6, h, model.kv_heads),
            })
            .collect(),
    }
}

impl StateMaps {
    /// Networks as training starts with them: small random numbers, the same for the same shape.
    #[must_use]
    pub fn untrained(model: &Model, state: State) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let layers = (0..model.layers)
            .map(|_| {
                let tensors = shapes(model, state).map(|(name, shape)| {
                    let count: usize = shape.iter().product();
                    if name.ends_with("scale") || name.ends_with("gate") {
                        return vec![START; count];
                    }
                    // Rows of the second axis come in.
                    let reach = 1.0 / (shape[1] as f32).sqrt();
                    (0..count).map(|_| (random.random::<f32>() * 2.0 - 1.0) * reach).collect()
                });
                layer(model, state, &tensors)
            })
            .collect();
        Self { layers }
    }

    /// Reads a file of networks for a model and a state.
    ///
    /// # Errors
    /// If it can't be read, is for another shape, or has numbers that are none.
    pub fn load(path: &Path, model: &Model, state: State) -> Result<Self, ExecError> {
        let io = |problem| ExecError::Io { path: path.to_owned(), problem };
        let refuse = |problem: String| ExecError::StateMaps { path: path.to_owned(), problem };
        let layer_numbers: usize =
            shapes(model, state).iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        let expected = 4 * layer_numbers as u64 * u64::from(model.layers);
        let size = std::fs::metadata(path).map_err(io)?.len();
        // The names take a little more.
        if size > expected + (1 << 20) {
            return Err(refuse(format!("{size} bytes, expected about {expected}")));
        }
        let bytes = std::fs::read(path).map_err(io)?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| refuse(format!("no safetensors file ({e})")))?;
        let (_, head) =
            SafeTensors::read_metadata(&bytes).map_err(|e| refuse(format!("its head ({e})")))?;
        let of = head.metadata().as_ref().and_then(|m| m.get("model"));
        if of.is_some_and(|of| *of != model.name) {
            let of = of.map_or("", String::as_str);
            return Err(refuse(format!(
                "its networks are those of {of:.80}, not of {}",
                model.name
            )));
        }
        let mut layers = Vec::with_capacity(model.layers as usize);
        for index in 0..model.layers {
            let mut tensors: [Vec<f32>; 7] = Default::default();
            for (to, (name, shape)) in tensors.iter_mut().zip(shapes(model, state)) {
                let name = format!("layers.{index}.{name}");
                let view = file.tensor(&name).map_err(|_| refuse(format!("{name} is missing")))?;
                if view.dtype() != Dtype::F32 || view.shape() != shape {
                    return Err(refuse(format!(
                        "{name} is {:?} {:?}, expected F32 {shape:?}",
                        view.dtype(),
                        view.shape()
                    )));
                }
                let numbers = view.data().chunks_exact(4);
                *to = numbers.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                if to.iter().any(|x| !x.is_finite()) {
                    return Err(refuse(format!("{name} has numbers that are not finite")));
                }
            }
            layers.push(layer(model, state, &tensors));
        }
        Ok(Self { layers })
    }

    /// The file that [`Self::load`] reads, with `notes` on how it came about.
    ///
    /// # Errors
    /// If the format refuses it.
    pub fn to_bytes(
        &self,
        model: &Model,
        state: State,
        notes: &[(&str, String)],
    ) -> Result<Vec<u8>, ExecError> {
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for (index, maps) in self.layers.iter().enumerate() {
            let all = |of: &dyn Fn(usize) -> Vec<f32>, heads: usize| -> Vec<u8> {
                (0..heads).flat_map(of).flat_map(f32::to_le_bytes).collect()
            };
            let (q, k) = (&maps.queries, &maps.keys);
            let data = [
                all(&|h| q[h].first.clone(), q.len()),
                all(&|h| q[h].second.clone(), q.len()),
                all(&|h| k[h].network.first.clone(), k.len()),
                all(&|h| k[h].network.second.clone(), k.len()),
                all(&|h| k[h].mix.clone(), k.len()),
                all(&|h| k[h].scale.clone(), k.len()),
                all(&|h| k[h].gate.clone(), k.len()),
            ];
            for ((name, shape), data) in shapes(model, state).into_iter().zip(data) {
                tensors.push((format!("layers.{index}.{name}"), shape, data));
            }
        }
        let bad = |e: safetensors::SafeTensorError| ExecError::StateMaps {
            path: PathBuf::new(),
            problem: e.to_string(),
        };
        let views = tensors
            .iter()
            .map(|(name, shape, data)| {
                Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(bad)?;
        let mut head: HashMap<String, String> =
            notes.iter().map(|(key, note)| ((*key).to_owned(), note.clone())).collect();
        head.insert("model".to_owned(), model.name.clone());
        safetensors::serialize(views, Some(head)).map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use batchmax_sim::profile::Catalog;

    const STATE: State = State { rank: 3, hidden: 4 };

    fn model() -> Model {
        let mut model = Catalog::built_in().model("smollm2-135m").expect("built in");
        (model.layers, model.heads, model.kv_heads, model.head_dim) = (2, 4, 2, 8);
        model
    }

    fn load(bytes: &[u8], model: &Model, state: State) -> Result<StateMaps, ExecError> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        StateMaps::load(file.path(), model, state)
    }

    #[test]
    fn what_is_written_is_read() {
        let maps = StateMaps::untrained(&model(), STATE);
        let bytes = maps.to_bytes(&model(), STATE, &[("text", "a novel".to_owned())]);
        let bytes = bytes.expect("a file");
        assert_eq!(load(&bytes, &model(), STATE).expect("reads"), maps);
    }

    #[test]
    fn other_files_are_refused_in_one_line() {
        let bytes =
            StateMaps::untrained(&model(), STATE).to_bytes(&model(), STATE, &[]).expect("a file");
        let other = Model { name: "other".to_owned(), ..model() };
        let deeper = Model { layers: 3, ..model() };
        let mut broken = bytes.clone();
        let last = broken.len() - 4;
        broken[last..].copy_from_slice(&f32::NAN.to_le_bytes());
        let long = vec![b'x'; 4 << 20];
        let cases: [(&[u8], Model, State, &str); 7] = [
            (&bytes, other, STATE, "smollm2-135m, not of other"),
            (&bytes, deeper, STATE, "layers.2.queries.first is missing"),
            (&bytes, model(), State { rank: 4, ..STATE }, "expected F32"),
            (&broken, model(), STATE, "not finite"),
            (&bytes[..bytes.len() / 2], model(), STATE, "no safetensors file"),
            (b"", model(), STATE, "no safetensors file"),
            (&long, model(), STATE, "expected about"),
        ];
        for (bytes, model, state, part) in cases {
            let error = load(bytes, &model, state).expect_err(part).to_string();
            assert!(
                error.contains(part) && error.contains("hint: ") && !error.contains('\n'),
                "{error}"
            );
        }
        // Any cut, any flipped byte of the head: an error or a file, never a panic.
        for at in 0..bytes.len().min(400) {
            let _ = load(&bytes[..at], &model(), STATE);
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x5a;
            let _ = load(&flipped, &model(), STATE);
        }
    }
}
