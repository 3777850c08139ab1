//! What a device can do at most, by its data sheet or by measurement of the machine at hand.

use serde::{Deserialize, Serialize};

use super::ProfileError;
use crate::op::DType;
use crate::units::Bytes;

/// Dense peaks in FLOP/s (integer types: operations/s) by the type that is multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peaks {
    /// 32-bit floats outside tensor cores.
    #[serde(default)]
    pub f32: Option<f64>,
    /// binary16.
    #[serde(default)]
    pub f16: Option<f64>,
    /// bfloat16.
    #[serde(default)]
    pub bf16: Option<f64>,
    /// 8-bit floats.
    #[serde(default)]
    pub fp8: Option<f64>,
    /// 8-bit integers.
    #[serde(default)]
    pub int8: Option<f64>,
    /// 4-bit floats.
    #[serde(default)]
    pub fp4: Option<f64>,
}

impl Peaks {
    /// The peak at which products of this type can run: the type's own, else that of the type it is widened to.
    #[must_use]
    pub fn of(&self, dtype: DType) -> Option<f64> {
        let half = self.bf16.or(self.f16);
        match dtype {
            DType::F32 => self.f32.or(half),
            DType::F16 => self.f16.or(self.bf16),
            DType::Bf16 => half.or(self.f32),
            DType::Fp8 => self.fp8.or(half),
            DType::Int8 => self.int8.or(half),
            DType::Int4 | DType::Int2 | DType::Q8 | DType::Q4 => half.or(self.f32),
        }
    }
}

/// A device: a GPU from its data sheet, or this machine's CPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Kebab-case name, unique among the profiles.
    pub name: String,
    /// The name people read.
    #[serde(default)]
    pub label: String,
    /// Other names people type.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Architecture and compute capability.
    #[serde(default)]
    pub arch: String,
    /// Memory, bytes.
    pub memory_bytes: Bytes,
    /// Memory bandwidth, bytes/s.
    pub bandwidth_bytes_per_s: f64,
    /// Dense peaks, FLOP/s.
    pub peak_flops_per_s: Peaks,
    /// Streaming multiprocessors (a CPU: cores).
    pub processors: u32,
    /// Last-level cache, bytes.
    #[serde(default)]
    pub l2_bytes: Option<Bytes>,
    /// Boost clock, Hz.
    #[serde(default)]
    pub clock_hz: Option<f64>,
    /// Board power, W.
    #[serde(default)]
    pub power_w: Option<f64>,
    /// Link between the devices of a node.
    #[serde(default)]
    pub link: Option<String>,
    /// Bandwidth of that link, both directions, bytes/s.
    #[serde(default)]
    pub link_bytes_per_s: Option<f64>,
    /// Host bus.
    #[serde(default)]
    pub host_link: Option<String>,
    /// Rough rental price, USD per hour; for demonstrations.
    #[serde(default)]
    pub usd_per_hour: Option<f64>,
    /// Where the figures come from.
    pub source: String,
    /// Keys whose figure was not checked against a data sheet.
    #[serde(default)]
    pub unsure: Vec<String>,
}

impl Gpu {
    /// Bytes per second between the device and the host, one way: four fifths of what the link carries, as copies of
    /// pinned memory reach; 16 lanes of the fourth generation where the link is not known.
    #[must_use]
    pub fn host_bytes_per_s(&self) -> f64 {
        const SHARE: f64 = 0.8;
        let link = self.host_link.as_deref().unwrap_or_default();
        let lanes = || {
            let (generation, lanes) = link.strip_prefix("Gen")?.split_once('x')?;
            Some((generation.parse::<i32>().ok()?, lanes.parse::<f64>().ok()?))
        };
        let peak = match lanes() {
            // A lane of the third generation carries 0.985 GB/s; every generation doubles it.
            Some((generation, lanes)) => 0.985e9 * 2f64.powi(generation.clamp(1, 8) - 3) * lanes,
            None if link.ends_with("C2C") => 450e9,
            None => 31.5e9,
        };
        peak * SHARE
    }

    /// Checks what types can't say; `origin` names the file in the error.
    pub fn validate(&self, origin: &str) -> Result<(), ProfileError> {
        let fail = |key: &str, problem: String| {
            Err(ProfileError::Invalid { origin: origin.to_owned(), key: key.to_owned(), problem })
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if self.memory_bytes.0 == 0 {
            return fail("memory_bytes", "expected a positive number of bytes, got 0".to_owned());
        }
        if !positive(self.bandwidth_bytes_per_s) {
            return fail(
                "bandwidth_bytes_per_s",
                format!("expected a positive number, got {}", self.bandwidth_bytes_per_s),
            );
        }
        if self.processors == 0 {
            return fail("processors", "expected at least 1, got 0".to_owned());
        }
        let peaks = &self.peak_flops_per_s;
        let given = [peaks.f32, peaks.f16, peaks.bf16, peaks.fp8, peaks.int8, peaks.fp4];
        if given.iter().all(Option::is_none) {
            return fail("peak_flops_per_s", "expected at least one peak".to_owned());
        }
        if let Some(bad) = given.iter().flatten().find(|v| !positive(**v)) {
            return fail("peak_flops_per_s", format!("expected positive numbers, got {bad}"));
        }
        Ok(())
    }
}
