// Flash attention on the CPU, forward and backward, under at most two key ranges per query row.
//
//   s = scale q k^T;  lse = log sum exp s;  p = exp(s - lse);  out = p v
//   delta = rowsum(dout * out) - dlse;  ds = p * (dout v^T - delta);  dv = p^T dout;  dk = scale ds^T q;  dq = scale ds k
//
// Inputs are converted to float32 as tiles are packed; everything accumulates in float32. A unit of the forward is up to 256 rows of one
// key head, which share each packed tile of 128 keys; a tile of 32 rows walks the key tiles of its hulls with a running maximum. A unit of
// the backward is 256 keys of one key head: it walks all query tiles (5 products a tile), keeps dk and dv to itself and adds to dq in the
// order of the keys, waiting for its turn, so that results are the same for any number of threads. Rows without keys: out 0, lse -inf.
// Keys that none of the rows at hand may attend to, and rows without keys, are packed as zeros whatever they hold.
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <omp.h>
#include <sched.h>

#include "illada/api.h"
#include "illada/isa.h"
#include "illada/query_tiles.h"
#include "illada/tile_gemm.h"

namespace {

constexpr int kTileRows = 32;    // query rows of a tile: scores, queries and a panel of keys fit a 32 KB L1 cache
constexpr int kTileKeys = 128;
constexpr int kUnitTiles = 8;    // forward: query tiles that share a packed key tile
constexpr int kUnitKeyTiles = 2; // backward: key tiles that share a packed query tile
constexpr int kUnitKeys = kUnitKeyTiles * kTileKeys;
constexpr int kLdScores = kTileKeys + 16;  // an odd number of cache lines, so that rows spread over the cache's sets

inline int leading_dim(int dim) { return round_up(dim, 32) + 16; }

struct View {  // (batch, rows, heads, dim), strides in elements, last dimension contiguous
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
  template <class T> const T* at(int64_t b, int64_t row, int64_t head) const {
    return static_cast<const T*>(data) + b * batch_stride + row * row_stride + head * head_stride;
  }
};

struct Problem {
  int64_t batch, rows;
  int keys, heads, key_heads, dim, dim_v;
  View q, k, v;
  Bounds bounds;
  float scale;
  int threads;

  int group() const { return heads / key_heads; }
  int query_tiles() const { return int((rows + kTileRows - 1) / kTileRows); }
  int tile_rows(int tile) const { return int(rows - int64_t(tile) * kTileRows < kTileRows ? rows - int64_t(tile) * kTileRows : kTileRows); }
  // Scores are score_scale * (query_factor q) k^T: a negative scale turns the queries, so that maxima stay maxima, and a vanishing one
  // multiplies them, so that -127 / score_scale stays finite.
  bool vanishing() const { return std::fabs(scale) < 1e-30f; }
  float query_factor() const { return vanishing() ? scale : scale < 0 ? -1.0f : 1.0f; }
  float score_scale() const { return vanishing() ? 1.0f : std::fabs(scale); }
};

class Buffer {  // aligned, uninitialised memory; false if there was none
 public:
  explicit Buffer(std::size_t bytes) : data_(::operator new(bytes + 64, std::align_val_t(64), std::nothrow)) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return data_; }
  template <class T> T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

class Cutter {  // cuts one block of floats into cache-line aligned arrays; counts only, if the block is null
 public:
  explicit Cutter(float* data) : data_(data) {}
  float* take(int64_t n) {
    float* taken = data_ ? data_ + used_ : nullptr;
    used_ += (n + 15) / 16 * 16;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  float* data_;
  int64_t used_ = 0;
};

// ---- packing -----------------------------------------------------------------------------------------------------------------------
// to (padded_rows x ld) = factor * from (rows x dim) in float32; zero where keep[row] is 0, in rows beyond `rows`, and in columns beyond dim
// up to ld - 16.
template <class T>
void pack_rows(const T* from, int64_t stride, int rows, int padded_rows, int dim, float factor, const uint8_t* keep, float* to, int ld) {
  for (int i = 0; i < padded_rows; ++i, from += stride, to += ld) {
    int d = 0;
    if (i < rows && (!keep || keep[i])) {
      for (; d + kWidth <= dim; d += kWidth) store(to + d, load(from + d) * factor);
      for (; d < dim; ++d) to[d] = to_float(from[d]) * factor;
    }
    for (; d < ld - 16; ++d) to[d] = 0.0f;
  }
}

// The hulls of every query tile: (bounds batch, tile).
class HullTable {
 public:
  explicit HullTable(const Problem& p)
      : tiles_(p.query_tiles()), batches_(p.bounds.data && p.bounds.batch_stride ? p.batch : 1), buffer_(sizeof(Hulls) * batches_ * tiles_) {
    if (!buffer_) return;
    for (int64_t b = 0; b < batches_; ++b)
      for (int t = 0; t < tiles_; ++t) buffer_.as<Hulls>()[b * tiles_ + t] = hulls_of(p.bounds, b, int64_t(t) * kTileRows, p.tile_rows(t));
  }
  explicit operator bool() const { return bool(buffer_); }
  const Hulls& at(int64_t b, int tile) const { return buffer_.as<Hulls>()[(batches_ == 1 ? 0 : b) * tiles_ + tile]; }

 private:
  int tiles_;
  int64_t batches_;
  Buffer buffer_;
};

// live[j] = 1 if some row of the query tiles first .. last may attend to key start + j. Returns false if none is.
bool live_keys(const Problem& p, const HullTable& hulls, int64_t b, int first, int last, int start, uint8_t* live) {
  const int size = smaller(kTileKeys, p.keys - start);
  int edges[kTileKeys + 1] = {};
  for (int t = first; t < last; ++t) {
    if (hulls.at(b, t).all_attend(start, start + size)) return std::memset(live, 1, kTileKeys), true;
    if (hulls.at(b, t).touches(start, size)) mark_edges(p.bounds, b, int64_t(t) * kTileRows, p.tile_rows(t), start, size, edges);
  }
  int open = 0, any = 0;
  for (int j = 0; j < kTileKeys; ++j) any |= live[j] = (open += edges[j]) > 0;
  return any;
}

// Lanes whose key (first of them: `key`) lies in the ranges.
inline vi allowed_lanes(const Ranges& r, int key) {
  vi lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  const vi j = lane + key;
  return ((j >= r.lo[0]) & (j < r.hi[0])) | ((j >= r.lo[1]) & (j < r.hi[1]));
}

// ---- forward -----------------------------------------------------------------------------------------------------------------------
struct ForwardTile {  // the running state of one query tile of one head
  float *q, *out, *maximum, *sum;  // (rows x ld), (rows x ld_v), (rows), (rows x kWidth): sums are reduced over lanes at the end
};

struct ForwardScratch {
  ForwardTile tile[kUnitTiles];
  float *k, *k_transposed, *v, *scores, *rescale;
  ForwardScratch(const Problem& p, int tiles, Cutter& cut) {
    const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v);
    for (int i = 0; i < tiles; ++i)
      tile[i] = {cut.take(kTileRows * ld), cut.take(kTileRows * ld_v), cut.take(kTileRows), cut.take(kTileRows * kWidth)};
    k = cut.take(kTileKeys * ld);
    k_transposed = cut.take(round_up(p.dim, kWidth) * kLdScores);
    v = cut.take(kTileKeys * ld_v);
    scores = cut.take(kTileRows * kLdScores);
    rescale = cut.take(kTileRows);
  }
};

void mask_scores(const Problem& p, int64_t b, int tile, int key, int columns, float* scores) {
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    const Ranges ranges = p.bounds.of_row(b, int64_t(tile) * kTileRows + i);
    for (int j = 0; j < columns; j += kWidth) {
      float* s = scores + i * kLdScores + j;
      store(s, allowed_lanes(ranges, key + j) ? load(s) : splat(-kInf));
    }
  }
}

// scores become p = exp(score - maximum); the maximum, the sum and the factor by which earlier results shrink are updated.
void online_softmax(int rows, int columns, float c, float lowest, float* scores, float* rescale, const ForwardTile& tile) {
  float centre[kTileRows];
  for (int i = 0; i < rows; i += kWidth) {
    vf row_max[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      const float* s = scores + (i + r) * kLdScores;
      vf m = load(s);
      for (int j = kWidth; j < columns; j += kWidth) m = max(load(s + j), m);
      row_max[r] = m;
    }
    const vf before = load(tile.maximum + i), after = max(reduce_max_rows(row_max), before);
    const vf finite = after == -kInf ? vf{} : after;  // no key so far
    store(tile.maximum + i, after);
    store(centre + i, finite);
    store(rescale + i, exp2_scaled(before - finite, c, lowest));
  }
  for (int i = 0; i < rows; ++i) {
    float* s = scores + i * kLdScores;
    vf sum = load(tile.sum + i * kWidth) * rescale[i];
    for (int j = 0; j < columns; j += kWidth) {
      const vf e = exp2_scaled(load(s + j) - centre[i], c, lowest);
      store(s + j, e);
      sum += e;
    }
    store(tile.sum + i * kWidth, sum);
  }
}

template <class T> void finish_tile(const Problem& p, int64_t b, int head, int tile, const ForwardTile& state, T* out, float* lse) {
  const int ld_v = leading_dim(p.dim_v);
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    const int64_t row = int64_t(tile) * kTileRows + i;
    const float sum = reduce_add(load(state.sum + i * kWidth));
    const bool none = p.bounds.of_row(b, row).empty();
    T* to = out + ((b * p.rows + row) * p.heads + head) * p.dim_v;
    for (int d = 0; d < p.dim_v; d += kWidth) store_n(to + d, none ? vf{} : load(state.out + i * ld_v + d) / sum, p.dim_v - d);
    lse[(b * p.heads + head) * p.rows + row] = none ? -kInf : state.maximum[i] * p.score_scale() + std::log(sum);
  }
}

// Query tiles first .. last of heads first_head .. last_head, which share a key head.
struct ForwardUnit {
  int64_t b;
  int first_head, last_head, first, last;
};

template <class T>
void forward_unit(const Problem& p, const HullTable& hulls, const ForwardUnit& u, ForwardScratch& scratch, T* out, float* lse) {
  const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v), cols_v = round_up(p.dim_v, kWidth);
  const int heads = u.last_head - u.first_head, key_head = u.first_head / p.group();
  const float c = p.score_scale() * 1.44269504f, lowest = -127.0f / c;
  for (int t = u.first; t < u.last; ++t)
    for (int h = 0; h < heads; ++h) {
      const ForwardTile& state = scratch.tile[(t - u.first) * heads + h];
      pack_rows(p.q.at<T>(u.b, int64_t(t) * kTileRows, u.first_head + h), p.q.row_stride, p.tile_rows(t), kTileRows, p.dim, p.query_factor(), nullptr,
                state.q, ld);
      std::memset(state.out, 0, sizeof(float) * kTileRows * ld_v);
      std::memset(state.sum, 0, sizeof(float) * kTileRows * kWidth);
      for (int i = 0; i < kTileRows; ++i) state.maximum[i] = -kInf;
    }
  for (int start = 0; start < p.keys; start += kTileKeys) {
    uint8_t live[kTileKeys];
    if (!live_keys(p, hulls, u.b, u.first, u.last, start, live)) continue;
    const int size = smaller(kTileKeys, p.keys - start);
    pack_rows(p.k.at<T>(u.b, start, key_head), p.k.row_stride, size, kTileKeys, p.dim, 1.0f, live, scratch.k, ld);
    transpose_tile(scratch.k, ld, kTileKeys, p.dim, scratch.k_transposed, kLdScores);
    pack_rows(p.v.at<T>(u.b, start, key_head), p.v.row_stride, size, kTileKeys, p.dim_v, 1.0f, live, scratch.v, ld_v);
    for (int t = u.first; t < u.last; ++t) {
      const Window w = hulls.at(u.b, t).window(start, kTileKeys, kWidth);
      if (w.empty()) continue;
      const int rows = round_up(p.tile_rows(t), kBlockRows), columns = w.last - w.first;
      const bool masked = !hulls.at(u.b, t).all_attend(start + w.first, start + w.last);
      for (int h = 0; h < heads; ++h) {
        const ForwardTile& state = scratch.tile[(t - u.first) * heads + h];
        multiply<Into::kStore, false>(rows, columns, p.dim, state.q, ld, scratch.k_transposed + w.first, kLdScores, scratch.scores, kLdScores);
        if (masked) mask_scores(p, u.b, t, start + w.first, columns, scratch.scores);
        online_softmax(rows, columns, c, lowest, scratch.scores, scratch.rescale, state);
        multiply<Into::kScaleAdd, false>(rows, cols_v, columns, scratch.scores, kLdScores, scratch.v + w.first * ld_v, ld_v, state.out, ld_v,
                                         scratch.rescale);
      }
    }
  }
  for (int t = u.first; t < u.last; ++t)
    for (int h = 0; h < heads; ++h) finish_tile(p, u.b, u.first_head + h, t, scratch.tile[(t - u.first) * heads + h], out, lse);
}

template <class T> int forward(const Problem& p, T* out, float* lse) {
  const int group = p.group(), tiles = p.query_tiles(), unit_heads = smaller(group, kUnitTiles), slices = (group + unit_heads - 1) / unit_heads;
  const int64_t head_slices = p.batch * p.key_heads * slices;
  // a row's result does not depend on how many tiles share a unit, so this may depend on the number of threads
  int unit_tiles = kUnitTiles / unit_heads;
  while (unit_tiles > 1 && head_slices * ((tiles + unit_tiles - 1) / unit_tiles) < 4 * p.threads) unit_tiles /= 2;
  const int64_t per_slice = (tiles + unit_tiles - 1) / unit_tiles;
  HullTable hulls(p);
  Cutter count(nullptr);
  ForwardScratch(p, unit_tiles * unit_heads, count);
  Buffer memory(sizeof(float) * count.used() * p.threads);
  if (!hulls || !memory) return ILLADA_NO_MEMORY;
  int64_t next = 0;
#pragma omp parallel num_threads(p.threads)
  {
    Cutter cut(memory.as<float>() + count.used() * omp_get_thread_num());
    ForwardScratch scratch(p, unit_tiles * unit_heads, cut);
    std::memset(scratch.scores, 0, sizeof(float) * kTileRows * kLdScores);  // rows beyond the last block are read, and never used
    for (int64_t u; (u = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < head_slices * per_slice;) {
      const int first = int(u % per_slice) * unit_tiles, slice = int(u / per_slice % (p.key_heads * slices));
      const int first_head = slice / slices * group + slice % slices * unit_heads, end = (slice / slices + 1) * group;
      forward_unit<T>(p, hulls, {u / per_slice / (p.key_heads * slices), first_head, smaller(first_head + unit_heads, end), first,
                                 smaller(first + unit_tiles, tiles)}, scratch, out, lse);
    }
  }
  return ILLADA_OK;
}

// ---- backward ----------------------------------------------------------------------------------------------------------------------
struct Gradients {
  View dout, out;
  const float *dlse, *lse;  // (batch, heads, rows), contiguous; dlse may be null
  float* dq;                // (batch, rows, heads, dim), contiguous, zeros
  void *dk, *dv;            // contiguous
};

struct BackwardScratch {
  struct Keys {
    float *k, *k_transposed, *v_transposed, *dk, *dv;
    uint8_t live[kTileKeys];
    bool any;
  } keys[kUnitKeyTiles];
  float *rows, *q, *dout, *dq, *p, *ds, *offset, *delta;
  BackwardScratch(const Problem& problem, Cutter& cut) {
    const int ld = leading_dim(problem.dim), ld_v = leading_dim(problem.dim_v);
    for (Keys& tile : keys) {
      tile.k = cut.take(kTileKeys * ld);
      tile.k_transposed = cut.take(round_up(problem.dim, kWidth) * kLdScores);
      tile.v_transposed = cut.take(round_up(problem.dim_v, kWidth) * kLdScores);
      tile.dk = cut.take(kTileKeys * ld);
      tile.dv = cut.take(kTileKeys * ld_v);
    }
    rows = cut.take(kTileKeys * ld_v);
    q = cut.take(kTileRows * ld);
    dout = cut.take(kTileRows * ld_v);
    dq = cut.take(kTileRows * ld);
    p = cut.take(kTileRows * kLdScores);
    ds = cut.take(kTileRows * kLdScores);
    offset = cut.take(kTileRows);
    delta = cut.take(kTileRows);
  }
};

// delta (batch, heads, rows) = sum over dim of dout * out, minus dlse
template <class T> void row_deltas(const Problem& p, const Gradients& grads, float* delta) {
  const int64_t tiles = p.query_tiles();
#pragma omp for schedule(static)
  for (int64_t u = 0; u < p.batch * tiles; ++u)
    for (int i = 0; i < p.tile_rows(int(u % tiles)); ++i)
      for (int h = 0; h < p.heads; ++h) {
        const int64_t b = u / tiles, row = u % tiles * kTileRows + i, at = (b * p.heads + h) * p.rows + row;
        const T *out = grads.out.at<T>(b, row, h), *dout = grads.dout.at<T>(b, row, h);
        vf sum = {};
        for (int d = 0; d < p.dim_v; d += kWidth) sum += load_n(out + d, p.dim_v - d) * load_n(dout + d, p.dim_v - d);
        delta[at] = reduce_add(sum) - (grads.dlse ? grads.dlse[at] : 0.0f);
      }
}

// Queries, dout, and per row the offset of the exponent and delta; a row without keys holds zeros, and an offset that makes its p 0.
template <class T>
void load_query_tile(const Problem& p, const Gradients& grads, const float* delta, int64_t b, int head, int tile, BackwardScratch& scratch) {
  const int rows = p.tile_rows(tile);
  const int64_t first = int64_t(tile) * kTileRows, at = (b * p.heads + head) * p.rows + first;
  uint8_t keep[kTileRows];
  for (int i = 0; i < kTileRows; ++i) {
    keep[i] = i < rows && !p.bounds.of_row(b, first + i).empty();
    const float lse = keep[i] ? grads.lse[at + i] : -kInf;
    scratch.offset[i] = lse == -kInf ? kInf : lse / p.score_scale();
    scratch.delta[i] = keep[i] ? delta[at + i] : 0.0f;
  }
  pack_rows(p.q.at<T>(b, first, head), p.q.row_stride, rows, kTileRows, p.dim, p.query_factor(), keep, scratch.q, leading_dim(p.dim));
  pack_rows(grads.dout.at<T>(b, first, head), grads.dout.row_stride, rows, kTileRows, p.dim_v, 1.0f, keep, scratch.dout, leading_dim(p.dim_v));
}

// s and dp (in scratch.p and scratch.ds) become p and ds.
template <bool kMasked>
void softmax_gradient(const Problem& p, int64_t b, int tile, int key, int columns, BackwardScratch& scratch) {
  const float score_scale = p.score_scale(), c = score_scale * 1.44269504f, lowest = -127.0f / c;
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    float *s = scratch.p + i * kLdScores, *ds = scratch.ds + i * kLdScores;
    Ranges ranges{};
    if (kMasked) ranges = p.bounds.of_row(b, int64_t(tile) * kTileRows + i);
    for (int j = 0; j < columns; j += kWidth) {
      vf probability = exp2_scaled(load(s + j) - scratch.offset[i], c, lowest);
      vf gradient = probability * (load(ds + j) - scratch.delta[i]) * score_scale;
      if (kMasked) {
        const vi allowed = allowed_lanes(ranges, key + j);
        probability = allowed ? probability : vf{};
        gradient = allowed ? gradient : vf{};
      }
      store(s + j, probability);
      store(ds + j, gradient);
    }
  }
}

// One query tile against one key tile: adds to the key tile's dk and dv, and to scratch.dq.
void backward_tile(const Problem& p, int64_t b, int tile, int start, Window w, bool masked, BackwardScratch& scratch, BackwardScratch::Keys& keys) {
  const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v), cols = round_up(p.dim, kWidth), cols_v = round_up(p.dim_v, kWidth);
  const int rows = p.tile_rows(tile), padded = round_up(rows, kBlockRows), columns = w.last - w.first;
  multiply<Into::kStore, false>(padded, columns, p.dim, scratch.q, ld, keys.k_transposed + w.first, kLdScores, scratch.p, kLdScores);
  multiply<Into::kStore, false>(padded, columns, p.dim_v, scratch.dout, ld_v, keys.v_transposed + w.first, kLdScores, scratch.ds, kLdScores);
  (masked ? softmax_gradient<true> : softmax_gradient<false>)(p, b, tile, start + w.first, columns, scratch);
  multiply<Into::kAdd, true>(columns, cols_v, rows, scratch.p, kLdScores, scratch.dout, ld_v, keys.dv + w.first * ld_v, ld_v);
  multiply<Into::kAdd, true>(columns, cols, rows, scratch.ds, kLdScores, scratch.q, ld, keys.dk + w.first * ld, ld);
  multiply<Into::kAdd, false>(padded, cols, columns, scratch.ds, kLdScores, keys.k + w.first * ld, ld, scratch.dq, ld);
}

template <class T> void load_keys(const Problem& p, const HullTable& hulls, int64_t b, int key_head, int start, BackwardScratch& scratch,
                                  BackwardScratch::Keys& keys) {
  keys.any = start < p.keys && live_keys(p, hulls, b, 0, p.query_tiles(), start, keys.live);
  if (!keys.any) return;
  const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v), size = smaller(kTileKeys, p.keys - start);
  pack_rows(p.k.at<T>(b, start, key_head), p.k.row_stride, size, kTileKeys, p.dim, 1.0f, keys.live, keys.k, ld);
  transpose_tile(keys.k, ld, kTileKeys, p.dim, keys.k_transposed, kLdScores);
  pack_rows(p.v.at<T>(b, start, key_head), p.v.row_stride, size, kTileKeys, p.dim_v, 1.0f, keys.live, scratch.rows, ld_v);
  transpose_tile(scratch.rows, ld_v, kTileKeys, p.dim_v, keys.v_transposed, kLdScores);
  std::memset(keys.dk, 0, sizeof(float) * kTileKeys * ld);
  std::memset(keys.dv, 0, sizeof(float) * kTileKeys * ld_v);
}

// gradient (batch, keys, key_heads, dim) of one key tile; zeros if no row attended to it
template <class T> void store_keys(const Problem& p, int64_t b, int key_head, int start, bool any, const float* from, int dim, void* gradient) {
  for (int j = 0; j < smaller(kTileKeys, p.keys - start); ++j) {
    T* to = static_cast<T*>(gradient) + ((b * p.keys + start + j) * p.key_heads + key_head) * dim;
    for (int d = 0; d < dim; d += kWidth) store_n(to + d, any ? load(from + j * leading_dim(dim) + d) : vf{}, dim - d);
  }
}

// Adds scratch.dq to dq once all earlier chunks that touch this tile have, and passes the turn on.
void add_dq(const Problem& p, int64_t b, int head, int tile, int turn, int chunk, const BackwardScratch& scratch, float* dq, int* done) {
  while (__atomic_load_n(done, __ATOMIC_ACQUIRE) != turn) sched_yield();
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    const int64_t row = int64_t(tile) * kTileRows + i;
    if (p.bounds.of_row(b, row).empty()) continue;
    float* to = dq + ((b * p.rows + row) * p.heads + head) * p.dim;
    const float* from = scratch.dq + i * leading_dim(p.dim);
    for (int d = 0; d < p.dim; d += kWidth) store_n(to + d, load_n(to + d, p.dim - d) + load(from + d) * p.query_factor(), p.dim - d);
  }
  __atomic_store_n(done, chunk, __ATOMIC_RELEASE);
}

// Keys chunk * kUnitKeys and on, of one key head, against all query tiles of its group in order.
template <class T>
void backward_unit(const Problem& p, const HullTable& hulls, const Gradients& grads, const float* delta, int64_t b, int key_head, int chunk,
                   BackwardScratch& scratch, int* done) {
  const int start = chunk * kUnitKeys;
  for (int i = 0; i < kUnitKeyTiles; ++i) load_keys<T>(p, hulls, b, key_head, start + i * kTileKeys, scratch, scratch.keys[i]);
  for (int head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head)
    for (int t = 0; t < p.query_tiles(); ++t) {
      const Hulls& hull = hulls.at(b, t);
      if (!hull.touches(start, kUnitKeys)) continue;
      load_query_tile<T>(p, grads, delta, b, head, t, scratch);
      std::memset(scratch.dq, 0, sizeof(float) * kTileRows * leading_dim(p.dim));
      for (int i = 0; i < kUnitKeyTiles; ++i) {
        const int first_key = start + i * kTileKeys;
        const Window w = hull.window(first_key, kTileKeys, kWidth);
        if (w.empty()) continue;
        backward_tile(p, b, t, first_key, w, !hull.all_attend(first_key + w.first, first_key + w.last), scratch, scratch.keys[i]);
      }
      add_dq(p, b, head, t, hull.touched_before(chunk, kUnitKeys), chunk, scratch, grads.dq, done + (b * p.heads + head) * p.query_tiles() + t);
    }
  for (int i = 0; i < kUnitKeyTiles; ++i) {
    const int first_key = start + i * kTileKeys;
    store_keys<T>(p, b, key_head, first_key, scratch.keys[i].any, scratch.keys[i].dk, p.dim, grads.dk);
    store_keys<T>(p, b, key_head, first_key, scratch.keys[i].any, scratch.keys[i].dv, p.dim_v, grads.dv);
  }
}

template <class T> int backward(const Problem& p, const Gradients& grads) {
  const int64_t heads = p.batch * p.key_heads, chunks = (p.keys + kUnitKeys - 1) / kUnitKeys, turns = p.batch * p.heads * p.query_tiles();
  HullTable hulls(p);
  Cutter count(nullptr);
  BackwardScratch(p, count);
  Buffer memory(sizeof(float) * count.used() * p.threads), deltas(sizeof(float) * p.batch * p.heads * p.rows), done(sizeof(int) * turns);
  if (!hulls || !memory || !deltas || !done) return ILLADA_NO_MEMORY;
  for (int64_t i = 0; i < turns; ++i) done.as<int>()[i] = -1;
  int64_t next = 0;
#pragma omp parallel num_threads(p.threads)
  {
    row_deltas<T>(p, grads, deltas.as<float>());  // ends with a barrier
    Cutter cut(memory.as<float>() + count.used() * omp_get_thread_num());
    BackwardScratch scratch(p, cut);
    // ascending, chunks outermost: whoever waits for a turn waits for a unit that a thread already has
    for (int64_t u; (u = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < chunks * heads;)
      backward_unit<T>(p, hulls, grads, deltas.as<float>(), u % heads / p.key_heads, int(u % heads % p.key_heads), int(u / heads), scratch,
                       done.as<int>());
  }
  return ILLADA_OK;
}

Problem make_problem(const void* q, const void* k, const void* v, const int32_t* bounds, int64_t batch, int64_t rows, int64_t keys, int64_t heads,
                     int64_t key_heads, int64_t dim, int64_t dim_v, const int64_t* strides, float scale, int threads) {
  return {batch, rows, int(keys), int(heads), int(key_heads), int(dim), int(dim_v), {q, strides[0], strides[1], strides[2]},
          {k, strides[3], strides[4], strides[5]}, {v, strides[6], strides[7], strides[8]}, {bounds, strides[9], strides[10], int(keys)}, scale,
          threads};
}

bool valid(int64_t batch, int64_t rows, int64_t keys, int64_t heads, int64_t key_heads, int64_t dim, int64_t dim_v, int threads) {
  const int64_t limit = int64_t(1) << 31;
  return batch >= 0 && rows >= 0 && keys >= 0 && keys < limit - kUnitKeys && rows < limit - kTileRows && key_heads > 0 && heads % key_heads == 0 &&
         heads > 0 && dim > 0 && dim_v > 0 && dim <= 4096 && dim_v <= 4096 && threads > 0;
}

}  // namespace

int ILLADA_ISA_FN(illada_attention_fwd)(int dtype, const void* q, const void* k, const void* v, const int32_t* bounds, void* out, float* lse,
                                        int64_t batch, int64_t rows, int64_t keys, int64_t heads, int64_t key_heads, int64_t dim, int64_t dim_v,
                                        const int64_t* strides, float scale, int threads) {
  if (!valid(batch, rows, keys, heads, key_heads, dim, dim_v, threads)) return ILLADA_BAD_ARGUMENT;
  const Problem p = make_problem(q, k, v, bounds, batch, rows, keys, heads, key_heads, dim, dim_v, strides, scale, threads);
  switch (dtype) {
    case ILLADA_F32: return forward(p, static_cast<float*>(out), lse);
    case ILLADA_BF16: return forward(p, static_cast<bf16*>(out), lse);
    case ILLADA_F16: return forward(p, static_cast<fp16*>(out), lse);
  }
  return ILLADA_BAD_DTYPE;
}

int ILLADA_ISA_FN(illada_attention_bwd)(int dtype, const void* q, const void* k, const void* v, const int32_t* bounds, const void* out,
                                        const float* lse, const void* dout, const float* dlse, float* dq, void* dk, void* dv, int64_t batch,
                                        int64_t rows, int64_t keys, int64_t heads, int64_t key_heads, int64_t dim, int64_t dim_v,
                                        const int64_t* strides, float scale, int threads) {
  if (!valid(batch, rows, keys, heads, key_heads, dim, dim_v, threads)) return ILLADA_BAD_ARGUMENT;
  const Problem p = make_problem(q, k, v, bounds, batch, rows, keys, heads, key_heads, dim, dim_v, strides, scale, threads);
  const View out_view = {out, strides[11], strides[12], strides[13]}, dout_view = {dout, strides[14], strides[15], strides[16]};
  const Gradients grads = {dout_view, out_view, dlse, lse, dq, dk, dv};
  switch (dtype) {
    case ILLADA_F32: return backward<float>(p, grads);
    case ILLADA_BF16: return backward<bf16>(p, grads);
    case ILLADA_F16: return backward<fp16>(p, grads);
  }
  return ILLADA_BAD_DTYPE;
}
