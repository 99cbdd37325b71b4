// masked_loss between the matmuls: statistics of rows of logits, and their gradients.
//
//   z = softcap(logit + bias), -inf at forbidden ids;  lse = log sum exp z
//   dlogit = scale ((1 + 2 z_loss lse) exp(z - lse) - e / allowed - [target] (1 - e)) dz/dlogit
//
// A block owns a row; 16 bytes a thread and access where the row is aligned, single elements at its ends. rows_stats
// reads a slice of ids once and merges it into the row's state; rows_dlogits reads a slice once and writes it once.
// rows_gradients does both to whole rows in place: it keeps what fits in shared memory and reads the rest twice, the
// second time from L2. PLAIN: without bias, cap, smoothing, forbidden ids. About 8 flops an element: bound by memory.
// Accumulates in float32 in a fixed order. A NaN logit, a NaN scale, or a target that is not an id makes the row's
// gradients NaN; rows beyond the number of masked ones become zeros.
#include "masked_loss.cuh"
#include "masked_loss_vectors.cuh"

namespace illada {
namespace loss {

constexpr int kThreads = 256;  // rows_stats, rows_dlogits: many blocks per SM, also for short slices
constexpr int kWideThreads = 512;  // rows_gradients: one block per SM, which takes all shared memory
constexpr int kScratch = 128;  // bytes of shared memory for reductions, before the row

// Tells the compiler which terms a PLAIN kernel's formula lacks. With all of them a body is large, so loops over rows
// hold fewer copies of it and fewer loads.
template <bool PLAIN> ILLADA_DEVICE void drop_terms(Options& o) {
  if constexpr (PLAIN) o.bias = nullptr, o.softcap = 0.0f, o.smoothing = 0.0f, o.n_forbid = 0;
}

ILLADA_DEVICE float exp_of(float x) { return fast_exp2(x * kLog2e); }

// ---- the ids of a row -----------------------------------------------------------------------------------------------

// Returns the position in `forbid` of the first id that is not below `id`.
ILLADA_DEVICE int64_t forbidden_from(const Options& o, int id) {
  int64_t low = 0, high = o.n_forbid;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (o.forbid[middle] < id) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Sets x at the forbidden ids among the N from `id` on. N is a constant, so x stays in registers.
template <int N> ILLADA_DEVICE void set_forbidden(const Options& o, int id, float value, float (&x)[N]) {
  if (o.n_forbid == 0) return;
  for (int64_t f = forbidden_from(o, id); f < o.n_forbid && o.forbid[f] < id + N; ++f) {
    const int at = int(o.forbid[f] - id);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = k == at ? value : x[k];
  }
}

// Turns x into z; slope becomes dz/dlogit.
template <int N> ILLADA_DEVICE void cap(const Options& o, int id, float (&x)[N], float (&slope)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) slope[k] = 1.0f;
  if (o.bias) {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] += o.bias[id + k];
  }
  if (o.softcap <= 0.0f) return;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float t = tanhf(x[k] / o.softcap);
    slope[k] = (1.0f - t) * (1.0f + t);
    x[k] = o.softcap * t;
  }
}

// ---- statistics -----------------------------------------------------------------------------------------------------

struct Online {
  float high, sum, total;  // max, sum of exp(z - max), sum of z
};

// Adds the ids from `id` on to the statistics; x becomes z.
template <int N>
ILLADA_DEVICE void meet(const Options& o, int id, int target, float (&x)[N], Online& s, float* at_target) {
  float unused[N];
  cap(o, id, x, unused);
  if (o.smoothing > 0.0f) {
    set_forbidden(o, id, 0.0f, x);
    float total = x[0];
#pragma unroll
    for (int k = 1; k < N; ++k) total += x[k];
    s.total += total;
  }
  set_forbidden(o, id, -infinity(), x);
  if (unsigned(target - id) < N) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (id + k == target) *at_target = x[k];
  }
  float high = s.high;
#pragma unroll
  for (int k = 0; k < N; ++k) high = fmaxf(high, x[k]);
  if (high > s.high) {
    s.sum *= exp_of(s.high - high);  // from -inf: 0 * 0
    s.high = high;
  }
  const float shift = s.high == -infinity() ? 0.0f : s.high;  // because -inf - -inf is NaN
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < N; ++k) sum += exp_of(x[k] - shift);
  s.sum += sum;
}

// Merges the statistics of the block; every thread gets them. A sum without a max is 0 or NaN.
template <int THREADS> ILLADA_DEVICE Online over_block(const Options& o, Online s, float* scratch) {
  const float high = block_reduce<THREADS>(s.high, scratch, Max{});
  const float kept = s.high == -infinity() ? s.sum : s.sum * exp_of(s.high - high);
  const float sum = block_reduce<THREADS>(kept, scratch, Sum{});
  const float total = o.smoothing > 0.0f ? block_reduce<THREADS>(s.total, scratch, Sum{}) : 0.0f;
  return {high, sum, total};
}

// Returns the target as an id, or -1 if it is not one.
ILLADA_DEVICE int id_of(const Options& o, int64_t target) { return target >= 0 && target < o.vocab ? int(target) : -1; }

// Returns row r's place among those held, by its slot or in the order of rows; -1: not held.
ILLADA_DEVICE int64_t place_of(int64_t r, const int32_t* slot, const int32_t* info, int64_t start, int64_t held) {
  if (slot) return slot[r] < held ? slot[r] : -1;
  return start + r < info[0] ? r : -1;
}

template <class T, bool PLAIN>
__global__ void __launch_bounds__(kThreads, 4)
    rows_stats(const T* logits, int64_t inner, int64_t outer_stride, int64_t stride, const int32_t* slot,
               const int32_t* info, int64_t start, int64_t held, int first, int width, const int64_t* targets,
               Options o, float* state) {
  drop_terms<PLAIN>(o);
  const int64_t r = blockIdx.x, place = place_of(r, slot, info, start, held);
  if (place < 0) return;
  const T* row = logits + r / inner * outer_stride + r % inner * stride;
  const int target = id_of(o, targets[place]);
  float* s = state + 4 * place;
  Online mine{-infinity(), 0.0f, 0.0f};
  over_row<kThreads, PLAIN ? 4 : 2, true>(
      row, width, 0, [](int, const uint4&) {}, [&](int at, auto& x) { meet(o, first + at, target, x, mine, s + 2); });
  const Online slice = over_block<kThreads>(o, mine, reinterpret_cast<float*>(dynamic_smem()));
  if (threadIdx.x != 0) return;
  if (first == 0) {
    s[0] = slice.high, s[1] = slice.sum, s[3] = slice.total;
    if (target < 0 || target >= width) s[2] = -infinity();
    return;
  }
  const float before = s[0], high = fmaxf(before, slice.high), shift = high == -infinity() ? 0.0f : high;
  s[1] = s[1] * exp_of(before - shift) + slice.sum * exp_of(slice.high - shift);
  s[0] = high, s[3] += slice.total;
}

// ---- gradients ------------------------------------------------------------------------------------------------------

struct Coefficients {
  float high, factor, uniform, at_target;
};

ILLADA_DEVICE Coefficients coefficients(const Options& o, float high, float sum, float scale) {
  return {high, scale * (1.0f + 2.0f * o.z_loss * (high + logf(sum))) / sum,
          scale * o.smoothing / float(o.vocab - o.n_forbid), scale * (1.0f - o.smoothing)};
}

// Turns the logits x of the ids from `id` on into their gradients.
template <int N>
ILLADA_DEVICE void differentiate(const Options& o, int id, int target, const Coefficients& c, float (&x)[N]) {
  float slope[N];
  cap(o, id, x, slope);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = c.factor * exp_of(x[k] - c.high) - c.uniform;
  if (unsigned(target - id) < N) {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] -= id + k == target ? c.at_target : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] *= slope[k];
  set_forbidden(o, id, 0.0f, x);
}

template <class T, bool PLAIN>
__global__ void __launch_bounds__(kThreads, 4)
    rows_dlogits(const T* logits, int64_t inner, int64_t outer_stride, int64_t stride, T* out, int64_t out_stride,
                 const int32_t* slot, const int32_t* info, int64_t start, int64_t held, int64_t capacity, int first,
                 int width, const int64_t* targets, const float* state, const float* scales, Options o) {
  drop_terms<PLAIN>(o);
  const int64_t r = blockIdx.x, place = place_of(r, slot, info, start, held);
  T* out_row = out + r * out_stride;
  const bool overflow = slot && info[0] > capacity;
  float scale = overflow ? not_a_number() : place < 0 ? 0.0f : scales[place];
  int target = 0;
  if (place >= 0 && !overflow) {
    target = id_of(o, targets[place]);
    if (target < 0) scale = not_a_number();
  }
  if (place < 0 || scale != scale) return fill_row<kThreads>(out_row, width, scale);
  const T* row = logits + r / inner * outer_stride + r % inner * stride;
  const Coefficients c = coefficients(o, state[4 * place], state[4 * place + 1], scale);
  const auto write = [&](int at, auto& x) {
    differentiate(o, first + at, target, c, x);
    store(out_row + at, x);
  };
  if ((reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(out_row)) % 16 == 0) {
    over_row<kThreads, PLAIN ? 4 : 2, true>(row, width, 0, [](int, const uint4&) {}, write);
  } else {
    for (int at = threadIdx.x; at < width; at += kThreads) {
      float x[1];
      load(row + at, x);
      write(at, x);
    }
  }
}

template <class T, bool PLAIN>
__global__ void __launch_bounds__(kWideThreads, 1)
    rows_gradients(T* logits, int64_t stride, const int32_t* info, int64_t start, const int64_t* targets,
                   const float* scales, Options o, float* state, int kept) {
  drop_terms<PLAIN>(o);
  const int64_t r = blockIdx.x;
  T* row = logits + r * stride;
  const int vocab = int(o.vocab), live = info[0], target = id_of(o, targets[r]);
  const float scale = target >= 0 ? scales[r] : not_a_number();
  if (start + r >= live) return fill_row<kWideThreads>(row, vocab, 0.0f);
  float* scratch = reinterpret_cast<float*>(dynamic_smem());
  // The first `kept` vectors; each thread reads its own.
  uint4* kept_vectors = reinterpret_cast<uint4*>(dynamic_smem() + kScratch);
  float* s = state + 4 * r;
  Online mine{-infinity(), 0.0f, 0.0f};
  over_row<kWideThreads, PLAIN ? 6 : 2, false>(
      row, vocab, 0,
      [&](int i, const uint4& bits) {
        if (i < kept) kept_vectors[i] = bits;
      },
      [&](int at, auto& x) { meet(o, at, target, x, mine, s + 2); });
  const Online all = over_block<kWideThreads>(o, mine, scratch);
  if (threadIdx.x == 0) {
    s[0] = all.high, s[1] = all.sum, s[3] = all.total;
    if (target < 0) s[2] = -infinity();
  }
  if (scale != scale) return fill_row<kWideThreads>(row, vocab, scale);
  const Coefficients c = coefficients(o, all.high, all.sum, scale);
  const auto write = [&](int at, auto& x) {
    differentiate(o, at, target, c, x);
    store(row + at, x);
  };
  over_row<kWideThreads, PLAIN ? 6 : 2, true>(row, vocab, kept, [](int, const uint4&) {}, write);
  const int head = unaligned_head(row, vocab), vectors = (vocab - head) / Vec16<T>::size;
  for (int i = threadIdx.x; i < kept && i < vectors; i += kWideThreads) {
    float x[Vec16<T>::size];
    widen<T>(kept_vectors[i], x);
    write(head + i * Vec16<T>::size, x);
  }
}

}  // namespace loss
}  // namespace illada

// ---- entry points ---------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches: illada_kernels/ops/masked_loss/nvrtc.py
#include <type_traits>

#include "illada/api.h"

namespace {

using namespace illada;
using namespace illada::loss;

// Ids are ints, and loops step slightly beyond the end of a row.
bool sizes_fit(int64_t rows, int64_t vocab) {
  return rows >= 0 && rows <= 0x7fffffff && vocab >= 1 && vocab <= 0x7fff0000;
}

// Calls run(T{}, std::bool_constant<PLAIN>{}) for the T that dtype names.
template <class Run> int with_kernel(int dtype, const Options& o, Run run) {
  const bool plain = !o.bias && o.softcap <= 0.0f && o.smoothing <= 0.0f && o.n_forbid == 0;
  const auto with_type = [&](auto t) { return plain ? run(t, std::true_type{}) : run(t, std::false_type{}); };
  switch (dtype) {
    case ILLADA_F32: return with_type(float{});
    case ILLADA_BF16: return with_type(bf16{});
    case ILLADA_F16: return with_type(fp16{});
  }
  return int(cudaErrorInvalidValue);
}

}  // namespace

extern "C" int illada_masked_loss_rows_stats_cuda(const void* logits, int dtype, int64_t inner, int64_t outer_stride,
                                                  int64_t stride, const int32_t* slot, const int32_t* info,
                                                  int64_t start, int64_t rows, int64_t held, int64_t first,
                                                  int64_t width, const int64_t* targets, int64_t vocab,
                                                  const float* bias, float softcap, float label_smoothing, float z_loss,
                                                  const int64_t* forbid, int64_t n_forbid, float* state, void* stream) {
  if (!sizes_fit(rows, vocab)) return int(cudaErrorInvalidValue);
  const Options o{vocab, bias, softcap, label_smoothing, z_loss, forbid, n_forbid};
  const Launch how{dim3(unsigned(rows)), dim3(kThreads), kScratch, static_cast<cudaStream_t>(stream)};
  return with_kernel(dtype, o, [&](auto t, auto plain) {
    using T = decltype(t);
    return launch(how, rows_stats<T, plain.value>, static_cast<const T*>(logits), inner, outer_stride, stride, slot,
                  info, start, held, int(first), int(width), targets, o, state);
  });
}

extern "C" int illada_masked_loss_rows_dlogits_cuda(const void* logits, int dtype, int64_t inner, int64_t outer_stride,
                                                    int64_t stride, void* out, int64_t out_stride, const int32_t* slot,
                                                    const int32_t* info, int64_t start, int64_t rows, int64_t held,
                                                    int64_t capacity, int64_t first, int64_t width,
                                                    const int64_t* targets, const float* state, const float* scales,
                                                    int64_t vocab, const float* bias, float softcap,
                                                    float label_smoothing, float z_loss, const int64_t* forbid,
                                                    int64_t n_forbid, void* stream) {
  if (!sizes_fit(rows, vocab)) return int(cudaErrorInvalidValue);
  const Options o{vocab, bias, softcap, label_smoothing, z_loss, forbid, n_forbid};
  const Launch how{dim3(unsigned(rows)), dim3(kThreads), 0, static_cast<cudaStream_t>(stream)};
  return with_kernel(dtype, o, [&](auto t, auto plain) {
    using T = decltype(t);
    return launch(how, rows_dlogits<T, plain.value>, static_cast<const T*>(logits), inner, outer_stride, stride,
                  static_cast<T*>(out), out_stride, slot, info, start, held, capacity, int(first), int(width), targets,
                  state, scales, o);
  });
}

extern "C" int illada_masked_loss_rows_gradients_cuda(void* logits, int dtype, int64_t stride, const int32_t* info,
                                                      int64_t start, int64_t rows, const int64_t* targets,
                                                      const float* scales, int64_t vocab, const float* bias,
                                                      float softcap, float label_smoothing, float z_loss,
                                                      const int64_t* forbid, int64_t n_forbid, float* state,
                                                      int64_t shared_memory, void* stream) {
  if (!sizes_fit(rows, vocab) || shared_memory < kScratch) return int(cudaErrorInvalidValue);
  const Options o{vocab, bias, softcap, label_smoothing, z_loss, forbid, n_forbid};
  return with_kernel(dtype, o, [&](auto t, auto plain) {
    using T = decltype(t);
    const int64_t fit = (shared_memory - kScratch) / 16, vectors = vocab / Vec16<T>::size,
                  kept = vectors < fit ? vectors : fit;
    const Launch how{dim3(unsigned(rows)), dim3(kWideThreads), size_t(kScratch + 16 * kept),
                     static_cast<cudaStream_t>(stream)};
    return launch(how, rows_gradients<T, plain.value>, static_cast<T*>(logits), stride, info, start, targets, scales, o,
                  state, int(kept));
  });
}
#endif
