// C = A B^T: A (m, k) and B (n, k) bf16, C (m, n) float32, all contiguous; k a multiple of 8, n of 4 (bulk copies want
// rows of whole 16 bytes). The worked example of docs/concepts/cuda_on_cpu.md, not a fast product.
// A block owns CONSUMERS * 64 rows and 64 columns. One thread of the producer warpgroup copies tiles of 64 k into a
// ring of kStages stages; each consumer warpgroup multiplies its 64 rows; the result leaves through shared memory.
#include "hopper.cuh"

using namespace illada;

constexpr int kColumns = 64, kDepth = 64, kStages = 3;

template <int CONSUMERS> struct Shared {  // tiles are multiples of 1024 bytes, as the swizzle asks
  bf16 a[kStages][CONSUMERS * 64 * kDepth], b[kStages][kColumns * kDepth];
  float c[CONSUMERS][64 * kColumns];
  uint64_t full[kStages], empty[kStages];
};

template <int CONSUMERS>
ILLADA_DEVICE void produce(Shared<CONSUMERS>& s, const CUtensorMap* a, const CUtensorMap* b, int row, int column,
                           int k) {
  for (int step = 0; step * kDepth < k; ++step) {
    const int stage = step % kStages, phase = step / kStages % 2;
    mbar_wait(&s.empty[stage], phase ^ 1);
    mbar_arrive_expect_tx(&s.full[stage], sizeof s.a[0] + sizeof s.b[0]);
    tma_load(s.a[stage], a, &s.full[stage], step * kDepth, row);
    tma_load(s.b[stage], b, &s.full[stage], step * kDepth, column);
  }
}

template <int CONSUMERS>
ILLADA_DEVICE void consume(Shared<CONSUMERS>& s, const CUtensorMap* c, int row, int column, int k) {
  const int warpgroup = threadIdx.x / 128, t = threadIdx.x % 128;
  float sum[kColumns / 2];
  for (int step = 0; step * kDepth < k; ++step) {
    const int stage = step % kStages, phase = step / kStages % 2;
    mbar_wait(&s.full[stage], phase);
    reg_fence(sum);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kDepth; kk += 16)
      wgmma<bf16>(sum, smem_desc(s.a[stage] + warpgroup * 64 * kDepth + kk), smem_desc(s.b[stage] + kk), step + kk > 0);
    wgmma_commit();
    wgmma_wait<0>();
    reg_fence(sum);
    if (t == 0) mbar_arrive(&s.empty[stage]);
  }
  float* tile = s.c[warpgroup];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i += 2) {
    const int tile_row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, tile_column = i / 4 * 8 + t % 4 * 2;
    *reinterpret_cast<float2*>(&tile[tile_row * kColumns + tile_column]) = make_float2(sum[i], sum[i + 1]);
  }
  fence_proxy_async();
  bar_sync(1 + warpgroup, 128);
  if (t == 0) {
    tma_store(c, tile, column, row + warpgroup * 64);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

template <int CONSUMERS>
__global__ void __launch_bounds__(CONSUMERS * 128 + 128, 1)
    gemm(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
         const __grid_constant__ CUtensorMap c, int k) {
  Shared<CONSUMERS>& s = *reinterpret_cast<Shared<CONSUMERS>*>(dynamic_smem());
  const int row = blockIdx.y * CONSUMERS * 64, column = blockIdx.x * kColumns;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], CONSUMERS);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < CONSUMERS * 128) {
    reg_increase<240>();
    consume(s, &c, row, column, k);
  } else {
    reg_decrease<24>();
    if (threadIdx.x == CONSUMERS * 128) produce(s, &a, &b, row, column, k);
  }
}

template <int CONSUMERS>
static int run(const bf16* a, const bf16* b, float* c, uint64_t m, uint64_t n, uint64_t k, cudaStream_t stream) {
  constexpr uint32_t rows = CONSUMERS * 64, columns = kColumns, depth = kDepth;
  const uint64_t k_bytes = k * sizeof(bf16), n_bytes = n * sizeof(float);
  CUtensorMap map_a, map_b, map_c;
  int e = make_tensor_map<2>(&map_a, a, {k, m}, &k_bytes, {depth, rows}, Swizzle::bytes128);
  if (!e) e = make_tensor_map<2>(&map_b, b, {k, n}, &k_bytes, {depth, columns}, Swizzle::bytes128);
  if (!e) e = make_tensor_map<2>(&map_c, c, {n, m}, &n_bytes, {columns, 64}, Swizzle::none);
  if (e) return e;
  const dim3 grid((n + columns - 1) / columns, (m + rows - 1) / rows);
  return launch({grid, dim3(CONSUMERS * 128 + 128), sizeof(Shared<CONSUMERS>), stream}, gemm<CONSUMERS>, map_a, map_b,
                map_c, int(k));
}

extern "C" int gemm_bf16(const bf16* a, const bf16* b, float* c, int m, int n, int k, int consumers, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return consumers == 1 ? run<1>(a, b, c, m, n, k, s) : run<2>(a, b, c, m, n, k, s);
}
