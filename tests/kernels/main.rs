//! The CPU ops against float64 oracles, and the law that a row's bits depend on its own tokens alone.

mod attention;
mod cuda_branch_similarity;
#[cfg(all(rksc_op = "silu_mul", rksc_op = "gather_rows"))]
mod cuda_device;
mod cuda_kv;
mod cuda_kv_compact;
#[allow(dead_code)]
mod device;
mod elementwise;
mod linear;
mod row_stats;
