// Flash attention on the CPU under at most two key ranges per query row, backward.
//
//   p = exp(scale q k^T - lse);  delta = rowsum(dout * out) - dlse;  ds = p * (dout v^T - delta)
//   dv = p^T dout;  dk = scale ds^T q;  dq = scale ds k
//
// A unit of work owns 256 keys of one kv head. It walks all query tiles (five GEMMs each), accumulates dk and dv alone,
// and adds to dq in the order of the keys, waiting for its turn: results are bitwise the same for any number of
// threads. 10 * dim flops a pair; memory: delta, and about 1 MB a thread. Everything accumulates in float32. Rows
// without keys and keys without rows are packed as zeros, so that a NaN or inf in them stays out of the sums.
#include <omp.h>
#include <sched.h>

#include "illada/api.h"
#include "attention_tiles.h"
#include "float_mode.h"
#include "isa.h"

namespace {

constexpr int kUnitKeyTiles = 2;  // key tiles that share a packed query tile
constexpr int kUnitKeys = kUnitKeyTiles * kTileKeys;

struct Gradients {
  View dout, out;
  const float *dlse, *lse;  // (batch, heads, queries), contiguous; dlse may be null
  float* dq;  // (batch, queries, heads, dim), contiguous, zeros on entry
  void *dk, *dv;  // contiguous
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

// Computes delta (batch, heads, queries) = sum over dim of dout * out, minus dlse.
template <class T> void row_deltas(const Problem& p, const Gradients& grads, float* delta) {
  const int64_t tiles = p.query_tiles();
#pragma omp for schedule(static)
  for (int64_t u = 0; u < p.batch * tiles; ++u)
    for (int i = 0; i < p.tile_rows(int(u % tiles)); ++i)
      for (int h = 0; h < p.heads; ++h) {
        const int64_t b = u / tiles, row = u % tiles * kTileRows + i, at = (b * p.heads + h) * p.queries + row;
        const T *out = grads.out.at<T>(b, row, h), *dout = grads.dout.at<T>(b, row, h);
        vf sum = {};
        for (int d = 0; d < p.dim_v; d += kWidth) sum += load_n(out + d, p.dim_v - d) * load_n(dout + d, p.dim_v - d);
        delta[at] = reduce_add(sum) - (grads.dlse ? grads.dlse[at] : 0.0f);
      }
}

// Packs queries and dout, and per row the exponent's offset and delta. A row without keys gets zeros, and an offset
// that makes its p 0.
template <class T>
void load_query_tile(const Problem& p, const Gradients& grads, const float* delta, int64_t b, int head, int tile,
                     BackwardScratch& scratch) {
  const int rows = p.tile_rows(tile);
  const int64_t first = int64_t(tile) * kTileRows, at = (b * p.heads + head) * p.queries + first;
  uint8_t keep[kTileRows];
  for (int i = 0; i < kTileRows; ++i) {
    keep[i] = i < rows && !p.bounds.of_row(b, first + i).empty();
    const float lse = keep[i] ? grads.lse[at + i] : -kInf;
    scratch.offset[i] = lse == -kInf ? kInf : lse / p.score_scale();
    scratch.delta[i] = keep[i] ? delta[at + i] : 0.0f;
  }
  pack_rows(p.q.at<T>(b, first, head), p.q.row_stride, rows, kTileRows, p.dim, p.query_factor(), keep, scratch.q,
            leading_dim(p.dim));
  pack_rows(grads.dout.at<T>(b, first, head), grads.dout.row_stride, rows, kTileRows, p.dim_v, 1.0f, keep, scratch.dout,
            leading_dim(p.dim_v));
}

// Turns s and dp (in scratch.p and scratch.ds) into p and ds.
template <bool kMasked>
void softmax_gradient(const Problem& p, int64_t b, int tile, int key, int columns, BackwardScratch& scratch) {
  const float score_scale = p.score_scale(), c = score_scale * 1.44269504f, lowest = -127.0f / c;
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    float *s = scratch.p + i * kLdScores, *ds = scratch.ds + i * kLdScores;
    RowRanges ranges{};
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

// Adds one query tile's share to a key tile's dk and dv, and the key tile's share to scratch.dq.
void backward_tile(const Problem& p, int64_t b, int tile, int start, Window w, bool masked, BackwardScratch& scratch,
                   BackwardScratch::Keys& keys, Ahead& next_q, Ahead& next_dout, Ahead& dq) {
  const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v), cols = round_up(p.dim, kWidth),
            cols_v = round_up(p.dim_v, kWidth);
  const int rows = p.tile_rows(tile), padded = round_up(rows, kBlockRows), columns = w.last - w.first;
  multiply<Into::kStore, false>(padded, columns, p.dim, scratch.q, ld, keys.k_transposed + w.first, kLdScores,
                                scratch.p, kLdScores, next_q);
  multiply<Into::kStore, false>(padded, columns, p.dim_v, scratch.dout, ld_v, keys.v_transposed + w.first, kLdScores,
                                scratch.ds, kLdScores, next_dout);
  (masked ? softmax_gradient<true> : softmax_gradient<false>)(p, b, tile, start + w.first, columns, scratch);
  multiply<Into::kAdd, true>(columns, cols_v, rows, scratch.p, kLdScores, scratch.dout, ld_v, keys.dv + w.first * ld_v,
                             ld_v, dq);
  multiply<Into::kAdd, true>(columns, cols, rows, scratch.ds, kLdScores, scratch.q, ld, keys.dk + w.first * ld, ld, dq);
  multiply<Into::kAdd, false>(padded, cols, columns, scratch.ds, kLdScores, keys.k + w.first * ld, ld, scratch.dq, ld,
                              dq);
}

template <class T>
void load_keys(const Problem& p, const HullTable& hulls, int64_t b, int kv_head, int start, BackwardScratch& scratch,
               BackwardScratch::Keys& keys) {
  keys.any = start < p.keys && live_keys(p, hulls, b, 0, p.query_tiles(), start, keys.live);
  if (!keys.any) return;
  const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v), size = smaller(kTileKeys, p.keys - start);
  pack_rows(p.k.at<T>(b, start, kv_head), p.k.row_stride, size, kTileKeys, p.dim, 1.0f, keys.live, keys.k, ld);
  transpose_tile(keys.k, ld, kTileKeys, p.dim, keys.k_transposed, kLdScores);
  pack_rows(p.v.at<T>(b, start, kv_head), p.v.row_stride, size, kTileKeys, p.dim_v, 1.0f, keys.live, scratch.rows,
            ld_v);
  transpose_tile(scratch.rows, ld_v, kTileKeys, p.dim_v, keys.v_transposed, kLdScores);
  std::memset(keys.dk, 0, sizeof(float) * kTileKeys * ld);
  std::memset(keys.dv, 0, sizeof(float) * kTileKeys * ld_v);
}

// Stores a key tile's gradient (batch, keys, kv_heads, dim); zeros if no row attends to the tile.
template <class T>
void store_keys(const Problem& p, int64_t b, int kv_head, int start, bool any, const float* from, int dim,
                void* gradient) {
  for (int j = 0; j < smaller(kTileKeys, p.keys - start); ++j) {
    T* to = static_cast<T*>(gradient) + ((b * p.keys + start + j) * p.kv_heads + kv_head) * dim;
    for (int d = 0; d < dim; d += kWidth) store_n(to + d, any ? load(from + j * leading_dim(dim) + d) : vf{}, dim - d);
  }
}

// Adds scratch.dq to dq once every earlier chunk that touches this query tile has, then passes the turn on.
void add_dq(const Problem& p, int64_t b, int head, int tile, int turn, int chunk, const BackwardScratch& scratch,
            float* dq, int* done) {
  while (__atomic_load_n(done, __ATOMIC_ACQUIRE) != turn) sched_yield();
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    const int64_t row = int64_t(tile) * kTileRows + i;
    if (p.bounds.of_row(b, row).empty()) continue;
    float* to = dq + ((b * p.queries + row) * p.heads + head) * p.dim;
    const float* from = scratch.dq + i * leading_dim(p.dim);
    for (int d = 0; d < p.dim; d += kWidth)
      store_n(to + d, load_n(to + d, p.dim - d) + load(from + d) * p.query_factor(), p.dim - d);
  }
  __atomic_store_n(done, chunk, __ATOMIC_RELEASE);
}

// Runs the keys from chunk * kUnitKeys of one kv head against all query tiles of its heads, in order.
template <class T>
void backward_unit(const Problem& p, const HullTable& hulls, const Gradients& grads, const float* delta, int64_t b,
                   int kv_head, int chunk, BackwardScratch& scratch, int* done) {
  const int start = chunk * kUnitKeys;
  for (int i = 0; i < kUnitKeyTiles; ++i)
    load_keys<T>(p, hulls, b, kv_head, start + i * kTileKeys, scratch, scratch.keys[i]);
  for (int head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head)
    for (int t = 0; t < p.query_tiles(); ++t) {
      const Hulls& hull = hulls.at(b, t);
      if (!hull.touches(start, start + kUnitKeys)) continue;
      load_query_tile<T>(p, grads, delta, b, head, t, scratch);
      const int next = t + 1 < p.query_tiles() ? t + 1 : t;
      Ahead next_q(p.q.at<T>(b, int64_t(next) * kTileRows, head), p.q.row_stride, p.tile_rows(next), p.dim);
      Ahead next_dout(grads.dout.at<T>(b, int64_t(next) * kTileRows, head), grads.dout.row_stride, p.tile_rows(next),
                      p.dim_v);
      Ahead dq(grads.dq + ((b * p.queries + int64_t(t) * kTileRows) * p.heads + head) * p.dim, int64_t(p.heads) * p.dim,
               p.tile_rows(t), p.dim);
      std::memset(scratch.dq, 0, sizeof(float) * kTileRows * leading_dim(p.dim));
      for (int i = 0; i < kUnitKeyTiles; ++i) {
        const int first_key = start + i * kTileKeys;
        const Window w = hull.window(first_key, kTileKeys, kWidth);
        if (w.empty() || !scratch.keys[i].any) continue;  // within the hull, but no row attends: not even packed
        backward_tile(p, b, t, first_key, w, !hull.all_attend(first_key + w.first, first_key + w.last), scratch,
                      scratch.keys[i], next_q, next_dout, dq);
      }
      add_dq(p, b, head, t, hull.touched_before(chunk, kUnitKeys), chunk, scratch, grads.dq,
             done + (b * p.heads + head) * p.query_tiles() + t);
    }
  for (int i = 0; i < kUnitKeyTiles; ++i) {
    const int first_key = start + i * kTileKeys;
    store_keys<T>(p, b, kv_head, first_key, scratch.keys[i].any, scratch.keys[i].dk, p.dim, grads.dk);
    store_keys<T>(p, b, kv_head, first_key, scratch.keys[i].any, scratch.keys[i].dv, p.dim_v, grads.dv);
  }
}

template <class T> int backward(const Problem& p, const Gradients& grads) {
  const int64_t heads = p.batch * p.kv_heads, chunks = (p.keys + kUnitKeys - 1) / kUnitKeys,
                turns = p.batch * p.heads * p.query_tiles();
  HullTable hulls(p);
  Cutter count(nullptr);
  BackwardScratch(p, count);
  Buffer memory(sizeof(float) * count.used() * p.threads), deltas(sizeof(float) * p.batch * p.heads * p.queries),
      done(sizeof(int) * turns);
  if (!hulls || !memory || !deltas || !done) return ILLADA_NO_MEMORY;
  for (int64_t i = 0; i < turns; ++i) done.as<int>()[i] = -1;
  int64_t next = 0;
#pragma omp parallel num_threads(p.threads)
  {
    const FloatMode mode;
    row_deltas<T>(p, grads, deltas.as<float>());  // ends with a barrier
    Cutter cut(memory.as<float>() + count.used() * omp_get_thread_num());
    BackwardScratch scratch(p, cut);
    // Ascending, chunks outermost: a unit waits only for units that a thread has already taken.
    for (int64_t u; (u = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < chunks * heads;)
      backward_unit<T>(p, hulls, grads, deltas.as<float>(), u % heads / p.kv_heads, int(u % heads % p.kv_heads),
                       int(u / heads), scratch, done.as<int>());
  }
  return ILLADA_OK;
}

}  // namespace

int ILLADA_ISA_FN(illada_attention_bwd_cpu)(int dtype, const void* q, const void* k, const void* v,
                                            const int32_t* bounds, const void* out, const float* lse, const void* dout,
                                            const float* dlse, float* dq, void* dk, void* dv, int64_t batch,
                                            int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                                            int64_t dim_v, const int64_t* strides, float scale, int threads) {
  if (!valid(batch, queries, keys, heads, kv_heads, dim, dim_v, threads)) return ILLADA_BAD_ARGUMENT;
  const Problem p =
      make_problem(q, k, v, bounds, batch, queries, keys, heads, kv_heads, dim, dim_v, strides, scale, threads);
  const View out_view = {out, strides[11], strides[12], strides[13]},
             dout_view = {dout, strides[14], strides[15], strides[16]};
  const Gradients grads = {dout_view, out_view, dlse, lse, dq, dk, dv};
  switch (dtype) {
    case ILLADA_F32: return backward<float>(p, grads);
    case ILLADA_BF16: return backward<bf16>(p, grads);
    case ILLADA_F16: return backward<fp16>(p, grads);
  }
  return ILLADA_BAD_DTYPE;
}
