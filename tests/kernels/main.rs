//! The CPU ops against float64 oracles, and the law that a row's bits depend on its own tokens alone.

mod attention;
mod elementwise;
mod linear;
mod row_stats;
