// branch_similarity.cu -- how alike branches are: layer-weighted cosines of their states to the root's and to each other's,
// thresholded and clustered in the same launch. Which branches go on is decided elsewhere.
#include "mma.cuh"

namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kMaxBranches = 64;
// CTAs that share a layer's columns. 8 gives 224 CTAs for 28 layers, a wave and a half of an H100. Derived, not measured.
constexpr uint32_t kMaxSlices = 8;

struct SimilarityPlan {
  rksc_branch_similarity_params p;
  uint32_t* arrivals; // [num_layers] slices of a layer, then [1] layers
  float* partials;    // [num_layers, num_slices, num_pairs] dot products over a slice
  float* weighted;    // [num_layers, num_pairs] w_l cos
  uint32_t num_rows;  // branches, then the root
  uint32_t num_pairs; // of rows r <= s: pair_index
  uint32_t side;      // rows r, r + side, r + 2 side, r + 3 side make a thread's operand
  uint32_t num_tiles; // pairs of operands
  uint32_t num_splits; // threads that share a pair of operands, each its own columns
  uint32_t num_slices, num_chunks;
  uint32_t chunk; // columns in shared memory at a time
};

RKSC_DEVICE uint32_t pair_index(uint32_t r, uint32_t s) { return s * (s + 1) / 2 + r; }

// Columns [chunk_idx * chunk, + chunk) of all rows; zeros past `hidden`.
RKSC_DEVICE void load_chunk(const SimilarityPlan& plan, smem<float> rows, uint32_t layer, uint32_t chunk_idx) {
  const rksc_branch_similarity_params& p = plan.p;
  const uint32_t vecs = plan.chunk / 4;
  for (uint32_t i = threadIdx.x; i < plan.num_rows * vecs; i += kThreads) {
    const uint32_t row = i / vecs, col = (i % vecs) * 4, from = chunk_idx * plan.chunk + col;
    const gptr<const float> src =
        row < p.num_branches ? global<const float>(p.states) + (static_cast<uint64_t>(layer) * p.num_branches + row) * p.hidden
                             : global<const float>(p.root) + static_cast<uint64_t>(layer) * p.hidden;
    const smem<float> dst = rows + (row * (plan.chunk + 4) + col);
    if (p.hidden % 4 == 0) {
      const bool valid = from < p.hidden;
      cp_async_16<float>(dst, src + (valid ? from : 0), valid);
    } else {
      for (uint32_t e = 0; e < 4; ++e) {
        float x = 0.0f;
        if (from + e < p.hidden) x = src[from + e];
        dst[e] = x;
      }
    }
  }
  cp_async_commit();
}

// The operand pair of `tile`: i <= j, numbered along columns j.
RKSC_DEVICE void tile_pair(uint32_t tile, uint32_t& i, uint32_t& j) {
  j = 0;
  while ((j + 1) * (j + 2) / 2 <= tile) ++j;
  i = tile - j * (j + 1) / 2;
}

// Dot products of this CTA's slice of a layer, to `partials`.
RKSC_DEVICE void dot_slice(const SimilarityPlan& plan, uint32_t layer, uint32_t slice) {
  const uint32_t stride = plan.chunk + 4, stage_floats = plan.side * 4 * stride;
  const smem<float> stages = dynamic_shared<float>(0);
  const uint32_t tile = threadIdx.x % plan.num_tiles, split = threadIdx.x / plan.num_tiles;
  uint32_t i, j;
  tile_pair(tile, i, j);
  // Rows that only fill up the last operand.
  for (uint32_t x = plan.num_rows * stride + threadIdx.x; x < stage_floats; x += kThreads) {
    stages[x] = 0.0f;
    stages[stage_floats + x] = 0.0f;
  }
  float sum[4][4] = {};
  const uint32_t first = slice * plan.num_chunks / plan.num_slices, end = (slice + 1) * plan.num_chunks / plan.num_slices;
  load_chunk(plan, stages, layer, first);
  for (uint32_t chunk_idx = first; chunk_idx < end; ++chunk_idx) {
    cp_async_wait<0>();
    // This chunk is there for all, and nobody reads the other stage any more.
    __syncthreads();
    const uint32_t stage = (chunk_idx - first) % 2;
    if (chunk_idx + 1 < end) load_chunk(plan, stages + (1 - stage) * stage_floats, layer, chunk_idx + 1);
    const smem<float> rows = stages + stage * stage_floats;
    if (split < plan.num_splits) {
      for (uint32_t k = split; k < plan.chunk / 4; k += plan.num_splits) {
        vec<float, 4> a[4], b[4];
#pragma unroll
        for (uint32_t m = 0; m < 4; ++m) {
          a[m] = load_vec<4>(rows + ((i + m * plan.side) * stride + 4 * k));
          b[m] = load_vec<4>(rows + ((j + m * plan.side) * stride + 4 * k));
        }
#pragma unroll
        for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
          for (uint32_t n = 0; n < 4; ++n)
#pragma unroll
            for (uint32_t e = 0; e < 4; ++e) sum[m][n] = fmaf(a[m][e], b[n][e], sum[m][n]);
      }
    }
  }
  // The stages become the place where the splits meet.
  __syncthreads();
  if (split < plan.num_splits) {
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
      for (uint32_t n = 0; n < 4; ++n) stages[(split * 16 + m * 4 + n) * plan.num_tiles + tile] = sum[m][n];
  }
  __syncthreads();
  const gptr<float> partials =
      global<float>(plan.partials) + (static_cast<uint64_t>(layer) * plan.num_slices + slice) * plan.num_pairs;
  for (uint32_t x = threadIdx.x; x < plan.num_tiles * 16; x += kThreads) {
    const uint32_t of_tile = x % plan.num_tiles, mn = x / plan.num_tiles;
    tile_pair(of_tile, i, j);
    const uint32_t r = i + mn / 4 * plan.side, s = j + mn % 4 * plan.side;
    // Within one operand a pair comes up in both orders.
    if (r >= plan.num_rows || s >= plan.num_rows || (i == j && r > s)) continue;
    float dot = 0.0f;
    for (uint32_t of_split = 0; of_split < plan.num_splits; ++of_split) {
      dot += stages[(of_split * 16 + mn) * plan.num_tiles + of_tile];
    }
    partials[r < s ? pair_index(r, s) : pair_index(s, r)] = dot;
  }
}

// True in all threads of the CTA that comes last of `expected`; then everything the others wrote before is visible.
RKSC_DEVICE bool arrive_last(gptr<uint32_t> counter, uint32_t expected, smem<uint32_t> flag) {
  // The partials of all threads before the count.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t before = atomic_add(counter, 1u);
    const bool last = before + 1 == expected;
    if (last) counter[0] = 0;
    flag[0] = last;
  }
  __syncthreads();
  const bool last = flag[0] != 0;
  __threadfence();
  return last;
}

// The cosine from a dot product and two squared norms. In double the root of a square is exact: equal rows give exactly 1.
RKSC_DEVICE float cosine(float dot, float square_a, float square_b) {
  if (square_a == 0.0f || square_b == 0.0f) return 0.0f;
  const double c = static_cast<double>(dot) / sqrt(static_cast<double>(square_a) * static_cast<double>(square_b));
  return c > 1.0 ? 1.0f : c < -1.0 ? -1.0f : static_cast<float>(c);
}

// Sums a layer's slices and turns them into weighted cosines.
RKSC_DEVICE void finish_layer(const SimilarityPlan& plan, uint32_t layer) {
  const smem<float> dots = dynamic_shared<float>(0);
  const gptr<const float> partials =
      global<const float>(plan.partials) + static_cast<uint64_t>(layer) * plan.num_slices * plan.num_pairs;
  for (uint32_t pair = threadIdx.x; pair < plan.num_pairs; pair += kThreads) {
    float dot = 0.0f;
    for (uint32_t slice = 0; slice < plan.num_slices; ++slice) dot += partials[slice * plan.num_pairs + pair];
    dots[pair] = dot;
  }
  __syncthreads();
  const float weight = global<const float>(plan.p.layer_weights)[layer];
  const gptr<float> weighted = global<float>(plan.weighted) + static_cast<uint64_t>(layer) * plan.num_pairs;
  for (uint32_t x = threadIdx.x; x < plan.num_rows * plan.num_rows; x += kThreads) {
    const uint32_t r = x % plan.num_rows, s = x / plan.num_rows;
    if (r >= s) continue;
    const float c = cosine(dots[pair_index(r, s)], dots[pair_index(r, r)], dots[pair_index(s, s)]);
    weighted[pair_index(r, s)] = weight * c;
  }
}

// Sums the layers; leaves the pairwise similarities in `pairwise`, [num_branches, num_branches], for all threads.
RKSC_DEVICE void finish_similarities(const SimilarityPlan& plan, smem<float> pairwise) {
  const rksc_branch_similarity_params& p = plan.p;
  const gptr<const float> weighted = global<const float>(plan.weighted);
  const gptr<const float> weights = global<const float>(p.layer_weights);
  const uint32_t num = p.num_branches;
  for (uint32_t x = threadIdx.x; x < plan.num_rows * plan.num_rows; x += kThreads) {
    const uint32_t r = x % plan.num_rows, s = x / plan.num_rows;
    if (r > s || r == num) continue;
    float similarity = 1.0f;
    if (r < s) {
      float sum = 0.0f, weight_sum = 0.0f;
#pragma unroll 4
      for (uint32_t layer = 0; layer < p.num_layers; ++layer) {
        sum += weighted[static_cast<uint64_t>(layer) * plan.num_pairs + pair_index(r, s)];
        weight_sum += weights[layer];
      }
      // weight_sum is 1 but for rounding; with it equal states come out as exactly 1.
      similarity = sum / weight_sum;
    }
    if (s == num) {
      global<float>(p.to_root)[r] = similarity;
      global<uint32_t>(p.above)[r] = similarity >= p.tau;
    } else {
      pairwise[r * num + s] = similarity;
      pairwise[s * num + r] = similarity;
      global<float>(p.pairwise)[r * num + s] = similarity;
      global<float>(p.pairwise)[s * num + r] = similarity;
    }
  }
  __syncthreads();
}

// The clustering rule below. Each thread follows all representatives and writes its own branch's label.
RKSC_DEVICE void cluster(const SimilarityPlan& plan, smem<float> pairwise) {
  RKSC_SHARED(float, centrality, kMaxBranches);
  RKSC_SHARED(uint32_t, order, kMaxBranches);
  RKSC_SHARED(uint64_t, neighbours, kMaxBranches);
  const uint32_t num = plan.p.num_branches, b = threadIdx.x;
  if (b < num) {
    float sum = 0.0f;
    uint64_t mask = 0;
    for (uint32_t c = 0; c < num; ++c) {
      const float similarity = pairwise[c * num + b];
      sum += similarity;
      mask |= static_cast<uint64_t>(similarity >= plan.p.tau || c == b) << c;
    }
    // A branch whose numbers broke comes last.
    centrality[b] = sum == sum ? sum : -INFINITY;
    neighbours[b] = mask;
  }
  __syncthreads();
  if (b < num) {
    const float own = centrality[b];
    uint32_t before = 0;
    for (uint32_t c = 0; c < num; ++c) {
      const float other = centrality[c];
      before += other > own || (other == own && c < b);
    }
    order[before] = b;
  }
  __syncthreads();
  if (b < num) {
    uint64_t assigned = 0;
    uint32_t label = b;
    for (uint32_t i = 0; i < num; ++i) {
      const uint32_t representative = order[i];
      if (assigned >> representative & 1) continue;
      const uint64_t members = neighbours[representative] & ~assigned;
      if (members >> b & 1) label = representative;
      assigned |= members;
    }
    global<uint32_t>(plan.p.labels)[b] = label;
  }
}

// branch_similarity
//   sigma(a, b) = sum_l w_l cos(a^l, b^l) / sum_l w_l, cos = 0 where a norm is 0;  to_root[b] = sigma(b, root);
//   pairwise[b, c] = sigma(b, c), exactly symmetric; pairwise[b, b] = 1 exactly, for a zero state too; above[b] = to_root[b] >= tau
//   labels: centrality(b) = sum_c pairwise[b, c], c ascending. In descending centrality (ties: lowest index; not a number: last)
//   each branch without a label becomes a representative and gives its index to itself and to every branch c without a label that
//   has pairwise[b, c] >= tau. So each member is within tau of its representative.
//
//   states         [num_layers, num_branches, hidden]  f32  read
//   root           [num_layers, hidden]                f32  read
//   layer_weights  [num_layers]                        f32  read, summing to 1
//   to_root [num_branches] f32, above [num_branches] u32, pairwise [num_branches, num_branches] f32, labels [num_branches] u32:
//   written
//
// Work      CTA = (slice of the columns, layer): all rows of a chunk of columns in shared memory, two chunks in flight; a thread
//           takes 4 x 4 pairs of rows and every num_splits-th vector of columns. The layer's last CTA sums its slices and takes
//           cosines, the last layer's sums the layers, thresholds and clusters.
// Numerics  f32 dot products, splits, slices and layers each in ascending order; cosines in double from those. All pairs see the
//           same order, so equal states give sigma = 1 exactly.
// Traffic   4 * num_layers * (num_branches + 1) * hidden bytes, each state once; partials (num_branches + 2)^2 * 2 * 4 bytes a CTA.
// Bound     latency: 28 layers * 9 rows * 3584 columns are 3.6 MB, about 1 us of an H100, under the two last-arriver hand-overs.
//           At 64 branches 26 MB, 6 us, against 0.2 G fused multiply-adds.
// Limits    1 <= num_branches <= 64 (0 is empty work), num_layers >= 1, hidden >= 1; states and root aligned to 16 bytes.
// Oracle    testing/branch_similarity.rs.   Bench  rksc-run bench kernels --op branch_similarity
__global__ void __launch_bounds__(kThreads) branch_similarity_kernel(const __grid_constant__ SimilarityPlan plan) {
  RKSC_SHARED(uint32_t, last, 1);
  const uint32_t slice = blockIdx.x, layer = blockIdx.y;
  dot_slice(plan, layer, slice);
  const gptr<uint32_t> arrivals = global<uint32_t>(plan.arrivals);
  if (!arrive_last(arrivals + layer, plan.num_slices, last)) return;
  finish_layer(plan, layer);
  if (!arrive_last(arrivals + plan.p.num_layers, plan.p.num_layers, last)) return;
  const smem<float> pairwise = dynamic_shared<float>(0);
  finish_similarities(plan, pairwise);
  cluster(plan, pairwise);
}

uint32_t counter_bytes(uint32_t num_layers) { return div_up((num_layers + 1) * 4, 16) * 16; }

// Columns of a chunk: two chunks of all rows stay under 40 KB, and few rows still have some KB in flight.
uint32_t chunk_columns(uint32_t num_rows) { return num_rows <= 16 ? 256 : num_rows <= 32 ? 128 : 64; }

uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
uint32_t most(uint32_t a, uint32_t b) { return a > b ? a : b; }

}  // namespace

// ---- launchers: check, dispatch, launch, report -------------------------------------------------

extern "C" size_t RKSC_FN(branch_similarity_workspace_bytes)(uint32_t num_layers, uint32_t num_branches) {
  const size_t pairs = static_cast<size_t>(num_branches + 1) * (num_branches + 2) / 2;
  return counter_bytes(num_layers) + num_layers * (kMaxSlices + 1) * pairs * sizeof(float);
}

extern "C" int32_t RKSC_FN(branch_similarity)(const rksc_branch_similarity_params* p, rksc_stream stream) {
  if (p->num_branches == 0) return 0;
  RKSC_REQUIRE(p->num_branches <= kMaxBranches);
  RKSC_REQUIRE(p->num_layers >= 1 && p->num_layers <= 65535 && p->hidden >= 1);
  RKSC_REQUIRE(reinterpret_cast<uintptr_t>(p->states) % 16 == 0 && reinterpret_cast<uintptr_t>(p->root) % 16 == 0);
  SimilarityPlan plan = {};
  plan.p = *p;
  plan.num_rows = p->num_branches + 1;
  plan.num_pairs = plan.num_rows * (plan.num_rows + 1) / 2;
  plan.side = div_up(plan.num_rows, 4);
  plan.num_tiles = plan.side * (plan.side + 1) / 2;
  plan.chunk = chunk_columns(plan.num_rows);
  plan.num_splits = least(kThreads / plan.num_tiles, plan.chunk / 4);
  plan.num_chunks = div_up(p->hidden, plan.chunk);
  plan.num_slices = least(plan.num_chunks, kMaxSlices);
  plan.arrivals = static_cast<uint32_t*>(p->workspace);
  plan.partials = reinterpret_cast<float*>(static_cast<unsigned char*>(p->workspace) + counter_bytes(p->num_layers));
  plan.weighted = plan.partials + static_cast<size_t>(p->num_layers) * plan.num_slices * plan.num_pairs;
  // The chunks, then the splits' sums, then a layer's dot products, then the similarities.
  const uint32_t stages = 2 * plan.side * 4 * (plan.chunk + 4), splits = plan.num_splits * 16 * plan.num_tiles;
  const uint32_t floats = most(most(stages, splits), most(plan.num_pairs, p->num_branches * p->num_branches));
  return launch(branch_similarity_kernel, dim3(plan.num_slices, p->num_layers), dim3(kThreads), floats * 4, stream, plan);
}
