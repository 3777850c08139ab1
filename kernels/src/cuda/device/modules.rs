//! The embedded PTX: which kernel stands where, and what arguments it takes.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::io::Read;

use cudarc::driver::{result, sys};

use super::{failed, said};
use crate::cuda::table::MODULES;
use crate::cuda::{Arg, CudaError};

/// Bytes of shared memory that a block may have without asking.
const PLAIN_SHARED: u32 = 48 << 10;

/// A kernel that is on the device.
struct Function {
    handle: sys::CUfunction,
    /// Bytes of each argument.
    sizes: Vec<usize>,
    /// Bytes of dynamic shared memory that it may be started with.
    shared: u32,
}

/// Modules and functions of a context, loaded when they are first asked for.
#[derive(Default)]
pub(super) struct Modules {
    loaded: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
    shared_limit: u32,
}

/// The text of a module.
pub(super) fn inflate(packed: &[u8]) -> std::io::Result<String> {
    let mut text = String::new();
    flate2::read::ZlibDecoder::new(packed).read_to_string(&mut text)?;
    Ok(text)
}

/// Bytes of a parameter's type, as PTX writes it: `.param .u64 name` or `.param .align 8 .b8 name[64]`.
fn parameter_bytes(line: &str) -> Option<usize> {
    let line = line.trim().trim_end_matches(',').strip_prefix(".param ")?;
    if let Some((_, count)) = line.split_once('[') {
        return count.strip_suffix(']')?.parse().ok();
    }
    let kind = line.split_whitespace().find(|word| word.starts_with('.'))?;
    let bits: usize = kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
    Some(bits / 8)
}

/// Kernels of a module's text, and the bytes of their arguments. They are named there as here, so a wrong number of
/// arguments is an error and no read behind the last one.
pub(super) fn entries(text: &str) -> HashMap<&str, Vec<usize>> {
    let mut found = HashMap::new();
    for part in text.split(".entry ").skip(1) {
        let Some((name, rest)) = part.split_once('(') else { continue };
        let list = rest.split_once(')').map_or("", |(list, _)| list);
        found.insert(name.trim(), list.lines().filter_map(parameter_bytes).collect());
    }
    found
}

/// The bytes of arguments, each at the start of words of its own, so that all are aligned.
fn words(args: &[Arg]) -> (Vec<u64>, Vec<(usize, usize)>) {
    let mut words = Vec::new();
    let mut places = Vec::new();
    for arg in args {
        let at = words.len();
        let bytes = match arg {
            Arg::U32(x) => {
                words.push(u64::from(*x));
                4
            }
            Arg::F32(x) => {
                words.push(u64::from(x.to_bits()));
                4
            }
            Arg::U64(x) => {
                words.push(*x);
                8
            }
            Arg::F64(x) => {
                words.push(x.to_bits());
                8
            }
            Arg::At(at) => {
                words.push(at.0);
                8
            }
            Arg::Bytes(bytes) => {
                words.extend(bytes.chunks(8).map(|part| {
                    let mut word = [0; 8];
                    word[..part.len()].copy_from_slice(part);
                    u64::from_le_bytes(word)
                }));
                bytes.len()
            }
        };
        places.push((at, bytes));
    }
    (words, places)
}

impl Modules {
    /// None yet; a block of the device may have so many bytes of shared memory.
    pub(super) fn new(shared_limit: u32) -> Self {
        Self { shared_limit, ..Self::default() }
    }

    /// Loads the module of a kernel, with all its kernels.
    fn load(&mut self, kernel: &str) -> Result<(), CudaError> {
        let call = || format!("loading {kernel}");
        let module = MODULES.iter().find(|module| module.kernels.contains(&kernel));
        let module = module.ok_or_else(|| failed(call(), "there is no such kernel"))?;
        let text = inflate(module.ptx).map_err(|e| failed(call(), e.to_string()))?;
        let image = CString::new(text.as_str()).map_err(|e| failed(call(), e.to_string()))?;
        // SAFETY: text that ends with a zero; the context is current.
        let handle = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
        let handle = handle.map_err(|e| said(call(), e))?;
        self.loaded.push(handle);
        let mut sizes = entries(&text);
        for name in module.kernels {
            let c_name = CString::new(*name).expect("no kernel has a zero in its name");
            // SAFETY: the module was loaded just now.
            let function = unsafe { result::module::get_function(handle, c_name) };
            let function = Function {
                handle: function.map_err(|e| said(format!("finding {name}"), e))?,
                sizes: sizes
                    .remove(*name)
                    .ok_or_else(|| failed(call(), format!("{}.ptx lacks it", module.name)))?,
                shared: PLAIN_SHARED,
            };
            self.functions.insert(name, function);
        }
        Ok(())
    }

    /// Starts a kernel.
    pub(super) fn launch(
        &mut self,
        stream: sys::CUstream,
        launch: &crate::cuda::Launch,
    ) -> Result<(), CudaError> {
        let call = || format!("launch of {}", launch.kernel);
        if !self.functions.contains_key(launch.kernel) {
            self.load(launch.kernel)?;
        }
        let limit = self.shared_limit;
        let function = self.functions.get_mut(launch.kernel).expect("loaded just now");
        let (mut words, places) = words(&launch.args);
        let given: Vec<usize> = places.iter().map(|(_, bytes)| *bytes).collect();
        if given != function.sizes {
            return Err(failed(
                call(),
                format!("its arguments have {:?} bytes, not {given:?}", function.sizes),
            ));
        }
        if launch.shared > function.shared {
            if launch.shared > limit {
                let why = format!("{} bytes of shared memory, a block has {limit}", launch.shared);
                return Err(failed(call(), why));
            }
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.shared as i32;
            // SAFETY: a function of a loaded module.
            unsafe { result::function::set_function_attribute(function.handle, attribute, bytes) }
                .map_err(|e| said(call(), e))?;
            function.shared = launch.shared;
        }
        let base = words.as_mut_ptr();
        let mut pointers: Vec<*mut c_void> =
            places.iter().map(|(at, _)| base.wrapping_add(*at).cast()).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the function takes as many arguments of these sizes, which the driver copies before it returns. What the
        // kernel does with addresses in them is checked by the same sources on the CPU.
        unsafe {
            result::launch_kernel(
                function.handle,
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared,
                stream,
                &mut pointers,
            )
        }
        .map_err(|e| said(call(), e))
    }

    /// Takes all modules off the device.
    pub(super) fn unload(&mut self) {
        self.functions.clear();
        for module in self.loaded.drain(..) {
            // SAFETY: it was loaded, and no function of it is left. An error has nobody to go to.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_every_kernel_once() {
        let mut all = std::collections::HashSet::new();
        for module in MODULES {
            let text = inflate(module.ptx).expect("packed text");
            assert!(text.contains(".version 7.8") && text.contains(".target sm_80"));
            let mut found: Vec<&str> = entries(&text).into_keys().collect();
            found.sort_unstable();
            assert_eq!(found, module.kernels, "{}", module.name);
            assert!(module.kernels.iter().all(|kernel| all.insert(*kernel)), "{}", module.name);
        }
        assert!(all.contains("softcap"));
    }

    #[test]
    fn sizes_of_parameters_are_read() {
        let text = "\
.visible .entry some(
	.param .align 8 .b8 some_param_0[64],
	.param .u64 .ptr .align 1 some_param_1,
	.param .f32 some_param_2
)
{ ret; }
.visible .entry none()
{ ret; }";
        let found = entries(text);
        assert_eq!(found["some"], [64, 8, 4]);
        assert_eq!(found["none"], [0; 0]);
    }

    #[cfg(feature = "emulated")]
    #[test]
    fn arguments_are_those_of_the_sources() {
        let Ok(library) = crate::cuda::emulated::shim::open() else { return };
        for module in MODULES {
            let text = inflate(module.ptx).expect("packed text");
            for (kernel, sizes) in entries(&text) {
                assert_eq!(library.check(kernel, &sizes), Ok(()), "stale PTX? run build.py");
            }
        }
    }

    #[test]
    fn arguments_start_at_words() {
        let args = [Arg::U32(7), Arg::Bytes(vec![1; 12]), Arg::F32(1.0), Arg::F64(2.0)];
        let (words, places) = words(&args);
        assert_eq!(places, [(0, 4), (1, 12), (3, 4), (4, 8)]);
        assert_eq!(words[0], 7);
        assert_eq!(words[2], 0x0101_0101);
        assert_eq!(words[4], 2f64.to_bits());
    }
}
