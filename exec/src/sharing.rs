//! `KVSharer`'s search: which layer may read the cache of which lower one.
//!
//! Pairs of layers whose caches are *least* alike are tried first; a pair is taken if the model's last hidden states stay
//! close with all pairs taken so far. Conventions: caches are averaged over excerpts of equal length before they are
//! compared; the distance of two layers is the mean over heads and tokens of the Euclidean distance of their keys, and of
//! their values, halved; equal distances go by the lower layer, then the lower source.

use batchmax_sim::profile::Model;
use batchmax_sim::units::Layer;

/// Says how close the hidden states stay with some pairs of a layer and the one whose cache it reads.
pub type Judge<'a, E> = dyn FnMut(&[(Layer, Layer)]) -> Result<f64, E> + 'a;

/// Means of the keys and values of each layer over excerpts.
#[derive(Clone, Debug)]
pub struct MeanCaches {
    tokens: usize,
    query_width: usize,
    dim: usize,
    /// Per layer: sums `[token][key and value heads][dim]`, and how many excerpts are in them.
    layers: Vec<(Vec<f64>, u32)>,
}

/// Two layers, and how far apart their caches are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// The upper layer, which would read the other's cache.
    pub layer: Layer,
    /// The lower one.
    pub source: Layer,
    /// Distance of their caches.
    pub distance: f64,
}

/// A pair that was tried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// The pair.
    pub pair: Pair,
    /// How close the hidden states stayed.
    pub cosine: f64,
    /// Whether it was taken.
    pub taken: bool,
}

impl MeanCaches {
    /// For excerpts of `tokens` tokens.
    #[must_use]
    pub fn new(model: &Model, tokens: usize) -> Self {
        let dim = model.head_dim as usize;
        let width = 2 * model.kv_heads as usize * dim;
        Self {
            tokens,
            query_width: model.heads as usize * dim,
            dim,
            layers: vec![(vec![0.0; tokens * width], 0); model.layers as usize],
        }
    }

    /// Adds the fused rows of excerpts in one layer.
    pub fn add(&mut self, layer: Layer, rows: &[f32]) {
        let (sums, count) = &mut self.layers[layer as usize];
        let width = sums.len() / self.tokens.max(1);
        for (i, row) in rows.chunks_exact(self.query_width + width).enumerate() {
            let at = i % self.tokens * width;
            let sums = &mut sums[at..at + width];
            sums.iter_mut().zip(&row[self.query_width..]).for_each(|(s, x)| *s += f64::from(*x));
            *count += u32::from(i % self.tokens == 0);
        }
    }

    /// All pairs, the least alike first.
    #[must_use]
    pub fn pairs(&self) -> Vec<Pair> {
        let layers = self.layers.len() as Layer;
        let mut pairs: Vec<Pair> = (0..layers)
            .flat_map(|layer| (0..layer).map(move |source| (layer, source)))
            .map(|(layer, source)| Pair { layer, source, distance: self.distance(layer, source) })
            .collect();
        pairs.sort_by(|a, b| {
            b.distance.total_cmp(&a.distance).then((a.layer, a.source).cmp(&(b.layer, b.source)))
        });
        pairs
    }

    fn distance(&self, a: Layer, b: Layer) -> f64 {
        let ((a, of_a), (b, of_b)) = (&self.layers[a as usize], &self.layers[b as usize]);
        let (of_a, of_b) = (f64::from((*of_a).max(1)), f64::from((*of_b).max(1)));
        let norm = |(a, b): (&[f64], &[f64])| {
            let squares = a.iter().zip(b).map(|(x, y)| (x / of_a - y / of_b).powi(2));
            squares.sum::<f64>().sqrt()
        };
        // Half of the rows are keys, half values: their mean is half the sum of both means.
        let rows = a.chunks_exact(self.dim).zip(b.chunks_exact(self.dim));
        let count = (a.len() / self.dim).max(1);
        rows.map(norm).sum::<f64>() / count as f64
    }
}

/// Takes up to `most` pairs, each layer once, whose hidden states stay above `threshold`. `judge` says how close they stay
/// with some pairs, the last of which is on trial.
///
/// # Errors
/// Those of `judge`.
pub fn search<E>(
    pairs: &[Pair],
    most: usize,
    threshold: f64,
    judge: &mut Judge<'_, E>,
) -> Result<Vec<Trial>, E> {
    let mut taken: Vec<(Layer, Layer)> = Vec::new();
    let mut trials = Vec::new();
    for pair in pairs {
        if taken.len() >= most {
            break;
        }
        if taken.iter().any(|(layer, _)| *layer == pair.layer) {
            continue;
        }
        taken.push((pair.layer, pair.source));
        let cosine = judge(&taken)?;
        let stays = cosine > threshold;
        if !stays {
            taken.pop();
        }
        trials.push(Trial { pair: *pair, cosine, taken: stays });
    }
    Ok(trials)
}

/// Mean over excerpts of `numbers` numbers of the cosine of all their hidden states together.
#[must_use]
pub fn cosine(a: &[f32], b: &[f32], numbers: usize) -> f64 {
    let numbers = numbers.max(1);
    let of = |(a, b): (&[f32], &[f32])| {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        };
        let lengths = (dot(a, a) * dot(b, b)).sqrt();
        if lengths > 0.0 { dot(a, b) / lengths } else { 1.0 }
    };
    let excerpts = a.chunks(numbers).zip(b.chunks(numbers));
    excerpts.map(of).sum::<f64>() / a.len().div_ceil(numbers).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unlike_layers_come_first_and_each_layer_shares_once() {
        let pair = |layer, source, distance| Pair { layer, source, distance };
        let pairs = [pair(3, 1, 9.0), pair(3, 0, 8.0), pair(2, 1, 7.0), pair(1, 0, 6.0)];
        let mut seen = Vec::new();
        let trials = search(&pairs, 2, 0.5, &mut |taken| {
            seen.push(taken.to_vec());
            // Layer 2 bears no sharing.
            Ok::<f64, ()>(if taken.contains(&(2, 1)) { 0.4 } else { 0.9 })
        });
        let trials = trials.expect("no error");
        let taken: Vec<bool> = trials.iter().map(|t| t.taken).collect();
        assert_eq!(taken, [true, false, true]);
        assert_eq!(seen, [vec![(3, 1)], vec![(3, 1), (2, 1)], vec![(3, 1), (1, 0)]]);
    }

    #[test]
    fn distances_and_cosines_by_hand() {
        let mut model =
            batchmax_sim::profile::Catalog::built_in().model("smollm2-135m").expect("built in");
        (model.layers, model.heads, model.kv_heads, model.head_dim) = (2, 1, 1, 2);
        let mut caches = MeanCaches::new(&model, 1);
        // Query, key, value of two excerpts of one token: means are (1, 0), (0, 0) and (4, 4), (0, 2).
        caches.add(0, &[9.0, 9.0, 2.0, 0.0, 0.0, 1.0, 9.0, 9.0, 0.0, 0.0, 0.0, -1.0]);
        caches.add(1, &[9.0, 9.0, 4.0, 4.0, 0.0, 2.0, 9.0, 9.0, 4.0, 4.0, 0.0, 2.0]);
        // Keys are 5 apart, values 2.
        assert_eq!(caches.pairs(), [Pair { layer: 1, source: 0, distance: 3.5 }]);
        // The first excerpt is turned by a right angle, the second as it was.
        assert_eq!(cosine(&[1.0, 0.0, 1.0, 2.0], &[0.0, 3.0, 2.0, 4.0], 2), 0.5);
    }
}
