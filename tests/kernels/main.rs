//! Every op against float64 oracles: on the CPU, where a row's bits depend on its own tokens alone, and the CUDA kernels
//! on every device there is, which on the emulated one means three warp orders with the same bits.

mod attention;
mod attention_mass;
mod attention_window;
mod branch_similarity;
mod cuda_attention;
mod cuda_attention_window;
mod cuda_branch_similarity;
mod cuda_device;
mod cuda_elementwise;
mod cuda_entropy_probe;
mod cuda_linear;
mod cuda_linear_quantised;
mod cuda_row_stats;
mod cuda_sample;
#[allow(dead_code)]
mod device;
mod elementwise;
mod emulation;
mod entropy_probe;
mod exit_rows;
mod kv_compact;
mod kv_scores;
mod kv_transfer;
mod linear;
mod linear_quantised;
mod options;
mod probes;
mod query_ring;
mod routed_linear;
mod row_stats;
