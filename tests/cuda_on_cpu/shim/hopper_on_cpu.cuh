// The names of csrc/cuda/hopper.cuh and wgmma.cuh on a CPU. What each does is said there; how it is imitated, in the
// emulator.
#pragma once
#include <cmath>

#include <cuda_runtime.h>

#include "emulator_api.h"

namespace illada {

EMULATED uint32_t smem_address(const void* p) { return emulator::shared_address(p); }

// ---- mbarrier --------------------------------------------------------------------------------------------------
EMULATED void mbar_init(uint64_t* bar, uint32_t arrivals) { emulator::mbarrier_init(smem_address(bar), arrivals); }
EMULATED void mbar_init_fence() { emulator::mbarrier_init_fence(); }
EMULATED void mbar_arrive(uint64_t* bar) { emulator::mbarrier_arrive(smem_address(bar), emulator::cluster_rank()); }
EMULATED void mbar_arrive_cluster(uint64_t* bar, uint32_t rank) { emulator::mbarrier_arrive(smem_address(bar), rank); }
EMULATED void mbar_expect_tx(uint64_t* bar, uint32_t bytes) { emulator::mbarrier_expect(smem_address(bar), bytes); }
EMULATED void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  mbar_expect_tx(bar, bytes);
  mbar_arrive(bar);
}
EMULATED bool mbar_try_wait(uint64_t* bar, uint32_t parity) {
  return emulator::mbarrier_test(smem_address(bar), parity);
}
EMULATED void mbar_wait(uint64_t* bar, uint32_t parity) { emulator::mbarrier_wait(smem_address(bar), parity); }

// ---- bulk tensor copies: 2, 3 or 4 coordinates -----------------------------------------------------------------
template <class... C> EMULATED void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, C... at) {
  const int coordinates[] = {int(at)...};
  emulator::tensor_load(smem_address(dst), map, smem_address(bar), 0, sizeof...(at), coordinates);
}
template <class... C>
EMULATED void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, uint16_t blocks, C... at) {
  const int coordinates[] = {int(at)...};
  emulator::tensor_load(smem_address(dst), map, smem_address(bar), blocks, sizeof...(at), coordinates);
}
template <class... C> EMULATED void tma_store(const CUtensorMap* map, const void* src, C... at) {
  const int coordinates[] = {int(at)...};
  emulator::tensor_store(map, smem_address(src), sizeof...(at), coordinates, false);
}
template <class... C> EMULATED void tma_reduce_add(const CUtensorMap* map, const void* src, C... at) {
  const int coordinates[] = {int(at)...};
  emulator::tensor_store(map, smem_address(src), sizeof...(at), coordinates, true);
}
EMULATED void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  emulator::bulk_load(smem_address(dst), src, bytes, smem_address(bar));
}
EMULATED void bulk_store(void* dst, const void* src, uint32_t bytes) {
  emulator::bulk_store(dst, smem_address(src), bytes, false);
}
EMULATED void bulk_reduce_add(float* dst, const float* src, uint32_t bytes) {
  emulator::bulk_store(dst, smem_address(src), bytes, true);
}
EMULATED void bulk_commit() { emulator::bulk_commit(); }
template <int N> EMULATED void bulk_wait_read() { emulator::bulk_wait(N, true); }
template <int N> EMULATED void bulk_wait() { emulator::bulk_wait(N, false); }
EMULATED void tma_prefetch(const CUtensorMap*) {}
EMULATED void copy_async(void* dst, const void* src) { emulator::copy_async(dst, src); }
EMULATED void copy_async_wait() { emulator::copy_async_wait(); }
EMULATED void tma_prefetch_tile(const CUtensorMap*, int, int) {}
EMULATED void fence_proxy_async() { emulator::fence_proxy_async(); }

// ---- wgmma -----------------------------------------------------------------------------------------------------
enum class Major { K = 0, MN = 1 };
EMULATED uint64_t smem_desc(const void* p, uint32_t stride = 1024, uint32_t lead = 16) {
  return uint64_t((smem_address(p) & 0x3ffff) >> 4) | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}
EMULATED void wgmma_fence() { emulator::wgmma_fence(); }
EMULATED void wgmma_commit() { emulator::wgmma_commit(); }
template <int N> EMULATED void wgmma_wait() { emulator::wgmma_wait(N); }
template <int N> EMULATED void reg_fence(float (&)[N]) {}
template <int N> EMULATED void reg_fence(uint32_t (&)[N]) {}
template <class T> constexpr bool is_bf16 = std::is_same_v<T, bf16>;
template <class T, Major A = Major::K, Major B = Major::K, int R>
EMULATED void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(R % 4 == 0 && R <= 128 && (is_bf16<T> || std::is_same_v<T, fp16>), "N is 8, 16 .. 256");
  emulator::wgmma(d, nullptr, {2 * R, accumulate, is_bf16<T>, A == Major::MN, B == Major::MN, a, b});
}
template <class T, Major B = Major::K, int R>
EMULATED void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(R % 4 == 0 && R <= 128 && (is_bf16<T> || std::is_same_v<T, fp16>), "N is 8, 16 .. 256");
  emulator::wgmma(d, a, {2 * R, accumulate, is_bf16<T>, false, B == Major::MN, 0, b});
}
template <bool TRANSPOSE = false, int N> EMULATED void ldmatrix(uint32_t (&r)[N], const void* row) {
  emulator::ldmatrix(r, N, TRANSPOSE, row);
}
template <bool TRANSPOSE = false, int N> EMULATED void stmatrix(void* row, const uint32_t (&r)[N]) {
  emulator::stmatrix(r, N, TRANSPOSE, row);
}

// ---- barriers, registers, election, clusters -------------------------------------------------------------------
EMULATED void bar_sync(int id, int threads) { emulator::barrier_named(id, threads, true); }
EMULATED void bar_arrive(int id, int threads) { emulator::barrier_named(id, threads, false); }
template <int N> EMULATED void reg_increase() { emulator::set_registers(N, true); }
template <int N> EMULATED void reg_decrease() { emulator::set_registers(N, false); }
EMULATED bool elect_one() { return emulator::elect_one(); }
EMULATED uint32_t cluster_rank() { return emulator::cluster_rank(); }
EMULATED void cluster_arrive() { emulator::cluster_barrier_arrive(); }
EMULATED void cluster_wait() { emulator::cluster_barrier_wait(); }
EMULATED void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace illada
