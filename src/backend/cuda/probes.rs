//! The ops that gates and eviction ask with: `entropy_probe`, `branch_similarity`, `attention_mass`.
//!
//! Their answers go to the host, or depend on what the host just decided, so a pass with one of them is never a
//! recording.

use super::bindings::*;
use super::graphs::Mode;
use super::ops::{code, window_code};
use super::{Cuda, grow, put};
use crate::backend::{AttentionMass, BranchSimilarity, EntropyProbe, Similarity, checks};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::KvLayout;

/// Candidates that `entropy_probe` holds in shared memory.
const MAX_CANDIDATES: usize = 1024;
/// Branches that `branch_similarity` compares in one launch.
const MAX_BRANCHES: usize = 64;

impl Cuda {
    /// An op that reads back or uploads cannot be part of a recording.
    pub(super) fn outside_recording(&self, op: &'static str) -> Result<()> {
        match self.graphs.mode() {
            Mode::Launch => Ok(()),
            Mode::Record | Mode::Skip => Err(Error::Internal(format!("{op} in a pass that is said to be repeatable"))),
        }
    }

    /// See [`EntropyProbe`].
    pub(super) fn probe_entropy(&mut self, p: EntropyProbe<'_, Self>) -> Result<()> {
        let op = "entropy_probe";
        self.outside_recording(op)?;
        let w = p.w;
        if p.hidden != w.in_features {
            let got = format!("{} columns", w.in_features);
            return Err(Error::Shape { op, expected: format!("an unembedding of width {}", p.hidden), got });
        }
        let row_bytes = (w.in_features * w.dtype.size_bytes()) as u64;
        let weight_bytes = p.candidates.map_or(w.num_bytes(), |ids| ids.len() as u64 * row_bytes);
        self.launched().weight_bytes += weight_bytes;
        let (device, graphs, scratch) = (&mut self.device, &mut self.graphs, &mut self.scratch);
        let (mut candidates, mut workspace) = (std::ptr::null(), std::ptr::null_mut());
        match p.candidates {
            Some(ids) => {
                checks::candidates(ids, w.out_features)?;
                if ids.len() > MAX_CANDIDATES {
                    let what = format!("{} candidates (it takes {MAX_CANDIDATES}, or the vocabulary)", ids.len());
                    return Err(Error::Unsupported { op: "entropy_probe on a CUDA device", what });
                }
                candidates = put(device, graphs, &mut scratch.candidates, bytemuck::cast_slice(ids))?.cast();
            }
            None => {
                let bytes = device.kernels().entropy_probe_workspace_bytes(p.num_rows, p.hidden, w.out_features);
                workspace = grow(device, graphs, &mut scratch.probe, bytes)?;
            }
        }
        let stats = grow(device, graphs, &mut scratch.stats, p.num_rows * size_of::<rksc_statistics>())?;
        let params = rksc_entropy_probe_params {
            x: p.x.at(op, DType::F32, 0, p.num_rows * p.hidden)?.cast(),
            norm_weight: p.norm.map_or(Ok(std::ptr::null()), |n| n.at(op, DType::F32, 0, p.hidden))?.cast(),
            w: w.dense(op)?.ptr().cast(),
            candidates,
            chosen: std::ptr::null(),
            stats: stats.cast(),
            chosen_logprob: std::ptr::null_mut(),
            workspace: workspace.cast(),
            num_rows: p.num_rows as u32,
            hidden: p.hidden as u32,
            vocab: w.out_features as u32,
            num_candidates: p.candidates.map_or(0, <[u32]>::len) as u32,
            dtype: code(w.dtype),
            eps: p.eps,
        };
        self.launch(self.device.kernels().entropy_probe, &params)
    }

    /// See [`BranchSimilarity`].
    pub(super) fn compare_branches(&mut self, p: BranchSimilarity<'_, Self>) -> Result<()> {
        let op = "branch_similarity";
        self.outside_recording(op)?;
        let (num_layers, n) = (p.layer_weights.len(), p.num_branches);
        checks::similarity(num_layers, n, p.hidden)?;
        if n > MAX_BRANCHES {
            let what = format!("{n} branches (it takes {MAX_BRANCHES})");
            return Err(Error::Unsupported { op: "branch_similarity on a CUDA device", what });
        }
        self.launched().read_backs += 1;
        let (device, graphs, scratch) = (&mut self.device, &mut self.graphs, &mut self.scratch);
        let bytes = device.kernels().branch_similarity_workspace_bytes(num_layers, n);
        let workspace = grow(device, graphs, &mut scratch.similarities, bytes)?;
        // Another number of layers has its counters where this one may have had sums.
        if let Some(workspace) = &mut scratch.similarities {
            device.zero(workspace)?;
        }
        let weights = put(device, graphs, &mut scratch.layer_weights, bytemuck::cast_slice(p.layer_weights))?;
        // Words: to_root, pairwise, labels, above.
        let (pairwise, labels, above, end) = (n, n + n * n, 2 * n + n * n, 3 * n + n * n);
        let results: *mut u32 = grow(device, graphs, &mut scratch.similarity_results, 4 * end)?.cast();
        let params = rksc_branch_similarity_params {
            states: p.states.at(op, DType::F32, 0, num_layers * n * p.hidden)?.cast(),
            root: p.root.at(op, DType::F32, 0, num_layers * p.hidden)?.cast(),
            layer_weights: weights.cast(),
            to_root: results.cast(),
            pairwise: results.wrapping_add(pairwise).cast(),
            above: results.wrapping_add(above),
            labels: results.wrapping_add(labels),
            workspace: workspace.cast(),
            num_layers: num_layers as u32,
            num_branches: n as u32,
            hidden: p.hidden as u32,
            tau: p.tau,
        };
        self.launch(self.device.kernels().branch_similarity, &params)?;
        let mut words = vec![0u32; above];
        if let Some(results) = &self.scratch.similarity_results {
            self.device.download(results, 0, bytemuck::cast_slice_mut(&mut words))?;
        }
        let floats = |words: &[u32]| words.iter().map(|&w| f32::from_bits(w)).collect();
        *p.similarity = Similarity {
            to_root: floats(&words[..pairwise]),
            pairwise: floats(&words[pairwise..labels]),
            labels: words[labels..].to_vec(),
        };
        Ok(())
    }

    /// See [`AttentionMass`].
    pub(super) fn weigh_slots(&mut self, p: AttentionMass<'_, Self>) -> Result<()> {
        let op = "attention_mass";
        self.outside_recording(op)?;
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = *p.layout;
        let q_width = p.num_q_heads * head_dim;
        checks::window_and_softcap(op, p.window, p.softcap)?;
        let num_rows = p.sequences.iter().map(|s| s.rows.end).max().unwrap_or(0);
        let num_slots = checks::sequences(p.sequences, p.blocks, num_rows, p.layout)?;
        let slots_read: usize = p.sequences.iter().map(|s| s.slots_read(p.window)).sum();
        let counters = self.launched();
        counters.read_backs += 1;
        counters.kv_read_bytes += (slots_read * num_kv_heads * head_dim * dtype.size_bytes()) as u64;
        // The words of `rksc_mass_sequence`.
        let (mut sequences, mut mass_start) = (Vec::with_capacity(5 * p.sequences.len()), 0);
        for s in p.sequences {
            let words = [s.rows.start, s.rows.len(), s.block_start, s.kv_len, mass_start];
            sequences.extend(words.map(|w| w as u32));
            mass_start += s.kv_len;
        }
        let (device, graphs, scratch) = (&mut self.device, &mut self.graphs, &mut self.scratch);
        let sequences = put(device, graphs, &mut scratch.mass_sequences, bytemuck::cast_slice(&sequences))?;
        let blocks = put(device, graphs, &mut scratch.mass_blocks, bytemuck::cast_slice(p.blocks))?;
        let mass = grow(device, graphs, &mut scratch.mass, 4 * num_slots * num_kv_heads)?;
        let cache_len = p.layout.num_blocks * p.layout.block_elems();
        let params = rksc_attention_mass_params {
            q: p.q.at(op, dtype, 0, num_rows * q_width)?.cast(),
            k_cache: p.k_cache.at(op, dtype, 0, cache_len)?.cast(),
            lse: p.lse.at(op, DType::F32, 0, num_rows * p.num_q_heads)?.cast(),
            blocks: blocks.cast(),
            sequences: sequences.cast(),
            mass: mass.cast(),
            num_sequences: p.sequences.len() as u32,
            max_kv_len: p.sequences.iter().map(|s| s.kv_len).max().unwrap_or(0) as u32,
            num_q_heads: p.num_q_heads as u32,
            num_kv_heads: num_kv_heads as u32,
            head_dim: head_dim as u32,
            block_size: block_size as u32,
            dtype: code(dtype),
            sm_scale: p.sm_scale,
            window: window_code(p.window),
            softcap: p.softcap.unwrap_or(0.0),
        };
        self.launch(self.device.kernels().attention_mass, &params)?;
        p.mass.clear();
        p.mass.resize(num_slots * num_kv_heads, 0.0);
        match &self.scratch.mass {
            Some(found) => self.device.download(found, 0, bytemuck::cast_slice_mut(p.mass)),
            None => Ok(()),
        }
    }
}
