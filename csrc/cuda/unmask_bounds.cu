// unmask, before the rows of a call that truncates: the least logit that top_k, top_p and min_p keep in each row
// (unmask_bound.cuh).
//
// A block owns a row. Reads it as often as the search passes over it, all but the first time from L2 where 132 rows fit
// it. A row without noise has the bound -inf, and is not read. Any bound may come of a row with a NaN or +inf: the row
// kernel finds it bad.
#include "unmask_bound.cuh"

namespace {

using namespace illada;

constexpr int kThreads = kBoundThreads, kIds = 16;  // kIds: of a lane

template <class T>
__global__ void __launch_bounds__(kThreads, 1) bounds_kernel(const __grid_constant__ Call c, const T* logits,
                                                             int64_t stride_b, int64_t stride_k, int64_t first_row) {
  const int64_t r = first_row + blockIdx.x, b = r / c.count, k = r % c.count;
  const Row row = load_row<true>(c, b, k);
  if (!row.needed) return;
  if (!(row.temperature > 0.0f)) {
    if (threadIdx.x == 0) c.bounds[r] = -infinity();
    return;
  }
  BoundShared& s = *reinterpret_cast<BoundShared*>(dynamic_smem());
  const T* p = logits + (stride_b < 0 ? (r - first_row) * stride_k : b * stride_b + k * stride_k);
  const auto over_row = [&](auto visit) {
    for (int64_t start = threadIdx.x / 32 * 32 * kIds; start < c.vocab; start += kThreads * kIds) {
      float l[kIds];
      load_edited(c, p + start, start, c.vocab - start, l);
#pragma unroll
      for (int j = 0; j < kIds; ++j) visit(l[j]);
    }
  };
  float top = -infinity(), bound = -infinity();
  over_row([&](float l) { top = fmaxf(top, l); });
  top = block_reduce<kThreads>(top, s.top, Max{});
  if (top > -infinity() && top < infinity())
    bound = bound_of(s, c, row, truncation_of(c, b, row.temperature), top, over_row);
  if (threadIdx.x == 0) c.bounds[r] = bound;
}

}  // namespace

#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches: illada_kernels/ops/unmask/nvrtc.py
namespace {

template <class T>
int run(const Call& c, const void* logits, int64_t stride_b, int64_t stride_k, int64_t first_row, int64_t rows,
        cudaStream_t stream) {
  return launch({dim3(unsigned(rows)), dim3(kThreads), sizeof(BoundShared), stream}, bounds_kernel<T>, c,
                static_cast<const T*>(logits), stride_b, stride_k, first_row);
}

}  // namespace

extern "C" int illada_unmask_bounds_cuda(const illada_unmask_call* call, int dtype, const void* logits,
                                         int64_t stride_b, int64_t stride_k, int64_t first_row, int64_t rows,
                                         void* stream) {
  const Call& c = *call;
  if (rows > 0x7fffffff || c.vocab > 0x7fff0000 || first_row + rows > c.batch * c.count || !c.bounds)
    return int(cudaErrorInvalidValue);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case ILLADA_F32: return run<float>(c, logits, stride_b, stride_k, first_row, rows, on);
    case ILLADA_BF16: return run<bf16>(c, logits, stride_b, stride_k, first_row, rows, on);
    case ILLADA_F16: return run<fp16>(c, logits, stride_b, stride_k, first_row, rows, on);
  }
  return int(cudaErrorInvalidValue);
}
#endif
