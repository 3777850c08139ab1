//! Matrix products by cuBLASLt.
//!
//! It knows columns where this project has rows. A matrix of rows is the transpose of the same bytes read by columns, so
//! `y = x w^T` is asked for as `y^T = w x^T`: the weights come first (read by columns they are `w^T`, so they are
//! transposed), the activations second (`x^T` as they lie), and what is written by columns is `y` by rows. That is also the
//! only order in which there are products of fp8.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};

use super::failed;
use crate::cuda::{Address, CudaError, Element, Product};

/// Bytes that a product may use beside its operands, for each stream.
pub(super) const WORKSPACE: u64 = 32 << 20;

/// `CUBLAS_OP_T`, which cudarc has only beside cuBLAS.
const TRANSPOSED: u32 = 1;

/// What decides how a product is done.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    m: u32,
    n: u32,
    k: u32,
    x_stride: u32,
    y_stride: u32,
    element: Element,
    out: Element,
    bias: bool,
    /// Bytes that addresses of `w`, `x` and `y` are multiples of.
    aligned: [u32; 3],
}

/// A product as the library describes it, and how it does it.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by the plan, which nobody else knows. Errors have nobody to go to.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// The library, on one context.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
    tf32: bool,
}

fn said(call: &str, error: result::CublasError) -> CudaError {
    failed(call, format!("cuBLASLt: {error}"))
}

fn kind(element: Element) -> sys::cudaDataType {
    match element {
        Element::F32 => sys::cudaDataType::CUDA_R_32F,
        Element::F16 => sys::cudaDataType::CUDA_R_16F,
        Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Element::Fp8 => sys::cudaDataType::CUDA_R_8F_E4M3,
    }
}

fn aligned(at: Address) -> u32 {
    1 << at.0.trailing_zeros().min(8)
}

/// Whether the library adds the bias itself: it has the type of the result there.
pub(super) fn adds_bias(product: &Product) -> bool {
    product.out == Element::F32 && product.element == Element::F32
}

impl Products {
    /// Opens the library on the current context.
    ///
    /// # Errors
    /// What it said.
    pub(super) fn new() -> Result<Self, CudaError> {
        let handle = result::create_handle().map_err(|e| said("opening cuBLASLt", e))?;
        Ok(Self { handle, plans: HashMap::new(), tf32: false })
    }

    /// Whether single precision may be rounded to TF32 on its way in.
    pub(super) fn allow_tf32(&mut self, allowed: bool) {
        self.tf32 = allowed;
        self.plans.clear();
    }

    fn plan(&self, key: &Key) -> Result<Plan, result::CublasError> {
        let compute = match (key.element, self.tf32) {
            (Element::F32, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let [n, m, k] = [key.n, key.m, key.k].map(u64::from);
        let product = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        // What is made below is destroyed with the plan, also where a later step fails.
        let mut plan = Plan {
            product,
            layouts: [std::ptr::null_mut(); 3],
            // SAFETY: plain words, which the library fills in below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        plan.layouts = [
            result::create_matrix_layout(kind(key.element), k, n, k as i64)?,
            result::create_matrix_layout(kind(key.element), k, m, key.x_stride.into())?,
            result::create_matrix_layout(kind(key.out), n, m, key.y_stride.into())?,
        ];
        let set = |attribute, value: u32| {
            // SAFETY: the description is alive, and both attributes are 4 bytes.
            unsafe {
                result::set_matmul_desc_attribute(
                    product,
                    attribute,
                    (&raw const value).cast(),
                    size_of::<u32>(),
                )
            }
        };
        set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        if key.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
        }
        let wishes = Wishes(result::create_matmul_pref()?);
        use sys::cublasLtMatmulPreferenceAttributes_t as Wish;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE as usize)?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.aligned[0])?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.aligned[1])?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.aligned[2])?;
        wishes.set(Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.aligned[2])?;
        let [w, x, y] = plan.layouts;
        // SAFETY: everything named is alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(self.handle, product, w, x, y, y, wishes.0)?
        };
        plan.algorithm = found.algo;
        Ok(plan)
    }

    /// Puts a product into a stream; `workspace` has [`WORKSPACE`] bytes that no other stream uses.
    ///
    /// # Errors
    /// What the library said: there may be no such product.
    pub(super) fn multiply(
        &mut self,
        stream: sys::cudaStream_t,
        workspace: Address,
        product: &Product,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let Product { m, n, k, x, w, y, .. } = *product;
        let key = Key {
            m,
            n,
            k,
            x_stride: product.x_stride,
            y_stride: product.y_stride,
            element: product.element,
            out: product.out,
            bias: product.bias != Address::default() && adds_bias(product),
            aligned: [w, x, y].map(aligned),
        };
        let call = || {
            let (element, out) = (product.element, product.out);
            format!("product {m} x {n} x {k} of {element:?} to {out:?}")
        };
        if !self.plans.contains_key(&key) {
            let plan = self.plan(&key).map_err(|e| said(&call(), e))?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        if key.bias {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            let bias = (&raw const product.bias.0).cast();
            // SAFETY: the description is alive, the attribute is an address of 8 bytes.
            unsafe { result::set_matmul_desc_attribute(plan.product, attribute, bias, 8) }
                .map_err(|e| said(&call(), e))?;
        }
        let (alpha, beta) = (product.scale, if accumulate { 1.0f32 } else { 0.0 });
        let [w_layout, x_layout, y_layout] = plan.layouts;
        // SAFETY: the operands lie in memory of the device, as the caller has checked; the factors are read before the
        // call returns, for they are the host's.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                w.0 as *const c_void,
                w_layout,
                x.0 as *const c_void,
                x_layout,
                y.0 as *const c_void,
                y_layout,
                y.0 as *mut c_void,
                y_layout,
                &raw const plan.algorithm,
                workspace.0 as *mut c_void,
                WORKSPACE as usize,
                stream,
            )
        }
        .map_err(|e| said(&call(), e))
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: opened in `new`, and closed once. An error has nobody to go to.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// What the library's search is told.
struct Wishes(sys::cublasLtMatmulPreference_t);

impl Wishes {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: T,
    ) -> Result<(), result::CublasError> {
        // SAFETY: they are alive, and callers give each attribute a value of its type.
        unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                attribute,
                (&raw const value).cast(),
                size_of::<T>(),
            )
        }
    }
}

impl Drop for Wishes {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
