//! Every kernel against a float64 oracle, and the promises about bits.

mod linear;
