//! The CPU backend.

pub mod attention;
pub mod elem;
pub mod elementwise;
pub mod norm;
pub mod pool;
pub mod rope;
pub mod row_stats;
pub mod simd;
pub mod vector;
