// collectives.cpp -- what the last lane to arrive computes for its warp.
#include "simt.h"

#include <bit>

#include "machine.h"

namespace simt {

const char* name_of(Collective op) {
  switch (op) {
    case Collective::kSyncWarp: return "__syncwarp";
    case Collective::kShuffle: return "__shfl_sync";
    case Collective::kBallot: return "__ballot_sync";
    case Collective::kAny: return "__any_sync";
    case Collective::kAll: return "__all_sync";
    case Collective::kReduceAdd:
    case Collective::kReduceMin:
    case Collective::kReduceMax:
    case Collective::kReduceAnd:
    case Collective::kReduceOr:
    case Collective::kReduceXor: return "__reduce_sync";
    case Collective::kMatchAny: return "__match_any_sync";
    case Collective::kMmaBf16:
    case Collective::kMmaF16: return "mma";
    default: return "ldmatrix";
  }
}

namespace {

// Eight f32 lanes; without AVX the compiler takes two registers for one.
typedef float f32x8 __attribute__((vector_size(32)));

void unpack(Collective op, uint32_t pair, float& low, float& high) {
  if (op == Collective::kMmaBf16) {
    low = std::bit_cast<float>(pair << 16);
    high = std::bit_cast<float>(pair & 0xffff0000u);
  } else {
    low = half_to_float(static_cast<uint16_t>(pair));
    high = half_to_float(static_cast<uint16_t>(pair >> 16));
  }
}

void complete_mma(Warp& w, Collective op) {
  float a[16][16];
  f32x8 b[16];
  f32x8 c[16];
  Fiber* lanes = w.lanes;
  for (uint32_t l = 0; l < 32; ++l) {
    const uint32_t g = l / 4, t = l % 4;
    const float* fc = static_cast<const float*>(lanes[l].pointers[0]);
    const uint32_t* fa = static_cast<const uint32_t*>(lanes[l].pointers[1]);
    const uint32_t* fb = static_cast<const uint32_t*>(lanes[l].pointers[2]);
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = g + i % 2 * 8, col = 2 * t + i / 2 * 8;
      unpack(op, fa[i], a[row][col], a[row][col + 1]);
    }
    float low, high;
    for (uint32_t i = 0; i < 2; ++i) {
      unpack(op, fb[i], low, high);
      b[2 * t + 8 * i][g] = low;
      b[2 * t + 8 * i + 1][g] = high;
      c[g + 8 * i][2 * t] = fc[2 * i];
      c[g + 8 * i][2 * t + 1] = fc[2 * i + 1];
    }
  }
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t k = 0; k < 16; k += 8) {
      f32x8 sum = a[row][k] * b[k];
      for (uint32_t j = 1; j < 8; ++j) sum += a[row][k + j] * b[k + j];
      c[row] += sum;
    }
  }
  for (uint32_t l = 0; l < 32; ++l) {
    const uint32_t g = l / 4, t = l % 4;
    float* fc = static_cast<float*>(lanes[l].pointers[0]);
    for (uint32_t i = 0; i < 2; ++i) {
      fc[2 * i] = c[g + 8 * i][2 * t];
      fc[2 * i + 1] = c[g + 8 * i][2 * t + 1];
    }
  }
}

void complete_ldmatrix(Warp& w, uint32_t tiles, bool transposed) {
  Fiber* lanes = w.lanes;
  // Each row is read for other lanes: checked for the lane that names it, as a read by all.
  const Fiber* running = cur.fiber;
  const uint32_t me = cur.me;
  for (uint32_t l = 0; l < 8 * tiles; ++l) {
    cur.fiber = &lanes[l];
    cur.me = entry_of(lanes[l]) | kManyLanes;
    const uint32_t at = lanes[l].argument;
    SharedAccess::read<__uint128_t>(at);
  }
  cur.fiber = const_cast<Fiber*>(running);
  cur.me = me;
  for (uint32_t i = 0; i < tiles; ++i) {
    uint16_t tile[8][8];
    for (uint32_t row = 0; row < 8; ++row) __builtin_memcpy(tile[row], cur.shared + lanes[8 * i + row].argument, 16);
    for (uint32_t l = 0; l < 32; ++l) {
      const uint32_t g = l / 4, t = l % 4;
      const uint32_t low = transposed ? tile[2 * t][g] : tile[g][2 * t];
      const uint32_t high = transposed ? tile[2 * t + 1][g] : tile[g][2 * t + 1];
      static_cast<uint32_t*>(lanes[l].pointers[0])[i] = low | high << 16;
    }
  }
}

void complete_shuffle(Warp& w, uint32_t mask) {
  Fiber* lanes = w.lanes;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    Fiber& f = lanes[__builtin_ctz(rest)];
    if (!(mask >> f.argument & 1)) fault_of(&f, "__shfl_sync reads lane %u, which its mask 0x%08x leaves out", f.argument, mask);
    f.result = lanes[f.argument].value;
  }
}

uint32_t reduce(Collective op, uint32_t a, uint32_t b) {
  switch (op) {
    case Collective::kReduceAdd: return a + b;
    case Collective::kReduceMin: return a < b ? a : b;
    case Collective::kReduceMax: return a > b ? a : b;
    case Collective::kReduceAnd: return a & b;
    case Collective::kReduceOr: return a | b;
    default: return a ^ b;
  }
}

}  // namespace

void complete(Warp& w, Collective op, uint32_t mask) {
  Fiber* lanes = w.lanes;
  const auto give_all = [&](uint64_t result) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].result = result;
  };
  switch (op) {
    case Collective::kSyncWarp:
      // Lanes outside the mask have not taken part: a partial __syncwarp orders nothing as far as the shadow knows.
      if ((mask & w.live) == w.live) {
        close_batches(w);
        ++w.phase;
        if (w.phase >= 1u << (31 - kPhaseShift)) fault("limit of the emulation: more than %u __syncwarp in a CTA", w.phase);
      }
      return;
    case Collective::kShuffle: return complete_shuffle(w, mask);
    case Collective::kBallot:
    case Collective::kAny:
    case Collective::kAll: {
      uint32_t votes = 0;
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const uint32_t l = __builtin_ctz(rest);
        votes |= static_cast<uint32_t>(lanes[l].value) << l;
      }
      return give_all(op == Collective::kBallot ? votes : op == Collective::kAny ? votes != 0 : votes == mask);
    }
    case Collective::kMatchAny:
      for (uint32_t a = mask; a; a &= a - 1) {
        uint32_t same = 0;
        for (uint32_t b = mask; b; b &= b - 1) {
          if (lanes[__builtin_ctz(b)].value == lanes[__builtin_ctz(a)].value) same |= 1u << __builtin_ctz(b);
        }
        lanes[__builtin_ctz(a)].result = same;
      }
      return;
    case Collective::kMmaBf16:
    case Collective::kMmaF16: return complete_mma(w, op);
    case Collective::kLdmatrix1: return complete_ldmatrix(w, 1, false);
    case Collective::kLdmatrix2: return complete_ldmatrix(w, 2, false);
    case Collective::kLdmatrix4: return complete_ldmatrix(w, 4, false);
    case Collective::kLdmatrix1Trans: return complete_ldmatrix(w, 1, true);
    case Collective::kLdmatrix2Trans: return complete_ldmatrix(w, 2, true);
    case Collective::kLdmatrix4Trans: return complete_ldmatrix(w, 4, true);
    default: {
      uint32_t total = static_cast<uint32_t>(lanes[__builtin_ctz(mask)].value);
      for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1) {
        total = reduce(op, total, static_cast<uint32_t>(lanes[__builtin_ctz(rest)].value));
      }
      return give_all(total);
    }
  }
}

}  // namespace simt
