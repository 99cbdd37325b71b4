// unmask from logits: the statistics of each row (unmask.cuh), for spans of 4096 ids, so that few rows fill the GPU
// too.
//
// A block owns a span of a row: 8 warps of 512 ids, 16 a thread, merged in order. Reads each logit of a row that takes
// part once, 16 bytes a thread where rows are aligned, else element by element in the same order; writes 32 bytes a
// span. About 20 operations a logit, 50 with noise. Accumulates in float32 over at most 4096 terms, in a fixed tree.
// Blocks of rows that take no part leave at once and read nothing. Used on the caller's logits and on slices of hidden
// head^T.
#include "unmask.cuh"

namespace {

using namespace illada;

constexpr int kWarps = 8, kIds = 16;  // kIds: of a lane
static_assert(kWarps * 32 * kIds == ILLADA_UNMASK_SPAN, "a block meets a span");

// Merges the statistics of a and b; a has the lower ids.
template <bool EXTENDED> ILLADA_DEVICE Running merge(const Running& a, const Running& b, const Row& row, int needs) {
  Running r = a;
  r.top = fmaxf(a.top, b.top);
  r.second = fmaxf(fmaxf(a.second, b.second), fminf(a.top, b.top));
  const Weight wa = weight_of(a.top, r.top, row), wb = weight_of(b.top, r.top, row);
  r.sum = fmaf(wa.e, a.sum, wb.e * b.sum);
  r.sum_ez = fmaf(wa.e, fmaf(wa.z, a.sum, a.sum_ez), wb.e * fmaf(wb.z, b.sum, b.sum_ez));
  if (b.best_score > a.best_score) r.best_score = b.best_score, r.best_logit = b.best_logit, r.best_id = b.best_id;
  if (EXTENDED && needs & ILLADA_NEEDS_TOP_ID) r.held_logit = b.top > a.top ? b.held_logit : a.held_logit;
  else r.held_logit = fmaxf(a.held_logit, b.held_logit);
  return r;
}

// Blocks that share an SM. Four leave 64 registers a thread, too few on sm_80 and for what truncates.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <bool EXTENDED> constexpr int kBlocks = 3;
#else
template <bool EXTENDED> constexpr int kBlocks = EXTENDED ? 3 : 4;
#endif

template <class T, bool EXTENDED>
__global__ void __launch_bounds__(kWarps * 32, kBlocks<EXTENDED>)
    rows_kernel(const __grid_constant__ Call c, const T* logits, int64_t stride_b, int64_t stride_k, int64_t first_row,
                int64_t first, int64_t ids) {
  const int64_t r = first_row + blockIdx.x, b = r / c.count, k = r % c.count;
  const Row row = load_row<EXTENDED>(c, b, k);
  if (!row.needed) return;
  Running* of_warp = reinterpret_cast<Running*>(dynamic_smem());
  const int warp = threadIdx.x / 32;
  const int64_t start = int64_t(blockIdx.y) * ILLADA_UNMASK_SPAN + warp * 32 * kIds;  // from `first` on
  Running s = nothing_met();
  if (start < ids) {
    const T* p = logits + (stride_b < 0 ? (r - first_row) * stride_k : b * stride_b + k * stride_k) + start;
    float l[kIds];
    load_edited(c, p, first + start, ids - start, l);
    meet<EXTENDED>(l, first + start, row, c.needs, s, EXTENDED && c.truncate ? c.bounds[r] : -infinity());
  }
  if (threadIdx.x % 32 == 0) of_warp[warp] = s;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) s = merge<EXTENDED>(s, of_warp[w], row, c.needs);
  store_partial(c, r, first / ILLADA_UNMASK_SPAN + blockIdx.y, s);
}

}  // namespace

#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches: illada_kernels/ops/unmask/nvrtc.py
namespace {

template <class T>
int run(const Call& c, const void* logits, int64_t stride_b, int64_t stride_k, int64_t first_row, int64_t rows,
        int64_t first, int64_t ids, cudaStream_t stream) {
  const int64_t here = (ids + ILLADA_UNMASK_SPAN - 1) / ILLADA_UNMASK_SPAN;
  const bool extended = c.truncate || c.rule == ILLADA_RENOISE;
  return launch({dim3(unsigned(rows), unsigned(here)), dim3(kWarps * 32), kWarps * sizeof(Running), stream},
                extended ? rows_kernel<T, true> : rows_kernel<T, false>, c, static_cast<const T*>(logits), stride_b,
                stride_k, first_row, first, ids);
}

}  // namespace

extern "C" int illada_unmask_rows_cuda(const illada_unmask_call* call, int dtype, const void* logits, int64_t stride_b,
                                       int64_t stride_k, int64_t first_row, int64_t rows, int64_t first, int64_t ids,
                                       void* stream) {
  const Call& c = *call;
  const bool fits = rows <= 0x7fffffff && c.vocab <= 0x7fff0000 && ids <= int64_t(ILLADA_UNMASK_SPAN) * 65535;
  const bool whole =
      first % ILLADA_UNMASK_SPAN == 0 && first + ids <= c.vocab && c.parts * ILLADA_UNMASK_SPAN >= first + ids;
  if (!fits || !whole || first_row + rows > c.batch * c.count) return int(cudaErrorInvalidValue);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case ILLADA_F32: return run<float>(c, logits, stride_b, stride_k, first_row, rows, first, ids, on);
    case ILLADA_BF16: return run<bf16>(c, logits, stride_b, stride_k, first_row, rows, first, ids, on);
    case ILLADA_F16: return run<fp16>(c, logits, stride_b, stride_k, first_row, rows, first, ids, on);
  }
  return int(cudaErrorInvalidValue);
}
#endif
