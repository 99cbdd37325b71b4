// The first step of attention's backward: fills the workspace that the other kernels read, per row and per tile of 64
// rows.
//
//   row_stats    lse * log2(e) and delta = sum_d out * dout - dlse      one block owns 64 rows of one head
//   tile_hulls   key ranges in normal form, hulls and common ranges     one block owns 64 rows
//
// Reads out and dout once (4 * D bytes a row and head), writes 8 bytes a row and head; 2 * D flops. Accumulates in
// float32 in a fixed order. A row without keys gets lse = inf and delta = 0, even if out or dout holds NaN.
#include "attention_bwd_workspace.cuh"
#include "illada/api.h"

using namespace illada;

namespace {

// (batch, queries, heads, dim), rows aligned to 16 bytes.
struct Rows {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
  template <class T> ILLADA_DEVICE const T* at(int64_t batch, int64_t row, int64_t head) const {
    return static_cast<const T*>(data) + batch * batch_stride + row * row_stride + head * head_stride;
  }
};

constexpr int kStatsThreads = 256;

// LANES lanes share a row, 8 columns each.
template <class T, int LANES>
__global__ void __launch_bounds__(kStatsThreads)
    row_stats(Rows out, Rows dout, const float* lse, const float* dlse, KeyBounds bounds, RowStats* stats, Sizes size,
              int dim, int tiles) {
  const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % size.heads, batch = blockIdx.x / tiles / size.heads;
  const int lane = threadIdx.x % LANES;
  RowStats& to = stats[blockIdx.x];
  for (int i = threadIdx.x / LANES; i < kTileRows; i += kStatsThreads / LANES) {
    const int row = tile * kTileRows + i;
    const bool live = row < size.queries && !bounds.of_row(batch, row).empty();
    float sum = 0;
    if (live && lane * 8 < dim) {
      const Vec16<T> a = load16_streaming(out.at<T>(batch, row, head) + lane * 8);
      const Vec16<T> b = load16_streaming(dout.at<T>(batch, row, head) + lane * 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += to_float(a.at[j]) * to_float(b.at[j]);
    }
    sum = warp_sum<LANES>(sum);
    if (lane == 0) {
      const int64_t at = (int64_t(batch) * size.heads + head) * size.queries + row;
      const float value = live ? lse[at] : -infinity();
      to.lse[i] = value == -infinity() ? infinity() : value * kLog2e;
      to.delta[i] = live ? sum - (dlse ? dlse[at] : 0.0f) : 0.0f;
    }
  }
}

__global__ void __launch_bounds__(kTileRows)
    tile_hulls(KeyBounds bounds, RowSpans* spans, TileHulls* hulls, int32_t* drawn, int queries, int tiles) {
  const int tile = blockIdx.x % tiles, batch = blockIdx.x / tiles, row = tile * kTileRows + threadIdx.x;
  TileHulls t = {};
  Hulls& h = t.hulls;
  RowSpans span = {};
  if (row < queries) {
    const RowRanges r = bounds.of_row(batch, row);
    h.add(r);
    t.empty_rows = r.empty();
    for (int i = 0; i < 2; ++i) span.lo[i] = r.lo[i], span.length[i] = r.lo[i] < r.hi[i] ? r.hi[i] - r.lo[i] : 0;
  }
  spans[int64_t(blockIdx.x) * kTileRows + threadIdx.x] = span;
  int* scratch = reinterpret_cast<int*>(dynamic_smem());
  for (int i = 0; i < 2; ++i) {
    h.lo[i] = block_reduce<kTileRows>(h.lo[i], scratch, Min{});
    h.hi[i] = block_reduce<kTileRows>(h.hi[i], scratch, Max{});
    h.common_lo[i] = block_reduce<kTileRows>(h.common_lo[i], scratch, Max{});
    h.common_hi[i] = block_reduce<kTileRows>(h.common_hi[i], scratch, Min{});
  }
  t.empty_rows = block_reduce<kTileRows>(t.empty_rows, scratch, Max{});
  if (threadIdx.x == 0) hulls[blockIdx.x] = t;
  if (blockIdx.x == 0 && threadIdx.x < 2) drawn[threadIdx.x] = 0;
}

}  // namespace

extern "C" int illada_attention_bwd_preprocess_sm90a(int dtype, const void* out, const float* lse, const void* dout,
                                                     const float* dlse, const int32_t* bounds, void* stats, void* spans,
                                                     void* hulls, int32_t* drawn, int64_t batch, int64_t queries,
                                                     int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                                                     int64_t bounds_batches, const int64_t* strides, void* stream) {
  const int64_t tiles = (queries + kTileRows - 1) / kTileRows, limit = int64_t(1) << 31;
  if (tiles * heads * batch >= limit || queries >= limit - kTileRows || keys >= limit - 256 || dim % 8 || dim > 256)
    return int(cudaErrorInvalidValue);
  const KeyBounds key_bounds = {bounds, strides[9], strides[10], int(keys)};
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (int e = launch({dim3(tiles * bounds_batches), dim3(kTileRows), sizeof(int) * kTileRows / 32, s}, tile_hulls,
                     key_bounds, static_cast<RowSpans*>(spans), static_cast<TileHulls*>(hulls), drawn, int(queries),
                     int(tiles)))
    return e;
  const Rows of_out = {out, strides[11], strides[12], strides[13]};
  const Rows of_dout = {dout, strides[14], strides[15], strides[16]};
  const Sizes size = {int(batch), int(queries), int(keys), int(heads), int(kv_heads)};
  const auto run = [&](auto kernel) {
    return launch({dim3(tiles * heads * batch), dim3(kStatsThreads), 0, s}, kernel, of_out, of_dout, lse, dlse,
                  key_bounds, static_cast<RowStats*>(stats), size, int(dim), int(tiles));
  };
  const int lanes = dim <= 64 ? 8 : dim <= 128 ? 16 : 32;
  if (dtype == ILLADA_BF16)
    return run(lanes == 8 ? row_stats<bf16, 8> : lanes == 16 ? row_stats<bf16, 16> : row_stats<bf16, 32>);
  if (dtype == ILLADA_F16)
    return run(lanes == 8 ? row_stats<fp16, 8> : lanes == 16 ? row_stats<fp16, 16> : row_stats<fp16, 32>);
  return int(cudaErrorInvalidValue);
}
