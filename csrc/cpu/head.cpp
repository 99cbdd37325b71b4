// unmask and masked_loss on the CPU: the LM head for a slice of the vocab, logits = hidden head^T + bias in float32.
//
// Every logit is the sum of its D products in one order, whatever rows and ids lie beside it and whichever thread
// computes it: lane l of a vector adds the products l, l + lanes, ... of kDepthBytes, a tree adds the lanes, and the
// blocks of kDepthBytes follow one another. So equal rows get equal bits, and no batch decides between them; a BLAS
// chooses its order by the number of rows and threads. The head is read from memory once. 2 D flops a logit; scratch:
// the packed rows, and up to kGroupIds logits a row and thread. With AVX512-BF16 bf16 is multiplied as it is
// (dot_bf16.h), else as float32.
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "illada/api.h"
#include "dot_bf16.h"
#include "float_mode.h"
#include "isa.h"
#include "memory.h"
#include "tile_gemm.h"

namespace {

constexpr int kRows = kWidth == 16 ? 4 : 2, kIds = 4;  // the sums of so many are vectors in registers
constexpr int kDepthBytes = 2048;  // of a row or an id; kRows rows and kPanelIds ids of them fit L1
constexpr int kPanelIds = 8;
constexpr int kGroupIds = 128, kManyRows = 32;  // more rows are read again for each group of ids, not for each panel
constexpr int64_t kFewBytes = 64 << 10;  // of packed rows, read from L1 or L2 while the head streams by
constexpr int kAheadBytes = 16384;  // where the head streams by; 2048 reads memory at half this rate
static_assert(kRows * kIds % kWidth == 0, "the lanes of kWidth vectors of sums are added together");

// How numbers are held and multiplied: kStep of type Packed fill a vector.
struct Floats {
  using Packed = float;
  static constexpr int kStep = kWidth;
  template <class T> static vf take(const T* from, int n) { return load_n(from, n); }
  static vf load(const float* p) { return ::load(p); }
  static void store(float* p, vf v) { ::store(p, v); }
  static vf add(vf sum, vf a, vf b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  using Packed = bf16;
  static constexpr int kStep = kPairs;
  static vp take(const bf16* from, int n) { return load_pairs_n(from, n); }
  static vp load(const bf16* p) { return load_pairs(p); }
  static void store(bf16* p, vp v) { store_pairs(p, v); }
  static vf add(vf sum, vp a, vp b) { return add_dots(sum, a, b); }
};
#endif

template <class How> constexpr int kDepth = kDepthBytes / int(sizeof(typename How::Packed));

// The head's rows from the first id of a slice on.
template <class T> struct Head {
  const T* weight;
  const float* bias;  // or null
  int64_t stride;  // between ids
  int64_t dim;
  float bias_of(int64_t id) const { return bias ? bias[id] : 0.0f; }
};

// Packs n rows of `depth` entries, `many` side by side: packed[(step * many + row) * kStep + entry]. The rest is 0.
template <class How, class T>
void pack(const T* from, int64_t stride, int n, int many, int depth, typename How::Packed* packed) {
  constexpr int kStep = How::kStep;
  for (int i = 0; i < many; ++i)
    for (int d = 0; d < depth; d += kStep)
      How::store(packed + d * many + i * kStep, How::take(i < n ? from + i * stride + d : from, i < n ? depth - d : 0));
}

// Adds the lanes of `count` vectors, at most kWidth, each to its sum; `first`: the sums were nothing before.
inline void add_lanes(const vf* lanes, int count, bool first, float* sums) {
  vf v[kWidth];
  for (int i = 0; i < kWidth; ++i) v[i] = i < count ? lanes[i] : vf{};
  const vf all = reduce_rows(v, [](vf a, vf b) { return a + b; });
  store_n(sums, first ? all : load_n(sums, count) + all, count);
}

// ---- up to kRows rows: the head streams through registers -----------------------------------------------------------
// Logits of n <= kIds ids, one after the other, so that memory is read from end to end.
template <class How, int kMany, class T>
void multiply_few(const Head<T>& head, int64_t first, int n, const typename How::Packed* packed, float* out,
                  int64_t out_stride) {
  constexpr int kStep = How::kStep, kBlocks = kFewBytes / kDepthBytes + 1;
  vf lanes[kBlocks][kIds * kMany];
  for (int j = 0; j < n; ++j) {
    const T* w = head.weight + (first + j) * head.stride;
    const auto* x = packed;
    int d = 0;
    for (int block = 0; d < head.dim; ++block) {
      vf sum[kMany] = {};
      for (const int stop = std::min<int64_t>(head.dim, d + kDepth<How>); d < stop; d += kStep, x += kMany * kStep) {
        __builtin_prefetch(reinterpret_cast<const char*>(w + d) + kAheadBytes, 0, 2);
        const auto v = How::take(w + d, int(head.dim) - d);
#pragma GCC unroll 4
        for (int i = 0; i < kMany; ++i) sum[i] = How::add(sum[i], How::load(x + i * kStep), v);
      }
      for (int i = 0; i < kMany; ++i) lanes[block][j * kMany + i] = sum[i];
    }
  }
  float sums[kIds * kMany] = {};
  for (int block = 0; block * int64_t(kDepth<How>) < head.dim; ++block)
    for (int i = 0; i < n * kMany; i += kWidth)
      add_lanes(lanes[block] + i, std::min(kWidth, n * kMany - i), block == 0, sums + i);
  for (int i = 0; i < kMany; ++i)
    for (int j = 0; j < n; ++j) out[i * out_stride + j] = sums[j * kMany + i] + head.bias_of(first + j);
}

// ---- any number of rows ---------------------------------------------------------------------------------------------
// Multiplies kRows packed rows by kIds packed ids: sums[row * kIds + id].
template <class How>
void multiply_tile(int depth, const typename How::Packed* rows, const typename How::Packed* ids, bool first,
                   float* sums) {
  constexpr int kStep = How::kStep;
  vf lanes[kRows * kIds] = {};
  for (int d = 0; d < depth; d += kStep, rows += kRows * kStep, ids += kIds * kStep) {
    decltype(How::load(ids)) w[kIds];
#pragma GCC unroll 4
    for (int j = 0; j < kIds; ++j) w[j] = How::load(ids + j * kStep);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const auto x = How::load(rows + i * kStep);
#pragma GCC unroll 4
      for (int j = 0; j < kIds; ++j) lanes[i * kIds + j] = How::add(lanes[i * kIds + j], x, w[j]);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kRows * kIds; i += kWidth) add_lanes(lanes + i, kWidth, first, sums + i);
}

// Logits of n <= kGroupIds ids from `first` on, of which `after` more follow: copies a panel of ids to L1 and
// multiplies all rows by it, asking memory for the next panel meanwhile. packed: blocks of kRows rows, kDepth entries
// at a time. sums: (rows rounded up to kRows) x (n rounded up to kIds).
template <class How, class T>
void multiply_group(const Head<T>& head, int64_t first, int n, int64_t after, const typename How::Packed* packed,
                    int64_t rows, typename How::Packed* panel, float* sums, float* out, int64_t out_stride) {
  const T* weight = head.weight + first * head.stride;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t d = 0; d < head.dim; d += kDepth<How>) {
    const int depth = int(std::min<int64_t>(kDepth<How>, head.dim - d)), whole = round_up(depth, How::kStep);
    for (int at = 0; at < n; at += kPanelIds) {
      const int here = std::min(kPanelIds, n - at), tiles = (here + kIds - 1) / kIds;
      for (int j = 0; j < here; j += kIds)
        pack<How>(weight + (at + j) * head.stride + d, head.stride, std::min(kIds, here - j), kIds, depth,
                  panel + j * kDepth<How>);
      const bool last = at + here == n, deeper = last && d + depth < head.dim;
      const T* next = deeper ? weight + d + depth : weight + (at + here) * head.stride + (last ? 0 : d);
      const int64_t next_ids = deeper ? n : last ? after : n - at - here;
      Ahead ahead(next, sizeof(T), head.stride, int(std::min<int64_t>(kPanelIds, next_ids)), depth);
      const int lines = int(kPanelIds * depth * int(sizeof(T)) / 64 / (tiles * blocks) + 1);
      for (int64_t block = 0; block < blocks; ++block)
        for (int j = 0; j < here; j += kIds) {
          ahead.ask(lines);
          multiply_tile<How>(depth, packed + (d * blocks + block * whole) * kRows, panel + j * kDepth<How>, d == 0,
                             sums + ((at + j) * blocks + block * kIds) * kRows);
        }
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int j = 0; j < n; j += kIds) {
      const float* from = sums + (j * blocks * kRows + row * kIds);
      float* to = out + row * out_stride + j;
      if (n - j >= kIds && !head.bias) std::memcpy(to, from, kIds * sizeof(float));
      else
        for (int i = 0; i < std::min(kIds, n - j); ++i) to[i] = from[i] + head.bias_of(first + j + i);
    }
}

// ---- a slice of the vocab -------------------------------------------------------------------------------------------
template <class How, class T, class Hidden>
void run_few(const Head<T>& head, const Hidden* hidden, int rows, int64_t ids, float* logits, int64_t out_stride,
             int threads) {
  alignas(64) typename How::Packed packed[kFewBytes / sizeof(typename How::Packed)];
  pack<How>(hidden, head.dim, rows, rows, int(head.dim), packed);
#pragma omp parallel num_threads(threads)
  {
    const FloatMode mode;
#pragma omp for schedule(dynamic, kGroupIds / kIds)
    for (int64_t at = 0; at < ids; at += kIds) {
      const int n = int(std::min<int64_t>(kIds, ids - at));
      if (rows == 1) multiply_few<How, 1>(head, at, n, packed, logits + at, out_stride);
      else if (rows == 2) multiply_few<How, 2>(head, at, n, packed, logits + at, out_stride);
      else if (rows == 3) multiply_few<How, 3>(head, at, n, packed, logits + at, out_stride);
      else multiply_few<How, 4>(head, at, n, packed, logits + at, out_stride);
    }
  }
}

template <class How, class T, class Hidden>
int run_head(const Head<T>& head, const Hidden* hidden, int64_t rows, int64_t ids, float* logits, int64_t out_stride,
             int threads) {
  using Packed = typename How::Packed;
  const int64_t blocks = (rows + kRows - 1) / kRows, width = (head.dim + How::kStep - 1) / How::kStep * How::kStep;
  const int64_t row_bytes = width * int64_t(sizeof(Packed));
  if (head.dim == 0 || (rows <= 4 && rows * row_bytes <= kFewBytes)) {
    for (int64_t row = 0; row < rows; row += 4)
      run_few<How>(head, hidden + row * head.dim, int(std::min<int64_t>(4, rows - row)), ids, logits + row * out_stride,
                   out_stride, threads);
    return ILLADA_OK;
  }
  const int group = rows <= kManyRows ? kPanelIds : kGroupIds;
  const int64_t panel_bytes = kPanelIds * kDepthBytes, own = panel_bytes + blocks * kRows * group * sizeof(float);
  Buffer memory(own * threads + blocks * kRows * row_bytes);
  if (!memory) return ILLADA_NO_MEMORY;
  Packed* packed = reinterpret_cast<Packed*>(memory.as<char>() + own * threads);
#pragma omp parallel num_threads(threads)
  {
    const FloatMode mode;
    char* mine = memory.as<char>() + own * omp_get_thread_num();
#pragma omp for collapse(2)
    for (int64_t d = 0; d < head.dim; d += kDepth<How>)
      for (int64_t block = 0; block < blocks; ++block) {
        const int depth = int(std::min<int64_t>(kDepth<How>, head.dim - d)), whole = round_up(depth, How::kStep);
        pack<How>(hidden + block * kRows * head.dim + d, head.dim, int(std::min<int64_t>(kRows, rows - block * kRows)),
                  kRows, depth, packed + (d * blocks + block * whole) * kRows);
      }
#pragma omp for schedule(dynamic, kGroupIds / group)
    for (int64_t at = 0; at < ids; at += group) {
      const int n = int(std::min<int64_t>(group, ids - at));
      multiply_group<How>(head, at, n, ids - at - n, packed, rows, reinterpret_cast<Packed*>(mine),
                          reinterpret_cast<float*>(mine + panel_bytes), logits + at, out_stride);
    }
  }
  return ILLADA_OK;
}

}  // namespace

// Fills logits (rows, ids), out_stride from row to row, for ids [first, first + ids). hidden (rows, dim) is contiguous,
// float32 or of the weight's dtype. weight has `stride` elements from id to id, and a contiguous last dimension; bias
// is float32 or null.
extern "C" int ILLADA_ISA_FN(illada_head_cpu)(const void* hidden, int hidden_dtype, int64_t rows, int64_t dim,
                                              const void* weight, const float* bias, int dtype, int64_t stride,
                                              int64_t first, int64_t ids, float* logits, int64_t out_stride,
                                              int threads) {
  const auto run = [&](auto how, auto number, auto hidden_number) {
    using T = decltype(number);
    const Head<T> head{static_cast<const T*>(weight) + first * stride, bias ? bias + first : nullptr, stride, dim};
    return run_head<decltype(how)>(head, static_cast<const decltype(hidden_number)*>(hidden), rows, ids, logits,
                                   out_stride, threads);
  };
  if (hidden_dtype != dtype && hidden_dtype != ILLADA_F32) return ILLADA_BAD_DTYPE;
  const bool floats = hidden_dtype == ILLADA_F32;
#if defined(__AVX512BF16__)
  if (dtype == ILLADA_BF16 && !floats) return run(Pairs(), bf16(), bf16());
  return illada_head_cpu_avx512(hidden, hidden_dtype, rows, dim, weight, bias, dtype, stride, first, ids, logits,
                                out_stride, threads);
#else
  switch (dtype) {
    case ILLADA_F32: return run(Floats(), float(), float());
    case ILLADA_BF16: return floats ? run(Floats(), bf16(), float()) : run(Floats(), bf16(), bf16());
    case ILLADA_F16: return floats ? run(Floats(), fp16(), float()) : run(Floats(), fp16(), fp16());
  }
  return ILLADA_BAD_DTYPE;
#endif
}
