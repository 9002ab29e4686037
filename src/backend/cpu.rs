//! The CPU backend.

pub mod linear;
pub mod matrix;
pub mod pool;
pub mod simd;
