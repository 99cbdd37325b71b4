// What the kernels of masked_loss share: NaN, loads and stores of several elements, and the formula's arguments.
#pragma once
#include "device.cuh"

namespace illada {
namespace loss {

ILLADA_DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

// z = softcap tanh((logit + bias) / softcap), -inf at forbidden ids.
struct Options {
  int64_t vocab;
  const float* bias;  // (vocab), or null
  float softcap;      // 0: none
  float smoothing, z_loss;
  const int64_t* forbid;  // ascending
  int64_t n_forbid;
};

ILLADA_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Loads N neighbours as floats. For N > 1, N * sizeof(T) is a multiple of 16 and p is aligned to 16 bytes.
template <int N, class T> ILLADA_DEVICE void load(const T* p, float (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = to_float(*p);
  } else {
    constexpr int kVector = Vec16<T>::size;
#pragma unroll
    for (int i = 0; i < N; i += kVector) {
      const Vec16<T> v = load16(p + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) x[i + k] = to_float(v.at[k]);
    }
  }
}
template <int N, class T> ILLADA_DEVICE void store(T* p, const float (&x)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(x[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; i += 4) store16_streaming(p + i, Vec16<T>{{x[i], x[i + 1], x[i + 2], x[i + 3]}});
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 8) {
      Vec16<uint32_t> pairs;
#pragma unroll
      for (int k = 0; k < 4; ++k) pairs.at[k] = pack<T>(x[i + 2 * k], x[i + 2 * k + 1]);
      store16_streaming(reinterpret_cast<uint32_t*>(p + i), pairs);
    }
  }
}

}  // namespace loss
}  // namespace illada
