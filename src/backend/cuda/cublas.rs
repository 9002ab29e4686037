//! Large matrix products through cuBLASLt, loaded at run time; the handwritten `linear` covers few rows, this the rest.
//!
//! `y[t, n] = sum_k x[t, k] w[n, k] + bias[n]`, all row-major: column-major, that is y^T = W x^T with W transposed. f32
//! accumulation, no TF32. Split sums are combined in the workspace in a fixed order, never in place by whoever comes
//! first, so that one shape on one GPU gives the same bits every time.

use std::ffi::c_void;

use super::device::Device;
use crate::dtype::DType;
use crate::error::Result;

/// A product; addresses of device memory.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// `[num_rows, in_features]` of `dtype`.
    pub x: *const c_void,
    /// `[out_features, in_features]` of `dtype`.
    pub w: *const c_void,
    /// `[out_features]`, or null.
    pub bias: *const f32,
    /// `[num_rows, out_features]`, written.
    pub y: *mut f32,
    /// Rows of x and y.
    pub num_rows: usize,
    /// Columns of x and w.
    pub in_features: usize,
    /// Rows of w, columns of y.
    pub out_features: usize,
    /// Of x and w.
    pub dtype: DType,
}

#[cfg(feature = "cuda")]
pub use gpu::Cublas;

/// cuBLASLt, in a build without it.
#[cfg(not(feature = "cuda"))]
pub struct Cublas {
    never: std::convert::Infallible,
}

#[cfg(not(feature = "cuda"))]
impl Cublas {
    /// Fails: there is no cuBLASLt without a GPU.
    pub fn open(device: &Device) -> Result<Self> {
        device.raw_stream("cublas").and(Err(crate::Error::Internal("a stream without a GPU".into())))
    }

    /// See [`Gemm`].
    pub fn gemm(&mut self, _: &mut Device, _: &Gemm) -> Result<()> {
        match self.never {}
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use std::collections::HashMap;
    use std::sync::OnceLock;

    use cudarc::cublaslt::{result, result::CublasError, sys};

    use super::*;
    use crate::backend::cuda::device::DeviceBuf;
    use crate::error::Error;

    /// What NVIDIA advises for Hopper; less slows wide products on smaller GPUs by nothing.
    const WORKSPACE_BYTES: usize = 32 << 20;

    /// Shapes whose algorithm is remembered. A prompt's last chunk may be of any length.
    const MAX_PLANS: usize = 1024;

    /// `CUBLAS_OP_T`, which cublas_api.h holds and cudarc's module does not.
    const TRANSPOSED: i32 = 1;

    const SYMBOLS: [&std::ffi::CStr; 12] = [
        c"cublasLtCreate",
        c"cublasLtDestroy",
        c"cublasLtMatmul",
        c"cublasLtMatmulAlgoGetHeuristic",
        c"cublasLtMatmulDescCreate",
        c"cublasLtMatmulDescDestroy",
        c"cublasLtMatmulDescSetAttribute",
        c"cublasLtMatmulPreferenceCreate",
        c"cublasLtMatmulPreferenceDestroy",
        c"cublasLtMatmulPreferenceSetAttribute",
        c"cublasLtMatrixLayoutCreate",
        c"cublasLtMatrixLayoutDestroy",
    ];

    /// cudarc panics where the library or a symbol is missing; this looks first.
    fn load() -> Result<()> {
        static LOADED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            // SAFETY: loads the vendor's library.
            if !unsafe { sys::is_culib_present() } {
                return Err(
                    "libcublasLt was not found: install cuBLAS of the CUDA toolkit (PyPI: nvidia-cublas) and put \
                            its folder on LD_LIBRARY_PATH"
                        .into(),
                );
            }
            for symbol in SYMBOLS {
                // SAFETY: the library is there; the address is looked up, not used.
                if unsafe { sys::culib().get::<*const c_void>(symbol) }.is_err() {
                    return Err(format!("libcublasLt is too old: it has no {}", symbol.to_string_lossy()));
                }
            }
            Ok(())
        });
        loaded.clone().map_err(|why| Error::CudaUnavailable { why })
    }

    /// A handle, its workspace, and the algorithms found so far. For the stream of one device.
    pub struct Cublas {
        handle: sys::cublasLtHandle_t,
        workspace: DeviceBuf<u8>,
        plans: HashMap<Key, sys::cublasLtMatmulAlgo_t>,
    }

    // SAFETY: a handle may be used from any thread; `gemm` has it to itself.
    unsafe impl Send for Cublas {}

    /// What the choice of an algorithm depends on.
    #[derive(Clone, Copy, PartialEq, Eq, Hash)]
    struct Key {
        num_rows: usize,
        in_features: usize,
        out_features: usize,
        dtype: DType,
        has_bias: bool,
        /// Largest powers of two, up to 256, that divide the addresses of w, x and y.
        alignment: [u32; 3],
    }

    impl Cublas {
        /// Loads the library and takes a workspace on `device`.
        pub fn open(device: &Device) -> Result<Self> {
            device.raw_stream("cublas")?;
            load()?;
            let workspace = device.alloc(WORKSPACE_BYTES)?;
            Ok(Self { handle: result::create_handle().map_err(failed)?, workspace, plans: HashMap::new() })
        }

        /// See [`Gemm`]. Can be a part of a graph.
        pub fn gemm(&mut self, device: &mut Device, p: &Gemm) -> Result<()> {
            let stream = device.raw_stream("gemm")?;
            if p.num_rows == 0 || p.out_features == 0 {
                return Ok(());
            }
            let work = Descriptors::new(p).map_err(failed)?;
            let key = key(p);
            let algorithm = match self.plans.get(&key) {
                Some(algorithm) => *algorithm,
                None => {
                    let found = work.choose(self.handle, &key).map_err(failed)?;
                    if self.plans.len() >= MAX_PLANS {
                        self.plans.clear();
                    }
                    self.plans.insert(key, found);
                    found
                }
            };
            let (one, zero) = (1.0f32, 0.0f32);
            // SAFETY: descriptors made for these shapes; the addresses are the caller's promise, as for a launch; the
            // stream is the device's and its context current; the workspace is used in stream order.
            let done = unsafe {
                result::matmul(
                    self.handle,
                    work.product,
                    (&raw const one).cast(),
                    (&raw const zero).cast(),
                    p.w,
                    work.w,
                    p.x,
                    work.x,
                    p.y.cast(),
                    work.y,
                    p.y.cast(),
                    work.y,
                    &algorithm,
                    self.workspace.ptr_mut().cast(),
                    WORKSPACE_BYTES,
                    stream.cast(),
                )
            };
            done.map_err(failed)?;
            device.after("gemm")
        }
    }

    impl Drop for Cublas {
        fn drop(&mut self) {
            // SAFETY: its owner.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }

    fn failed(e: CublasError) -> Error {
        Error::Cuda { op: "gemm", code: e.0 as i32, name: "cuBLASLt", what: format!("{:?}", e.0) }
    }

    fn key(p: &Gemm) -> Key {
        let alignment = |address: usize| 1 << address.trailing_zeros().min(8);
        Key {
            num_rows: p.num_rows,
            in_features: p.in_features,
            out_features: p.out_features,
            dtype: p.dtype,
            has_bias: !p.bias.is_null(),
            alignment: [p.w.addr(), p.x.addr(), p.y.addr()].map(alignment),
        }
    }

    /// The product and its matrices, as cuBLASLt wants them described; null where not made yet.
    struct Descriptors {
        product: sys::cublasLtMatmulDesc_t,
        w: sys::cublasLtMatrixLayout_t,
        x: sys::cublasLtMatrixLayout_t,
        y: sys::cublasLtMatrixLayout_t,
    }

    impl Descriptors {
        fn new(p: &Gemm) -> std::result::Result<Self, CublasError> {
            use sys::cublasLtMatmulDescAttributes_t as Attribute;
            let element = match p.dtype {
                DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
                DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
                DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            };
            let float = sys::cudaDataType_t::CUDA_R_32F;
            let (product, none) = (std::ptr::null_mut(), std::ptr::null_mut());
            let mut all = Self { product, w: none, x: none, y: none };
            all.product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)?;
            let (rows, inner, outer) = (p.num_rows as u64, p.in_features as u64, p.out_features as u64);
            // Column-major: a row-major matrix is its transpose.
            all.w = result::create_matrix_layout(element, inner, outer, inner as i64)?;
            all.x = result::create_matrix_layout(element, inner, rows, inner as i64)?;
            all.y = result::create_matrix_layout(float, outer, rows, outer as i64)?;
            all.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
            if !p.bias.is_null() {
                all.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
                all.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias)?;
            }
            Ok(all)
        }

        fn set<T>(&self, what: sys::cublasLtMatmulDescAttributes_t, value: &T) -> std::result::Result<(), CublasError> {
            // SAFETY: a live descriptor; each attribute is set with the type the documentation gives it.
            unsafe { result::set_matmul_desc_attribute(self.product, what, (&raw const *value).cast(), size_of::<T>()) }
        }

        /// The fastest algorithm by cuBLASLt's own estimate, among those that repeat bit for bit.
        fn choose(
            &self,
            handle: sys::cublasLtHandle_t,
            key: &Key,
        ) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
            use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
            let preference = Preference(result::create_matmul_pref()?);
            let in_workspace = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            let [w, x, y] = key.alignment;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &in_workspace)?;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w)?;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x)?;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &y)?;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &y)?;
            // SAFETY: all alive.
            let best = unsafe {
                result::get_matmul_algo_heuristic(handle, self.product, self.w, self.x, self.y, self.y, preference.0)
            };
            best.map(|best| best.algo)
        }
    }

    impl Drop for Descriptors {
        fn drop(&mut self) {
            // SAFETY: their owner, and those that were made only.
            unsafe {
                if !self.product.is_null() {
                    let _ = result::destroy_matmul_desc(self.product);
                }
                for layout in [self.w, self.x, self.y].into_iter().filter(|layout| !layout.is_null()) {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
    }

    struct Preference(sys::cublasLtMatmulPreference_t);

    impl Preference {
        fn set<T>(
            &self,
            what: sys::cublasLtMatmulPreferenceAttributes_t,
            value: &T,
        ) -> std::result::Result<(), CublasError> {
            // SAFETY: a live preference; each attribute is set with the type the documentation gives it.
            unsafe { result::set_matmul_pref_attribute(self.0, what, (&raw const *value).cast(), size_of::<T>()) }
        }
    }

    impl Drop for Preference {
        fn drop(&mut self) {
            // SAFETY: its owner.
            let _ = unsafe { result::destroy_matmul_pref(self.0) };
        }
    }
}
