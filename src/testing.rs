//! Float64 oracles, fills and tolerances, shared by tests and benches.

pub mod entropy_probe;
pub mod fill;
mod linear;
pub mod linear_w4;
pub mod oracle;

pub use linear::{epsilon, fill, global_difference, linear_oracle, round_to, tensor};
