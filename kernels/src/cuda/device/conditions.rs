//! At what clocks a device runs, and how warm it is, as NVIDIA's management library says that comes with the driver. Timings
//! of a card that throttles are those of another card; nothing else depends on it, so that a machine without the library has
//! no conditions, and no error.

use std::ffi::{CStr, OsStr, c_char};

use cudarc::driver::{result, sys};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};

use crate::cuda::Conditions;

/// Bytes of a bus address as text: domain, bus, device, function.
const ADDRESS: usize = 32;

/// The conditions of the device of an index, as far as they can be known.
#[must_use]
pub fn conditions(index: u32) -> Option<Conditions> {
    // SAFETY: opening the driver's library runs its initialisers, which is what it is there for.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    result::init().ok()?;
    let device = result::device::get(i32::try_from(index).ok()?).ok()?;
    let mut address = [0 as c_char; ADDRESS];
    // SAFETY: writes a text of at most so many bytes, its end included; the device is one of the driver's.
    unsafe { sys::cuDeviceGetPCIBusId(address.as_mut_ptr(), ADDRESS as i32, device) }
        .result()
        .ok()?;
    // SAFETY: the array was zero and the driver writes the end, too.
    let address = unsafe { CStr::from_ptr(address.as_ptr()) }.to_str().ok()?;
    // The name without a number belongs to development packages.
    let nvml = Nvml::builder().lib_path(OsStr::new("libnvidia-ml.so.1")).init();
    let nvml = nvml.or_else(|_| Nvml::init()).ok()?;
    // The two libraries count devices differently where CUDA_VISIBLE_DEVICES is set.
    let device = nvml.device_by_pci_bus_id(address).ok()?;
    Some(Conditions {
        driver: nvml.sys_driver_version().ok(),
        clock_mhz: device.clock_info(Clock::SM).ok(),
        memory_clock_mhz: device.clock_info(Clock::Memory).ok(),
        temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
    })
}
