//! The decoder, layer by layer, written once for prefill and decode.

pub mod family;
pub(crate) mod fields;
pub mod weights;
