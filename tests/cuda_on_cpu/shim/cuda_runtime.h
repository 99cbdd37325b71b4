// Stand-in for CUDA's <cuda_runtime.h>: the part of CUDA C++ that this library's kernels use, for a CPU. A kernel is an
// ordinary function that the emulator calls once for each thread.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>

#include <cuda_runtime_api.h>  // of the CUDA toolkit: types and declarations only
#include <vector_functions.h>
#include <vector_types.h>

#include "emulator_api.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
// Always inlined, so that the return address of the emulator's functions lies in the kernel and names its line.
#define EMULATED inline __attribute__((always_inline))
#define __shared__ static_assert(false, "static __shared__ memory does not exist here: use illada::dynamic_smem()");

extern const __thread uint3 threadIdx, blockIdx, blockDim, gridDim;  // const: the compiler reports no access to them

using std::max;
using std::min;

// ---- meetings of threads ---------------------------------------------------------------------------------------
EMULATED void __syncthreads() { emulator::barrier_all(false); }
EMULATED int __syncthreads_count(int x) { return emulator::barrier_all(x).yes; }
EMULATED int __syncthreads_or(int x) { return emulator::barrier_all(x).yes != 0; }
EMULATED int __syncthreads_and(int x) {
  const emulator::Votes votes = emulator::barrier_all(x);
  return votes.yes == votes.all;
}

namespace emulator {
template <class T> EMULATED uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T> EMULATED T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
}  // namespace emulator

EMULATED void __syncwarp(unsigned mask = ~0u) { emulator::warp_meet("__syncwarp", mask); }
#define EMULATED_SHUFFLE(name, how)                                                      \
  template <class T> EMULATED T name(unsigned mask, T x, int by, int width = 32) {       \
    using namespace emulator;                                                            \
    return from_bits<T>(warp_shuffle(#name, mask, to_bits(x), Shuffle::how, by, width)); \
  }
EMULATED_SHUFFLE(__shfl_sync, from)
EMULATED_SHUFFLE(__shfl_xor_sync, exclusive_or)
EMULATED_SHUFFLE(__shfl_up_sync, up)
EMULATED_SHUFFLE(__shfl_down_sync, down)
#undef EMULATED_SHUFFLE
EMULATED unsigned __ballot_sync(unsigned mask, int x) {
  return emulator::warp_lanes_with("__ballot_sync", mask, x != 0, 1);
}
EMULATED int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
EMULATED int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == mask; }
template <class T> EMULATED unsigned __match_any_sync(unsigned mask, T x) {
  const uint64_t mine = emulator::to_bits(x);
  return emulator::warp_lanes_with("__match_any_sync", mask, mine, mine);
}
#define EMULATED_REDUCE(name, op, type, kind)                                         \
  EMULATED type name(unsigned mask, type x) {                                         \
    using namespace emulator;                                                         \
    return type(warp_reduce(#name, mask, unsigned(x), Atomic::op, AtomicType::kind)); \
  }
#define EMULATED_REDUCE_BOTH(name, op)     \
  EMULATED_REDUCE(name, op, int, i32)      \
  EMULATED_REDUCE(name, op, unsigned, u32)
EMULATED_REDUCE_BOTH(__reduce_add_sync, add)
EMULATED_REDUCE_BOTH(__reduce_min_sync, min)
EMULATED_REDUCE_BOTH(__reduce_max_sync, max)
EMULATED_REDUCE(__reduce_and_sync, bit_and, unsigned, u32)
EMULATED_REDUCE(__reduce_or_sync, bit_or, unsigned, u32)
#undef EMULATED_REDUCE_BOTH
#undef EMULATED_REDUCE
EMULATED void __threadfence() { emulator::memory_fence(); }
EMULATED void __threadfence_block() { emulator::memory_fence(); }

// ---- atomics ---------------------------------------------------------------------------------------------------
#define EMULATED_ATOMIC(name, op, T, code)                                       \
  EMULATED T name(T* p, T x) {                                                   \
    using namespace emulator;                                                    \
    return from_bits<T>(atomic(Atomic::op, AtomicType::code, p, to_bits(x), 0)); \
  }
#define EMULATED_ATOMICS(name, op)                   \
  EMULATED_ATOMIC(name, op, int, i32)                \
  EMULATED_ATOMIC(name, op, unsigned, u32)           \
  EMULATED_ATOMIC(name, op, unsigned long long, u64)
EMULATED_ATOMICS(atomicAdd, add)
EMULATED_ATOMICS(atomicMin, min)
EMULATED_ATOMICS(atomicMax, max)
EMULATED_ATOMICS(atomicExch, exchange)
EMULATED_ATOMICS(atomicAnd, bit_and)
EMULATED_ATOMICS(atomicOr, bit_or)
EMULATED_ATOMICS(atomicXor, bit_xor)
EMULATED_ATOMIC(atomicAdd, add, float, f32)
EMULATED_ATOMIC(atomicAdd, add, double, f64)
EMULATED_ATOMIC(atomicExch, exchange, float, f32)
template <class T> EMULATED T atomicCAS(T* p, T expected, T x) {
  using namespace emulator;
  return from_bits<T>(atomic(Atomic::compare_and_swap, sizeof(T) == 4 ? AtomicType::u32 : AtomicType::u64, p,
                             to_bits(x), to_bits(expected)));
}

// ---- loads and stores that hint at the caches -------------------------------------------------------------------
namespace emulator {
template <class T> EMULATED T load(const T* p) {
  check_access(p, sizeof(T), alignof(T), false);
  T x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class T> EMULATED void store(T* p, T x) {
  check_access(p, sizeof(T), alignof(T), true);
  __builtin_memcpy(p, &x, sizeof x);
}
}  // namespace emulator
template <class T> EMULATED T __ldg(const T* p) { return emulator::load(p); }
template <class T> EMULATED T __ldcs(const T* p) { return emulator::load(p); }
template <class T> EMULATED T __ldcg(const T* p) { return emulator::load(p); }
template <class T> EMULATED T __ldcv(const T* p) { return emulator::load(p); }
template <class T> EMULATED void __stcs(T* p, T x) { emulator::store(p, x); }
template <class T> EMULATED void __stcg(T* p, T x) { emulator::store(p, x); }
template <class T> EMULATED void __stwt(T* p, T x) { emulator::store(p, x); }

// ---- arithmetic ------------------------------------------------------------------------------------------------
EMULATED float __expf(float x) { return std::exp(x); }
EMULATED float __logf(float x) { return std::log(x); }
EMULATED float __log2f(float x) { return std::log2(x); }
EMULATED float __fdividef(float a, float b) { return a / b; }
EMULATED float __fdiv_rn(float a, float b) { return a / b; }
EMULATED float __fmul_rn(float a, float b) { return a * b; }
EMULATED float __fadd_rn(float a, float b) { return a + b; }
EMULATED float __fsub_rn(float a, float b) { return a - b; }
EMULATED float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
EMULATED float __frcp_rn(float x) { return 1 / x; }
EMULATED float __fsqrt_rn(float x) { return std::sqrt(x); }
EMULATED float rsqrtf(float x) { return 1 / std::sqrt(x); }
EMULATED float __saturatef(float x) { return x > 0 ? std::min(x, 1.f) : 0.f; }
EMULATED float exp10f(float x) { return float(std::pow(10., x)); }
EMULATED float __int_as_float(int x) { return emulator::from_bits<float>(unsigned(x)); }
EMULATED float __uint_as_float(unsigned x) { return emulator::from_bits<float>(x); }
EMULATED int __float_as_int(float x) { return int(emulator::to_bits(x)); }
EMULATED unsigned __float_as_uint(float x) { return unsigned(emulator::to_bits(x)); }
EMULATED float __uint2float_rn(unsigned x) { return float(x); }
EMULATED float __int2float_rn(int x) { return float(x); }
EMULATED float __ull2float_rn(unsigned long long x) { return float(x); }
EMULATED float __ll2float_rn(long long x) { return float(x); }
EMULATED int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATED int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMULATED int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
EMULATED int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
EMULATED int __ffs(int x) { return __builtin_ffs(x); }
EMULATED int __ffsll(long long x) { return __builtin_ffsll(x); }
EMULATED unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
EMULATED unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
[[noreturn]] inline void __trap() { std::abort(); }

// ---- host ------------------------------------------------------------------------------------------------------
namespace emulator {
template <class... P> struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;  // a copy, as a GPU keeps one in constant memory
  static void run(void* p) {
    Call* c = static_cast<Call*>(p);
    std::apply(c->kernel, c->arguments);
  }
};
}  // namespace emulator
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  emulator::Call<P...> call{kernel, std::tuple<P...>(P(arguments)...)};
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = int(config->attrs[i].val.clusterDim.x);
  return cudaError_t(emulator::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster,
                                        &emulator::Call<P...>::run, &call, sizeof call));
}

namespace illada {
EMULATED uint8_t* dynamic_smem() { return emulator::shared_base(); }
EMULATED float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.1754944e-38f ? 0.f : y;
}
EMULATED float float_of_bf16(uint16_t bits) { return __uint_as_float(unsigned(bits) << 16); }
EMULATED uint16_t bf16_of(float x) {
  const unsigned u = __float_as_uint(x);
  return x == x ? uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16) : uint16_t(0x7fff);  // a NaN: as on a GPU
}
EMULATED float float_of_fp16(uint16_t bits) {
  const unsigned sign = unsigned(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 0) return __uint_as_float(__float_as_uint(float(mantissa) * 0x1p-24f) | sign);
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}
EMULATED uint16_t fp16_of(float x) {
  const unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return 0x7fff;
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to inf
  if (a < 0x38800000)  // subnormal: the adder rounds, because 0.5 has an ulp of 2^-24
    return uint16_t(sign | (__float_as_uint(__uint_as_float(a) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((a + 0xfff + (a >> 13 & 1)) - 0x38000000) >> 13);
}
EMULATED uint32_t pack_bf16(float low, float high) { return bf16_of(low) | uint32_t(bf16_of(high)) << 16; }
EMULATED uint32_t pack_fp16(float low, float high) { return fp16_of(low) | uint32_t(fp16_of(high)) << 16; }
}  // namespace illada
