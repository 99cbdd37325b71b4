// Flash attention on the CPU under at most two key ranges per query row, backward.
//
//   p = exp(scale q k^T - lse);  delta = rowsum(dout * out) - dlse;  ds = p * (dout v^T - delta)
//   dv = p^T dout;  dk = scale ds^T q;  dq = scale ds k
//
// A unit of work owns 256 keys of one kv head. It walks all query tiles (five GEMMs each), accumulates dk and dv alone,
// and adds to dq in the order of the keys, waiting for its turn: results are bitwise the same for any number of
// threads. 10 * dim flops a pair; memory: delta, and about 1 MB a thread. Pairs of bf16 (products.h) are multiplied
// with p and ds rounded too; everything accumulates in float32. Rows without keys and keys without rows are packed as
// zeros, so that a NaN or inf in them stays out of the sums.
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

template <class Products> struct BackwardScratch {
  struct Keys {
    float *k, *k_transposed, *v_transposed, *dk, *dv;
    bool any;
  } keys[kUnitKeyTiles];
  // of units along the head_dim: rows, q, dout; along the rows: q_turned, dout_turned, p, ds; along the keys: ds_rows
  float *rows, *q, *dout, *q_turned, *dout_turned, *dq, *p, *ds, *ds_rows, *offset, *delta;
  int ld, ld_v;  // of units along the head_dim
  int full, full_v;  // of whole entries

  BackwardScratch(const Problem& problem, Cutter& cut)
      : ld(leading_dim(units<Products>(problem.dim))),
        ld_v(leading_dim(units<Products>(problem.dim_v))),
        full(leading_dim(problem.dim)),
        full_v(leading_dim(problem.dim_v)) {
    constexpr int kStep = Products::kStep;
    // a second array where units along the rows are not what they were
    auto turned = [&](float* same, int64_t size) { return kStep == 1 ? same : cut.take(size); };
    rows = kStep == 1 ? nullptr : cut.take(kTileKeys * ld);
    for (Keys& tile : keys) {
      tile.k = cut.take(kTileKeys / kStep * full);
      tile.k_transposed = cut.take(round_up(units<Products>(problem.dim), kWidth) * kLdScores);
      tile.v_transposed = cut.take(round_up(units<Products>(problem.dim_v), kWidth) * kLdScores);
      tile.dk = cut.take(kTileKeys * full);
      tile.dv = cut.take(kTileKeys * full_v);
    }
    q = cut.take(kTileRows * ld);
    dout = cut.take(kTileRows * ld_v);
    q_turned = turned(q, kTileRows / kStep * full);
    dout_turned = turned(dout, kTileRows / kStep * full_v);
    dq = cut.take(kTileRows * full);
    p = cut.take(kTileRows * kLdScores);
    ds = cut.take(kTileRows * kLdScores);
    ds_rows = turned(ds, kTileRows * kLdScores);
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
        const T *out = static_cast<const T*>(grads.out.at(b, row, h)),
                *dout = static_cast<const T*>(grads.dout.at(b, row, h));
        vf sum = {};
        for (int d = 0; d < p.dim_v; d += kWidth) sum += load_n(out + d, p.dim_v - d) * load_n(dout + d, p.dim_v - d);
        delta[at] = reduce_add(sum) - (grads.dlse ? grads.dlse[at] : 0.0f);
      }
}

// What depends on the dtype in memory.
struct BackwardRows {
  decltype(&row_deltas<float>) deltas;
  decltype(&pack_rows<FloatProducts, float>) pack;
  decltype(&pack_transposed<FloatProducts, float>) pack_transposed;
  decltype(&store_row<FloatProducts, float>) store;
};
template <class Products, class T>
constexpr BackwardRows kBackwardRows = {row_deltas<T>, pack_rows<Products, T>, pack_transposed<Products, T>,
                                        store_row<Products, T>};

// A query tile and a key tile that meet.
struct Pair {
  int64_t b;
  int tile, start;
  const Meeting& meeting;
};

template <class Products> class Backward {
 public:
  using Scratch = BackwardScratch<Products>;
  using Keys = typename Scratch::Keys;

  Backward(const Problem& p, const Tiles& tiles, const Gradients& grads, const BackwardRows& rows_of,
           const float* delta, int* done)
      : p(p), tiles(tiles), grads(grads), rows_of(rows_of), delta(delta), done(done) {}

  // Runs the keys from chunk * kUnitKeys of one kv head against all query tiles of its heads, in order.
  void run(int64_t b, int kv_head, int chunk, Scratch& scratch) const {
    const int start = chunk * kUnitKeys;
    for (int i = 0; i < kUnitKeyTiles; ++i) load_keys(b, kv_head, start + i * kTileKeys, scratch, scratch.keys[i]);
    for (int head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head)
      for (int t = 0; t < p.query_tiles(); ++t)
        if (tiles.hulls(b, t).touches(start, start + kUnitKeys)) query_tile(b, head, t, chunk, scratch);
    for (int i = 0; i < kUnitKeyTiles; ++i) {
      const Keys& keys = scratch.keys[i];
      store_keys(b, kv_head, start + i * kTileKeys, keys.any, keys.dk, scratch.full, p.dim, grads.dk);
      store_keys(b, kv_head, start + i * kTileKeys, keys.any, keys.dv, scratch.full_v, p.dim_v, grads.dv);
    }
  }

 private:
  static constexpr int kStep = Products::kStep;

  void load_keys(int64_t b, int kv_head, int start, const Scratch& scratch, Keys& keys) const {
    const uint8_t* live = start < p.keys ? tiles.live(b, start) : nullptr;
    keys.any = live;
    if (!live) return;
    const int size = smaller(kTileKeys, p.keys - start);
    const void *k = p.k.at(b, start, kv_head), *v = p.v.at(b, start, kv_head);
    float* rows = kStep == 1 ? keys.k : scratch.rows;
    rows_of.pack(k, p.k.row_stride, size, kTileKeys, p.dim, 1.0f, live, rows, scratch.ld);
    Products::turn(rows, scratch.ld, kTileKeys, p.dim, keys.k, scratch.full);
    rows_of.pack_transposed(k, p.k.row_stride, size, p.dim, live, keys.k_transposed);
    rows_of.pack_transposed(v, p.v.row_stride, size, p.dim_v, live, keys.v_transposed);
    std::memset(keys.dk, 0, sizeof(float) * kTileKeys * scratch.full);
    std::memset(keys.dv, 0, sizeof(float) * kTileKeys * scratch.full_v);
  }

  // One query tile against the keys of the unit.
  void query_tile(int64_t b, int head, int tile, int chunk, Scratch& scratch) const {
    load_rows(b, head, tile, scratch);
    const int next = tile + 1 < p.query_tiles() ? tile + 1 : tile;
    const int64_t next_row = int64_t(next) * kTileRows;
    Paced next_q(p.q.ahead(b, next_row, head, p.tile_rows(next), p.dim), register_blocks(kRowBlocks, kTileKeys)),
        next_dout(grads.dout.ahead(b, next_row, head, p.tile_rows(next), p.dim_v),
                  register_blocks(kRowBlocks, kTileKeys)),
        dq(Ahead(grads.dq + ((b * p.queries + int64_t(tile) * kTileRows) * p.heads + head) * p.dim, sizeof(float),
                 int64_t(p.heads) * p.dim, p.tile_rows(tile), p.dim),
           register_blocks(kTileKeys / kBlockRows, p.dim_v));
    std::memset(scratch.dq, 0, sizeof(float) * kTileRows * scratch.full);
    for (int i = 0; i < kUnitKeyTiles; ++i) {
      const int start = chunk * kUnitKeys + i * kTileKeys;
      const Meeting meeting(p, tiles, b, tile, start);
      // within the hull, but no row attends: not even packed
      if (meeting.all.empty() || !scratch.keys[i].any) continue;
      meet({b, tile, start, meeting}, scratch, scratch.keys[i], next_q, next_dout, dq);
    }
    add_dq(b, head, tile, chunk, scratch);
  }

  // Packs queries and dout, and per row the exponent's offset and delta. A row without keys gets zeros, and an offset
  // that makes its p 0.
  void load_rows(int64_t b, int head, int tile, const Scratch& scratch) const {
    const int rows = p.tile_rows(tile);
    const int64_t first = int64_t(tile) * kTileRows, at = (b * p.heads + head) * p.queries + first;
    uint8_t keep[kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      keep[i] = i < rows && !p.bounds.of_row(b, first + i).empty();
      const float lse = keep[i] ? grads.lse[at + i] : -kInf;
      scratch.offset[i] = lse == -kInf ? kInf : lse / p.score_scale();
      scratch.delta[i] = keep[i] ? delta[at + i] : 0.0f;
    }
    rows_of.pack(p.q.at(b, first, head), p.q.row_stride, rows, kTileRows, p.dim, p.query_factor(), keep, scratch.q,
                 scratch.ld);
    rows_of.pack(grads.dout.at(b, first, head), grads.dout.row_stride, rows, kTileRows, p.dim_v, 1.0f, keep,
                 scratch.dout, scratch.ld_v);
    Products::turn(scratch.q, scratch.ld, kTileRows, p.dim, scratch.q_turned, scratch.full);
    Products::turn(scratch.dout, scratch.ld_v, kTileRows, p.dim_v, scratch.dout_turned, scratch.full_v);
  }

  // Adds one query tile's share to a key tile's dk and dv, and the key tile's share to scratch.dq.
  void meet(const Pair& pair, const Scratch& scratch, const Keys& keys, Paced& next_q, Paced& next_dout,
            Paced& dq) const {
    const int ld = scratch.ld, ld_v = scratch.ld_v, full = scratch.full, full_v = scratch.full_v;
    const int cols = round_up(p.dim, kWidth), cols_v = round_up(p.dim_v, kWidth), blocks = pair.meeting.blocks;
    constexpr int kKeyBlocks = kTileKeys / kBlockRows, kLdTurned = kStep * kLdScores;
    Part of_s[kRowBlocks], of_dp[kRowBlocks], of_dq[kRowBlocks], of_dk[kKeyBlocks], of_dv[kKeyBlocks];
    for (int i = 0; i < blocks; ++i) {
      const Window w = pair.meeting.block[i].columns;
      of_s[i] = {w, {0, units<Products>(p.dim)}};
      of_dp[i] = {w, {0, units<Products>(p.dim_v)}};
      of_dq[i] = {{0, cols}, {w.first / kStep, w.last / kStep}};
    }
    for (int i = 0; i < kKeyBlocks; ++i) {
      const Window rows = pair.meeting.rows_of(i * kBlockRows, p.tile_rows(pair.tile));
      const Window depth = {rows.first / kStep, units<Products>(rows.last)};
      of_dk[i] = {{0, cols}, depth};
      of_dv[i] = {{0, cols_v}, depth};
    }
    multiply<Products, Into::kStore, false>(blocks, kTileKeys, of_s, scratch.q, ld, keys.k_transposed, kLdScores,
                                            scratch.p, kLdScores, next_q);
    multiply<Products, Into::kStore, false>(blocks, kTileKeys, of_dp, scratch.dout, ld_v, keys.v_transposed, kLdScores,
                                            scratch.ds, kLdScores, next_dout);
    for (int i = 0; i < blocks; ++i)
      (pair.meeting.block[i].masked ? softmax_gradient<true>(pair, i, scratch)
                                    : softmax_gradient<false>(pair, i, scratch));
    multiply<Products, Into::kAdd, true>(kKeyBlocks, cols_v, of_dv, scratch.p, kLdTurned, scratch.dout_turned, full_v,
                                         keys.dv, full_v, dq);
    multiply<Products, Into::kAdd, true>(kKeyBlocks, cols, of_dk, scratch.ds, kLdTurned, scratch.q_turned, full,
                                         keys.dk, full, dq);
    multiply<Products, Into::kAdd, false>(blocks, cols, of_dq, scratch.ds_rows, kLdScores, keys.k, full, scratch.dq,
                                          full, dq);
  }

  // Turns s and dp (in scratch.p and scratch.ds) of a block of rows into p and ds: 0 in columns that only other rows
  // need.
  template <bool kMasked> void softmax_gradient(const Pair& pair, int block, const Scratch& scratch) const {
    const float score_scale = p.score_scale(), c = score_scale * 1.44269504f, lowest = -127.0f / c;
    const Meeting& meeting = pair.meeting;
    const Window w = meeting.block[block].columns;
    const int first = block * kBlockRows;
    float *s = scratch.p + first * kLdScores, *ds = scratch.ds + first * kLdScores;
    auto put = [](float* rows, int j, const vf* x) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; r += kStep) Products::put_rows(rows + r * kLdScores, j, x + r);
    };
    const vf zero[kBlockRows] = {};
    for (int j = meeting.all.first; j < w.first; j += kWidth) put(s, j, zero), put(ds, j, zero);
    for (int j = w.first; j < w.last; j += kWidth) {
      vf probability[kBlockRows], gradient[kBlockRows];
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) probability[r] = load(s + r * kLdScores + j) - scratch.offset[first + r];
      exp2_scaled<false>(probability, c, lowest);
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) {
        gradient[r] = probability[r] * (load(ds + r * kLdScores + j) - scratch.delta[first + r]) * score_scale;
        if (kMasked) {
          const vi allowed = allowed_lanes(meeting.ranges[first + r], pair.start + j);
          probability[r] = allowed ? probability[r] : vf{};
          gradient[r] = allowed ? gradient[r] : vf{};
        }
        if (kStep > 1) Products::put(scratch.ds_rows + (first + r) * kLdScores, j, gradient[r]);
      }
      put(s, j, probability), put(ds, j, gradient);
    }
    for (int j = larger(w.first, w.last); j < meeting.all.last; j += kWidth) put(s, j, zero), put(ds, j, zero);
  }

  // Stores a key tile's gradient (batch, keys, kv_heads, dim); zeros if no row attends to the tile.
  void store_keys(int64_t b, int kv_head, int start, bool any, const float* from, int ld, int dim,
                  void* gradient) const {
    for (int j = 0; j < smaller(kTileKeys, p.keys - start); ++j) {
      char* to = static_cast<char*>(gradient) + ((b * p.keys + start + j) * p.kv_heads + kv_head) * dim * p.k.bytes;
      rows_of.store(any ? from + j * ld : nullptr, 1.0f, dim, to);
    }
  }

  // Adds scratch.dq to dq once every earlier chunk that touches this query tile has, then passes the turn on.
  void add_dq(int64_t b, int head, int tile, int chunk, const Scratch& scratch) const {
    const int turn = tiles.hulls(b, tile).touched_before(chunk, kUnitKeys);
    int* const last = done + (b * p.heads + head) * p.query_tiles() + tile;
    while (__atomic_load_n(last, __ATOMIC_ACQUIRE) != turn) sched_yield();
    for (int i = 0; i < p.tile_rows(tile); ++i) {
      const int64_t row = int64_t(tile) * kTileRows + i;
      if (p.bounds.of_row(b, row).empty()) continue;
      float* to = grads.dq + ((b * p.queries + row) * p.heads + head) * p.dim;
      const float* from = scratch.dq + i * scratch.full;
      for (int d = 0; d < p.dim; d += kWidth)
        store_n(to + d, load_n(to + d, p.dim - d) + load(from + d) * p.query_factor(), p.dim - d);
    }
    __atomic_store_n(last, chunk, __ATOMIC_RELEASE);
  }

  const Problem& p;
  const Tiles& tiles;
  const Gradients& grads;
  const BackwardRows& rows_of;
  const float* const delta;
  int* const done;  // per query tile and head: the last chunk that added to dq, or -1
};

// Returns whether no query tile meets two chunks of keys, so that no unit waits for another.
bool chunks_are_apart(const Problem& p, const Tiles& tiles) {
  const int chunks = (p.keys + kUnitKeys - 1) / kUnitKeys;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int t = 0; t < p.query_tiles(); ++t) {
      const Hulls& hulls = tiles.hulls(b, t);
      const int last = hulls.touched_before(chunks, kUnitKeys);
      if (last > 0 && hulls.touched_before(last, kUnitKeys) >= 0) return false;
    }
  return true;
}

template <class Products> int backward(const Problem& p, const Gradients& grads, const BackwardRows& rows_of) {
  const int64_t heads = p.batch * p.kv_heads, chunks = (p.keys + kUnitKeys - 1) / kUnitKeys,
                turns = p.batch * p.heads * p.query_tiles();
  Tiles tiles(p);
  Cutter count(nullptr);
  BackwardScratch<Products>(p, count);
  Buffer memory(sizeof(float) * count.used() * p.threads), deltas(sizeof(float) * p.batch * p.heads * p.queries),
      done(sizeof(int) * turns);
  if (!tiles || !memory || !deltas || !done) return ILLADA_NO_MEMORY;
  for (int64_t i = 0; i < turns; ++i) done.as<int>()[i] = -1;
  const Backward<Products> backward(p, tiles, grads, rows_of, deltas.as<float>(), done.as<int>());
  int64_t next = 0;
  bool apart = false;
#pragma omp parallel num_threads(p.threads)
  {
    const FloatMode mode;
    tiles.fill();
#pragma omp single nowait
    apart = chunks_are_apart(p, tiles);
    rows_of.deltas(p, grads, deltas.as<float>());  // ends with a barrier
    Cutter cut(memory.as<float>() + count.used() * omp_get_thread_num());
    BackwardScratch<Products> scratch(p, cut);
    // Ascending, chunks outermost: a unit waits only for units that a thread has already taken. Where none waits, a
    // thread takes all heads of a chunk, and of the last chunks, one a thread, a unit at a time: two cores that write
    // rows of neighbouring heads take lines from each other.
    const int64_t whole = apart && chunks > p.threads ? chunks - p.threads : 0, last = chunks - whole;
    auto run = [&](int64_t chunk, int64_t head) {
      backward.run(head / p.kv_heads, int(head % p.kv_heads), int(chunk), scratch);
    };
    for (int64_t job; (job = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < whole + last * heads;) {
      const int64_t rest = job - whole;
      if (rest < 0)
        for (int64_t head = 0; head < heads; ++head) run(job, head);
      else if (apart) run(whole + rest % last, rest / last);
      else run(rest / heads, rest % heads);
    }
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
      make_problem(dtype, q, k, v, bounds, batch, queries, keys, heads, kv_heads, dim, dim_v, strides, scale, threads);
  const View out_view = {out, bytes_of(dtype), strides[11], strides[12], strides[13]},
             dout_view = {dout, bytes_of(dtype), strides[14], strides[15], strides[16]};
  const Gradients grads = {dout_view, out_view, dlse, lse, dq, dk, dv};
#if defined(__AVX512BF16__)
  if (dtype == ILLADA_BF16 && p.ordinary()) return backward<PairProducts>(p, grads, kBackwardRows<PairProducts, bf16>);
  return illada_attention_bwd_cpu_avx512(dtype, q, k, v, bounds, out, lse, dout, dlse, dq, dk, dv, batch, queries, keys,
                                         heads, kv_heads, dim, dim_v, strides, scale, threads);
#else
  switch (dtype) {
    case ILLADA_F32: return backward<FloatProducts>(p, grads, kBackwardRows<FloatProducts, float>);
    case ILLADA_BF16: return backward<FloatProducts>(p, grads, kBackwardRows<FloatProducts, bf16>);
    case ILLADA_F16: return backward<FloatProducts>(p, grads, kBackwardRows<FloatProducts, fp16>);
  }
  return ILLADA_BAD_DTYPE;
#endif
}
