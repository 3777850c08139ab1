//! Where descriptions and this machine's results are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use batchmax_sim::cost::calibrated::KernelProfile;
use batchmax_sim::op::DType;
use batchmax_sim::profile::Catalog;
use batchmax_sim::surface::{Library, Surface};

use super::{LOCAL, device_flag, is_local};
use crate::cli::Global;
use crate::paths;

/// Where descriptions and results are.
pub struct Places {
    /// Descriptions, built in and the user's.
    pub catalog: Catalog,
    /// Models and profiles of this machine.
    pub data_dir: PathBuf,
    library: OnceLock<Library>,
    /// How models' files hold their weights, as far as that was asked.
    stored: Mutex<BTreeMap<PathBuf, Option<DType>>>,
}

impl Places {
    /// From the global flags.
    pub fn new(global: &Global) -> Result<Self> {
        let data_dir = paths::data_dir(global.data_dir.as_ref())?;
        let mut catalog = Catalog::built_in().with_user_dir(data_dir.clone());
        if let Some(dir) = &global.profiles {
            if !dir.is_dir() {
                bail!("--profiles {}: no such directory", dir.display());
            }
            catalog = catalog.with_user_dir(dir.clone());
        }
        Ok(Self { catalog, data_dir, library: OnceLock::new(), stored: Mutex::default() })
    }

    /// How a model's file holds its weights; a header takes 20 ms to read, so that is done once.
    pub(super) fn stored(&self, path: &Path) -> Option<DType> {
        let mut known = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stored) = known.get(path) {
            return *stored;
        }
        let model = self.catalog.model(&path.display().to_string());
        let stored = model.ok().and_then(|model| model.stored);
        known.insert(path.to_owned(), stored);
        stored
    }

    /// Spares [`Self::stored`] the reading of a header that has been read.
    #[cfg(feature = "exec")]
    pub fn know_stored(&self, path: &Path, stored: Option<DType>) {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), stored);
    }

    /// The fitted profile of this machine with `threads` threads.
    pub fn kernel_profile_path(&self, device: &str, threads: usize, weights: DType) -> PathBuf {
        let name = format!("batchmax-{threads}t-{weights}.toml");
        self.data_dir.join("kernels").join(device).join(name)
    }

    /// The measurements a profile is fitted from.
    pub fn measurements_path(&self, device: &str, threads: usize, weights: DType) -> PathBuf {
        let name = format!("batchmax-{threads}t-{weights}.json");
        self.data_dir.join("measurements").join(device).join(name)
    }

    /// The newest measurements of a device with so many threads, whatever the weights.
    pub fn newest_measurements(&self, device: &str, threads: usize) -> Option<PathBuf> {
        let start = format!("batchmax-{threads}t-");
        let files = std::fs::read_dir(self.data_dir.join("measurements").join(device)).ok()?;
        let named = |file: &std::fs::DirEntry| {
            let name = file.file_name();
            let name = name.to_string_lossy();
            name.starts_with(&start) && name.ends_with(".json") && !name.contains(".partial")
        };
        let written = |file: &std::fs::DirEntry| file.metadata().and_then(|m| m.modified()).ok();
        let newest = files.flatten().filter(named).max_by_key(written)?;
        Some(newest.path())
    }

    /// Kernel surfaces that the user has fitted: `kernels/<device>/<framework>.toml` in the data directory.
    pub fn own_surfaces(&self) -> Result<Vec<Surface>> {
        let mut surfaces = Vec::new();
        let devices = std::fs::read_dir(self.data_dir.join("kernels"));
        for device in devices.into_iter().flatten().flatten() {
            // This machine's own profile is of another kind: shapes of one model, not of a framework.
            if is_local(&device.file_name().to_string_lossy()) {
                continue;
            }
            for file in std::fs::read_dir(device.path()).into_iter().flatten().flatten() {
                let path = file.path();
                if path.extension().is_some_and(|e| e == "toml") {
                    let text = std::fs::read_to_string(&path)
                        .with_context(|| path.display().to_string())?;
                    surfaces.extend(Library::read(&path.display().to_string(), &text)?);
                }
            }
        }
        Ok(surfaces)
    }

    /// Kernels of GPUs, the user's own before those that ship; read once.
    pub fn library(&self) -> Result<&Library> {
        if let Some(library) = self.library.get() {
            return Ok(library);
        }
        let library = Library::new(self.catalog.clone(), self.own_surfaces()?);
        Ok(self.library.get_or_init(|| library))
    }

    pub(super) fn kernel_profile(
        &self,
        device: &str,
        threads: usize,
        weights: DType,
    ) -> Result<KernelProfile> {
        let path = self.kernel_profile_path(device, threads, weights);
        let text = std::fs::read_to_string(&path).map_err(|_| {
            if device != LOCAL {
                return anyhow!(
                    "no kernel profile of {device} with weights in {weights}; \
                     hint: batchmax profile --device {} --weight-dtype {weights} (some minutes)",
                    device_flag(device)
                );
            }
            anyhow!(
                "no kernel profile of this machine with {threads} threads and weights in {weights}; \
                 hint: batchmax profile --threads {threads} --weight-dtype {weights} --device cpu (some minutes)"
            )
        })?;
        let profile =
            batchmax_sim::profile::catalog::parse_toml(&path.display().to_string(), &text)?;
        Ok(profile)
    }
}
