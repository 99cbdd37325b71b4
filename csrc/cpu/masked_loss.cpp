// The row kernels of masked_loss on the CPU: what lies between the matmuls of the LM head, or all of
// masked_loss_from_logits.
//
//   z = softcap(logit + bias), -inf at forbidden ids;  loss = lse(z) - (1 - e) z_target - e mean(z) + z_loss lse(z)^2
//
// `stats` reads a slice of columns once and updates each row's state {max, sum of exp(z - max), z at the target, sum of
// z}, so a row may come in slices. `dlogits` reads a slice once and writes scale * d(loss)/d(logit), in place if asked
// to. A thread owns whole rows and takes them in blocks of kBlock columns, which stay in L1. Within a block everything
// accumulates in float32, over blocks in float64; the order depends on the slices alone, never on the threads. A NaN
// logit makes its row NaN; a row of -inf has sum 0.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "illada/api.h"
#include "float_mode.h"
#include "isa.h"
#include "vec.h"

namespace {

constexpr int kBlock = 512;  // a multiple of every vector width; 2 KiB of floats
constexpr float kTinyWork = 1 << 14;  // elements: fewer are not worth a second thread

typedef double vd __attribute__((vector_size(kWidth * 8)));

// Returns tanh(x) within 2 ulp; near 0 by its series, because 1 - 2 / (exp(2x) + 1) would cancel.
inline vf tanh(vf x) {
  const vf a = x < 0.0f ? -x : x, s = a * a;
  vf p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const vf near = p * s * a + a, far = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  const vf t = a < 0.625f ? near : far;
  return x < 0.0f ? -t : t;
}

// A slice of columns [first, first + count) of a row: what is added to its logits, and which are forbidden.
struct Columns {
  int64_t first, count;
  const float* bias;  // of the slice; null: none
  float softcap;  // 0: none
  const int64_t* forbid;  // ascending ids
  int64_t n_forbid;

  // Returns the first forbidden id that is not below `id`.
  const int64_t* forbidden_from(int64_t id) const { return std::lower_bound(forbid, forbid + n_forbid, id); }
};

// Writes z of the n columns from `at` on (relative to the slice) to z[0, n), before any is forbidden, and `rest` up to
// a whole vector behind them.
template <class T> void load_block(const T* logits, const Columns& c, int64_t at, int n, float rest, float* z) {
  for (int i = 0; i < n; i += kWidth) {
    vf v = load_n(logits + at + i, n - i, rest);
    if (c.bias) v += load_n(c.bias + at + i, n - i);
    if (c.softcap > 0) {
      const vf t = v / c.softcap;  // subnormal for a huge cap: tanh(t) is t to half an ulp long before
      v = (t < 0.0f ? -t : t) < 0x1p-13f ? v : c.softcap * tanh(t);
      for (int k = n - i; k < kWidth; ++k) v[k] = rest;
    }
    store(z + i, v);
  }
}

template <class T> void row_stats(const T* logits, const Columns& c, int64_t target, bool want_total, double* state) {
  alignas(64) float z[kBlock];
  const int64_t* forbid = c.forbidden_from(c.first);
  const int64_t* const forbid_end = c.forbid + c.n_forbid;
  for (int64_t at = 0; at < c.count; at += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, c.count - at));
    const int64_t id = c.first + at;
    load_block(logits, c, at, n, -kInf, z);
    const int64_t* const begin = forbid;
    for (; forbid != forbid_end && *forbid < id + n; ++forbid) z[*forbid - id] = 0;
    if (want_total) {
      vd total{};
      for (int i = 0; i < n; i += kWidth) total += __builtin_convertvector(load_n(z + i, n - i), vd);
      for (int k = 0; k < kWidth; ++k) state[3] += total[k];
    }
    for (const int64_t* f = begin; f != forbid; ++f) z[*f - id] = -kInf;
    if (target >= id && target < id + n) state[2] = z[target - id];

    vf high = splat(-kInf);
    for (int i = 0; i < n; i += kWidth) high = max(load(z + i), high);
    const float block_max = reduce_max(high);
    if (block_max > state[0]) {
      state[1] *= std::exp(state[0] - block_max);
      state[0] = block_max;
    }
    const float shift = state[0] == -kInf ? 0.0f : float(state[0]);  // because -inf - -inf is NaN
    vf sum{};
    for (int i = 0; i < n; i += kWidth) sum += exp(load(z + i) - shift);
    state[1] += reduce_add(sum);
  }
}

// Writes a row's gradients. coefficients: {max, factor of exp(z - max), subtrahend of every allowed id, of the target}.
template <class T>
void row_dlogits(const T* logits, T* out, const Columns& c, int64_t target, const float* coefficients) {
  alignas(64) float z[kBlock];
  const float shift = coefficients[0], factor = coefficients[1], uniform = coefficients[2], at_target = coefficients[3];
  const float inverse_cap = c.softcap > 0 ? 1 / c.softcap : 0.0f;  // without a cap the slope below is exactly 1
  const int64_t* forbid = c.forbidden_from(c.first);
  const int64_t* const forbid_end = c.forbid + c.n_forbid;
  for (int64_t at = 0; at < c.count; at += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, c.count - at));
    const int64_t id = c.first + at;
    load_block(logits, c, at, n, 0.0f, z);
    float target_slope = 0;
    if (target >= id && target < id + n) {
      const float t = z[target - id] * inverse_cap;
      target_slope = (1 - t) * (1 + t);
    }
    for (int i = 0; i < n; i += kWidth) {
      const vf v = load(z + i), t = inverse_cap > 0 ? v * inverse_cap : vf{};
      store(z + i, (factor * exp(v - shift) - uniform) * ((1.0f - t) * (1.0f + t)));
    }
    if (target >= id && target < id + n) z[target - id] -= at_target * target_slope;
    for (; forbid != forbid_end && *forbid < id + n; ++forbid) z[*forbid - id] = 0;
    for (int i = 0; i < n; i += kWidth) store_n(out + at + i, load(z + i), n - i);
  }
}

template <class T>
void stats(const T* logits, int64_t rows, int64_t stride, const int64_t* row_index, const Columns& c,
           const int64_t* targets, bool want_total, double* state, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && float(rows) * c.count > kTinyWork)
  {
    const FloatMode mode;
#pragma omp for
    for (int64_t r = 0; r < rows; ++r)
      row_stats(logits + (row_index ? row_index[r] : r) * stride, c, targets[r], want_total, state + 4 * r);
  }
}

template <class T>
void dlogits(const T* logits, int64_t stride, T* out, int64_t out_stride, int64_t rows, const int64_t* row_index,
             const Columns& c, const int64_t* targets, const float* coefficients, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && float(rows) * c.count > kTinyWork)
  {
    const FloatMode mode;
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row_index ? row_index[r] : r;
      row_dlogits(logits + row * stride, out + row * out_stride, c, targets[r], coefficients + 4 * r);
    }
  }
}

}  // namespace

extern "C" int ILLADA_ISA_FN(illada_masked_loss_stats_cpu)(const void* logits, int dtype, int64_t rows, int64_t stride,
                                                           const int64_t* row_index, int64_t first, int64_t count,
                                                           const float* bias, float softcap, const int64_t* targets,
                                                           const int64_t* forbid, int64_t n_forbid, int want_total,
                                                           double* state, int threads) {
  if (rows < 0 || count < 0 || threads < 1) return ILLADA_BAD_ARGUMENT;
  const Columns c{first, count, bias, softcap, forbid, n_forbid};
  const auto run = [&](const auto* typed) {
    stats(typed, rows, stride, row_index, c, targets, want_total != 0, state, threads);
  };
  switch (dtype) {
    case ILLADA_F32: run(static_cast<const float*>(logits)); break;
    case ILLADA_BF16: run(static_cast<const bf16*>(logits)); break;
    case ILLADA_F16: run(static_cast<const fp16*>(logits)); break;
    default: return ILLADA_BAD_DTYPE;
  }
  return ILLADA_OK;
}

extern "C" int ILLADA_ISA_FN(illada_masked_loss_dlogits_cpu)(const void* logits, int64_t stride, void* out,
                                                             int64_t out_stride, int dtype, int64_t rows,
                                                             const int64_t* row_index, int64_t first, int64_t count,
                                                             const float* bias, float softcap, const int64_t* targets,
                                                             const int64_t* forbid, int64_t n_forbid,
                                                             const float* coefficients, int threads) {
  if (rows < 0 || count < 0 || threads < 1) return ILLADA_BAD_ARGUMENT;
  const Columns c{first, count, bias, softcap, forbid, n_forbid};
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    dlogits(static_cast<const T*>(logits), stride, typed, out_stride, rows, row_index, c, targets, coefficients,
            threads);
  };
  switch (dtype) {
    case ILLADA_F32: run(static_cast<float*>(out)); break;
    case ILLADA_BF16: run(static_cast<bf16*>(out)); break;
    case ILLADA_F16: run(static_cast<fp16*>(out)); break;
    default: return ILLADA_BAD_DTYPE;
  }
  return ILLADA_OK;
}
