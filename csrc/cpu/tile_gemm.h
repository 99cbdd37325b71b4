// GEMMs of small float32 tiles that stay in the cache, register-blocked as in a BLAS, and what attention needs around
// them: transposing pack, row maxima, exp2. Internal linkage, like vec.h: compiled once per instruction set.
#pragma once
#include "key_ranges.h"
#include "products.h"

namespace {

// A block of C held in registers: kBlockRows x 2 vectors. 8 x 2 uses 16 of AVX-512's 32 registers, 4 x 2 fits the 16 of
// AVX2 and SSE. Per step of the inner dimension: 2 vector loads, kBlockRows scalars, 2 * kBlockRows multiply-adds.
constexpr int kBlockRows = kWidth == 16 ? 8 : 4;
constexpr int kBlockCols = 2 * kWidth;

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }
inline int round_down(int n, int step) { return n / step * step; }

// What the GEMM computes: C = AB, C += AB, or C = diag(row_scale) C + AB.
enum class Into { kStore, kAdd, kScaleAdd };

// Prefetches rows of memory, a few cache lines each time it is asked; all at once would exhaust the core's line fill
// buffers. Rows of one attention head lie far apart, so no hardware prefetcher follows them.
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* from, int64_t stride, int rows, int dim)
      : row_(reinterpret_cast<const char*>(from)),
        stride_(stride * int64_t(sizeof(T))),
        rows_(rows),
        bytes_(dim * int(sizeof(T))) {}
  void ask(int lines = 4) {
    for (int i = 0; i < lines && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      if ((at_ += 64) >= bytes_) at_ = 0, row_ += stride_, --rows_;
    }
  }
  int lines() const { return rows_ * ((bytes_ + 63) / 64); }  // still to be asked for

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0;
  int rows_ = 0, bytes_ = 0, at_ = 0;
};

// Rows of memory that are there after a number of calls of ask().
class Paced {
 public:
  Paced() = default;
  Paced(const Ahead& ahead, int calls) : ahead_(ahead), lines_((ahead.lines() + calls - 1) / calls) {}
  void ask() { ahead_.ask(lines_); }

 private:
  Ahead ahead_;
  int lines_ = 0;
};

// Computes one block of kBlockRows x (kVectors * kWidth). A(i, p) is a[i * lda + p], or a[p * lda + i] if kTransposed;
// p counts units (products.h).
template <class Products, Into kInto, bool kTransposed, int kVectors>
inline void multiply_block(int depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                           const float* row_scale) {
  vf acc[kBlockRows][kVectors] = {};
  for (int p = 0; p < depth; ++p) {
    vf row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + p * ldb + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kBlockRows; ++i) {
      const float factor = kTransposed ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Products::add(acc[i][j], factor, row[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * ldc + j * kWidth;
      if (kInto == Into::kAdd) acc[i][j] += load(to);
      if (kInto == Into::kScaleAdd) acc[i][j] += load(to) * row_scale[i];
      store(to, acc[i][j]);
    }
}

// How often a GEMM of so many blocks of rows, and columns, calls ask().
inline int register_blocks(int blocks, int cols) { return blocks * ((cols + kBlockCols - 1) / kBlockCols); }

// What kBlockRows rows of C need: columns, multiples of kWidth, and units of the inner dimension.
struct Part {
  Window columns, depth;
};

// Computes the parts of C that each of `blocks` blocks of rows needs, within `cols` columns. Calls `ahead.ask()` once a
// register block.
template <class Products, Into kInto, bool kTransposed, class Asking>
__attribute__((noinline)) void multiply(int blocks, int cols, const Part* parts, const float* a, int64_t lda,
                                        const float* b, int64_t ldb, float* c, int64_t ldc, Asking& ahead,
                                        const float* row_scale = nullptr) {
  for (int j = 0; j < cols; j += kBlockCols)
    for (int i = 0; i < blocks; ++i) {
      const Part& part = parts[i];
      const int first = larger(j, part.columns.first), last = smaller(j + kBlockCols, part.columns.last);
      if (first >= last || (kInto != Into::kStore && part.depth.empty())) continue;
      ahead.ask();
      const int64_t row = i * kBlockRows, depth = part.depth.first;
      const float* a_block = a + (kTransposed ? row + depth * lda : row * lda + depth);
      const float* b_block = b + depth * ldb + first;
      float* c_block = c + row * ldc + first;
      const float* scale_block = kInto == Into::kScaleAdd ? row_scale + row : nullptr;
      const int units = part.depth.last - part.depth.first;
      if (last - first == kBlockCols)
        multiply_block<Products, kInto, kTransposed, 2>(units, a_block, lda, b_block, ldb, c_block, ldc, scale_block);
      else
        multiply_block<Products, kInto, kTransposed, 1>(units, a_block, lda, b_block, ldb, c_block, ldc, scale_block);
    }
}

// ---- shuffles -------------------------------------------------------------------------------------------------------
// Interleaves lanes. low: a0 b0 a1 b1 ..., high: the same of the upper halves.
inline void interleave(vf a, vf b, vf& low, vf& high) {
#if defined(__AVX512F__)
  const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 x = bit_cast<__m512>(a), y = bit_cast<__m512>(b);
  low = bit_cast<vf>(_mm512_permutex2var_ps(x, at, y));
  high = bit_cast<vf>(_mm512_permutex2var_ps(x, _mm512_add_epi32(at, _mm512_set1_epi32(8)), y));
#elif defined(__AVX2__)
  const __m256 x = bit_cast<__m256>(a), y = bit_cast<__m256>(b);
  const __m256 odd = _mm256_unpackhi_ps(x, y), even = _mm256_unpacklo_ps(x, y);
  low = bit_cast<vf>(_mm256_permute2f128_ps(even, odd, 0x20));
  high = bit_cast<vf>(_mm256_permute2f128_ps(even, odd, 0x31));
#else
  low = vf{a[0], b[0], a[1], b[1]};
  high = vf{a[2], b[2], a[3], b[3]};
#endif
}

// Returns a vector whose lane i combines the lanes of r[i], in a fixed order.
template <class Combine> inline vf reduce_rows(const vf* r, Combine combine) {
  vf level[kWidth];
  for (int i = 0; i < kWidth; ++i) level[i] = r[i];
#pragma GCC unroll 4
  for (int n = kWidth / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      vf low, high;
      interleave(level[i], level[i + n], low, high);
      level[i] = combine(low, high);
    }
  return level[0];
}

// Transposes kWidth vectors: a perfect shuffle of rows and lanes, log2(kWidth) times.
inline void transpose(vf* r) {
#pragma GCC unroll 4
  for (int step = 1; step < kWidth; step *= 2) {
    vf next[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) interleave(r[i], r[i + kWidth / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) r[i] = next[i];
  }
}

// Writes the rows that read(i, d) gives, kWidth units from d on of row i, transposed to `to` (units x rows). Both are
// rounded up to multiples of kWidth.
template <class Read> inline void transpose_tile(int rows, int units, float* to, int ld_to, const Read& read) {
  for (int i = 0; i < rows; i += kWidth)
    for (int d = 0; d < units; d += kWidth) {
      vf r[kWidth];
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) r[k] = read(i + k, d);
      transpose(r);
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) store(to + (d + k) * ld_to + i, r[k]);
    }
}

// Returns 2^(c * x) for c > 0 and x <= 0 (or barely above), relative error below 2e-7 + 2^-24 |c x|: exactly 1 at 0, 0
// where c * x <= -127 (`lowest` is -127 / c), NaN for NaN. c * x enters two fused multiply-adds and is never rounded by
// itself. Polynomials are minimax with p(0) = 1, off by 2e-8 or, kShort, by 1.1e-7.
template <bool kShort = false> inline vf exp2_scaled(vf x, float c, float lowest) {
  const float shift = 0x1.8p23f + 127;  // c * x + shift holds round(c * x) + 127 in its low mantissa bits
  x = max(vf{} + lowest, x);
  const vf biased = x * c + shift;
  const vf r = x * c - (biased - shift);  // in [-0.5, 0.5]
  vf p;
  if (kShort) {
    p = splat(0.001326472731307149f);
    p = p * r + 0.009671512991189957f;
    p = p * r + 0.05550733581185341f;
    p = p * r + 0.24022242426872253f;
    p = p * r + 0.6931470036506653f;
  } else {
    p = splat(0.0001535336191096819f);
    p = p * r + 0.0013398874414085574f;
    p = p * r + 0.009618437357664352f;
    p = p * r + 0.05550332471125967f;
    p = p * r + 0.24022647913628908f;
    p = p * r + 0.6931472028550663f;
  }
  p = p * r + 1.0f;
  return p * bit_cast<vf>(bit_cast<vi>(biased) << 23);
}

// Returns log(x) within 2 ulp for normal x > 0; NaN for NaN and inf.
inline vf log(vf x) {
  const vi bits = bit_cast<vi>(x) - 0x3f3504f3;  // of sqrt(1/2): m in [sqrt(1/2), sqrt(2))
  const vf e = __builtin_convertvector(bits >> 23, vf);
  const vf m = bit_cast<vf>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z - e * 2.12194440e-4f - z * 0.5f;
  return m + p + e * 0.693359375f + (x - x);
}

}  // namespace
