// How a tile GEMM multiplies: FloatProducts as float32, PairProducts as bf16 with float32 sums (AVX512-BF16).
//
// Operands lie in units of 32 bits along the inner dimension: a float, or two bf16 that are neighbours there. An array
// of units is an array of float, of which PairProducts reads nothing but the bits. Internal linkage: compiled once per
// instruction set.
#pragma once
#include "dot_bf16.h"
#include "vec.h"

namespace {

struct FloatProducts {
  static constexpr int kStep = 1;  // entries of a unit
  static vf add(vf sum, float a, vf b) { return sum + b * a; }
  // Returns the units of n entries.
  template <class T> static vf load_units(const T* from, int n) { return load_n(from, n); }
  // Packs factor * from (dim entries) as units and returns how many; writes whole vectors.
  template <class T> static int pack(const T* from, int dim, float factor, float* to) {
    int d = 0;
    for (; d + kWidth <= dim; d += kWidth) store(to + d, load(from + d) * factor);
    if (d < dim) store(to + d, load_n(from + d, dim - d) * factor);
    return dim;
  }
  // Returns rows of memory as rows of units, with the distance between them, if they are that already, or null.
  static const float* in_place(const float* rows, int64_t stride, int, int64_t& ld) { return ld = stride, rows; }
  template <class T> static const float* in_place(const T*, int64_t, int, int64_t&) { return nullptr; }
  // Stores the first n results.
  template <class T> static void round(T* to, vf x, int n) { store_n(to, x, n); }
  // Stores entries j .. j + kWidth of a row, units along the row.
  static void put(float* row, int j, vf x) { store(row + j, x); }
  // Stores entries j .. j + kWidth of kStep rows, units along the rows.
  static void put_rows(float* row, int j, const vf* x) { store(row + j, x[0]); }
  // Turns units along each row (rows x ld) into units along the rows (rows / kStep x ld_to). For floats they are one.
  static void turn(const float*, int, int, int, float*, int) {}
};

#if defined(__AVX512BF16__)

struct PairProducts {
  static constexpr int kStep = 2;
  static vf add(vf sum, float a, vf b) {
    return add_dots(sum, bit_cast<vp>(vi{} + bit_cast<int32_t>(a)), bit_cast<vp>(b));
  }
  static vf load_units(const bf16* from, int n) { return bit_cast<vf>(load_pairs_n(from, n)); }
  static int pack(const bf16* from, int dim, float factor, float* to) {  // factor is 1 or -1
    const vp sign = bit_cast<vp>(_mm512_set1_epi16(factor < 0 ? int16_t(0x8000) : int16_t(0)));
    bf16* pairs = reinterpret_cast<bf16*>(to);
    for (int d = 0; d < dim; d += kPairs) store_pairs(pairs + d, load_pairs_n(from + d, dim - d) ^ sign);
    return (dim + 1) / 2;
  }
  static const float* in_place(const bf16* rows, int64_t stride, int dim, int64_t& ld) {
    ld = stride / 2;
    const bool whole = dim % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(rows) % 4 == 0;
    return whole ? reinterpret_cast<const float*>(rows) : nullptr;
  }
  static void round(bf16* to, vf x, int n) {
    if (n < kWidth) return store_n(to, x, n);
    const __m256bh rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(x));
    std::memcpy(to, &rounded, sizeof rounded);
  }
  static void put(float* row, int j, vf x) { round(reinterpret_cast<bf16*>(row) + j, x, kWidth); }
  static void put_rows(float* row, int j, const vf* x) {
    const vp two = bit_cast<vp>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(x[1]), bit_cast<__m512>(x[0])));
    store(row + j, bit_cast<vf>(interleave_halves(two)));
  }
  static void turn(const float* from, int ld, int rows, int dim, float* to, int ld_to) {
    for (int i = 0; i < rows; i += 2, from += 2 * ld, to += ld_to)
      turn_two(reinterpret_cast<const bf16*>(from), reinterpret_cast<const bf16*>(from + ld), dim, to);
  }
  // Turns two rows of dim entries, of which null is zeros, into units along the rows; writes whole pairs of vectors.
  static void turn_two(const bf16* even, const bf16* odd, int dim, float* to) {
    const __m512i low = bit_cast<__m512i>(first_halves()), high = _mm512_add_epi16(low, _mm512_set1_epi16(kPairs / 2));
    for (int d = 0; d < dim; d += kPairs) {
      const __m512i a = bit_cast<__m512i>(even ? load_pairs_n(even + d, dim - d) : vp{}),
                    b = bit_cast<__m512i>(odd ? load_pairs_n(odd + d, dim - d) : vp{});
      store_pairs(reinterpret_cast<bf16*>(to + d), bit_cast<vp>(_mm512_permutex2var_epi16(a, low, b)));
      store_pairs(reinterpret_cast<bf16*>(to + d + kWidth), bit_cast<vp>(_mm512_permutex2var_epi16(a, high, b)));
    }
  }

 private:
  // Lanes 0, 32, 1, 33, ...: takes the first halves of two vectors in turns.
  static vp first_halves() {
    vp at;
    for (int i = 0; i < kPairs; ++i) at[i] = uint16_t(i / 2 + i % 2 * kPairs);
    return at;
  }
  // x0 .. x15 y0 .. y15 -> x0 y0 x1 y1 ...
  static vp interleave_halves(vp v) {
    vp at;
    for (int i = 0; i < kPairs; ++i) at[i] = uint16_t(i / 2 + i % 2 * kWidth);
    return bit_cast<vp>(_mm512_permutexvar_epi16(bit_cast<__m512i>(at), bit_cast<__m512i>(v)));
  }
};

#endif

}  // namespace
