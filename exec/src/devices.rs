//! The CUDA devices of this machine.

pub use batchmax_kernels::cuda::{Conditions, CudaError, DeviceInfo, DeviceMemory, Driver};

/// Whether this program can use CUDA devices at all: the feature `cuda`.
pub const WITH_CUDA: bool = cfg!(feature = "cuda");

/// All of them, however old they are.
///
/// # Errors
/// `Unavailable` with what is missing and what to do; what the driver said.
pub fn cuda() -> Result<Vec<DeviceInfo>, CudaError> {
    #[cfg(feature = "cuda")]
    {
        batchmax_kernels::cuda::device::devices()
    }
    #[cfg(not(feature = "cuda"))]
    {
        Err(CudaError::Unavailable {
            why: "built without CUDA; hint: cargo build --release --features cuda".into(),
        })
    }
}

/// At what the device of an index runs now, if that can be known.
#[must_use]
pub fn conditions(index: u32) -> Option<Conditions> {
    #[cfg(feature = "cuda")]
    {
        batchmax_kernels::cuda::device::conditions(index)
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = index;
        None
    }
}

/// Opens one of them, or several that share layers.
///
/// # Errors
/// As [`cuda`]; `NoDevice` where there is none of an index; `Unavailable` where several can't work together.
pub fn open(indices: &[u32]) -> Result<Vec<Box<dyn Driver>>, CudaError> {
    #[cfg(feature = "cuda")]
    {
        use batchmax_kernels::cuda::device::Device;
        if let [index] = indices {
            return Ok(vec![Box::new(Device::open(*index)?)]);
        }
        let boxed = |device| Box::new(device) as Box<dyn Driver>;
        Ok(Device::open_together(indices)?.into_iter().map(boxed).collect())
    }
    #[cfg(not(feature = "cuda"))]
    {
        let index = indices.first().copied().unwrap_or(0);
        Err(cuda().err().unwrap_or(CudaError::NoDevice { index, count: 0 }))
    }
}
