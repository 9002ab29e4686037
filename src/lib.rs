//! A transformer inference engine for multi-branch reasoning: one problem, many branches, one verified answer.
//!
//! ```text
//! problem - tokenizer - tree - scheduler - batch + attention plan - model (layer by layer) - backend ops - kernels
//!                        ^  |                                        | after each layer: LayerGate
//!                        |  +- block tables - block pool - prefix cache
//!                        +---- StepGate <---- sampler + row statistics <---- logits
//!                                 |
//!                  verify - select - report
//! ```

pub mod backend;
pub mod batch;
#[cfg(feature = "bundled-model")]
pub mod bundled;
pub mod dtype;
pub mod error;
pub mod kv;
pub mod model;
#[doc(hidden)]
pub mod testing;
pub mod tokenizer;

pub use dtype::DType;
pub use error::{Error, ErrorCode, Result};
