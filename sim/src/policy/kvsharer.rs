//! `KVSharer`: some layers keep no keys and values and read those of a lower layer.
//!
//! Which layer reads which is searched once per model (`batchmax prepare kvsharer`): pairs of layers whose caches are
//! *least* alike are tried first, and a pair is taken if the model's last hidden states stay close.
//!
//! Paper: <https://arxiv.org/abs/2410.18517>. Keys are shared as they are cached, rotated. Shared layers don't compute
//! keys and values here; the authors' code does. The traffic of attention stays: a shared cache is read once per layer
//! that reads it. Without a searched map the upper layers share with the layer below them; what that loses is unknown.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Policy, PolicyError, Request, Role};
use crate::profile::Model;
use crate::units::Layer;

/// Layers that read lower layers' caches.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvSharer {
    /// Layers without a cache of their own; the first of a searched map.
    pub layers: u32,
    /// Searched maps by model: pairs of (layer, the lower layer that it reads), in the order in which they were found.
    pub maps: BTreeMap<String, Vec<(Layer, Layer)>>,
    /// Models that have no map share their upper layers, though others have one.
    pub unsearched: bool,
}

impl Default for KvSharer {
    fn default() -> Self {
        Self { layers: 4, maps: BTreeMap::new(), unsearched: false }
    }
}

impl KvSharer {
    /// Pairs of (layer, the lower layer that it reads).
    fn pairs(&self, model: &Model) -> Vec<(Layer, Layer)> {
        let count = self.layers as usize;
        match self.maps.get(&model.name) {
            Some(map) => {
                let mut pairs: Vec<_> = map.iter().take(count).copied().collect();
                // A source that is itself shared hands on what it reads.
                for i in 0..pairs.len() {
                    let lower = |pair: &&(Layer, Layer), l| pair.0 == l && pair.1 < l;
                    while let Some((_, below)) = pairs.iter().find(|p| lower(p, pairs[i].1)) {
                        pairs[i].1 = *below;
                    }
                }
                pairs
            }
            None => {
                let last = model.layers.saturating_sub(1);
                (0..self.layers).map(|i| last.saturating_sub(2 * i)).map(|l| (l, l - 1)).collect()
            }
        }
    }
}

impl Policy for KvSharer {
    fn label(&self) -> String {
        format!("kvsharer:layers={}", self.layers)
    }

    fn role(&self) -> Role {
        Role::Shares
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn layer_kind(&self, layer: Layer, model: &Model) -> u32 {
        let pairs = self.pairs(model);
        if pairs.iter().any(|(l, _)| *l == layer) {
            2
        } else {
            u32::from(pairs.iter().any(|(_, source)| *source == layer))
        }
    }

    fn cache_of(&self, layer: Layer, model: &Model) -> Layer {
        let pairs = self.pairs(model);
        pairs.iter().find(|(l, _)| *l == layer).map_or(layer, |(_, source)| *source)
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let model = request.model;
        let refuse = |problem: String, remedy: String| {
            Err(PolicyError { policy: self.label(), problem, remedy })
        };
        if model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, whose caches differ in length", model.name),
                "use an evicting policy".to_owned(),
            );
        }
        if let Some(of) = self.maps.keys().next()
            && !self.maps.contains_key(&model.name)
            && !self.unsearched
        {
            return refuse(
                format!("its map is one of {of}, not of {}", model.name),
                format!(
                    "batchmax prepare kvsharer --model {} finds one; the preset shares the upper layers",
                    model.name
                ),
            );
        }
        let most = self.maps.get(&model.name).map_or(model.layers / 2, |m| m.len() as u32);
        if self.layers > most {
            return refuse(
                format!("{} of {} layers can't be shared", self.layers, model.layers),
                format!("lower layers to {most}, or search a longer map"),
            );
        }
        let wrong = |(layer, source): &&(Layer, Layer)| source >= layer || *layer >= model.layers;
        match self.maps.get(&model.name).and_then(|map| map.iter().find(wrong)) {
            Some((layer, source)) => refuse(
                format!("layer {layer} can't read layer {source} of {}", model.layers),
                "a layer reads a lower one; search the map again".to_owned(),
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::DType;
    use crate::profile::Catalog;

    #[test]
    fn a_map_of_another_model_is_refused() {
        let catalog = Catalog::built_in();
        let model = catalog.model("smollm2-135m").expect("built in");
        let other = catalog.model("llama-3.1-8b").expect("built in");
        let maps = BTreeMap::from([(model.name.clone(), vec![(27, 11), (28, 27)])]);
        let policy = KvSharer { layers: 2, maps, unsearched: false };
        assert!(policy.check(&Request::new(&model, 64, DType::F16)).is_ok());
        let why = policy.check(&Request::new(&other, 64, DType::F16)).expect_err("another model");
        assert!(why.to_string().contains("smollm2-135m, not of llama-3.1-8b"), "{why}");
        let either = KvSharer { unsearched: true, ..policy.clone() };
        assert!(either.check(&Request::new(&other, 64, DType::F16)).is_ok());
        assert_eq!((either.cache_of(31, &other), either.cache_of(29, &other)), (30, 28));
        // What is handed on: layer 28 reads 27, which reads 11.
        assert_eq!((policy.cache_of(28, &model), policy.cache_of(27, &model)), (11, 11));
    }
}
