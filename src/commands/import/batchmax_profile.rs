//! Measurements of `batchmax profile`, as points.
//!
//! A measured point holds the coordinates its cost model interpolates in: where those are a product (norms, rotary
//! embedding, gate), the model whose shapes were measured gives one factor. Families without a table are counted.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use batchmax_sim::cost::calibrated::{Point, Provenance};
use batchmax_sim::op::{DType, Family};
use batchmax_sim::profile::{Catalog, Model};
use serde::Deserialize;

use crate::cli::import::BatchmaxProfileArgs;

use super::points::{Cell, PointFiles, Points, Repeats, Table, latency_us};
use super::sheet::read_file;
use super::summary::{Summary, tame};

const SOURCE: &str = "batchmax";
/// Added to prefixes before the logarithm, so that short ones are alike.
const TILE: f64 = 32.0;

/// Behind the names of kernels that found the device's cache full of something else.
const COLD: &str = "-cold";

/// What is needed of a profile's file.
#[derive(Deserialize)]
struct Measurements {
    measured: Provenance,
    points: Vec<(Family, Point)>,
    #[serde(default)]
    cold: Vec<(Family, Point)>,
}

/// Imports.
pub fn import(
    catalog: &Catalog,
    args: &BatchmaxProfileArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let place = args.file.display().to_string();
    let Measurements { measured, points, cold } = serde_json::from_slice(&read_file(&args.file)?)
        .map_err(|e| {
        anyhow::anyhow!("{place}: not measurements of batchmax profile: {}", tame(&e.to_string()))
    })?;
    if args.gpu.is_empty() || args.gpu.chars().any(char::is_control) {
        bail!("--gpu: expected a name");
    }
    let model = catalog.model(&measured.model).ok();
    let shapes = |cold: &str| Shapes {
        gpu: &args.gpu,
        version: tame(&measured.version),
        kernel: kernel(&measured) + cold,
        computed: computed(&measured),
        model: model.as_ref(),
    };
    let (usual, swept) = (shapes(""), shapes(COLD));
    let mut tables: BTreeMap<Table, Points> = BTreeMap::new();
    // Rows of ops bound by memory have no column that could tell the two apart.
    let named = |(family, _): &&(Family, Point)| {
        matches!(family, Family::Gemm | Family::AttendPrefill | Family::AttendDecode)
    };
    let all = points.iter().map(|point| (&usual, point));
    let all = all.chain(cold.iter().filter(named).map(|point| (&swept, point)));
    for (i, (shapes, (family, point))) in all.enumerate() {
        let added = shapes.key(*family, point).and_then(|(table, key)| {
            let sixteen_bits = key.contains(&Cell::from("fp16"));
            let us = latency_us(point.seconds * 1e6)?;
            let points = tables.entry(table).or_insert_with(|| Points::new(table, Repeats::Median));
            points.add(key, us)?;
            Ok(sixteen_bits)
        });
        match added {
            Ok(true) => {
                let line = format!("{place}: does not say which 16-bit type: written as fp16");
                summary.remark(line);
            }
            Ok(false) => {}
            Err(why) => {
                summary.leave_out(&format!("{}: {why}", family.name()), || {
                    format!("{place} point {}", i + 1)
                });
            }
        }
    }
    let mut files = PointFiles::new(dir);
    for points in tables.into_values() {
        files.write(points, SOURCE)?;
    }
    files.finish(summary)
}

/// Whether a GPU was timed: `sm_90, driver 12040`.
fn on_gpu(measured: &Provenance) -> bool {
    measured.isa.starts_with("sm_")
}

/// What the timed kernels are called.
fn kernel(measured: &Provenance) -> String {
    match measured.isa.split_once(',') {
        Some((architecture, _)) if on_gpu(measured) => format!("cuda-{}", tame(architecture)),
        _ => format!("cpu-{}-{}t", tame(&measured.isa), measured.threads),
    }
}

/// The type of activations: a CPU computes in single precision, whatever it stores; a GPU in brain floats unless its weights are
/// in single precision.
fn computed(measured: &Provenance) -> &'static str {
    if on_gpu(measured) && measured.weights != DType::F32 { "bf16" } else { "fp32" }
}

/// What the points of a file share.
struct Shapes<'a> {
    gpu: &'a str,
    version: String,
    kernel: String,
    computed: &'static str,
    model: Option<&'a Model>,
}

impl Shapes<'_> {
    fn key(&self, family: Family, point: &Point) -> Result<(Table, Vec<Cell>), &'static str> {
        let [a, b, c, ..] = point.key.map(u64::from);
        let at = |axis: usize| size(point.at[axis]);
        match family {
            Family::Gemm => {
                let mut key: Vec<Cell> = vec![
                    self.gpu.into(),
                    self.dtype(c)?.into(),
                    "batchmax".into(),
                    self.version.as_str().into(),
                ];
                // Products that add to their result read it first.
                let kernel = if point.key[3] == 0 {
                    self.kernel.clone()
                } else {
                    format!("{}-add", self.kernel)
                };
                key.push(kernel.as_str().into());
                key.extend([at(0)?, a, b].map(Cell::from));
                Ok((Table::Gemm, key))
            }
            Family::AttendPrefill => {
                let prefix = point.at[1].exp2() - TILE;
                let mut key = self.attention(point)?;
                key.extend(
                    [at(2)?, at(0)?, prefix.round().clamp(0.0, 1e12) as u64].map(Cell::from),
                );
                key.extend([a, b, c].map(Cell::from));
                Ok((Table::AttnPrefill, key))
            }
            Family::AttendDecode => {
                let mut key = self.attention(point)?;
                key.extend([at(0)?, at(1)?, a, b, c].map(Cell::from));
                Ok((Table::AttnDecode, key))
            }
            Family::Embed => self.memory_bound("embedding", at(0)?, a),
            Family::Sample => self.memory_bound("sampler", at(0)?, a),
            Family::Norm if a == 0 => self.split("rmsnorm", at(0)?, |m| u64::from(m.hidden), 1),
            Family::Norm => self.split("qk_norm", at(0)?, rotated, 1),
            Family::Rope => self.split("rope", at(0)?, rotated, 1),
            // The layout counts both inputs of the gate.
            Family::Gated => self.split("silu_mul", at(0)?, |m| u64::from(m.ffn), 2),
            _ => Err("no table for this family"),
        }
    }

    /// Only the bits are known. Of the 16-bit types a CPU stores binary16 unless told otherwise, a GPU what it computes in.
    fn dtype(&self, bits: u64) -> Result<&'static str, &'static str> {
        match bits {
            32 => Ok("fp32"),
            16 if self.computed == "bf16" => Ok("bf16"),
            16 => Ok("fp16"),
            // Products of a GPU; of caches it may be codes.
            8 if self.computed == "bf16" => Ok("fp8"),
            8 => Ok("int8"),
            4 => Ok("int4"),
            // Codes with their scales.
            9 => Ok("q8"),
            5 => Ok("q4"),
            _ => Err("a type of unknown width"),
        }
    }

    fn attention(&self, point: &Point) -> Result<Vec<Cell>, &'static str> {
        let cache = self.dtype(u64::from(point.key[3]))?;
        Ok(vec![
            self.gpu.into(),
            "batchmax".into(),
            self.version.as_str().into(),
            self.kernel.as_str().into(),
            self.computed.into(),
            cache.into(),
        ])
    }

    fn memory_bound(
        &self,
        op: &str,
        tokens: u64,
        width: u64,
    ) -> Result<(Table, Vec<Cell>), &'static str> {
        Ok((
            Table::Memops,
            vec![self.gpu.into(), op.into(), self.computed.into(), tokens.into(), width.into()],
        ))
    }

    /// An op of which only the elements in all are known.
    fn split(
        &self,
        op: &str,
        elements: u64,
        width: impl Fn(&Model) -> u64,
        inputs: u64,
    ) -> Result<(Table, Vec<Cell>), &'static str> {
        let model = self.model.ok_or("the model that was measured is not in the catalog")?;
        let width = width(model);
        if width == 0 || elements < width || !elements.is_multiple_of(width) {
            return Err("the elements are no multiple of the model's width");
        }
        self.memory_bound(op, elements / width, inputs * width)
    }
}

fn rotated(model: &Model) -> u64 {
    u64::from(model.head_dim) * (u64::from(model.heads) + u64::from(model.kv_heads))
}

/// 2 to the power of a coordinate: sizes below 2^40 are exact in a double's logarithm.
fn size(log2: f64) -> Result<u64, &'static str> {
    let value = log2.exp2().round();
    if (1.0..1e12).contains(&value) { Ok(value as u64) } else { Err("a size is out of range") }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn point(family: &str, key: [u32; 5], at: [f64; 3], seconds: &str) -> String {
        let at = at.map(|x: f64| x.max(1.0).log2());
        format!(
            "[\"{family}\", {{\"key\": {key:?}, \"at\": {at:?}, \"flops\": 1.0, \"bytes\": 1.0, \"seconds\": {seconds}, \"spread\": 0.1}}]"
        )
    }

    fn imported(points: &[String]) -> Result<(tempfile::TempDir, Summary)> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.json");
        let measured = r#"{"date": "2026-01-01", "version": "0.1.0", "processor": "p", "threads": 2, "isa": "avx2", "model": "llama-3.1-8b"}"#;
        let text = format!(
            "{{\"measured\": {measured}, \"probes\": 1, \"points\": [{}]}}",
            points.join(", ")
        );
        std::fs::write(&file, text).unwrap();
        let args = BatchmaxProfileArgs { file, gpu: "cpu".to_owned() };
        let mut summary = Summary::default();
        import(&Catalog::built_in(), &args, &dir.path().join("out"), &mut summary)?;
        Ok((dir, summary))
    }

    #[test]
    fn timings_of_a_gpu_are_not_those_of_a_cpu() {
        let measured = |isa: &str, weights: &str| -> Provenance {
            serde_json::from_value(serde_json::json!({
                "date": "2026-01-01", "version": "0.1.0", "processor": "p", "threads": 1,
                "isa": isa, "model": "m", "weights": weights,
            }))
            .unwrap()
        };
        let card = measured("sm_90, driver 12040", "bf16");
        assert_eq!((kernel(&card).as_str(), computed(&card)), ("cuda-sm_90", "bf16"));
        assert_eq!(computed(&measured("sm_90, driver 12040", "f32")), "fp32");
        let cpu = measured("AVX2", "bf16");
        assert_eq!((kernel(&cpu).as_str(), computed(&cpu)), ("cpu-AVX2-1t", "fp32"));
    }

    #[test]
    fn families_with_a_table_become_points() {
        let (dir, summary) = imported(&[
            point("gemm", [6144, 4096, 32, 0, 0], [100.0, 0.0, 0.0], "0.002"),
            point("gemm", [6144, 4096, 32, 0, 0], [100.0, 0.0, 0.0], "0.004"),
            point("gemm", [6144, 4096, 16, 1, 0], [100.0, 0.0, 0.0], "0"),
            point("attend-prefill", [32, 8, 128, 16, 0], [512.0, 1024.0 + 32.0, 3.0], "0.5"),
            point("attend-decode", [32, 8, 128, 16, 0], [7.0, 1000.0, 0.0], "0.001"),
            point("norm", [0; 5], [4096.0 * 3.0, 0.0, 0.0], "0.00001"),
            point("rope", [1, 0, 0, 0, 0], [5120.0 * 3.0, 0.0, 0.0], "0.00001"),
            point("gated", [0; 5], [14336.0 * 5.0, 0.0, 0.0], "0.00001"),
            point("gated", [0; 5], [1000.0, 0.0, 0.0], "0.00001"),
            point("evict", [0; 5], [1000.0, 0.0, 0.0], "0.00001"),
        ])
        .unwrap();
        let text = |name: &str| std::fs::read_to_string(dir.path().join("out").join(name)).unwrap();
        assert!(
            text("gemm.csv")
                .ends_with("\ncpu,fp32,batchmax,0.1.0,cpu-avx2-2t,100,6144,4096,3000,batchmax\n")
        );
        assert!(
            text("attn_prefill.csv").ends_with(",fp32,fp16,3,512,1024,32,8,128,500000,batchmax\n")
        );
        assert!(text("attn_decode.csv").ends_with(",fp32,fp16,7,1000,32,8,128,1000,batchmax\n"));
        let memops = text("memops.csv");
        assert!(memops.ends_with(
            "\ncpu,rmsnorm,fp32,3,4096,10,batchmax\ncpu,rope,fp32,3,5120,10,batchmax\ncpu,silu_mul,fp32,5,28672,10,batchmax\n"
        ), "{memops}");
        let lines = summary.lines().join("\n");
        assert!(lines.contains("evict: no table for this family"), "{lines}");
        assert_eq!(summary.rows_left_out(), 3, "{lines}");
    }

    #[test]
    fn timings_with_a_swept_cache_are_kernels_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.json");
        let measured = r#"{"date": "2026-01-01", "version": "0.1.0", "processor": "p", "threads": 1, "isa": "sm_90, driver 12040", "model": "llama-3.1-8b", "weights": "bf16"}"#;
        let gemm = |seconds| point("gemm", [64, 32, 16, 0, 0], [8.0, 0.0, 0.0], seconds);
        let norm = point("norm", [0; 5], [4096.0, 0.0, 0.0], "0.00001");
        let (warm, cold) = (gemm("0.001"), gemm("0.002"));
        let text = format!(
            "{{\"measured\": {measured}, \"points\": [{warm}], \"cold\": [{cold}, {norm}]}}"
        );
        std::fs::write(&file, text).unwrap();
        let args = BatchmaxProfileArgs { file, gpu: "card".to_owned() };
        let mut summary = Summary::default();
        import(&Catalog::built_in(), &args, &dir.path().join("out"), &mut summary).unwrap();
        let rows = std::fs::read_to_string(dir.path().join("out").join("gemm.csv")).unwrap();
        assert!(rows.contains(",cuda-sm_90,8,64,32,1000,"), "{rows}");
        assert!(rows.contains(",cuda-sm_90-cold,8,64,32,2000,"), "{rows}");
        assert!(!dir.path().join("out").join("memops.csv").exists(), "no column tells them apart");
    }

    #[test]
    fn other_files_are_refused() {
        let error = imported(&["1".to_owned()]).unwrap_err().to_string();
        assert!(
            error.contains("not measurements of batchmax profile") && !error.contains('\n'),
            "{error}"
        );
        let (_, summary) = imported(&[point("norm", [0; 5], [1e300, 0.0, 0.0], "1.0")]).unwrap();
        assert_eq!((summary.files.len(), summary.rows_left_out()), (0, 1));
    }
}
