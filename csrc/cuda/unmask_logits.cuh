// A warp's logits as the kernels of unmask see them: loaded, with biases added, -inf where an id is forbidden or beyond
// the vocab. A warp takes IDS * 32 ids at once; lane i has ids first + j / 4 * 128 + i * 4 + j % 4, so neighbours share
// a Philox block.
#pragma once
#include "device.cuh"
#include "illada/api.h"

namespace illada {

using Call = illada_unmask_call;

// Returns this lane's j-th id.
ILLADA_DEVICE int64_t id_of(int64_t first, int j) { return first + j / 4 * 128 + threadIdx.x % 32 * 4 + j % 4; }

// ---- load --------------------------------------------------------------------------------------------------------
template <class T> struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Loads this warp's ids from `first` on, of which `left` exist; -inf beyond.
template <int IDS, class T> ILLADA_DEVICE void load_logits(const T* p, int64_t left, float (&l)[IDS]) {
  const int mine = threadIdx.x % 32 * 4;
  const bool aligned = reinterpret_cast<uintptr_t>(p) % sizeof(Four<T>) == 0;
#pragma unroll
  for (int j = 0; j < IDS; j += 4) {
    const int64_t at = j / 4 * 128 + mine;
    if (aligned && at + 4 <= left) {
      const Four<T> four = *reinterpret_cast<const Four<T>*>(p + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) l[j + i] = to_float(four.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) l[j + i] = at + i < left ? to_float(p[at + i]) : -infinity();
    }
  }
}

// ---- what is added to logits -----------------------------------------------------------------------------------
// Two arrays of this lane's ids: head_bias, and bias, -inf where an id is forbidden or beyond the vocab.
ILLADA_DEVICE float load_bias(const Call& c, int64_t id) {
  switch (c.head_bias_dtype) {
    case ILLADA_F32: return static_cast<const float*>(c.head_bias)[id];
    case ILLADA_BF16: return to_float(static_cast<const bf16*>(c.head_bias)[id]);
    default: return to_float(static_cast<const fp16*>(c.head_bias)[id]);
  }
}

// Calls apply(j in this lane or -1, position in ids) for each of the n ids among the warp's IDS * 32, in order.
template <int IDS, class Apply>
ILLADA_DEVICE void find_ids(const Call& c, const int64_t* ids, int64_t n, int64_t first, Apply apply) {
  const int lane = threadIdx.x % 32;
  for (int64_t base = 0; base < n; base += 32) {
    const int64_t id = base + lane < n ? ids[base + lane] : -1;
    const bool known = id >= first && id < c.vocab && id - first < IDS * 32;
    const int place = known ? int(id - first) : 0;
    for (uint32_t left = __ballot_sync(0xffffffffu, known); left; left &= left - 1) {
      const int source = __ffs(int(left)) - 1, p = __shfl_sync(0xffffffffu, place, source);
      apply(p % 128 / 4 == lane ? p / 128 * 4 + p % 4 : -1, base + source);
    }
  }
}

template <int IDS> ILLADA_DEVICE void load_head_bias(const Call& c, int64_t first, float (&head_bias)[IDS]) {
#pragma unroll
  for (int j = 0; j < IDS; ++j)
    head_bias[j] = c.head_bias && id_of(first, j) < c.vocab ? load_bias(c, id_of(first, j)) : 0.0f;
}

template <int IDS> ILLADA_DEVICE void load_biases(const Call& c, int64_t first, float (&bias)[IDS]) {
#pragma unroll
  for (int j = 0; j < IDS; ++j) bias[j] = id_of(first, j) < c.vocab ? 0.0f : -infinity();
  find_ids<IDS>(c, c.bias_ids, c.biases, first, [&](int mine, int64_t i) {
    const float value = c.bias_values[i];
#pragma unroll
    for (int j = 0; j < IDS; ++j) bias[j] = j == mine ? bias[j] + value : bias[j];
  });
  find_ids<IDS>(c, c.forbid, c.forbids, first, [&](int mine, int64_t) {
#pragma unroll
    for (int j = 0; j < IDS; ++j) bias[j] = j == mine ? -infinity() : bias[j];
  });
}

// Adds to logits; of two zeros the positive one. -inf stays -inf even for a NaN.
template <int IDS> ILLADA_DEVICE void add_head_bias(const float (&head_bias)[IDS], float (&l)[IDS]) {
#pragma unroll
  for (int j = 0; j < IDS; ++j) l[j] = __fadd_rn(l[j], head_bias[j]);
}
template <int IDS> ILLADA_DEVICE void add_biases(const float (&bias)[IDS], float (&l)[IDS]) {
#pragma unroll
  for (int j = 0; j < IDS; ++j) l[j] = bias[j] == -infinity() ? -infinity() : __fadd_rn(l[j], bias[j]);
}

// Loads this warp's ids first .. first + left, from p on, with all that is added to them; -inf beyond.
template <int IDS, class T>
ILLADA_DEVICE void load_edited(const Call& c, const T* p, int64_t first, int64_t left, float (&l)[IDS]) {
  load_logits(p, left, l);
  float added[IDS];  // one array after the other, because registers decide how many blocks an SM holds
  load_head_bias(c, first, added);
  add_head_bias(added, l);
  load_biases(c, first, added);
  add_biases(added, l);
}

}  // namespace illada
