// Flash attention on the CPU under at most two key ranges per query row, forward.
//
//   s = scale q k^T;  lse = log sum exp s;  out = exp(s - lse) v
//
// A unit of work owns up to 512 rows of heads that share a kv head; they share each packed tile of 128 keys. A query
// tile of 32 rows walks the key tiles that its hulls touch with a running maximum, and computes only columns within the
// hulls. A tile is masked only where its rows differ. 4 * dim flops a pair; memory: a few hundred KB a thread. Inputs
// are converted to float32 as tiles are packed; everything accumulates in float32, in an order that does not depend on
// the threads. A row without keys gives out 0 and lse -inf. Keys to which no row of the batch entry may attend are
// packed as zeros, so that a NaN or inf in them stays out of the sums.
#include <omp.h>

#include "illada/api.h"
#include "attention_tiles.h"
#include "float_mode.h"
#include "isa.h"

namespace {

constexpr int kUnitTiles = 16;  // query tiles that share a packed key tile

struct ForwardTile {  // the running state of one query tile of one head
  float *q, *out;  // (rows x ld), (rows x ld_v)
  float *maximum, *sum;  // (rows), (rows x kWidth): summed over lanes at the end
};

struct ForwardScratch {
  ForwardTile tile[kUnitTiles];
  float *k, *k_transposed, *v, *scores, *rescale;
  ForwardScratch(const Problem& p, int tiles, Cutter& cut) {
    const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v);
    for (int i = 0; i < tiles; ++i)
      tile[i] = {cut.take(kTileRows * ld), cut.take(kTileRows * ld_v), cut.take(kTileRows),
                 cut.take(kTileRows * kWidth)};
    k = cut.take(kTileKeys * ld);
    k_transposed = cut.take(round_up(p.dim, kWidth) * kLdScores);
    v = cut.take(kTileKeys * ld_v);
    scores = cut.take(kTileRows * kLdScores);
    rescale = cut.take(kTileRows);
  }
};

void mask_scores(const Problem& p, int64_t b, int tile, int key, int columns, float* scores) {
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    const RowRanges ranges = p.bounds.of_row(b, int64_t(tile) * kTileRows + i);
    for (int j = 0; j < columns; j += kWidth) {
      float* s = scores + i * kLdScores + j;
      store(s, allowed_lanes(ranges, key + j) ? load(s) : splat(-kInf));
    }
  }
}

// Turns scores into p = exp(score - maximum). Updates the maximum, the sum, and the factor that rescales earlier
// results.
void online_softmax(int rows, int columns, float c, float lowest, float* scores, float* rescale,
                    const ForwardTile& tile) {
  float centre[kTileRows];
  for (int i = 0; i < rows; i += kWidth) {
    vf row_max[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      const float* s = scores + (i + r) * kLdScores;
      vf m = load(s);
      for (int j = kWidth; j < columns; j += kWidth) m = max(load(s + j), m);
      row_max[r] = m;
    }
    const vf before = load(tile.maximum + i),
             after = max(reduce_rows(row_max, [](vf a, vf b) { return max(a, b); }), before);
    const vf finite = after == -kInf ? vf{} : after;  // 0 where no key was seen so far
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

template <class T>
void finish_tile(const Problem& p, int64_t b, int head, int tile, const ForwardTile& state, T* out, float* lse) {
  const int ld_v = leading_dim(p.dim_v);
  float sums[kTileRows];
  for (int i = 0; i < kTileRows; i += kWidth) {
    vf rows[kWidth];
    for (int r = 0; r < kWidth; ++r) rows[r] = load(state.sum + (i + r) * kWidth);
    store(sums + i, reduce_rows(rows, [](vf a, vf b) { return a + b; }));
  }
  for (int i = 0; i < p.tile_rows(tile); ++i) {
    const int64_t row = int64_t(tile) * kTileRows + i;
    const bool none = p.bounds.of_row(b, row).empty() || sums[i] == 0.0f;  // the sum is 0 if every score is -inf
    T* to = out + ((b * p.queries + row) * p.heads + head) * p.dim_v;
    const float* from = state.out + i * ld_v;
    int d = 0;
    for (; d + kWidth <= p.dim_v; d += kWidth) store(to + d, none ? vf{} : load(from + d) / sums[i]);
    for (; d < p.dim_v; ++d) to[d] = from_float<T>(none ? 0.0f : from[d] / sums[i]);
    lse[(b * p.heads + head) * p.queries + row] = none ? -kInf : state.maximum[i] * p.score_scale() + std::log(sums[i]);
  }
}

// Query tiles first .. last of heads first_head .. last_head, which share a kv head.
struct ForwardUnit {
  int64_t b;
  int first_head, last_head, first, last;
};

template <class T>
void forward_unit(const Problem& p, const HullTable& hulls, const ForwardUnit& u, ForwardScratch& scratch, T* out,
                  float* lse) {
  const int ld = leading_dim(p.dim), ld_v = leading_dim(p.dim_v), cols_v = round_up(p.dim_v, kWidth);
  const int heads = u.last_head - u.first_head, kv_head = u.first_head / p.group();
  const float c = p.score_scale() * 1.44269504f, lowest = -127.0f / c;
  for (int t = u.first; t < u.last; ++t)
    for (int h = 0; h < heads; ++h) {
      const ForwardTile& state = scratch.tile[(t - u.first) * heads + h];
      pack_rows(p.q.at<T>(u.b, int64_t(t) * kTileRows, u.first_head + h), p.q.row_stride, p.tile_rows(t), kTileRows,
                p.dim, p.query_factor(), nullptr, state.q, ld);
      std::memset(state.out, 0, sizeof(float) * kTileRows * ld_v);
      std::memset(state.sum, 0, sizeof(float) * kTileRows * kWidth);
      for (int i = 0; i < kTileRows; ++i) state.maximum[i] = -kInf;
    }
  for (int start = next_key_tile(p, hulls, u.b, u.first, u.last, 0), next; start < p.keys; start = next) {
    next = next_key_tile(p, hulls, u.b, u.first, u.last, start + kTileKeys);
    uint8_t live[kTileKeys];
    // of all rows, because which tiles share a unit depends on the threads
    live_keys(p, hulls, u.b, 0, p.query_tiles(), start, live);
    const int size = smaller(kTileKeys, p.keys - start), next_size = smaller(kTileKeys, p.keys - next);
    Ahead next_k(p.k.at<T>(u.b, next, kv_head), p.k.row_stride, next_size, p.dim);
    Ahead next_v(p.v.at<T>(u.b, next, kv_head), p.v.row_stride, next_size, p.dim_v);
    pack_rows(p.k.at<T>(u.b, start, kv_head), p.k.row_stride, size, kTileKeys, p.dim, 1.0f, live, scratch.k, ld);
    transpose_tile(scratch.k, ld, kTileKeys, p.dim, scratch.k_transposed, kLdScores);
    pack_rows(p.v.at<T>(u.b, start, kv_head), p.v.row_stride, size, kTileKeys, p.dim_v, 1.0f, live, scratch.v, ld_v);
    for (int t = u.first; t < u.last; ++t) {
      const Window w = hulls.at(u.b, t).window(start, kTileKeys, kWidth);
      if (w.empty()) continue;
      const int rows = round_up(p.tile_rows(t), kBlockRows), columns = w.last - w.first;
      const bool masked = !hulls.at(u.b, t).all_attend(start + w.first, start + w.last);
      for (int h = 0; h < heads; ++h) {
        const ForwardTile& state = scratch.tile[(t - u.first) * heads + h];
        multiply<Into::kStore, false>(rows, columns, p.dim, state.q, ld, scratch.k_transposed + w.first, kLdScores,
                                      scratch.scores, kLdScores, next_k);
        if (masked) mask_scores(p, u.b, t, start + w.first, columns, scratch.scores);
        online_softmax(rows, columns, c, lowest, scratch.scores, scratch.rescale, state);
        multiply<Into::kScaleAdd, false>(rows, cols_v, columns, scratch.scores, kLdScores, scratch.v + w.first * ld_v,
                                         ld_v, state.out, ld_v, next_v, scratch.rescale);
      }
    }
  }
  for (int t = u.first; t < u.last; ++t)
    for (int h = 0; h < heads; ++h)
      finish_tile(p, u.b, u.first_head + h, t, scratch.tile[(t - u.first) * heads + h], out, lse);
}

template <class T> int forward(const Problem& p, T* out, float* lse) {
  const int group = p.group(), tiles = p.query_tiles(), unit_heads = smaller(group, kUnitTiles),
            slices = (group + unit_heads - 1) / unit_heads;
  const int64_t head_slices = p.batch * p.kv_heads * slices;
  // A row's result does not depend on how many tiles share a unit, so this may depend on the number of threads.
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
    const FloatMode mode;
    Cutter cut(memory.as<float>() + count.used() * omp_get_thread_num());
    ForwardScratch scratch(p, unit_tiles * unit_heads, cut);
    std::memset(scratch.scores, 0,
                // Rows beyond the last block are read, but never used.
                sizeof(float) * kTileRows * kLdScores);
    for (int64_t u; (u = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < head_slices * per_slice;) {
      const int first = int(u % per_slice) * unit_tiles, slice = int(u / per_slice % (p.kv_heads * slices));
      const int first_head = slice / slices * group + slice % slices * unit_heads, end = (slice / slices + 1) * group;
      forward_unit<T>(p, hulls,
                      {u / per_slice / (p.kv_heads * slices), first_head, smaller(first_head + unit_heads, end), first,
                       smaller(first + unit_tiles, tiles)},
                      scratch, out, lse);
    }
  }
  return ILLADA_OK;
}

}  // namespace

int ILLADA_ISA_FN(illada_attention_fwd_cpu)(int dtype, const void* q, const void* k, const void* v,
                                            const int32_t* bounds, void* out, float* lse, int64_t batch,
                                            int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                                            int64_t dim_v, const int64_t* strides, float scale, int threads) {
  if (!valid(batch, queries, keys, heads, kv_heads, dim, dim_v, threads)) return ILLADA_BAD_ARGUMENT;
  const Problem p =
      make_problem(q, k, v, bounds, batch, queries, keys, heads, kv_heads, dim, dim_v, strides, scale, threads);
  switch (dtype) {
    case ILLADA_F32: return forward(p, static_cast<float*>(out), lse);
    case ILLADA_BF16: return forward(p, static_cast<bf16*>(out), lse);
    case ILLADA_F16: return forward(p, static_cast<fp16*>(out), lse);
  }
  return ILLADA_BAD_DTYPE;
}
