// dK and dV of attention. S^T = K Q^T, dP^T = V dO^T, P = exp2(scale' S - lse), dS = P (dP - delta),
//
//   dV = P^T dO,   dK = scale dS^T Q,   summed over the query heads that share the kv head
//
// A block owns 128 keys (64 for D = 256) of one kv head. K and V stay in shared memory, dK and dV accumulate in
// registers in float32; the block walks the query tiles that touch its keys in ascending order, heads innermost, so
// equal inputs give equal bits. One warp loads Q, dO, lse and delta by TMA. Two warpgroups own 64 keys each, or for D =
// 256 the same 64 keys and half of the columns each; P^T and dS^T are A operands from registers. 8 D flops a pair (12 D
// for D = 256, where both compute S and dP). In partial tiles, pairs that do not attend get P = dS = 0, and rows
// without keys become zeros in shared memory, because 0 * NaN is NaN. A NaN in K or V stays in its own row of S^T.
#include "attention_bwd_keys_sm90a.cuh"
#include "illada/api.h"

using namespace illada;

namespace {

template <class T, int D> struct Shape {
  static constexpr int kSplit = D > 128 ? 2 : 1;  // warpgroups that share 64 keys
  static constexpr int kKeys = 128 / kSplit, kColumns = columns_of<D> / kSplit, kStages = 2;
  static constexpr int kKeyTile = pieces<D> * kKeys * 64, kQueryTile = pieces<D> * kTileRows * 64;  // elements
};

template <class T, int D> struct Shared {
  using S = Shape<T, D>;
  T k[S::kKeyTile], v[S::kKeyTile], q[S::kStages][S::kQueryTile], dout[S::kStages][S::kQueryTile];
  RowStats stats[S::kStages];
  RowSpans spans[S::kStages][kTileRows];  // of partial tiles only
  int step[S::kStages], item;
  uint64_t keys_full, keys_empty, full[S::kStages], empty[S::kStages];
};

// ---- consumers: two warpgroups -----------------------------------------------------------------------------------
// Adds one query tile's share to dk and dv (64 keys, columns).
template <class T, int D>
ILLADA_DEVICE void add_queries(Shared<T, D>& s, float (&dk)[Shape<T, D>::kColumns / 2],
                               float (&dv)[Shape<T, D>::kColumns / 2], int stage, int key, int rows_at, int columns_at,
                               float scale_log2) {
  using S = Shape<T, D>;
  float p[kTileRows / 2], ds[kTileRows / 2];  // (64 keys, 64 queries)
  uint32_t p_operand[kTileRows / 16][4], ds_operand[kTileRows / 16][4];
  const Step step = Step(s.step[stage]);
  if (step == kEmptyRows) clear_empty_rows<T, D>(s.q[stage], s.dout[stage], s.spans[stage]);
  multiply_transposed<D, S::kKeys>(p, s.k + rows_at, s.q[stage]);
  multiply_transposed<D, S::kKeys>(ds, s.v + rows_at, s.dout[stage]);
  uint32_t bits = 0;
  if (step != kFull) bits = attending(s.spans[stage], key);

  wgmma_wait<1>();
  reg_fence(p);
  probabilities(p, s.stats[stage], step, bits, scale_log2);
  pack_operand<T>(p_operand, p);
  multiply_add<T>(dv, p_operand, s.dout[stage] + columns_at);

  wgmma_wait<1>();
  reg_fence(ds);
  score_gradients(ds, p, s.stats[stage], step, bits);
  pack_operand<T>(ds_operand, ds);
  multiply_add<T>(dk, ds_operand, s.q[stage] + columns_at);
  wgmma_wait<0>();
  reg_fence(dk);
  reg_fence(dv);
}

template <class T, int D>
ILLADA_DEVICE void consume(Shared<T, D>& s, const Maps& maps, const Sizes& size, float scale) {
  using S = Shape<T, D>;
  const int warpgroup = warpgroup_of_thread(), t = threadIdx.x % 128;
  const int first_row = warpgroup / S::kSplit * 64, first_column = warpgroup % S::kSplit * S::kColumns;
  int n = 0;
  for (int turn = 0;; ++turn) {
    mbar_wait(&s.keys_full, turn % 2);
    if (s.item < 0) break;
    const Item item = item_at<S::kKeys>(s.item, size);
    const int key = item.key + first_row + row_of_thread();  // and key + 8
    float dk[S::kColumns / 2] = {}, dv[S::kColumns / 2] = {};
    for (bool more = true; more; ++n) {
      const int stage = n % S::kStages;
      mbar_wait(&s.full[stage], n / S::kStages % 2);
      more = s.step[stage] != kEnd;
      if (more)
        add_queries<T, D>(s, dk, dv, stage, key, first_row * 64, first_column / 64 * kTileRows * 64, scale * kLog2e);
      arrive_by_warp(&s.empty[stage]);
    }
    // This warpgroup's rows of K and V are free once its four warps have waited for their MMAs; with D = 256 the other
    // warpgroup reads them too.
    S::kSplit > 1 ? bar_sync(1, kConsumers) : bar_sync(2 + warpgroup, 128);
    const int at = first_row * 64 + first_column / 64 * S::kKeys * 64;
    store_rows<S::kKeys>(s.k + at, dk, scale);
    store_rows<S::kKeys>(s.v + at, dv, 1.0f);
    fence_proxy_async();
    bar_sync(2 + warpgroup, 128);
    if (t == 0) {
      for (int column = 0; column < S::kColumns; column += 64) {
        const int from = at + column / 64 * S::kKeys * 64;
        tma_store(&maps.dk, s.k + from, first_column + column, item.key + first_row, item.kv_head, item.batch);
        tma_store(&maps.dv, s.v + from, first_column + column, item.key + first_row, item.kv_head, item.batch);
      }
      bulk_commit();
      bulk_wait_read<0>();
      mbar_arrive(&s.keys_empty);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_keys(const __grid_constant__ Maps maps, Workspace workspace, Sizes size, int items, float scale) {
  Shared<T, D>& s = *reinterpret_cast<Shared<T, D>*>(dynamic_smem());
  if (threadIdx.x == 0) {
    mbar_init(&s.keys_full, 1);
    mbar_init(&s.keys_empty, kWarpgroups);
    for (int i = 0; i < Shape<T, D>::kStages; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], kConsumerWarps);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    reg_increase<232>();
    consume<T, D>(s, maps, size, scale);
  } else {
    reg_decrease<40>();
    if (threadIdx.x < kConsumers + 32)
      produce<D, Shape<T, D>::kKeys>(s, maps, workspace, size, items, [](auto...) {}, [](auto...) {});
  }
}

}  // namespace

extern "C" int illada_attention_bwd_keys_sm90a(int dtype, const void* q, const void* k, const void* v, const void* dout,
                                               const void* stats, const void* spans, const void* hulls, int32_t* drawn,
                                               void* dk, void* dv, int64_t batch, int64_t queries, int64_t keys,
                                               int64_t heads, int64_t kv_heads, int64_t dim, int64_t bounds_batches,
                                               const int64_t* strides, float scale, int blocks, void* stream) {
  return for_type_and_dim(ILLADA_BF16, ILLADA_F16, dtype, dim, [&](auto zero, auto head_dim) -> int {
    using T = decltype(zero);
    constexpr int D = decltype(head_dim)::value, kKeys = Shape<T, D>::kKeys;
    const int64_t items = (keys + kKeys - 1) / kKeys * kv_heads * batch;
    if (items >= int64_t(1) << 30) return int(cudaErrorInvalidValue);
    Maps maps;
    if (int e = make_maps<T, D, kKeys>(&maps, q, k, v, dout, dk, dv, batch, queries, keys, heads, kv_heads, strides))
      return e;
    const Workspace w = {static_cast<const RowStats*>(stats),        static_cast<const RowSpans*>(spans),
                         static_cast<const TileHulls*>(hulls),       drawn,
                         int((queries + kTileRows - 1) / kTileRows), int(bounds_batches)};
    const Sizes size = {int(batch), int(queries), int(keys), int(heads), int(kv_heads)};
    const int grid = int(items < blocks ? items : blocks);
    return launch({dim3(grid), dim3(kThreads), sizeof(Shared<T, D>), static_cast<cudaStream_t>(stream)},
                  attention_bwd_keys<T, D>, maps, w, size, int(items), scale);
  });
}
