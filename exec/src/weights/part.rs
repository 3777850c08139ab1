//! One device's part of a model's weights, where several share each layer.

use std::ops::Range;

use batchmax_kernels::gemm::Packed;
use batchmax_sim::profile::Model;

use super::{LayerWeights, Weights};
use crate::error::ExecError;

/// Which of the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    /// From 0 on.
    pub index: u32,
    /// How many they are.
    pub of: u32,
}

/// Which heads and channels of the feed-forward block a device has.
struct Share {
    queries: Range<usize>,
    keys: Range<usize>,
    ffn: Range<usize>,
}

impl Rank {
    /// An equal share of `count`; where there are fewer than devices, neighbours have the same one.
    fn share(self, count: u32, width: u32) -> Range<usize> {
        let each = (count / self.of).max(1);
        let first = (u64::from(self.index) * u64::from(count) / u64::from(self.of)) as u32;
        (first * width) as usize..((first + each) * width) as usize
    }
}

impl Weights {
    /// The part of a device: its query heads with their keys and values, its channels of the feed-forward block, and all of the
    /// embedding, the head and the norms ([`Model::shard_layers`]).
    ///
    /// # Errors
    /// When the devices can't share the model, or its codes.
    pub fn part(&self, model: &Model, rank: Rank) -> Result<Self, ExecError> {
        model.shard_layers(rank.of).map_err(ExecError::NotShared)?;
        let share = Share {
            queries: rank.share(model.heads, model.head_dim),
            keys: rank.share(model.kv_heads, model.head_dim),
            ffn: rank.share(model.ffn, 1),
        };
        let torn = || {
            ExecError::NotShared(format!(
                "{}: {} devices would tear codes of 32 weights apart; hint: --weight-dtype bf16",
                model.name, rank.of
            ))
        };
        let whole = |matrix: &Packed| columns(matrix, 0..matrix.k()).ok_or_else(torn);
        let layers = self.layers.iter().map(|layer| share.of(model, layer).ok_or_else(torn));
        Ok(Self {
            embedding: whole(&self.embedding)?,
            head: self.head.as_ref().map(whole).transpose()?,
            final_norm: self.final_norm.clone(),
            layers: layers.collect::<Result<_, _>>()?,
            rope: self.rope.clone(),
            rope_layout: self.rope_layout,
            synthetic: self.synthetic,
            narrow: self.narrow,
        })
    }
}

/// Some columns of all rows.
fn columns(matrix: &Packed, columns: Range<usize>) -> Option<Packed> {
    matrix.part(std::slice::from_ref(&(0..matrix.n())), columns)
}

impl Share {
    /// Of one layer; `None` where codes would be torn.
    fn of(&self, model: &Model, layer: &LayerWeights) -> Option<LayerWeights> {
        let behind = |range: &Range<usize>, rows: usize| range.start + rows..range.end + rows;
        let queries = (model.heads * model.head_dim) as usize;
        let keys = (model.kv_heads * model.head_dim) as usize;
        let fused =
            [self.queries.clone(), behind(&self.keys, queries), behind(&self.keys, queries + keys)];
        let feed = [self.ffn.clone(), behind(&self.ffn, model.ffn as usize)];
        let all = |matrix: &Packed| 0..matrix.k();
        let bias = |bias: &Vec<f32>| -> Vec<f32> {
            fused.iter().flat_map(|rows| bias[rows.clone()].iter().copied()).collect()
        };
        Some(LayerWeights {
            attention_norm: layer.attention_norm.clone(),
            qkv: layer.qkv.part(&fused, all(&layer.qkv))?,
            qkv_bias: layer.qkv_bias.as_ref().map(bias),
            qk_norm: layer.qk_norm.clone(),
            output: columns(&layer.output, self.queries.clone())?,
            post_attention_norm: layer.post_attention_norm.clone(),
            ffn_norm: layer.ffn_norm.clone(),
            gate_up: layer.gate_up.part(&feed, all(&layer.gate_up))?,
            down: columns(&layer.down, self.ffn.clone())?,
            post_ffn_norm: layer.post_ffn_norm.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_shared_and_repeated() {
        let ranks = |of: u32| (0..of).map(move |index| Rank { index, of });
        let shares = |of, count| ranks(of).map(|r| r.share(count, 10)).collect::<Vec<_>>();
        assert_eq!(shares(2, 4), [0..20, 20..40]);
        assert_eq!(shares(4, 2), [0..10, 0..10, 10..20, 10..20], "neighbours have the same head");
        assert_eq!(Rank { index: 0, of: 1 }.share(3, 10), 0..30);
    }
}
