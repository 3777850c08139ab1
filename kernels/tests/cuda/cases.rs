//! What is tested, and what a GPU will be timed with: one table of shapes, with the work that each has to do.

use batchmax_kernels::kv::KvFormat;

/// Tokens of a page of an index.
pub const PAGE: usize = 16;

/// A row of the table.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is.
    pub family: &'static str,
    /// Query heads, KV heads, channels.
    pub heads: (usize, usize, usize),
    /// How the cache is stored.
    pub format: KvFormat,
    /// Tokens of each sequence.
    pub tokens: &'static [usize],
    /// Bits and group of codes, if there are any.
    pub codes: Option<(u8, u16)>,
    /// Largest error, relative to numbers above one.
    pub tolerance: f64,
}

impl Case {
    /// Tokens of all sequences.
    pub fn all_tokens(&self) -> f64 {
        self.tokens.iter().sum::<usize>() as f64
    }

    /// Floating-point operations, by the definition.
    pub fn flops(&self) -> f64 {
        let (heads, kv_heads, dim) = self.heads;
        let per_token = match self.family {
            "attend-decode" => 4 * heads * dim,
            // A product of one row's queries with each key, a sum of squares, and comparisons with two extremes.
            "mass" => 2 * heads * dim,
            "norms" | "index" => 2 * kv_heads * dim,
            // Least, largest, minus, by, rounded.
            "pack" => 2 * 5 * kv_heads * dim,
            _ => 0,
        };
        self.all_tokens() * per_token as f64
    }

    /// Bytes that have to be moved once: keys, values, and what is made of them.
    pub fn bytes(&self) -> f64 {
        let (_, kv_heads, dim) = self.heads;
        let numbers = self.all_tokens() * (2 * kv_heads * dim) as f64;
        let whole = numbers * self.format.bytes() as f64;
        let packed = self.codes.map_or(0.0, |(bits, group)| {
            numbers * (f64::from(bits) / 8.0 + 4.0 / f64::from(group))
        });
        match self.family {
            "attend-decode" if self.codes.is_some() => packed,
            "pack" => whole + packed,
            // Rows come in single precision.
            "append" => numbers * 4.0 + whole,
            // Keys alone; what is made of them is a number per token, or two rows per page.
            "norms" | "mass" => whole / 2.0 + self.all_tokens() * (4 * kv_heads) as f64,
            "index" => whole / 2.0 + numbers * 4.0 / PAGE as f64,
            "rows-out" => 2.0 * whole,
            // Every second token, read and written.
            "gather" => whole,
            // Half of what stays moves, off its place and onto another.
            "evict" => 0.5 * 0.5 * 2.0 * whole,
            _ => whole,
        }
    }
}

/// The cases of a family.
pub fn of(family: &str) -> Vec<Case> {
    all().into_iter().filter(|case| case.family == family).collect()
}

/// All of them. The largest are what the shim does in a second; benches multiply the sequences.
pub fn all() -> Vec<Case> {
    use KvFormat::{Bf16, F16, Fp8};
    let case = |family, heads, format, tokens, codes, tolerance| Case {
        family,
        heads,
        format,
        tokens,
        codes,
        tolerance,
    };
    let attend = |heads, format, tokens| case("attend-decode", heads, format, tokens, None, 3e-6);
    let fused = |heads, tokens, bits, group| {
        case("attend-decode", heads, F16, tokens, Some((bits, group)), 3e-6)
    };
    let pack =
        |heads, tokens, bits, group| case("pack", heads, F16, tokens, Some((bits, group)), 0.0);
    let plain = |family, heads, format, tokens| case(family, heads, format, tokens, None, 0.0);
    let evict = |heads, format, tokens| case("evict", heads, format, tokens, None, 0.0);
    vec![
        attend((9, 3, 64), F16, &[700, 1, 33, 513]),
        attend((4, 4, 64), Bf16, &[640, 100]),
        attend((8, 4, 80), F16, &[300, 31]),
        attend((12, 3, 96), Bf16, &[256, 65]),
        attend((8, 1, 128), F16, &[600]),
        attend((5, 1, 128), Fp8, &[530, 7]),
        attend((8, 2, 256), Bf16, &[200, 40]),
        attend((14, 2, 64), Fp8, &[600, 2]),
        attend((16, 1, 128), Bf16, &[290]),
        fused((8, 2, 64), &[544, 256], 8, 64),
        fused((8, 2, 128), &[544], 4, 32),
        fused((4, 4, 64), &[512, 160], 2, 32),
        fused((9, 3, 64), &[352], 1, 32),
        fused((4, 2, 80), &[288], 4, 32),
        pack((8, 2, 64), &[320, 64], 2, 32),
        pack((8, 2, 128), &[192], 4, 32),
        pack((4, 1, 80), &[160], 8, 64),
        pack((4, 2, 64), &[128], 1, 64),
        evict((6, 2, 64), F16, &[400, 100, 33]),
        evict((8, 2, 128), Bf16, &[300]),
        evict((2, 2, 80), Fp8, &[200, 64]),
        plain("append", (8, 2, 128), F16, &[512, 256]),
        plain("append", (4, 4, 64), Fp8, &[512]),
        plain("norms", (8, 2, 128), Bf16, &[512, 256]),
        plain("norms", (4, 4, 64), F16, &[512]),
        plain("mass", (8, 2, 128), F16, &[512, 256]),
        plain("index", (8, 2, 128), F16, &[512, 256]),
        plain("rows-out", (8, 2, 128), Bf16, &[512, 256]),
        plain("rows-out", (4, 4, 64), Fp8, &[512]),
        plain("gather", (8, 2, 128), F16, &[512, 256]),
    ]
}
