//! What CUDA a machine has.

use cudarc::driver::{result, sys};
use sys::CUdevice_attribute as Attribute;

use super::said;
use crate::cuda::{CudaError, DeviceInfo};

/// The oldest CUDA whose drivers read PTX 7.8.
const OLDEST: u32 = 11_080;

fn unavailable(why: impl Into<String>) -> CudaError {
    CudaError::Unavailable { why: why.into() }
}

/// Finds a driver that is new enough; says which CUDA it serves.
///
/// # Errors
/// `Unavailable`.
pub(super) fn driver() -> Result<u32, CudaError> {
    // SAFETY: opening the driver's library runs its initialisers, which is what it is there for.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable(
            "there is no CUDA driver here (libcuda was not found); hint: install NVIDIA's driver, 520 or newer",
        ));
    }
    let mut version = 0;
    // SAFETY: writes a number; the library is there.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|e| said("asking the driver's version", e))?;
    let version = u32::try_from(version).unwrap_or(0);
    let name = |v: u32| format!("{}.{}", v / 1000, v % 1000 / 10);
    if version < OLDEST {
        return Err(unavailable(format!(
            "the CUDA driver serves CUDA {}, {} is needed; hint: update NVIDIA's driver to 520 or newer",
            name(version),
            name(OLDEST)
        )));
    }
    result::init().map_err(|e| match e.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            unavailable("the CUDA driver finds no device; hint: nvidia-smi should list one")
        }
        _ => unavailable(format!("the CUDA driver does not start: {}", super::text(e))),
    })?;
    Ok(version)
}

/// The library of matrix products.
///
/// # Errors
/// `Unavailable`.
pub(super) fn products() -> Result<(), CudaError> {
    // SAFETY: opening the library runs its initialisers, which is what it is there for.
    if unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Ok(());
    }
    Err(unavailable(
        "libcublasLt was not found; hint: install CUDA's runtime libraries (cuBLAS) of 11.8 or newer, or put their folder into LD_LIBRARY_PATH",
    ))
}

fn describe(index: u32, driver: u32) -> Result<(sys::CUdevice, DeviceInfo), CudaError> {
    let asking = |e| said(format!("asking about device {index}"), e);
    let device = result::device::get(index as i32).map_err(asking)?;
    let number = |attribute| {
        // SAFETY: the device was found just now.
        let number = unsafe { result::device::get_attribute(device, attribute) };
        number.map(|x| u32::try_from(x).unwrap_or(0)).map_err(asking)
    };
    let info = DeviceInfo {
        name: result::device::get_name(device).map_err(asking)?,
        index,
        capability: (
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: the same.
        memory: unsafe { result::device::total_mem(device) }.map_err(asking)? as u64,
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2: u64::from(number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        driver,
    };
    Ok((device, info))
}

fn count() -> Result<u32, CudaError> {
    let count = result::device::get_count().map_err(|e| said("counting devices", e))?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// The CUDA devices of this machine, however old they are.
///
/// # Errors
/// `Unavailable` with why there can be none; what the driver said.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    let driver = driver()?;
    (0..count()?).map(|index| describe(index, driver).map(|(_, info)| info)).collect()
}

/// One of them, if the kernels can run on it.
pub(super) fn device(index: u32) -> Result<(sys::CUdevice, DeviceInfo), CudaError> {
    let driver = driver()?;
    products()?;
    let count = count()?;
    if index >= count {
        return Err(CudaError::NoDevice { index, count });
    }
    let (device, info) = describe(index, driver)?;
    let (major, minor) = info.capability;
    if !info.runs_kernels() {
        return Err(unavailable(format!(
            "cuda:{index} ({}) has compute capability {major}.{minor}, 8.0 is needed",
            info.name
        )));
    }
    Ok((device, info))
}

/// Bytes of shared memory that a block of a device may have.
pub(super) fn shared_limit(device: sys::CUdevice) -> Result<u32, CudaError> {
    let attribute = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    // SAFETY: the caller found the device.
    let bytes = unsafe { result::device::get_attribute(device, attribute) };
    Ok(u32::try_from(bytes.map_err(|e| said("asking about shared memory", e))?).unwrap_or(0))
}
