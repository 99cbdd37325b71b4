// What a block of attention's forward works on, and the four warps that serve its warpgroups: one plans the next item,
// one loads queries, one loads keys and values through two-stage rings, one zeros values to which no row attends.
#pragma once
#include "attention_tile_sm90a.cuh"
#include "key_ranges.cuh"

namespace {

using namespace illada;

constexpr int kStages = 2, kRows = 64;  // stages of a ring; rows of a warpgroup

// What depends on head_dim. For head_dim 96 the second piece of a tile is half zeros, which the MMAs do not read.
template <int D> struct Tile {
  static constexpr int warpgroups = D == 256 ? 2 : 3;
  static constexpr int keys = D == 256 ? 80 : 128;
  static constexpr int plans = D == 256 ? 1 : 2;  // one for 256, because shared memory has no room for two
  static constexpr int threads = (warpgroups + 1) * 128;
  // Registers of a thread, as setmaxnreg divides the 65536.
  static constexpr int consumer_registers = D == 256 ? 232 : 160, producer_registers = D == 256 ? 40 : 32;
};

struct Problem {
  KeyBounds bounds;
  void* out;  // (batch, queries, heads, D)
  float *lse, *parts;  // parts: of `splits` shares of the keys, results (.., D), then log-sum-exps; or null
  int32_t* counter;  // counts items drawn after each block's first, 0 at the start; null: blocks take items in turns
  int64_t batch;
  int queries, heads, group, tiles, pack, splits, items;
  float scale, scale_log2;
  ILLADA_DEVICE int warpgroup_queries() const { return kRows / pack; }  // a row is a query and a head
};

// What all warps need to know about an item.
template <int D> struct Plan {
  int batch, head, query, split;  // the first head and query; batch < 0 ends the items
  int begin, end;  // of the key tiles to visit
  KeyTiles tiles;
  Hulls hulls[Tile<D>::warpgroups];
  int4 ranges[Tile<D>::warpgroups][kRows];  // of each query: lo[0], hi[0], lo[1], hi[1]
  ILLADA_DEVICE int first_key(int n) const { return tiles.at(n) * Tile<D>::keys; }  // of the n-th key tile
};

template <class T, int D> struct Shared {
  T q[Tile<D>::warpgroups][pieces<D> * kRows * 64];
  T k[kStages][pieces<D> * Tile<D>::keys * 64], v[kStages][pieces<D> * Tile<D>::keys * 64];
  Plan<D> plan[Tile<D>::plans];
  uint64_t q_full[Tile<D>::warpgroups], q_empty[Tile<D>::warpgroups];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages], v_clean[kStages];
  uint64_t plan_full[Tile<D>::plans], plan_empty[Tile<D>::plans];
};

// Calls body(number of the item in this block, plan) for every item, with the whole warp, then releases the plan.
template <int D, class S, class Body> ILLADA_DEVICE void for_each_item(S& shared, Body body) {
  for (int i = 0;; ++i) {
    const int slot = i % Tile<D>::plans;
    mbar_wait(&shared.plan_full[slot], i / Tile<D>::plans % 2);
    if (shared.plan[slot].batch < 0) return;
    body(i, shared.plan[slot]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbar_arrive(&shared.plan_empty[slot]);
  }
}

// ---- planning ------------------------------------------------------------------------------------------------------
// Item numbers count, from the fastest: splits; heads (those that share keys meet in L2); query tiles from the last to
// the first, because under most masks later rows have more keys and long items should not come last; batch entries.
template <int D> ILLADA_DEVICE void place_item(const Problem& p, int item, Plan<D>& plan) {
  const int heads = p.heads / p.pack;
  plan.split = item % p.splits;
  plan.head = item / p.splits % heads * p.pack;
  plan.query = (p.tiles - 1 - item / p.splits / heads % p.tiles) * p.warpgroup_queries() * Tile<D>::warpgroups;
  plan.batch = item / p.splits / heads / p.tiles;
}

// Plans an item with one warp, which has few registers: loops are not unrolled, and the bounds of all rows come
// straight to shared memory at once. So one global load stands before a block's first bulk copy, none without bounds.
template <int D> ILLADA_DEVICE void fill_plan(const Problem& p, int item, Plan<D>& plan) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) place_item<D>(p, item, plan);
  __syncwarp();
  const auto query_of = [&](int wg, int i) { return plan.query + wg * p.warpgroup_queries() + i; };
  const auto holds = [&](int wg, int i) { return i < p.warpgroup_queries() && query_of(wg, i) < p.queries; };
#pragma unroll 1
  for (int row = lane; p.bounds.data && row < Tile<D>::warpgroups * kRows; row += 32) {
    const int wg = row / kRows, i = row % kRows;
    if (holds(wg, i)) copy_async(&plan.ranges[wg][i], p.bounds.at(plan.batch, query_of(wg, i)));
  }
  copy_async_wait();
#pragma unroll 1
  for (int wg = 0; wg < Tile<D>::warpgroups; ++wg) {
    Hulls hulls;
#pragma unroll 1
    for (int i = lane; i < kRows; i += 32) {
      RowRanges r = {{0, 0}, {0, 0}};
      if (holds(wg, i)) {
        r = p.bounds.data ? p.bounds.normal(plan.ranges[wg][i]) : p.bounds.all();
        hulls.add(r);
      }
      plan.ranges[wg][i] = make_int4(r.lo[0], r.hi[0], r.lo[1], r.hi[1]);
    }
    hulls.reduce_over_warp();
    if (lane == 0) plan.hulls[wg] = hulls;
  }
  if (lane != 0) return;
  Hulls of_tile = plan.hulls[0];
#pragma unroll 1
  for (int wg = 1; wg < Tile<D>::warpgroups; ++wg) of_tile.merge(plan.hulls[wg]);
  const KeyTiles tiles(of_tile, Tile<D>::keys);
  plan.tiles = tiles;
  plan.begin = int(int64_t(tiles.count()) * plan.split / p.splits);
  plan.end = int(int64_t(tiles.count()) * (plan.split + 1) / p.splits);
}

template <int D, class S> ILLADA_DEVICE void plan_items(S& shared, const Problem& p) {
  const int lane = threadIdx.x % 32;
  for (int i = 0;; ++i) {
    const int slot = i % Tile<D>::plans;
    mbar_wait(&shared.plan_empty[slot], i / Tile<D>::plans % 2 ^ 1);
    int item = blockIdx.x + i * gridDim.x;
    if (p.counter && i > 0) {  // the first has the block's number, so that no load stands before it
      if (lane == 0) item = gridDim.x + atomicAdd(p.counter, 1);
      item = __shfl_sync(~0u, item, 0);
    }
    if (item < p.items) fill_plan<D>(p, item, shared.plan[slot]);
    else if (lane == 0) shared.plan[slot].batch = -1;
    __syncwarp();
    if (lane == 0) mbar_arrive(&shared.plan_full[slot]);
    if (item >= p.items) return;
  }
}

// ---- copying -------------------------------------------------------------------------------------------------------
template <int D, class S> ILLADA_DEVICE void copy_queries(S& shared, const Problem& p, const CUtensorMap* map) {
  for_each_item<D>(shared, [&](int i, const Plan<D>& plan) {
    if (threadIdx.x % 32) return;
    for (int wg = 0; wg < Tile<D>::warpgroups; ++wg) {
      mbar_wait(&shared.q_empty[wg], i % 2 ^ 1);
      mbar_arrive_expect_tx(&shared.q_full[wg], pieces<D> * p.warpgroup_queries() * p.pack * 128);
      for (int piece = 0; piece < pieces<D>; ++piece)
        tma_load(shared.q[wg] + piece * kRows * 64, map, &shared.q_full[wg], piece * 64, plan.head,
                 plan.query + wg * p.warpgroup_queries(), plan.batch);
    }
  });
}

template <int D, class S>
ILLADA_DEVICE void copy_keys_and_values(S& shared, const Problem& p, const CUtensorMap* k, const CUtensorMap* v) {
  int use = 0;  // stages of the rings used so far
  for_each_item<D>(shared, [&](int, const Plan<D>& plan) {
    if (threadIdx.x % 32) return;
    const int head = plan.head / p.group;
    for (int n = plan.begin; n < plan.end; ++n, ++use) {
      const int stage = use % kStages, phase = use / kStages % 2, key = plan.first_key(n);
      mbar_wait(&shared.k_empty[stage], phase ^ 1);
      mbar_arrive_expect_tx(&shared.k_full[stage], sizeof(shared.k[stage]));
      load_tile<D, Tile<D>::keys>(shared.k[stage], k, &shared.k_full[stage], key, head, plan.batch);
      mbar_wait(&shared.v_empty[stage], phase ^ 1);
      mbar_arrive_expect_tx(&shared.v_full[stage], sizeof(shared.v[stage]));
      load_tile<D, Tile<D>::keys>(shared.v[stage], v, &shared.v_full[stage], key, head, plan.batch);
    }
  });
}

// ---- values that no row of the tile may read -----------------------------------------------------------------------
// Returns whether a key tile may hold keys to which no row attends: their probability 0 is not enough, because 0 * NaN
// is NaN.
template <int D> ILLADA_DEVICE bool needs_cleaning(const Problem& p, const Plan<D>& plan, int start) {
  const int end = Min{}(start + Tile<D>::keys, p.bounds.num_keys);  // keys beyond the last were loaded as zeros
  bool all = false;
#pragma unroll
  for (int wg = 0; wg < Tile<D>::warpgroups; ++wg) all |= plan.hulls[wg].cover(start, end) == Cover::all;
  return !all;
}

// Zeros, with one warp, the values of a key tile to which no row attends.
template <int D, class T> ILLADA_DEVICE void clean_values(const Problem& p, const Plan<D>& plan, int start, T* tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < Tile<D>::keys; first += 32) {
    uint32_t read = 0;  // bit j: some row attends to key start + first + j
    for (int i = lane; i < Tile<D>::warpgroups * kRows; i += 32) {
      const int4 r = plan.ranges[i / kRows][i % kRows];
      const int origin = start + first;
      read |= bits_between(r.x - origin, r.y - origin) | bits_between(r.z - origin, r.w - origin);
    }
    read = __reduce_or_sync(~0u, read);
    const int count = Min{}(32, Tile<D>::keys - first);
    for (int j = lane / 8; j < count; j += 4)  // a row is 8 times 16 bytes; four rows at a time
      if (!(read >> j & 1))
        for (int piece = 0; piece < pieces<D>; ++piece)
          store16(tile + (piece * Tile<D>::keys + first + j) * 64 + lane % 8 * 8, Vec16<T>{});
  }
  fence_proxy_async();
}

template <int D, class S> ILLADA_DEVICE void keep_values_clean(S& shared, const Problem& p) {
  int use = 0;
  for_each_item<D>(shared, [&](int, const Plan<D>& plan) {
    for (int n = plan.begin; n < plan.end; ++n, ++use) {
      const int stage = use % kStages, start = plan.first_key(n);
      mbar_wait(&shared.v_full[stage], use / kStages % 2);
      if (needs_cleaning<D>(p, plan, start)) clean_values<D>(p, plan, start, shared.v[stage]);
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        mbar_arrive(&shared.v_clean[stage]);
        mbar_arrive(&shared.v_empty[stage]);
      }
    }
  });
}

}  // namespace
