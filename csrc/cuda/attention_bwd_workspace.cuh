// The workspace of attention's backward: attention_bwd_preprocess_sm90a.cu writes it, the other kernels read it.
#pragma once
#include "key_ranges.cuh"

namespace illada {

constexpr int kTileRows = 64;  // query rows of a tile of the workspace

// Of one query tile and head. A row without keys, or beyond the last, has lse = inf, so that exp2(s - lse) is 0, and
// delta = 0.
struct RowStats {
  float lse[kTileRows], delta[kTileRows];  // lse times log2(e); sum of out * dout, minus dlse
};

// The key ranges of one row. A range without keys has length 0.
struct alignas(16) RowSpans {
  int lo[2], length[2];
  ILLADA_DEVICE bool holds(int key) const {
    return unsigned(key - lo[0]) < unsigned(length[0]) || unsigned(key - lo[1]) < unsigned(length[1]);
  }
  ILLADA_DEVICE bool empty() const { return !(length[0] | length[1]); }
};

struct TileHulls {
  Hulls hulls;
  int empty_rows;  // 1: some row of the tile has no keys
};

struct Workspace {
  const RowStats* stats;  // (batch, heads, tiles)
  const RowSpans* spans;  // (batch or 1, tiles * kTileRows)
  const TileHulls* hulls;  // (batch or 1, tiles)
  int32_t* drawn;  // number of items that blocks drew, of keys and of queries
  int tiles, bounds_batches;  // tiles: of queries; bounds_batches 1: the batch shares its bounds

  ILLADA_DEVICE int64_t bounds_at(int batch, int tile) const {
    return int64_t(bounds_batches == 1 ? 0 : batch) * tiles + tile;
  }
};

struct Sizes {
  int batch, queries, keys, heads, kv_heads;
};

}  // namespace illada
