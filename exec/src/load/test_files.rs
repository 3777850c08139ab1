//! Checkpoints of a few kilobytes, made by hand.

use std::path::Path;

/// A GGUF file in the making.
#[derive(Clone, Default)]
pub(crate) struct GgufFile {
    keys: Vec<Vec<u8>>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl GgufFile {
    fn key(mut self, name: &str, kind: u32, raw: &[u8]) -> Self {
        let mut out = Vec::new();
        put_text(&mut out, name);
        out.extend(kind.to_le_bytes());
        out.extend(raw);
        self.keys.push(out);
        self
    }

    pub(crate) fn text(self, name: &str, text: &str) -> Self {
        let mut raw = Vec::new();
        put_text(&mut raw, text);
        self.key(name, 8, &raw)
    }

    pub(crate) fn whole(self, name: &str, value: u32) -> Self {
        self.key(name, 4, &value.to_le_bytes())
    }

    pub(crate) fn flag(self, name: &str, value: bool) -> Self {
        self.key(name, 7, &[u8::from(value)])
    }

    pub(crate) fn texts(self, name: &str, texts: &[&str]) -> Self {
        let mut raw = 8u32.to_le_bytes().to_vec();
        raw.extend((texts.len() as u64).to_le_bytes());
        texts.iter().for_each(|text| put_text(&mut raw, text));
        self.key(name, 9, &raw)
    }

    pub(crate) fn wholes(self, name: &str, values: &[u32]) -> Self {
        let mut raw = 4u32.to_le_bytes().to_vec();
        raw.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|v| raw.extend(v.to_le_bytes()));
        self.key(name, 9, &raw)
    }

    /// `shape` in GGUF order: columns, rows.
    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), shape.to_vec(), kind, data));
        self
    }

    /// A tensor in F32 whose element i is `base + i`.
    pub(crate) fn counted(self, name: &str, shape: &[u64], base: f32) -> Self {
        let count = shape.iter().product::<u64>();
        let data = (0..count).flat_map(|i| (base + i as f32).to_le_bytes()).collect();
        self.tensor(name, shape, 0, data)
    }

    pub(crate) fn without(mut self, tensor: &str) -> Self {
        self.tensors.retain(|t| t.0 != tensor);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        self.keys.iter().for_each(|key| out.extend(key));
        let mut offset = 0u64;
        for (name, shape, kind, data) in &self.tensors {
            put_text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + data.len() as u64).next_multiple_of(32);
        }
        for (.., data) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
        }
        out
    }
}

/// One layer, hidden 32, two query heads of 16, one KV head, ffn 64, six tokens, all in F32.
pub(crate) fn tiny(arch: &str) -> GgufFile {
    let key = |name: &str| format!("{arch}.{name}");
    GgufFile::default()
        .text("general.architecture", arch)
        .text("general.name", "Tiny")
        .whole(&key("block_count"), 1)
        .whole(&key("context_length"), 128)
        .whole(&key("embedding_length"), 32)
        .whole(&key("feed_forward_length"), 64)
        .whole(&key("attention.head_count"), 2)
        .whole(&key("attention.head_count_kv"), 1)
        .counted("token_embd.weight", &[32, 6], 0.0)
        .counted("output_norm.weight", &[32], 1.0)
        .counted("blk.0.attn_norm.weight", &[32], 2.0)
        .counted("blk.0.attn_q.weight", &[32, 32], 3.0)
        .counted("blk.0.attn_k.weight", &[32, 16], 4.0)
        .counted("blk.0.attn_v.weight", &[32, 16], 5.0)
        .counted("blk.0.attn_output.weight", &[32, 32], 6.0)
        .counted("blk.0.ffn_norm.weight", &[32], 7.0)
        .counted("blk.0.ffn_gate.weight", &[32, 64], 8.0)
        .counted("blk.0.ffn_up.weight", &[32, 64], 9.0)
        .counted("blk.0.ffn_down.weight", &[64, 32], 10.0)
}

/// A configuration of the same shape.
pub(crate) fn tiny_config(class: &str) -> String {
    format!(
        r#"{{"architectures": ["{class}"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 6, "max_position_embeddings": 128,
            "tie_word_embeddings": true, "torch_dtype": "float32"}}"#
    )
}

/// Tensors (name, rows first) of [`tiny_config`] for Llama.
pub(crate) const TINY_TENSORS: [(&str, &[usize]); 11] = [
    ("model.embed_tokens.weight", &[6, 32]),
    ("model.norm.weight", &[32]),
    ("model.layers.0.input_layernorm.weight", &[32]),
    ("model.layers.0.self_attn.q_proj.weight", &[32, 32]),
    ("model.layers.0.self_attn.k_proj.weight", &[16, 32]),
    ("model.layers.0.self_attn.v_proj.weight", &[16, 32]),
    ("model.layers.0.self_attn.o_proj.weight", &[32, 32]),
    ("model.layers.0.post_attention_layernorm.weight", &[32]),
    ("model.layers.0.mlp.gate_proj.weight", &[64, 32]),
    ("model.layers.0.mlp.up_proj.weight", &[64, 32]),
    ("model.layers.0.mlp.down_proj.weight", &[32, 64]),
];

/// A safetensors file; element i of every tensor is i, in `dtype` (F32 or BF16).
pub(crate) fn safetensors(tensors: &[(&str, &[usize])], dtype: &str) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, shape) in tensors {
        let begin = data.len();
        for i in 0..shape.iter().product::<usize>() {
            match dtype {
                "BF16" => data.extend(half::bf16::from_f32(i as f32).to_le_bytes()),
                "F64" => data.extend((i as f64).to_le_bytes()),
                _ => data.extend((i as f32).to_le_bytes()),
            }
        }
        let end = data.len();
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

/// A directory with configuration and weights.
pub(crate) fn write_hugging_face(
    folder: &Path,
    class: &str,
    tensors: &[(&str, &[usize])],
    dtype: &str,
) {
    std::fs::write(folder.join("config.json"), tiny_config(class)).expect("writable");
    std::fs::write(folder.join("model.safetensors"), safetensors(tensors, dtype))
        .expect("writable");
}
