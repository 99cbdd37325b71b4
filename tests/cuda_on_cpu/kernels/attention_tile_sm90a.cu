// out = softmax(q k^T * scale) v for blocks of 64 queries of one head: q (rows, 128), k and v (keys, 128), out (rows,
// 128), all bf16 and contiguous. It shows what the GEMM does not: P stays in registers as the A operand of the second
// product, V is an MN-major B, the result leaves through stmatrix. One consumer warpgroup; thread 128 copies k and v
// through two-stage rings. Sums and maxima in float32; keys beyond the last count as -inf.
#include "hopper.cuh"

using namespace illada;

constexpr int kDim = 128, kTile = 64, kStages = 2;
// Elements of 64 rows of 128 bytes; a (64, 128) tile is two such pieces, columns 0-63 and 64-127.
constexpr int kPiece = 64 * 64;

struct Shared {
  bf16 q[2 * kPiece], k[kStages][2 * kPiece], v[kStages][2 * kPiece];
  uint64_t q_full, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

ILLADA_DEVICE void load_tile(bf16* tile, const CUtensorMap* map, uint64_t* full, int row) {
  mbar_arrive_expect_tx(full, 2 * kPiece * sizeof(bf16));
  for (int piece = 0; piece < 2; ++piece) tma_load(tile + piece * kPiece, map, full, piece * 64, row);
}

ILLADA_DEVICE void produce(Shared& s, const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v, int keys) {
  load_tile(s.q, q, &s.q_full, blockIdx.x * kTile);
  for (int step = 0; step * kTile < keys; ++step) {
    const int stage = step % kStages, phase = step / kStages % 2;
    mbar_wait(&s.k_empty[stage], phase ^ 1);
    load_tile(s.k[stage], k, &s.k_full[stage], step * kTile);
    mbar_wait(&s.v_empty[stage], phase ^ 1);
    load_tile(s.v[stage], v, &s.v_full[stage], step * kTile);
  }
}

// s (64 queries, 64 keys) = q k^T
ILLADA_DEVICE void multiply_q_k(float (&s)[kTile / 2], const bf16* q, const bf16* k) {
  reg_fence(s);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    const int at = d / 64 * kPiece + d % 64;
    wgmma<bf16>(s, smem_desc(q + at), smem_desc(k + at), d > 0);
  }
  wgmma_commit();
}

// o (64 queries, 128) += p (64 queries, 64 keys) v: 16 keys are 16 rows of 128 bytes
ILLADA_DEVICE void multiply_p_v(float (&o)[kDim / 2], uint32_t (&p)[kTile / 16][4], const bf16* v) {
  reg_fence(o);
  for (int i = 0; i < kTile / 16; ++i) reg_fence(p[i]);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kTile / 16; ++i)
    wgmma<bf16, Major::MN>(o, p[i], smem_desc(v + i * 16 * 64, 1024, kPiece * sizeof(bf16)), true);
  wgmma_commit();
}

// The softmax of one tile: scores to p; running maxima and sums of rows t / 4 and t / 4 + 8; o is rescaled.
ILLADA_DEVICE void softmax(float (&s)[kTile / 2], uint32_t (&p)[kTile / 16][4], float (&o)[kDim / 2], float (&top)[2],
                           float (&sum)[2], float scale_log2, int keys_left) {
  float old[2] = {top[0], top[1]};
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    const int key = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    s[i] = key < keys_left ? s[i] * scale_log2 : -INFINITY;
    top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
  }
  for (int r = 0; r < 2; ++r) {
    top[r] = warp_max<4>(top[r]);
    sum[r] *= fast_exp2(old[r] - top[r]);
  }
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    s[i] = fast_exp2(s[i] - top[i / 2 % 2]);
    sum[i / 2 % 2] += s[i];
  }
#pragma unroll
  for (int i = 0; i < kTile / 2; i += 2) p[i / 8][i / 2 % 4] = pack<bf16>(s[i], s[i + 1]);
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] *= fast_exp2(old[i / 2 % 2] - top[i / 2 % 2]);
}

// o to the shared memory of q, swizzled as the map of out says, then to global memory.
ILLADA_DEVICE void store_result(bf16* tile, const float (&o)[kDim / 2], const CUtensorMap* out) {
  const int t = threadIdx.x, matrix = t % 32 / 8, row = t / 32 * 16 + matrix % 2 * 8 + t % 8;
#pragma unroll
  for (int i = 0; i < kDim / 2; i += 8) {
    const int column = i * 2 + matrix / 2 * 8, piece = column / 64, byte = column % 64 * 2 ^ row % 8 * 16;
    const uint32_t words[4] = {pack<bf16>(o[i], o[i + 1]), pack<bf16>(o[i + 2], o[i + 3]),
                               pack<bf16>(o[i + 4], o[i + 5]), pack<bf16>(o[i + 6], o[i + 7])};
    stmatrix(tile + piece * kPiece + row * 64 + byte / 2, words);
  }
  fence_proxy_async();
  bar_sync(1, 128);
  if (t == 0) {
    for (int piece = 0; piece < 2; ++piece) tma_store(out, tile + piece * kPiece, piece * 64, blockIdx.x * kTile);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

ILLADA_DEVICE void consume(Shared& shared, const CUtensorMap* out, int keys, float scale_log2) {
  float s[kTile / 2], o[kDim / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  uint32_t p[kTile / 16][4];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] = 0;
  mbar_wait(&shared.q_full, 0);
  for (int step = 0; step * kTile < keys; ++step) {
    const int stage = step % kStages, phase = step / kStages % 2;
    mbar_wait(&shared.k_full[stage], phase);
    multiply_q_k(s, shared.q, shared.k[stage]);
    wgmma_wait<0>();
    reg_fence(s);
    mbar_arrive(&shared.k_empty[stage]);
    softmax(s, p, o, top, sum, scale_log2, keys - step * kTile);
    mbar_wait(&shared.v_full[stage], phase);
    multiply_p_v(o, p, shared.v[stage]);
    wgmma_wait<0>();
    reg_fence(o);
    mbar_arrive(&shared.v_empty[stage]);
  }
  for (int r = 0; r < 2; ++r) sum[r] = 1 / warp_sum<4>(sum[r]);
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) o[i] *= sum[i / 2 % 2];
  store_result(shared.q, o, out);
}

__global__ void __launch_bounds__(256, 1)
    attention_tile(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                   const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap out, int keys,
                   float scale_log2) {
  Shared& s = *reinterpret_cast<Shared*>(dynamic_smem());
  if (threadIdx.x == 0) {
    mbar_init(&s.q_full, 1);
    for (int i = 0; i < kStages; ++i) {
      mbar_init(&s.k_full[i], 1);
      mbar_init(&s.v_full[i], 1);
      mbar_init(&s.k_empty[i], 128);
      mbar_init(&s.v_empty[i], 128);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) consume(s, &out, keys, scale_log2);
  else if (threadIdx.x == 128) produce(s, &q, &k, &v, keys);
}

extern "C" int attention_tile_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, int rows, int keys,
                                   float scale, void* stream) {
  const uint64_t row_bytes = kDim * sizeof(bf16);
  CUtensorMap maps[4];
  const bf16* tensors[4] = {q, k, v, out};
  for (int i = 0; i < 4; ++i) {
    const uint64_t size[] = {kDim, uint64_t(i == 0 || i == 3 ? rows : keys)};
    if (int e = make_tensor_map<2>(&maps[i], tensors[i], size, &row_bytes, {64, kTile}, Swizzle::bytes128)) return e;
  }
  const Launch l{dim3((rows + kTile - 1) / kTile), dim3(256), sizeof(Shared), static_cast<cudaStream_t>(stream)};
  return launch(l, attention_tile, maps[0], maps[1], maps[2], maps[3], keys, scale * 1.44269504f);
}
