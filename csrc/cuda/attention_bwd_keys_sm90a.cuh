// What the kernels whose blocks own keys (attention_bwd_keys, attention_bwd_fused) share: items, the producer, masks.
#pragma once
#include "attention_bwd_sm90a.cuh"

namespace illada {

struct Item {
  int key, kv_head, batch;  // key: the first of the key tile
};

// Orders items by ascending key, outermost, because under causal masks the first key tiles have the most queries.
template <int KEYS> ILLADA_DEVICE Item item_at(int index, const Sizes& size) {
  const int heads = size.batch * size.kv_heads;
  return {index / heads * KEYS, index % size.kv_heads, index % heads / size.kv_heads};
}

struct Maps {
  CUtensorMap q, k, v, dout, dk, dv;
};
template <class T, int D, int KEYS>
int make_maps(Maps* maps, const void* q, const void* k, const void* v, const void* dout, void* dk, void* dv,
              int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, const int64_t* strides) {
  if (int e = map_of_rows<T>(&maps->q, q, batch, queries, heads, D, strides, kTileRows)) return e;
  if (int e = map_of_rows<T>(&maps->k, k, batch, keys, kv_heads, D, strides + 3, KEYS)) return e;
  if (int e = map_of_rows<T>(&maps->v, v, batch, keys, kv_heads, D, strides + 6, KEYS)) return e;
  if (int e = map_of_rows<T>(&maps->dout, dout, batch, queries, heads, D, strides + 14, kTileRows)) return e;
  if (int e = map_of_contiguous_rows<T>(&maps->dk, dk, batch, keys, kv_heads, D, 64)) return e;
  if (int e = map_of_contiguous_rows<T>(&maps->dv, dv, batch, keys, kv_heads, D, 64)) return e;
  return 0;
}

// ---- producer: one warp ------------------------------------------------------------------------------------------
// Loads query tile `tile` of one head into a stage.
template <int D, class Shared>
ILLADA_DEVICE void load_queries(Shared& s, const Maps& maps, const Workspace& w, const Sizes& size, Step step, int tile,
                                int head, int batch, int stage) {
  const bool masked = step != kFull;
  uint64_t* full = &s.full[stage];
  s.step[stage] = step;
  mbar_arrive_expect_tx(full, 2 * sizeof(s.q[0]) + sizeof(RowStats) + (masked ? sizeof(s.spans[0]) : 0));
  load_tile<D, kTileRows>(s.q[stage], &maps.q, full, tile * kTileRows, head, batch);
  load_tile<D, kTileRows>(s.dout[stage], &maps.dout, full, tile * kTileRows, head, batch);
  bulk_load(&s.stats[stage], w.stats + (int64_t(batch) * size.heads + head) * w.tiles + tile, sizeof(RowStats), full);
  if (masked) bulk_load(s.spans[stage], w.spans + w.bounds_at(batch, tile) * kTileRows, sizeof(s.spans[0]), full);
}

// Fills stages for every item of the block. All lanes call on_item(item) before an item is announced; one lane calls
// on_stage(stage, index of its stats) before a stage is.
template <int D, int KEYS, class Shared, class OnItem, class OnStage>
ILLADA_DEVICE void produce(Shared& s, const Maps& maps, const Workspace& w, const Sizes& size, int items,
                           OnItem on_item, OnStage on_stage) {
  using S = typename Shared::S;
  const int lane = threadIdx.x % 32, group = size.heads / size.kv_heads;
  int n = 0;  // stages filled so far
  for (int turn = 0, index = blockIdx.x;; ++turn) {
    const Item item = item_at<KEYS>(index, size);
    if (lane == 0) {
      mbar_wait(&s.keys_empty, turn % 2 ^ 1);
      s.item = index < items ? index : -1;
    }
    if (index >= items) {
      if (lane == 0) mbar_arrive(&s.keys_full);
      break;
    }
    on_item(item);
    int next = 0;
    if (lane == 0) {
      next = draw_item(w.drawn);
      mbar_arrive_expect_tx(&s.keys_full, 2 * sizeof(s.k));
      load_tile<D, KEYS>(s.k, &maps.k, &s.keys_full, item.key, item.kv_head, item.batch);
      load_tile<D, KEYS>(s.v, &maps.v, &s.keys_full, item.key, item.kv_head, item.batch);
    }
    for (int first = 0; first < w.tiles; first += 32) {  // each lane looks at one query tile
      bool touched = false, masked = false, empty_rows = false;
      if (first + lane < w.tiles) {
        const TileHulls& tile = w.hulls[w.bounds_at(item.batch, first + lane)];
        touched = tile.hulls.touches(item.key, item.key + KEYS);
        masked = !tile.hulls.all_attend(item.key, item.key + KEYS);
        empty_rows = tile.empty_rows;
      }
      unsigned tiles = __ballot_sync(~0u, touched);
      const unsigned partial = __ballot_sync(~0u, masked), cleaned = __ballot_sync(~0u, empty_rows);
      if (lane == 0)
        for (; tiles; tiles &= tiles - 1) {
          const int bit = __ffs(tiles) - 1;
          const Step step = cleaned >> bit & 1 ? kEmptyRows : partial >> bit & 1 ? kPartial : kFull;
          for (int i = 0; i < group; ++i, ++n) {
            const int stage = n % S::kStages;
            mbar_wait(&s.empty[stage], n / S::kStages % 2 ^ 1);
            const int head = item.kv_head * group + i;
            on_stage(stage, (item.batch * size.heads + head) * w.tiles + first + bit);
            load_queries<D>(s, maps, w, size, step, first + bit, head, item.batch, stage);
          }
        }
      __syncwarp();
    }
    if (lane == 0) {
      mbar_wait(&s.empty[n % S::kStages], n / S::kStages % 2 ^ 1);
      s.step[n % S::kStages] = kEnd;
      mbar_arrive(&s.full[n % S::kStages]);
      ++n;
    }
    index = __shfl_sync(~0u, next, 0);
  }
}

// ---- consumers ---------------------------------------------------------------------------------------------------
// Zeros Q and dO of rows without keys, even if NaN or inf. Four threads a row.
template <class T, int D> ILLADA_DEVICE void clear_empty_rows(T* q, T* dout, const RowSpans* spans) {
  const int row = threadIdx.x / 4, part = threadIdx.x % 4 * 16;
  if (spans[row].empty())
    for (int piece = 0; piece < pieces<D>; ++piece)
      for (int i = 0; i < 16; i += 8) {
        const int at = (piece * kTileRows + row) * 64 + part + i;
        store16(q + at, Vec16<T>{});
        store16(dout + at, Vec16<T>{});
      }
  fence_proxy_async();
  bar_sync(1, kConsumers);
}

// Returns a mask: bit i says whether the key and the query of this thread's accumulator i attend. Keys: `key`, key + 8.
ILLADA_DEVICE uint32_t attending(const RowSpans* spans, int key) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i)
    if (i / 2 % 2 == 0) {
      const RowSpans& span = spans[i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2];
      bits |= uint32_t(span.holds(key)) << i | uint32_t(span.holds(key + 8)) << (i + 2);
    }
  return bits;
}

// Sets accumulators whose bit is 0 to x.
ILLADA_DEVICE void select(float (&s)[32], uint32_t bits, float x) {
#pragma unroll
  for (int i = 0; i < 32; ++i) s[i] = bits >> i & 1 ? s[i] : x;
}

// Returns the values of the two neighbouring queries of accumulators i and i + 1.
ILLADA_DEVICE float2 of_rows(const float* values, int i) {
  return reinterpret_cast<const float2*>(values)[i / 4 * 4 + threadIdx.x % 4];
}

// Turns S^T into P^T.
ILLADA_DEVICE void probabilities(float (&p)[32], const RowStats& stats, Step step, uint32_t bits, float scale_log2) {
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const float2 lse = of_rows(stats.lse, i);
    p[i] = fmaf(p[i], scale_log2, -lse.x);
    p[i + 1] = fmaf(p[i + 1], scale_log2, -lse.y);
  }
  if (step != kFull) select(p, bits, -infinity());
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = fast_exp2(p[i]);
}

// Turns dP^T into dS^T.
ILLADA_DEVICE void score_gradients(float (&ds)[32], const float (&p)[32], const RowStats& stats, Step step,
                                   uint32_t bits) {
  if (step != kFull) select(ds, bits, 0);
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    const float2 delta = of_rows(stats.delta, i);
    ds[i] = p[i] * (ds[i] - delta.x);
    ds[i + 1] = p[i + 1] * (ds[i + 1] - delta.y);
  }
}

}  // namespace illada
