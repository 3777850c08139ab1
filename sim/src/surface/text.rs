//! Surfaces as text: TOML with a line of residuals per key, so that a new fit is a readable diff.

use std::fmt::Write as _;

use serde::Deserialize;

use super::{Core, FitErrors, KEYS, Kernel, Kriging, MISSING, Origin, Surface, SurfaceId};
use crate::profile::ProfileError;
use crate::profile::catalog::parse_toml;

/// Cells that a file may hold at most: hostile sizes are refused before memory is taken.
const MOST_CELLS: usize = 1 << 24;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    gpu: String,
    framework: String,
    source: String,
    licence: String,
    date: String,
    #[serde(rename = "surface")]
    surfaces: Vec<Head>,
}

/// The surfaces of one device and framework as a file. All must be of the same device, framework and origin.
#[must_use]
pub fn to_text(surfaces: &[Surface]) -> String {
    let Some(first) = surfaces.first() else { return String::new() };
    let mut out = String::new();
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let list =
        |values: &[f64]| values.iter().map(|v| format!("{v:.5}")).collect::<Vec<_>>().join(", ");
    // By hand and not by the serialiser: four significant digits and one key a line keep the files small and diffs short.
    let mut line = |key: &str, value: String| {
        let _ = writeln!(out, "{key} = {value}");
    };
    line("gpu", quoted(&first.id.gpu));
    line("framework", quoted(&first.id.framework));
    line("source", quoted(&first.origin.source));
    line("licence", quoted(&first.origin.licence));
    line("date", quoted(&first.origin.date));
    for surface in surfaces {
        let (core, errors) = (&surface.core, &surface.errors);
        let _ = writeln!(out, "\n[[surface]]\nkernel = {}", quoted(surface.id.kernel.name()));
        let _ = writeln!(out, "dtype = {}", quoted(&surface.id.dtype));
        if !surface.id.variant.is_empty() {
            let _ = writeln!(out, "variant = {}", quoted(&surface.id.variant));
        }
        let _ = writeln!(
            out,
            "core = {{ launch_us = {:.4}, compute = {:.5}, bandwidth = {:.5}, cache = {:.5}, sharpness = {:.4} }}",
            core.launch_us, core.compute, core.bandwidth, core.cache, core.sharpness
        );
        let _ = writeln!(
            out,
            "kriging = {{ reach = {:?}, nugget = {:?} }}",
            surface.kriging.reach, surface.kriging.nugget
        );
        let _ = writeln!(
            out,
            "errors = {{ points = {}, median = {:.5}, p95 = {:.5}, bias = {:.5}, core_stddev = {:.5}, explained = {:.5}, log_p90 = [{}] }}",
            errors.points,
            errors.median,
            errors.p95,
            errors.bias,
            errors.core_stddev,
            errors.explained,
            list(&errors.log_p90)
        );
        let _ = writeln!(out, "axes = {:?}", surface.axes);
        let _ = writeln!(out, "rows = \"\"\"");
        let parts = surface.id.kernel.key_parts();
        let cells = surface.cells();
        for (k, key) in surface.keys.iter().enumerate() {
            let mut words: Vec<String> =
                key[..parts].iter().map(u32::to_string).collect::<Vec<_>>();
            if let Some(last) = words.last_mut() {
                last.push(':');
            }
            words.extend(
                surface.residuals[k * cells..(k + 1) * cells]
                    .iter()
                    .map(|r| if *r == MISSING { ".".to_owned() } else { r.to_string() }),
            );
            let _ = writeln!(out, "{}", words.join(" "));
        }
        let _ = writeln!(out, "\"\"\"");
    }
    out
}

/// The surfaces of a file; `origin` names it in errors.
pub fn from_text(origin: &str, text: &str) -> Result<Vec<Surface>, ProfileError> {
    let document: Document = parse_toml(origin, text)?;
    document
        .surfaces
        .iter()
        .map(|entry| {
            surface_of(&document, entry).map_err(|problem| ProfileError::Invalid {
                origin: origin.to_owned(),
                key: format!("{} {}", entry.kernel.name(), entry.dtype),
                problem,
            })
        })
        .collect()
}

fn surface_of(document: &Document, entry: &Head) -> Result<Surface, String> {
    let origin = Origin {
        source: document.source.clone(),
        licence: document.licence.clone(),
        date: document.date.clone(),
    };
    let mut surface = entry.clone().surface(&document.gpu, &document.framework, origin)?;
    let (kernel, cells) = (entry.kernel, surface.cells());
    for (number, line) in entry.rows.lines().filter(|l| !l.trim().is_empty()).enumerate() {
        let bad = |what: &str| format!("row {}: {what}", number + 1);
        let (key, values) =
            line.split_once(':').ok_or_else(|| bad("expected \"key: residuals\""))?;
        let mut parsed = [0u32; KEYS];
        let words: Vec<&str> = key.split_whitespace().collect();
        if words.len() != kernel.key_parts() {
            return Err(bad(&format!(
                "expected {} key parts, got {}",
                kernel.key_parts(),
                words.len()
            )));
        }
        for (slot, word) in parsed.iter_mut().zip(words) {
            *slot = word.parse().map_err(|_| bad(&format!("\"{word}\" is not a size")))?;
        }
        let before = surface.residuals.len();
        for word in values.split_ascii_whitespace() {
            surface.residuals.push(if word == "." {
                MISSING
            } else {
                word.parse().map_err(|_| bad(&format!("\"{word}\" is not a residual")))?
            });
        }
        let found = surface.residuals.len() - before;
        if found != cells {
            return Err(bad(&format!("expected {cells} residuals, got {found}")));
        }
        if surface.residuals.len() > MOST_CELLS {
            return Err("the grid is too large".to_owned());
        }
        surface.keys.push(parsed);
    }
    if surface.keys.is_empty() {
        return Err("there is no row".to_owned());
    }
    if surface.keys.windows(2).any(|w| w[0] >= w[1]) {
        return Err("keys must ascend".to_owned());
    }
    Ok(surface)
}

/// A surface as it stands in a file; packed ones have their rows elsewhere.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head {
    kernel: Kernel,
    dtype: String,
    #[serde(default)]
    variant: String,
    core: Core,
    kriging: Kriging,
    errors: FitErrors,
    /// Sizes along each axis.
    axes: Vec<Vec<u64>>,
    /// `key parts: residuals in half percents, . where nobody measured`, a key a line.
    #[serde(default)]
    rows: String,
}

impl Head {
    /// A surface without rows.
    pub(super) fn surface(
        self,
        gpu: &str,
        framework: &str,
        origin: Origin,
    ) -> Result<Surface, String> {
        if super::NumberType::parse(&self.dtype).is_none() {
            return Err(format!("\"{}\" is not a type", self.dtype));
        }
        let names = self.kernel.axis_names();
        if self.axes.len() != names.len() {
            return Err(format!("expected {} axes, got {}", names.len(), self.axes.len()));
        }
        let ascending = |axis: &Vec<u64>| !axis.is_empty() && axis.windows(2).all(|w| w[0] < w[1]);
        if let Some(bad) = self.axes.iter().position(|a| !ascending(a)) {
            return Err(format!("the sizes of axis {} must ascend", names[bad]));
        }
        let kriging = self.kriging;
        if !(kriging.reach > 0.0 && kriging.nugget > 0.0) {
            return Err("reach and nugget must be positive".to_owned());
        }
        let core = &self.core;
        let numbers = [core.launch_us, core.compute, core.bandwidth, core.cache, core.sharpness];
        if numbers.iter().any(|x| !x.is_finite() || *x <= 0.0) {
            return Err("every number of the core must be positive".to_owned());
        }
        let errors = &self.errors;
        if errors.log_p90.iter().chain([&errors.core_stddev]).any(|x| !x.is_finite() || *x < 0.0) {
            return Err("errors can't be negative".to_owned());
        }
        self.axes
            .iter()
            .try_fold(1usize, |product, axis| product.checked_mul(axis.len()))
            .filter(|cells| *cells <= MOST_CELLS)
            .ok_or("the grid is too large")?;
        Ok(Surface {
            id: SurfaceId {
                gpu: gpu.to_owned(),
                framework: framework.to_owned(),
                kernel: self.kernel,
                dtype: self.dtype,
                variant: self.variant,
            },
            origin,
            core: self.core,
            kriging: self.kriging,
            keys: Vec::new(),
            axes: self.axes,
            residuals: Vec::new(),
            errors: self.errors,
        })
    }
}
