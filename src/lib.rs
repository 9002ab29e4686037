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

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::unimplemented)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod assets;
pub mod backend;
pub mod batch;
#[cfg(feature = "bundled-model")]
pub mod bundled;
pub mod calibrate;
pub mod chat;
pub mod config;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod gate;
pub mod kv;
pub mod model;
pub mod openai;
pub mod problems;
pub mod prompts;
pub mod quant;
pub mod report;
pub mod sampler;
pub mod scheduler;
pub mod solver;
pub mod stats;
mod sync;
#[doc(hidden)]
pub mod testing;
pub mod tokenizer;
mod tree;

pub use config::{EngineConfig, ModelSource};
pub use dtype::DType;
pub use engine::Engine;
pub use error::{Error, ErrorCode, Result};
