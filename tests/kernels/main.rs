//! The CPU ops against float64 oracles, and the law that a row's bits depend on its own tokens alone.

mod attention;
#[cfg(all(rksc_op = "silu_mul", rksc_op = "gather_rows"))]
mod cuda_device;
mod cuda_elementwise;
mod cuda_row_stats;
mod cuda_sample;
#[allow(dead_code)]
mod device;
mod elementwise;
mod emulation;
mod linear;
mod row_stats;
