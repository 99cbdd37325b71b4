// The noise of unmask, the same on every device: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
// 2, 3", 2011) and Gumbel noise from 64 of its bits. Plain C++17; with nvcc also for the device.
//
// Token ids 2c and 2c + 1 of a row share the block philox(seed, c, position, step, 0): words 0 and 1 belong to the even
// id, 2 and 3 to the odd one. Known answer: seed 3, position 5, step 2, ids 10 and 11: words 4272ecf0 4f9e222a 9d7de5ac
// 382013f0, Gumbel 1.20224 and 0.04600. Internal linkage, like vec.h.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ILLADA_HD static __host__ __device__ __forceinline__
#else
#define ILLADA_HD static inline
#endif

namespace illada {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57, kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

ILLADA_HD PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return PhiloxWords{c0, c1, c2, c3};
}

// Returns (high << 32 | low) * 2^-64, rounded once, to nearest.
ILLADA_HD float philox_unit(uint32_t high, uint32_t low) {
  const uint64_t u = uint64_t(high) << 32 | low;
#ifdef __CUDA_ARCH__
  return __ull2float_rn(u) * 0x1p-64f;
#else
  return float(u) * 0x1p-64f;
#endif
}

// Returns -log(-log1p(-u)): at most 44.37, at u = 2^-64; -inf where u rounds to 1. Large values come from u near 0,
// where floats are dense.
ILLADA_HD float gumbel(uint32_t high, uint32_t low) {
  const float u = philox_unit(high, low);
  return -logf(-log1pf(-(u > 0x1p-64f ? u : 0x1p-64f)));
}

constexpr float kLargestScore = 3.402823466e38f;

// Returns l + temperature * g, finite for finite l. Rounds product and sum separately, because a fused multiply-add
// would differ between machines.
ILLADA_HD float noised_score(float logit, float temperature, float g) {
#ifdef __CUDA_ARCH__
  const float score = logit + __fmul_rn(temperature, g);
#else
  volatile float noise = temperature * g;
  const float score = logit + noise;
#endif
  return score > -kLargestScore ? (score < kLargestScore ? score : kLargestScore) : -kLargestScore;
}

}  // namespace illada
