//! The pretended device, held to what the trait says of a driver.

use batchmax_kernels::cuda::emulated::{Emulated, Settings};
use batchmax_kernels::cuda::{Address, Arg, CudaError, Driver, Element, Launch, Product, Stream};

use super::gpu::{available, bytes_of};

const FIRST: Stream = Stream(0);

fn device(settings: Settings) -> Option<Emulated> {
    available().then(|| Emulated::new(settings).expect("there is a compiler"))
}

fn put(gpu: &mut Emulated, numbers: &[f32]) -> Address {
    let at = gpu.alloc(size_of_val(numbers) as u64).expect("memory");
    gpu.upload(FIRST, at, &bytes_of(numbers)).expect("uploaded");
    at
}

fn get(gpu: &mut Emulated, at: Address, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; 4 * count];
    gpu.download(FIRST, at, &mut bytes).expect("downloaded");
    bytes.chunks(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// `cap * tanh(x / cap)` of numbers in single precision.
fn softcap(at: Address, count: u64, cap: f32) -> Launch {
    Launch {
        kernel: "softcap",
        grid: [1, 1, 1],
        block: 256,
        shared: 0,
        args: vec![Arg::At(at), Arg::U32(0), Arg::U64(count), Arg::F32(cap)],
    }
}

fn why<T>(result: Result<T, CudaError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn kernels_read_what_was_uploaded() {
    let Some(mut gpu) = device(Settings::default()) else { return };
    let numbers: Vec<f32> = (0..100).map(|i| i as f32 - 50.0).collect();
    let at = put(&mut gpu, &numbers);
    gpu.launch(FIRST, &softcap(at, 100, 10.0)).expect("launched");
    for (x, found) in numbers.iter().zip(get(&mut gpu, at, 100)) {
        assert!((found - 10.0 * (x / 10.0).tanh()).abs() < 1e-5, "{x}: {found}");
    }
    assert_eq!(gpu.ledger().live().launches, 1);
    assert_eq!(gpu.ledger().live().moved.bytes(), 800.0);
}

#[test]
fn memory_is_limited_counted_and_guarded() {
    let Some(mut gpu) = device(Settings { memory: 1000, ..Settings::default() }) else { return };
    let ledger = gpu.ledger();
    let first = gpu.alloc(600).expect("memory");
    assert_eq!(first.0 % 256, 0);
    let free = gpu.memory().expect("memory").free;
    assert_eq!(free, 400);
    assert_eq!(gpu.alloc(401), Err(CudaError::OutOfMemory { wanted: 401, free }));
    let second = gpu.alloc(400).expect("memory");
    let mut fresh = [0; 400];
    gpu.download(FIRST, second, &mut fresh).expect("downloaded");
    assert_eq!(fresh, [0xff; 400], "fresh memory is poison");
    gpu.free(first).expect("freed");
    assert!(why(gpu.free(first)).contains("nothing was taken"));
    assert_eq!(gpu.leaks(), [(second, 400)]);
    assert!(why(gpu.upload(FIRST, second, &[0; 401])).contains("not inside"));
    assert!(why(gpu.fill(FIRST, second.plus(1), 0, 400)).contains("not inside"));
    assert!(why(gpu.copy(FIRST, second, second.plus(100), 101)).contains("overlap"));
    drop(gpu);
    let live = ledger.live();
    assert_eq!((live.leaked, live.peak, live.allocations), (vec![400], 1000, 1));
}

#[test]
fn what_a_device_refuses_is_refused() {
    let Some(mut gpu) = device(Settings::default()) else { return };
    let at = put(&mut gpu, &[1.0; 64]);
    let good = softcap(at, 64, 1.0);
    let refused = |gpu: &mut Emulated, launch: Launch| why(gpu.launch(FIRST, &launch));
    assert!(refused(&mut gpu, Launch { kernel: "softcup", ..good.clone() }).contains("no kernel"));
    assert!(refused(&mut gpu, Launch { grid: [0, 1, 1], ..good.clone() }).contains("0 x 1 x 1"));
    assert!(refused(&mut gpu, Launch { shared: 164 << 10, ..good.clone() }).contains("166912"));
    assert!(refused(&mut gpu, Launch { block: 2048, ..good.clone() }).contains("2048 threads"));
    let short = Launch { args: good.args[..3].to_vec(), ..good.clone() };
    assert!(refused(&mut gpu, short).contains("argument 3 of softcap has 0 bytes, it takes 4"));
    assert!(gpu.alloc(0).is_err());
    gpu.launch(FIRST, &good).expect("nothing of this breaks the device");
    // What a kernel does wrong does.
    let fault = refused(&mut gpu, softcap(at, 65, 1.0));
    assert!(fault.contains("outside of any buffer"), "{fault}");
    assert_eq!(why(gpu.synchronize(FIRST)), fault);
    assert_eq!(why(gpu.free(at)), fault);
    assert_eq!(gpu.ledger().live().allocations, 0, "memory goes even so");
}

#[test]
fn recordings_are_played_again_with_what_is_there_then() {
    let Some(mut gpu) = device(Settings::default()) else { return };
    let (a, b) = (put(&mut gpu, &[1.0; 8]), put(&mut gpu, &[0.0; 8]));
    gpu.begin_capture(FIRST).expect("begun");
    gpu.copy(FIRST, a, b, 32).expect("recorded");
    gpu.launch(FIRST, &softcap(b, 8, 1.0)).expect("recorded");
    gpu.fill(FIRST, a, 0, 4).expect("recorded");
    assert!(why(gpu.upload(FIRST, a, &[0])).contains("while work is recorded"));
    assert!(gpu.alloc(1).is_err() && gpu.synchronize(FIRST).is_err());
    let graph = gpu.end_capture(FIRST).expect("ended");
    assert_eq!(get(&mut gpu, b, 8), [0.0; 8], "recorded work is not done");
    gpu.launch_graph(FIRST, graph).expect("played");
    assert_eq!(get(&mut gpu, b, 8), [1f32.tanh(); 8]);
    assert_eq!(get(&mut gpu, a, 2), [0.0, 1.0]);
    gpu.upload(FIRST, a, &bytes_of(&[2.0f32; 8])).expect("uploaded");
    gpu.launch_graph(FIRST, graph).expect("played");
    assert_eq!(get(&mut gpu, b, 8), [2f32.tanh(); 8]);
    assert_eq!(gpu.ledger().live().graphs, 1);
    gpu.free_graph(graph).expect("freed");
    assert_eq!(gpu.ledger().live().graphs, 0);
    assert!(gpu.launch_graph(FIRST, graph).is_err());
}

#[test]
fn a_recording_spans_streams_that_wait_for_each_other() {
    let Some(mut gpu) = device(Settings::default()) else { return };
    let (a, b) = (put(&mut gpu, &[1.0; 8]), put(&mut gpu, &[0.0; 8]));
    let side = gpu.stream().expect("a stream");
    let (fork, back) = (gpu.event().expect("an event"), gpu.event().expect("an event"));
    for rejoins in [false, true] {
        gpu.begin_capture(FIRST).expect("begun");
        gpu.record(FIRST, fork).expect("marked");
        gpu.wait(side, fork).expect("waits");
        gpu.copy(side, a, b, 32).expect("recorded");
        gpu.record(side, back).expect("marked");
        if rejoins {
            gpu.wait(FIRST, back).expect("waits");
        }
        let graph = gpu.end_capture(FIRST);
        assert_eq!(graph.is_ok(), rejoins, "{graph:?}");
        if let Ok(graph) = graph {
            assert_eq!(get(&mut gpu, b, 8), [0.0; 8]);
            gpu.launch_graph(FIRST, graph).expect("played");
            assert_eq!(get(&mut gpu, b, 8), [1.0; 8]);
        }
    }
    assert!(why(gpu.wait(FIRST, back)).contains("recording that has ended"));
    assert!(gpu.elapsed(fork, back).is_err());
}

#[test]
fn a_late_device_shows_missing_waits() {
    for waits in [false, true] {
        let Some(mut gpu) = device(Settings { late: true, ..Settings::default() }) else { return };
        let (a, b) = (put(&mut gpu, &[1.0; 8]), put(&mut gpu, &[0.0; 8]));
        gpu.synchronize(FIRST).expect("done");
        let (side, ready) = (gpu.stream().expect("a stream"), gpu.event().expect("an event"));
        gpu.copy(side, a, b, 32).expect("queued");
        gpu.record(side, ready).expect("marked");
        if waits {
            gpu.wait(FIRST, ready).expect("waits");
        }
        assert_eq!(get(&mut gpu, b, 8), [if waits { 1.0 } else { 0.0 }; 8]);
    }
}

#[test]
fn pinned_memory_holds_what_was_copied_out() {
    let Some(mut gpu) = device(Settings::default()) else { return };
    let (a, b) = (put(&mut gpu, &[1.0, 2.0, 3.0, 4.0]), put(&mut gpu, &[0.0; 4]));
    let host = gpu.alloc_pinned(32).expect("memory");
    gpu.copy_out(FIRST, a, host, 16, 16).expect("copied");
    gpu.copy_in(FIRST, host, 20, b, 8).expect("copied");
    assert_eq!(get(&mut gpu, b, 4), [2.0, 3.0, 0.0, 0.0]);
    gpu.free_pinned(host).expect("freed");
    assert!(gpu.free_pinned(host).is_err());
    assert_eq!(gpu.ledger().live().pinned, 0);
}

#[test]
fn marks_tell_the_time_between_them() {
    let Some(mut gpu) = device(Settings { late: true, ..Settings::default() }) else { return };
    let (from, to) = (gpu.event().expect("an event"), gpu.event().expect("an event"));
    assert!(gpu.elapsed(from, to).is_err(), "nobody has marked anything");
    gpu.record(FIRST, from).expect("marked");
    let at = put(&mut gpu, &[1.0; 4096]);
    gpu.launch(FIRST, &softcap(at, 4096, 1.0)).expect("launched");
    gpu.record(FIRST, to).expect("marked");
    let seconds = gpu.elapsed(from, to).expect("a time");
    assert!(seconds > 0.0 && gpu.elapsed(to, from).expect("a time") == -seconds);
}

#[test]
fn products_add_bias_and_what_was_there() {
    let Some(mut gpu) = device(Settings { capability: (8, 9), ..Settings::default() }) else {
        return;
    };
    let (m, n, k) = (3u32, 16u32, 32u32);
    let number = |i: u32, seed: u32| ((i * 7 + seed) % 9) as f32 - 4.0;
    let x: Vec<f32> = (0..m * 48).map(|i| number(i, 1)).collect();
    let w: Vec<f32> = (0..n * k).map(|i| number(i, 5)).collect();
    let bias: Vec<f32> = (0..n).map(|i| number(i, 3)).collect();
    // Small whole numbers, which all types hold and all sums meet.
    let wanted = |row: u32, column: u32| {
        let product = (0..k).map(|i| x[(row * 48 + i) as usize] * w[(column * k + i) as usize]);
        0.5 * product.sum::<f32>() + bias[column as usize]
    };
    for element in [Element::F32, Element::F16, Element::Bf16, Element::Fp8] {
        let encode = |numbers: &[f32]| -> Vec<u8> {
            let fp8 = |x: &f32| {
                let size = x.abs();
                let bits = if size == 0.0 { 0 } else { (size.to_bits() >> 20) - (120 << 3) };
                (x.to_bits() >> 24) as u8 & 0x80 | bits as u8
            };
            match element {
                Element::F32 => bytes_of(numbers),
                Element::F16 => {
                    numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_ne_bytes()).collect()
                }
                Element::Bf16 => {
                    numbers.iter().flat_map(|x| half::bf16::from_f32(*x).to_ne_bytes()).collect()
                }
                Element::Fp8 => numbers.iter().map(fp8).collect(),
            }
        };
        let mut put_as = |bytes: Vec<u8>| {
            let at = gpu.alloc(bytes.len() as u64).expect("memory");
            gpu.upload(FIRST, at, &bytes).expect("uploaded");
            at
        };
        let (x_at, w_at) = (put_as(encode(&x)), put_as(encode(&w)));
        let bias_at = put_as(bytes_of(&bias));
        let y = gpu.alloc(u64::from(m * 32 * 4)).expect("memory");
        let product = Product {
            m,
            n,
            k,
            x: x_at,
            x_stride: 48,
            w: w_at,
            element,
            scale: 0.5,
            bias: bias_at,
            y,
            y_stride: 32,
            out: Element::F32,
            accumulate: false,
        };
        gpu.multiply(FIRST, &product).expect("multiplied");
        gpu.multiply(FIRST, &Product { accumulate: true, ..product }).expect("multiplied");
        let found = get(&mut gpu, y, (m * 32) as usize);
        for row in 0..m {
            for column in 0..n {
                let cell = found[(row * 32 + column) as usize];
                assert_eq!(cell, 2.0 * wanted(row, column), "{element:?} at {row}, {column}");
            }
            assert!(found[(row * 32 + n) as usize].is_nan(), "nothing between the rows is written");
        }
    }
    let at = put(&mut gpu, &[0.0; 64]);
    let fp8 = Product {
        m: 1,
        n: 8,
        k: 16,
        x: at,
        x_stride: 16,
        w: at,
        element: Element::Fp8,
        scale: 1.0,
        bias: Address(0),
        y: at,
        y_stride: 16,
        out: Element::F32,
        accumulate: false,
    };
    assert!(why(gpu.multiply(FIRST, &fp8)).contains("multiples of 16"));
}

#[test]
fn devices_add_up() {
    if !available() {
        return;
    }
    let devices = Emulated::together(Settings::default(), 3).expect("there is a compiler");
    // 1 + 2 + 4, and in brain floats 256 + 1 + 1 is 258, which has eight bits.
    let added = std::thread::scope(|scope| {
        let run = |mut gpu: Emulated| {
            let (rank, of) = gpu.rank();
            assert_eq!(of, 3);
            let at = put(&mut gpu, &[(1 << rank) as f32, 0.5]);
            gpu.all_reduce(FIRST, at, 2, Element::F32).expect("a sum");
            let sums = get(&mut gpu, at, 2);
            let bits: u16 = if rank == 0 { 0x4380 } else { 0x3f80 };
            gpu.upload(FIRST, at, &bits.to_ne_bytes()).expect("uploaded");
            gpu.all_reduce(FIRST, at, 1, Element::Bf16).expect("a sum");
            let mut bytes = [0; 2];
            gpu.download(FIRST, at, &mut bytes).expect("downloaded");
            gpu.begin_capture(FIRST).expect("a recording");
            let recorded = why(gpu.all_reduce(FIRST, at, 1, Element::F32));
            assert!(recorded.contains("recorded"), "{recorded}");
            gpu.end_capture(FIRST).expect("its end");
            (sums, u16::from_ne_bytes(bytes), gpu)
        };
        let threads: Vec<_> =
            devices.into_iter().map(|gpu| scope.spawn(move || run(gpu))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect::<Vec<_>>()
    });
    let mut gpus = Vec::new();
    for (sums, brain, gpu) in added {
        assert_eq!((&sums[..], brain), (&[7.0, 1.5][..], 0x4381));
        gpus.push(gpu);
    }
    // Who leaves holds up none.
    gpus.pop().expect("three").leave();
    let at = put(&mut gpus[0], &[1.0]);
    let left = why(gpus[0].all_reduce(FIRST, at, 1, Element::F32));
    assert!(left.contains("another device left"), "{left}");
    assert_eq!(why(gpus[0].memory()), left, "as on a device, a fault stays");
}
