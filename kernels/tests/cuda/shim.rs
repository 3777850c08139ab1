//! Builds the CUDA sources for the CPU and runs their kernels there.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    pub fn bytes(self) -> f64 {
        (self.loaded + self.stored) as f64
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Range {
    pub begin: u64,
    pub end: u64,
    pub writable: u64,
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

/// Whether there is a compiler; says so if not, for then nothing is tested.
pub fn available() -> bool {
    let found = library().is_some();
    if !found {
        #[expect(clippy::print_stderr, reason = "a test that is left out must say so")]
        {
            eprintln!(
                "SKIPPED: no C++ compiler (CXX, c++, g++, clang++), no CUDA kernel was tested"
            );
        }
    }
    found
}

fn library() -> Option<usize> {
    static LIBRARY: OnceLock<Option<usize>> = OnceLock::new();
    *LIBRARY.get_or_init(|| {
        let compiler = compiler()?;
        let path = build(&compiler);
        let path = CString::new(path.to_str().expect("a path of text")).expect("no zero in it");
        // SAFETY: a path that ends with a zero; the library runs nothing when it is opened.
        let library = unsafe { dlopen(path.as_ptr(), LAZY) };
        // SAFETY: an error is text that ends with a zero.
        let why = || unsafe { CStr::from_ptr(dlerror()) }.to_string_lossy().into_owned();
        assert!(!library.is_null(), "{}", why());
        Some(library as usize)
    })
}

fn compiler() -> Option<String> {
    let runs = |name: &String| {
        Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success())
    };
    let named = std::env::var("CXX").ok();
    named.into_iter().chain(["c++", "g++", "clang++"].map(String::from)).find(runs)
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        folder.read_dir().expect("the sources").map(|e| e.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            sources(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// Compiles what has changed, two files at a time, and links.
fn build(compiler: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-shim");
    std::fs::create_dir_all(&out).expect("a folder for objects");
    let mut all = Vec::new();
    sources(&folder, &mut all);
    let has = |path: &Path, end: &str| path.extension().is_some_and(|e| e == end);
    let mut common = DefaultHasher::new();
    compiler.hash(&mut common);
    for path in all.iter().filter(|p| has(p, "cuh") || has(p, "h")) {
        std::fs::read(path).expect("a header").hash(&mut common);
    }
    let native = if cfg!(target_arch = "x86_64") { "-march=native" } else { "-O2" };
    let flags = ["-std=c++17", "-O2", native, "-ffp-contract=off", "-fPIC", "-Wno-unknown-pragmas"];
    flags.hash(&mut common);
    let units: Vec<(PathBuf, PathBuf)> = all
        .iter()
        .filter(|p| has(p, "cu") || has(p, "cpp"))
        .map(|path| {
            let mut hash = common.clone();
            std::fs::read(path).expect("a source").hash(&mut hash);
            let name =
                path.strip_prefix(&folder).expect("inside").to_string_lossy().replace('/', "-");
            (path.clone(), out.join(format!("{name}-{:016x}.o", hash.finish())))
        })
        .collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((source, object)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if object.exists() {
                        continue;
                    }
                    // Under another name first, so that a build that was cut off leaves nothing that looks whole.
                    let part = object.with_extension(format!("{}.part", std::process::id()));
                    let mut command = Command::new(compiler);
                    command.args(flags).args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(&part);
                    let run = command.output().expect("the compiler runs");
                    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
                    std::fs::rename(&part, object).expect("renamed");
                }
            });
        }
    });
    let mut hash = common;
    units.iter().for_each(|(_, object)| object.hash(&mut hash));
    let library = out.join(format!("kernels-{:016x}.so", hash.finish()));
    if !library.exists() {
        let part = library.with_extension(format!("{}.part", std::process::id()));
        let mut command = Command::new(compiler);
        // Kernels are called by their own names even where the C library has a function of that name.
        command
            .args(["-shared", "-Wl,-Bsymbolic", "-o"])
            .arg(&part)
            .args(units.iter().map(|(_, o)| o));
        let run = command.output().expect("the linker runs");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        std::fs::rename(&part, &library).expect("renamed");
    }
    library
}

fn symbol(name: &str) -> *mut c_void {
    let library = library().expect("a compiler");
    let c_name = CString::new(name).expect("no zero in it");
    // SAFETY: an open library and a name that ends with a zero.
    let found = unsafe { dlsym(library as *mut c_void, c_name.as_ptr()) };
    assert!(!found.is_null(), "no kernel {name}");
    found
}

/// Runs a kernel: `arguments` as the bytes of each.
///
/// # Errors
/// What the shim found wrong.
pub fn launch(
    kernel: &str,
    grid: [u32; 3],
    (block, shared_bytes): (u32, u32),
    order: u32,
    ranges: &[Range],
    arguments: &[Vec<u8>],
) -> Result<Moved, String> {
    // SAFETY: the symbols come from `KERNEL`, with these types.
    let (entry, bytes) = unsafe {
        (
            std::mem::transmute::<*mut c_void, Entry>(symbol(&format!("launch_{kernel}"))),
            std::mem::transmute::<*mut c_void, ArgumentBytes>(symbol(&format!("bytes_{kernel}"))),
        )
    };
    for i in 0..=arguments.len() {
        let given = arguments.get(i).map_or(0, Vec::len);
        // SAFETY: any index may be asked for.
        assert_eq!(given, unsafe { bytes(i) }, "argument {i} of {kernel}");
    }
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
        grid,
        block,
        shared_bytes,
        order,
        buffers: ranges.as_ptr(),
        buffer_count: ranges.len() as u64,
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
