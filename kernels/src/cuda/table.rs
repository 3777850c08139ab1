//! Written by `kernels/cuda/build.py`: the embedded PTX and its kernels.

/// PTX of a source file.
pub(super) struct Module {
    /// Path of the file below `kernels/cuda`, without its end, `-` for `/`.
    pub(super) name: &'static str,
    /// Its PTX, compressed.
    pub(super) ptx: &'static [u8],
    /// Its kernels, sorted.
    pub(super) kernels: &'static [&'static str],
}

/// All of it.
#[rustfmt::skip]
pub(super) const MODULES: &[Module] = &[
    Module { name: "activation", ptx: include_bytes!("../../cuda/ptx/activation.ptx.z"), kernels: &["gated"] },
    Module { name: "append", ptx: include_bytes!("../../cuda/ptx/append.ptx.z"), kernels: &["advance_heads", "append"] },
    Module { name: "attend-decode_bf16", ptx: include_bytes!("../../cuda/ptx/attend-decode_bf16.ptx.z"), kernels: &["attend_decode_bf16_1", "attend_decode_bf16_1_any", "attend_decode_bf16_2", "attend_decode_bf16_2_any", "attend_decode_bf16_4", "attend_decode_bf16_4_any", "attend_decode_bf16_8", "attend_decode_bf16_8_any"] },
    Module { name: "attend-decode_f16", ptx: include_bytes!("../../cuda/ptx/attend-decode_f16.ptx.z"), kernels: &["attend_decode_f16_1", "attend_decode_f16_1_any", "attend_decode_f16_2", "attend_decode_f16_2_any", "attend_decode_f16_4", "attend_decode_f16_4_any", "attend_decode_f16_8", "attend_decode_f16_8_any"] },
    Module { name: "attend-decode_fp8", ptx: include_bytes!("../../cuda/ptx/attend-decode_fp8.ptx.z"), kernels: &["attend_decode_fp8_1", "attend_decode_fp8_1_any", "attend_decode_fp8_2", "attend_decode_fp8_2_any", "attend_decode_fp8_4", "attend_decode_fp8_4_any", "attend_decode_fp8_8", "attend_decode_fp8_8_any"] },
    Module { name: "attend-join", ptx: include_bytes!("../../cuda/ptx/attend-join.ptx.z"), kernels: &["attend_join", "attend_merge"] },
    Module { name: "attend-prefill", ptx: include_bytes!("../../cuda/ptx/attend-prefill.ptx.z"), kernels: &["attend_prefill"] },
    Module { name: "attend-prefill_tensor", ptx: include_bytes!("../../cuda/ptx/attend-prefill_tensor.ptx.z"), kernels: &["attend_prefill_bf16_128", "attend_prefill_bf16_256", "attend_prefill_bf16_64", "attend_prefill_bf16_80", "attend_prefill_bf16_96", "attend_prefill_f16_128", "attend_prefill_f16_256", "attend_prefill_f16_64", "attend_prefill_f16_80", "attend_prefill_f16_96"] },
    Module { name: "blend", ptx: include_bytes!("../../cuda/ptx/blend.ptx.z"), kernels: &["blend", "deviate"] },
    Module { name: "embed", ptx: include_bytes!("../../cuda/ptx/embed.ptx.z"), kernels: &["embed", "embed_codes"] },
    Module { name: "evict", ptx: include_bytes!("../../cuda/ptx/evict.ptx.z"), kernels: &["evict_choose", "evict_compact", "evict_numbers", "evict_share"] },
    Module { name: "evict-mixed", ptx: include_bytes!("../../cuda/ptx/evict-mixed.ptx.z"), kernels: &["evict_move", "evict_packed", "evict_regroup"] },
    Module { name: "evict-turn", ptx: include_bytes!("../../cuda/ptx/evict-turn.ptx.z"), kernels: &["evict_turn"] },
    Module { name: "evict-within", ptx: include_bytes!("../../cuda/ptx/evict-within.ptx.z"), kernels: &["evict_order", "evict_within"] },
    Module { name: "forward", ptx: include_bytes!("../../cuda/ptx/forward.ptx.z"), kernels: &["compare", "forward_choose", "forward_rows"] },
    Module { name: "gemm-bias", ptx: include_bytes!("../../cuda/ptx/gemm-bias.ptx.z"), kernels: &["bias_rows"] },
    Module { name: "gemm-codes", ptx: include_bytes!("../../cuda/ptx/gemm-codes.ptx.z"), kernels: &["dequantise", "gemv_codes"] },
    Module { name: "gemm-fp8", ptx: include_bytes!("../../cuda/ptx/gemm-fp8.ptx.z"), kernels: &["narrow_rows", "scale_rows"] },
    Module { name: "kv-rows", ptx: include_bytes!("../../cuda/ptx/kv-rows.ptx.z"), kernels: &["rows_in", "rows_out"] },
    Module { name: "norm", ptx: include_bytes!("../../cuda/ptx/norm.ptx.z"), kernels: &["qk_norm", "rms_norm"] },
    Module { name: "pack", ptx: include_bytes!("../../cuda/ptx/pack.ptx.z"), kernels: &["pack_channels", "pack_tokens"] },
    Module { name: "prune", ptx: include_bytes!("../../cuda/ptx/prune.ptx.z"), kernels: &["channel_squares", "choose_channels", "prune"] },
    Module { name: "rank", ptx: include_bytes!("../../cuda/ptx/rank.ptx.z"), kernels: &["rank_chance", "rank_last", "rank_newest", "rank_put", "rank_recency", "rank_tallied", "rank_window"] },
    Module { name: "rank-expected", ptx: include_bytes!("../../cuda/ptx/rank-expected.ptx.z"), kernels: &["expected_logits", "expected_scores", "query_moments"] },
    Module { name: "rank-keys", ptx: include_bytes!("../../cuda/ptx/rank-keys.ptx.z"), kernels: &["key_directions", "rank_differences", "rank_norms"] },
    Module { name: "rank-lag", ptx: include_bytes!("../../cuda/ptx/rank-lag.ptx.z"), kernels: &["rank_lag"] },
    Module { name: "rank-mass", ptx: include_bytes!("../../cuda/ptx/rank-mass.ptx.z"), kernels: &["mass"] },
    Module { name: "rope", ptx: include_bytes!("../../cuda/ptx/rope.ptx.z"), kernels: &["rope"] },
    Module { name: "sample", ptx: include_bytes!("../../cuda/ptx/sample.ptx.z"), kernels: &["argmax", "top_p"] },
    Module { name: "select", ptx: include_bytes!("../../cuda/ptx/select.ptx.z"), kernels: &["gather"] },
    Module { name: "select-clusters", ptx: include_bytes!("../../cuda/ptx/select-clusters.ptx.z"), kernels: &["cluster_assign", "cluster_places", "cluster_select", "cluster_start", "cluster_update"] },
    Module { name: "select-pages", ptx: include_bytes!("../../cuda/ptx/select-pages.ptx.z"), kernels: &["page_bounds", "page_index", "select_pages", "select_shares"] },
    Module { name: "select-part", ptx: include_bytes!("../../cuda/ptx/select-part.ptx.z"), kernels: &["append_part", "part_order"] },
    Module { name: "softcap", ptx: include_bytes!("../../cuda/ptx/softcap.ptx.z"), kernels: &["softcap"] },
    Module { name: "state", ptx: include_bytes!("../../cuda/ptx/state.ptx.z"), kernels: &["state_fold", "state_psi", "state_read"] },
];
