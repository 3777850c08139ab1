//! Sums over several devices, by NCCL. It is looked for when devices are opened together; one alone runs without it.

use std::ffi::CStr;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use cudarc::nccl::sys;

use super::failed;
use crate::cuda::{Address, CudaError, DeviceInfo, Element};

/// What the sum is called in errors.
pub(super) const CALL: &str = "a sum over devices";
/// So long a call may take before it is taken to be waiting for a device that never comes.
const PATIENCE: Duration = Duration::from_secs(2);

/// The devices that add up.
pub(super) struct Together(Vec<Member>);

/// One of them.
struct Member {
    /// Its communicator; null once it was given back.
    comm: AtomicPtr<sys::ncclComm>,
    /// Whether its thread is in a call of the library.
    calling: AtomicBool,
}

/// Whether devices are of one kind. Others would wait for the slowest, and might choose other tokens.
///
/// # Errors
/// `Unavailable` with two that differ.
pub(super) fn alike<'a>(
    mut devices: impl Iterator<Item = &'a DeviceInfo>,
) -> Result<(), CudaError> {
    let Some(first) = devices.next() else { return Ok(()) };
    match devices.find(|d| d.name != first.name || d.memory != first.memory) {
        None => Ok(()),
        Some(other) => Err(CudaError::Unavailable {
            why: format!(
                "cuda:{} is {}, cuda:{} is {}; hint: devices that share layers have to be of one kind",
                first.index, first.name, other.index, other.name
            ),
        }),
    }
}

fn checked(call: &str, result: sys::ncclResult_t) -> Result<(), CudaError> {
    if result == sys::ncclResult_t::ncclSuccess {
        return Ok(());
    }
    // SAFETY: the library is there, it gave the result; the text lives as long as it does.
    let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(result)) };
    Err(failed(call, format!("NCCL: {}", text.to_string_lossy())))
}

impl Together {
    /// Makes devices of this process, by their indices, known to each other.
    ///
    /// # Errors
    /// `Unavailable` where NCCL is missing; what it said.
    pub(super) fn new(indices: &[u32]) -> Result<Self, CudaError> {
        // SAFETY: opening the library runs its initialisers, which is what it is there for.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Unavailable {
                why: "libnccl was not found, several devices need it; hint: install NCCL 2.10 or newer, or put its folder into LD_LIBRARY_PATH".into(),
            });
        }
        let list: Vec<i32> = indices.iter().map(|i| *i as i32).collect();
        let mut comms = vec![null_mut(); list.len()];
        // SAFETY: there are as many communicators to fill in as devices in the list.
        let made =
            unsafe { sys::ncclCommInitAll(comms.as_mut_ptr(), list.len() as i32, list.as_ptr()) };
        checked("opening devices together", made)?;
        let member = |comm| Member { comm: AtomicPtr::new(comm), calling: AtomicBool::new(false) };
        Ok(Self(comms.into_iter().map(member).collect()))
    }

    pub(super) fn devices(&self) -> u32 {
        self.0.len() as u32
    }

    /// Puts the sum into a queue of the device.
    pub(super) fn add(
        &self,
        rank: u32,
        queue: sys::cudaStream_t,
        at: Address,
        count: u64,
        element: Element,
    ) -> Result<(), CudaError> {
        let element = match element {
            Element::F32 => sys::ncclDataType_t::ncclFloat32,
            Element::F16 => sys::ncclDataType_t::ncclFloat16,
            Element::Bf16 => sys::ncclDataType_t::ncclBfloat16,
            Element::Fp8 => return Err(failed(CALL, "there are no sums of fp8")),
        };
        let member = &self.0[rank as usize];
        // Said before the communicator is looked at, so that `abort` either sees the call or takes the communicator first.
        member.calling.store(true, Ordering::SeqCst);
        let comm = member.comm.load(Ordering::SeqCst);
        let at = at.0 as *mut std::ffi::c_void;
        let done = if comm.is_null() {
            Err(failed(CALL, "another device failed"))
        } else {
            // SAFETY: the caller has checked the memory and its own queue; the communicator is alive, or `abort` interrupts
            // this very call, which the library allows.
            let result = unsafe {
                let sum = sys::ncclRedOp_t::ncclSum;
                sys::ncclAllReduce(at, at, count as usize, element, sum, comm, queue)
            };
            checked(CALL, result)
        };
        member.calling.store(false, Ordering::SeqCst);
        done
    }

    /// Ends what any of them waits for.
    pub(super) fn abort(&self) {
        self.give_back(sys::ncclCommAbort);
    }

    /// Gives back what all of them hold, if nobody has yet. No work is left.
    pub(super) fn close(&self) {
        self.give_back(sys::ncclCommDestroy);
    }

    /// In one group of calls: devices of a process may wait for each other in them, and one thread makes all.
    fn give_back(&self, call: unsafe fn(sys::ncclComm_t) -> sys::ncclResult_t) {
        let comms: Vec<_> = (self.0.iter())
            .map(|member| member.comm.swap(null_mut(), Ordering::SeqCst))
            .filter(|comm| !comm.is_null())
            .collect();
        if comms.is_empty() {
            return;
        }
        let start = Instant::now();
        while self.0.iter().any(|member| member.calling.load(Ordering::SeqCst))
            && start.elapsed() < PATIENCE
        {
            std::thread::yield_now();
        }
        // SAFETY: taken out, so each is given back once; who is still in a call waits there for a device that does not come,
        // and is let go by this. Errors have nobody to go to.
        unsafe {
            sys::ncclGroupStart();
            for comm in comms {
                call(comm);
            }
            sys::ncclGroupEnd();
        }
    }
}
