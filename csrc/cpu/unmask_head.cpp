// unmask on the CPU: the LM head for a slice of the vocab, logits = hidden head^T + bias in float32.
//
// Every logit is one sum over D, a multiply-add after the other in blocks of kDepth, whatever rows and ids lie beside
// it and whichever thread computes it. So equal rows get equal bits, and no batch decides between them; a BLAS chooses
// its order by the number of rows and threads. A thread owns up to kIds ids: it packs kDepth entries of 32 of them (16 with
// AVX2), transposed and as float32, multiplies all rows by them, and so reads the head from memory once. 2 D flops a
// logit; scratch: the packed rows, and kIds logits a row and thread.
#include <omp.h>

#include <algorithm>

#include "illada/api.h"
#include "float_mode.h"
#include "isa.h"
#include "memory.h"
#include "tile_gemm.h"

namespace {

constexpr int kDepth = 256;  // a packed panel of kDepth x kBlockCols floats fits L1
constexpr int kIds = 256;
constexpr int64_t kCache = 512 << 10;  // bytes of packed rows that stay in L2 from panel to panel

struct Head {
  const void* weight;
  const float* bias;  // or null
  int64_t stride;  // between ids
  int64_t dim;
  template <class T> const T* at(int64_t id, int64_t d) const {
    return static_cast<const T*>(weight) + id * stride + d;
  }
};

// Packs rows (count x dim) in blocks of kBlockRows: packed[(row / kBlockRows * dim + d) * kBlockRows + row % kBlockRows].
void pack_hidden(const float* rows, int64_t count, int64_t dim, float* packed) {
#pragma omp for
  for (int64_t block = 0; block < (count + kBlockRows - 1) / kBlockRows; ++block)
    for (int64_t d = 0; d < dim; ++d)
      for (int i = 0; i < kBlockRows; ++i) {
        const int64_t row = block * kBlockRows + i;
        packed[(block * dim + d) * kBlockRows + i] = row < count ? rows[row * dim + d] : 0.0f;
      }
}

// Packs `depth` entries of `ids` ids: panel[d * kBlockCols + id]. Those of further ids are 0.
template <class T> void pack_panel(const T* from, int64_t stride, int ids, int depth, float* panel) {
  constexpr int kAhead = 1024 / sizeof(T);
  for (int j = 0; j < kBlockCols; j += kWidth)
    for (int d = 0; d < depth; d += kWidth) {
      vf r[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const T* p = from + (j + i) * stride + d;
        if (j + i < ids) __builtin_prefetch(p + kAhead, 0, 2);
        r[i] = j + i < ids ? load_n(p, depth - d) : vf{};
      }
      transpose(r);
      for (int i = 0; i < kWidth; ++i) store(panel + (d + i) * kBlockCols + j, r[i]);
    }
}

// Logits of `ids` ids from `first` on, at most kIds. sums: (rows rounded up to kBlockRows) x kIds.
template <class T>
void multiply_ids(const Head& head, int64_t first, int ids, const float* packed, int64_t rows, float* panel,
                  float* sums, float* out, int64_t out_stride) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t d = 0; d < head.dim; d += kDepth) {
    const int depth = int(std::min<int64_t>(kDepth, head.dim - d));
    for (int j = 0; j < ids; j += kBlockCols) {
      pack_panel(head.at<T>(first + j, d), head.stride, std::min(kBlockCols, ids - j), depth, panel);
      for (int64_t block = 0; block < blocks; ++block) {
        const float* a = packed + (block * head.dim + d) * kBlockRows;
        float* c = sums + block * kBlockRows * kIds + j;
        if (d == 0)
          multiply_block<FloatProducts, Into::kStore, true, 2>(depth, a, kBlockRows, panel, kBlockCols, c, kIds,
                                                               nullptr);
        else
          multiply_block<FloatProducts, Into::kAdd, true, 2>(depth, a, kBlockRows, panel, kBlockCols, c, kIds, nullptr);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int j = 0; j < ids; j += kWidth) {
      const vf sum = head.dim ? load(sums + row * kIds + j) : vf{};
      store_n(out + row * out_stride + j, head.bias ? sum + load_n(head.bias + first + j, ids - j) : sum, ids - j);
    }
}

template <class T>
int run_head(const Head& head, const float* hidden, int64_t rows, int64_t first, int64_t ids, float* logits,
             int threads) {
  const int64_t padded = (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
  const int width = padded * head.dim * int64_t(sizeof(float)) <= kCache ? kBlockCols : kIds;
  const int64_t groups = (ids + width - 1) / width;
  const int64_t own = kDepth * kBlockCols + padded * kIds;
  Buffer memory(sizeof(float) * (padded * head.dim + own * threads));
  if (!memory) return ILLADA_NO_MEMORY;
  float* packed = memory.as<float>() + own * threads;
#pragma omp parallel num_threads(threads)
  {
    const FloatMode mode;
    float* panel = memory.as<float>() + own * omp_get_thread_num();
    pack_hidden(hidden, rows, head.dim, packed);
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      const int n = int(std::min<int64_t>(width, ids - group * width));
      multiply_ids<T>(head, first + group * width, n, packed, rows, panel, panel + kDepth * kBlockCols,
                      logits + group * width, ids);
    }
  }
  return ILLADA_OK;
}

}  // namespace

// Fills logits (rows, ids), contiguous, for ids [first, first + ids). hidden (rows, dim) is contiguous. weight has the
// dtype, `stride` elements from id to id, and a contiguous last dimension; bias is float32 or null.
extern "C" int ILLADA_ISA_FN(illada_unmask_head_cpu)(const float* hidden, int64_t rows, int64_t dim, const void* weight,
                                                     const float* bias, int dtype, int64_t stride, int64_t first,
                                                     int64_t ids, float* logits, int threads) {
  const Head head{weight, bias, stride, dim};
  switch (dtype) {
    case ILLADA_F32: return run_head<float>(head, hidden, rows, first, ids, logits, threads);
    case ILLADA_BF16: return run_head<bf16>(head, hidden, rows, first, ids, logits, threads);
    case ILLADA_F16: return run_head<fp16>(head, hidden, rows, first, ids, logits, threads);
  }
  return ILLADA_BAD_DTYPE;
}
