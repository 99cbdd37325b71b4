// masked_loss between the matmuls: statistics of rows of logits, and their gradients.
//
//   z = softcap(logit + bias), -inf at forbidden ids;  lse = log sum exp z
//   dlogit = scale ((1 + 2 z_loss lse) exp(z - lse) - e / allowed - [target] (1 - e)) dz/dlogit
//
// A block owns a row; 16 bytes a thread and access where the row is aligned, single elements at its ends. rows_stats
// reads a slice of ids once and merges it into the row's state; rows_dlogits reads a slice once and writes it once.
// rows_gradients does both to whole rows in place: it keeps what fits in shared memory and reads the rest twice, the
// second time from L2. About 8 flops an element: bound by memory. Accumulates in float32 in a fixed order. A NaN logit,
// a NaN scale, or a target that is not an id makes the row's gradients NaN; rows beyond the number of masked ones
// become zeros.
#include "masked_loss.cuh"

namespace illada {
namespace loss {

constexpr int kThreads = 256;  // rows_stats, rows_dlogits: many blocks per SM, also for short slices
constexpr int kWideThreads = 512;  // rows_gradients: one block per SM, which takes all shared memory
constexpr int kScratch = 128;  // bytes of shared memory for reductions, before the row

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

// Returns the number of elements before a row's first 16-byte boundary.
template <class T> ILLADA_DEVICE int unaligned_head(const T* row, int width) {
  const int head = int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  return head < width ? head : width;
}

// Calls body(column, float (&)[N]) for this thread's share of a row: aligned 16-byte vectors, which fetch(number of the
// vector, pointer) loads AHEAD steps before their turn, and single elements at both ends. Vectors in flight move
// through registers instead of an unrolled loop, because the body is large.
template <int THREADS, int AHEAD, class T, class Fetch, class Body>
ILLADA_DEVICE void over_row(const T* row, int width, Fetch fetch, Body body) {
  constexpr int kVector = Vec16<T>::size;
  const int head = unaligned_head(row, width), vectors = (width - head) / kVector,
            tail = head + vectors * kVector + int(threadIdx.x);
  Vec16<T> flying[AHEAD];
#pragma unroll
  for (int u = 0; u < AHEAD; ++u) {
    const int i = int(threadIdx.x) + u * THREADS;
    if (i < vectors) flying[u] = fetch(i, row + head + i * kVector);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    float x[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] = to_float(flying[0].at[k]);
#pragma unroll
    for (int u = 1; u < AHEAD; ++u) flying[u - 1] = flying[u];
    const int next = i + AHEAD * THREADS;
    if (next < vectors) flying[AHEAD - 1] = fetch(next, row + head + next * kVector);
    body(head + i * kVector, x);
  }
  float x[1];
  if (int(threadIdx.x) < head) load(row + threadIdx.x, x), body(int(threadIdx.x), x);
  if (tail < width) load(row + tail, x), body(tail, x);
}

template <int THREADS, class T> ILLADA_DEVICE void fill_row(T* row, int width, float value) {
  constexpr int kVector = Vec16<T>::size;
  const int head = unaligned_head(row, width), vectors = (width - head) / kVector,
            tail = head + vectors * kVector + int(threadIdx.x);
  float x[kVector], one[1] = {value};
  for (float& at : x) at = value;
  for (int i = threadIdx.x; i < vectors; i += THREADS) store(row + head + i * kVector, x);
  if (int(threadIdx.x) < head) store(row + threadIdx.x, one);
  if (tail < width) store(row + tail, one);
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

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    rows_stats(const T* logits, int64_t inner, int64_t outer_stride, int64_t stride, const int32_t* slot,
               const int32_t* info, int64_t start, int64_t held, int first, int width, const int64_t* targets,
               Options o, float* state) {
  const int64_t r = blockIdx.x, place = place_of(r, slot, info, start, held);
  if (place < 0) return;
  const T* row = logits + r / inner * outer_stride + r % inner * stride;
  const int target = id_of(o, targets[place]);
  float* s = state + 4 * place;
  Online mine{-infinity(), 0.0f, 0.0f};
  over_row<kThreads, 2>(
      row, width, [](int, const T* p) { return load16_streaming(p); },
      [&](int at, auto& x) { meet(o, first + at, target, x, mine, s + 2); });
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

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    rows_dlogits(const T* logits, int64_t inner, int64_t outer_stride, int64_t stride, T* out, int64_t out_stride,
                 const int32_t* slot, const int32_t* info, int64_t start, int64_t held, int64_t capacity, int first,
                 int width, const int64_t* targets, const float* state, const float* scales, Options o) {
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
    over_row<kThreads, 2>(row, width, [](int, const T* p) { return load16_streaming(p); }, write);
  } else {
    for (int at = threadIdx.x; at < width; at += kThreads) {
      float x[1];
      load(row + at, x);
      write(at, x);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kWideThreads, 1)
    rows_gradients(T* logits, int64_t stride, const int32_t* info, int64_t start, const int64_t* targets,
                   const float* scales, Options o, float* state, int kept) {
  const int64_t r = blockIdx.x;
  T* row = logits + r * stride;
  const int vocab = int(o.vocab);
  if (start + r >= info[0]) return fill_row<kWideThreads>(row, vocab, 0.0f);
  float* scratch = reinterpret_cast<float*>(dynamic_smem());
  auto* keep =
      // The first `kept` vectors; each thread reads its own.
      reinterpret_cast<Vec16<T>*>(dynamic_smem() + kScratch);
  float* s = state + 4 * r;
  const int target = id_of(o, targets[r]);
  Online mine{-infinity(), 0.0f, 0.0f};
  over_row<kWideThreads, 4>(
      row, vocab,
      [&](int i, const T* p) {
        if (i >= kept) return load16(p);
        return keep[i] = load16_streaming(p);
      },
      [&](int at, auto& x) { meet(o, at, target, x, mine, s + 2); });
  const Online all = over_block<kWideThreads>(o, mine, scratch);
  if (threadIdx.x == 0) {
    s[0] = all.high, s[1] = all.sum, s[3] = all.total;
    if (target < 0) s[2] = -infinity();
  }
  const float scale = target >= 0 ? scales[r] : not_a_number();
  if (scale != scale) return fill_row<kWideThreads>(row, vocab, scale);
  const Coefficients c = coefficients(o, all.high, all.sum, scale);
  over_row<kWideThreads, 4>(
      row, vocab, [&](int i, const T* p) { return i < kept ? keep[i] : load16_streaming(p); },
      [&](int at, auto& x) {
        differentiate(o, at, target, c, x);
        store(row + at, x);
      });
}

}  // namespace loss
}  // namespace illada

// ---- entry points ---------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches: illada_kernels/ops/masked_loss/nvrtc.py
#include "illada/api.h"

namespace {

using namespace illada;
using namespace illada::loss;

// Ids are ints, and loops step slightly beyond the end of a row.
bool sizes_fit(int64_t rows, int64_t vocab) {
  return rows >= 0 && rows <= 0x7fffffff && vocab >= 1 && vocab <= 0x7fff0000;
}

// Calls run(T{}) for the T that dtype names.
template <class Run> int with_type(int dtype, Run run) {
  switch (dtype) {
    case ILLADA_F32: return run(float{});
    case ILLADA_BF16: return run(bf16{});
    case ILLADA_F16: return run(fp16{});
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
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(how, rows_stats<T>, static_cast<const T*>(logits), inner, outer_stride, stride, slot, info, start,
                  held, int(first), int(width), targets, o, state);
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
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(how, rows_dlogits<T>, static_cast<const T*>(logits), inner, outer_stride, stride,
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
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t fit = (shared_memory - kScratch) / 16, vectors = vocab / Vec16<T>::size,
                  kept = vectors < fit ? vectors : fit;
    const Launch how{dim3(unsigned(rows)), dim3(kWideThreads), size_t(kScratch + 16 * kept),
                     static_cast<cudaStream_t>(stream)};
    return launch(how, rows_gradients<T>, static_cast<T*>(logits), stride, info, start, targets, scales, o, state,
                  int(kept));
  });
}
#endif
