// Flash attention on the CPU under at most two key ranges per query row, forward.
//
//   s = scale q k^T;  lse = log sum exp s;  out = exp(s - lse) v
//
// A unit of work owns up to 512 rows of heads that share a kv head; they share each packed tile of 128 keys. A query
// tile of 32 rows walks the key tiles that its hulls touch with a running maximum. Each 4 of its rows compute only
// columns within their own hulls, and are masked only where they differ. 4 * dim flops a pair; memory: a few hundred KB
// a thread. Tiles are packed as float32, or as pairs of bf16 with p rounded too (products.h); everything accumulates in
// float32, in an order that does not depend on the threads. A row without keys gives out 0 and lse -inf. Keys to which
// no row of the batch entry may attend are packed as zeros, so that a NaN or inf in them stays out of the sums.
#include <omp.h>

#include <cstdlib>

#include "illada/api.h"
#include "attention_tiles.h"
#include "float_mode.h"
#include "isa.h"

namespace {

constexpr int kUnitTiles = 16;  // query tiles that share a packed key tile

struct ForwardTile {  // the running state of one query tile of one head
  float *q, *out;  // (rows x ld), (rows x ld_v)
  float *maximum, *sum;  // (rows), (rows x kWidth): summed over lanes at the end
  const float* queries;  // q, or the queries where they lie
  int64_t ld_queries;
  bool begun;
};

template <class Products> struct ForwardScratch {
  int ld, ld_v;  // of q, and of v and out
  ForwardTile tile[kUnitTiles];
  float *k_transposed, *v, *scores, *rescale;
  ForwardScratch(const Problem& p, int tiles, Cutter& cut)
      : ld(leading_dim(units<Products>(p.dim))), ld_v(leading_dim(p.dim_v)) {
    for (int i = 0; i < tiles; ++i)
      tile[i] = {cut.take(kTileRows * ld),
                 cut.take(kTileRows * ld_v),
                 cut.take(kTileRows),
                 cut.take(kTileRows * kWidth),
                 nullptr,
                 0,
                 false};
    k_transposed = cut.take(round_up(units<Products>(p.dim), kWidth) * kLdScores);
    v = cut.take(kTileKeys / Products::kStep * ld_v);
    scores = cut.take(kTileRows * kLdScores);
    rescale = cut.take(kTileRows);
  }
};

void mask_scores(const Meeting& meeting, int key, float* scores) {
  for (int i = 0; i < meeting.blocks * kBlockRows; ++i) {
    const Meeting::Rows& block = meeting.block[i / kBlockRows];
    if (!block.masked) continue;
    for (int j = block.columns.first; j < block.columns.last; j += kWidth) {
      float* s = scores + i * kLdScores + j;
      store(s, allowed_lanes(meeting.ranges[i], key + j) ? load(s) : splat(-kInf));
    }
  }
}

// Turns scores into p = exp(score - maximum), as units along the rows. Updates the maximum, the sum, and the factor
// that rescales earlier results.
template <class Products>
void online_softmax(const Meeting& meeting, float c, float lowest, float* scores, float* rescale,
                    const ForwardTile& tile) {
  float centre[kTileRows];
  vf row_max[kTileRows];
  for (vf& m : row_max) m = splat(-kInf);
  for (int i = 0; i < meeting.blocks; ++i) {
    const Window w = meeting.block[i].columns;
    vf* m = row_max + i * kBlockRows;
    for (int j = w.first; j < w.last; j += kWidth)
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) m[r] = max(load(scores + (i * kBlockRows + r) * kLdScores + j), m[r]);
  }
  for (int i = 0; i < meeting.blocks * kBlockRows; i += kWidth) {
    const vf before = load(tile.maximum + i),
             after = max(reduce_rows(row_max + i, [](vf a, vf b) { return max(a, b); }), before);
    const vf finite = after == -kInf ? vf{} : after;  // 0 where no key was seen so far
    store(tile.maximum + i, after);
    store(centre + i, finite);
    vf factor[1] = {before - finite};
    exp2_scaled<false>(factor, c, lowest);
    store(rescale + i, factor[0]);
  }
  for (int i = 0; i < meeting.blocks; ++i) {
    const Window w = meeting.block[i].columns;
    const int row = i * kBlockRows;
    float* s = scores + row * kLdScores;
    vf sum[kBlockRows];
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) sum[r] = load(tile.sum + (row + r) * kWidth) * rescale[row + r];
    for (int j = w.first; j < w.last; j += kWidth) {
      vf e[kBlockRows];
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) e[r] = load(s + r * kLdScores + j) - centre[row + r];
      exp2_scaled<(Products::kStep > 1)>(e, c, lowest);
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) Products::put(s + r * kLdScores, j, e[r]), sum[r] += e[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) store(tile.sum + (row + r) * kWidth, sum[r]);
  }
}

// What depends on the dtype in memory.
struct ForwardRows {
  decltype(&pack_rows<FloatProducts, float>) pack;
  decltype(&pack_turned<FloatProducts, float>) pack_turned;
  decltype(&pack_transposed<FloatProducts, float>) pack_transposed;
  decltype(&in_place<FloatProducts, float>) in_place;
  decltype(&store_row<FloatProducts, float>) store;
};
template <class Products, class T>
constexpr ForwardRows kForwardRows = {pack_rows<Products, T>, pack_turned<Products, T>, pack_transposed<Products, T>,
                                      in_place<Products, T>, store_row<Products, T>};

void finish_tile(const Problem& p, int64_t b, int head, int tile, const ForwardTile& state, int ld_v,
                 const ForwardRows& rows_of, void* out, float* lse) {
  float sums[kTileRows], inverse[kTileRows], row_lse[kTileRows];
  for (int i = 0; i < kTileRows; i += kWidth) {
    vf rows[kWidth];
    for (int r = 0; r < kWidth; ++r) rows[r] = load(state.sum + (i + r) * kWidth);
    const vf sum = reduce_rows(rows, [](vf a, vf b) { return a + b; });
    store(sums + i, sum);
    store(inverse + i, 1.0f / sum);
    store(row_lse + i, load(state.maximum + i) * p.score_scale() + log(sum));
  }
  const int64_t first = int64_t(tile) * kTileRows;
  const int64_t bytes = int64_t(p.dim_v) * p.q.bytes;
  char* to = static_cast<char*>(out) + ((b * p.queries + first) * p.heads + head) * bytes;
  float* to_lse = lse + (b * p.heads + head) * p.queries + first;
  for (int i = 0; i < p.tile_rows(tile); ++i, to += p.heads * bytes) {
    const bool none = sums[i] == 0.0f;  // no key, or every score is -inf
    rows_of.store(none ? nullptr : state.out + i * ld_v, inverse[i], p.dim_v, to);
    to_lse[i] = none ? -kInf : row_lse[i];
  }
}

// Query tiles first .. last of heads first_head .. last_head, which share a kv head.
struct ForwardUnit {
  int64_t b;
  int first_head, last_head, first, last;
};

// What is prefetched during one of the two products: what the next query tile needs, and evenly over a key tile what
// the next one needs.
struct Prefetch {
  Paced query_tile, key_tile;
  void ask() { query_tile.ask(), key_tile.ask(); }
};

template <class Products> class Forward {
 public:
  Forward(const Problem& p, const Tiles& tiles, const ForwardRows& rows_of, void* out, float* lse)
      : p(p), tiles(tiles), rows_of(rows_of), out(static_cast<char*>(out)), lse(lse) {}

  void run(const ForwardUnit& u, const ForwardUnit& next_unit, ForwardScratch<Products>& scratch) const {
    const int heads = u.last_head - u.first_head, kv_head = u.first_head / p.group();
    for (int i = 0; i < (u.last - u.first) * heads; ++i) scratch.tile[i].begun = false;
    for (int start = tiles.next_key_tile(u.b, u.first, u.last, 0), next; start < p.keys; start = next) {
      next = tiles.next_key_tile(u.b, u.first, u.last, start + kTileKeys);
      pack_keys(u.b, kv_head, start, scratch);
      Prefetch scores, values;
      ask_for_keys(u, next_unit, start, next, scores, values);
      for (int t = u.first; t < u.last; ++t) {
        const Meeting meeting(p, tiles, u.b, t, start);
        if (meeting.all.empty()) continue;
        const bool last = tiles.hulls(u.b, t).first_touched(start + kTileKeys, kTileKeys, p.keys) == p.keys;
        for (int h = 0; h < heads; ++h) {
          ForwardTile* state = &scratch.tile[(t - u.first) * heads + h];
          const bool first = !state->begun;
          if (first) begin_tile(u.b, u.first_head + h, t, last, scratch, *state);
          ask_for_rows(u, next_unit, t, h, last, state, scores, values);
          attend(meeting, start, first, *state, scratch, scores, values);
          if (last) finish_tile(p, u.b, u.first_head + h, t, *state, scratch.ld_v, rows_of, out, lse);
        }
      }
    }
    for (int t = u.first; t < u.last; ++t)
      for (int h = 0; h < heads; ++h) {
        ForwardTile& state = scratch.tile[(t - u.first) * heads + h];
        if (state.begun) continue;  // and finished
        std::memset(state.sum, 0, sizeof(float) * kTileRows * kWidth);
        finish_tile(p, u.b, u.first_head + h, t, state, scratch.ld_v, rows_of, out, lse);
      }
  }

 private:
  // Packs the queries, unless they are multiplied only once.
  void begin_tile(int64_t b, int head, int tile, bool once, const ForwardScratch<Products>& scratch,
                  ForwardTile& state) const {
    const void* from = p.q.at(b, int64_t(tile) * kTileRows, head);
    const int rows = p.tile_rows(tile);
    state.queries = once && rows % kBlockRows == 0 && p.query_factor() == 1.0f
                        ? rows_of.in_place(from, p.q.row_stride, p.dim, state.ld_queries)
                        : nullptr;
    if (!state.queries) {
      rows_of.pack(from, p.q.row_stride, rows, kTileRows, p.dim, p.query_factor(), nullptr, state.q, scratch.ld);
      state.queries = state.q, state.ld_queries = scratch.ld;
    }
    std::memset(state.sum, 0, sizeof(float) * kTileRows * kWidth);
    for (int i = 0; i < kTileRows; ++i) state.maximum[i] = -kInf;
    state.begun = true;
  }

  void pack_keys(int64_t b, int kv_head, int start, const ForwardScratch<Products>& scratch) const {
    static const uint8_t none[kTileKeys] = {};
    const uint8_t* live = tiles.live(b, start);
    if (!live) live = none;
    const int size = smaller(kTileKeys, p.keys - start);
    rows_of.pack_transposed(p.k.at(b, start, kv_head), p.k.row_stride, size, p.dim, live, scratch.k_transposed);
    rows_of.pack_turned(p.v.at(b, start, kv_head), p.v.row_stride, size, p.dim_v, live, scratch.v, scratch.ld_v);
  }

  // The next key tile of this unit, or the first of the one that this thread is likely to run next.
  void ask_for_keys(const ForwardUnit& u, const ForwardUnit& next_unit, int start, int next, Prefetch& scores,
                    Prefetch& values) const {
    const ForwardUnit& then = next < p.keys ? u : next_unit;
    if (next >= p.keys) next = tiles.next_key_tile(then.b, then.first, then.last, 0);
    const int size = smaller(kTileKeys, p.keys - next), kv_head = then.first_head / p.group();
    int blocks = 0;
    for (int t = u.first; t < u.last; ++t)
      if (tiles.hulls(u.b, t).touches(start, start + kTileKeys)) blocks += kRowBlocks * (u.last_head - u.first_head);
    scores.key_tile = Paced(p.k.ahead(then.b, next, kv_head, size, p.dim), register_blocks(blocks, kTileKeys));
    values.key_tile = Paced(p.v.ahead(then.b, next, kv_head, size, p.dim_v), register_blocks(blocks, p.dim_v));
  }

  // The queries of the next tile, unless they are there, and the rows of out that this one is about to write.
  void ask_for_rows(const ForwardUnit& u, const ForwardUnit& next_unit, int t, int h, bool last,
                    const ForwardTile* state, Prefetch& scores, Prefetch& values) const {
    const bool other_head = h + 1 < u.last_head - u.first_head, other_tile = t + 1 < u.last;
    Ahead queries, rows;
    if (!other_head && !other_tile) {
      if (last) queries = queries_of(next_unit.b, next_unit.first, next_unit.first_head);
    } else if (!state[1].begun) {
      queries = queries_of(u.b, other_head ? t : t + 1, u.first_head + (other_head ? h + 1 : 0));
    }
    if (last)
      rows =
          Ahead(out + ((u.b * p.queries + int64_t(t) * kTileRows) * p.heads + u.first_head + h) * p.dim_v * p.q.bytes,
                p.q.bytes, int64_t(p.heads) * p.dim_v, p.tile_rows(t), p.dim_v);
    scores.query_tile = Paced(queries, register_blocks(kRowBlocks, kTileKeys));
    values.query_tile = Paced(rows, register_blocks(kRowBlocks, p.dim_v));
  }
  Ahead queries_of(int64_t b, int tile, int head) const {
    return p.q.ahead(b, int64_t(tile) * kTileRows, head, p.tile_rows(tile), p.dim);
  }

  void attend(const Meeting& meeting, int start, bool first, const ForwardTile& state,
              const ForwardScratch<Products>& scratch, Prefetch& next_scores, Prefetch& next_values) const {
    constexpr int kStep = Products::kStep;
    const float c = p.score_scale() * 1.44269504f, lowest = -127.0f / c;
    const int cols_v = round_up(p.dim_v, kWidth);
    Part of_scores[kRowBlocks], of_values[kRowBlocks];
    for (int i = 0; i < meeting.blocks; ++i) {
      const Window w = meeting.block[i].columns;
      of_scores[i] = {w, {0, units<Products>(p.dim)}};
      of_values[i] = {{0, cols_v}, {w.first / kStep, w.last / kStep}};
    }
    multiply<Products, Into::kStore, false>(meeting.blocks, kTileKeys, of_scores, state.queries, state.ld_queries,
                                            scratch.k_transposed, kLdScores, scratch.scores, kLdScores, next_scores);
    mask_scores(meeting, start, scratch.scores);
    online_softmax<Products>(meeting, c, lowest, scratch.scores, scratch.rescale, state);
    auto* const into = first ? multiply<Products, Into::kStore, false, Prefetch>
                             : multiply<Products, Into::kScaleAdd, false, Prefetch>;
    into(meeting.blocks, cols_v, of_values, scratch.scores, kLdScores, scratch.v, scratch.ld_v, state.out, scratch.ld_v,
         next_values, scratch.rescale);
  }

  const Problem& p;
  const Tiles& tiles;
  const ForwardRows& rows_of;
  char* const out;
  float* const lse;
};

// Query tiles first .. last of a batch entry, which share packed keys, for every head.
struct TileGroup {
  int64_t keys, b;  // how many keys their hulls hold
  int first, last;
};

// Returns whether two query tiles meet a common key tile.
bool share_keys(const Hulls& a, const Hulls& b) {
  for (int i = 0; i < 2; ++i)
    if (a.lo[i] < a.hi[i] && b.touches(round_down(a.lo[i], kTileKeys), round_up(a.hi[i], kTileKeys))) return true;
  return false;
}

// Orders groups for qsort, of which no two are equal.
int most_keys_first(const void* left, const void* right) {
  const TileGroup &x = *static_cast<const TileGroup*>(left), &y = *static_cast<const TileGroup*>(right);
  const bool before = x.keys != y.keys ? x.keys > y.keys : x.b != y.b ? x.b < y.b : x.first < y.first;
  return before ? -1 : 1;
}

// Divides the query tiles into groups of at most `most` that share keys. The first have most keys, so that threads end
// together. Returns how many groups there are.
int64_t divide(const Problem& p, const Tiles& tiles, int most, TileGroup* groups) {
  int64_t count = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int t = 0; t < p.query_tiles(); ++t) {
      const bool joins =
          t > 0 && t - groups[count - 1].first < most && share_keys(tiles.hulls(b, t - 1), tiles.hulls(b, t));
      TileGroup& group = groups[joins ? count - 1 : count++];
      if (!joins) group = {0, b, t, t};
      group.keys += tiles.hulls(b, t).keys();
      group.last = t + 1;
    }
  std::qsort(groups, std::size_t(count), sizeof(TileGroup), most_keys_first);
  return count;
}

template <class Products> int forward(const Problem& p, const ForwardRows& rows_of, void* out, float* lse) {
  const int group = p.group(), query_tiles = p.query_tiles(), unit_heads = smaller(group, kUnitTiles),
            slices = (group + unit_heads - 1) / unit_heads, head_slices = p.kv_heads * slices;
  // A row's result does not depend on how many tiles share a unit, so this may depend on the number of threads.
  int unit_tiles = kUnitTiles / unit_heads;
  while (unit_tiles > 1 && p.batch * head_slices * ((query_tiles + unit_tiles - 1) / unit_tiles) < 4 * p.threads)
    unit_tiles /= 2;
  Tiles tiles(p);
  Cutter count(nullptr);
  ForwardScratch<Products>(p, unit_tiles * unit_heads, count);
  Buffer memory(sizeof(float) * count.used() * p.threads), groups(sizeof(TileGroup) * p.batch * query_tiles);
  if (!tiles || !memory || !groups) return ILLADA_NO_MEMORY;
  const Forward<Products> forward(p, tiles, rows_of, out, lse);
  int64_t next = 0, group_count = 0;
#pragma omp parallel num_threads(p.threads)
  {
    const FloatMode mode;
    tiles.fill();
#pragma omp single
    group_count = divide(p, tiles, unit_tiles, groups.as<TileGroup>());
    Cutter cut(memory.as<float>() + count.used() * omp_get_thread_num());
    ForwardScratch<Products> scratch(p, unit_tiles * unit_heads, cut);
    // rows beyond a tile's end are read as scores
    std::memset(scratch.scores, 0, sizeof(float) * kTileRows * kLdScores);
    // heads innermost: their rows are neighbours in memory
    auto unit = [&](int64_t u) {
      const TileGroup& tiles_of = groups.as<TileGroup>()[u / head_slices];
      const int slice = int(u % head_slices), first_head = slice / slices * group + slice % slices * unit_heads;
      const int last_head = smaller(first_head + unit_heads, (slice / slices + 1) * group);
      return ForwardUnit{tiles_of.b, first_head, last_head, tiles_of.first, tiles_of.last};
    };
    // A thread takes all heads of a group: two cores that write rows of neighbouring heads take lines of out from each
    // other. Of the last groups, one a thread, it takes a unit at a time, so that threads end together.
    const int64_t whole = group_count > p.threads ? group_count - p.threads : 0, last_groups = group_count - whole,
                  jobs = whole + last_groups * head_slices;
    auto first_unit = [&](int64_t job) {
      const int64_t rest = (job < jobs ? job : jobs - 1) - whole;
      return rest < 0 ? job * head_slices : (whole + rest % last_groups) * head_slices + rest / last_groups;
    };
    for (int64_t job; (job = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < jobs;) {
      const int64_t first = first_unit(job), end = first + (job < whole ? head_slices : 1);
      for (int64_t u = first; u < end; ++u)
        forward.run(unit(u), unit(u + 1 < end ? u + 1 : first_unit(job + p.threads)), scratch);
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
      make_problem(dtype, q, k, v, bounds, batch, queries, keys, heads, kv_heads, dim, dim_v, strides, scale, threads);
#if defined(__AVX512BF16__)
  if (dtype == ILLADA_BF16 && p.ordinary()) return forward<PairProducts>(p, kForwardRows<PairProducts, bf16>, out, lse);
  return illada_attention_fwd_cpu_avx512(dtype, q, k, v, bounds, out, lse, batch, queries, keys, heads, kv_heads, dim,
                                         dim_v, strides, scale, threads);
#else
  switch (dtype) {
    case ILLADA_F32: return forward<FloatProducts>(p, kForwardRows<FloatProducts, float>, out, lse);
    case ILLADA_BF16: return forward<FloatProducts>(p, kForwardRows<FloatProducts, bf16>, out, lse);
    case ILLADA_F16: return forward<FloatProducts>(p, kForwardRows<FloatProducts, fp16>, out, lse);
  }
  return ILLADA_BAD_DTYPE;
#endif
}
