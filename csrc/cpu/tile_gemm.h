// GEMMs of small float32 tiles that stay in the cache, register-blocked as in a BLAS, and what attention needs around
// them: transposing pack, row maxima, exp2. Internal linkage, like vec.h: compiled once per instruction set.
#pragma once
#include "key_ranges.h"
#include "products.h"

namespace {

// A block of C held in registers: 4 rows x kBlockVectors vectors. 4 x 4 uses 16 of AVX-512's 32 registers, 4 x 2 fits
// the 16 of AVX2 and SSE. Per step of the inner dimension: kBlockVectors vector loads, 4 scalars, 4 * kBlockVectors
// multiply-adds.
constexpr int kBlockRows = 4;
constexpr int kBlockVectors = kWidth == 16 ? 4 : 2;
constexpr int kBlockCols = kBlockVectors * kWidth;

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }
inline int round_down(int n, int step) { return n / step * step; }

// What the GEMM computes: C = AB, C += AB, or C = diag(row_scale) C + AB.
enum class Into { kStore, kAdd, kScaleAdd };

// Prefetches rows of memory, a few cache lines each time it is asked; all at once would exhaust the core's line fill
// buffers. Rows of one attention head lie far apart, so no hardware prefetcher follows them.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* from, int bytes, int64_t stride, int rows, int dim)  // bytes: of an entry
      : row_(static_cast<const char*>(from)),
        stride_(stride * bytes),
        row_lines_((dim * bytes + 63) / 64),
        left_(rows * row_lines_) {}
  void ask(int lines = 4) {
    const int from = left_, to = from > lines ? from - lines : 0;
    const char* row = row_;  // in registers: each prefetch would wait for the one before to store its place
    int line = line_;
    for (int i = from; i > to; --i) {
      __builtin_prefetch(row + line * 64, 0, 3);  // Zen 4 forgets what is to go to L2 alone, if rows lie 2 KB apart
      if (++line == row_lines_) line = 0, row += stride_;
    }
    row_ = row, line_ = line, left_ = to;
  }
  int lines() const { return left_; }  // still to be asked for

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0;
  int row_lines_ = 0, left_ = 0, line_ = 0;
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

// C, A and B of a GEMM. A(i, p) is a[i * lda + p], or a[p * lda + i] if transposed; p counts units (products.h).
struct Operands {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  const float* row_scale;
};

// Computes the block of kBlockRows x (kVectors * kWidth) at `row` and `column`. Not inlined, because GCC would keep
// addresses in vector registers, from where they come only after the multiply-adds that are waiting.
template <class Products, Into kInto, bool kTransposed, int kVectors>
__attribute__((noinline)) void multiply_block(const Operands& x, int row, int column, Window depth) {
  const int64_t lda = x.lda, ldb = x.ldb;
  const float* a = x.a + (kTransposed ? row + depth.first * lda : row * lda + depth.first);
  const float* b = x.b + depth.first * ldb + column;
  vf acc[kBlockRows][kVectors] = {};
  auto step = [&](int p) __attribute__((always_inline)) {
    vf vector[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) vector[j] = load(b + p * ldb + j * kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < kBlockRows; ++i) {
      const float factor = kTransposed ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Products::add(acc[i][j], factor, vector[j]);
    }
  };
  const int units = depth.last - depth.first;
  if (units > 0) step(0);  // begins to load sooner than the loop would
  for (int p = 1; p < units; ++p) step(p);
  const int64_t ldc = x.ldc;
  const float* row_scale = x.row_scale + row;
  float* c = x.c + row * ldc + column;
#pragma GCC unroll 4
  for (int i = 0; i < kBlockRows; ++i, c += ldc) {
    const float scale = kInto == Into::kScaleAdd ? row_scale[i] : 1.0f;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + j * kWidth;
      if (kInto == Into::kAdd) acc[i][j] += load(to);
      if (kInto == Into::kScaleAdd) acc[i][j] += load(to) * scale;
      store(to, acc[i][j]);
    }
  }
}

// The same, of `vectors` vectors, at most kVectors.
template <class Products, Into kInto, bool kTransposed, int kVectors>
void multiply_vectors(int vectors, const Operands& x, int row, int column, Window depth) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors)
      return multiply_vectors<Products, kInto, kTransposed, kVectors - 1>(vectors, x, row, column, depth);
  multiply_block<Products, kInto, kTransposed, kVectors>(x, row, column, depth);
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
  const Operands operands = {a, lda, b, ldb, c, ldc, row_scale};
  for (int j = 0; j < cols; j += kBlockCols)
    for (int i = 0; i < blocks; ++i) {
      const Part& part = parts[i];
      int first = j, last = j + kBlockCols;
      if (first < part.columns.first || last > part.columns.last) {
        first = larger(first, part.columns.first), last = smaller(last, part.columns.last);
        if (first >= last) continue;
      }
      if (kInto != Into::kStore && part.depth.empty()) continue;
      ahead.ask();
      multiply_vectors<Products, kInto, kTransposed, kBlockVectors>((last - first) / kWidth, operands, i * kBlockRows,
                                                                    first, part.depth);
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

constexpr int kRoots = kWidth == 4 ? 1 : kWidth;  // SSE looks nothing up

// Returns 2^(n / kRoots), where the low bits of `biased` hold n + 127 * kRoots; 0 if that is 0.
inline vf power_of_root(vi biased) {
#if defined(__AVX2__)
  constexpr float kPowers[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                 1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};  // 2^(i / 16)
  vi lookup;  // what n / kRoots, taken as exponent and mantissa, lacks
  for (int i = 0; i < kRoots; ++i)
    lookup[i] = bit_cast<int32_t>(kPowers[i * 16 / kRoots]) - (127 * kRoots + i) * ((1 << 23) / kRoots);
#if defined(__AVX512F__)
  const vi found = bit_cast<vi>(_mm512_permutexvar_epi32(bit_cast<__m512i>(biased), bit_cast<__m512i>(lookup)));
  return bit_cast<vf>(found + (biased << 19));
#else
  const vi found = bit_cast<vi>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(lookup), bit_cast<__m256i>(biased)));
  return bit_cast<vf>(found + (biased << 20));
#endif
#else
  return bit_cast<vf>(biased << 23);
#endif
}

struct Polynomial {
  int degree;
  float factor[6];  // of x^degree, ..., x
};

// Returns 2^x - 1 for |x| <= 1 / (2 kRoots), minimax: 2^x is off by at most 3e-8 of itself or, if short, 5e-7.
constexpr Polynomial power_less_1(bool is_short) {
  if (kRoots == 1)
    return {6, {0.000153533619f, 0.00133988744f, 0.00961843736f, 0.0555033247f, 0.240226479f, 0.693147203f}};
  if (kRoots == 8) return {3, {0.0554962233f, 0.240257636f, 0.693147242f}};
  if (is_short) return {2, {0.240226433f, 0.693187714f}};
  return {3, {0.0555021353f, 0.240234286f, 0.693147182f}};
}

// Turns each x into 2^(c * x) for c > 0 and x <= 0 (or barely above), relative error below 2e-7 + 2^-24 |c x|: exactly
// 1 at 0, between 0 and 2^-126 where c * x < -126, 0 where c * x <= -127 (`lowest` is -127 / c), NaN for NaN. But for
// SSE, c * x enters two fused multiply-adds and is never rounded by itself. kShort: relative error below 6e-7. Vectors
// go side by side, otherwise each would wait for its chain.
template <bool kShort, int kVectors> inline void exp2_scaled(vf (&x)[kVectors], float c, float lowest) {
  constexpr float kShift = 0x1.8p23f / kRoots + 127;  // c * x + kShift holds their integer in its low mantissa bits
  constexpr Polynomial kRest = power_less_1(kShort);
  vf biased[kVectors], p[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) x[i] = max(splat(lowest), x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) biased[i] = x[i] * c + kShift;
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) x[i] = x[i] * c - (biased[i] - kShift), p[i] = splat(kRest.factor[0]);
#pragma GCC unroll 8
  for (int k = 1; k < kRest.degree; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) p[i] = p[i] * x[i] + kRest.factor[k];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const vf power = power_of_root(bit_cast<vi>(biased[i]));
    x[i] = p[i] * x[i] * power + power;
  }
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
