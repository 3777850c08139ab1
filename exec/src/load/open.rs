//! Finding a checkpoint's files and what lies where in them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use batchmax_sim::profile::gguf::describe_gguf;
use batchmax_sim::profile::hf::{model_from_hf, read_json};
use batchmax_sim::profile::{GgmlType, GgufHeader};
use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

use super::stored::{Shard, Stored};
use super::{Checkpoint, LoadError};

/// Headers of published safetensors are under a megabyte.
const MAX_HEADER: u64 = 16 << 20;
const INDEX: &str = "model.safetensors.index.json";

/// Opens whatever lies at the path.
pub(super) fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let about = std::fs::metadata(path).map_err(|problem| io(path, problem))?;
    if about.is_dir() {
        return open_directory(path);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".safetensors") || name == "config.json" || name == INDEX {
        // Weights alone don't say what they are: configuration and weights are found side by side.
        return open_directory(
            path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")),
        );
    }
    open_gguf(path)
}

fn open_directory(path: &Path) -> Result<Checkpoint, LoadError> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(|problem| io(path, problem))? {
        let entry = entry.map_err(|problem| io(path, problem))?;
        if let Some(name) = entry.file_name().to_str() {
            names.insert(name.to_owned());
        }
    }
    let ending =
        |ending: &str| names.iter().filter(|n| n.ends_with(ending)).cloned().collect::<Vec<_>>();
    let (safetensors, gguf) = (ending(".safetensors"), ending(".gguf"));
    if names.contains("config.json") && (!safetensors.is_empty() || names.contains(INDEX)) {
        return open_hugging_face(path, &names, &safetensors);
    }
    match gguf.as_slice() {
        [only] => open_gguf(&path.join(only)),
        [] if !safetensors.is_empty() => Err(unusable(
            path,
            "holds safetensors without config.json; fetch that file too".to_owned(),
        )),
        [] if names.iter().any(|n| n.ends_with(".bin") || n.ends_with(".pth")) => Err(unusable(
            path,
            "holds PyTorch weights only; convert them to safetensors or GGUF".to_owned(),
        )),
        [] => {
            let problem = "holds no model; expected a GGUF file, or config.json with safetensors";
            Err(unusable(path, problem.to_owned()))
        }
        [first, ..] => {
            let problem =
                format!("holds {} GGUF files; name one of them, such as {first}", gguf.len());
            Err(unusable(path, problem))
        }
    }
}

fn open_gguf(path: &Path) -> Result<Checkpoint, LoadError> {
    let header = GgufHeader::read(path)?;
    let rope_factors = header.rope_factors(path)?;
    let model = describe_gguf(&header, rope_factors.as_deref(), path)?;
    let mut tensors = BTreeMap::new();
    for tensor in &header.tensors {
        let columns = tensor.shape[0];
        let stored = Stored {
            shard: 0,
            start: header.data_start + tensor.offset,
            rows: (tensor.elements().unwrap_or(0) / columns.max(1)) as usize,
            columns: columns as usize,
            kind: tensor.kind,
            kind_name: tensor.kind.to_string(),
        };
        tensors.insert(tensor.name.clone(), stored);
    }
    let architecture = header.text("general.architecture").unwrap_or_default();
    let interleaved = matches!(architecture, "llama" | "mistral" | "granite");
    let file = File::open(path).map_err(|problem| io(path, problem))?;
    Ok(Checkpoint {
        path: path.to_owned(),
        model,
        shards: vec![Shard::new(path.to_owned(), file)],
        tensors,
        header: Some(header),
        rope_factors,
        interleaved,
        norms_lack_one: false,
        prefix: "",
    })
}

fn open_hugging_face(
    path: &Path,
    names: &BTreeSet<String>,
    safetensors: &[String],
) -> Result<Checkpoint, LoadError> {
    let model = model_from_hf(path)?;
    let files = if names.contains(INDEX) {
        indexed(&path.join(INDEX))?
    } else if names.contains("model.safetensors") {
        vec!["model.safetensors".to_owned()]
    } else if let [only] = safetensors {
        vec![only.clone()]
    } else {
        let problem =
            format!("holds {} safetensors files but no {INDEX}; fetch it too", safetensors.len());
        return Err(unusable(path, problem));
    };
    let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
    for name in files {
        let file_path = path.join(&name);
        let file = File::open(&file_path).map_err(|problem| io(&file_path, problem))?;
        for (tensor, stored) in header_of(&file, &file_path, shards.len())? {
            if tensors.insert(tensor.clone(), stored).is_some() {
                let problem = "occurs in more than one file; fetch the model again".to_owned();
                return Err(LoadError::Tensor {
                    path: file_path,
                    tensor: one_line(&tensor),
                    problem,
                });
            }
        }
        shards.push(Shard::new(file_path, file));
    }
    // Checkpoints of the bare decoder leave the prefix out.
    let prefix = if tensors.contains_key("embed_tokens.weight") { "" } else { "model." };
    let config = read_json(&path.join("config.json"))?;
    let class = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    Ok(Checkpoint {
        path: path.to_owned(),
        model,
        shards,
        tensors,
        header: None,
        rope_factors: None,
        interleaved: false,
        norms_lack_one: class.is_some_and(|c| c.starts_with("Gemma")),
        prefix,
    })
}

/// The files that an index names, each once.
fn indexed(index: &Path) -> Result<Vec<String>, LoadError> {
    let json = read_json(index)?;
    let Some(Value::Object(map)) = json.get("weight_map") else {
        return Err(unusable(index, "weight_map is missing; fetch it again".to_owned()));
    };
    let mut files = BTreeSet::new();
    for file in map.values() {
        match file.as_str() {
            // The index must not lead out of the directory.
            Some(name)
                if name.ends_with(".safetensors")
                    && !name.contains(|c: char| matches!(c, '/' | '\\') || c.is_control()) =>
            {
                files.insert(name.to_owned());
            }
            _ => {
                let problem =
                    "weight_map: expected the names of safetensors files beside the index";
                return Err(unusable(index, problem.to_owned()));
            }
        }
    }
    Ok(files.into_iter().collect())
}

/// Names and places of the tensors in one safetensors file.
fn header_of(file: &File, path: &Path, shard: usize) -> Result<Vec<(String, Stored)>, LoadError> {
    let file_bytes = file.metadata().map_err(|problem| io(path, problem))?.len();
    let cut = || {
        unusable(
            path,
            format!(
                "truncated: the file ends at byte {file_bytes} within its header; fetch it again"
            ),
        )
    };
    if file_bytes < 8 {
        return Err(cut());
    }
    let mut source = file;
    let mut length = [0; 8];
    source.read_exact(&mut length).map_err(|problem| io(path, problem))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(unusable(
            path,
            format!("its header claims {length} bytes; is it a safetensors file?"),
        ));
    }
    if length > file_bytes - 8 {
        return Err(cut());
    }
    let mut header = vec![0; length as usize];
    source.read_exact(&mut header).map_err(|problem| io(path, problem))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| {
        let text = one_line(&e.to_string());
        unusable(path, format!("its header is broken: {text}; fetch it again"))
    })?;
    let data_start = 8 + length;
    let mut found = Vec::new();
    let mut last_end = data_start;
    for (name, info) in metadata.tensors() {
        let end = data_start.saturating_add(info.data_offsets.1 as u64);
        if end > file_bytes {
            let problem = format!(
                "truncated: tensor {} ends at byte {end}, the file has {file_bytes}; fetch it again",
                one_line(&name)
            );
            return Err(unusable(path, problem));
        }
        last_end = last_end.max(end);
        let columns = info.shape.last().copied().unwrap_or(1);
        // An empty dimension passes the format's own check whatever stands beside it.
        let rows =
            info.shape.iter().rev().skip(1).fold(1, |rows: usize, n| rows.saturating_mul(*n));
        let kind = match info.dtype {
            Dtype::F32 => GgmlType::F32,
            Dtype::F16 => GgmlType::F16,
            Dtype::BF16 => GgmlType::BF16,
            _ => GgmlType::Other(u32::MAX),
        };
        let start = data_start + info.data_offsets.0 as u64;
        found.push((
            name,
            Stored { shard, start, rows, columns, kind, kind_name: format!("{:?}", info.dtype) },
        ));
    }
    if last_end != file_bytes {
        let problem = format!(
            "the tensors end at byte {last_end}, the file has {file_bytes}; fetch it again"
        );
        return Err(unusable(path, problem));
    }
    Ok(found)
}

/// Names come from the file: an error message stays one short line whatever they hold.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect()
}

fn io(path: &Path, problem: std::io::Error) -> LoadError {
    LoadError::Io { path: PathBuf::from(path), problem }
}

fn unusable(path: &Path, problem: String) -> LoadError {
    LoadError::File { path: PathBuf::from(path), problem }
}
