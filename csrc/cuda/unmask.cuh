// What the kernels of unmask share: a candidate's parameters, read on the device with the reference's roundings and
// clamps, and the running statistics of a row (`Running`), into which a warp folds logits l (`meet`):
//
//   max and second max of l;  sums of e = exp(z) and e * z, z = (l - max) / Tc in units of log 2;  best l + T * Gumbel
//
// A warp takes IDS * 32 ids at once (unmask_logits.cuh). The order of every sum depends only on the row's logits and on
// where the caller cuts the vocab. Noise costs Philox per pair of ids; logarithms only where the random word leaves an
// id a chance to win, by bounds that err to one side, so the argmax is exact. A NaN or +inf logit sets the maximum to
// +inf for good: the row is bad. EXTENDED kernels also truncate, and know Renoise; the others do not pay for it.
#pragma once
#include "illada/philox.h"
#include "unmask_logits.cuh"

namespace illada {

constexpr float kLargest = 3.402823466e38f;
constexpr float kHighestTc = 8.507059173e37f;  // 2^126: its reciprocal is a normal number
constexpr float kHighestT = 0x1p120f;  // T * g stays finite
constexpr float kLowestZ = -150.0f;  // 2^z is 0

// ---- parameters ------------------------------------------------------------------------------------------------
ILLADA_DEVICE float number_of(const illada_unmask_parameter& p, int64_t b) {
  return p.tensor ? static_cast<const float*>(p.tensor)[p.per_sequence ? b : 0] : p.number;
}
ILLADA_DEVICE int64_t integer_of(const illada_unmask_parameter& p, int64_t b) {
  return p.tensor ? static_cast<const int64_t*>(p.tensor)[p.per_sequence ? b : 0] : p.integer;
}
template <class T> ILLADA_DEVICE T at(const illada_unmask_view& view, int64_t b, int64_t k) {
  return static_cast<const T*>(view.data)[b * view.stride_b + k * view.stride_k];
}

struct Row {
  int64_t position, held;  // position -1: not a candidate
  uint64_t seed;
  uint32_t noise_position, step;
  float temperature;  // of the noise; 0: none
  float scale, scale2;  // 1 / Tc, and times log2(e)
  int32_t masked, needed;  // needed: this row's logits are read
};

// Loads twice one after the other: the position and the parameters, then what the position names.
template <bool EXTENDED = false> ILLADA_DEVICE Row load_row(const Call& c, int64_t b, int64_t k) {
  Row row{-1, 0, 0, 0, 0, 0.0f, 0.0f, 0.0f, 0, 0};
  const int64_t position = at<int64_t>(c.positions, b, k);
  const int64_t noise_position = c.noise_positions.data ? at<int64_t>(c.noise_positions, b, k) : position;
  const uint64_t seed = uint64_t(integer_of(c.seed, b));
  const uint32_t step = uint32_t(integer_of(c.step, b));
  const float t = number_of(c.temperature, b), tc = number_of(c.confidence_temperature, b);
  if (position < 0 || position >= c.length) return row;
  const int64_t held = c.tokens[b * c.token_stride + position];
  if (c.frozen.data && at<uint8_t>(c.frozen, b, position)) return row;
  row.position = position;
  row.held = held;
  row.masked = row.held == c.mask_id || (EXTENDED && c.rule == ILLADA_RENOISE);
  row.needed = row.masked || c.revise == ILLADA_EDIT || c.revise == ILLADA_REMASK;
  const bool own_seed = c.seed.tensor && c.seed.per_sequence;
  row.seed = seed + (own_seed ? 0 : uint64_t(b));
  row.noise_position = uint32_t(noise_position);
  row.step = step;
  row.temperature = row.masked && t > 0.0f ? fminf(t, kHighestT) : 0.0f;  // a NaN counts as 0
  row.scale = tc > 0.0f ? fminf(1.0f / fminf(tc, kHighestTc), kLargest) : 1.0f;
  row.scale2 = fminf(row.scale * kLog2e, kLargest);
  return row;
}

// What truncates a row that draws with temperature t. Values that keep all ids are told from others once, here.
struct Truncation {
  int64_t top_k;  // 0: keeps all
  float top_p;  // 1: keeps all
  float drop;  // from the largest logit to the least that min_p keeps; -inf: keeps all
  ILLADA_DEVICE bool keeps_all() const { return top_k == 0 && top_p == 1.0f && drop == -infinity(); }
};
ILLADA_DEVICE Truncation truncation_of(const Call& c, int64_t b, float t) {
  Truncation by{0, 1.0f, -infinity()};
  if (c.truncate & ILLADA_BY_TOP_K) {
    const int64_t wanted = integer_of(c.top_k, b);
    if (wanted > 0 && wanted < c.vocab) by.top_k = wanted;
  }
  if (c.truncate & ILLADA_BY_TOP_P) by.top_p = fminf(number_of(c.top_p, b), 1.0f);  // a NaN counts as 1
  if (c.truncate & ILLADA_BY_MIN_P) {
    const float least = number_of(c.min_p, b);
    if (least > 0.0f) by.drop = __fmul_rn(t, fminf(float(log(double(least))), 0.0f));
  }
  return by;
}

// The weight exp((x - top) / Tc) of an id or of a sum, and the exponent in units of log 2. Both are 0 where the weight
// is not a normal number, so that a row without other ids near its maximum has exactly no entropy.
struct Weight {
  float z, e;
};
ILLADA_DEVICE Weight weight_of(float x, float top, const Row& row) {
  if (!(__fmul_rn(x - top, row.scale) >= ILLADA_UNMASK_LEAST_SHIFTED)) return Weight{0.0f, 0.0f};
  const float z = fmaxf(__fmul_rn(x - top, row.scale2), kLowestZ);
  return Weight{z, fast_exp2(z)};
}

// ---- one row, in the registers of a warp; all lanes hold the same ----------------------------------------------
struct Running {
  float top, second, sum, sum_ez;
  float best_score, best_logit;
  float held_logit;  // or, as NEEDS_TOP_ID asks, the bits of the lowest id at `top`
  int32_t best_id;  // -1: none
};
ILLADA_DEVICE Running nothing_met() {
  const float low = -infinity();
  return Running{low, low, 0.0f, 0.0f, low, low, low, -1};
}

// Returns the maximum over the warp, by one integer reduction. x is neither NaN nor -0.
ILLADA_DEVICE float warp_top(float x) {
  const int bits = __float_as_int(x), ordered = bits ^ (bits >> 31 & 0x7fffffff);
  const int top = __reduce_max_sync(0xffffffffu, ordered);
  return __int_as_float(top ^ (top >> 31 & 0x7fffffff));
}

// Returns the largest top word of an id whose Gumbel noise can reach `need`: g >= need implies u <= exp(-need).
ILLADA_DEVICE uint32_t highest_word(float need) {
  const float limit = fast_exp2(fmaf(-need, kLog2e, 32.0f)) * 1.001f;
  return limit < 4294967040.0f ? uint32_t(limit) : 0xffffffffu;  // for a NaN too
}

struct Best {
  float score, logit;
  int32_t id;
};
// Offers one id that passed the first bound.
ILLADA_DEVICE void offer(float logit, uint32_t high, uint32_t low, float temperature, float slack, int32_t id,
                         Best& best) {
  const int halvings = high ? __clz(int(high)) + 1 : 64;  // u >= 2^-halvings, so g <= halvings * log 2
  if (logit == -infinity() || logit + temperature * (0.6931473f * float(halvings)) + slack < best.score) return;
  const float score = noised_score(logit, temperature, gumbel(high, low));
  if (score > best.score || (score == best.score && id < best.id)) best = Best{score, logit, id};
}

// Returns a score that the row reaches: the best of what each lane's likeliest id gets. A high bar only spares
// logarithms.
template <int IDS> ILLADA_DEVICE float first_bar(const float (&l)[IDS], int32_t mine, const Row& row) {
  float top = l[0];
  int32_t id = mine;
#pragma unroll
  for (int j = 1; j < IDS; ++j)
    if (l[j] > top) top = l[j], id = mine + j / 4 * 128 + j % 4;
  const PhiloxWords w = philox(row.seed, uint32_t(id) / 2, row.noise_position, row.step, 0);
  const float g = id % 2 ? gumbel(w.w2, w.w3) : gumbel(w.w0, w.w1);
  return warp_top(top == -infinity() ? top : noised_score(top, row.temperature, g));
}

template <int IDS>
ILLADA_DEVICE void meet_noise(const float (&l)[IDS], int32_t mine, const Row& row, float top, Running& s) {
  const float t = row.temperature;
  Best best{s.best_score, s.best_logit, s.best_id};
  if (best.score == -infinity())
    best = Best{first_bar(l, mine, row), -infinity(), 0x7fffffff};  // its id comes again in its turn
  const int32_t before = best.id;
  // an upper bound of what rounding adds to a score
  const float slack = 1e-6f * (fabsf(best.score) + fabsf(top) + 64.0f * t);
  const float need = (best.score - top - slack) / t;  // the Gumbel value of a winner
  if (need > 44.5f) return;  // a 64-bit uniform gives at most 44.37
  const uint32_t limit = highest_word(need);
#pragma unroll
  for (int j = 0; j < IDS; j += 2) {
    const int32_t id = mine + j / 4 * 128 + j % 4;
    const PhiloxWords w = philox(row.seed, uint32_t(id) / 2, row.noise_position, row.step, 0);
    const float pair[2] = {l[j], l[j + 1]};
#pragma unroll 1
    for (int odd = w.w0 <= limit ? 0 : 1; odd < (w.w2 <= limit ? 2 : 1); ++odd)  // one copy of the logarithms for both
      offer(odd ? pair[1] : pair[0], odd ? w.w2 : w.w0, odd ? w.w3 : w.w1, t, slack, id + odd, best);
  }
  if (!__any_sync(0xffffffffu, best.id != before)) return;
  s.best_score = warp_top(best.score);
  s.best_id = __reduce_min_sync(0xffffffffu, best.score == s.best_score ? best.id : 0x7fffffff);
  const uint32_t owners = __ballot_sync(0xffffffffu, best.score == s.best_score && best.id == s.best_id);
  s.best_logit = __shfl_sync(0xffffffffu, best.logit, __ffs(int(owners)) - 1);
}

// Returns the second largest logit of all lanes, given each lane's two largest.
ILLADA_DEVICE float warp_second(float top, float second) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other_top = __shfl_xor_sync(0xffffffffu, top, step), other = __shfl_xor_sync(0xffffffffu, second, step);
    second = fmaxf(fmaxf(second, other), fminf(top, other_top));
    top = fmaxf(top, other_top);
  }
  return second;
}

// Returns the warp's lowest id with this logit; `mine` is the lane's first.
template <int IDS> ILLADA_DEVICE int32_t lowest_id(const float (&l)[IDS], int32_t mine, float logit) {
  int32_t id = 0x7fffffff;
#pragma unroll
  for (int j = IDS - 1; j >= 0; --j) id = l[j] == logit ? mine + j / 4 * 128 + j % 4 : id;
  return __reduce_min_sync(0xffffffffu, id);
}

// Folds this lane's edited logits l of ids first .. first + IDS * 32 into the row's statistics. Noise is drawn for
// those that reach `bound`.
template <bool EXTENDED = false, int IDS>
ILLADA_DEVICE void meet(const float (&l)[IDS], int64_t first, const Row& row, int needs, Running& s,
                        float bound = -infinity()) {
  const int lane = threadIdx.x % 32;
  const int32_t mine = int32_t(first) + lane * 4;
  bool bad = s.top == infinity();
  float top = -infinity(), second = -infinity();
#pragma unroll
  for (int j = 0; j < IDS; ++j) {
    bad |= !(l[j] < infinity());
    if (needs & ILLADA_NEEDS_SECOND) second = fmaxf(second, fminf(top, l[j]));
    top = fmaxf(top, l[j]);
  }
  if (__any_sync(0xffffffffu, bad)) {
    s.top = infinity();
    return;
  }
  if (needs & ILLADA_NEEDS_SECOND) s.second = fmaxf(s.second, warp_second(top, second));
  top = warp_top(top);
  if (top == -infinity()) return;
  if (needs & ILLADA_NEEDS_SECOND) s.second = fmaxf(s.second, fminf(s.top, top));
  const float high = fmaxf(s.top, top);
  if (EXTENDED && needs & ILLADA_NEEDS_TOP_ID && top > s.top) s.held_logit = __int_as_float(lowest_id(l, mine, top));
  if (row.temperature > 0.0f) {
    if constexpr (EXTENDED) {
      float kept[IDS];
#pragma unroll
      for (int j = 0; j < IDS; ++j) kept[j] = l[j] >= bound ? l[j] : -infinity();
      if (top >= bound) meet_noise(kept, mine, row, top, s);
    } else {
      meet_noise(l, mine, row, top, s);
    }
  } else if (top > s.best_score) {
    s.best_id = lowest_id(l, mine, top);
    s.best_score = s.best_logit = top;
  }
  float sum = 0.0f, sum_ez = 0.0f;
#pragma unroll
  for (int j = 0; j < IDS; ++j) {
    const Weight w = weight_of(l[j], high, row);
    sum += w.e;
    if (needs & ILLADA_NEEDS_ENTROPY) sum_ez = fmaf(w.e, w.z, sum_ez);
  }
  const Weight before = weight_of(s.top, high, row);
  const float drop = before.z, kept = before.e;
  if (needs & ILLADA_NEEDS_ENTROPY) s.sum_ez = fmaf(kept, fmaf(drop, s.sum, s.sum_ez), warp_sum(sum_ez));
  s.sum = fmaf(kept, s.sum, warp_sum(sum));
  s.top = high;
  if (needs & ILLADA_NEEDS_HELD && row.held >= first && row.held - first < IDS * 32) {
    const int32_t id = int32_t(row.held);
    float held = -infinity();
#pragma unroll
    for (int j = 0; j < IDS; ++j) held = fmaxf(held, mine + j / 4 * 128 + j % 4 == id ? l[j] : -infinity());
    s.held_logit = warp_top(held);
  }
}

// ---- partials (FIELDS, rows, parts) ----------------------------------------------------------------------------
enum PartialField { kTop, kSecondTop, kSum, kSumEz, kBestScore, kBestLogit, kHeldLogit, kBestId };
ILLADA_DEVICE float* partial(const Call& c, int field, int64_t row, int64_t part) {
  return c.partials + (field * c.batch * c.count + row) * c.parts + part;
}
ILLADA_DEVICE void store_partial(const Call& c, int64_t row, int64_t part, const Running& s) {
  *partial(c, kTop, row, part) = s.top;
  *partial(c, kSecondTop, row, part) = s.second;
  *partial(c, kSum, row, part) = s.sum;
  *partial(c, kSumEz, row, part) = s.sum_ez;
  *partial(c, kBestScore, row, part) = s.best_score;
  *partial(c, kBestLogit, row, part) = s.best_logit;
  *partial(c, kHeldLogit, row, part) = s.held_logit;
  *partial(c, kBestId, row, part) = __int_as_float(s.best_id);
}

}  // namespace illada
