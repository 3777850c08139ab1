//! Keys in clusters, by whose centres tokens are chosen (`ClusterKV`).

use super::{dot, keys};
use crate::kv::{BlockPool, HeadCache};
use crate::threads::{Disjoint, Threads};

/// The clusters of one head's keys.
#[derive(Clone, Debug, Default)]
pub struct Clusters {
    dim: usize,
    /// Tokens in front that belong to no cluster.
    sinks: usize,
    /// Tokens that do: those behind the sinks, up to here.
    end: usize,
    centres: Vec<f32>,
    /// Tokens of each cluster, ascending.
    members: Vec<Vec<u32>>,
}

/// One head's keys to be clustered.
pub struct ClusterItem<'a> {
    /// Its cache.
    pub head: &'a HeadCache,
    /// Where the clusters go.
    pub clusters: &'a mut Clusters,
}

/// Clusters the keys of each head behind its first `sinks` tokens by k-means on directions: `count` clusters, `rounds`
/// rounds, the first centres evenly spread over the tokens. A centre is the plain mean of its keys; one that loses all of
/// them stays where it is. Among equally near centres the lower one takes a key.
pub fn cluster(
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [ClusterItem<'_>],
    sinks: usize,
    count: usize,
    rounds: usize,
) {
    let tasks = items.len();
    let work = Disjoint::new(items);
    threads.run(tasks, |i| {
        // SAFETY: each task has its own head.
        let item = unsafe { work.item_mut(i) };
        *item.clusters = Clusters::of(pool, item.head, sinks, count, rounds);
    });
}

impl Clusters {
    fn of(pool: &BlockPool, head: &HeadCache, sinks: usize, count: usize, rounds: usize) -> Self {
        let dim = pool.head_dim();
        let sinks = sinks.min(head.tokens());
        let end = head.tokens();
        let keys = keys(pool, head, sinks..end);
        let tokens = end - sinks;
        let count = count.clamp(1, tokens.max(1));
        let key = |t: usize| &keys[t * dim..(t + 1) * dim];
        let mut centres: Vec<f32> = Vec::with_capacity(count * dim);
        if tokens > 0 {
            (0..count).for_each(|c| centres.extend_from_slice(key(c * tokens / count)));
        }
        let mut labels = vec![0usize; tokens];
        for _ in 0..rounds {
            assign(&keys, dim, &centres, &mut labels);
            let mut sums = vec![0.0f32; centres.len()];
            let mut sizes = vec![0usize; count];
            for (t, label) in labels.iter().enumerate() {
                sizes[*label] += 1;
                let sum = &mut sums[label * dim..(label + 1) * dim];
                sum.iter_mut().zip(key(t)).for_each(|(s, x)| *s += x);
            }
            for (c, size) in sizes.iter().enumerate().filter(|(_, size)| **size > 0) {
                let centre = &mut centres[c * dim..(c + 1) * dim];
                let sum = &sums[c * dim..(c + 1) * dim];
                centre.iter_mut().zip(sum).for_each(|(x, s)| *x = s / *size as f32);
            }
        }
        assign(&keys, dim, &centres, &mut labels);
        let mut members = vec![Vec::new(); count];
        for (t, label) in labels.iter().enumerate() {
            members[*label].push((sinks + t) as u32);
        }
        Self { dim, sinks, end, centres, members }
    }

    /// Bytes of the centres and of the lists.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let listed: usize = self.members.iter().map(Vec::len).sum();
        4 * (self.centres.len() + listed + self.members.len()) as u64
    }

    /// Tokens in front of this one were there when the clusters were made.
    #[must_use]
    pub fn end(&self) -> usize {
        self.end
    }

    /// Number of clusters.
    #[must_use]
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// Tokens of each cluster.
    #[must_use]
    pub fn members(&self) -> &[Vec<u32>] {
        &self.members
    }

    /// What a query reads of a cache of `tokens` tokens: the sinks, the `budget` tokens of the clusters whose centres it
    /// likes best (the last cluster cut to its lowest tokens), and all tokens that came after the clusters. Ascending.
    #[must_use]
    pub fn select(&self, query: &[f32], budget: usize, tokens: usize) -> Vec<u32> {
        let likes: Vec<f32> =
            self.centres.chunks_exact(self.dim.max(1)).map(|c| dot(query, c)).collect();
        let mut order: Vec<usize> = (0..likes.len()).collect();
        order.sort_by(|a, b| likes[*b].total_cmp(&likes[*a]));
        let mut chosen: Vec<u32> = (0..self.sinks as u32).collect();
        let full = self.sinks + budget;
        for cluster in order {
            let room = full - chosen.len();
            let members = &self.members[cluster];
            chosen.extend(&members[..members.len().min(room)]);
            if chosen.len() == full {
                break;
            }
        }
        chosen.extend(self.end as u32..tokens as u32);
        chosen.sort_unstable();
        chosen
    }
}

/// The centre with the largest cosine for each key; the key's own length changes nothing.
fn assign(keys: &[f32], dim: usize, centres: &[f32], labels: &mut [usize]) {
    let lengths: Vec<f32> = centres.chunks_exact(dim).map(|c| dot(c, c).sqrt()).collect();
    for (label, key) in labels.iter_mut().zip(keys.chunks_exact(dim)) {
        let mut best = f32::NEG_INFINITY;
        for (c, (centre, length)) in centres.chunks_exact(dim).zip(&lengths).enumerate() {
            let cosine = if *length > 0.0 { dot(key, centre) / length } else { 0.0 };
            if cosine > best {
                (best, *label) = (cosine, c);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::AttendShape;
    use crate::kv::KvFormat;
    use crate::testing::Layer;

    fn layer(tokens: usize) -> Layer {
        let shape = AttendShape {
            heads: 2,
            kv_heads: 1,
            head_dim: 16,
            scale: 0.25,
            softcap: None,
            window: None,
        };
        let mut layer = Layer::new(1, shape, KvFormat::F32);
        layer.feed(5, &[tokens]);
        layer
    }

    fn clusters(layer: &Layer, sinks: usize, count: usize) -> Clusters {
        let mut clusters = Clusters::default();
        let mut items = [ClusterItem { head: &layer.caches[0][0], clusters: &mut clusters }];
        cluster(&layer.threads, &layer.pool, &mut items, sinks, count, 20);
        clusters
    }

    #[test]
    fn every_token_behind_the_sinks_is_in_one_cluster() {
        let layer = layer(200);
        let found = clusters(&layer, 16, 6);
        let mut all: Vec<u32> = found.members.iter().flatten().copied().collect();
        all.sort_unstable();
        assert_eq!(all, (16..200).collect::<Vec<_>>());
        assert_eq!(found.bytes(), 4 * (6 * 16 + 184 + 6));
        // Everything chosen is everything; less is exact and keeps the sinks.
        let query = vec![1.0; 16];
        assert_eq!(found.select(&query, 500, 203), (0..203).collect::<Vec<_>>());
        let some = found.select(&query, 50, 203);
        assert_eq!(some.len(), 16 + 50 + 3);
        assert!(some.starts_with(&(0..16).collect::<Vec<_>>()));
        assert!(some.ends_with(&[200, 201, 202]));
    }

    #[test]
    fn a_cluster_for_every_key_chooses_the_largest_products() {
        let layer = layer(60);
        let found = clusters(&layer, 0, 60);
        let query: Vec<f32> = (0..16).map(|i| (i as f32 - 7.0) / 5.0).collect();
        let head = &layer.caches[0][0];
        let mut order: Vec<u32> = (0..60).collect();
        let product = |t: &u32| dot(&query, &head.key(&layer.pool, *t as usize));
        order.sort_by(|a, b| product(b).total_cmp(&product(a)));
        order.truncate(12);
        order.sort_unstable();
        assert_eq!(found.select(&query, 12, 60), order);
    }

    #[test]
    fn two_directions_make_two_clusters() {
        let keys: Vec<f32> =
            (0..8).flat_map(|i| if i % 2 == 0 { [1.0, 0.1] } else { [0.1, 3.0] }).collect();
        let mut labels = vec![9; 8];
        assign(&keys, 2, &[2.0, 0.0, 0.0, 1.0], &mut labels);
        assert_eq!(labels, [0, 1, 0, 1, 0, 1, 0, 1]);
    }
}
