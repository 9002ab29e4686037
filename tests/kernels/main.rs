//! The CPU ops against float64 oracles, and the law that a row's bits depend on its own tokens alone.

mod attention;
#[cfg(all(rksc_op = "paged_attention", rksc_op = "attention_mass"))]
mod cuda_attention;
#[cfg(all(rksc_op = "silu_mul", rksc_op = "gather_rows"))]
mod cuda_device;
mod cuda_elementwise;
mod cuda_row_stats;
mod cuda_sample;
#[cfg(rksc_op = "entropy_probe")]
mod cuda_entropy_probe;
#[cfg(rksc_op = "linear")]
mod cuda_linear;
#[cfg(rksc_op = "linear_w4")]
mod cuda_linear_w4;
#[allow(dead_code)]
mod device;
mod elementwise;
mod emulation;
mod linear;
mod row_stats;
