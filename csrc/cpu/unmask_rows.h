// unmask on the CPU: one pass over the logits of a row, a segment of ids at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "illada/api.h"
#include "float_mode.h"
#include "unmask_noise.h"

namespace {

constexpr int kSegment = ILLADA_UNMASK_SEGMENT;
constexpr float kLeastShifted = ILLADA_UNMASK_LEAST_SHIFTED;
static_assert(kSegment % kBlock == 0 && kBlock % (4 * kWidth) == 0, "whole vectors");

// A candidate that needs its logits.
struct Row {
  int64_t index;  // b * K + k; Python reads it, so it comes first
  int64_t held;
  uint64_t seed;
  uint32_t position, step;
  float temperature, scale;  // temperature: of the noise, 0: none; scale: 1 / confidence_temperature
  int64_t masked;
};
static_assert(sizeof(Row) == ILLADA_UNMASK_ROW_BYTES, "as api.h says");

// What is kept of a row's segment, or of several.
struct Partial {
  double sum, sum_ez;  // of e = exp(z) and of e * z; z = (l - top) * scale
  float top, second;
  float best_score, best_logit, held_logit;
  int32_t top_id, best_id;  // -1: none
  int32_t bad;
};
static_assert(sizeof(Partial) == ILLADA_UNMASK_PARTIAL_BYTES, "as api.h says");

// ---- vectors --------------------------------------------------------------------------------------------------------
// Whether a vector that was looked at held a NaN.
struct NaNs {
#if defined(__AVX512F__)
  __mmask16 seen = 0;
  void look(vf a, vf b) { seen |= _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_UNORD_Q); }
  bool found() const { return seen != 0; }
#else
  vi seen{};
  void look(vf a, vf b) { seen |= (a != a) | (b != b); }
  bool found() const { return any(seen); }
#endif
};

struct Doubles {
  vd low, high;
};
inline Doubles widened(vf v) {
#if defined(__AVX512F__)
  const __m512 x = bit_cast<__m512>(v);
  return {bit_cast<vd>(_mm512_cvtps_pd(_mm512_castps512_ps256(x))),
          bit_cast<vd>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))};
#elif defined(__AVX2__)
  const __m256 x = bit_cast<__m256>(v);
  return {bit_cast<vd>(_mm256_cvtps_pd(_mm256_castps256_ps128(x))),
          bit_cast<vd>(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)))};
#else
  Doubles wide;
  for (int i = 0; i < kWidth / 2; ++i) wide.low[i] = double(v[i]), wide.high[i] = double(v[i + kWidth / 2]);
  return wide;
#endif
}
inline void accumulate(Doubles& sum, vf v) {
  const Doubles wide = widened(v);
  sum.low += wide.low, sum.high += wide.high;
}
inline double total(const Doubles& sum) {
  const vd s = sum.low + sum.high;
  double r = 0;
  for (int i = 0; i < kWidth / 2; ++i) r += s[i];
  return r;
}

// Returns exp(max(z, -87.3)) within 2 ulp, exp(0) = 1 exactly, for z <= 0: below -87.3 it gives 1.2e-38 instead of
// less, which is lost beside the maximum's 1. N vectors side by side, because one waits for its own multiply-adds.
template <int N> inline __attribute__((always_inline)) void exp_not_positive(vf (&z)[N]) {
  static const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                       5.0000001201e-1f};
  const vf shift = splat(0x1.8p23f);
  vf biased[N], r[N], p[N];
  for (int c = 0; c < N; ++c) z[c] = max(z[c], splat(-87.3f));
  for (int c = 0; c < N; ++c) biased[c] = z[c] * 1.44269504f + shift;
  for (int c = 0; c < N; ++c) r[c] = z[c] - (biased[c] - shift) * 0.693359375f;
  for (int c = 0; c < N; ++c) r[c] = r[c] - (biased[c] - shift) * -2.12194440e-4f;
  for (int c = 0; c < N; ++c) p[c] = splat(1.9875691500e-4f);
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i)
    for (int c = 0; c < N; ++c) p[c] = p[c] * r[c] + coefficients[i];
  for (int c = 0; c < N; ++c) p[c] = (p[c] * r[c]) * r[c] + r[c] + 1.0f;
  // p lies in [0.7, 1.42]: add n to its exponent
  for (int c = 0; c < N; ++c) z[c] = bit_cast<vf>(bit_cast<vi>(p[c]) + (bit_cast<vi>(biased[c]) << 23));
}

// ---- one segment of one row -----------------------------------------------------------------------------------------
struct Edits {  // sorted by id; a value of -inf forbids
  const int64_t* ids;
  const float* values;
  int64_t count;
  int64_t lower_bound(int64_t id) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (ids[mid] < id) low = mid + 1;
      else high = mid;
    }
    return low;
  }
};

// Returns the n logits of a segment as floats, edited, followed by -inf up to a whole block. Uses `scratch` only where
// that differs from memory.
template <class T> const float* fetch(const void* logits, int n, int64_t first_id, const Edits& edits, float* scratch) {
  const T* p = static_cast<const T*>(logits);
  int64_t edit = edits.lower_bound(first_id);
  const bool edited = edit < edits.count && edits.ids[edit] < first_id + n;
  if (std::is_same<T, float>::value && !edited && n % kBlock == 0) return reinterpret_cast<const float*>(p);
  for (int j = 0; j < n; j += kWidth) store(scratch + j, load_n(p + j, n - j, -kInf));
  const int whole = (n + kBlock - 1) / kBlock * kBlock;
  for (int j = (n + kWidth - 1) / kWidth * kWidth; j < whole; j += kWidth) store(scratch + j, splat(-kInf));
  for (; edit < edits.count && edits.ids[edit] < first_id + n; ++edit) {
    float& l = scratch[edits.ids[edit] - first_id];
    l = edits.values[edit] == -kInf ? -kInf : l + edits.values[edit];
  }
  return scratch;
}

// All that depends on the dtype of the logits. A call of `fetch` is little beside the 2048 ids that it reads.
struct Reader {
  int bytes;  // of a logit
  const float* (*fetch)(const void* logits, int n, int64_t first_id, const Edits& edits, float* scratch);
};
inline Reader reader_of(int dtype) {
  switch (dtype) {
    case ILLADA_F32: return {4, fetch<float>};
    case ILLADA_BF16: return {2, fetch<bf16>};
    case ILLADA_F16: return {2, fetch<fp16>};
  }
  return {0, nullptr};  // no such dtype
}

// Finds the maxima of the segment and of each block, the first id at the maximum, NaNs, and the second maximum if
// asked.
template <bool kSecond>
inline void find_top(const float* logits, int blocks, int64_t first_id, float* block_top, Partial& out) {
  vf top = splat(-kInf), second = splat(-kInf);
  NaNs nans;
  int at = 0;
  for (int b = 0; b < blocks; ++b) {
    const float* x = logits + b * kBlock;
    vf t[4], s[4];
    for (int c = 0; c < 4; ++c) t[c] = s[c] = splat(-kInf);
    for (int j = 0; j < kBlock; j += 4 * kWidth) {
      vf v[4];
      for (int c = 0; c < 4; ++c) {
        v[c] = load(x + j + c * kWidth);
        if (kSecond) s[c] = max(min(v[c], t[c]), s[c]);
        t[c] = max(v[c], t[c]);
      }
      nans.look(v[0], v[1]);
      nans.look(v[2], v[3]);
    }
    for (int c = 1; c < 4; ++c) {
      if (kSecond) s[0] = max(max(s[c], s[0]), min(t[c], t[0]));
      t[0] = max(t[c], t[0]);
    }
    if (kSecond) second = max(max(s[0], second), min(t[0], top));
    top = max(t[0], top);
    block_top[b] = reduce_max(t[0]);
    if (block_top[b] > block_top[at]) at = b;
  }
  out.top = block_top[at];
  out.bad = nans.found() || out.top == kInf;
  if (kSecond) {  // each lane holds one maximum: all but the largest count
    float first = -kInf, other = reduce_max(second);
    for (int i = 0; i < kWidth; ++i) {
      other = std::max(other, std::min(first, top[i]));
      first = std::max(first, top[i]);
    }
    out.second = other;
  }
  if (out.top == -kInf || out.bad) return;
  const float* x = logits + at * kBlock;
  int j = 0;
  while (x[j] != out.top) ++j;
  out.top_id = int32_t(first_id + at * kBlock + j);
}

// Sums exp(z) and z exp(z). `ahead`: memory that the next segment will read, prefetched here, where the bus is idle.
template <bool kEntropy>
inline void add_exponentials(const float* logits, int n, float scale, const char* ahead, int ahead_step, Partial& out) {
  constexpr int kTogether = 4;
  Doubles sum{}, sum_ez{};
  for (int j = 0; j < n; j += kTogether * kWidth) {
    vf z[kTogether], e[kTogether];
    for (int c = 0; c < kTogether; ++c, ahead += ahead_step) {
      __builtin_prefetch(ahead);
      e[c] = z[c] = (load(logits + j + c * kWidth) - out.top) * scale;
    }
    exp_not_positive(e);
    for (int c = 0; c < kTogether; ++c) {
      accumulate(sum, e[c]);
      if (kEntropy) accumulate(sum_ez, z[c] < kLeastShifted ? vf{} : e[c] * z[c]);
    }
  }
  out.sum = total(sum);
  out.sum_ez = total(sum_ez);
}

// Finds the best score of a segment whose maxima are known, if it beats `best`.
template <bool kSparse>
inline void draw_segment(const float* logits, int blocks, int64_t first_id, const float* block_top, const Row& row,
                         const RowNoise& noise, Best& best, Partial& out) {
  // Offers the segment's most likely winner first: a high bar spares work. It is offered again in its turn, to no
  // effect.
  const illada::PhiloxWords w = illada::philox(row.seed, uint32_t(out.top_id / 2), row.position, row.step, 0);
  const float g = out.top_id % 2 ? illada::gumbel(w.w2, w.w3) : illada::gumbel(w.w0, w.w1);
  const int32_t before = best.id;
  best.offer(out.top, illada::noised_score(out.top, row.temperature, g), out.top_id);
  for (int b = 0; b < blocks; ++b)
    if (block_top[b] > -kInf)
      noise_block<kSparse>(noise, row.temperature, logits + b * kBlock, first_id + b * kBlock, block_top[b], best);
  if (best.id != before) out.best_score = best.score, out.best_logit = best.logit, out.best_id = best.id;
}

inline void run_segment(const Reader& reader, const char* p, int n, int64_t first_id, const Edits& edits,
                        const Row& row, const RowNoise& noise, int needs, Best& best, Partial& out) {
  alignas(64) float scratch[kSegment];
  float block_top[kSegment / kBlock];
  const float* logits = reader.fetch(p, n, first_id, edits, scratch);
  const int blocks = (n + kBlock - 1) / kBlock;
  out = Partial{0, 0, -kInf, -kInf, -kInf, -kInf, -kInf, -1, -1, 0};
  if (needs & ILLADA_NEEDS_SECOND) find_top<true>(logits, blocks, first_id, block_top, out);
  else find_top<false>(logits, blocks, first_id, block_top, out);
  if (out.bad || out.top == -kInf) return;
  const char* ahead = p + kSegment * reader.bytes;
  if (needs & ILLADA_NEEDS_ENTROPY)
    add_exponentials<true>(logits, blocks * kBlock, row.scale, ahead, kWidth * reader.bytes, out);
  else add_exponentials<false>(logits, blocks * kBlock, row.scale, ahead, kWidth * reader.bytes, out);
  if (row.held >= first_id && row.held < first_id + n) out.held_logit = logits[row.held - first_id];
  if (!(row.temperature > 0) || needs & ILLADA_NEEDS_NO_DRAW) {
    out.best_score = out.best_logit = out.top, out.best_id = out.top_id;
    return;
  }
  draw_segment<false>(logits, blocks, first_id, block_top, row, noise, best, out);
}

// The logits of ids [first, first + ids) of all rows.
struct Logits {
  Reader reader;
  const void* data;
  int64_t stride_b, stride_k, count, first, ids, segments;
  const Row* rows;
  const char* row(int64_t r) const {
    const int64_t offset = count ? rows[r].index / count * stride_b + rows[r].index % count * stride_k : r * stride_k;
    return static_cast<const char*>(data) + offset * reader.bytes;
  }
};

// Fills the partials of segments [from, to) of `in`, of row r.
void run_segments(const Logits& in, int64_t r, const Edits& edits, int needs, int64_t from, int64_t to,
                  Partial* partials) {
  const Row& row = in.rows[r];
  const char* p = in.row(r);
  const RowNoise noise(row.seed, row.position, row.step);
  const int64_t first_segment = in.first / kSegment;
  Partial* out = partials + r * in.segments + first_segment;
  Best best{-kInf, -kInf, -1};
  if (from == 0)
    for (const Partial* q = out - first_segment; q != out; ++q)
      if (q->best_score > best.score) best = Best{q->best_score, q->best_logit, q->best_id};
  for (int64_t s = from; s < to; ++s) {
    const int n = int(std::min<int64_t>(kSegment, in.ids - s * kSegment));
    run_segment(in.reader, p + s * kSegment * in.reader.bytes, n, in.first + s * kSegment, edits, row, noise, needs,
                best, out[s]);
  }
}

void run_rows(const Logits& in, int64_t rows, const Edits& edits, int needs, Partial* partials, int threads) {
  const int64_t here = (in.ids + kSegment - 1) / kSegment;
  // With few rows several threads share one. Each span starts without a bar to beat, which costs time but changes no
  // bit.
  const int64_t spans =
      rows >= 4 * threads ? 1 : std::min<int64_t>(here, (4 * threads + rows - 1) / std::max<int64_t>(rows, 1));
#pragma omp parallel num_threads(threads)
  {
    const FloatMode mode;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < rows * spans; ++item) {
      const int64_t span = item % spans;
      run_segments(in, item / spans, edits, needs, here * span / spans, here * (span + 1) / spans, partials);
    }
  }
}

}  // namespace
