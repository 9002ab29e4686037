//! Float64 oracles, fills and tolerances, shared by tests and benches.

pub mod attention;
pub mod branch_similarity;
pub mod clairvoyant;
pub mod entropy_probe;
pub mod fill;
pub mod kv_compact;
pub mod kv_scores;
mod linear;
pub mod linear_quantised;
pub mod oracle;
pub mod sample;

pub use linear::{epsilon, fill, global_difference, linear_oracle, round_to, tensor};
