use std::io::Cursor;

use super::*;
use crate::profile::Catalog;
use crate::timeline::Source;

fn hardware() -> Hardware {
    // 1 GFLOP/us (1 PFLOP/s), 1 MB/us (1 TB/s), a cache of 1 MB.
    Hardware { flops: 1e9, bandwidth: 1e6, l2: 1e6, load: 1e6, processors: 100.0, link: 1e5 }
}

fn bf16() -> NumberType {
    NumberType::parse("bf16").expect("a type")
}

fn gemm(n: f64, k: f64, m: f64) -> Shape {
    Shape { kernel: Kernel::Gemm, key: [n, k, 0.0], at: [m, 0.0, 0.0, 0.0] }
}

#[test]
fn work_of_a_product_by_hand() {
    // 2 x 3 x 5 x 7 FLOPs; 2 bytes each of 5 x 7 weights, 3 x 7 inputs, 3 x 5 outputs.
    assert_eq!(gemm(5.0, 7.0, 3.0).work(bf16()), (210.0, 70.0 + 42.0 + 30.0));
    let fp8 = NumberType::parse("fp8").expect("a type");
    assert_eq!(gemm(5.0, 7.0, 3.0).work(fp8).1, 35.0 + 42.0 + 30.0);
}

#[test]
fn work_of_attention_by_hand() {
    let key = [4.0, 2.0, 8.0];
    // Two sequences, one token each over 9 cached ones and itself: 4 x 4 heads x 8 channels x 10 keys x 2.
    let decode = Shape { kernel: Kernel::AttnDecode, key, at: [2.0, 10.0, 0.0, 0.0] };
    let (flops, bytes) = decode.work(bf16());
    assert_eq!(flops, 4.0 * 4.0 * 8.0 * 10.0 * 2.0);
    // K and V of 2 heads x 8 channels x 10 tokens x 2 sequences, queries and outputs of 4 heads, 2 bytes each.
    assert_eq!(bytes, 2.0 * 2.0 * 8.0 * 10.0 * 2.0 * 2.0 + 2.0 * 2.0 * 4.0 * 8.0 * 2.0);
    // Three tokens over nothing see 1 + 2 + 3 keys.
    let prefill = Shape { kernel: Kernel::AttnPrefill, key, at: [1.0, 3.0, 0.0, 0.0] };
    assert_eq!(prefill.work(bf16()).0, 4.0 * 4.0 * 8.0 * 6.0);
    // A mixed launch does the work of both.
    let mixed = Shape { kernel: Kernel::AttnMixed, key, at: [3.0, 0.0, 2.0, 10.0] };
    assert_eq!(mixed.work(bf16()).0, decode.work(bf16()).0 + prefill.work(bf16()).0);
}

#[test]
fn the_core_is_the_longer_side_when_sharp() {
    let core = Core { launch_us: 1.0, compute: 0.5, bandwidth: 0.5, cache: 1.0, sharpness: 50.0 };
    // m = 128, n = 12,800 (100 tiles, one wave), k = 1,000: 3.2768 GFLOP at half of 1 GFLOP/us.
    let t = gemm(12_800.0, 1_000.0, 128.0).microseconds(&core, &hardware(), bf16());
    let bytes = 2.0 * (12.8e6 + 128e3 + 128.0 * 12_800.0);
    let memory = bytes / 0.5e6;
    assert!(memory > 6.6);
    assert!((t - 1.0 - memory).abs() / memory < 0.01, "{t} against {memory}");
}

/// Timings that follow the core exactly, but for a factor per key.
fn samples(factor: impl Fn(u32) -> f64) -> (SurfaceId, Vec<Sample>) {
    let id = SurfaceId {
        gpu: "h100-sxm".to_owned(),
        framework: "vllm".to_owned(),
        kernel: Kernel::Gemm,
        dtype: "bf16".to_owned(),
        variant: String::new(),
    };
    let core = Core { launch_us: 3.0, compute: 0.7, bandwidth: 0.8, cache: 0.9, sharpness: 3.0 };
    let mut all = Vec::new();
    for n in [512u32, 1024, 2048, 4096, 8192] {
        for k in [1024u32, 4096] {
            for m in [1u64, 16, 128, 1024, 8192] {
                let shape = gemm(f64::from(n), f64::from(k), m as f64);
                let seconds = shape.seconds(&core, &hardware(), bf16()) * factor(n);
                let sample = Sample {
                    id: id.clone(),
                    key: [n, k, 0],
                    at: [m, 0, 0, 0],
                    seconds,
                    source: "test".to_owned(),
                };
                all.push(sample);
            }
        }
    }
    (id, all)
}

fn fitted(factor: impl Fn(u32) -> f64) -> Surface {
    let (id, samples) = samples(factor);
    fit(&id, &samples, &hardware(), bf16(), Origin::default()).expect("there are points")
}

#[test]
fn a_fit_gives_back_what_it_was_given() {
    let surface = fitted(|n| 1.0 + 0.1 * f64::from(n).log2().sin());
    assert_eq!(surface.points(), 50);
    let prepared = curve::Prepared::new(&surface);
    let (_, all) = samples(|n| 1.0 + 0.1 * f64::from(n).log2().sin());
    for sample in &all {
        let key = sample.key.map(f64::from);
        let of_key = prepared.curve(Kernel::Gemm, &key, None);
        let shape = Shape { kernel: Kernel::Gemm, key, at: sample.at.map(|v| v as f64) };
        let estimate = surface.estimate(&prepared, &of_key, &shape, &hardware(), bf16());
        assert_eq!(estimate.source, Source::Measured);
        // Residuals are stored in steps of half a percent.
        assert!((estimate.seconds / sample.seconds - 1.0).abs() < 0.0026);
    }
}

#[test]
fn outside_the_hull_the_interval_widens_and_the_source_says_so() {
    let surface = fitted(|n| if n > 2000 { 1.2 } else { 0.9 });
    let prepared = curve::Prepared::new(&surface);
    let at = |n: f64, m: f64| {
        let of_key = prepared.curve(Kernel::Gemm, &[n, 4096.0, 0.0], None);
        surface.estimate(&prepared, &of_key, &gemm(n, 4096.0, m), &hardware(), bf16())
    };
    let (inside, past, far) = (at(2048.0, 64.0), at(2048.0, 65_536.0), at(2048.0, 1e9));
    assert_eq!(inside.source, Source::Interpolated);
    assert_eq!(past.source, Source::Extrapolated);
    assert!(inside.log_stddev < past.log_stddev && past.log_stddev < far.log_stddev);
    assert_eq!(at(1e8, 64.0).source, Source::Extrapolated);
    assert!(at(1e8, 64.0).log_stddev > inside.log_stddev);
}

#[test]
fn a_surface_survives_its_text() {
    let surface = fitted(|_| 1.0);
    let text = to_text(std::slice::from_ref(&surface));
    let back = from_text("x.toml", &text).expect("own text");
    assert_eq!(back.len(), 1);
    assert_eq!(back[0].keys, surface.keys);
    assert_eq!(back[0].axes, surface.axes);
    assert_eq!(back[0].residuals, surface.residuals);
    assert!((back[0].core.compute - surface.core.compute).abs() < 1e-4);
    // Writing what was read changes nothing: the shipped files stay as they are.
    assert_eq!(to_text(&back), text);
}

#[test]
fn broken_surfaces_are_refused_with_a_reason() {
    let text = to_text(&[fitted(|_| 1.0)]);
    let cases = [
        ("dtype = \"bf16\"", "dtype = \"bf61\"", "is not a type"),
        ("launch_us = ", "launch_us = -", "must be positive"),
        ("512 1024: ", "512: ", "expected 2 key parts, got 1"),
        ("512 1024: ", "512 x: ", "\"x\" is not a size"),
        ("512 1024: ", "512 1024: 7 ", "expected 5 residuals, got 6"),
        ("[[1, 16", "[[16, 1", "must ascend"),
        ("nugget = ", "nugget = -", "must be positive"),
        ("512 1024: ", "99999 1024: ", "keys must ascend"),
    ];
    for (from, to, expected) in cases {
        assert!(text.contains(from), "{from}");
        let error = from_text("x.toml", &text.replacen(from, to, 1)).expect_err(to).to_string();
        assert!(error.contains(expected), "{to}: {error}");
        assert!(error.starts_with("x.toml") && !error.contains('\n'), "{error}");
    }
}

fn read(text: &str) -> Result<(Vec<Sample>, Vec<PointError>), PointError> {
    read_points("p.csv", Cursor::new(text.to_owned()), &Catalog::built_in())
}

const HEAD: &str = "gpu,dtype,framework,version,kernel,m,n,k,latency_us,source\n";

#[test]
fn rows_that_can_be_no_timing_are_listed() {
    let rows = [
        ("h100_sxm,bf16,vllm,1,x,16,4096,4096,20.5,aic", ""),
        ("h100_sxm,bf16,vllm,1,x,16,4096,4096,20.5,aic", "was there before"),
        ("h100_sxm,bf16,vllm,1,x,17,4096,4096,0,aic", "not a positive time"),
        ("h100_sxm,bf16,vllm,1,x,17,4096,4096,-3,aic", "not a positive time"),
        ("h100_sxm,bf16,vllm,1,x,17,4096,4096,NaN,aic", "not a positive time"),
        ("h100_sxm,bf16,vllm,1,x,17,4096,4096,1e12,aic", "is the unit microseconds?"),
        ("h100_sxm,bf16,vllm,1,x,8192,8192,8192,0.5,aic", "faster than the hardware"),
        ("h100_sxm,bf16,vllm,1,x,9223372036854775808,8,8,5,aic", "is not between 1 and 2^42"),
        ("h100_sxm,bf16,vllm,1,x,0,8,8,5,aic", "is not between 1 and 2^42"),
        ("h100_sxm,bf17,vllm,1,x,1,8,8,5,aic", "dtype: \"bf17\" is unknown"),
        ("h999,bf16,vllm,1,x,1,8,8,5,aic", "no gpu \"h999\""),
        ("h100_sxm,bf16,vllm,1,x,eight,8,8,5,aic", "\"eight\" is not a size"),
    ];
    let text: String = HEAD.to_owned() + &rows.map(|(row, _)| format!("{row}\n")).concat();
    let (samples, refused) = read(&text).expect("the header is right");
    assert_eq!(samples.len(), 1);
    assert_eq!(samples[0].key, [4096, 4096, 0]);
    assert_eq!(refused.len(), rows.len() - 1);
    for ((row, expected), error) in rows[1..].iter().zip(&refused) {
        assert!(error.problem.contains(expected), "{row}: {error}");
    }
    assert_eq!(refused[0].line, 3);
}

#[test]
fn files_that_hold_no_timings_are_errors() {
    for (text, expected) in [
        ("", "the file is empty"),
        (HEAD, "no timing below the header"),
        ("a,b\n1,2\n", "not a layout of kernel timings"),
        ("gpu,dtype,m,n,latency_us\nh100,bf16,1,8,2\n", "column \"k\" is missing"),
        ("gpu,dtype,m,n,k\nh100,bf16,1,8,2\n", "column \"latency_us\" is missing"),
        ("gpu,experts\nh100,8\n", "mixture-of-experts"),
    ] {
        let error = read(text).expect_err(expected).to_string();
        assert!(error.starts_with("p.csv:") && error.contains(expected), "{error}");
    }
}

#[test]
fn the_library_falls_back_from_own_to_other_framework_to_other_device() {
    let library = Library::new(Catalog::built_in(), Vec::new());
    let id = |gpu: &str, framework: &str, dtype: &str| SurfaceId {
        gpu: gpu.to_owned(),
        framework: framework.to_owned(),
        kernel: Kernel::Gemm,
        dtype: dtype.to_owned(),
        variant: String::new(),
    };
    let shape = gemm(4096.0, 4096.0, 256.0);
    let time = |gpu: &str, framework: &str| {
        let model = library.model(&id(gpu, framework, "bf16")).expect("something is known");
        (model.estimate(&shape), model)
    };
    let (own, model) = time("h100-sxm", "vllm");
    assert!(model.is_own() && own.source != Source::Extrapolated);
    let (other, model) = time("h100-sxm", "nobody");
    assert!(!model.is_own() && other.source == Source::Extrapolated);
    assert!(other.log_stddev > own.log_stddev);
    // A device known by its data sheet alone: between what slower and faster devices take, with a wide interval.
    let (unseen, _) = time("a40", "vllm");
    assert_eq!(unseen.source, Source::Extrapolated);
    assert!(unseen.seconds > own.seconds && unseen.seconds < 20.0 * own.seconds);
    assert!(unseen.log_stddev > other.log_stddev);
}

#[test]
fn nothing_is_faster_than_the_hardware() {
    let library = Library::new(Catalog::built_in(), Vec::new());
    for id in library.ids().into_iter().filter(|i| i.kernel == Kernel::Gemm) {
        let gpu = library.gpu(&id.gpu).expect("shipped surfaces are of shipped devices");
        let number = NumberType::parse(&id.dtype).expect("a type");
        let hardware = Hardware::of(&gpu, number);
        let model = library.model(&id).expect("shipped");
        for (n, k) in [(256.0, 256.0), (4096.0, 4096.0), (6144.0, 5000.0), (28_672.0, 8192.0)] {
            for m in [1.0, 24.0, 300.0, 5000.0, 60_000.0] {
                let shape = gemm(n, k, m);
                let (flops, bytes) = shape.work(number);
                let weights = number.weight_bytes * n * k;
                // Footprints beyond the cache come from memory; what fits may be read from the cache.
                let read = if bytes > 4.0 * hardware.l2 { weights } else { 0.0 };
                let floor = (flops / hardware.flops).max(read / hardware.bandwidth) * 1e-6;
                let t = model.estimate(&shape).seconds;
                assert!(t > 0.85 * floor, "{id} {n}x{k} m {m}: {t} under {floor}");
            }
        }
    }
}
