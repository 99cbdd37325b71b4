// What attention's forward and backward share on the CPU: the problem, scratch memory, packed tiles, and which key and
// query tiles meet. Internal linkage: compiled once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "illada/api.h"
#include "key_ranges.h"
#include "memory.h"
#include "tile_gemm.h"

namespace {

constexpr int kTileRows = 32;  // query rows of a tile: scores, queries and a panel of keys fit a 32 KB L1 cache
constexpr int kRowBlocks = kTileRows / kBlockRows;
constexpr int kTileKeys = 128;
constexpr int kLdScores = kTileKeys + 16;  // an odd number of cache lines, so that rows use different sets of the cache

inline int leading_dim(int dim) { return round_up(dim, 32) + 16; }
template <class Products> int units(int dim) { return (dim + Products::kStep - 1) / Products::kStep; }

// (batch, rows, heads, dim): strides in elements of so many bytes, the last dimension contiguous.
struct View {
  const void* data;
  int bytes;
  int64_t batch_stride, row_stride, head_stride;
  const void* at(int64_t b, int64_t row, int64_t head) const {
    return static_cast<const char*>(data) + (b * batch_stride + row * row_stride + head * head_stride) * bytes;
  }
  Ahead ahead(int64_t b, int64_t row, int64_t head, int rows, int dim) const {
    return Ahead(at(b, row, head), bytes, row_stride, rows, dim);
  }
};

struct Problem {
  int64_t batch, queries;
  int keys, heads, kv_heads, dim, dim_v;
  View q, k, v;
  KeyBounds bounds;
  float scale;
  int threads;

  int key_tiles() const { return (keys + kTileKeys - 1) / kTileKeys; }
  int group() const { return heads / kv_heads; }
  int query_tiles() const { return int((queries + kTileRows - 1) / kTileRows); }
  int tile_rows(int tile) const {
    return int(queries - int64_t(tile) * kTileRows < kTileRows ? queries - int64_t(tile) * kTileRows : kTileRows);
  }
  // AVX512-BF16 takes products below 2^-126 as 0: no scale may make much of them.
  bool ordinary() const { return magnitude() > 1e-30f && magnitude() < 1e30f; }
  // Scores are score_scale * (query_factor q) k^T. A negative scale turns the queries, so that maxima stay maxima; a
  // vanishing one multiplies them, so that -127 / score_scale stays finite; of a huge one they take a factor of 4, so
  // that score_scale * log2(e) stays finite.
  float magnitude() const { return scale < 0 ? -scale : scale; }
  bool vanishing() const { return magnitude() < 1e-30f; }
  bool huge() const { return magnitude() > 1e38f; }
  float query_factor() const { return vanishing() ? scale : (scale < 0 ? -1.0f : 1.0f) * (huge() ? 4.0f : 1.0f); }
  float score_scale() const { return vanishing() ? 1.0f : magnitude() * (huge() ? 0.25f : 1.0f); }
};

// ---- packing --------------------------------------------------------------------------------------------------------
// Each reads or writes rows of T from end to end, and is called through a pointer: what depends on T is compiled for
// each, all else once.

// Writes factor * from (rows x dim) to `to` (padded_rows x ld) as units along each row. Zeros rows whose keep[row] is
// 0, rows beyond `rows`, and units beyond dim up to ld - 16.
template <class Products, class T>
void pack_rows(const void* memory, int64_t stride, int rows, int padded_rows, int dim, float factor,
               const uint8_t* keep, float* to, int ld) {
  const T* from = static_cast<const T*>(memory);
  for (int i = 0; i < padded_rows; ++i, from += stride, to += ld) {
    int d = i < rows && (!keep || keep[i]) ? Products::pack(from, dim, factor, to) : 0;
    for (; d < ld - 16; ++d) to[d] = 0.0f;
  }
}

// Writes kTileKeys rows of `from`, of which there are `rows`, as units along the rows (kTileKeys / kStep x ld).
template <class Products, class T>
void pack_turned(const void* memory, int64_t stride, int rows, int dim, const uint8_t* keep, float* to, int ld) {
  const T* from = static_cast<const T*>(memory);
  if constexpr (Products::kStep == 1) pack_rows<Products, T>(from, stride, rows, kTileKeys, dim, 1.0f, keep, to, ld);
  else
    for (int i = 0; i < kTileKeys; i += 2, to += ld) {
      auto row = [&](int k) { return k < rows && keep[k] ? from + k * stride : nullptr; };
      Products::turn_two(row(i), row(i + 1), dim, to);
    }
}

// The same as pack_rows, transposed: units x kTileKeys.
template <class Products, class T>
void pack_transposed(const void* memory, int64_t stride, int rows, int dim, const uint8_t* keep, float* to) {
  const T* from = static_cast<const T*>(memory);
  constexpr int kStep = Products::kStep;
  transpose_tile(kTileKeys, units<Products>(dim), to, kLdScores, [&](int i, int d) {
    return i < rows && keep[i] ? Products::load_units(from + i * stride + d * kStep, dim - d * kStep) : vf{};
  });
}

// Returns rows of memory as rows of units, with the distance between them, if they are that already, or null.
template <class Products, class T> const float* in_place(const void* memory, int64_t stride, int dim, int64_t& ld) {
  return Products::in_place(static_cast<const T*>(memory), stride, dim, ld);
}

// Stores factor * from (dim entries), rounded; zeros if `from` is null.
template <class Products, class T> void store_row(const float* from, float factor, int dim, void* memory) {
  T* to = static_cast<T*>(memory);
  for (int d = 0; d < dim; d += kWidth) Products::round(to + d, from ? load(from + d) * factor : vf{}, dim - d);
}

// ---- which key and query tiles meet ---------------------------------------------------------------------------------
// The hulls of every query tile, (batch or 1, tile), and which keys some row of the batch entry may attend to.
class Tiles {
 public:
  explicit Tiles(const Problem& p)
      : p_(p),
        query_tiles_(p.query_tiles()),
        key_tiles_(p.key_tiles()),
        batches_(p.bounds.data && p.bounds.batch_stride ? p.batch : 1),
        hulls_(sizeof(Hulls) * batches_ * query_tiles_),
        live_(sizeof(LiveKeys) * batches_ * key_tiles_) {}
  explicit operator bool() const { return hulls_ && live_; }

  void fill() {  // by all threads of a parallel region
#pragma omp for
    for (int64_t i = 0; i < batches_ * query_tiles_; ++i) {
      const int tile = int(i % query_tiles_);
      hulls_.as<Hulls>()[i] = hulls_of(p_.bounds, i / query_tiles_, int64_t(tile) * kTileRows, p_.tile_rows(tile));
    }
#pragma omp for
    for (int64_t i = 0; i < batches_ * key_tiles_; ++i)
      find_live(i / key_tiles_, int(i % key_tiles_) * kTileKeys, live_.as<LiveKeys>()[i]);
  }
  const Hulls& hulls(int64_t b, int tile) const {
    return hulls_.as<Hulls>()[(batches_ == 1 ? 0 : b) * query_tiles_ + tile];
  }
  // Returns 1 for each key of the key tile that some row may attend to, or null if there is none.
  const uint8_t* live(int64_t b, int start) const {
    const LiveKeys& keys = live_.as<LiveKeys>()[(batches_ == 1 ? 0 : b) * key_tiles_ + start / kTileKeys];
    return keys.any ? keys.live : nullptr;
  }
  // Returns the start of the first key tile at or after `start` that one of query tiles first .. last touches, else the
  // number of keys.
  int next_key_tile(int64_t b, int first, int last, int start) const {
    int next = p_.keys;
    for (int t = first; t < last && next > start; ++t) next = hulls(b, t).first_touched(start, kTileKeys, next);
    return next;
  }

 private:
  struct LiveKeys {
    uint8_t live[kTileKeys];
    bool any;
  };
  void find_live(int64_t b, int start, LiveKeys& keys) const {
    const int size = smaller(kTileKeys, p_.keys - start);
    int edges[kTileKeys + 1] = {};
    for (int t = 0; t < query_tiles_; ++t) {
      if (hulls(b, t).all_attend(start, start + size)) {
        std::memset(keys.live, 1, kTileKeys), keys.any = true;
        return;
      }
      if (hulls(b, t).touches(start, start + size))
        mark_edges(p_.bounds, b, int64_t(t) * kTileRows, p_.tile_rows(t), start, size, edges);
    }
    int open = 0;
    keys.any = false;
    for (int j = 0; j < kTileKeys; ++j) keys.any |= keys.live[j] = (open += edges[j]) > 0;
  }

  const Problem& p_;
  int query_tiles_, key_tiles_;
  int64_t batches_;
  Buffer hulls_, live_;
};

// Which columns of a key tile the rows of a query tile need: all rows, and each kBlockRows of them.
struct Meeting {
  Window all;
  struct Rows {
    Window columns;
    bool masked;  // else every row attends to every column
  } block[kRowBlocks] = {};
  RowRanges ranges[kTileRows] = {};  // of masked blocks; rows that are not there attend to nothing
  int blocks;

  Meeting(const Problem& p, const Tiles& tiles, int64_t b, int tile, int start) {
    const Hulls& hulls = tiles.hulls(b, tile);
    const int rows = p.tile_rows(tile);
    blocks = (rows + kBlockRows - 1) / kBlockRows;
    all = hulls.window(start, kTileKeys, kWidth);
    if (all.empty()) return;
    const bool whole = hulls.all_attend(start + all.first, start + all.last);
    for (int i = 0; i < blocks; ++i) {
      block[i] = {all, false};
      if (whole) continue;
      Hulls few;
      for (int row = i * kBlockRows; row < smaller(rows, (i + 1) * kBlockRows); ++row)
        few.add(ranges[row] = p.bounds.of_row(b, int64_t(tile) * kTileRows + row));
      const Window w = few.window(start, kTileKeys, kWidth);
      if (w.empty()) block[i] = {{0, 0}, false};
      else block[i] = {w, !few.all_attend(start + w.first, start + w.last)};
    }
  }
  // Returns the blocks' rows, of `rows`, that some column of key .. key + kWidth needs, as one window.
  Window rows_of(int key, int rows) const {
    Window w = {0, 0};
    for (int i = 0; i < blocks; ++i)
      if (block[i].columns.first <= key && key < block[i].columns.last) {
        if (w.empty()) w.first = i * kBlockRows;
        w.last = smaller(rows, (i + 1) * kBlockRows);
      }
    return w;
  }
};

// Returns which lanes' keys, key + lane, lie in the ranges.
inline vi allowed_lanes(const RowRanges& r, int key) {
  vi lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  const vi j = lane + key;
  return ((j >= r.lo[0]) & (j < r.hi[0])) | ((j >= r.lo[1]) & (j < r.hi[1]));
}

inline int bytes_of(int dtype) { return dtype == ILLADA_F32 ? 4 : 2; }

inline Problem make_problem(int dtype, const void* q, const void* k, const void* v, const int32_t* bounds,
                            int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                            int64_t dim_v, const int64_t* strides, float scale, int threads) {
  const int bytes = bytes_of(dtype);
  return {batch,
          queries,
          int(keys),
          int(heads),
          int(kv_heads),
          int(dim),
          int(dim_v),
          {q, bytes, strides[0], strides[1], strides[2]},
          {k, bytes, strides[3], strides[4], strides[5]},
          {v, bytes, strides[6], strides[7], strides[8]},
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
