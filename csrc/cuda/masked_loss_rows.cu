// masked_loss_from_logits: log-sum-exp and loss of each masked row, and their gradient.
//
//   z = softcap(logit + bias), -inf at forbidden ids;  lse = log sum exp z
//   loss = lse - (1 - e) z_target - e mean(z) + z_loss lse^2
//   dlogit = scale ((1 + 2 z_loss lse) exp(z - lse) - e / allowed - [target] (1 - e)) dz/dlogit
//
// One block per row, 16 bytes a thread and step where the row is aligned, single elements at its ends. fwd reads each masked
// row once, online; bwd reads it once and writes every row once (zeros, or NaN where scale is NaN, if not masked); it may
// write over the logits. About 8 flops an element: bound by memory. Accumulates in float32, 256 partial sums a row, reduced
// in a fixed order: equal inputs give equal bits. A NaN logit, or a target outside the vocabulary, makes the row NaN.
#include "device.cuh"
#include "illada/api.h"

namespace {

using namespace illada;

constexpr int kThreads = 256;
constexpr float kLog2e = 1.4426950408889634f;

ILLADA_DEVICE float infinity() { return __int_as_float(0x7f800000); }
ILLADA_DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
ILLADA_DEVICE float exp_of(float x) { return fast_exp2(x * kLog2e); }

struct Options {
  int64_t vocab;
  const float* bias;  // or null
  float softcap;      // 0: none
  float smoothing, z_loss;
  const int64_t* forbid;  // ascending
  int64_t n_forbid;
};

// Position in `forbid` of the first id that is not below `id`.
ILLADA_DEVICE int64_t forbidden_from(const Options& o, int64_t id) {
  int64_t low = 0, high = o.n_forbid;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (o.forbid[middle] < id) low = middle + 1; else high = middle;
  }
  return low;
}

// z of one logit, and dz/dlogit.
ILLADA_DEVICE float capped(const Options& o, float logit, int64_t id, float* slope) {
  const float x = o.bias ? logit + o.bias[id] : logit;
  *slope = 1.0f;
  if (o.softcap <= 0.0f) return x;
  const float t = tanhf(x / o.softcap);
  *slope = (1.0f - t) * (1.0f + t);
  return o.softcap * t;
}

// Calls body(first id, std::integral_constant<int, N>) for this thread's share of a row: whole 16-byte vectors, which start
// at `head` (the first aligned element), and the elements before and behind them one by one.
template <int N> struct Count { static constexpr int value = N; };
template <int VECTOR, class Body> ILLADA_DEVICE void share_of_row(int64_t vocab, int64_t head, Body body) {
  const int64_t vectors = (vocab - head) / VECTOR, tail = head + vectors * VECTOR;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) body(head + i * VECTOR, Count<VECTOR>{});
  if (threadIdx.x < head) body(int64_t(threadIdx.x), Count<1>{});
  if (tail + threadIdx.x < vocab) body(tail + threadIdx.x, Count<1>{});
}

// Elements before the first 16-byte boundary of a row; all of it single elements where two rows are not aligned alike.
template <class T> ILLADA_DEVICE int64_t unaligned_head(const T* row, int64_t vocab) {
  const int64_t head = int64_t((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  return head < vocab ? head : vocab;
}

template <int N, class T> ILLADA_DEVICE void load(const T* p, float (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = to_float(*p);
  } else {
    const Vec16<T> v = load16(p);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = to_float(v.at[k]);
  }
}
template <int N, class T> ILLADA_DEVICE void store(T* p, const float (&x)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(x[0]);
  } else {
    Vec16<T> v;
#pragma unroll
    for (int k = 0; k < N; ++k) v.at[k] = from_float<T>(x[k]);
    store16_streaming(p, v);
  }
}

// Sets x at the forbidden ids among the N from `id` on; N is known, so x stays in registers.
template <int N> ILLADA_DEVICE void set_forbidden(const Options& o, int64_t id, float value, float (&x)[N]) {
  if (o.n_forbid == 0) return;
  for (int64_t f = forbidden_from(o, id); f < o.n_forbid && o.forbid[f] < id + N; ++f) {
    const int at = int(o.forbid[f] - id);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = k == at ? value : x[k];
  }
}

struct Online {
  float high, sum, at_target, total;  // max, sum of exp(z - max), z of the target if this thread met it, sum of z
};

template <int N, class T>
ILLADA_DEVICE void meet(const Options& o, const T* row, int64_t id, int64_t target, Online& s) {
  float z[N], slope;
  load(row + id, z);
#pragma unroll
  for (int k = 0; k < N; ++k) z[k] = capped(o, z[k], id + k, &slope);
  if (o.smoothing > 0.0f) {
    set_forbidden(o, id, 0.0f, z);
#pragma unroll
    for (int k = 0; k < N; ++k) s.total += z[k];
  }
  set_forbidden(o, id, -infinity(), z);
  float high = s.high;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (id + k == target) s.at_target = z[k];
    high = fmaxf(high, z[k]);
  }
  if (high > s.high) {
    s.sum *= exp_of(s.high - high);  // from -inf: 0 * 0
    s.high = high;
  }
  const float shift = s.high == -infinity() ? 0.0f : s.high;  // -inf - -inf would be NaN
#pragma unroll
  for (int k = 0; k < N; ++k) s.sum += exp_of(z[k] - shift);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
rows_fwd(const T* logits, int64_t stride, const uint8_t* masked, const int64_t* targets, Options o, float* losses, float* stats) {
  const int64_t r = blockIdx.x;
  if (!masked[r]) {
    if (threadIdx.x == 0) losses[r] = 0.0f, stats[2 * r] = 0.0f, stats[2 * r + 1] = 1.0f;
    return;
  }
  float* scratch = reinterpret_cast<float*>(dynamic_smem());
  const T* row = logits + r * stride;
  const int64_t target = targets[r];
  Online s{-infinity(), 0.0f, -infinity(), 0.0f};
  constexpr int kVector = Vec16<T>::size;
  share_of_row<kVector>(o.vocab, unaligned_head(row, o.vocab), [&](int64_t id, auto count) {
    meet<decltype(count)::value>(o, row, id, target, s);
  });
  const float high = block_reduce<kThreads>(s.high, scratch, Max{});
  const float kept = s.high == -infinity() ? s.sum : s.sum * exp_of(s.high - high);  // a sum without a max is 0 or NaN
  const float sum = block_reduce<kThreads>(kept, scratch, Sum{});
  const float at_target = block_reduce<kThreads>(s.at_target, scratch, Max{});
  const float total = o.smoothing > 0.0f ? block_reduce<kThreads>(s.total, scratch, Sum{}) : 0.0f;
  if (threadIdx.x != 0) return;
  const float log_sum = logf(sum), lse = high + log_sum;
  float loss = log_sum + (1.0f - o.smoothing) * (high - at_target);
  if (o.smoothing > 0.0f) loss += o.smoothing * (high - total / float(o.vocab - o.n_forbid));
  if (o.z_loss > 0.0f) loss += o.z_loss * lse * lse;
  losses[r] = target >= 0 && target < o.vocab ? loss : not_a_number();
  stats[2 * r] = high;
  stats[2 * r + 1] = sum;
}

struct Coefficients {
  float high, factor, uniform, at_target;
};

template <int N, class T>
ILLADA_DEVICE void differentiate(const Options& o, const T* row, T* out, int64_t id, int64_t target, const Coefficients& c) {
  float d[N];
  load(row + id, d);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    float slope;
    const float z = capped(o, d[k], id + k, &slope);
    d[k] = (c.factor * exp_of(z - c.high) - c.uniform - (id + k == target ? c.at_target : 0.0f)) * slope;
  }
  set_forbidden(o, id, 0.0f, d);
  store(out + id, d);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
rows_bwd(const T* logits, int64_t stride, T* out, int64_t out_stride, const uint8_t* masked, const int64_t* targets,
         const float* stats, const float* scales, Options o) {
  const int64_t r = blockIdx.x;
  const T* row = logits + r * stride;
  T* out_row = out + r * out_stride;
  const int64_t target = targets[r];
  const bool good = !masked[r] || (target >= 0 && target < o.vocab);
  const float scale = good ? scales[r] : not_a_number();
  constexpr int kVector = Vec16<T>::size;
  if (scale != scale || !masked[r]) {
    const float fill = scale == scale ? 0.0f : scale;
    share_of_row<kVector>(o.vocab, unaligned_head(out_row, o.vocab), [&](int64_t id, auto count) {
      float x[decltype(count)::value];
      for (float& at : x) at = fill;
      store(out_row + id, x);
    });
    return;
  }
  const float high = stats[2 * r], sum = stats[2 * r + 1];
  const Coefficients c{high, scale * (1.0f + 2.0f * o.z_loss * (high + logf(sum))) / sum,
                       scale * o.smoothing / float(o.vocab - o.n_forbid), scale * (1.0f - o.smoothing)};
  if ((reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(out_row)) % 16 == 0) {
    share_of_row<kVector>(o.vocab, unaligned_head(row, o.vocab), [&](int64_t id, auto count) {
      differentiate<decltype(count)::value>(o, row, out_row, id, target, c);
    });
  } else {
    for (int64_t id = threadIdx.x; id < o.vocab; id += kThreads) differentiate<1>(o, row, out_row, id, target, c);
  }
}

}  // namespace

#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches: illada_kernels/ops/masked_loss/nvrtc.py
namespace {

constexpr size_t kScratch = kThreads / 32 * sizeof(float);

bool sizes_fit(int64_t rows, int64_t vocab) { return rows >= 0 && rows <= 0x7fffffff && vocab >= 1; }

template <class T>
int fwd(const void* logits, int64_t rows, int64_t stride, const uint8_t* masked, const int64_t* targets, const Options& o, float* losses,
        float* stats, cudaStream_t stream) {
  return launch({dim3(unsigned(rows)), dim3(kThreads), kScratch, stream}, rows_fwd<T>, static_cast<const T*>(logits), stride, masked,
                targets, o, losses, stats);
}

template <class T>
int bwd(const void* logits, int64_t stride, void* out, int64_t out_stride, int64_t rows, const uint8_t* masked, const int64_t* targets,
        const float* stats, const float* scales, const Options& o, cudaStream_t stream) {
  return launch({dim3(unsigned(rows)), dim3(kThreads), 0, stream}, rows_bwd<T>, static_cast<const T*>(logits), stride,
                static_cast<T*>(out), out_stride, masked, targets, stats, scales, o);
}

}  // namespace

extern "C" int illada_masked_loss_rows_fwd(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t stride,
                                           const uint8_t* masked, const int64_t* targets, const float* bias, float softcap,
                                           float label_smoothing, float z_loss, const int64_t* forbid, int64_t n_forbid,
                                           float* losses, float* stats, void* stream) {
  if (!sizes_fit(rows, vocab)) return int(cudaErrorInvalidValue);
  const Options o{vocab, bias, softcap, label_smoothing, z_loss, forbid, n_forbid};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case ILLADA_F32: return fwd<float>(logits, rows, stride, masked, targets, o, losses, stats, on);
    case ILLADA_BF16: return fwd<bf16>(logits, rows, stride, masked, targets, o, losses, stats, on);
    case ILLADA_F16: return fwd<fp16>(logits, rows, stride, masked, targets, o, losses, stats, on);
  }
  return int(cudaErrorInvalidValue);
}

extern "C" int illada_masked_loss_rows_bwd(const void* logits, int64_t stride, void* out, int64_t out_stride, int dtype, int64_t rows,
                                           int64_t vocab, const uint8_t* masked, const int64_t* targets, const float* stats,
                                           const float* scales, const float* bias, float softcap, float label_smoothing, float z_loss,
                                           const int64_t* forbid, int64_t n_forbid, void* stream) {
  if (!sizes_fit(rows, vocab)) return int(cudaErrorInvalidValue);
  const Options o{vocab, bias, softcap, label_smoothing, z_loss, forbid, n_forbid};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case ILLADA_F32: return bwd<float>(logits, stride, out, out_stride, rows, masked, targets, stats, scales, o, on);
    case ILLADA_BF16: return bwd<bf16>(logits, stride, out, out_stride, rows, masked, targets, stats, scales, o, on);
    case ILLADA_F16: return bwd<fp16>(logits, stride, out, out_stride, rows, masked, targets, stats, scales, o, on);
  }
  return int(cudaErrorInvalidValue);
}
#endif
