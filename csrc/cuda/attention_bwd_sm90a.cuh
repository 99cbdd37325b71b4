// What the kernels of attention's backward after preprocess share: items, tensor maps, operands, stores, cleared K.
#pragma once
#include <type_traits>

#include "attention_bwd_workspace.cuh"
#include "attention_tile_sm90a.cuh"

namespace illada {

constexpr int kWarpgroups = 2, kConsumers = kWarpgroups * 128, kThreads = kConsumers + 128;
// What a stage holds. kEmptyRows: a partial tile in which some row has no keys.
enum Step { kEnd, kFull, kPartial, kEmptyRows };

// Draws a block's next item, because items differ in cost; the first has the block's number. Changes no bit of a
// result.
ILLADA_DEVICE int draw_item(int32_t* drawn) { return gridDim.x + atomicAdd(drawn, 1); }

// ---- host --------------------------------------------------------------------------------------------------------
// Maps x (batch, rows, heads, dim): boxes are 64 columns of `box_rows` rows of one head. strides: elements, of batch,
// row and head.
template <class T>
int map_of_rows(CUtensorMap* map, const void* x, int64_t batch, int64_t rows, int64_t heads, int64_t dim,
                const int64_t* strides, int box_rows) {
  return map_of_tiles<T>(map, x, dim, {rows, heads, batch}, {strides[1], strides[2], strides[0]},
                         {64, uint32_t(box_rows), 1, 1});
}
template <class T>
int map_of_contiguous_rows(CUtensorMap* map, const void* x, int64_t batch, int64_t rows, int64_t heads, int64_t dim,
                           int box_rows) {
  const int64_t strides[] = {rows * heads * dim, heads * dim, dim};
  return map_of_rows<T>(map, x, batch, rows, heads, dim, strides, box_rows);
}

// Returns f(zero of T, integral_constant of D) for the T and D that dtype and dim name.
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

// ---- device ------------------------------------------------------------------------------------------------------
// Packs accumulators as the A operand of an MMA.
template <class T, int STEPS> ILLADA_DEVICE void pack_operand(uint32_t (&a)[STEPS][4], const float (&x)[STEPS * 8]) {
#pragma unroll
  for (int i = 0; i < STEPS * 8; i += 2) a[i / 8][i / 2 % 4] = pack<T>(x[i], x[i + 1]);
}

// Stores factor * x (64, columns) to the tile of ROWS rows that `tile` points into.
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

// Returns the keys of start .. start + 31 that lie in the ranges, as bits.
ILLADA_DEVICE uint32_t keys_of(const RowSpans& span, int start) {
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first = Max{}(span.lo[i] - start, 0), last = Min{}(span.lo[i] + span.length[i] - start, 32);
    if (first < last) set |= ~0u >> (32 - (last - first)) << first;
  }
  return set;
}

// Zeros rows of the K tile that are in no consumer's set, even if NaN or inf. sets: one per warp.
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

// Arrives once per warp, after all its lanes have come here.
ILLADA_DEVICE void arrive_by_warp(uint64_t* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbar_arrive(bar);
}
constexpr int kConsumerWarps = kConsumers / 32;

}  // namespace illada
