// Vectors of floats as wide as the instruction set (GCC and Clang vector extensions: + - * / ?: and comparisons work as
// on scalars), conversions from and to bf16 and fp16, and the exponential that the ops share. Internal linkage: the
// file is compiled once per instruction set, and the linker must never merge the copies.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class To, class From> inline To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

inline vf splat(float x) { return vf{} + x; }  // gives +0 for x = -0

// ---- scalar conversions ---------------------------------------------------------------------------------------------
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
  if (exponent == 0) return bit_cast<float>(bit_cast<uint32_t>(float(mantissa) * 0x1p-24f) | sign);
  return bit_cast<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}
template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {  // rounds to nearest even; a NaN stays a NaN
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return bf16{uint16_t(u >> 16 | 0x40)};
  return bf16{uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> inline fp16 from_float<fp16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return fp16{uint16_t(sign | 0x7e00)};
  if (a >= 0x477ff000) return fp16{uint16_t(sign | 0x7c00)};  // 65520 and above round to inf
  if (a < 0x38800000) {  // subnormal: the adder rounds
    const uint32_t r = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000;  // 0.5 has an ulp of 2^-24
    return fp16{uint16_t(sign | r)};
  }
  return fp16{uint16_t(sign | ((a + 0xfff + (a >> 13 & 1)) - 0x38000000) >> 13)};
}

// ---- loads and stores of one vector, and of its first n lanes -------------------------------------------------------
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf widen(bf16, vh h) { return bit_cast<vf>(__builtin_convertvector(h, vu) << 16); }
inline vh narrow(bf16, vf v) {
  const vu u = bit_cast<vu>(v);
  const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = u >> 16 | 0x40;
  return __builtin_convertvector(v == v ? rounded : nan, vh);
}
inline vf widen(fp16, vh h) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return bit_cast<vf>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  vf v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(fp16{h[i]});
  return v;
#endif
}
inline vh narrow(fp16, vf v) {
#if defined(__AVX512F__)
  return bit_cast<vh>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return bit_cast<vh>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  vh h;
  for (int i = 0; i < kWidth; ++i) h[i] = from_float<fp16>(v[i]).bits;
  return h;
#endif
}
template <class T> inline vf load(const T* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return widen(T{}, h);
}
template <class T> inline void store(T* p, vf v) {
  const vh h = narrow(T{}, v);
  std::memcpy(p, &h, sizeof h);
}
// Less than a vector: not inlined, because in each loop they would be more code than the rest of it.
template <class T> __attribute__((noinline, cold)) vf load_some(const T* p, int n, float rest) {
#if defined(__AVX512F__)
  const __mmask16 lanes = n > 0 ? __mmask16((1u << n) - 1) : __mmask16(0);
  if constexpr (sizeof(T) == 4) return bit_cast<vf>(_mm512_mask_loadu_ps(bit_cast<__m512>(splat(rest)), lanes, p));
  else {
    const vf v = widen(T{}, bit_cast<vh>(_mm256_maskz_loadu_epi16(lanes, p)));
    return bit_cast<vf>(_mm512_mask_mov_ps(bit_cast<__m512>(splat(rest)), lanes, bit_cast<__m512>(v)));
  }
#else
  vf v = splat(rest);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
template <class T> __attribute__((noinline, cold)) void store_some(T* p, vf v, int n) {
#if defined(__AVX512F__)
  const __mmask16 lanes = n > 0 ? __mmask16((1u << n) - 1) : __mmask16(0);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, lanes, bit_cast<__m512>(v));
  else _mm256_mask_storeu_epi16(p, lanes, bit_cast<__m256i>(narrow(T{}, v)));
#else
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
#endif
}
template <class T> inline vf load_n(const T* p, int n, float rest = 0.0f) {
  return n >= kWidth ? load(p) : load_some(p, n, rest);
}
template <class T> inline void store_n(T* p, vf v, int n) {
  if (n >= kWidth) store(p, v);
  else store_some(p, v, n);
}

// ---- elementwise and across lanes -----------------------------------------------------------------------------------
inline vf max(vf a, vf b) {  // as maxps: b where either is NaN
#if defined(__AVX512F__)
  // GCC compiles a > b ? a : b to two instructions
  return bit_cast<vf>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}
inline float reduce_max(vf v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
inline float reduce_add(vf v) {  // a fixed tree: equal inputs give equal bits
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

// Returns exp(x) within 2 ulp. exp(-inf) = 0; results below 2^-126 flush to 0, above float's range give inf; NaN stays
// NaN.
inline vf exp(vf x) {
  const vf shift = splat(0x1.8p23f);
  const vf clamped = x < -126.0f * 0.6931472f ? splat(-126.0f * 0.6931472f) : (x > 88.8f ? splat(88.8f) : x);
  const vf biased = clamped * 1.44269504f + shift;  // n + 1.5 * 2^23: n is in the low mantissa bits
  const vf n = biased - shift;
  const vf r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;  // Cody-Waite
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // n can be 128, and 2^128 is not a float: scale in two steps
  const vi e = bit_cast<vi>(biased) - bit_cast<vi>(shift), half = e >> 1;
  p = p * bit_cast<vf>((half + 127) << 23) * bit_cast<vf>((e - half + 127) << 23);
  p = x < -126.0f * 0.6931472f ? vf{} : p;
  return x == x ? p : x;
}

}  // namespace
