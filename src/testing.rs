//! Float64 oracles, fills and tolerances, shared by tests and benches.

pub mod fill;
mod linear;
pub mod oracle;
pub mod sample;

pub use linear::{epsilon, fill, global_difference, linear_oracle, round_to, tensor};
