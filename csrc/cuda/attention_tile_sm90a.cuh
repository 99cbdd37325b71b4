// What the two kernels of products in attention's backward share: items, tensor maps, and the steps of a tile.
// A tile of T lies as [columns / 64][rows][64] with the 128-byte swizzle; a warpgroup owns 64 rows of the results.
#pragma once
#include <type_traits>

#include "attention_bwd_workspace.cuh"
#include "hopper.cuh"

namespace illada {

constexpr int kWarpgroups = 2, kConsumers = kWarpgroups * 128, kThreads = kConsumers + 128;
enum Step { kEnd, kFull, kPartial, kEmptyRows };  // what a stage holds; kEmptyRows: partial, some row has no keys

// Items are of unlike cost: a block starts with that of its number, then draws. Who computes one changes no bit.
ILLADA_DEVICE int draw_item(int32_t* drawn) { return gridDim.x + atomicAdd(drawn, 1); }

// ---- host --------------------------------------------------------------------------------------------------------
// A map of x (batch, rows, heads, dim) whose boxes are 64 columns of `box_rows` rows of one head; strides: elements, of
// batch, row and head. A dimension of one element may have any stride.
template <class T>
int map_of_rows(CUtensorMap* map, const void* x, int64_t batch, int64_t rows, int64_t heads, int64_t dim,
                const int64_t* strides, int box_rows) {
  const uint64_t size[] = {uint64_t(dim), uint64_t(rows), uint64_t(heads), uint64_t(batch)};
  const int64_t elements[] = {strides[1], strides[2], strides[0]};
  uint64_t bytes[3];
  for (int i = 0; i < 3; ++i) bytes[i] = (size[i + 1] == 1 ? dim : elements[i]) * sizeof(T);
  return make_tensor_map<4>(map, static_cast<const T*>(x), size, bytes, {64, uint32_t(box_rows), 1, 1},
                            Swizzle::bytes128);
}
template <class T>
int map_of_contiguous_rows(CUtensorMap* map, const void* x, int64_t batch, int64_t rows, int64_t heads, int64_t dim,
                           int box_rows) {
  const int64_t strides[] = {rows * heads * dim, heads * dim, dim};
  return map_of_rows<T>(map, x, batch, rows, heads, dim, strides, box_rows);
}

// f(zero of T, integral_constant of D), for the dtypes and head dimensions there are.
template <class F> int for_type_and_dim(int bf16_code, int fp16_code, int dtype, int64_t dim, F f) {
  const auto with_type = [&](auto zero) -> int {
    switch (dim) {
      case 64: return f(zero, std::integral_constant<int, 64>{});
      case 96: return f(zero, std::integral_constant<int, 96>{});
      case 128: return f(zero, std::integral_constant<int, 128>{});
      case 256: return f(zero, std::integral_constant<int, 256>{});
    }
    return int(cudaErrorInvalidValue);
  };
  if (dtype == bf16_code) return with_type(bf16{});
  if (dtype == fp16_code) return with_type(fp16{});
  return int(cudaErrorInvalidValue);
}

// ---- device: the steps of a tile ---------------------------------------------------------------------------------
template <int D> constexpr int pieces = (D + 63) / 64;

// ROWS rows of one head, from `row` on; what lies outside of the tensor comes as zero.
template <int D, int ROWS, class T>
ILLADA_DEVICE void load_tile(T* tile, const CUtensorMap* map, uint64_t* full, int row, int head, int batch) {
#pragma unroll
  for (int piece = 0; piece < pieces<D>; ++piece)
    tma_load(tile + piece * ROWS * 64, map, full, piece * 64, row, head, batch);
}

// So many 16-bit elements further on: what to add to a descriptor, whose address counts 16 bytes and never overflows.
ILLADA_DEVICE uint64_t units(int elements) { return elements * 2 / 16; }

// From lane 0: the compiler then knows that the warp agrees, and keeps descriptors in uniform registers.
ILLADA_DEVICE int warpgroup_of_thread() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// s (64, N) = a (64, D) b^T: a lies in a tile of A_ROWS rows, b is a whole tile of N rows.
template <int D, int A_ROWS, class T, int R>
ILLADA_DEVICE void multiply_transposed(float (&s)[R], const T* a, const T* b) {
  constexpr int kN = 2 * R;
  const uint64_t from_a = smem_desc(a), from_b = smem_desc(b);
  reg_fence(s);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < D; d += 16)
    wgmma<T>(s, from_a + units(d / 64 * A_ROWS * 64 + d % 64), from_b + units(d / 64 * kN * 64 + d % 64), d > 0);
  wgmma_commit();
}

// sum (64, columns) += a (64, 16 * STEPS) b: b is the columns from where it points on, in a tile of 16 * STEPS rows.
template <class T, int R, int STEPS>
ILLADA_DEVICE void multiply_add(float (&sum)[R], uint32_t (&a)[STEPS][4], const T* b) {
  const uint64_t from = smem_desc(b, 1024, STEPS * 16 * 128);
  reg_fence(sum);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) reg_fence(a[i]);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < STEPS; ++i) wgmma<T, Major::MN>(sum, a[i], from + units(i * 16 * 64), true);
  wgmma_commit();
}

// Accumulators as the A operand of a product.
template <class T, int STEPS> ILLADA_DEVICE void pack_operand(uint32_t (&a)[STEPS][4], const float (&x)[STEPS * 8]) {
#pragma unroll
  for (int i = 0; i < STEPS * 8; i += 2) a[i / 8][i / 2 % 4] = pack<T>(x[i], x[i + 1]);
}

// factor * x (64, columns) to the tile of ROWS rows that `tile` points into.
template <int ROWS, class T, int R> ILLADA_DEVICE void store_rows(T* tile, const float (&x)[R], float factor) {
  const int t = threadIdx.x % 128, matrix = t % 32 / 8, row = t / 32 * 16 + matrix % 2 * 8 + t % 8;
#pragma unroll
  for (int i = 0; i < R; i += 8) {
    const int column = i * 2 + matrix / 2 * 8, byte = column % 64 * 2 ^ row % 8 * 16;
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = pack<T>(factor * x[i + 2 * j], factor * x[i + 2 * j + 1]);
    stmatrix(tile + column / 64 * ROWS * 64 + row * 64 + byte / 2, words);
  }
}

// Those keys of start .. start + 31 that lie in the ranges.
ILLADA_DEVICE uint32_t keys_of(const RowSpans& span, int start) {
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first = Max{}(span.lo[i] - start, 0), last = Min{}(span.lo[i] + span.length[i] - start, 32);
    if (first < last) set |= ~0u >> (32 - (last - first)) << first;
  }
  return set;
}

// Rows of the K tile that are in no consumer's set become zeros, whatever they hold. sets: of each warp.
template <int D, class T, int WORDS>
ILLADA_DEVICE void clear_other_keys(T* k, uint32_t (&sets)[kConsumers / 32][WORDS], const uint32_t (&mine)[WORDS]) {
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    const uint32_t all = __reduce_or_sync(~0u, mine[word]);
    if (threadIdx.x % 32 == 0) sets[threadIdx.x / 32][word] = all;
  }
  bar_sync(1, kConsumers);
  constexpr int kKeys = WORDS * 32, kSharers = kConsumers / kKeys, kPart = 64 / kSharers;  // threads, columns of a key
  const int key = threadIdx.x / kSharers, part = threadIdx.x % kSharers * kPart;
  uint32_t attended = 0;
#pragma unroll
  for (int warp = 0; warp < kConsumers / 32; ++warp) attended |= sets[warp][key / 32];
  if (!(attended >> key % 32 & 1))
    for (int piece = 0; piece < pieces<D>; ++piece)
      for (int i = 0; i < kPart; i += 8) store16(k + (piece * kKeys + key) * 64 + part + i, Vec16<T>{});
  fence_proxy_async();
  bar_sync(1, kConsumers);
}

// One arrival per warp, after all its lanes came here.
ILLADA_DEVICE void arrive_by_warp(uint64_t* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbar_arrive(bar);
}
constexpr int kConsumerWarps = kConsumers / 32;

}  // namespace illada
