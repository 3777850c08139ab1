//! Layers that a policy and a model treat alike.

use super::Setup;
use crate::op::Heads;
use crate::policy::Policy;
use crate::profile::Model;
use crate::program::Layers;
use crate::units::Tokens;

/// Layers that behave alike.
pub(super) struct Class {
    pub(super) layers: Layers,
    pub(super) window: Option<Tokens>,
    pub(super) heads: Heads,
    /// The class whose caches it reads, if not its own.
    pub(super) reads: Option<usize>,
    /// Its caches are read by other layers: what is dropped or packed waits until those are through.
    pub(super) is_read: bool,
}

/// The layers of a model by what they do: those whose window and kind are the same.
pub(super) fn classes(model: &Model, policy: &dyn Policy, setup: Setup) -> Vec<Class> {
    let heads_of = |layer| Heads {
        query: model.heads,
        kv: model.kv_heads,
        dim: model.head_dim,
        dtype: setup.kv.dtype,
        form: policy.form(layer, model),
    };
    let mut classes: Vec<(u32, Class)> = Vec::new();
    for layer in 0..model.layers {
        let (kind, window) = (policy.layer_kind(layer, model), model.window_of(layer));
        // A class is an arithmetic progression; layers that don't continue one start another.
        let same = classes.iter_mut().rev().find(|(k, c)| *k == kind && c.window == window);
        let joined = same.is_some_and(|(_, class)| {
            let layers = &mut class.layers;
            let distance = layer - (layers.first + (layers.count - 1) * layers.stride);
            if layers.count > 1 && distance != layers.stride {
                return false;
            }
            *layers = Layers { stride: distance, count: layers.count + 1, ..*layers };
            true
        });
        if !joined {
            let layers = Layers { first: layer, stride: 1, count: 1 };
            let (heads, reads, is_read) = (heads_of(layer), None, false);
            classes.push((kind, Class { layers, window, heads, reads, is_read }));
        }
    }
    let mut classes: Vec<Class> = classes.into_iter().map(|(_, class)| class).collect();
    for index in 0..classes.len() {
        let layer = classes[index].layers.first;
        let source = policy.cache_of(layer, model);
        if source != layer {
            let read = classes.iter().position(|c| c.layers.contains(source));
            classes[index].reads = read;
            if let Some(read) = read {
                classes[read].is_read = true;
            }
        }
    }
    classes
}
