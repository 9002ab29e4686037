//! The harness of the kernel tests: runs a case on every device there is.
//!
//! ```text
//! for_each_device("glu f32 3x48", |dev| {
//!     let gate_up = dev.buffer(&host)?;                        // f32
//!     let mut y = dev.zeroed::<u8>(len * dtype.size_bytes())?; // elements of `dtype`
//!     let params = rksc_glu_params { gate_up: gate_up.ptr(), y: y.ptr_mut().cast(), .. };
//!     dev.launch(dev.kernels().glu, &params)?;
//!     let y = widened(dev, dtype, &y)?;
//!     assert_close("glu f32 3x48", dtype, 1e-5, &wide(&y), &want);
//!     Ok(bits(&y))
//! });
//! ```

use std::io::Write;
use std::sync::{Mutex, Once, PoisonError};

use half::{bf16, f16};
use rksc::backend::cuda::device::{Device, DeviceBuf, WarpOrder};
use rksc::{DType, Error, Result};

pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

const ORDERS: [WarpOrder; 3] = [WarpOrder::Forward, WarpOrder::Backward, WarpOrder::Seeded(0x5eed)];

/// One GPU device for all tests of the process: opening one is slow, and cases on it queue up anyway.
static GPU: Mutex<Option<Device>> = Mutex::new(None);

/// Runs `case` on the emulated device in three warp orders, and twice on GPU 0 where there is one. `case` checks its
/// results and returns their bits, which must be the same in every run on one device. `RKSC_SKIP_EMULATION=1` leaves the
/// emulation out, for a visit to a GPU.
pub(crate) fn for_each_device(what: &str, case: impl Fn(&mut Device) -> Result<Vec<u32>>) {
    let mut first: Option<Vec<u32>> = None;
    let orders = if is_set("RKSC_SKIP_EMULATION") { &[][..] } else { &ORDERS };
    for &order in orders {
        let mut dev = Device::emulated().unwrap_or_else(|e| panic!("{what}: {e}"));
        dev.set_warp_order(order);
        let got = case(&mut dev).unwrap_or_else(|e| panic!("{what} in order {order:?}: {e}"));
        let first = first.get_or_insert_with(|| got.clone());
        assert_same(&format!("{what} in order {order:?}"), &got, first);
    }
    on_gpu(|dev| {
        let mut run = || case(dev).unwrap_or_else(|e| panic!("{what} on {}: {e}", dev.info().device));
        let first = run();
        assert_same(&format!("{what} on a GPU, again"), &run(), &first);
    });
}

/// Runs `case` on GPU 0. Without one it says so, once, or fails where `RKSC_REQUIRE_CUDA=1` asks for one.
fn on_gpu(case: impl FnOnce(&mut Device)) {
    static SKIPPED: Once = Once::new();
    let mut gpu = GPU.lock().unwrap_or_else(PoisonError::into_inner);
    if gpu.is_none() {
        match Device::gpu(0) {
            Ok(device) => *gpu = Some(device),
            Err(e) if is_set("RKSC_REQUIRE_CUDA") => {
                panic!("RKSC_REQUIRE_CUDA=1: {e}")
            }
            // Not through the macros, which the test runner keeps to itself.
            Err(e) => {
                return SKIPPED.call_once(|| {
                    let _ = writeln!(std::io::stderr(), "skipped: no CUDA device, emulated kernels alone ({e})");
                });
            }
        }
    }
    // A case that fails takes its device with it, which may be lost or in the middle of a capture.
    if let Some(mut device) = gpu.take() {
        case(&mut device);
        *gpu = Some(device);
    }
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}

fn assert_same(what: &str, got: &[u32], want: &[u32]) {
    assert_eq!(got.len(), want.len(), "{what}: number of results");
    if let Some(i) = (0..got.len()).find(|&i| got[i] != want[i]) {
        let (g, w) = (got[i], want[i]);
        panic!("{what}: index {i}: bits {g:#x} ({}), before {w:#x} ({})", f32::from_bits(g), f32::from_bits(w));
    }
}

/// `x` in `dtype` on the device; pass `buf.ptr().cast()`.
pub(crate) fn narrowed(dev: &mut Device, dtype: DType, x: &[f32]) -> Result<DeviceBuf<u8>> {
    let bytes: Vec<u8> = match dtype {
        DType::F32 => x.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        DType::Bf16 => x.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()).collect(),
        DType::F16 => x.iter().flat_map(|&x| f16::from_f32(x).to_ne_bytes()).collect(),
    };
    dev.buffer(&bytes)
}

/// All of a buffer of `dtype`, widened.
pub(crate) fn widened(dev: &mut Device, dtype: DType, buf: &DeviceBuf<u8>) -> Result<Vec<f32>> {
    let bytes = dev.to_vec(buf)?;
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    Ok(match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
        DType::Bf16 => halves().map(|b| bf16::from_ne_bytes(b).to_f32()).collect(),
        DType::F16 => halves().map(|b| f16::from_ne_bytes(b).to_f32()).collect(),
    })
}

/// `x` as it is after [`narrowed`]: what an oracle must be given.
pub(crate) fn rounded(dtype: DType, x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| rksc::testing::oracle::round(dtype, f64::from(x))).collect()
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// What [`for_each_device`] compares.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The launcher must have refused the params: `cudaErrorInvalidValue`.
#[track_caller]
pub(crate) fn assert_refused(result: Result<()>) {
    match result {
        Err(Error::Cuda { code: 1, .. }) => {}
        other => panic!("not refused: {other:?}"),
    }
}
