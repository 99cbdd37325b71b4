// Wrappers over the PTX of Hopper (sm_90a), one instruction each, named after it. Kernels use only these names, so the
// same text also runs on a CPU, where tests/cuda_on_cpu/shim/hopper_on_cpu.cuh defines them.
#pragma once
#include "device.cuh"
#include "tensor_map.cuh"

#ifndef __CUDACC__
#include <hopper_on_cpu.cuh>
#else
#include "wgmma.cuh"

namespace illada {

// Returns a shared memory address as PTX expects it.
ILLADA_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarrier --------------------------------------------------------------------------------------------------
// A phase ends when `arrivals` threads have arrived and all announced bytes have come. Phases count 0, 1, 0, 1...
ILLADA_DEVICE void mbar_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the asynchronous proxy. Call before the block barrier that lets others use
// them.
ILLADA_DEVICE void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
ILLADA_DEVICE void mbar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(bar)) : "memory");
}
// Arrives at the barrier of the same address in block `rank` of the cluster.
ILLADA_DEVICE void mbar_arrive_cluster(uint64_t* bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(smem_address(bar)),
      "r"(rank)
      : "memory");
}
// Arrives and announces bytes that TMA loads will bring.
ILLADA_DEVICE void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes)
               : "memory");
}
// Announces bytes without arriving.
ILLADA_DEVICE void mbar_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes)
               : "memory");
}
// Returns whether the phase of this parity has ended. May wait a little before it returns false.
ILLADA_DEVICE bool mbar_try_wait(uint64_t* bar, uint32_t parity) {
  uint32_t ended;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(ended)
               : "r"(smem_address(bar)), "r"(parity)
               : "memory");
  return ended;
}
// Waits for the end of the phase of this parity. A fresh barrier is in phase 0, so waiting for parity 1 returns at
// once.
ILLADA_DEVICE void mbar_wait(uint64_t* bar, uint32_t parity) {
  while (!mbar_try_wait(bar, parity)) {}
}

// ---- TMA -------------------------------------------------------------------------------------------------------
// Coordinates are in elements, the contiguous dimension first, as in the map. One thread issues a copy.
#define ILLADA_TMA(RANK, COORDINATES, LOAD, MULTICAST, STORE, ...)                                                    \
  /* global to shared; the box's bytes are counted at `bar` */                                                        \
  ILLADA_DEVICE void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, COORDINATES) {                        \
    asm volatile("cp.async.bulk.tensor." #RANK                                                                        \
                 "d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" LOAD                            \
                 "}], [%2];" ::"r"(smem_address(dst)),                                                                \
                 "l"(map), "r"(smem_address(bar)), __VA_ARGS__                                                        \
                 : "memory");                                                                                         \
  }                                                                                                                   \
  /* to the same addresses (dst and bar) in each block of the cluster whose bit is set in `blocks` */                 \
  ILLADA_DEVICE void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, uint16_t blocks,            \
                                        COORDINATES) {                                                                \
    asm volatile("cp.async.bulk.tensor." #RANK                                                                        \
                 "d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {" MULTICAST    \
                 "}], [%2], %3;" ::"r"(smem_address(dst)),                                                            \
                 "l"(map), "r"(smem_address(bar)), "h"(blocks), __VA_ARGS__                                           \
                 : "memory");                                                                                         \
  }                                                                                                                   \
  ILLADA_DEVICE void tma_store(const CUtensorMap* map, const void* src, COORDINATES) {                                \
    asm volatile("cp.async.bulk.tensor." #RANK "d.global.shared::cta.bulk_group [%0, {" STORE "}], [%1];" ::"l"(map), \
                 "r"(smem_address(src)), __VA_ARGS__                                                                  \
                 : "memory");                                                                                         \
  }                                                                                                                   \
  /* adds the box to global memory, in the type of the map */                                                         \
  ILLADA_DEVICE void tma_reduce_add(const CUtensorMap* map, const void* src, COORDINATES) {                           \
    asm volatile("cp.reduce.async.bulk.tensor." #RANK "d.global.shared::cta.add.bulk_group [%0, {" STORE              \
                 "}], [%1];" ::"l"(map),                                                                              \
                 "r"(smem_address(src)), __VA_ARGS__                                                                  \
                 : "memory");                                                                                         \
  }
#define ILLADA_COMMA ,
ILLADA_TMA(2, int x ILLADA_COMMA int y, "%3, %4", "%4, %5", "%2, %3", "r"(x), "r"(y))
ILLADA_TMA(3, int x ILLADA_COMMA int y ILLADA_COMMA int z, "%3, %4, %5", "%4, %5, %6", "%2, %3, %4", "r"(x), "r"(y),
           "r"(z))
ILLADA_TMA(4, int x ILLADA_COMMA int y ILLADA_COMMA int z ILLADA_COMMA int w, "%3, %4, %5, %6", "%4, %5, %6, %7",
           "%2, %3, %4, %5", "r"(x), "r"(y), "r"(z), "r"(w))
#undef ILLADA_COMMA
#undef ILLADA_TMA

// Contiguous copies without a map. Addresses and `bytes` are multiples of 16.
ILLADA_DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(dst)),
               "l"(src), "r"(bytes), "r"(smem_address(bar))
               : "memory");
}
ILLADA_DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(smem_address(src)),
               "r"(bytes)
               : "memory");
}
ILLADA_DEVICE void bulk_reduce_add(float* dst, const float* src, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
               "r"(smem_address(src)), "r"(bytes)
               : "memory");
}
// bulk_commit makes a group of this thread's stores and reduce-adds since the last commit. The waits return once all
// but the N newest groups have read shared memory (which may then be rewritten), or are complete (visible to others).
ILLADA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> ILLADA_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N> ILLADA_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
ILLADA_DEVICE void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies 16 bytes from global to shared memory, by any thread. The wait is for this thread's copies; other threads see
// them after a barrier.
ILLADA_DEVICE void copy_async(void* dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(dst)), "l"(src) : "memory");
}
ILLADA_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Brings the box of a load to L2.
ILLADA_DEVICE void tma_prefetch_tile(const CUtensorMap* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}
// Orders ordinary stores to shared memory before TMA or wgmma. Every thread that stored calls it, before the barrier.
ILLADA_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- wgmma (the MMAs themselves: wgmma.cuh) --------------------------------------------------------------------
// Describes a tile in shared memory with the 128-byte swizzle, in pieces 64 elements (128 bytes) wide. stride: bytes to
// the next 8 rows (K-major) or 8 k (MN-major), 1024 when dense. lead: MN-major only, bytes to the next 64 rows. One
// wgmma of 16 k advances p by 32 bytes (K-major) or 2048 (MN-major, dense).
ILLADA_DEVICE uint64_t smem_desc(const void* p, uint32_t stride = 1024, uint32_t lead = 16) {
  return uint64_t((smem_address(p) & 0x3ffff) >> 4) | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}
// Orders earlier accesses to registers before the first wgmma of a group.
ILLADA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ILLADA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the N newest groups. Their accumulators may then be read and their operands overwritten.
template <int N> ILLADA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Emits nothing. Keeps the compiler from moving accesses to these registers across this point; use around every group.
template <int N> ILLADA_DEVICE void reg_fence(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> ILLADA_DEVICE void reg_fence(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// ---- 8x8 matrices of 16-bit elements between registers and shared memory ---------------------------------------
// Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned). It holds row l / 4, columns l % 4 * 2 and
// the next, of matrix i in r[i]; with TRANSPOSE, of the transposed matrix.
#define ILLADA_MATRIX(COUNT, LIST, ...)                                                                  \
  template <bool TRANSPOSE = false> ILLADA_DEVICE void ldmatrix(uint32_t (&r)[COUNT], const void* row) { \
    if constexpr (TRANSPOSE)                                                                             \
      asm volatile("ldmatrix.sync.aligned.m8n8.x" #COUNT ".trans.shared.b16 {" LIST "}, [%" #COUNT "];"  \
                   : __VA_ARGS__                                                                         \
                   : "r"(smem_address(row))                                                              \
                   : "memory");                                                                          \
    else                                                                                                 \
      asm volatile("ldmatrix.sync.aligned.m8n8.x" #COUNT ".shared.b16 {" LIST "}, [%" #COUNT "];"        \
                   : __VA_ARGS__                                                                         \
                   : "r"(smem_address(row))                                                              \
                   : "memory");                                                                          \
  }
ILLADA_MATRIX(1, "%0", "=r"(r[0]))
ILLADA_MATRIX(2, "%0, %1", "=r"(r[0]), "=r"(r[1]))
ILLADA_MATRIX(4, "%0, %1, %2, %3", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))
#undef ILLADA_MATRIX
#define ILLADA_MATRIX(COUNT, LIST, ...)                                                                            \
  template <bool TRANSPOSE = false> ILLADA_DEVICE void stmatrix(void* row, const uint32_t (&r)[COUNT]) {           \
    if constexpr (TRANSPOSE)                                                                                       \
      asm volatile("stmatrix.sync.aligned.m8n8.x" #COUNT ".trans.shared.b16 [%0], {" LIST                          \
                   "};" ::"r"(smem_address(row)),                                                                  \
                   __VA_ARGS__                                                                                     \
                   : "memory");                                                                                    \
    else                                                                                                           \
      asm volatile("stmatrix.sync.aligned.m8n8.x" #COUNT ".shared.b16 [%0], {" LIST "};" ::"r"(smem_address(row)), \
                   __VA_ARGS__                                                                                     \
                   : "memory");                                                                                    \
  }
ILLADA_MATRIX(1, "%1", "r"(r[0]))
ILLADA_MATRIX(2, "%1, %2", "r"(r[0]), "r"(r[1]))
ILLADA_MATRIX(4, "%1, %2, %3, %4", "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]))
#undef ILLADA_MATRIX

// ---- barriers, registers, election -----------------------------------------------------------------------------
// Named barriers 1..15 (0 is __syncthreads): all `threads`, whole warps, meet. bar_arrive does not wait.
ILLADA_DEVICE void bar_sync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ILLADA_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Sets the registers per thread from here on; the whole warpgroup calls it. N: a multiple of 8, 24..256.
template <int N> ILLADA_DEVICE void reg_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> ILLADA_DEVICE void reg_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
// Returns true in exactly one lane. All lanes of the warp call it.
ILLADA_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected;
}

// ---- clusters --------------------------------------------------------------------------------------------------
ILLADA_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster meet and see what was written before. Also needed before a block exits,
// while others may still write to it or arrive at its barriers.
ILLADA_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
ILLADA_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
ILLADA_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace illada
#endif
