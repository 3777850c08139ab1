//! Ops that choose what a step reads of a cache.

use batchmax_kernels::cuda::{Address, Arg, CudaError};
use batchmax_kernels::kv::BLOCK_TOKENS;
use batchmax_sim::op::{Heads, Lanes, Pick};
use batchmax_sim::units::Tokens;

use super::cache::{Attended, lanes_of, tile_bytes};
use super::interpreter::{Interpreter, Item, Items};
use super::kv::{Layout, kv_arg};
use super::memory::{Device, bytes_of};
use crate::error::ExecError;

/// Extremes of the keys of neighbouring tokens, of all layers.
pub(super) struct Pages {
    /// Pages of a head.
    pub(super) most: usize,
    pub(super) low: Address,
    pub(super) high: Address,
    /// Tokens that a head's pages cover.
    pub(super) covered: Vec<usize>,
}

/// Clusters of keys, of all layers.
pub(super) struct Clusters {
    /// Clusters of a head, at most.
    pub(super) most: usize,
    pub(super) centres: Address,
    pub(super) labels: Address,
    pub(super) places: Address,
    pub(super) sizes: Address,
    /// Per layer and sequence: tokens when they were made, and how many clusters were wanted.
    pub(super) made: Vec<(usize, u32)>,
}

/// Caches of chosen tokens, one behind the other.
pub(super) struct Gathered {
    /// Items, sets of each, blocks of each.
    shape: (usize, usize, usize),
    tables: Vec<u8>,
}

/// Chosen tokens on the device: lists of up to `most` per item and set.
pub(super) struct Chosen {
    list: Address,
    counts: Address,
    most: usize,
}

impl Gathered {
    fn new(shape: (usize, usize, usize), half_bytes: usize) -> Self {
        let (items, sets, blocks) = shape;
        let units = half_bytes / 64;
        // Keys and values of a block lie next to each other.
        let words: Vec<u32> = (0..items * sets)
            .flat_map(|place| {
                let half = move |side: usize, block: usize| {
                    (((place * blocks + block) * 2 + side) * units) as u32
                };
                (0..2).flat_map(move |side| (0..blocks).map(move |block| half(side, block)))
            })
            .collect();
        Self { shape, tables: bytes_of(&words) }
    }
}

impl Interpreter<'_, '_> {
    fn pages(&mut self, page: usize) -> Result<(), CudaError> {
        if self.beside.pages.is_some() {
            return Ok(());
        }
        let (layers, heads) = (self.kv.main.layers(), self.kv.main.per_layer());
        let most = self.kv.main.stride.div_ceil(page);
        let bytes = (layers * heads * most * self.kv.main.layout.dim * 4) as u64;
        let (low, high) = (self.device.alloc(bytes)?, self.device.alloc(bytes)?);
        let covered = vec![0; layers * heads];
        self.beside.pages = Some(Pages { most, low, high, covered });
        Ok(())
    }

    /// Where the extremes of a layer are, and how many pages a head has.
    fn pages_of(&self, layer: usize) -> Result<(Address, Address, usize), ExecError> {
        let Some(pages) = &self.beside.pages else { return Err(self.nothing_chosen()) };
        let bytes = self.kv.main.per_layer() * pages.most * self.kv.main.layout.dim * 4;
        let at = (layer * bytes) as u64;
        Ok((pages.low.plus(at), pages.high.plus(at), pages.most))
    }

    fn nothing_chosen(&self) -> ExecError {
        ExecError::NotExecutable {
            model: self.model.name.clone(),
            part: "a choice of tokens without an index of them".to_owned(),
        }
    }

    pub(super) fn index(
        &mut self,
        page: Tokens,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let page = page.max(1) as usize;
        self.pages(page)?;
        let items = self.items(lanes)?;
        let kv_heads = self.model.kv_heads as usize;
        let first = layer * self.kv.main.per_layer();
        let (mut fresh, mut most_pages) = (Vec::with_capacity(items.list.len()), 0);
        for item in &items.list {
            let heads = self.kv.main.heads(layer, item.sequence);
            let covered = self.beside.pages.as_ref().map_or(&[][..], |p| &p.covered);
            let covered = &covered[first + item.sequence * kv_heads..][..kv_heads];
            let alike = heads.iter().all(|head| head.tokens == heads[0].tokens)
                && covered.iter().all(|c| *c == covered[0]);
            let tokens = heads.iter().map(|head| head.tokens).max().unwrap_or(0);
            // An index of a cache that has lost tokens is built anew.
            let from = if alike && covered[0] <= tokens { covered[0] } else { 0 };
            fresh.push(if from == 0 { u32::MAX } else { (tokens - from) as u32 });
            most_pages = most_pages.max(tokens.div_ceil(page) - from / page);
        }
        let (low, high, most) = self.pages_of(layer)?;
        let fresh = self.device.put_words("fresh", &fresh)?;
        let args = vec![
            self.caches(layer)?,
            Arg::At(items.at),
            Arg::U32(page as u32),
            Arg::At(fresh),
            Arg::U32(most as u32),
            Arg::At(low),
            Arg::At(high),
        ];
        let lanes = lanes_of(self.kv.main.layout.dim);
        let grid = [(most_pages * lanes).div_ceil(128), kv_heads, items.list.len()];
        self.device.launch("page_index", grid, (128, 0), args)?;
        for item in &items.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                let tokens = self.kv.main.head(layer, index).tokens;
                if let Some(pages) = &mut self.beside.pages {
                    pages.covered[first + index] = tokens;
                }
            }
        }
        Ok(())
    }

    fn clusters(&mut self) -> Result<(), CudaError> {
        if self.beside.clusters.is_some() {
            return Ok(());
        }
        let main = &self.kv.main;
        let (layers, heads, most) =
            (main.layers(), main.per_layer(), self.most.clusters.max(1) as usize);
        let tokens = (4 * layers * main.plane()) as u64;
        let centres = (layers * heads * most * main.layout.dim * 4) as u64;
        let made = vec![(0, 0); layers * main.sequences];
        self.beside.clusters = Some(Clusters {
            most,
            centres: self.device.alloc(centres)?,
            labels: self.device.alloc(tokens)?,
            places: self.device.alloc(tokens)?,
            sizes: self.device.alloc((4 * layers * heads * most) as u64)?,
            made,
        });
        Ok(())
    }

    pub(super) fn cluster(
        &mut self,
        sinks: Tokens,
        rounds: u32,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        self.clusters()?;
        let items = self.items(lanes)?;
        let sequences = self.kv.main.sequences;
        for item in &items.list {
            let tokens = self.kv.main.heads(layer, item.sequence)[0].tokens;
            if let Some(clusters) = &mut self.beside.clusters {
                clusters.made[layer * sequences + item.sequence] = (tokens, item.lane.keep);
            }
        }
        let wanted: Vec<u32> = items.list.iter().map(|i| i.lane.keep).collect();
        let wanted = self.device.put_words("wanted", &wanted)?;
        let kv = self.caches(layer)?;
        let (kv_heads, dim) = (self.model.kv_heads as usize, self.kv.main.layout.dim);
        let longest = self.longest(layer, &items);
        let tile = tile_bytes(dim, 32 * 33 + 32);
        for run in items.runs() {
            let at = self.clusters_at(layer, items.list[run.start].sequence)?;
            let args = |more: &[Address]| {
                let mut all = vec![
                    kv.clone(),
                    Arg::At(items.starting(run.start)),
                    Arg::U32(sinks),
                    Arg::At(wanted.plus(4 * run.start as u64)),
                    Arg::U32(at.most as u32),
                    Arg::At(at.centres),
                ];
                all.extend(more.iter().map(|a| Arg::At(*a)));
                all
            };
            let by_cluster = [at.most, kv_heads, run.len()];
            let by_token = [longest.div_ceil(32), kv_heads, run.len()];
            self.device.launch("cluster_start", by_cluster, (32, 0), args(&[]))?;
            for round in 0..=rounds {
                let labelled = args(&[at.labels]);
                self.device.launch("cluster_assign", by_token, (128, tile), labelled.clone())?;
                if round < rounds {
                    self.device.launch("cluster_update", by_cluster, (128, 4096), labelled)?;
                }
            }
            let placed = args(&[at.labels, at.places, at.sizes]);
            self.device.launch("cluster_places", by_cluster, (128, 128), placed)?;
        }
        Ok(())
    }

    /// The clusters of a layer, from a sequence on.
    fn clusters_at(&self, layer: usize, sequence: usize) -> Result<Clusters, ExecError> {
        let Some(all) = &self.beside.clusters else { return Err(self.nothing_chosen()) };
        let (per_layer, dim) = (self.kv.main.per_layer(), self.kv.main.layout.dim);
        let head = layer * per_layer + sequence * self.kv.main.layout.kv_heads;
        // Labels and places go by the heads' own places among tokens.
        let tokens = (4 * layer * self.kv.main.plane()) as u64;
        Ok(Clusters {
            most: all.most,
            centres: all.centres.plus((head * all.most * dim * 4) as u64),
            labels: all.labels.plus(tokens),
            places: all.places.plus(tokens),
            sizes: all.sizes.plus((4 * head * all.most) as u64),
            made: Vec::new(),
        })
    }

    pub(super) fn select(
        &mut self,
        heads: Heads,
        by: Pick,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let chosen = self.room_for(heads, by, &items, layer)?;
        match by {
            Pick::Bounds { page, per_query_head, newest } => {
                self.select_pages(heads, (page, per_query_head, newest), &items, &chosen, layer)
            }
            Pick::Shares { page, channels } => {
                self.select_shares(heads, (page, channels), &items, &chosen, layer)
            }
            Pick::Clusters { sinks, .. } => {
                self.select_clusters(heads, sinks, &items, &chosen, layer)
            }
        }
    }

    /// Lists that hold whatever is chosen: as many tokens as wanted, a whole page, all behind the clusters.
    fn room_for(
        &mut self,
        heads: Heads,
        by: Pick,
        items: &Items,
        layer: usize,
    ) -> Result<Chosen, ExecError> {
        let of = |item: &Item| {
            let wanted = item.lane.keep as usize;
            match by {
                Pick::Bounds { page, .. } | Pick::Shares { page, .. } => wanted.max(page as usize),
                Pick::Clusters { sinks, .. } => {
                    let (end, _) = self.made(layer, item.sequence);
                    let tokens = self.kv.main.heads(layer, item.sequence)[0].tokens;
                    wanted.max(sinks as usize + tokens - end.min(tokens))
                }
            }
        };
        let most = items.list.iter().map(of).max().unwrap_or(0);
        let most = most.min(self.kv.main.stride).next_multiple_of(BLOCK_TOKENS);
        let lists = items.list.len() * by.sets(heads) as usize;
        let list = self.device.scratch("chosen", (4 * lists * most) as u64)?;
        let counts = self.device.scratch("chosen-counts", 4 * lists as u64)?;
        Ok(Chosen { list, counts, most })
    }

    fn made(&self, layer: usize, sequence: usize) -> (usize, u32) {
        let at = layer * self.kv.main.sequences + sequence;
        self.beside.clusters.as_ref().map_or((0, 0), |c| c.made[at])
    }

    fn select_pages(
        &mut self,
        heads: Heads,
        (page, apart, newest): (Tokens, bool, bool),
        items: &Items,
        chosen: &Chosen,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (low, high, most) = self.pages_of(layer)?;
        let count = items.list.len();
        let sets = if apart { heads.query } else { heads.kv } as usize;
        let bounds = self.device.scratch("bounds", (4 * count * sets * most) as u64)?;
        let kv = self.caches(layer)?;
        let args = vec![
            kv.clone(),
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32(heads.query),
            Arg::U32(apart.into()),
            Arg::U32(page),
            Arg::U32(most as u32),
            Arg::At(low),
            Arg::At(high),
            Arg::At(bounds),
        ];
        let pages = self.longest(layer, items).div_ceil(page.max(1) as usize);
        let lanes = lanes_of(heads.dim as usize);
        let grid = [(pages * lanes).div_ceil(128), heads.kv as usize, count];
        self.device.launch("page_bounds", grid, (128, 0), args)?;
        let tokens = self.wanted(items)?;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::At(tokens),
            Arg::At(bounds),
            Arg::U32(page),
            Arg::U32(most as u32),
            Arg::U32(newest.into()),
            Arg::U32(chosen.most as u32),
            Arg::At(chosen.list),
            Arg::At(chosen.counts),
        ];
        Ok(self.device.launch("select_pages", [sets, count, 1], (256, 1152), args)?)
    }

    fn wanted(&mut self, items: &Items) -> Result<Address, ExecError> {
        let wanted: Vec<u32> = items.list.iter().map(|i| i.lane.keep).collect();
        Ok(self.device.put_words("wanted", &wanted)?)
    }

    fn select_shares(
        &mut self,
        heads: Heads,
        (page, channels): (Tokens, u32),
        items: &Items,
        chosen: &Chosen,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (low, high, most) = self.pages_of(layer)?;
        let (count, sets) = (items.list.len(), heads.kv as usize);
        let shares = self.device.scratch("bounds", (4 * count * sets * most) as u64)?;
        let tokens = self.wanted(items)?;
        let args = vec![
            self.caches(layer)?,
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32(heads.query),
            Arg::At(tokens),
            Arg::U32(channels),
            Arg::U32(page),
            Arg::U32(most as u32),
            Arg::At(low),
            Arg::At(high),
            Arg::At(shares),
            Arg::U32(chosen.most as u32),
            Arg::At(chosen.list),
            Arg::At(chosen.counts),
        ];
        let shared = 1152 + 4 * (2 * heads.dim as usize + 16);
        Ok(self.device.launch("select_shares", [sets, count, 1], (256, shared), args)?)
    }

    fn select_clusters(
        &mut self,
        heads: Heads,
        sinks: Tokens,
        items: &Items,
        chosen: &Chosen,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (query, count) = (heads.query as usize, items.list.len());
        let (mut ends, mut clusters, mut budgets) = (Vec::new(), Vec::new(), Vec::new());
        for item in &items.list {
            let (end, wanted) = self.made(layer, item.sequence);
            let tokens = self.kv.main.heads(layer, item.sequence)[0].tokens;
            // What came after the clusters is read in any case.
            let later = (tokens - end.min(tokens)) as u32;
            let budget = item.lane.keep.saturating_sub(sinks + later);
            budgets.extend(std::iter::repeat_n(budget, query));
            ends.push(end as u32);
            clusters.push(wanted);
        }
        let ends = self.device.put_words("ends", &ends)?;
        let wanted = self.device.put_words("wanted", &clusters)?;
        let budgets = self.device.put_words("budgets", &budgets)?;
        let kv = self.caches(layer)?;
        let most = self.clusters_at(layer, 0)?.most;
        let lists = (4 * count * query * most) as u64;
        let order = self.device.scratch("cluster-order", lists)?;
        let other = self.device.scratch("cluster-other", lists)?;
        for run in items.runs() {
            let at = self.clusters_at(layer, items.list[run.start].sequence)?;
            let (first, sets) = (run.start as u64, (run.start * query) as u64);
            let args = vec![
                kv.clone(),
                Arg::At(items.starting(run.start)),
                self.slots.qkv.arg(),
                Arg::U32(sinks),
                Arg::At(wanted.plus(4 * first)),
                Arg::U32(most as u32),
                Arg::At(at.centres),
                Arg::At(at.labels),
                Arg::At(at.places),
                Arg::At(at.sizes),
                Arg::At(ends.plus(4 * first)),
                Arg::At(budgets.plus(4 * sets)),
                Arg::At(order.plus(4 * sets * most as u64)),
                Arg::At(other.plus(4 * sets * most as u64)),
                Arg::U32(chosen.most as u32),
                Arg::At(chosen.list.plus(4 * sets * chosen.most as u64)),
                Arg::At(chosen.counts.plus(4 * sets)),
            ];
            let grid = [query, run.len(), 1];
            self.device.launch("cluster_select", grid, (128, 128 + 8 * most), args)?;
        }
        Ok(())
    }

    /// Attention over the chosen tokens, copied next to each other.
    pub(super) fn attend_chosen(
        &mut self,
        heads: Heads,
        by: Pick,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let chosen = self.room_for(heads, by, &items, layer)?;
        let (sets, count) = (by.sets(heads) as usize, items.list.len());
        let counts = self.device.words(chosen.counts, count * sets)?;
        let layout = Layout { kv_heads: sets, codec: None, channels: None, ..self.kv.main.layout };
        let blocks = chosen.most / BLOCK_TOKENS;
        let half_bytes = 32 * layout.dim * layout.kind.bytes() as usize;
        let shape = (count, sets, blocks);
        if self.beside.gathered.as_ref().is_none_or(|g| g.shape != shape) {
            self.beside.gathered = Some(Gathered::new(shape, half_bytes));
        }
        let to =
            gathered(self.device, self.beside.gathered.as_ref(), &counts, &layout, half_bytes)?;
        let args = vec![
            self.caches(layer)?,
            to.clone(),
            Arg::At(items.at),
            Arg::At(chosen.list),
            Arg::U32(chosen.most as u32),
            Arg::At(chosen.counts),
        ];
        let longest = counts.iter().copied().max().unwrap_or(0) as usize;
        let grid = [(longest * 2 * layout.dim / 8).div_ceil(256), sets, count];
        self.device.launch("gather", grid, (256, 0), args)?;
        let places = items.list.iter().enumerate().map(|(i, item)| Item { sequence: i, ..*item });
        let items = self.put_items("gathered-items", places.collect())?;
        let caches = Attended { kv: to, kv_heads: sets as u32, longest, plain: true };
        let out = self.out();
        self.attend_decode(heads, &caches, &items, None, None, out)
    }
}

/// Caches that hold so many chosen tokens each, as kernels take them.
fn gathered(
    device: &mut Device<'_>,
    gathered: Option<&Gathered>,
    counts: &[u32],
    layout: &Layout,
    half_bytes: usize,
) -> Result<Arg, CudaError> {
    let (blocks, tables) = gathered.map_or((0, &[][..]), |g| (g.shape.2, &g.tables));
    let pool = device.scratch("gathered", (counts.len() * blocks * 2 * half_bytes) as u64)?;
    let tables = device.put("gathered-tables", tables)?;
    let tokens = blocks * BLOCK_TOKENS;
    let positions = device.scratch("gathered-positions", (4 * counts.len() * tokens) as u64)?;
    let images: Vec<u32> = (counts.iter().enumerate())
        .flat_map(|(place, count)| {
            let (keys, values) = (2 * place * blocks, (2 * place + 1) * blocks);
            let mut image = [0u32; 16];
            image[0] = *count;
            (image[4], image[7]) = (keys as u32, values as u32);
            (image[9], image[11]) = ((place * tokens) as u32, layout.dim as u32);
            image
        })
        .collect();
    let heads = device.put_words("gathered-heads", &images)?;
    Ok(kv_arg(&[pool, tables, heads, positions, Address::default()], layout))
}
