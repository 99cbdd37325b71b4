// masked_loss around the matmuls: which rows are masked, their hidden states, the way back, and the loss.
//
//   compact   one block: ascending places of the masked rows, targets, slots, weights ("mean": over their float64 sum)
//   gather    a block per masked row: out = x[index], times a factor, rounded once; zeros beyond the masked rows
//   scatter   a block per row: out = dx[slot], times a factor, rounded once; zeros where not masked
//   factors   a thread per masked row: what multiplies the row, with the upstream gradient
//   losses    one block: the sum of scale * loss in float64, in a fixed order; or a thread per row
//
// Reads its inputs and writes its outputs once; about one flop an element. If more rows are masked than the capacity
// holds, scale and everything made from it is NaN.
#include "masked_loss.cuh"

namespace illada {
namespace loss {

constexpr int kOneBlock = 1024;  // threads of compact and of the sum of losses
constexpr int kRowThreads = 128;  // of gather and scatter
constexpr int kFlatThreads = 256;  // of factors and losses
constexpr int kEach = 8;  // consecutive rows that a thread of compact takes

// Returns the sum of x over the threads before this one; *all becomes the block's sum. scratch: a value for each warp.
ILLADA_DEVICE int exclusive_sum(int x, int* scratch, int* all) {
  int sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, sum, step);
    if (int(threadIdx.x % 32) >= step) sum += before;
  }
  const int warp = int(threadIdx.x / 32);
  if (threadIdx.x % 32 == 31) scratch[warp] = sum;
  __syncthreads();
  int earlier = 0, total = 0;
  for (int w = 0; w < kOneBlock / 32; ++w) {
    if (w == warp) earlier = total;
    total += scratch[w];
  }
  __syncthreads();
  *all = total;
  return earlier + sum - x;
}

__global__ void __launch_bounds__(kOneBlock)
    compact(const uint8_t* masked, const int64_t* targets, const float* weight, int64_t rows, int64_t vocab,
            int64_t capacity, int mean, int32_t* index, int64_t* row_targets, float* scale, int32_t* slot,
            int32_t* info) {
  uint8_t* scratch = dynamic_smem();
  int count = 0, bad = 0x7fffffff;
  double weights = 0.0;
  for (int64_t base = 0; base < rows; base += kOneBlock * kEach) {
    const int64_t mine = base + int64_t(threadIdx.x) * kEach;
    bool is_masked[kEach];
    int here = 0, all;
#pragma unroll
    for (int k = 0; k < kEach; ++k) here += is_masked[k] = mine + k < rows && masked[mine + k];
    int place = count + exclusive_sum(here, reinterpret_cast<int*>(scratch), &all);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t r = mine + k;
      if (r < rows) slot[r] = is_masked[k] ? place : -1;
      if (!is_masked[k]) continue;
      const int64_t target = targets[r];
      const float w = weight ? weight[r] : 1.0f;
      if ((target < 0 || target >= vocab) && r < bad) bad = int(r);
      weights += w;
      if (place < capacity) index[place] = int(r), row_targets[place] = target, scale[place] = w;
      ++place;
    }
    count += all;
  }
  weights = block_reduce<kOneBlock>(weights, reinterpret_cast<double*>(scratch), Sum{});
  bad = block_reduce<kOneBlock>(bad, reinterpret_cast<int*>(scratch), Min{});  // its barriers make scale readable
  if (threadIdx.x == 0) info[0] = count, info[1] = bad == 0x7fffffff ? -1 : bad;
  for (int64_t i = threadIdx.x; i < capacity; i += kOneBlock) {
    if (i >= count) index[i] = 0, row_targets[i] = 0, scale[i] = 0.0f;
    else if (mean) scale[i] = float(double(scale[i]) / weights);
    if (count > capacity) scale[i] = not_a_number();
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kRowThreads)
    gather(const In* x, int64_t inner, int64_t outer_stride, int64_t stride, const int32_t* index, const int32_t* info,
           int64_t start, int64_t width, const float* factors, Out* out) {
  constexpr int kVector = Vec16<In>::size;
  const int64_t i = blockIdx.x, r = index[i];
  const bool live = start + i < info[0];
  const float factor = factors && live ? factors[i] : 1.0f;
  const In* from = x + r / inner * outer_stride + r % inner * stride;
  Out* to = out + i * width;
  const auto move = [&](int64_t at, auto& v) {
    if (live) load(from + at, v);
    for (float& value : v) value = live ? value * factor : 0.0f;
    store(to + at, v);
  };
  const int64_t vectors = aligned(from) && aligned(to) ? width / kVector : 0;
  for (int64_t v = threadIdx.x; v < vectors; v += kRowThreads) {
    float values[kVector];
    move(v * kVector, values);
  }
  for (int64_t at = vectors * kVector + threadIdx.x; at < width; at += kRowThreads) {
    float value[1];
    move(at, value);
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    scatter(const float* dx, const int32_t* slot, const int32_t* info, int64_t capacity, int64_t held, int64_t width,
            const float* factors, T* out) {
  constexpr int kVector = Vec16<T>::size;
  const int64_t r = blockIdx.x, place = slot[r];
  const bool overflow = info[0] > capacity, live = place >= 0 && place < held && !overflow;
  const float factor = factors && live ? factors[place] : 1.0f, fill = overflow ? not_a_number() : 0.0f;
  const float* from = dx + place * width;
  T* to = out + r * width;
  const auto move = [&](int64_t at, auto& v) {
    if (live) load(from + at, v);
    for (float& value : v) value = live ? value * factor : fill;
    store(to + at, v);
  };
  const int64_t vectors = aligned(from) && aligned(to) ? width / kVector : 0;
  for (int64_t v = threadIdx.x; v < vectors; v += kRowThreads) {
    float values[kVector];
    move(v * kVector, values);
  }
  for (int64_t at = vectors * kVector + threadIdx.x; at < width; at += kRowThreads) {
    float value[1];
    move(at, value);
  }
}

// Returns min(1, 2^floor(log2 |scale|)), which is exact to multiply by; 1 where that is not a normal number.
ILLADA_DEVICE float power_of(float scale) {
  const unsigned exponent = __float_as_uint(scale) & 0x7f800000u;
  if (exponent == 0u || exponent == 0x7f800000u) return 1.0f;
  return exponent < 0x3f800000u ? __uint_as_float(exponent) : 1.0f;
}

// what: 0 scale * grad, 1 scale / power, 2 power * grad (illada_kernels/ops/masked_loss/row_kernels.py).
__global__ void __launch_bounds__(kFlatThreads)
    factors(const float* scale, const int32_t* index, const int32_t* info, int64_t start, int64_t rows, int what,
            const float* grad, int grad_per_row, float* out) {
  const int64_t i = int64_t(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= rows) return;
  if (start + i >= info[0]) {
    out[i] = 0.0f;
    return;
  }
  const float power = power_of(scale[i]);
  const float factor = what == 0 ? scale[i] : what == 1 ? scale[i] / power : power;
  out[i] = grad ? factor * grad[grad_per_row ? index[i] : 0] : factor;
}

struct Terms {
  int64_t vocab, allowed;
  float smoothing, z_loss;
};

// Returns the unweighted loss of a row from its state {max, sum of exp(z - max), z at the target, sum of z}.
ILLADA_DEVICE float loss_of(const Terms& t, const float* state, int64_t target) {
  const float high = state[0], log_sum = logf(state[1]), lse = high + log_sum;
  float loss = log_sum + (1.0f - t.smoothing) * (high - state[2]);
  if (t.smoothing > 0.0f) loss += t.smoothing * (high - state[3] / float(t.allowed));
  if (t.z_loss > 0.0f) loss += t.z_loss * lse * lse;
  return target >= 0 && target < t.vocab ? loss : not_a_number();
}

__global__ void __launch_bounds__(kOneBlock)
    sum_losses(const float* state, const int64_t* targets, const float* scale, const int32_t* info, int64_t capacity,
               int64_t held, Terms t, float* out) {
  const int64_t live = info[0] < held ? info[0] : held;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < live; i += kOneBlock)
    sum += double(scale[i]) * double(loss_of(t, state + 4 * i, targets[i]));
  sum = block_reduce<kOneBlock>(sum, reinterpret_cast<double*>(dynamic_smem()), Sum{});
  if (threadIdx.x == 0) *out = info[0] > capacity ? not_a_number() : float(sum);
}

__global__ void __launch_bounds__(kFlatThreads)
    row_losses(const float* state, const int64_t* targets, const float* scale, const int32_t* slot, const int32_t* info,
               int64_t capacity, int64_t rows, int64_t held, Terms t, float* out) {
  const int64_t r = int64_t(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (r >= rows) return;
  const int64_t i = slot[r];
  const float loss = i >= 0 && i < held ? scale[i] * loss_of(t, state + 4 * i, targets[i]) : 0.0f;
  out[r] = info[0] > capacity ? not_a_number() : loss;
}

}  // namespace loss
}  // namespace illada

// ---- entry points ---------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches: illada_kernels/ops/masked_loss/nvrtc.py
#include "illada/api.h"

namespace {

using namespace illada;
using namespace illada::loss;

constexpr int64_t kMostRows = 0x7fffffff - kOneBlock * kEach;  // so that int places do not overflow
constexpr size_t kScratch = kOneBlock / 32 * sizeof(double);

Launch blocks(int64_t count, int threads, size_t smem, void* stream) {
  return {dim3(unsigned(count)), dim3(unsigned(threads)), smem, static_cast<cudaStream_t>(stream)};
}
int64_t blocks_for(int64_t rows) { return (rows + kFlatThreads - 1) / kFlatThreads; }
bool fits(int64_t rows) { return rows >= 0 && rows <= kMostRows; }

}  // namespace

extern "C" int illada_masked_loss_compact_cuda(const uint8_t* masked, const int64_t* targets, const float* weight,
                                               int64_t rows, int64_t vocab, int64_t capacity, int mean, int32_t* index,
                                               int64_t* row_targets, float* scale, int32_t* slot, int32_t* info,
                                               void* stream) {
  if (!fits(rows) || !fits(capacity)) return int(cudaErrorInvalidValue);
  return launch(blocks(1, kOneBlock, kScratch, stream), compact, masked, targets, weight, rows, vocab, capacity, mean,
                index, row_targets, scale, slot, info);
}

extern "C" int illada_masked_loss_gather_cuda(const void* x, int dtype, int64_t inner, int64_t outer_stride,
                                              int64_t stride, const int32_t* index, const int32_t* info, int64_t start,
                                              int64_t rows, int64_t width, const float* factors, void* out,
                                              int out_dtype, void* stream) {
  if (!fits(rows)) return int(cudaErrorInvalidValue);
  const auto run = [&](auto in, auto to) {
    using In = decltype(in);
    using Out = decltype(to);
    return launch(blocks(rows, kRowThreads, 0, stream), gather<In, Out>, static_cast<const In*>(x), inner, outer_stride,
                  stride, index, info, start, width, factors, static_cast<Out*>(out));
  };
  if (dtype == ILLADA_F32 && out_dtype == ILLADA_F32) return run(float{}, float{});
  if (dtype == ILLADA_BF16 && out_dtype == ILLADA_BF16) return run(bf16{}, bf16{});
  if (dtype == ILLADA_BF16 && out_dtype == ILLADA_F32) return run(bf16{}, float{});
  if (dtype == ILLADA_F16 && out_dtype == ILLADA_F16) return run(fp16{}, fp16{});
  if (dtype == ILLADA_F16 && out_dtype == ILLADA_F32) return run(fp16{}, float{});
  return int(cudaErrorInvalidValue);
}

extern "C" int illada_masked_loss_scatter_cuda(const float* dx, const int32_t* slot, const int32_t* info,
                                               int64_t capacity, int64_t rows, int64_t held, int64_t width,
                                               const float* factors, void* out, int dtype, void* stream) {
  if (!fits(rows)) return int(cudaErrorInvalidValue);
  const auto run = [&](auto to) {
    using T = decltype(to);
    return launch(blocks(rows, kRowThreads, 0, stream), scatter<T>, dx, slot, info, capacity, held, width, factors,
                  static_cast<T*>(out));
  };
  switch (dtype) {
    case ILLADA_F32: return run(float{});
    case ILLADA_BF16: return run(bf16{});
    case ILLADA_F16: return run(fp16{});
  }
  return int(cudaErrorInvalidValue);
}

extern "C" int illada_masked_loss_factors_cuda(const float* scale, const int32_t* index, const int32_t* info,
                                               int64_t start, int64_t rows, int what, const float* grad,
                                               int grad_per_row, float* out, void* stream) {
  if (!fits(rows)) return int(cudaErrorInvalidValue);
  return launch(blocks(blocks_for(rows), kFlatThreads, 0, stream), factors, scale, index, info, start, rows, what, grad,
                grad_per_row, out);
}

extern "C" int illada_masked_loss_losses_cuda(const float* state, const int64_t* targets, const float* scale,
                                              const int32_t* slot, const int32_t* info, int64_t capacity, int64_t rows,
                                              int64_t held, int64_t vocab, int64_t allowed, float label_smoothing,
                                              float z_loss, int per_row, float* out, void* stream) {
  if (!fits(rows)) return int(cudaErrorInvalidValue);
  const Terms t{vocab, allowed, label_smoothing, z_loss};
  if (!per_row)
    return launch(blocks(1, kOneBlock, kScratch, stream), sum_losses, state, targets, scale, info, capacity, held, t,
                  out);
  return launch(blocks(blocks_for(rows), kFlatThreads, 0, stream), row_losses, state, targets, scale, slot, info,
                capacity, rows, held, t, out);
}
#endif
