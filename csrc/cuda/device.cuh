// What every CUDA kernel of this library uses: launch(), its dynamic shared memory, conversions, reductions over a warp
// or a block, 16-byte loads and stores. Kernels hold no <<<>>>, no inline PTX and no static __shared__, so the same
// text also compiles as C++ and runs on a CPU (docs/concepts/cuda_on_cpu.md). There <cuda_runtime.h> is
// tests/cuda_on_cpu/shim, which also declares the functions between the #ifdef below.
#pragma once
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#define ILLADA_DEVICE __device__ __forceinline__

namespace illada {

// Not CUDA's own types, because nvcc takes half a second a file to read <cuda_bf16.h> and <cuda_fp16.h>.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr float kLog2e = 1.4426950408889634f;
ILLADA_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ---- what C++ has no word for ----------------------------------------------------------------------------------
#ifdef __CUDACC__
// Returns this block's dynamic shared memory, aligned to 1024 bytes as Hopper's 128-byte swizzle requires.
ILLADA_DEVICE uint8_t* dynamic_smem() {
  extern __shared__ __align__(1024) uint8_t illada_smem[];
  return illada_smem;
}
// Returns 2^x within about 2 ulp; subnormal results are 0. exp2f takes two more instructions to keep those.
ILLADA_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Convert the bits of a bf16 or fp16 to a float, and floats to the nearest; pack_: two, the first in the lower half.
ILLADA_DEVICE float float_of_bf16(uint16_t bits) {
  float x;
#if __CUDA_ARCH__ >= 900
  asm("cvt.f32.bf16 %0, %1;" : "=f"(x) : "h"(bits));
#else
  asm("mov.b32 %0, {0, %1};" : "=f"(x) : "h"(bits));
#endif
  return x;
}
ILLADA_DEVICE float float_of_fp16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
ILLADA_DEVICE uint16_t bf16_of(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
ILLADA_DEVICE uint16_t fp16_of(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
ILLADA_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
ILLADA_DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

// ---- conversions -----------------------------------------------------------------------------------------------
ILLADA_DEVICE float to_float(float x) { return x; }
ILLADA_DEVICE float to_float(bf16 x) { return float_of_bf16(x.bits); }
ILLADA_DEVICE float to_float(fp16 x) { return float_of_fp16(x.bits); }

template <class T> ILLADA_DEVICE T from_float(float x);
template <> ILLADA_DEVICE float from_float<float>(float x) { return x; }
template <> ILLADA_DEVICE bf16 from_float<bf16>(float x) { return bf16{bf16_of(x)}; }
template <> ILLADA_DEVICE fp16 from_float<fp16>(float x) { return fp16{fp16_of(x)}; }

// Packs two neighbours into one word, the lower index in the lower half, as wgmma and stmatrix expect.
template <class T> ILLADA_DEVICE uint32_t pack(float low, float high);
template <> ILLADA_DEVICE uint32_t pack<bf16>(float low, float high) { return pack_bf16(low, high); }
template <> ILLADA_DEVICE uint32_t pack<fp16>(float low, float high) { return pack_fp16(low, high); }

// ---- reductions ------------------------------------------------------------------------------------------------
// Max and Min: the result for a NaN depends on its side.
struct Sum {
  template <class T> ILLADA_DEVICE T operator()(T a, T b) const { return a + b; }
};
struct Max {
  template <class T> ILLADA_DEVICE T operator()(T a, T b) const { return a < b ? b : a; }
};
struct Min {
  template <class T> ILLADA_DEVICE T operator()(T a, T b) const { return b < a ? b : a; }
};

// Reduces over groups of WIDTH neighbouring lanes; every lane gets the result. All 32 lanes of the warp must call it.
// The tree is fixed: equal inputs give equal bits.
template <int WIDTH = 32, class T, class Op> ILLADA_DEVICE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <int WIDTH = 32, class T> ILLADA_DEVICE T warp_sum(T x) { return warp_reduce<WIDTH>(x, Sum{}); }
template <int WIDTH = 32, class T> ILLADA_DEVICE T warp_max(T x) { return warp_reduce<WIDTH>(x, Max{}); }
template <int WIDTH = 32, class T> ILLADA_DEVICE T warp_min(T x) { return warp_reduce<WIDTH>(x, Min{}); }

// Reduces over the THREADS threads of a one-dimensional block, in a fixed order; every thread gets the result. scratch:
// shared memory for THREADS / 32 values, free again on return.
template <int THREADS, class T, class Op> ILLADA_DEVICE T block_reduce(T x, T* scratch, Op op) {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
  x = warp_reduce(x, op);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) total = op(total, scratch[warp]);
  __syncthreads();
  return total;
}

// ---- 16-byte accesses ------------------------------------------------------------------------------------------
// Pointers must be aligned to 16 bytes; kernels peel the rest.
template <class T> struct Vec16 {
  static constexpr int size = 16 / sizeof(T);
  alignas(16) T at[size];
};
template <class T> ILLADA_DEVICE Vec16<T> load16(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  return *reinterpret_cast<const Vec16<T>*>(&bits);
}
// Loads data that is read once, and leaves the caches to others.
template <class T> ILLADA_DEVICE Vec16<T> load16_streaming(const T* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  return *reinterpret_cast<const Vec16<T>*>(&bits);
}
template <class T> ILLADA_DEVICE void store16(T* p, const Vec16<T>& x) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&x);
}
template <class T> ILLADA_DEVICE void store16_streaming(T* p, const Vec16<T>& x) {
  __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&x));
}

// ---- launch ----------------------------------------------------------------------------------------------------
#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches
struct Launch {
  dim3 grid, block;
  size_t smem;  // bytes of dynamic shared memory
  cudaStream_t stream;
  int cluster = 1;  // blocks of a cluster, along x
};

// Runs kernel(args...) as described. Returns a cudaError_t as int, 0 on success. Does nothing for an empty grid.
template <class... P, class... A> int launch(const Launch& l, void (*kernel)(P...), A&&... args) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return 0;
  const void* entry = reinterpret_cast<const void*>(kernel);
  constexpr size_t kDefaultSmem = 48 << 10;  // more must be requested
  if (l.smem > kDefaultSmem) {
    cudaError_t e = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.smem));
    if (e != cudaSuccess) return int(e);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = l.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.smem;
  config.stream = l.stream;
  config.attrs = &cluster;
  config.numAttrs = l.cluster > 1;
  return int(cudaLaunchKernelEx(&config, kernel, P(args)...));
}
#endif

}  // namespace illada
