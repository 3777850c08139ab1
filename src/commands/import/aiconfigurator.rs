//! Kernel tables of aiconfigurator-core: `systems/data/GPU/FAMILY/FRAMEWORK/VERSION/*_perf.parquet`, latencies in ms.
//!
//! Left out, because the tables of this project have no column for it: attention with a sliding window, families other
//! than matrix products, attention, collectives and quantisation, and quantisation of engines other than the first.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Result, bail};
use batchmax_sim::profile::Catalog;

use crate::cli::import::PackageArgs;

use super::aiconfigurator_tables::Reader;
use super::package::{Package, TablePath};
use super::parquet_columns::Columns;
use super::points::{PointFiles, Points, Table, latency_us};
use super::summary::Summary;

/// Name of the source in the rows.
const SOURCE: &str = "aic";

/// Imports.
pub fn import(
    catalog: &Catalog,
    args: &PackageArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let mut package = Package::open(&args.package)?;
    let tables = package.tables();
    let gpus = devices(catalog, &package, &tables, args.gpu.as_deref())?;
    let mut files = PointFiles::new(dir);
    let mut other: BTreeMap<&str, u32> = BTreeMap::new();
    for gpu in &gpus {
        // One device at a time: all of them together are some millions of rows.
        let mut points: BTreeMap<Table, Points> = BTreeMap::new();
        for path in tables.iter().filter(|t| t.gpu == *gpu) {
            let Some(reader) = Reader::of(&path.table) else {
                *other.entry(&path.family).or_default() += 1;
                continue;
            };
            let name = format!("{}: {}", package.name(), path.path);
            let columns = Columns::read(&name, package.read(&path.path)?, reader.columns)?;
            columns.expect(&name, reader.needed())?;
            let points = points
                .entry(reader.table)
                .or_insert_with(|| Points::new(reader.table, reader.repeats));
            for row in 0..columns.rows {
                let outcome = (reader.row)(path, &columns, row).and_then(|key| {
                    let us = columns.real("latency", row).ok_or("latency is missing")? * 1000.0;
                    // The difference of two times may be nothing.
                    let us = if path.table == "computescale_perf" && us == 0.0 {
                        us
                    } else {
                        latency_us(us)?
                    };
                    points.add(key, us)
                });
                if let Err(reason) = outcome {
                    summary.leave_out(reason, || format!("{} row {}", path.path, row + 1));
                }
            }
        }
        for points in points.into_values() {
            files.write(points, SOURCE)?;
        }
    }
    for (family, tables) in other {
        summary.remark(format!("left out {family}: {tables} tables of other shapes"));
    }
    files.finish(summary)
}

/// The devices to import, as the package spells them.
fn devices(
    catalog: &Catalog,
    package: &Package,
    tables: &[TablePath],
    wanted: Option<&str>,
) -> Result<BTreeSet<String>> {
    let all: BTreeSet<String> = tables.iter().map(|t| t.gpu.clone()).collect();
    if all.is_empty() {
        bail!(
            "{}: no tables systems/data/*/*/*/*/*.parquet; hint: version 0.12.0 has them",
            package.name()
        );
    }
    let Some(wanted) = wanted else { return Ok(all) };
    let mut names = vec![wanted.to_owned()];
    if let Ok(gpu) = catalog.gpu(wanted) {
        names.extend(gpu.aliases);
        names.push(gpu.name);
    }
    let chosen: BTreeSet<String> = all.iter().filter(|g| names.contains(g)).cloned().collect();
    if chosen.is_empty() {
        let all: Vec<String> = all.into_iter().collect();
        bail!("{}: nothing of {wanted}; hint: it has {}", package.name(), all.join(", "));
    }
    Ok(chosen)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::super::package::tests::wheel;
    use super::super::parquet_columns::tests::{V, file};
    use super::*;

    const ROOT: &str = "aiconfigurator_core/systems/data/h100_sxm";

    fn args(package: std::path::PathBuf, gpu: Option<&str>) -> PackageArgs {
        PackageArgs { package, gpu: gpu.map(str::to_owned) }
    }

    #[test]
    fn tables_become_points() {
        let gemm = file(&[
            (
                "kernel_source",
                V::T(&[
                    "torch.nn.functional.linear",
                    "CutlassFP8ScaledMMLinearKernel",
                    "x",
                    "x",
                    "x",
                ]),
            ),
            ("gemm_dtype", V::T(&["bfloat16", "fp8", "sq", "sq", "sq"])),
            ("m", V::I(&[16, 8, 0, 1, 1])),
            ("n", V::I(&[256, 256, 1, 1, 1])),
            ("k", V::I(&[512, 512, 1, 1, 1])),
            ("latency", V::D(&[0.002_676_4, 1.017_471, 1.0, 0.0, f64::NAN])),
        ]);
        let decode = file(&[
            ("kernel_source", V::T(&["fa3", "fa3", "fa3"])),
            ("attn_dtype", V::T(&["bfloat16", "bfloat16", "bfloat16"])),
            ("kv_cache_dtype", V::T(&["fp8", "fp8", "fp8"])),
            ("batch_size", V::I(&[4, 4, 4])),
            ("isl", V::I(&[1, 1, 1])),
            ("step", V::I(&[127, 127, 127])),
            ("num_heads", V::I(&[32, 32, 32])),
            ("num_key_value_heads", V::I(&[8, 8, 8])),
            ("head_dim", V::I(&[128, 128, 128])),
            ("latency", V::D(&[0.010_677, 0.010_88, 0.5])),
            ("window_size", V::I(&[0, 0, 128])),
        ]);
        let nccl = file(&[
            ("kernel_source", V::T(&["NCCL", "NCCL"])),
            ("op_name", V::T(&["all_reduce", "all_reduce"])),
            ("nccl_dtype", V::T(&["half", "half"])),
            ("num_gpus", V::I(&[8, 16])),
            ("message_size", V::I(&[128, 128])),
            ("latency", V::D(&[0.01, 0.01])),
        ]);
        let dir = tempfile::tempdir().unwrap();
        let package = wheel(
            dir.path(),
            &[
                (&format!("{ROOT}/gemm/vllm/0.24.0/gemm_perf.parquet"), &gemm),
                (
                    &format!("{ROOT}/attention/vllm/0.24.0/generation_attention_perf.parquet"),
                    &decode,
                ),
                (&format!("{ROOT}/comm/nccl/2.23/nccl_perf.parquet"), &nccl),
                (&format!("{ROOT}/moe/vllm/0.24.0/moe_perf.parquet"), b"not read"),
            ],
        );
        let out = dir.path().join("out");
        let mut summary = Summary::default();
        import(&Catalog::built_in(), &args(package.clone(), Some("h100")), &out, &mut summary)
            .unwrap();
        let text = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
        assert_eq!(
            text("gemm.csv"),
            "gpu,dtype,framework,version,kernel,m,n,k,latency_us,source\n\
             h100_sxm,bf16,vllm,0.24.0,torch_linear,16,256,512,2.676,aic\n\
             h100_sxm,fp8,vllm,0.24.0,CutlassFP8ScaledMM,8,256,512,1017.47,aic\n"
        );
        let decode = text("attn_decode.csv");
        assert!(
            decode.ends_with("vllm,0.24.0,fa3,bf16,fp8,4,128,32,8,128,10.7785,aic\n"),
            "{decode}"
        );
        let comm = text("comm.csv");
        assert!(
            comm.ends_with("h100_sxm,node8,8,all_reduce,nccl,2.23,fp16,256,10,aic\n"),
            "{comm}"
        );
        assert_eq!((summary.files.len(), summary.rows_left_out()), (3, 5), "{:?}", summary.lines());
        assert!(summary.lines().join("\n").contains("moe: 1 tables"));
        let none = import(&Catalog::built_in(), &args(package, Some("t4")), &out, &mut summary)
            .unwrap_err();
        assert!(none.to_string().contains("it has h100_sxm"), "{none}");
    }

    #[test]
    fn a_missing_column_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = file(&[("m", V::I(&[1]))]);
        let name = format!("{ROOT}/gemm/vllm/0.24.0/gemm_perf.parquet");
        let package = wheel(dir.path(), &[(&name, &bytes)]);
        let error =
            import(&Catalog::built_in(), &args(package, None), dir.path(), &mut Summary::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("gemm_perf.parquet: no column \"kernel_source\""), "{error}");
    }
}
