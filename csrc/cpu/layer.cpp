// What a transformer layer does between its matmuls, on the CPU: RMSNorm, RoPE with the cache's write, SwiGLU.
//
//   rms_norm   x / sqrt(mean(x^2) + eps) * weight, of x + delta where there is a delta
//   rope       (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (x[i], x[i + dim / 2])
//   swiglu     gate / (1 + exp(-gate)) * up
//
// A thread has whole rows. Each is read and written once, in float32 between; bf16 and fp16 round once, at the end
// (rms_norm also before the weight, unless in_fp32). The order of a sum depends on the row's length alone, so equal
// rows get equal bits.
#include <algorithm>
#include <cmath>

#include "illada/api.h"
#include "float_mode.h"
#include "isa.h"
#include "vec.h"

namespace {

constexpr int64_t kAlone = 1 << 15;  // entries that one thread finishes before others have woken up
constexpr int kSums = 4;  // vectors, because one addition waits for the one before

// Adds delta, unless it is null: sum = x + delta, out = norm(sum).
template <class T>
void norm_row(const T* x, const T* delta, const T* weight, int64_t dim, float eps, bool in_fp32, T* sum, T* out) {
  if (delta) {
    for (int64_t i = 0; i < dim; i += kWidth) {
      const int n = int(std::min<int64_t>(kWidth, dim - i));
      store_n(sum + i, load_n(x + i, n) + load_n(delta + i, n), n);
    }
    x = sum;
  }
  vf sums[kSums] = {};
  for (int64_t i = 0; i < dim; i += kSums * kWidth)
    for (int c = 0; c < kSums && i + c * kWidth < dim; ++c) {
      const int64_t at = i + c * kWidth;
      const vf v = load_n(x + at, int(std::min<int64_t>(kWidth, dim - at)));
      sums[c] += v * v;
    }
  const float mean = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(dim);
  const float scale = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < dim; i += kWidth) {
    const int n = int(std::min<int64_t>(kWidth, dim - i));
    vf v = load_n(x + i, n) * scale;
    if (!in_fp32) {
      T rounded[kWidth];
      store(rounded, v);
      v = load(rounded);
    }
    store_n(out + i, v * load_n(weight + i, n), n);
  }
}

template <class T> void rope_row(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
  for (int64_t i = 0; i < half; i += kWidth) {
    const int n = int(std::min<int64_t>(kWidth, half - i));
    const vf a = load_n(x + i, n), b = load_n(x + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(out + i, a * c - b * s, n);
    store_n(out + half + i, b * c + a * s, n);
  }
}

template <class T> void swiglu_row(const T* gate, const T* up, int64_t width, T* out) {
  for (int64_t i = 0; i < width; i += kWidth) {
    const int n = int(std::min<int64_t>(kWidth, width - i));
    const vf g = load_n(gate + i, n);
    store_n(out + i, g / (exp(-g) + 1.0f) * load_n(up + i, n), n);
  }
}

// Calls row(r) for each of `rows` rows of `entries` entries.
template <class Row> void for_rows(int64_t rows, int64_t entries, int threads, const Row& row) {
#pragma omp parallel num_threads(threads) if (rows * entries > kAlone)
  {
    const FloatMode mode;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) row(r);
  }
}

// A call of rope. strides: batch, token and head of q, k and v, those of keys and values, then the batch of cos and
// sin.
struct Rope {
  int64_t length, heads, kv_heads, dim;
  const int64_t* strides;
  const float *cos, *sin;
  const int64_t* starts;  // null: all start
  int64_t start, slots;
  const uint8_t* keep;  // null: all

  int64_t at(int tensor, int64_t b, int64_t token) const {
    return b * strides[3 * tensor] + token * strides[3 * tensor + 1];
  }
  // Returns the slot of a token, or -1 if it is not written: of tokens that share a clamped slot the last one is.
  int64_t slot(int64_t b, int64_t token) const {
    const int64_t raw = (starts ? starts[b] : start) + token;
    if (slots == 0 || (keep && !keep[b * length + token])) return -1;
    if (token + 1 < length && (raw < 0 || raw >= slots - 1)) return -1;
    return std::min(std::max<int64_t>(raw, 0), slots - 1);
  }
};

template <class T>
void run_rope(const Rope& r, int64_t batch, const T* const (&in)[3], T* const (&out)[3], int threads) {
  const int64_t count[] = {r.heads, r.kv_heads, out[2] ? r.kv_heads : 0}, half = r.dim / 2;
  for_rows(batch * r.length, (r.heads + 2 * r.kv_heads) * r.dim, threads, [&](int64_t row) {
    const int64_t b = row / r.length, token = row % r.length, slot = r.slot(b, token);
    const int64_t angle = b * r.strides[15] + token * half;
    for (int tensor = 0; tensor < 3; ++tensor) {
      if (tensor > 0 && slot < 0) break;
      const T* x = in[tensor] + r.at(tensor, b, token);
      T* to = tensor == 0 ? out[0] + row * r.heads * r.dim : out[tensor] + r.at(tensor + 2, b, slot);
      const int64_t x_head = r.strides[3 * tensor + 2], to_head = tensor == 0 ? r.dim : r.strides[3 * tensor + 8];
      for (int64_t h = 0; h < count[tensor]; ++h, x += x_head, to += to_head)
        if (tensor == 2) std::copy_n(x, r.dim, to);
        else rope_row(x, r.cos + angle, r.sin + angle, half, to);
    }
  });
}

template <class T>
void run_norm(const void* x, const void* delta, const void* weight, int64_t rows, int64_t dim, float eps, bool in_fp32,
              void* sum, void* out, int threads) {
  for_rows(rows, dim, threads, [&](int64_t r) {
    const T* added = delta ? static_cast<const T*>(delta) + r * dim : nullptr;
    norm_row(static_cast<const T*>(x) + r * dim, added, static_cast<const T*>(weight), dim, eps, in_fp32,
             static_cast<T*>(sum) + r * dim, static_cast<T*>(out) + r * dim);
  });
}

template <class T> void run_swiglu(const void* gate_up, int64_t rows, int64_t width, void* out, int threads) {
  for_rows(rows, width, threads, [&](int64_t r) {
    const T* gate = static_cast<const T*>(gate_up) + 2 * r * width;
    swiglu_row(gate, gate + width, width, static_cast<T*>(out) + r * width);
  });
}

// Calls run(T()) for the type T of a dtype.
template <class Run> int with_type(int dtype, const Run& run) {
  if (dtype == ILLADA_F32) run(float());
  else if (dtype == ILLADA_BF16) run(bf16());
  else if (dtype == ILLADA_F16) run(fp16());
  else return ILLADA_BAD_DTYPE;
  return ILLADA_OK;
}

}  // namespace

extern "C" int ILLADA_ISA_FN(illada_layer_rms_norm_cpu)(int dtype, const void* x, const void* delta, const void* weight,
                                                        int64_t rows, int64_t dim, float eps, int in_fp32, void* sum,
                                                        void* out, int threads) {
  return with_type(
      dtype, [&](auto t) { run_norm<decltype(t)>(x, delta, weight, rows, dim, eps, in_fp32, sum, out, threads); });
}

extern "C" int ILLADA_ISA_FN(illada_layer_rope_cpu)(int dtype, const void* q, const void* k, const void* v,
                                                    const float* cos, const float* sin, int64_t batch, int64_t length,
                                                    int64_t heads, int64_t kv_heads, int64_t dim,
                                                    const int64_t* strides, void* rotated, void* keys, void* values,
                                                    int64_t slots, int64_t start, const int64_t* starts,
                                                    const uint8_t* keep, int threads) {
  const Rope rope{length, heads, kv_heads, dim, strides, cos, sin, starts, start, slots, keep};
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* const in[] = {static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v)};
    T* const out[] = {static_cast<T*>(rotated), static_cast<T*>(keys), static_cast<T*>(values)};
    run_rope<T>(rope, batch, in, out, threads);
  });
}

extern "C" int ILLADA_ISA_FN(illada_layer_swiglu_cpu)(int dtype, const void* gate_up, int64_t rows, int64_t width,
                                                      void* out, int threads) {
  return with_type(dtype, [&](auto t) { run_swiglu<decltype(t)>(gate_up, rows, width, out, threads); });
}
