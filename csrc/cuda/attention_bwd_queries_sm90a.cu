// dQ of attention. S = Q K^T, dP = dO V^T, P = exp2(scale' S - lse), dS = P (dP - delta),
//
//   dQ = scale dS K
//
// A block owns 128 query rows of one head. Q and dO stay in shared memory, dQ accumulates in registers in float32; the
// block walks the key tiles that its rows' hulls touch in ascending order, each once, so equal inputs give equal bits.
// One thread loads K and V by TMA (128 keys a tile, 64 for D = 256). Two warpgroups own 64 rows each; dS is the A
// operand from registers. 6 D flops a pair. In partial tiles, pairs that do not attend get P = dS = 0, and rows of K to
// which no row of the block attends become zeros in shared memory, because 0 * NaN is NaN. A NaN in Q or dO stays in
// its row, one in V in its column of dP.
#include "attention_bwd_sm90a.cuh"
#include "illada/api.h"

using namespace illada;

namespace {

template <class T, int D> struct Shape {
  static constexpr int kRows = 128, kTiles = kRows / kTileRows;
  static constexpr int kKeys = D > 128 ? 64 : 128, kStages = 2, kValueStages = D > 128 ? 1 : 2;
  static constexpr int kQueryTile = pieces<D> * kRows * 64, kKeyTile = pieces<D> * kKeys * 64;  // elements
  static constexpr int kWords = kKeys / 32;  // of a set of keys
};

template <class T, int D> struct Shared {
  using S = Shape<T, D>;
  T q[S::kQueryTile], dout[S::kQueryTile], k[S::kStages][S::kKeyTile], v[S::kValueStages][S::kKeyTile];
  uint32_t attended[kConsumerWarps][S::kWords];  // keys of a partial tile to which some row of the warp attends
  int step[S::kStages], key[S::kStages], item;
  uint64_t rows_full, rows_empty, k_full[S::kStages], k_empty[S::kStages], v_full[S::kValueStages],
      v_empty[S::kValueStages];
};

struct Item {
  int tile, head, batch;  // tile: of the workspace, the first of kTiles
};

// Orders items by descending row, outermost, because under causal masks the last rows have the most keys.
template <class T, int D> ILLADA_DEVICE Item item_at(int index, int items, const Sizes& size) {
  const int heads = size.batch * size.heads;
  return {(items / heads - 1 - index / heads) * Shape<T, D>::kTiles, index % size.heads, index % heads / size.heads};
}

struct Maps {
  CUtensorMap q, k, v, dout, dq;
};

// ---- producer: one thread ----------------------------------------------------------------------------------------
template <class T, int D>
ILLADA_DEVICE void produce(Shared<T, D>& s, const Maps& maps, const Workspace& w, const Sizes& size, int items) {
  using S = Shape<T, D>;
  int n = 0;  // key tiles so far
  for (int turn = 0, index = blockIdx.x, next;; ++turn, index = next) {
    mbar_wait(&s.rows_empty, turn % 2 ^ 1);
    s.item = index < items ? index : -1;
    if (index >= items) {
      mbar_arrive(&s.rows_full);
      break;
    }
    next = draw_item(w.drawn);
    const Item item = item_at<T, D>(index, items, size);
    mbar_arrive_expect_tx(&s.rows_full, 2 * sizeof(s.q));
    load_tile<D, S::kRows>(s.q, &maps.q, &s.rows_full, item.tile * kTileRows, item.head, item.batch);
    load_tile<D, S::kRows>(s.dout, &maps.dout, &s.rows_full, item.tile * kTileRows, item.head, item.batch);
    Hulls hulls = w.hulls[w.bounds_at(item.batch, item.tile)].hulls;
    for (int i = 1; i < S::kTiles; ++i)
      if (item.tile + i < w.tiles) hulls.merge(w.hulls[w.bounds_at(item.batch, item.tile + i)].hulls);
    const int kv_head = item.head / (size.heads / size.kv_heads);
    for (int start = 0;; start += S::kKeys, ++n) {
      start = hulls.first_touched(start, S::kKeys, size.keys);
      const bool end = start >= size.keys;
      const int stage = n % S::kStages, value_stage = n % S::kValueStages;
      mbar_wait(&s.k_empty[stage], n / S::kStages % 2 ^ 1);
      s.step[stage] = end ? kEnd : hulls.all_attend(start, start + S::kKeys) ? kFull : kPartial;
      s.key[stage] = start;
      if (!end) {
        mbar_arrive_expect_tx(&s.k_full[stage], sizeof(s.k[0]));
        load_tile<D, S::kKeys>(s.k[stage], &maps.k, &s.k_full[stage], start, kv_head, item.batch);
      }
      mbar_wait(&s.v_empty[value_stage], n / S::kValueStages % 2 ^ 1);
      // Announced only now: who sees the end releases v of n, and all must have released v of n - 1 before.
      if (end) {
        mbar_arrive(&s.v_full[value_stage]);
        mbar_arrive(&s.k_full[stage]);
        ++n;
        break;
      }
      mbar_arrive_expect_tx(&s.v_full[value_stage], sizeof(s.v[0]));
      load_tile<D, S::kKeys>(s.v[value_stage], &maps.v, &s.v_full[value_stage], start, kv_head, item.batch);
    }
  }
}

// ---- consumers: two warpgroups -----------------------------------------------------------------------------------
// What a thread knows of its two rows, row_of_thread() and that + 8: lse, delta and key ranges.
struct MyRows {
  float lse[2], delta[2];
  RowSpans spans[2];

  ILLADA_DEVICE MyRows(const Workspace& w, const Sizes& size, const Item& item) {
    const int tile = item.tile + threadIdx.x / 128, row = row_of_thread();
    for (int r = 0; r < 2; ++r) {
      lse[r] = infinity(), delta[r] = 0, spans[r] = {};
      if (tile >= w.tiles) continue;
      const RowStats& stats = w.stats[(int64_t(item.batch) * size.heads + item.head) * w.tiles + tile];
      lse[r] = stats.lse[row + r * 8], delta[r] = stats.delta[row + r * 8];
      spans[r] = w.spans[w.bounds_at(item.batch, tile) * kTileRows + row + r * 8];
    }
  }
};

// Zeros the rows of the K tile to which no row of the block attends, even if NaN or inf.
template <class T, int D>
ILLADA_DEVICE void clear_unattended_keys(Shared<T, D>& s, T* k, const MyRows& rows, int start) {
  using S = Shape<T, D>;
  uint32_t mine[S::kWords];
#pragma unroll
  for (int word = 0; word < S::kWords; ++word)
    mine[word] = keys_of(rows.spans[0], start + word * 32) | keys_of(rows.spans[1], start + word * 32);
  clear_other_keys<D>(k, s.attended, mine);
}

// Sets accumulators of pairs that do not attend to x. key: the first of the tile.
template <int R> ILLADA_DEVICE void select(float (&s)[R], const MyRows& rows, int key, float x) {
#pragma unroll
  for (int i = 0; i < R; ++i)
    if (!rows.spans[i / 2 % 2].holds(key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2)) s[i] = x;
}

// Adds key tile n's share to dq (64 rows, D).
template <class T, int D>
ILLADA_DEVICE void add_keys(Shared<T, D>& s, float (&dq)[columns_of<D> / 2], const MyRows& rows, int n,
                            float scale_log2) {
  using S = Shape<T, D>;
  const int stage = n % S::kStages, value_stage = n % S::kValueStages, first_row = warpgroup_of_thread() * 64;
  float p[S::kKeys / 2], ds[S::kKeys / 2];  // (64 rows, keys)
  uint32_t ds_operand[S::kKeys / 16][4];
  const bool masked = s.step[stage] != kFull;
  const int key = s.key[stage];
  if (masked) clear_unattended_keys<T, D>(s, s.k[stage], rows, key);
  multiply_transposed<D, S::kRows>(p, s.q + first_row * 64, s.k[stage]);
  mbar_wait(&s.v_full[value_stage], n / S::kValueStages % 2);
  multiply_transposed<D, S::kRows>(ds, s.dout + first_row * 64, s.v[value_stage]);

  wgmma_wait<1>();
  reg_fence(p);
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) p[i] = fmaf(p[i], scale_log2, -rows.lse[i / 2 % 2]);
  if (masked) select(p, rows, key, -infinity());
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) p[i] = fast_exp2(p[i]);

  wgmma_wait<0>();
  reg_fence(ds);
  arrive_by_warp(&s.v_empty[value_stage]);
  if (masked) select(ds, rows, key, 0);
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) ds[i] = p[i] * (ds[i] - rows.delta[i / 2 % 2]);
  pack_operand<T>(ds_operand, ds);
  multiply_add<T>(dq, ds_operand, s.k[stage]);
  wgmma_wait<0>();
  reg_fence(dq);
}

template <class T, int D>
ILLADA_DEVICE void consume(Shared<T, D>& s, const Maps& maps, const Workspace& w, const Sizes& size, int items,
                           float scale) {
  using S = Shape<T, D>;
  const int warpgroup = warpgroup_of_thread();
  int n = 0;
  for (int turn = 0;; ++turn) {
    mbar_wait(&s.rows_full, turn % 2);
    if (s.item < 0) break;
    const Item item = item_at<T, D>(s.item, items, size);
    const MyRows rows(w, size, item);
    float dq[columns_of<D> / 2] = {};
    for (bool more = true; more; ++n) {
      mbar_wait(&s.k_full[n % S::kStages], n / S::kStages % 2);
      more = s.step[n % S::kStages] != kEnd;
      if (more) add_keys<T, D>(s, dq, rows, n, scale * kLog2e);
      else arrive_by_warp(&s.v_empty[n % S::kValueStages]);
      arrive_by_warp(&s.k_empty[n % S::kStages]);
    }
    bar_sync(2 + warpgroup, 128);  // all four warps have waited for their MMAs: these rows of Q are free
    store_rows<S::kRows>(s.q + warpgroup * 64 * 64, dq, scale);
    fence_proxy_async();
    bar_sync(2 + warpgroup, 128);
    if (threadIdx.x % 128 == 0) {
      for (int piece = 0; piece < pieces<D>; ++piece)
        tma_store(&maps.dq, s.q + (piece * S::kRows + warpgroup * 64) * 64, piece * 64,
                  (item.tile + warpgroup) * kTileRows, item.head, item.batch);
      bulk_commit();
      bulk_wait_read<0>();
      mbar_arrive(&s.rows_empty);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_queries(const __grid_constant__ Maps maps, Workspace workspace, Sizes size, int items, float scale) {
  Shared<T, D>& s = *reinterpret_cast<Shared<T, D>*>(dynamic_smem());
  using S = Shape<T, D>;
  if (threadIdx.x == 0) {
    mbar_init(&s.rows_full, 1);
    mbar_init(&s.rows_empty, kWarpgroups);
    for (int i = 0; i < S::kStages; ++i) mbar_init(&s.k_full[i], 1), mbar_init(&s.k_empty[i], kConsumerWarps);
    for (int i = 0; i < S::kValueStages; ++i) mbar_init(&s.v_full[i], 1), mbar_init(&s.v_empty[i], kConsumerWarps);
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    reg_increase<232>();
    consume<T, D>(s, maps, workspace, size, items, scale);
  } else {
    reg_decrease<40>();
    if (threadIdx.x == kConsumers) produce<T, D>(s, maps, workspace, size, items);
  }
}

}  // namespace

extern "C" int illada_attention_bwd_queries_sm90a(int dtype, const void* q, const void* k, const void* v,
                                                  const void* dout, const void* stats, const void* spans,
                                                  const void* hulls, int32_t* drawn, void* dq, int64_t batch,
                                                  int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                                                  int64_t dim, int64_t bounds_batches, const int64_t* strides,
                                                  float scale, int blocks, void* stream) {
  return for_type_and_dim(ILLADA_BF16, ILLADA_F16, dtype, dim, [&](auto zero, auto head_dim) -> int {
    using T = decltype(zero);
    constexpr int D = decltype(head_dim)::value, kRows = Shape<T, D>::kRows, kKeys = Shape<T, D>::kKeys;
    const int64_t items = (queries + kRows - 1) / kRows * heads * batch;
    if (items >= int64_t(1) << 30) return int(cudaErrorInvalidValue);
    Maps maps;
    if (int e = map_of_rows<T>(&maps.q, q, batch, queries, heads, D, strides, kRows)) return e;
    if (int e = map_of_rows<T>(&maps.k, k, batch, keys, kv_heads, D, strides + 3, kKeys)) return e;
    if (int e = map_of_rows<T>(&maps.v, v, batch, keys, kv_heads, D, strides + 6, kKeys)) return e;
    if (int e = map_of_rows<T>(&maps.dout, dout, batch, queries, heads, D, strides + 14, kRows)) return e;
    if (int e = map_of_contiguous_rows<T>(&maps.dq, dq, batch, queries, heads, D, 64)) return e;
    const Workspace w = {static_cast<const RowStats*>(stats),        static_cast<const RowSpans*>(spans),
                         static_cast<const TileHulls*>(hulls),       drawn + 1,
                         int((queries + kTileRows - 1) / kTileRows), int(bounds_batches)};
    const Sizes size = {int(batch), int(queries), int(keys), int(heads), int(kv_heads)};
    const int grid = int(items < blocks ? items : blocks);
    return launch({dim3(grid), dim3(kThreads), sizeof(Shared<T, D>), static_cast<cudaStream_t>(stream)},
                  attention_bwd_queries<T, D>, maps, w, size, int(items), scale);
  });
}
