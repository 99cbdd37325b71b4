// What attention's forward and backward share on the CPU: the problem, scratch memory, packed tiles, and which key and
// query tiles meet. Internal linkage: compiled once per instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "key_ranges.h"
#include "memory.h"
#include "tile_gemm.h"

namespace {

constexpr int kTileRows = 32;  // query rows of a tile: scores, queries and a panel of keys fit a 32 KB L1 cache
constexpr int kTileKeys = 128;
constexpr int kLdScores = kTileKeys + 16;  // an odd number of cache lines, so that rows use different sets of the cache

inline int leading_dim(int dim) { return round_up(dim, 32) + 16; }

// (batch, rows, heads, dim): strides in elements, the last dimension contiguous.
struct View {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
  template <class T> const T* at(int64_t b, int64_t row, int64_t head) const {
    return static_cast<const T*>(data) + b * batch_stride + row * row_stride + head * head_stride;
  }
};

struct Problem {
  int64_t batch, queries;
  int keys, heads, kv_heads, dim, dim_v;
  View q, k, v;
  KeyBounds bounds;
  float scale;
  int threads;

  int group() const { return heads / kv_heads; }
  int query_tiles() const { return int((queries + kTileRows - 1) / kTileRows); }
  int tile_rows(int tile) const {
    return int(queries - int64_t(tile) * kTileRows < kTileRows ? queries - int64_t(tile) * kTileRows : kTileRows);
  }
  // Scores are score_scale * (query_factor q) k^T. A negative scale turns the queries, so that maxima stay maxima; a
  // vanishing one multiplies them, so that -127 / score_scale stays finite; of a huge one they take a factor of 4, so
  // that score_scale * log2(e) stays finite.
  bool vanishing() const { return std::fabs(scale) < 1e-30f; }
  bool huge() const { return std::fabs(scale) > 1e38f; }
  float query_factor() const { return vanishing() ? scale : std::copysign(huge() ? 4.0f : 1.0f, scale); }
  float score_scale() const { return vanishing() ? 1.0f : std::fabs(scale) * (huge() ? 0.25f : 1.0f); }
};

// ---- packing --------------------------------------------------------------------------------------------------------
// Writes factor * from (rows x dim) to `to` (padded_rows x ld) in float32. Zeros rows whose keep[row] is 0, rows beyond
// `rows`, and columns dim .. ld - 16.
template <class T>
void pack_rows(const T* from, int64_t stride, int rows, int padded_rows, int dim, float factor, const uint8_t* keep,
               float* to, int ld) {
  for (int i = 0; i < padded_rows; ++i, from += stride, to += ld) {
    int d = 0;
    if (i < rows && (!keep || keep[i])) {
      for (; d + kWidth <= dim; d += kWidth) store(to + d, load(from + d) * factor);
      for (; d < dim; ++d) to[d] = to_float(from[d]) * factor;
    }
    for (; d < ld - 16; ++d) to[d] = 0.0f;
  }
}

// The hulls of every query tile, (batch or 1, tile).
class HullTable {
 public:
  explicit HullTable(const Problem& p)
      : tiles_(p.query_tiles()),
        batches_(p.bounds.data && p.bounds.batch_stride ? p.batch : 1),
        buffer_(sizeof(Hulls) * batches_ * tiles_) {
    if (!buffer_) return;
    for (int64_t b = 0; b < batches_; ++b)
      for (int t = 0; t < tiles_; ++t)
        buffer_.as<Hulls>()[b * tiles_ + t] = hulls_of(p.bounds, b, int64_t(t) * kTileRows, p.tile_rows(t));
  }
  explicit operator bool() const { return bool(buffer_); }
  const Hulls& at(int64_t b, int tile) const { return buffer_.as<Hulls>()[(batches_ == 1 ? 0 : b) * tiles_ + tile]; }

 private:
  int tiles_;
  int64_t batches_;
  Buffer buffer_;
};

// Returns the start of the first key tile at or after `start` that one of query tiles first .. last touches, else the
// number of keys.
inline int next_key_tile(const Problem& p, const HullTable& hulls, int64_t b, int first, int last, int start) {
  int next = p.keys;
  for (int t = first; t < last && next > start; ++t) next = hulls.at(b, t).first_touched(start, kTileKeys, next);
  return next;
}

// Sets live[j] to 1 if some row of query tiles first .. last may attend to key start + j. Returns whether some may.
inline bool live_keys(const Problem& p, const HullTable& hulls, int64_t b, int first, int last, int start,
                      uint8_t* live) {
  const int size = smaller(kTileKeys, p.keys - start);
  int edges[kTileKeys + 1] = {};
  for (int t = first; t < last; ++t) {
    if (hulls.at(b, t).all_attend(start, start + size)) return std::memset(live, 1, kTileKeys), true;
    if (hulls.at(b, t).touches(start, start + size))
      mark_edges(p.bounds, b, int64_t(t) * kTileRows, p.tile_rows(t), start, size, edges);
  }
  int open = 0, any = 0;
  for (int j = 0; j < kTileKeys; ++j) any |= live[j] = (open += edges[j]) > 0;
  return any;
}

// Returns which lanes' keys, key + lane, lie in the ranges.
inline vi allowed_lanes(const RowRanges& r, int key) {
  vi lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  const vi j = lane + key;
  return ((j >= r.lo[0]) & (j < r.hi[0])) | ((j >= r.lo[1]) & (j < r.hi[1]));
}

inline Problem make_problem(const void* q, const void* k, const void* v, const int32_t* bounds, int64_t batch,
                            int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim, int64_t dim_v,
                            const int64_t* strides, float scale, int threads) {
  return {batch,
          queries,
          int(keys),
          int(heads),
          int(kv_heads),
          int(dim),
          int(dim_v),
          {q, strides[0], strides[1], strides[2]},
          {k, strides[3], strides[4], strides[5]},
          {v, strides[6], strides[7], strides[8]},
          {bounds, strides[9], strides[10], int(keys)},
          scale,
          threads};
}

inline bool valid(int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                  int64_t dim_v, int threads) {
  const int64_t limit = int64_t(1) << 31;
  return batch >= 0 && queries >= 0 && keys >= 0 && keys < limit - 1024 && queries < limit - 1024 && kv_heads > 0 &&
         heads % kv_heads == 0 && heads > 0 && dim > 0 && dim_v > 0 && dim <= 4096 && dim_v <= 4096 && threads > 0;
}

}  // namespace
