// dQ, dK and dV of attention at once, for deterministic=False and D <= 128: as attention_bwd_keys_sm90a.cu, and dS^T,
// transposed through shared memory, also gives
//
//   dQ = scale dS K,   64 queries a step, D / 2 columns a warpgroup (64 for D = 96)
//
// A block owns 128 keys of one kv head. 10 D flops a pair, where the two kernels need 14. TMA reductions add dQ
// (float32) to `sums` in the order in which blocks come, so its last bits vary; those of dK and dV do not. sums (batch,
// heads, tiles, D / 8, 128, 4) holds the accumulators as 128 threads hold them, so copies are contiguous. A second
// kernel rounds it to dq: 10 D bytes a row and head. Rows of K to which no row of the batch entry attends become zeros
// once, because 0 * NaN is NaN: unless some query tile attends to all keys of the item, the rows that touch it are
// searched.
#include "attention_bwd_keys_sm90a.cuh"
#include "illada/api.h"

using namespace illada;

namespace {

constexpr int kKeys = 128, kStageCount = 2;
constexpr int kGradients = 3;  // buffers of dS, so that one warpgroup may be a step ahead of the other

template <int D> struct Shape {
  static constexpr int kStages = kStageCount, kColumns = D == 64 ? 32 : 64;  // kColumns: of dQ, a warpgroup
  static constexpr int kKeyTile = pieces<D> * kKeys * 64, kQueryTile = pieces<D> * kTileRows * 64;  // elements
};

template <class T, int D> struct Shared {
  using S = Shape<D>;
  T k[S::kKeyTile], v[S::kKeyTile], q[S::kStages][S::kQueryTile], dout[S::kStages][S::kQueryTile];
  T ds[kGradients][kKeys * kTileRows];  // [keys / 64][64 queries][64 keys]
  alignas(1024) float dq[kTileRows * D];
  RowStats stats[S::kStages];
  RowSpans spans[S::kStages][kTileRows];  // of partial tiles only
  uint32_t attended[kConsumerWarps][kKeys / 32];  // keys that some row found by the warp attends to
  int step[S::kStages], tile[S::kStages], item;  // tile: of sums
  int search[2];  // query tiles to search for rows that attend; none if equal
  uint64_t keys_full, keys_empty, full[S::kStages], empty[S::kStages];
  uint64_t ds_full[kGradients], ds_empty[kGradients];
};

// Decides, in the producer's warp, which query tiles to search for attended keys: none if one of them attends to all
// keys.
template <class Shared>
ILLADA_DEVICE void find_search(Shared& s, const Workspace& w, const Sizes& size, const Item& item) {
  const int lane = threadIdx.x % 32, end = Min{}(item.key + kKeys, size.keys);
  int from = w.tiles, to = 0;
  for (int first = 0; first < w.tiles; first += 32) {
    bool touched = false, whole = false;
    if (first + lane < w.tiles) {
      const TileHulls& tile = w.hulls[w.bounds_at(item.batch, first + lane)];
      touched = tile.hulls.touches(item.key, end), whole = tile.hulls.all_attend(item.key, end);
    }
    if (__any_sync(~0u, whole)) {
      to = 0;
      break;
    }
    const unsigned tiles = __ballot_sync(~0u, touched);
    if (tiles) from = Min{}(from, first + __ffs(tiles) - 1), to = first + 32 - __clz(tiles);
  }
  if (lane == 0) s.search[0] = Min{}(from, to), s.search[1] = to;
}

// Zeros the rows of K to which no row of the batch entry attends, even if NaN or inf.
template <class T, int D>
ILLADA_DEVICE void clear_unattended_keys(Shared<T, D>& s, const Workspace& w, const Item& item) {
  if (s.search[0] == s.search[1]) return;
  const RowSpans* spans = w.spans + w.bounds_at(item.batch, 0) * kTileRows;
  uint32_t mine[kKeys / 32] = {};
  for (int row = s.search[0] * kTileRows + threadIdx.x; row < s.search[1] * kTileRows; row += kConsumers) {
    const RowSpans span = spans[row];
#pragma unroll
    for (int word = 0; word < kKeys / 32; ++word) mine[word] |= keys_of(span, item.key + word * 32);
  }
  clear_other_keys<D>(s.k, s.attended, mine);
}

// Stores a warpgroup's dS^T (64 keys, 64 queries), packed, as (64 queries, 64 keys).
ILLADA_DEVICE void store_transposed(void* to, const uint32_t (&ds)[kTileRows / 16][4]) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, key = threadIdx.x % 128 / 32 * 16 + matrix % 2 * 8;
#pragma unroll
  for (int i = 0; i < kTileRows / 16; ++i) {
    const int query = i * 16 + matrix / 2 * 8 + lane % 8;
    stmatrix<true>(static_cast<uint8_t*>(to) + query * 128 + (key * 2 ^ query % 8 * 16), ds[i]);
  }
}

// dq (64 queries, columns) = ds (64 queries, keys) k; `k` points to the first of the columns.
template <class T, int R> ILLADA_DEVICE void multiply_keys(float (&dq)[R], const T* ds, const T* k) {
  const uint64_t a = smem_desc(ds), b = smem_desc(k, 1024, kKeys * 128);
  reg_fence(dq);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kKeys; i += 16)
    wgmma<T, Major::K, Major::MN>(dq, a + units(i / 64 * kTileRows * 64 + i % 64), b + units(i * 64), i > 0);
  wgmma_commit();
}

// Adds dq to this warpgroup's columns of sums. The copy is still under way on return.
template <int D, int R> ILLADA_DEVICE void add_to_sums(float* staged, float* sums, const float (&dq)[R]) {
  const int warpgroup = threadIdx.x / 128, t = threadIdx.x % 128, first = warpgroup * R / 4;
  const int count = Min{}(R / 4, D / 8 - first);  // blocks of 8 columns; D = 96 has 4 in its second half
  if (t == 0) bulk_wait_read<0>();  // the dq before this one has left
  bar_sync(2 + warpgroup, 128);
#pragma unroll
  for (int i = 0; i < R / 4; ++i)
    if (i < count)
      *reinterpret_cast<float4*>(staged + ((first + i) * 128 + t) * 4) =
          make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  fence_proxy_async();
  bar_sync(2 + warpgroup, 128);
  if (t == 0) {
    bulk_reduce_add(sums + first * 512, staged + first * 512, count * 512 * sizeof(float));
    bulk_commit();
  }
}

// A dS of which dQ is not yet computed.
struct Pending {
  int number;  // of the block's dS
  int tile;  // of sums; -1: none
};

// Starts dq = dS K for the pending dS, which both warpgroups stored a step ago.
template <class T, int D>
ILLADA_DEVICE void start_dq(Shared<T, D>& s, const Pending& pending, float (&dq)[Shape<D>::kColumns / 2]) {
  constexpr int kAt = D == 64 ? 32 : kKeys * 64;  // where the second warpgroup's columns of K begin
  const int buffer = pending.number % kGradients;
  mbar_wait(&s.ds_full[buffer], pending.number / kGradients % 2);
  multiply_keys(dq, s.ds[buffer], s.k + warpgroup_of_thread() * kAt);
}
template <class T, int D>
ILLADA_DEVICE void finish_dq(Shared<T, D>& s, const Pending& pending, float* sums,
                             float (&dq)[Shape<D>::kColumns / 2]) {
  wgmma_wait<0>();
  reg_fence(dq);
  arrive_by_warp(&s.ds_empty[pending.number % kGradients]);
  add_to_sums<D>(s.dq, sums + int64_t(pending.tile) * kTileRows * D, dq);
}

// Adds one query tile's share to dk and dv (64 keys, D), and the tile before it to sums. dQ is a step late, so that no
// warpgroup waits for the other's dS.
template <class T, int D>
ILLADA_DEVICE void add_queries(Shared<T, D>& s, float (&dk)[columns_of<D> / 2], float (&dv)[columns_of<D> / 2],
                               float* sums, int stage, int key, float scale_log2, Pending& pending) {
  const int warpgroup = warpgroup_of_thread(), rows_at = warpgroup * 64 * 64;
  const Pending mine = {pending.number + 1, s.tile[stage]};
  const int buffer = mine.number % kGradients;
  float p[kTileRows / 2], ds[kTileRows / 2];  // (64 keys, 64 queries)
  uint32_t p_operand[kTileRows / 16][4], ds_operand[kTileRows / 16][4];
  const Step step = Step(s.step[stage]);
  if (step == kEmptyRows) clear_empty_rows<T, D>(s.q[stage], s.dout[stage], s.spans[stage]);
  multiply_transposed<D, kKeys>(p, s.k + rows_at, s.q[stage]);
  multiply_transposed<D, kKeys>(ds, s.v + rows_at, s.dout[stage]);
  uint32_t bits = 0;
  if (step != kFull) bits = attending(s.spans[stage], key);

  wgmma_wait<1>();
  reg_fence(p);
  probabilities(p, s.stats[stage], step, bits, scale_log2);
  pack_operand<T>(p_operand, p);
  multiply_add<T>(dv, p_operand, s.dout[stage]);

  wgmma_wait<1>();
  reg_fence(ds);
  score_gradients(ds, p, s.stats[stage], step, bits);
  pack_operand<T>(ds_operand, ds);
  mbar_wait(&s.ds_empty[buffer], mine.number / kGradients % 2 ^ 1);
  store_transposed(s.ds[buffer] + rows_at, ds_operand);
  fence_proxy_async();
  arrive_by_warp(&s.ds_full[buffer]);
  multiply_add<T>(dk, ds_operand, s.q[stage]);
  if (pending.tile >= 0) {
    float dq[Shape<D>::kColumns / 2];
    start_dq(s, pending, dq);
    wgmma_wait<1>();
    reg_fence(dk);
    reg_fence(dv);
    arrive_by_warp(&s.empty[stage]);
    finish_dq(s, pending, sums, dq);
  } else {
    wgmma_wait<0>();
    reg_fence(dk);
    reg_fence(dv);
    arrive_by_warp(&s.empty[stage]);
  }
  pending = mine;
}

template <class T, int D>
ILLADA_DEVICE void consume(Shared<T, D>& s, const Maps& maps, const Workspace& w, const Sizes& size, float* sums,
                           float scale) {
  using S = Shape<D>;
  const int warpgroup = warpgroup_of_thread(), t = threadIdx.x % 128;
  int n = 0;
  Pending pending = {-1, -1};
  for (int turn = 0;; ++turn) {
    mbar_wait(&s.keys_full, turn % 2);
    if (s.item < 0) break;
    const Item item = item_at<kKeys>(s.item, size);
    clear_unattended_keys(s, w, item);
    const int key = item.key + warpgroup * 64 + row_of_thread();  // and key + 8
    float dk[columns_of<D> / 2] = {}, dv[columns_of<D> / 2] = {};
    for (bool more = true; more; ++n) {
      const int stage = n % S::kStages;
      mbar_wait(&s.full[stage], n / S::kStages % 2);
      more = s.step[stage] != kEnd;
      if (more) add_queries<T, D>(s, dk, dv, sums, stage, key, scale * kLog2e, pending);
      else arrive_by_warp(&s.empty[stage]);
    }
    if (pending.tile >= 0) {
      float dq[S::kColumns / 2];
      start_dq(s, pending, dq);
      finish_dq(s, pending, sums, dq);
      pending.tile = -1;
    }
    bar_sync(1, kConsumers);  // both warpgroups have read all of K
    T* const of_k = s.k + warpgroup * 64 * 64;
    T* const of_v = s.v + warpgroup * 64 * 64;
    store_rows<kKeys>(of_k, dk, scale);
    store_rows<kKeys>(of_v, dv, 1.0f);
    fence_proxy_async();
    bar_sync(2 + warpgroup, 128);
    if (t == 0) {
      for (int piece = 0; piece < pieces<D>; ++piece) {
        const int from = piece * kKeys * 64, first = item.key + warpgroup * 64;
        tma_store(&maps.dk, of_k + from, piece * 64, first, item.kv_head, item.batch);
        tma_store(&maps.dv, of_v + from, piece * 64, first, item.kv_head, item.batch);
      }
      bulk_commit();
      bulk_wait_read<0>();
      mbar_arrive(&s.keys_empty);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_fused(const __grid_constant__ Maps maps, Workspace workspace, Sizes size, int items, float* sums,
                        float scale) {
  Shared<T, D>& s = *reinterpret_cast<Shared<T, D>*>(dynamic_smem());
  if (threadIdx.x == 0) {
    mbar_init(&s.keys_full, 1);
    mbar_init(&s.keys_empty, kWarpgroups);
    for (int i = 0; i < Shape<D>::kStages; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kGradients; ++i) {
      mbar_init(&s.ds_full[i], kConsumerWarps);
      mbar_init(&s.ds_empty[i], kConsumerWarps);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    reg_increase<232>();
    consume<T, D>(s, maps, workspace, size, sums, scale);
  } else {
    reg_decrease<40>();
    if (threadIdx.x < kConsumers + 32)
      produce<D, kKeys>(
          s, maps, workspace, size, items, [&](const Item& item) { find_search(s, workspace, size, item); },
          [&](int stage, int tile) { s.tile[stage] = tile; });
  }
}

// Computes dq (batch, queries, heads, D) = scale * sums. One block owns 64 rows of one head.
constexpr int kRoundThreads = 256;
template <class T, int D>
__global__ void __launch_bounds__(kRoundThreads)
    round_sums(const float* sums, T* dq, Sizes size, int tiles, float scale) {
  const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % size.heads, batch = blockIdx.x / tiles / size.heads;
  const float4* from = reinterpret_cast<const float4*>(sums) + int64_t(blockIdx.x) * (kTileRows * D / 4);
  for (int i = threadIdx.x; i < D / 8 * 32; i += kRoundThreads) {
    const int columns = i % (D / 8), rows = i / (D / 8), row = tile * kTileRows + rows / 8 * 16 + rows % 8;
    Vec16<T> x[2];  // 8 columns of `row` and of row + 8, held by 4 threads
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 four = __ldcs(from + columns * 128 + rows * 4 + j);
      x[0].at[2 * j] = from_float<T>(scale * four.x), x[0].at[2 * j + 1] = from_float<T>(scale * four.y);
      x[1].at[2 * j] = from_float<T>(scale * four.z), x[1].at[2 * j + 1] = from_float<T>(scale * four.w);
    }
    for (int j = 0; j < 2; ++j)
      if (row + j * 8 < size.queries)
        store16(dq + ((int64_t(batch) * size.queries + row + j * 8) * size.heads + head) * D + columns * 8, x[j]);
  }
}

}  // namespace

extern "C" int illada_attention_bwd_fused_sm90a(int dtype, const void* q, const void* k, const void* v,
                                                const void* dout, const void* stats, const void* spans,
                                                const void* hulls, int32_t* drawn, float* sums, void* dq, void* dk,
                                                void* dv, int64_t batch, int64_t queries, int64_t keys, int64_t heads,
                                                int64_t kv_heads, int64_t dim, int64_t bounds_batches,
                                                const int64_t* strides, float scale, int blocks, void* stream) {
  return for_type_and_dim(ILLADA_BF16, ILLADA_F16, dtype, dim, [&](auto zero, auto head_dim) -> int {
    using T = decltype(zero);
    constexpr int D = decltype(head_dim)::value;
    if constexpr (D > 128) {
      return int(cudaErrorInvalidValue);
    } else {
      const int64_t items = (keys + kKeys - 1) / kKeys * kv_heads * batch;
      if (items >= int64_t(1) << 30) return int(cudaErrorInvalidValue);
      Maps maps;
      if (int e = make_maps<T, D, kKeys>(&maps, q, k, v, dout, dk, dv, batch, queries, keys, heads, kv_heads, strides))
        return e;
      const int tiles = int((queries + kTileRows - 1) / kTileRows);
      const Workspace w = {static_cast<const RowStats*>(stats),
                           static_cast<const RowSpans*>(spans),
                           static_cast<const TileHulls*>(hulls),
                           drawn,
                           tiles,
                           int(bounds_batches)};
      const Sizes size = {int(batch), int(queries), int(keys), int(heads), int(kv_heads)};
      const cudaStream_t s = static_cast<cudaStream_t>(stream);
      const int grid = int(items < blocks ? items : blocks);
      if (int e = launch({dim3(grid), dim3(kThreads), sizeof(Shared<T, D>), s}, attention_bwd_fused<T, D>, maps, w,
                         size, int(items), sums, scale))
        return e;
      return launch({dim3(uint32_t(tiles * heads * batch)), dim3(kRoundThreads), 0, s}, round_sums<T, D>, sums,
                    static_cast<T*>(dq), size, tiles, scale);
    }
  });
}
