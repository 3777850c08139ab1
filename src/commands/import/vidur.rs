//! Profiling CSVs of Vidur (github microsoft/vidur, `data/profiling`): `mlp.csv`, `attention.csv`, `all_reduce.csv` and
//! `send_recv.csv`, told apart by their columns. Times are medians in ms; shapes follow from the model and the tensor
//! parallel degree.

use std::path::Path;

use anyhow::{Result, bail};
use batchmax_sim::profile::{Catalog, Model};

use crate::cli::import::VidurArgs;

use super::points::{Cell, PointFiles, Points, Repeats, Table, gpu_key, latency_us};
use super::sheet::{Row, Sheet};
use super::summary::{Summary, tame};

/// The engine whose kernels Vidur times, and the year of its tables, which name no version.
const ENGINE: (&str, &str) = ("sarathi", "2024");
const DTYPE: &str = "fp16";

/// Imports.
pub fn import(
    catalog: &Catalog,
    args: &VidurArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let gpu = catalog.gpu(&args.gpu)?;
    let model = args.model.as_ref().map(|m| catalog.model(m)).transpose()?;
    let mut tables = Tables {
        gpu: gpu_key(&gpu).to_owned(),
        gemm: Points::new(Table::Gemm, Repeats::First),
        memops: Points::new(Table::Memops, Repeats::First),
        prefill: Points::new(Table::AttnPrefill, Repeats::Median),
        decode: Points::new(Table::AttnDecode, Repeats::Median),
        comm: Points::new(Table::Comm, Repeats::Median),
    };
    for path in &args.files {
        let mut sheet = Sheet::open(path)?;
        let needs_model = || match &model {
            Some(model) => Ok(model),
            None => bail!("{}: its shapes need --model NAME", path.display()),
        };
        if sheet.has("time_stats.mlp_up_proj.median") {
            let model = needs_model()?;
            sheet.expect(&["n_head", "n_kv_head", "n_embd", "num_tokens", TP])?;
            sheet.visit(summary, |row, summary| tables.layer(row, model, summary));
        } else if sheet.has("time_stats.attn_prefill.median")
            || sheet.has("time_stats.attn_decode.median")
        {
            let model = needs_model()?;
            let columns = ["n_q_head", "n_kv_head", "n_embd", "batch_size", "kv_cache_size"];
            sheet.expect(&columns)?;
            sheet.expect(&["prefill_chunk_size", "is_prefill", TP])?;
            sheet.visit(summary, |row, _| tables.attention(row, model));
        } else if sheet.has("collective") {
            sheet.expect(&["num_workers", "size", "devices_per_node"])?;
            let folder = path.parent().and_then(Path::file_name).and_then(|f| f.to_str());
            let machine = tame(folder.unwrap_or("unknown"));
            sheet.visit(summary, |row, _| tables.collective(row, &machine));
        } else {
            bail!(
                "{}: no mlp, attention or collective columns; hint: expected mlp.csv, attention.csv, all_reduce.csv or send_recv.csv",
                path.display()
            );
        }
    }
    let source = model.as_ref().map_or_else(|| "vidur".to_owned(), |m| format!("vidur:{}", m.name));
    let mut files = PointFiles::new(dir);
    for points in [tables.gemm, tables.memops, tables.prefill, tables.decode] {
        files.write(points, &source)?;
    }
    files.write(tables.comm, "vidur")?;
    files.finish(summary)
}

const TP: &str = "num_tensor_parallel_workers";

struct Tables {
    gpu: String,
    gemm: Points,
    memops: Points,
    prefill: Points,
    decode: Points,
    comm: Points,
}

impl Tables {
    /// A row of `mlp.csv`: every op of a layer outside attention.
    fn layer(&mut self, row: &Row<'_>, model: &Model, summary: &mut Summary) -> Result<(), String> {
        let heads = Heads::read(row, model, "n_head")?;
        let gated = row.text("use_gated_mlp").eq_ignore_ascii_case("true");
        if !gated {
            return Err("use_gated_mlp is not true: other shapes than a gated layer's".to_owned());
        }
        let ffn = u64::from(model.ffn);
        same(row, "n_expanded_embd", ffn)?;
        if !ffn.is_multiple_of(heads.tp) {
            return Err(format!("{TP} does not divide the model's ffn"));
        }
        let (hidden, ffn) = (u64::from(model.hidden), ffn / heads.tp);
        let tokens = row.whole("num_tokens", 1)?;
        let (queries, all) = (heads.query * heads.dim, (heads.query + heads.kv) * heads.dim);
        let products = [
            ("attn_pre_proj", all + heads.kv * heads.dim, hidden),
            ("attn_post_proj", hidden, queries),
            ("mlp_up_proj", 2 * ffn, hidden),
            ("mlp_down_proj", hidden, ffn),
        ];
        for (op, n, k) in products {
            let key: Vec<Cell> = vec![
                self.gpu.as_str().into(),
                DTYPE.into(),
                ENGINE.0.into(),
                ENGINE.1.into(),
                op.into(),
                tokens.into(),
                n.into(),
                k.into(),
            ];
            take(&mut self.gemm, key, row, op, summary);
        }
        let others = [
            ("emb", "embedding", hidden),
            ("input_layernorm", "rmsnorm", hidden),
            ("attn_rope", "rope", all),
            ("mlp_act", "silu_mul", 2 * ffn),
            ("add", "add", hidden),
        ];
        for (op, name, width) in others {
            let key: Vec<Cell> = vec![
                self.gpu.as_str().into(),
                name.into(),
                DTYPE.into(),
                tokens.into(),
                width.into(),
            ];
            take(&mut self.memops, key, row, op, summary);
        }
        Ok(())
    }

    /// A row of `attention.csv`: one prompt chunk, or one token for each of a batch.
    fn attention(&mut self, row: &Row<'_>, model: &Model) -> Result<(), String> {
        let heads = Heads::read(row, model, "n_q_head")?;
        let is_prefill = row.text("is_prefill").eq_ignore_ascii_case("true");
        let (batch, cached) = (row.whole("batch_size", 1)?, row.whole("kv_cache_size", 0)?);
        let backend = row.text("attention_backend").rsplit('.').next().unwrap_or("");
        let kernel = match backend {
            "FLASH_ATTENTION" | "" => "flash_attn2_paged".to_owned(),
            other => tame(other).to_lowercase(),
        };
        let (points, op) = if is_prefill {
            (&mut self.prefill, "attn_prefill")
        } else {
            (&mut self.decode, "attn_decode")
        };
        let mut key: Vec<Cell> = vec![
            self.gpu.as_str().into(),
            ENGINE.0.into(),
            ENGINE.1.into(),
            kernel.as_str().into(),
            DTYPE.into(),
            DTYPE.into(),
            batch.into(),
        ];
        if is_prefill {
            key.push(row.whole("prefill_chunk_size", 1)?.into());
        } else if cached == 0 {
            return Err("decode over an empty cache".to_owned());
        }
        key.push(cached.into());
        key.extend([heads.query, heads.kv, heads.dim].map(Cell::from));
        Ok(points.add(key, median_us(row, op)?)?)
    }

    /// A row of `all_reduce.csv` or `send_recv.csv`.
    fn collective(&mut self, row: &Row<'_>, machine: &str) -> Result<(), String> {
        let op = row.text("collective");
        if !matches!(op, "all_reduce" | "send_recv" | "all_gather") {
            return Err("an unknown collective".to_owned());
        }
        let topology = format!("{machine}/dpn{}", row.whole("devices_per_node", 1)?);
        let key: Vec<Cell> = vec![
            self.gpu.as_str().into(),
            topology.as_str().into(),
            row.whole("num_workers", 2)?.into(),
            op.into(),
            "nccl".into(),
            ENGINE.1.into(),
            DTYPE.into(),
            row.whole("size", 1)?.into(),
        ];
        Ok(self.comm.add(key, median_us(row, op)?)?)
    }
}

/// Heads of one device.
struct Heads {
    tp: u64,
    query: u64,
    kv: u64,
    dim: u64,
}

impl Heads {
    /// Checks that the row is of the model.
    fn read(row: &Row<'_>, model: &Model, query_column: &str) -> Result<Self, String> {
        same(row, "n_embd", u64::from(model.hidden))?;
        same(row, query_column, u64::from(model.heads))?;
        same(row, "n_kv_head", u64::from(model.kv_heads))?;
        let tp = row.whole(TP, 1)?;
        let (query, kv) = (u64::from(model.heads), u64::from(model.kv_heads));
        if query % tp != 0 || kv % tp != 0 {
            return Err(format!("{TP} does not divide the model's heads"));
        }
        Ok(Self { tp, query: query / tp, kv: kv / tp, dim: u64::from(model.head_dim) })
    }
}

/// Adds an op of a row; another op's time may be sound where this one's is not.
fn take(points: &mut Points, key: Vec<Cell>, row: &Row<'_>, op: &str, summary: &mut Summary) {
    let added = median_us(row, op).and_then(|us| Ok(points.add(key, us)?));
    if let Err(why) = added {
        summary.leave_out(&why, || format!("num_tokens {}", tame(row.text("num_tokens"))));
    }
}

fn median_us(row: &Row<'_>, op: &str) -> Result<f64, String> {
    let ms = row.number(&format!("time_stats.{op}.median"))?;
    latency_us(ms * 1000.0).map_err(|why| format!("{op}: {why}"))
}

fn same(row: &Row<'_>, column: &str, expected: u64) -> Result<(), String> {
    let found = row.whole(column, 1)?;
    if found == expected {
        return Ok(());
    }
    Err(format!("{column} is {found}, the model has {expected}"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const MLP: &str = "time_stats.emb.median,time_stats.input_layernorm.median,time_stats.attn_pre_proj.median,\
        time_stats.attn_rope.median,time_stats.attn_post_proj.median,time_stats.mlp_up_proj.median,\
        time_stats.mlp_act.median,time_stats.mlp_down_proj.median,time_stats.add.median,\
        n_head,n_kv_head,n_embd,n_expanded_embd,use_gated_mlp,num_tokens,num_tensor_parallel_workers";
    const ATTENTION: &str = "time_stats.attn_decode.median,time_stats.attn_prefill.median,n_embd,n_q_head,n_kv_head,\
        num_tensor_parallel_workers,batch_size,prefill_chunk_size,kv_cache_size,is_prefill,attention_backend";
    const REDUCE: &str =
        "time_stats.all_reduce.median,rank,num_workers,size,collective,devices_per_node";

    fn imported(
        files: &[(&str, String)],
        model: Option<&str>,
    ) -> (tempfile::TempDir, Result<Summary>) {
        let dir = tempfile::tempdir().unwrap();
        let machine = dir.path().join("a100_dgx");
        std::fs::create_dir(&machine).unwrap();
        let mut paths = Vec::new();
        for (name, text) in files {
            paths.push(machine.join(name));
            std::fs::write(&paths[paths.len() - 1], text).unwrap();
        }
        let args =
            VidurArgs { files: paths, gpu: "a100".to_owned(), model: model.map(str::to_owned) };
        let mut summary = Summary::default();
        let outcome = import(&Catalog::built_in(), &args, &dir.path().join("out"), &mut summary);
        (dir, outcome.map(|()| summary))
    }

    #[test]
    fn layers_attention_and_collectives_become_points() {
        let mlp = format!(
            "{MLP}\n0.005,0.004,0.021,0.003,0.016,0.08,0.005,0.044,0.002,32,8,4096,14336,True,32,2\n\
             0.005,0.004,0,nan,0.016,0.08,0.005,0.044,0.002,32,8,4096,14336,True,64,2\n\
             0.005,0.004,1,1,0.016,0.08,0.005,0.044,0.002,32,8,8192,14336,True,64,2\n"
        );
        let attention = format!(
            "{ATTENTION}\n0.015,,4096,32,8,2,4,0,32,False,AttentionBackend.FLASH_ATTENTION\n\
             0.017,,4096,32,8,2,4,0,32,False,AttentionBackend.FLASH_ATTENTION\n\
             ,0.02,4096,32,8,2,1,64,0,True,AttentionBackend.FLASHINFER\n"
        );
        let reduce = format!("{REDUCE}\n0.043,0,2,2048,all_reduce,1\n-1,0,2,4096,all_reduce,1\n");
        let files = [("mlp.csv", mlp), ("attention.csv", attention), ("all_reduce.csv", reduce)];
        let (dir, summary) = imported(&files, Some("llama-3.1-8b"));
        let summary = summary.unwrap();
        let text = |name: &str| std::fs::read_to_string(dir.path().join("out").join(name)).unwrap();
        let gemm = text("gemm.csv");
        // 16 query heads and twice 4 KV heads of 128 on each of two devices: 3072 columns.
        assert!(
            gemm.contains(
                "a100_sxm,fp16,sarathi,2024,attn_pre_proj,32,3072,4096,21,vidur:llama-3.1-8b\n"
            ),
            "{gemm}"
        );
        assert!(gemm.contains("mlp_up_proj,32,14336,4096,80,"), "{gemm}");
        assert_eq!(gemm.lines().count(), 1 + 4 + 3);
        let memops = text("memops.csv");
        assert!(memops.contains("a100_sxm,rope,fp16,32,2560,3,"), "{memops}");
        assert!(memops.contains("a100_sxm,silu_mul,fp16,32,14336,5,"), "{memops}");
        let decode = text("attn_decode.csv");
        assert!(
            decode.ends_with("flash_attn2_paged,fp16,fp16,4,32,16,4,128,16,vidur:llama-3.1-8b\n"),
            "{decode}"
        );
        let prefill = text("attn_prefill.csv");
        assert!(
            prefill.ends_with("flashinfer,fp16,fp16,1,64,0,16,4,128,20,vidur:llama-3.1-8b\n"),
            "{prefill}"
        );
        let comm = text("comm.csv");
        assert!(
            comm.ends_with("\na100_sxm,a100_dgx/dpn1,2,all_reduce,nccl,2024,fp16,2048,43,vidur\n"),
            "{comm}"
        );
        assert_eq!(summary.rows_left_out(), 4, "{:?}", summary.lines());
    }

    #[test]
    fn what_is_missing_is_said() {
        let mlp = |text: &str| [("mlp.csv", text.to_owned())];
        let error = imported(&mlp(MLP), None).1.unwrap_err().to_string();
        assert!(error.contains("--model"), "{error}");
        let error = imported(&mlp("a,b\n1,2\n"), None).1.unwrap_err().to_string();
        assert!(error.contains("no mlp, attention or collective columns"), "{error}");
        let cut = MLP.replace("n_embd,", "");
        let error = imported(&mlp(&cut), Some("llama-3.1-8b")).1.unwrap_err().to_string();
        assert!(error.contains("mlp.csv: no column \"n_embd\""), "{error}");
    }
}
