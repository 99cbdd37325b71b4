// unmask on the CPU: the best of l + T * Gumbel among a block of ids.
//
// An id wins only if T * g > best - max l, so u < exp(-(best - max l) / T), which the top word of u tells. The bound
// errs to one side: logarithms are computed only for ids that pass it, and the argmax is exact.
#pragma once
#include <cmath>

#include "illada/philox.h"
#include "vec.h"

namespace {

constexpr int kBlock = 512;

// ---- vectors --------------------------------------------------------------------------------------------------------
// kWidth / 2 counters, one per 64-bit lane.
typedef uint64_t v64 __attribute__((vector_size(kWidth * 4)));
typedef double vd __attribute__((vector_size(kWidth * 4)));

inline vf min(vf a, vf b) { return a < b ? a : b; }

// Returns the products of the low halves; the high halves of a and b are ignored.
inline v64 mul32(v64 a, v64 b) {
#if defined(__AVX512F__)
  return bit_cast<v64>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<v64>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Moves the high halves low. A shuffle, because the multiplies take the port of the shifts.
inline v64 high32(v64 a) {
#if defined(__AVX512F__)
  return bit_cast<v64>(_mm512_shuffle_epi32(bit_cast<__m512i>(a), _MM_PERM_DDBB));
#elif defined(__AVX2__)
  return bit_cast<v64>(_mm256_shuffle_epi32(bit_cast<__m256i>(a), 0xf5));
#else
  return a >> 32;
#endif
}

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  int64_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

inline bool any_at_most(vu v, uint32_t limit) {
#if defined(__AVX512F__)
  return _mm512_cmple_epu32_mask(bit_cast<__m512i>(v), _mm512_set1_epi32(int(limit))) != 0;
#else
  return any(v <= limit);
#endif
}

// ---- Philox ---------------------------------------------------------------------------------------------------------
// Philox of one row. Rounds one and two are partly the same for all counters, because only the pair index varies. The
// constants are whole vectors in memory: broadcasting them in the loop would take the shuffles' port.
struct RowNoise {
  v64 first, a1, b2, b3;  // xors of rounds one and two, and word 3 after round two
  v64 k0[10], k1[10];  // round keys, from round three on

  RowNoise(uint64_t seed, uint32_t position, uint32_t step) {
    const auto key0 = [=](uint32_t round) { return uint32_t(seed) + round * illada::kPhiloxW0; };
    const auto key1 = [=](uint32_t round) { return uint32_t(seed >> 32) + round * illada::kPhiloxW1; };
    const uint64_t p1 = uint64_t(illada::kPhiloxM1) * step;
    const uint64_t p0 = uint64_t(illada::kPhiloxM0) * (uint32_t(p1 >> 32) ^ position ^ key0(0));
    first = v64{} + key1(0);
    a1 = v64{} + (uint32_t(p1) ^ key0(1));
    b2 = v64{} + (uint32_t(p0 >> 32) ^ key1(1));
    b3 = v64{} + uint32_t(p0);
    for (uint32_t i = 2; i < 10; ++i) k0[i] = v64{} + key0(i), k1[i] = v64{} + key1(i);
  }
};

// Groups of kWidth ids that go through the rounds side by side, because one group alone waits for its multiplies. Four
// fit AVX-512's registers.
#if defined(__AVX512F__)
constexpr int kSideBySide = 4;
#else
constexpr int kSideBySide = 2;
#endif
static_assert(kBlock % (kSideBySide * kWidth) == 0, "whole steps");

template <int N>
// Of N groups: word w of pair i in the low half of lane i. The high half is not defined.
struct Words {
  v64 w0[N], w1[N], w2[N], w3[N];
  // Lane i: the top, or the low, 32 bits of id i of group g.
  vu top(int g) const { return bit_cast<vu>((w0[g] & 0xffffffff) | w2[g] << 32); }
  vu low(int g) const { return bit_cast<vu>((w1[g] & 0xffffffff) | w3[g] << 32); }
};

// Returns the words of N groups of kWidth / 2 pairs, whose indices pairs_of(group) gives.
template <int N, class Pairs>
inline __attribute__((always_inline)) Words<N> philox_groups(const RowNoise& row, const Pairs& pairs_of) {
  const v64 m0 = v64{} + illada::kPhiloxM0, m1 = v64{} + illada::kPhiloxM1;
  Words<N> w;
  v64 p[N], q[N];
  for (int g = 0; g < N; ++g) p[g] = mul32(pairs_of(g), m0);
  for (int g = 0; g < N; ++g) q[g] = mul32(high32(p[g]) ^ row.first, m1);
  for (int g = 0; g < N; ++g)
    w.w0[g] = high32(q[g]) ^ row.a1, w.w1[g] = q[g], w.w2[g] = p[g] ^ row.b2, w.w3[g] = row.b3;
#pragma GCC unroll 8
  for (int round = 2; round < 10; ++round) {
    for (int g = 0; g < N; ++g) p[g] = mul32(w.w0[g], m0), q[g] = mul32(w.w2[g], m1);
    for (int g = 0; g < N; ++g) {
      w.w0[g] = high32(q[g]) ^ w.w1[g] ^ row.k0[round];
      w.w2[g] = high32(p[g]) ^ w.w3[g] ^ row.k1[round];
      w.w1[g] = q[g], w.w3[g] = p[g];
    }
  }
  return w;
}

inline v64 first_pairs(int64_t first_id) {
  v64 pairs;
  for (int i = 0; i < kWidth / 2; ++i) pairs[i] = uint64_t(first_id / 2 + i);
  return pairs;
}

struct Best {
  float score, logit;
  int32_t id;
  void offer(float l, float s, int32_t i) {
    if (s > score || (s == score && i < id)) score = s, logit = l, id = i;
  }
};

// Returns whether an id of the group can reach `bar`, from the exponents of the top words: u >= 2^e gives g <= -e log
// 2.
inline bool can_win(vu top, const float* logits, float temperature, float bar) {
  const vf leading = __builtin_convertvector(bit_cast<vi>(top >> 8), vf);  // exact, so its exponent is the word's
  const vf negative_e = __builtin_convertvector(151 - (bit_cast<vi>(leading) >> 23), vf);
  return any(load(logits) + negative_e * (temperature * 0.69315f) >= bar);
}

// Offers the ids of one group whose top word is at most `threshold`. Not inlined, because it is rare and needs
// registers.
__attribute__((noinline)) void offer_hits(const RowNoise& noise, float temperature, const float* logits, v64 pairs,
                                          uint32_t threshold, Best& best) {
  const Words<1> words = philox_groups<1>(noise, [=](int) { return pairs; });
  const vu high = words.top(0), low = words.low(0);
  for (int i = 0; i < kWidth; ++i)
    if (high[i] <= threshold && logits[i] > -kInf)
      best.offer(logits[i], illada::noised_score(logits[i], temperature, illada::gumbel(high[i], low[i])),
                 int32_t(2 * pairs[i / 2] + i % 2));
}

// The pairs of a block of which an id is kept, and their logits.
struct KeptPairs {
  static constexpr int kStep = kSideBySide * kWidth / 2;  // pairs that go through the rounds together
  int count = 0;
  alignas(64) uint64_t index[kBlock / 2 + kStep];
  alignas(64) float logits[kBlock + 2 * kStep];

  // Takes those of kWidth ids, of pairs `at`, that are above -inf.
  void add(vf v, v64 at) {
#if defined(__AVX512F__)
    const __m512i x = bit_cast<__m512i>(v);
    const __mmask8 kept = _mm512_cmpneq_epi64_mask(x, _mm512_set1_epi64(int64_t(0xff800000ff800000)));
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi64(kept, bit_cast<__m512i>(at)));
    _mm512_storeu_si512(logits + 2 * count, _mm512_maskz_compress_epi64(kept, x));
    count += __builtin_popcount(kept);
#else
    if (!any(v > -kInf)) return;
    for (int i = 0; i < kWidth; i += 2)
      if (v[i] > -kInf || v[i + 1] > -kInf)
        logits[2 * count] = v[i], logits[2 * count + 1] = v[i + 1], index[count++] = at[i / 2];
#endif
  }
  // Fills the last step with -inf.
  void finish() {
    for (int i = count; i % kStep; ++i) index[i] = 0, logits[2 * i] = logits[2 * i + 1] = -kInf;
  }
  v64 pairs(int first) const {
    v64 at;
    std::memcpy(&at, index + first, sizeof at);
    return at;
  }
};

// Offers those of kBlock ids from first_id on that can beat or tie `best`. Their logits are at most `top`; if kSparse,
// many are -inf, and only pairs of the others are drawn.
template <bool kSparse>
inline void noise_block(const RowNoise& noise, float temperature, const float* logits, int64_t first_id, float top,
                        Best& best) {
  // an upper bound of what rounding adds to a score: a few ulp of each of its parts
  const double slack = 1e-6 * (std::fabs(double(best.score)) + std::fabs(double(top)) + 64.0 * temperature);
  const double need = (double(best.score) - top - slack) / temperature;  // the Gumbel value a winner must reach
  if (need > 44.5) return;  // a 64-bit uniform gives at most 44.37
  const double limit = std::exp(-need) * 1.0001 * 0x1p32;  // g >= need implies u <= exp(-need)
  const uint32_t threshold = limit < 4294967295.0 ? uint32_t(limit) : 0xffffffff;
  // kSideBySide groups of ids, whose pairs pairs_of(group) gives
  const auto step = [&](const float* l, const auto& pairs_of) {
    const Words<kSideBySide> words = philox_groups<kSideBySide>(noise, pairs_of);
    vu lowest = words.top(0);
    for (int g = 1; g < kSideBySide; ++g) lowest = words.top(g) < lowest ? words.top(g) : lowest;
    if (__builtin_expect(!any_at_most(lowest, threshold), 1)) return;
    for (int g = 0; g < kSideBySide; ++g)
      if (can_win(words.top(g), l + g * kWidth, temperature, float(best.score - 2 * slack)))
        offer_hits(noise, temperature, l + g * kWidth, pairs_of(g), threshold, best);
  };
  v64 pairs = first_pairs(first_id);
  if (kSparse) {
    KeptPairs kept;
    for (int j = 0; j < kBlock; j += kWidth, pairs += kWidth / 2) kept.add(load(logits + j), pairs);
    kept.finish();
    for (int i = 0; i < kept.count; i += KeptPairs::kStep)
      step(kept.logits + 2 * i, [&](int g) { return kept.pairs(i + g * (kWidth / 2)); });
    return;
  }
  for (int j = 0; j < kBlock; j += kSideBySide * kWidth, pairs += kSideBySide * (kWidth / 2))
    step(logits + j, [&](int g) { return pairs + g * (kWidth / 2); });
}

}  // namespace
