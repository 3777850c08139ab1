//! What GGUF and Hugging Face call the tensor of a role, and which rows of it are meant where projections are fused.

use batchmax_sim::profile::Model;

use super::Role;

/// Some rows of a tensor (of a vector: some elements).
pub(super) struct Part {
    /// The tensor.
    pub(super) name: String,
    /// First row within it.
    pub(super) first: usize,
    /// Rows that the whole tensor must have.
    pub(super) of: usize,
    /// Rows meant; 1 for a vector.
    pub(super) rows: usize,
    /// Columns.
    pub(super) columns: usize,
}

/// Offset and total of a role within a fused tensor, in rows.
struct Fused {
    name: &'static str,
    first: usize,
    of: usize,
}

/// (q, k, v) rows stacked in this order; the rest of the fused sizes follow from the model.
fn fused_attention(
    role: Role,
    model: &Model,
    weight: &'static str,
    bias: &'static str,
) -> Option<Fused> {
    let head = model.head_dim as usize;
    let (q, kv) = (model.heads as usize * head, model.kv_heads as usize * head);
    let (name, first) = match role {
        Role::Query => (weight, 0),
        Role::Key => (weight, q),
        Role::Value => (weight, q + kv),
        Role::QueryBias => (bias, 0),
        Role::KeyBias => (bias, q),
        Role::ValueBias => (bias, q + kv),
        _ => return None,
    };
    Some(Fused { name, first, of: q + 2 * kv })
}

/// The gate lies above the up projection.
fn fused_ffn(role: Role, model: &Model, name: &'static str) -> Option<Fused> {
    let ffn = model.ffn as usize;
    match role {
        Role::Gate => Some(Fused { name, first: 0, of: 2 * ffn }),
        Role::Up => Some(Fused { name, first: ffn, of: 2 * ffn }),
        _ => None,
    }
}

/// The name in a GGUF file.
pub(super) fn gguf(
    role: Role,
    layer: Option<u32>,
    model: &Model,
    exists: impl Fn(&str) -> bool,
) -> Part {
    let own = match role {
        Role::Embedding => "token_embd.weight",
        Role::FinalNorm => "output_norm.weight",
        Role::Head => "output.weight",
        Role::AttentionNorm => "attn_norm.weight",
        Role::Query => "attn_q.weight",
        Role::Key => "attn_k.weight",
        Role::Value => "attn_v.weight",
        Role::QueryBias => "attn_q.bias",
        Role::KeyBias => "attn_k.bias",
        Role::ValueBias => "attn_v.bias",
        Role::QueryNorm => "attn_q_norm.weight",
        Role::KeyNorm => "attn_k_norm.weight",
        Role::Output => "attn_output.weight",
        Role::PostAttentionNorm => "post_attention_norm.weight",
        Role::FfnNorm => "ffn_norm.weight",
        Role::Gate => "ffn_gate.weight",
        Role::Up => "ffn_up.weight",
        Role::Down => "ffn_down.weight",
        Role::PostFfnNorm => "post_ffw_norm.weight",
    };
    let in_layer =
        |name: &str| layer.map_or_else(|| name.to_owned(), |l| format!("blk.{l}.{name}"));
    let fused = fused_attention(role, model, "attn_qkv.weight", "attn_qkv.bias")
        .filter(|_| !exists(&in_layer(own)))
        // Phi-3's ffn_up holds gate and up; its name alone does not tell.
        .or_else(|| {
            fused_ffn(role, model, "ffn_up.weight")
                .filter(|_| !exists(&in_layer("ffn_gate.weight")))
        });
    choose(role, model, in_layer, own, fused, exists)
}

/// The name in a checkpoint of the transformers library.
pub(super) fn hugging_face(
    role: Role,
    layer: Option<u32>,
    model: &Model,
    prefix: &str,
    exists: impl Fn(&str) -> bool,
) -> Part {
    let own = match role {
        Role::Embedding => "embed_tokens.weight",
        Role::FinalNorm => "norm.weight",
        Role::Head => "lm_head.weight",
        Role::AttentionNorm => "input_layernorm.weight",
        Role::Query => "self_attn.q_proj.weight",
        Role::Key => "self_attn.k_proj.weight",
        Role::Value => "self_attn.v_proj.weight",
        Role::QueryBias => "self_attn.q_proj.bias",
        Role::KeyBias => "self_attn.k_proj.bias",
        Role::ValueBias => "self_attn.v_proj.bias",
        Role::QueryNorm => "self_attn.q_norm.weight",
        Role::KeyNorm => "self_attn.k_norm.weight",
        Role::Output => "self_attn.o_proj.weight",
        Role::PostAttentionNorm => "post_attention_layernorm.weight",
        // "Post attention" is where this norm stands in models with two norms a layer.
        Role::FfnNorm if model.post_norms => "pre_feedforward_layernorm.weight",
        Role::FfnNorm => "post_attention_layernorm.weight",
        Role::Gate => "mlp.gate_proj.weight",
        Role::Up => "mlp.up_proj.weight",
        Role::Down => "mlp.down_proj.weight",
        Role::PostFfnNorm => "post_feedforward_layernorm.weight",
    };
    let in_layer = |name: &str| match layer {
        Some(l) => format!("{prefix}layers.{l}.{name}"),
        None if role == Role::Head => name.to_owned(),
        None => format!("{prefix}{name}"),
    };
    let fused =
        fused_attention(role, model, "self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias")
            .or_else(|| fused_ffn(role, model, "mlp.gate_up_proj.weight"))
            .filter(|_| !exists(&in_layer(own)));
    choose(role, model, in_layer, own, fused, exists)
}

/// The fused tensor if the file has it, else the role's own, so that a missing one is reported by its usual name.
fn choose(
    role: Role,
    model: &Model,
    in_layer: impl Fn(&str) -> String,
    own: &str,
    fused: Option<Fused>,
    exists: impl Fn(&str) -> bool,
) -> Part {
    let (rows, columns) = role.shape_in(model).unwrap_or((0, 0));
    let whole = if rows == 1 { columns } else { rows };
    match fused.filter(|fused| exists(&in_layer(fused.name))) {
        Some(Fused { name, first, of }) => Part { name: in_layer(name), first, of, rows, columns },
        None => Part { name: in_layer(own), first: 0, of: whole, rows, columns },
    }
}
