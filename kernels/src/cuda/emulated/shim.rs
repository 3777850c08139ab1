//! Builds the CUDA sources for the CPU and runs their kernels there.
//!
//! Objects are kept under `target/tmp/cuda-shim`, named after what they were made from, and shared by all test programs.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cuda::CudaError;

/// What a kernel moved.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// Bytes read; what threads of a warp read together counts once.
    pub loaded: u64,
    /// Bytes written.
    pub stored: u64,
}

impl Moved {
    /// Both.
    #[must_use]
    pub fn bytes(self) -> f64 {
        (self.loaded + self.stored) as f64
    }
}

/// A buffer that a kernel may touch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Address of its first byte.
    pub begin: u64,
    /// Address behind its last byte.
    pub end: u64,
    /// 1 where kernels may write, else 0.
    pub writable: u64,
}

/// Size, order and surroundings of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block: whole warps.
    pub block: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Order of threads and blocks. 0: forward, 1: backward, else the seed of a shuffle.
    pub order: u32,
    /// What the kernel may touch, sorted by address.
    pub ranges: &'a [Range],
}

/// As `shim::Launch` of `cuda/shim/shim.h`.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    block: u32,
    shared_bytes: u32,
    order: u32,
    buffers: *const Range,
    buffer_count: u64,
    loaded: u64,
    stored: u64,
    error: [c_char; 248],
}

type Entry = unsafe extern "C" fn(*mut Launch, *mut *mut c_void);
type ArgumentBytes = unsafe extern "C" fn(usize) -> usize;

#[link(name = "dl")]
unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

const LAZY: c_int = 1;

/// The kernels, compiled and opened once for the whole process.
///
/// # Errors
/// `Unavailable` where the machine has no C++ compiler; `Failed` with what the compiler or the linker said.
pub fn open() -> Result<Library, CudaError> {
    static LIBRARY: OnceLock<Result<usize, CudaError>> = OnceLock::new();
    LIBRARY.get_or_init(load).clone().map(Library)
}

/// The open library.
#[derive(Clone, Copy, Debug)]
pub struct Library(usize);

fn failed(why: impl Into<String>) -> CudaError {
    CudaError::Failed { call: "kernels for the CPU".into(), why: why.into() }
}

fn load() -> Result<usize, CudaError> {
    let compiler = compiler().ok_or_else(|| CudaError::Unavailable {
        why: "no C++ compiler was found (CXX, c++, g++, clang++), so the CUDA kernels can't run on the CPU".into(),
    })?;
    let path = build(&compiler)?;
    let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path has no zero in it");
    // SAFETY: a path that ends with a zero; the library runs nothing when it is opened.
    let library = unsafe { dlopen(path.as_ptr(), LAZY) };
    if library.is_null() {
        // SAFETY: after a failure this is text that ends with a zero.
        let why = unsafe { CStr::from_ptr(dlerror()) };
        return Err(failed(why.to_string_lossy()));
    }
    Ok(library as usize)
}

fn compiler() -> Option<String> {
    let runs = |name: &String| {
        Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success())
    };
    let named = std::env::var("CXX").ok();
    named.into_iter().chain(["c++", "g++", "clang++"].map(String::from)).find(runs)
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries: Vec<PathBuf> =
        folder.read_dir()?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// `tmp/cuda-shim` of the target folder that the running program was built into, so that every test program finds it.
fn out_folder() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let profile = own
        .ancestors()
        .find(|p| p.file_name().is_some_and(|n| n == "deps" || n == "examples"))
        .and_then(Path::parent);
    let target = profile.and_then(Path::parent).map(Path::to_path_buf);
    target
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"))
        .join("tmp/cuda-shim")
}

fn ran(mut command: Command) -> Result<(), CudaError> {
    let run = command.output().map_err(|e| failed(format!("{command:?}: {e}")))?;
    if run.status.success() { Ok(()) } else { Err(failed(String::from_utf8_lossy(&run.stderr))) }
}

/// Compiles what has changed, two files at a time, and links.
fn build(compiler: &str) -> Result<PathBuf, CudaError> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let out = out_folder();
    let at = |path: &Path, e: std::io::Error| failed(format!("{}: {e}", path.display()));
    std::fs::create_dir_all(&out).map_err(|e| at(&out, e))?;
    let mut all = Vec::new();
    sources(&folder, &mut all).map_err(|e| at(&folder, e))?;
    let read = |path: &Path| std::fs::read(path).map_err(|e| at(path, e));
    let has = |path: &Path, end: &str| path.extension().is_some_and(|e| e == end);
    let mut common = DefaultHasher::new();
    compiler.hash(&mut common);
    for path in all.iter().filter(|p| has(p, "cuh") || has(p, "h")) {
        read(path)?.hash(&mut common);
    }
    let native = if cfg!(target_arch = "x86_64") { "-march=native" } else { "-O2" };
    let flags = ["-std=c++17", "-O2", native, "-ffp-contract=off", "-fPIC", "-Wno-unknown-pragmas"];
    flags.hash(&mut common);
    let mut units: Vec<(PathBuf, PathBuf)> = Vec::new();
    for path in all.iter().filter(|p| has(p, "cu") || has(p, "cpp")) {
        let mut hash = common.clone();
        read(path)?.hash(&mut hash);
        let name = path.strip_prefix(&folder).expect("inside").to_string_lossy().replace('/', "-");
        units.push((path.clone(), out.join(format!("{name}-{:016x}.o", hash.finish()))));
    }
    // Another name first, so that a build that was cut off leaves nothing that looks whole.
    let part_of = |path: &Path| path.with_extension(format!("{}.part", std::process::id()));
    let compile = |(source, object): &(PathBuf, PathBuf)| {
        if object.exists() {
            return Ok(());
        }
        let part = part_of(object);
        let mut command = Command::new(compiler);
        command.args(flags).args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(&part);
        ran(command)?;
        std::fs::rename(&part, object).map_err(|e| at(object, e))
    };
    let next = AtomicUsize::new(0);
    let compile_all = || -> Result<(), CudaError> {
        while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            compile(unit)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(compile_all);
        compile_all().and(other.join().expect("a compiler that failed is an error, not a panic"))
    })?;
    let mut hash = common;
    units.iter().for_each(|(_, object)| object.hash(&mut hash));
    let library = out.join(format!("kernels-{:016x}.so", hash.finish()));
    if !library.exists() {
        let part = part_of(&library);
        let mut command = Command::new(compiler);
        // Kernels are called by their own names even where the C library has a function of that name.
        command.args(["-shared", "-Wl,-Bsymbolic", "-o"]).arg(&part);
        command.args(units.iter().map(|(_, object)| object));
        ran(command)?;
        std::fs::rename(&part, &library).map_err(|e| at(&library, e))?;
    }
    Ok(library)
}

impl Library {
    fn symbol(self, name: &str) -> Option<*mut c_void> {
        let name = CString::new(name).ok()?;
        // SAFETY: an open library and a name that ends with a zero.
        let found = unsafe { dlsym(self.0 as *mut c_void, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    }

    /// Whether there is such a kernel, with arguments of so many bytes.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(self, kernel: &str, sizes: &[usize]) -> Result<(), String> {
        let bytes = self
            .symbol(&format!("bytes_{kernel}"))
            .ok_or_else(|| format!("there is no kernel {kernel}"))?;
        // SAFETY: `KERNEL` makes a function of this type under this name.
        let bytes = unsafe { std::mem::transmute::<*mut c_void, ArgumentBytes>(bytes) };
        for i in 0..=sizes.len() {
            let given = sizes.get(i).copied().unwrap_or(0);
            // SAFETY: any index may be asked for.
            let taken = unsafe { bytes(i) };
            if given != taken {
                return Err(format!(
                    "argument {i} of {kernel} has {given} bytes, it takes {taken}"
                ));
            }
        }
        Ok(())
    }

    /// Runs a kernel: `arguments` as the bytes of each.
    ///
    /// # Errors
    /// There is no such kernel, an argument has another size, or what the shim found wrong.
    pub fn launch(
        self,
        kernel: &str,
        start: &Start<'_>,
        arguments: &[Vec<u8>],
    ) -> Result<Moved, String> {
        let sizes: Vec<usize> = arguments.iter().map(Vec::len).collect();
        self.check(kernel, &sizes)?;
        let entry = self.symbol(&format!("launch_{kernel}")).expect("KERNEL makes both functions");
        // SAFETY: `KERNEL` makes a function of this type under this name.
        let entry = unsafe { std::mem::transmute::<*mut c_void, Entry>(entry) };
        // Words of 8 bytes, so that every argument is aligned.
        let words: Vec<Vec<u64>> = arguments
            .iter()
            .map(|bytes| {
                let word = |part: &[u8]| {
                    let mut word = [0; 8];
                    word[..part.len()].copy_from_slice(part);
                    u64::from_ne_bytes(word)
                };
                bytes.chunks(8).map(word).collect()
            })
            .collect();
        let mut pointers: Vec<*mut c_void> =
            words.iter().map(|w| w.as_ptr().cast_mut().cast::<c_void>()).collect();
        let mut launch = Launch {
            grid: start.grid,
            block: start.block,
            shared_bytes: start.shared,
            order: start.order,
            buffers: start.ranges.as_ptr(),
            buffer_count: start.ranges.len() as u64,
            loaded: 0,
            stored: 0,
            error: [0; 248],
        };
        // SAFETY: the arguments have the sizes that the kernel takes, which checks its own accesses against the ranges.
        unsafe { entry(&raw mut launch, pointers.as_mut_ptr()) };
        // SAFETY: the shim ends its text with a zero.
        let error = unsafe { CStr::from_ptr(launch.error.as_ptr()) }.to_string_lossy().into_owned();
        if error.is_empty() {
            Ok(Moved { loaded: launch.loaded, stored: launch.stored })
        } else {
            Err(format!("{kernel}: {error}"))
        }
    }
}
