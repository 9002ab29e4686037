/* rksc_kernels.h -- the contract between cuda/ and src/backend/cuda: one params struct and one launcher per op.
 *
 * Launchers check, dispatch, launch and report: they never allocate, synchronise, print or throw. They return 0, or a
 * cudaError_t (1, cudaErrorInvalidValue, where the params break a limit stated at the kernel). Empty work is not an error.
 * All pointers are device pointers; params are read by the host during the call. Sizes are in elements unless a name
 * says otherwise. dtype is the compute type: activations, weights and KV alike.
 *
 * Terms: T rows; Hq, Hkv query and kv heads; D head_dim; group = Hq / Hkv; a slot is block_id * block_size + offset; K and V
 * of a layer are [num_blocks, Hkv, block_size, D]. lse is a natural logarithm.
 *
 * With RKSC_EMULATED the same launchers exist under rksc_emu_*, built from the same .cu files for the host.
 */
#ifndef RKSC_KERNELS_H
#define RKSC_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef RKSC_EMULATED
#define RKSC_FN(name) rksc_emu_##name
#else
#define RKSC_FN(name) rksc_##name
#endif

#ifdef __cplusplus
#define RKSC_LAYOUT(type, bytes) static_assert(sizeof(type) == (bytes), "layout of " #type)
extern "C" {
#else
#define RKSC_LAYOUT(type, bytes) _Static_assert(sizeof(type) == (bytes), "layout of " #type)
#endif

/* A cudaStream_t. */
typedef void* rksc_stream;

enum rksc_dtype { RKSC_F32 = 0, RKSC_BF16 = 1, RKSC_F16 = 2 };

/* Query rows (batch rows times group) that one attention work item may hold. */
#define RKSC_ATTENTION_MAX_ROWS 64
/* KV slots of an attention tile; tiles are anchored at a sequence's slot 0. */
#define RKSC_TILE_SLOTS 64
/* Rows of x that linear, linear_w4 and linear_w8 take in one launch. */
#define RKSC_SKINNY_MAX_ROWS 16
/* Slot of a padding row: nothing is written for it. */
#define RKSC_NO_SLOT 0xffffffffu
/* partial_start of a work item that writes its rows' results itself. */
#define RKSC_NO_PARTIAL 0xffffffffu

/* ---- embed: x[t] = table[ids[t]] * scale, widened to f32 ----------------------------------------------------- */
typedef struct rksc_embed_params {
  const void* table;   /* [vocab, hidden] dtype */
  const uint32_t* ids; /* [T] */
  float* x;            /* [T, hidden] */
  uint32_t num_rows, hidden, vocab, dtype;
  float scale; /* 1 keeps every bit */
  uint32_t reserved;
} rksc_embed_params;
RKSC_LAYOUT(rksc_embed_params, 48);
int32_t RKSC_FN(embed)(const rksc_embed_params* p, rksc_stream stream);

/* ---- add_rms_norm: x += delta, itself normed or not; y = x, normed or not; optional cosine before/after --------- */
typedef struct rksc_add_rms_norm_params {
  float* x;               /* [T, hidden], updated in place */
  const float* delta;     /* [T, hidden], or null: x stays */
  const float* post_norm; /* [hidden] weight of the norm that delta takes before it is added, or null; null without delta */
  const float* weight;    /* [hidden] weight of the norm of x that makes y, or null: y is x rounded */
  void* y;                /* [T, hidden] dtype, or null: not wanted */
  float* keep;            /* [T, hidden] receives x after the addition; null: not wanted */
  const float* reference; /* [T, hidden] what the cosine is taken against, not keep; null: x before the addition */
  float* similarity;      /* [T] cos(reference, x after), 0 where a norm is 0; null: not wanted */
  uint32_t num_rows, hidden, dtype;
  float eps;
} rksc_add_rms_norm_params;
RKSC_LAYOUT(rksc_add_rms_norm_params, 80);
int32_t RKSC_FN(add_rms_norm)(const rksc_add_rms_norm_params* p, rksc_stream stream);

/* ---- exit_rows: which rows use the second weight set from the next layer on -------------------------------------- */
enum rksc_exit_rule {
  RKSC_EXIT_ENTER = 0,     /* all rows: route = infinity, they are in the backbone */
  RKSC_EXIT_EVERY_NTH = 1, /* the last of the rows that decide is number offset, offset + every, ... */
  RKSC_EXIT_ABOVE = 2      /* of the n rows that decide, at most floor(share n) have a cosine that is not above tau */
};
typedef struct rksc_exit_rows_params {
  const uint32_t* exits;   /* [T, 2] the rows [start, end) that decide for the row; empty where the gate has no say */
  const float* similarity; /* [T], of add_rms_norm; RKSC_EXIT_ABOVE only */
  float* route;            /* [T] layers run in the backbone before the row left it; infinite while it is there */
  uint32_t num_rows, rule, every, offset;
  float tau, share;
  uint32_t whole_batch; /* 1: all rows that the gate has a say in leave, or none */
  uint32_t layer;       /* the layer just run, counted from 1 */
} rksc_exit_rows_params;
RKSC_LAYOUT(rksc_exit_rows_params, 56);
int32_t RKSC_FN(exit_rows)(const rksc_exit_rows_params* p, rksc_stream stream);

/* ---- linear: y = x W^T + bias for at most RKSC_SKINNY_MAX_ROWS rows --------------------------------------------
 * With a route a launch is for the rows of one side: side 1 those with route[t] < layer, side 0 the others. Rows of the
 * other side are not written; a launch without rows reads no weights. */
typedef struct rksc_linear_params {
  const void* x;      /* [T, in] dtype */
  const void* w;      /* [out, in] dtype */
  const float* bias;  /* [out], or null */
  float* y;           /* [T, out] */
  void* workspace;    /* rksc_linear_workspace_bytes (0: null will do); zeroed once, left with its counters zero, fit for any shape */
  const float* route; /* [T], or null: all rows */
  uint32_t num_rows, in_features, out_features, dtype;
  uint32_t y_stride;  /* floats from one row of y to the next; at least out */
  uint32_t layer, side, reserved;
} rksc_linear_params;
RKSC_LAYOUT(rksc_linear_params, 80);
int32_t RKSC_FN(linear)(const rksc_linear_params* p, rksc_stream stream);
size_t RKSC_FN(linear_workspace_bytes)(uint32_t num_rows, uint32_t in_features, uint32_t out_features);

/* ---- linear_w4: the same with weights of 4 bits: w[n, k] = (code - zero) * scale per group of k --------------------- */
enum rksc_zero { RKSC_ZERO_NONE = 0 /* 8 */, RKSC_ZERO_INTEGER = 1 /* u8 */, RKSC_ZERO_FRACTIONAL = 2 /* f16 */ };
typedef struct rksc_linear_w4_params {
  const void* x;          /* [T, in] bf16 or f16 */
  const uint32_t* codes;  /* [out, in / 8]: k ascending from the low nibble */
  const uint16_t* scales; /* [out, in / group] f16 */
  const void* zeros;      /* [out, in / group] as zero_kind says (u8: at most 127), or null */
  const float* bias;      /* [out], or null */
  float* y;               /* [T, out] */
  void* workspace;        /* rksc_linear_workspace_bytes (0: null will do); zeroed once, left with its counters zero, fit for any shape */
  const float* route;     /* [T], or null: all rows; see linear */
  uint32_t num_rows, in_features, out_features, group_size, zero_kind, dtype;
  uint32_t y_stride;      /* floats from one row of y to the next; at least out */
  uint32_t layer, side, reserved;
} rksc_linear_w4_params;
RKSC_LAYOUT(rksc_linear_w4_params, 104);
int32_t RKSC_FN(linear_w4)(const rksc_linear_w4_params* p, rksc_stream stream);

/* ---- linear_w8: the same with weights of 8 bits: w[n, k] = number(code) * scale per group of k ---------------------- */
enum rksc_number { RKSC_NUMBER_INTEGER = 0 /* code - 128; scales f16 */, RKSC_NUMBER_E4M3 = 1 /* no NaN; scales f32 */ };
typedef struct rksc_linear_w8_params {
  const void* x;          /* [T, in] bf16 or f16 */
  const uint32_t* codes;  /* [out, in / 4]: k ascending from the low byte */
  const void* scales;     /* [out, in / group] as number says */
  const float* bias;      /* [out], or null */
  float* y;               /* [T, out] */
  void* workspace;        /* rksc_linear_workspace_bytes (0: null will do); zeroed once, left with its counters zero, fit for any shape */
  const float* route;     /* [T], or null: all rows; see linear */
  uint32_t num_rows, in_features, out_features, group_size, number, dtype;
  uint32_t y_stride;      /* floats from one row of y to the next; at least out */
  uint32_t layer, side, reserved;
} rksc_linear_w8_params;
RKSC_LAYOUT(rksc_linear_w8_params, 96);
int32_t RKSC_FN(linear_w8)(const rksc_linear_w8_params* p, rksc_stream stream);

/* ---- gather_columns: dst[t, k] = src[t, columns[k]]: rows of x as codes with columns in another order want them ------ */
typedef struct rksc_gather_columns_params {
  const void* src;         /* [T, width] bf16 or f16 */
  const uint32_t* columns; /* [width], each below width */
  void* dst;               /* [T, width] dtype */
  uint32_t num_rows, width, dtype, reserved;
} rksc_gather_columns_params;
RKSC_LAYOUT(rksc_gather_columns_params, 40);
int32_t RKSC_FN(gather_columns)(const rksc_gather_columns_params* p, rksc_stream stream);

/* ---- rope_append: split qkv, q/k norm if given, RoPE (half-split), q out, k and v to their slots --------------------- */
enum rksc_norm_span {
  RKSC_NORM_HEAD = 0, /* each head by its own mean square; weights [D] */
  RKSC_NORM_ROW = 1   /* all of a row's q heads by one mean square, and all of its k heads; weights [Hq * D] and [Hkv * D] */
};
typedef struct rksc_rope_append_params {
  const float* qkv;          /* [T, (Hq + 2 Hkv) * D]: q heads, k heads, v heads */
  void* q;                   /* [T, Hq, D] dtype */
  void* query_ring;          /* [.., Hq, D] dtype: q once more, at ring_rows; or null */
  void* k_cache;             /* one layer */
  void* v_cache;             /* one layer */
  const uint32_t* positions; /* [T]: what RoPE uses; never derived from the slot */
  const uint32_t* slots;     /* [T], or RKSC_NO_SLOT */
  const uint32_t* ring_rows; /* [T] row of query_ring, no two alike, or RKSC_NO_SLOT; null: none */
  const float* inv_freq;     /* [rotary_dim / 2] radians per position; the angle is the f32 product */
  const float* q_norm;       /* weight as norm_span says, or null */
  const float* k_norm;       /* the same; null where q_norm is */
  uint32_t num_rows, num_q_heads, num_kv_heads, head_dim;
  uint32_t rotary_dim; /* elements of a head that turn, from element 0; the others pass */
  uint32_t block_size, dtype, norm_span;
  float rope_scale; /* multiplies cos and sin */
  float norm_eps;
} rksc_rope_append_params;
RKSC_LAYOUT(rksc_rope_append_params, 128);
int32_t RKSC_FN(rope_append)(const rksc_rope_append_params* p, rksc_stream stream);

/* ---- kv_copy_blocks: copy-on-write of block heads; destinations are distinct and no source ---------------------- */
typedef struct rksc_block_copy {
  uint32_t src, dst, num_slots; /* slots [0, num_slots) of src go to dst, for every kv head */
} rksc_block_copy;
typedef struct rksc_kv_copy_blocks_params {
  const rksc_block_copy* copies; /* [num_copies] */
  void* k_cache;
  void* v_cache;
  uint32_t num_copies, num_kv_heads, block_size, head_dim, dtype, reserved;
} rksc_kv_copy_blocks_params;
RKSC_LAYOUT(rksc_kv_copy_blocks_params, 48);
int32_t RKSC_FN(kv_copy_blocks)(const rksc_kv_copy_blocks_params* p, rksc_stream stream);

/* ---- kv_transfer: K and V of slots for other positions: V copied, K turned by the difference ---------------------- */
typedef struct rksc_slot_transfer {
  uint32_t src, dst; /* slots; destinations are distinct and no source */
  int32_t shift;     /* position of dst less that of src; 0 copies K bit for bit */
} rksc_slot_transfer;
RKSC_LAYOUT(rksc_slot_transfer, 12);
typedef struct rksc_kv_transfer_params {
  const rksc_slot_transfer* transfers; /* [num_transfers] */
  void* k_cache;                       /* one layer */
  void* v_cache;                       /* one layer */
  const float* inv_freq;               /* [rotary_dim / 2] radians per position; the angle is the f32 product */
  uint32_t num_transfers, num_kv_heads, block_size, head_dim;
  uint32_t rotary_dim; /* as in rope_append */
  uint32_t dtype;
} rksc_kv_transfer_params;
RKSC_LAYOUT(rksc_kv_transfer_params, 56);
int32_t RKSC_FN(kv_transfer)(const rksc_kv_transfer_params* p, rksc_stream stream);

/* ---- paged_attention: plan-driven; prefill, decode and shared segments in one launch ------------------------------ */
/* A run of slots read once for a contiguous range of ordered rows, per kv head. */
typedef struct rksc_attention_item {
  uint32_t row_start, num_rows;   /* ordered rows; num_rows * group <= RKSC_ATTENTION_MAX_ROWS */
  uint32_t slot_start, num_slots; /* sequence slots; slot_start is a multiple of RKSC_TILE_SLOTS */
  uint32_t block_start;           /* index in blocks of the block that holds slot_start */
  uint32_t group;                 /* its row group */
  uint32_t partial_start;         /* partial of its first row, or RKSC_NO_PARTIAL when it is its group's only item */
} rksc_attention_item;
/* A query tile: its items are consecutive, in slot order for each row; the last to arrive merges them in that order. */
typedef struct rksc_attention_group {
  uint32_t row_start, num_rows;
  uint32_t item_start, num_items;
} rksc_attention_group;
typedef struct rksc_paged_attention_params {
  const void* q;                      /* [T, Hq, D] dtype */
  const void* k_cache;                /* one layer */
  const void* v_cache;                /* one layer */
  void* o;                            /* [T, Hq, D] dtype */
  float* lse;                         /* [T, Hq] ln sum exp of the scores */
  const uint32_t* row_order;          /* [ordered rows] batch row */
  const uint32_t* kv_lens;            /* [ordered rows] slots up to the row's own; slots at or past it do not count */
  const uint32_t* blocks;             /* block ids of all items */
  const rksc_attention_item* items;   /* [max_items], of which the first *num_items count */
  const rksc_attention_group* groups; /* [number of groups] */
  const uint32_t* num_items;          /* read on the device, so that one graph serves many steps */
  float* partial_o;                   /* [partials, Hq, D] unnormalised */
  float* partial_ml;                  /* [partials, Hq, 2] running maximum of log2(e) times the scores, and sum */
  uint32_t* arrivals;                 /* [groups, Hkv]; zeroed once, left zeroed */
  uint32_t max_items;                 /* grid size: an upper bound of *num_items */
  uint32_t num_q_heads, num_kv_heads, head_dim, block_size, dtype;
  float sm_scale;
  uint32_t window;                    /* newest slots of kv_lens that a row attends to; 0: all */
  float softcap;                      /* scores are softcap * tanh(sm_scale q k / softcap); 0: sm_scale q k */
  uint32_t reserved;
} rksc_paged_attention_params;
RKSC_LAYOUT(rksc_paged_attention_params, 152);
int32_t RKSC_FN(paged_attention)(const rksc_paged_attention_params* p, rksc_stream stream);

/* ---- attention_mass: exp(score - lse) summed over a sequence's rows and the group ------------------------- */
typedef struct rksc_mass_sequence {
  uint32_t row_start, num_rows; /* its rows in q and lse */
  uint32_t block_start;         /* its table in blocks */
  uint32_t kv_len;              /* slots up to its last row's own; each earlier row one fewer */
  uint32_t mass_start;          /* its first slot in mass, in units of Hkv: mass[(mass_start * Hkv) + head * kv_len + slot] */
} rksc_mass_sequence;
typedef struct rksc_attention_mass_params {
  const void* q;                       /* [T, Hq, D] dtype */
  const void* k_cache;                 /* one layer */
  const float* lse;                    /* [T, Hq] */
  const uint32_t* blocks;              /* tables */
  const rksc_mass_sequence* sequences; /* [num_sequences] */
  float* mass;                         /* per sequence [Hkv, kv_len], written */
  uint32_t num_sequences, max_kv_len;
  uint32_t num_q_heads, num_kv_heads, head_dim, block_size, dtype;
  float sm_scale;
  uint32_t window; /* as in paged_attention */
  float softcap;
} rksc_attention_mass_params;
RKSC_LAYOUT(rksc_attention_mass_params, 88);
int32_t RKSC_FN(attention_mass)(const rksc_attention_mass_params* p, rksc_stream stream);

/* ---- glu: y = activation(gate) * up ----------------------------------------------------------------------------- */
enum rksc_activation {
  RKSC_SILU = 0,     /* g / (1 + e^-g) */
  RKSC_GELU_TANH = 1 /* g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) */
};
typedef struct rksc_glu_params {
  const float* gate_up; /* [T, 2 * intermediate]: gate, then up */
  void* y;              /* [T, intermediate] dtype */
  uint32_t num_rows, intermediate, activation, dtype;
} rksc_glu_params;
RKSC_LAYOUT(rksc_glu_params, 32);
int32_t RKSC_FN(glu)(const rksc_glu_params* p, rksc_stream stream);

/* ---- gather_rows: dst[i] = src[rows[i]] ------------------------------------------------------------------------- */
typedef struct rksc_gather_rows_params {
  const uint32_t* rows; /* [num_rows] */
  const float* src;     /* [T, width] */
  float* dst;           /* [num_rows, width] */
  uint32_t num_rows, width;
} rksc_gather_rows_params;
RKSC_LAYOUT(rksc_gather_rows_params, 32);
int32_t RKSC_FN(gather_rows)(const rksc_gather_rows_params* p, rksc_stream stream);

/* ---- softcap: logits = cap * tanh(logits / cap), in place --------------------------------------------------------- */
typedef struct rksc_softcap_params {
  float* logits; /* [num_rows, vocab] */
  uint32_t num_rows, vocab;
  float cap; /* above 0 */
  uint32_t reserved;
} rksc_softcap_params;
RKSC_LAYOUT(rksc_softcap_params, 24);
int32_t RKSC_FN(softcap)(const rksc_softcap_params* p, rksc_stream stream);

/* ---- row_stats: one sweep over logits --------------------------------------------------------------------------- */
typedef struct rksc_statistics {
  uint32_t argmax; /* ties: lowest id */
  float max, lse, entropy /* nats */, top1, margin /* largest minus second largest */;
  uint32_t finite; /* 1 when every logit was finite; else the other fields mean nothing */
} rksc_statistics;
RKSC_LAYOUT(rksc_statistics, 28);
typedef struct rksc_row_stats_params {
  const float* logits;   /* [num_rows, vocab] */
  rksc_statistics* stats; /* [num_rows] */
  void* workspace;       /* rksc_row_stats_workspace_bytes; zeroed once, left zeroed */
  uint32_t num_rows, vocab;
} rksc_row_stats_params;
RKSC_LAYOUT(rksc_row_stats_params, 32);
int32_t RKSC_FN(row_stats)(const rksc_row_stats_params* p, rksc_stream stream);
size_t RKSC_FN(row_stats_workspace_bytes)(uint32_t num_rows, uint32_t vocab);

/* ---- sample: biases, penalties, temperature, top-k, min-p, top-p, one seeded draw per row -------------------------------- */
typedef struct rksc_sample_row {
  uint64_t seed, path, position; /* the key of the draw: nothing else influences it */
  float temperature;             /* 0: the largest logit */
  float top_p, min_p;
  float repetition_penalty, presence_penalty, frequency_penalty;
  uint32_t top_k;                    /* 0: all */
  uint32_t history_start;            /* the row's tokens in history: prompt, then generated */
  uint32_t num_prompt, num_generated;
  uint32_t bias_start, num_bias;     /* tokens in history, no two alike and behind the row's own, then as many f32: added first */
} rksc_sample_row;
RKSC_LAYOUT(rksc_sample_row, 72);
typedef struct rksc_sampled {
  uint32_t token;
  float logit; /* as it came in */
} rksc_sampled;
typedef struct rksc_sample_params {
  float* logits;               /* [num_rows, vocab]; scratch afterwards where a row has penalties or biases */
  const rksc_sample_row* rows; /* [num_rows] */
  const uint32_t* history;     /* token ids; rows with penalties or biases share no part of it */
  float* saved;                /* [ids in history] scratch: logits as they came; null where no row has penalties or biases */
  rksc_sampled* sampled;       /* [num_rows] */
  uint32_t num_rows, vocab;
} rksc_sample_params;
RKSC_LAYOUT(rksc_sample_params, 48);
int32_t RKSC_FN(sample)(const rksc_sample_params* p, rksc_stream stream);

/* ---- entropy_probe: final norm + unembedding + statistics, without writing logits --------------------------------- */
typedef struct rksc_entropy_probe_params {
  const float* x;             /* [num_rows, hidden] residual rows, of one or several layers */
  const float* norm_weight;   /* [hidden], or null: x as it is */
  const void* w;              /* [vocab, hidden] dtype */
  const uint32_t* candidates; /* [num_candidates] token ids the softmax runs over, ascending; null: the vocabulary */
  const uint32_t* chosen;     /* [num_rows] token whose log-probability is wanted; null: none */
  rksc_statistics* stats;      /* [num_rows]; argmax is a token id */
  float* chosen_logprob;      /* [num_rows], or null */
  void* workspace;            /* rksc_entropy_probe_workspace_bytes, any contents; null with candidates; linear's may serve */
  uint32_t num_rows, hidden, vocab, num_candidates, dtype;
  float eps;
} rksc_entropy_probe_params;
RKSC_LAYOUT(rksc_entropy_probe_params, 88);
int32_t RKSC_FN(entropy_probe)(const rksc_entropy_probe_params* p, rksc_stream stream);
size_t RKSC_FN(entropy_probe_workspace_bytes)(uint32_t num_rows, uint32_t hidden, uint32_t num_outputs);

/* ---- branch_similarity: layer-weighted cosines to the root and pairwise, threshold flags, cluster labels ---------- */
typedef struct rksc_branch_similarity_params {
  const float* states;        /* [num_layers, num_branches, hidden] */
  const float* root;          /* [num_layers, hidden] */
  const float* layer_weights; /* [num_layers], summing to 1 */
  float* to_root;             /* [num_branches] */
  float* pairwise;            /* [num_branches, num_branches], symmetric, exactly 1 on the diagonal */
  uint32_t* above;            /* [num_branches] 1 where to_root >= tau */
  uint32_t* labels;           /* [num_branches] index of the cluster's representative */
  void* workspace;            /* rksc_branch_similarity_workspace_bytes; zeroed once, left with its counters zero */
  uint32_t num_layers, num_branches, hidden;
  float tau;
} rksc_branch_similarity_params;
RKSC_LAYOUT(rksc_branch_similarity_params, 80);
int32_t RKSC_FN(branch_similarity)(const rksc_branch_similarity_params* p, rksc_stream stream);
size_t RKSC_FN(branch_similarity_workspace_bytes)(uint32_t num_layers, uint32_t num_branches);

/* ---- kv_scores: R-KV importance and redundancy, no n x n matrix in memory ----------------------------------------- */
enum rksc_kv_variant {
  RKSC_KV_CODE = 0, /* column means without the links to the newest similar key (to slot 0 where there is none); pooled means */
  RKSC_KV_TEXT = 1, /* row means without the row's own such link; each query's attention pooled over [-size/2, size/2 - 1] */
  RKSC_KV_ALG1 = 2  /* row means as in the text; pooling as in the code */
};
typedef struct rksc_kv_scores_params {
  const void* queries;       /* [num_queries, Hq, D] dtype: the last post-RoPE queries, in any order */
  const void* k_cache;       /* one layer */
  const uint32_t* blocks;    /* the sequence's table */
  const uint32_t* positions; /* [Hkv, position_stride] of the slots, for recency; null: slot order */
  float* scores;             /* [Hkv, num_slots - window]: lambda * importance - (1 - lambda) * redundancy */
  float* importance;         /* [Hkv, num_slots - window] after pooling; null: not wanted */
  float* redundancy;         /* [Hkv, num_slots - window]; null: not wanted */
  void* workspace;           /* rksc_kv_scores_workspace_bytes; any contents */
  uint32_t num_slots;
  uint32_t window;          /* last slots that are no candidates; they take part in redundancy */
  uint32_t num_queries, pool_size, variant, num_q_heads, num_kv_heads, head_dim, block_size, dtype;
  float sm_scale;
  float lambda;             /* at 1, and without redundancy, keys are not compared */
  float threshold;
  uint32_t position_stride; /* slots from one head to the next in positions */
  float softcap;            /* as in paged_attention */
  uint32_t reserved;
} rksc_kv_scores_params;
RKSC_LAYOUT(rksc_kv_scores_params, 128);
int32_t RKSC_FN(kv_scores)(const rksc_kv_scores_params* p, rksc_stream stream);
size_t RKSC_FN(kv_scores_workspace_bytes)(uint32_t num_slots, uint32_t num_queries, uint32_t num_q_heads, uint32_t num_kv_heads,
                                          uint32_t head_dim);

/* ---- kv_compact: move kept slots down, in place, each kv head its own set ------------------------------------------- */
typedef struct rksc_kv_compact_params {
  void* k_cache;
  void* v_cache;
  uint32_t* positions;    /* [Hkv, capacity] moved along; null: none */
  const uint32_t* blocks; /* the sequence's table */
  const uint32_t* keep;   /* [Hkv, num_keep] slots, ascending: keep[h][i] goes to slot first_slot + i; keep[h][i] >= first_slot + i */
  uint32_t num_keep, first_slot, capacity, num_kv_heads, head_dim, block_size, dtype, reserved;
} rksc_kv_compact_params;
RKSC_LAYOUT(rksc_kv_compact_params, 72);
int32_t RKSC_FN(kv_compact)(const rksc_kv_compact_params* p, rksc_stream stream);

#ifdef __cplusplus
}
#endif
#endif
