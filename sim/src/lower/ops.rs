//! The ops of a layer and of the head, in their order.

use super::classes::Class;
use super::{Active, Lowering, Sequences};
use crate::op::{Branch, Heads, Lane, Lanes, Op, OpKind};

impl Lowering<'_> {
    pub(super) fn op(&self, name: &'static str, kind: OpKind, lanes: Lanes) -> Op {
        Op { name, kind, dtype: self.setup.activations, lanes, branch: Branch::All }
    }

    pub(super) fn gemm(
        &self,
        name: &'static str,
        n: u64,
        k: u64,
        accumulate: bool,
        rows: &Lanes,
    ) -> Op {
        let kind = OpKind::Gemm { n, k, weights: self.setup.weights, accumulate };
        self.op(name, kind, rows.clone())
    }

    /// Where devices share a layer, each has a part of the sum.
    pub(super) fn reduce(&self, ops: &mut Vec<Op>, rows: &Lanes) {
        if self.setup.tp > 1 {
            let kind = OpKind::AllReduce { width: self.model.hidden };
            ops.push(self.op("all_reduce", kind, rows.clone()));
        }
    }

    /// The ops of one decoder layer.
    pub(super) fn layer(
        &self,
        rows: &Lanes,
        class: usize,
        appended: Lanes,
        attend: impl FnOnce(&mut Vec<Op>),
        spoken: &mut Vec<Op>,
    ) -> Vec<Op> {
        let model = self.model;
        let Class { heads, reads, .. } = self.classes[class];
        // A layer that reads another's cache needs no keys and values of its own.
        let rotated = if reads.is_some() { Heads { kv: 0, ..heads } } else { heads };
        let (hidden, ffn) = (u64::from(model.hidden), u64::from(model.ffn));
        let norm = |name, accumulate| {
            self.op(name, OpKind::RmsNorm { width: model.hidden, accumulate }, rows.clone())
        };
        let attention_width = u64::from(model.heads) * u64::from(model.head_dim);
        // With norms behind the blocks the norm, not the product, adds to the residual.
        let residual = !model.post_norms;
        let mut ops = Vec::with_capacity(16 + spoken.len());
        ops.push(norm("attention_norm", false));
        if reads.is_some() {
            ops.push(self.gemm("query", attention_width, hidden, false, rows));
        } else {
            ops.push(self.gemm("qkv", model.qkv_width(), hidden, false, rows));
        }
        if model.qk_norm {
            ops.push(self.op("qk_norm", OpKind::QkNorm { heads: rotated }, rows.clone()));
        }
        ops.push(self.op("rope", OpKind::Rope { heads: rotated }, rows.clone()));
        if reads.is_none() {
            ops.push(self.op("append", OpKind::Append { heads }, appended));
        }
        attend(&mut ops);
        ops.append(spoken);
        ops.push(self.gemm("output", hidden, attention_width, residual, rows));
        self.reduce(&mut ops, rows);
        if model.post_norms {
            ops.push(norm("post_attention_norm", true));
        }
        ops.push(norm("ffn_norm", false));
        if model.gated_ffn {
            ops.push(self.gemm("gate_up", 2 * ffn, hidden, false, rows));
        } else {
            ops.push(self.gemm("up", ffn, hidden, false, rows));
        }
        ops.push(self.op("gated", OpKind::Gated { ffn: model.ffn }, rows.clone()));
        ops.push(self.gemm("down", hidden, ffn, residual, rows));
        self.reduce(&mut ops, rows);
        if model.post_norms {
            ops.push(norm("post_ffn_norm", true));
        }
        ops
    }

    /// Logits and the next token, for the sequences whose prompt is read; only their last row.
    pub(super) fn head(&self, all: &[Sequences], active: &[Active]) -> Vec<Op> {
        if !active.iter().any(|a| a.prompt_read) {
            return Vec::new();
        }
        let rows: Lanes = (active.iter())
            .filter(|a| a.prompt_read)
            .map(|a| {
                let s = &all[a.index];
                // A row that speculates is sampled too.
                let rows = if a.ahead > 0 { a.rows + a.ahead } else { 1 };
                Lane { first: s.first, sequences: s.count, rows, ..Lane::default() }
            })
            .collect();
        let (width, vocab) = (self.model.hidden, self.model.vocab);
        let final_norm = OpKind::RmsNorm { width, accumulate: false };
        let head = OpKind::Gemm {
            n: u64::from(vocab),
            k: u64::from(width),
            weights: self.setup.head,
            accumulate: false,
        };
        let mut ops = Vec::with_capacity(4);
        ops.push(self.op("final_norm", final_norm, rows.clone()));
        ops.push(self.op("head", head, rows.clone()));
        if self.model.logit_softcap.is_some() {
            ops.push(self.op("softcap", OpKind::Softcap { width: vocab }, rows.clone()));
        }
        ops.push(self.op("sample", OpKind::Sample { vocab }, rows));
        ops
    }
}
