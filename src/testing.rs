//! Float64 oracles, fills and tolerances, shared by tests and benches.

pub mod fill;
pub mod oracle;
