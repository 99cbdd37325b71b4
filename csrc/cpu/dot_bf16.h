// Dot products of bf16 pairs, where the instruction set has them (AVX512-BF16): 2 kWidth multiply-adds an instruction.
// Internal linkage, like vec.h: compiled once per instruction set.
//
// The instruction accumulates in float32, rounds to nearest even, and takes subnormal inputs, products and sums as 0,
// in any float mode. So a sum of D products is as exact as one of fused multiply-adds down to 2^-126.
#pragma once
#include "vec.h"

#if defined(__AVX512BF16__)

namespace {

constexpr int kPairs = 2 * kWidth;  // bf16 of one vector
typedef uint16_t vp __attribute__((vector_size(kPairs * 2)));

inline vp load_pairs(const bf16* p) {
  vp v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Returns the first n, followed by 0.
inline vp load_pairs_n(const bf16* p, int n) {
  if (n >= kPairs) return load_pairs(p);
  return bit_cast<vp>(_mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p));
}
inline void store_pairs(bf16* p, vp v) { std::memcpy(p, &v, sizeof v); }

// Adds a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] to lane i.
inline vf add_dots(vf sum, vp a, vp b) {
  return bit_cast<vf>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}

}  // namespace

#endif
