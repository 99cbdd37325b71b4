// The workspace of attention's backward: written by attention_bwd_preprocess_sm90a.cu, read by the two kernels of products.
#pragma once
#include "key_ranges.cuh"

namespace illada {

constexpr int kTileRows = 64;  // query rows of a tile of the workspace
constexpr float kLog2e = 1.44269504f;

// Of one query tile and head. A row without keys, or beyond the last: lse = inf, so that exp2(s - lse) is 0; delta = 0.
struct RowStats {
  float lse[kTileRows], delta[kTileRows];  // times log2(e); sum of out * dout, minus dlse
};

// The key ranges of one row; a range without keys has length 0.
struct alignas(16) RowSpans {
  int lo[2], length[2];
  ILLADA_DEVICE bool holds(int key) const {
    return unsigned(key - lo[0]) < unsigned(length[0]) || unsigned(key - lo[1]) < unsigned(length[1]);
  }
  ILLADA_DEVICE bool empty() const { return !(length[0] | length[1]); }
};

// The key ranges of all rows of a tile.
struct TileBounds {
  int lo[2], hi[2];  // hulls: each row's range i lies within hull i; without keys lo > hi
  int common_lo[2], common_hi[2];  // within each row's range i
  int empty_rows;  // is there a row without keys?

  ILLADA_DEVICE bool touches(int start, int end) const {
    return (lo[0] < hi[0] && lo[0] < end && start < hi[0]) || (lo[1] < hi[1] && lo[1] < end && start < hi[1]);
  }
  // Every row attends to every key of start .. end: no mask needed.
  ILLADA_DEVICE bool all_attend(int start, int end) const {
    return (common_lo[0] <= start && end <= common_hi[0]) || (common_lo[1] <= start && end <= common_hi[1]);
  }
  // Of the key tiles of `size` keys the first from `start` on, itself one, that is touched; `none` if there is no such.
  ILLADA_DEVICE int first_touched(int start, int size, int none) const {
    int found = none;
    for (int i = 0; i < 2; ++i)
      if (lo[i] < hi[i] && start < hi[i]) found = Min{}(found, Max{}(start, lo[i] / size * size));
    return found;
  }
  ILLADA_DEVICE void merge(const TileBounds& other) {
    for (int i = 0; i < 2; ++i) {
      lo[i] = Min{}(lo[i], other.lo[i]), hi[i] = Max{}(hi[i], other.hi[i]);
      common_lo[i] = Max{}(common_lo[i], other.common_lo[i]), common_hi[i] = Min{}(common_hi[i], other.common_hi[i]);
    }
  }
};

struct Workspace {
  const RowStats* stats;  // (batch, heads, tiles)
  const RowSpans* spans;  // (batch or 1, tiles * kTileRows)
  const TileBounds* bounds;  // (batch or 1, tiles)
  int32_t* drawn;  // items that blocks drew: of keys, of queries
  int tiles, bounds_batches;  // query tiles; 1: the same bounds for all of the batch

  ILLADA_DEVICE int64_t bounds_at(int batch, int tile) const {
    return int64_t(bounds_batches == 1 ? 0 : batch) * tiles + tile;
  }
};

struct Sizes {
  int batch, rows, keys, heads, key_heads;
};

}  // namespace illada
