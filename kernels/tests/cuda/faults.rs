//! Mistakes that the shim has to find.

use super::gpu::{Arg, Gpu, available};

#[test]
fn mistakes_are_found() {
    if !available() {
        return;
    }
    for (kernel, why) in [
        ("fault_order", "depends on the order"),
        ("fault_divergence", "wait for each other's __syncthreads"),
        ("fault_deadlock", "deadlock"),
        ("fault_lanes", "deadlock"),
        ("fault_outside", "writes 4 bytes outside of any buffer"),
        ("fault_alignment", "writes 16 bytes not aligned"),
        ("fault_read_only", "writes 4 bytes not writable"),
        ("fault_shared", "outside of its 256 bytes of shared memory"),
    ] {
        let mut gpu = Gpu::default();
        let out = gpu.output(64 * 4);
        let mut arguments = vec![Arg::At(out)];
        if kernel == "fault_read_only" {
            arguments.push(Arg::At(gpu.input(&[0.0f32; 64])));
        }
        let found = gpu.try_launch(kernel, [1, 1, 1], 64, 256, &arguments);
        assert!(found.as_ref().is_err_and(|e| e.contains(why)), "{kernel}: {found:?}");
    }
}

#[test]
#[should_panic(expected = "argument 0 of softcap")]
fn arguments_of_another_size_are_refused() {
    assert!(available(), "argument 0 of softcap can't be tried without a compiler");
    Gpu::default().launch("softcap", [1, 1, 1], 32, 0, &[Arg::U32(1)]);
}
