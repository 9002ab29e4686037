//! The launchers as a table: one field per op, filled from the objects for a GPU or from those for the host.
//!
//! A [`Launcher`] can only be made here, so that what [`Device::launch`](super::device::Device::launch) calls is always a
//! launcher of `include/rksc_kernels.h` with the params it was declared with.

use std::ffi::c_void;

use super::bindings::*;

/// A launcher of one op.
pub struct Launcher<P> {
    op: &'static str,
    function: unsafe extern "C" fn(*const P, rksc_stream) -> i32,
}

impl<P> Clone for Launcher<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Launcher<P> {}

impl<P> Launcher<P> {
    /// The op's name, as errors spell it.
    pub fn op(&self) -> &'static str {
        self.op
    }

    /// Calls it; the code is a `cudaError_t`.
    ///
    /// # Safety
    /// `stream` belongs to the device that the table was filled for, and is alive.
    pub(super) unsafe fn call(&self, params: &P, stream: *mut c_void) -> i32 {
        // SAFETY: `function` is the launcher declared with this P; it reads `params` during the call only. The caller
        // vouches for the stream.
        unsafe { (self.function)(params, stream) }
    }
}

/// `u32`, once per argument.
macro_rules! u32_for {
    ($argument:ident) => {
        u32
    };
}

macro_rules! kernels {
    (
        launchers { $($op:tt $field:ident($params:ident) $native:ident $emulated:ident;)* }
        workspaces { $($size:ident($($argument:ident),*) $native_size:ident $emulated_size:ident;)* }
    ) => {
        /// One launcher per op, and what its scratch needs.
        pub struct Kernels {
            $(
                #[doc = concat!("See `", stringify!($params), "` in `rksc_kernels.h`.")]
                pub $field: Launcher<$params>,
            )*
            $($size: unsafe extern "C" fn($(u32_for!($argument)),*) -> usize,)*
        }

        impl Kernels {
            /// The kernels compiled for GPUs.
            #[cfg(feature = "cuda")]
            pub fn native() -> Self {
                Self {
                    $($field: Launcher { op: $op, function: $native },)*
                    $($size: $native_size,)*
                }
            }

            /// The same files compiled for the host.
            #[cfg(feature = "emulated-kernels")]
            pub fn emulated() -> Self {
                Self {
                    $($field: Launcher { op: $op, function: $emulated },)*
                    $($size: $emulated_size,)*
                }
            }

            $(
                /// Bytes of scratch the op needs for this shape; zeroed once, then left as the op leaves it.
                pub fn $size(&self, $($argument: usize),*) -> usize {
                    // A size past u32 is refused by the launcher; here it only must not wrap to a small one.
                    $(let $argument = u32::try_from($argument).unwrap_or(u32::MAX);)*
                    // SAFETY: a pure function of its arguments.
                    unsafe { (self.$size)($($argument),*) }
                }
            )*
        }

        /// Every params struct with its size, for the test against the header.
        #[cfg(test)]
        const PARAMS: &[(&str, usize)] = &[$((stringify!($params), size_of::<$params>())),*];
    };
}

kernels! {
    launchers {
        "embed" embed(rksc_embed_params) rksc_embed rksc_emu_embed;
        "add_rms_norm" add_rms_norm(rksc_add_rms_norm_params) rksc_add_rms_norm rksc_emu_add_rms_norm;
        "exit_rows" exit_rows(rksc_exit_rows_params) rksc_exit_rows rksc_emu_exit_rows;
        "linear" linear(rksc_linear_params) rksc_linear rksc_emu_linear;
        "linear_w4" linear_w4(rksc_linear_w4_params) rksc_linear_w4 rksc_emu_linear_w4;
        "linear_w8" linear_w8(rksc_linear_w8_params) rksc_linear_w8 rksc_emu_linear_w8;
        "rope_append" rope_append(rksc_rope_append_params) rksc_rope_append rksc_emu_rope_append;
        "kv_copy_blocks" kv_copy_blocks(rksc_kv_copy_blocks_params) rksc_kv_copy_blocks rksc_emu_kv_copy_blocks;
        "kv_transfer" kv_transfer(rksc_kv_transfer_params) rksc_kv_transfer rksc_emu_kv_transfer;
        "paged_attention" paged_attention(rksc_paged_attention_params) rksc_paged_attention rksc_emu_paged_attention;
        "attention_mass" attention_mass(rksc_attention_mass_params) rksc_attention_mass rksc_emu_attention_mass;
        "glu" glu(rksc_glu_params) rksc_glu rksc_emu_glu;
        "gather_rows" gather_rows(rksc_gather_rows_params) rksc_gather_rows rksc_emu_gather_rows;
        "softcap" softcap(rksc_softcap_params) rksc_softcap rksc_emu_softcap;
        "gather_columns" gather_columns(rksc_gather_columns_params) rksc_gather_columns rksc_emu_gather_columns;
        "row_stats" row_stats(rksc_row_stats_params) rksc_row_stats rksc_emu_row_stats;
        "sample" sample(rksc_sample_params) rksc_sample rksc_emu_sample;
        "entropy_probe" entropy_probe(rksc_entropy_probe_params) rksc_entropy_probe rksc_emu_entropy_probe;
        "branch_similarity" branch_similarity(rksc_branch_similarity_params) rksc_branch_similarity rksc_emu_branch_similarity;
        "kv_scores" kv_scores(rksc_kv_scores_params) rksc_kv_scores rksc_emu_kv_scores;
        "kv_compact" kv_compact(rksc_kv_compact_params) rksc_kv_compact rksc_emu_kv_compact;
    }
    workspaces {
        linear_workspace_bytes(num_rows, in_features, out_features)
            rksc_linear_workspace_bytes rksc_emu_linear_workspace_bytes;
        row_stats_workspace_bytes(num_rows, vocab)
            rksc_row_stats_workspace_bytes rksc_emu_row_stats_workspace_bytes;
        entropy_probe_workspace_bytes(num_rows, hidden, num_outputs)
            rksc_entropy_probe_workspace_bytes rksc_emu_entropy_probe_workspace_bytes;
        branch_similarity_workspace_bytes(num_layers, num_branches)
            rksc_branch_similarity_workspace_bytes rksc_emu_branch_similarity_workspace_bytes;
        kv_scores_workspace_bytes(num_slots, num_queries, num_q_heads, num_kv_heads, head_dim)
            rksc_kv_scores_workspace_bytes rksc_emu_kv_scores_workspace_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_sizes_the_header_states() {
        let mut ours = PARAMS.to_vec();
        ours.extend([
            ("rksc_block_copy", size_of::<rksc_block_copy>()),
            ("rksc_slot_transfer", size_of::<rksc_slot_transfer>()),
            ("rksc_attention_item", size_of::<rksc_attention_item>()),
            ("rksc_attention_group", size_of::<rksc_attention_group>()),
            ("rksc_mass_sequence", size_of::<rksc_mass_sequence>()),
            ("rksc_statistics", size_of::<rksc_statistics>()),
            ("rksc_sample_row", size_of::<rksc_sample_row>()),
            ("rksc_sampled", size_of::<rksc_sampled>()),
        ]);
        let header = include_str!("../../../include/rksc_kernels.h");
        let structs = header.matches("typedef struct ").count();
        let mut stated = 0;
        for line in header.lines().filter_map(|line| line.strip_prefix("RKSC_LAYOUT(")) {
            let (name, bytes) = line.trim_end_matches(");").split_once(", ").unwrap();
            let found = ours.iter().find(|(ours, _)| *ours == name).map(|(_, bytes)| bytes.to_string());
            assert_eq!(found.as_deref(), Some(bytes), "{name}");
            stated += 1;
        }
        // rksc_block_copy and the items of attention are plain u32 fields: bindgen's own assertions cover them.
        assert!(
            stated >= PARAMS.len() && structs <= ours.len(),
            "{stated} stated, {structs} structs, {} known",
            ours.len()
        );
    }
}
