//! Float64 oracles, fills and tolerances, shared by tests and benches.
