//! The decoder, layer by layer, written once for prefill and decode.

pub mod family;
mod fields;
pub mod weights;
