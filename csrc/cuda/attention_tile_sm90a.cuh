// The steps of a tile that attention's forward and backward share: tensor maps, TMA loads, the two kinds of MMA. A tile
// of T lies as [columns / 64][rows][64] with the 128-byte swizzle; a warpgroup owns 64 rows of the results.
#pragma once
#include "hopper.cuh"

namespace illada {

// ---- host --------------------------------------------------------------------------------------------------------
// Maps x (batch, rows, heads, dim), its dimensions after dim in the order of `size`. A dimension of one element may
// have any stride, and gets one that the hardware accepts.
template <class T>
int map_of_tiles(CUtensorMap* map, const void* x, int64_t dim, const int64_t (&size)[3], const int64_t (&stride)[3],
                 const uint32_t (&box)[4]) {
  uint64_t sizes[4] = {uint64_t(dim)}, bytes[3];
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = uint64_t(size[i]);
    bytes[i] = size[i] > 1 ? uint64_t(stride[i]) * sizeof(T) : 512;
  }
  return make_tensor_map<4>(map, static_cast<const T*>(x), sizes, bytes, box, Swizzle::bytes128);
}

// ---- device: the steps of a tile ---------------------------------------------------------------------------------
template <int D> constexpr int pieces = (D + 63) / 64;

// Columns of an accumulator of D, which multiply_add gets from an operand whose rows run along k. Should MMAs of 96
// such columns in the 128-byte swizzle be wrong on hardware, ILLADA_WHOLE_PIECES lets head_dim 96 take 128: columns
// from 96 on are zeros in every tile, and no result is taken from them.
#ifdef ILLADA_WHOLE_PIECES
constexpr bool kWholePieces = true;
#else
constexpr bool kWholePieces = false;
#endif
template <int D> constexpr int columns_of = kWholePieces ? pieces<D> * 64 : D;

// Loads ROWS rows of one head, from `row` on; elements outside the tensor load as zero.
template <int D, int ROWS, class T>
ILLADA_DEVICE void load_tile(T* tile, const CUtensorMap* map, uint64_t* full, int row, int head, int batch) {
#pragma unroll
  for (int piece = 0; piece < pieces<D>; ++piece)
    tma_load(tile + piece * ROWS * 64, map, full, piece * 64, row, head, batch);
}

// Returns what to add to a descriptor to advance by so many 16-bit elements. Its address counts 16 bytes and never
// overflows.
ILLADA_DEVICE uint64_t units(int elements) { return elements * 2 / 16; }

// Thread t of a warpgroup holds rows t / 32 * 16 + t % 32 / 4 and that + 8, columns as in wgmma.cuh.
ILLADA_DEVICE int row_of_thread() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Shuffled from lane 0, so that the compiler knows that the warp agrees and keeps descriptors in uniform registers.
ILLADA_DEVICE int warpgroup_of_thread() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// Returns a word with ones at bits from .. to, clipped to the word.
ILLADA_DEVICE uint32_t bits_between(int from, int to) {
  const int a = Min{}(Max{}(from, 0), 32), b = Min{}(Max{}(to, 0), 32);
  return a < b ? ~0u >> (32 - (b - a)) << a : 0u;
}

// s (64, N) = a (64, D) b^T. a lies in a tile of A_ROWS rows; b is a whole tile of N rows.
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

// sum (64, columns) += a (64, 16 * STEPS) b. b points to the first of the columns, in a tile of 16 * STEPS rows.
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

}  // namespace illada
