// Attention forward on Hopper: out = softmax(scale q k^T) v and its log-sum-exp, over at most two key ranges a row.
//
// A block takes one item after another: 64 rows for each of 3 warpgroups (2 where head_dim is 256), of one batch entry and
// query head, or of all heads that share a key head; with `splits`, and a share of the keys. Four more warps copy keys and
// values through two-stage rings, copy queries, plan the next item, and keep values that nobody reads out of the product.
// A warpgroup multiplies, takes the softmax, multiplies, in turn; the others' products fill its gaps. Reads q once, k and v
// once per item (from L2 mostly), writes out and lse once; 4 head_dim flops a pair. Scores, sums and results are float32;
// probabilities are rounded to T for the second product. A row's order of sums depends on its tiles only: equal inputs
// give equal bits. Rows without keys give 0 and -inf, whatever they hold. Only tiles with a masked pair run mask code;
// keys outside the ranges are never multiplied, or their scores are replaced and their values set to zero.
#pragma once
#include "hopper.cuh"
#include "illada/api.h"
#include "key_ranges.cuh"

namespace {

using namespace illada;

constexpr int kStages = 2, kRows = 64;  // of each ring; rows of a warpgroup
constexpr float kLog2e = 1.44269504f;

ILLADA_DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

// What depends on head_dim. Tiles lie as [columns / 64][rows][64] with the 128-byte swizzle; a head_dim of 96 ends in half
// a piece of zeros, of which the products take no notice.
template <int D> struct Tile {
  static constexpr int warpgroups = D == 256 ? 2 : 3;
  static constexpr int keys = D == 256 ? 80 : 128;
  static constexpr int pieces = (D + 63) / 64;
  static constexpr int plans = D == 256 ? 1 : 2;  // one, where shared memory has no room for two
  static constexpr int threads = (warpgroups + 1) * 128;
  // Registers of a thread, as setmaxnreg deals them out of 65536.
  static constexpr int consumer_registers = D == 256 ? 232 : 160, producer_registers = D == 256 ? 40 : 32;
};

struct Problem {
  KeyBounds bounds;
  float *lse, *parts;  // parts: of `splits` shares of the keys, results (.., D), then log-sum-exps; or null
  int32_t* counter;    // of items taken up, 0 at the start; or null: blocks take items in turns
  int64_t batch;
  int rows, heads, group, tiles, pack, splits, items;
  float scale, scale_log2;
  ILLADA_DEVICE int queries() const { return kRows / pack; }  // of a warpgroup; a row is a query and a head
};

// What all warps need to know of an item.
template <int D> struct Plan {
  int batch, head, query, split;  // the first head and query; items end with batch < 0
  int begin, end;                 // of the key tiles that are visited
  KeyTiles tiles;
  Hulls hulls[Tile<D>::warpgroups];
  int4 ranges[Tile<D>::warpgroups][kRows];  // of each query
};

template <class T, int D> struct Shared {
  T q[Tile<D>::warpgroups][Tile<D>::pieces * kRows * 64];  // then the result
  T k[kStages][Tile<D>::pieces * Tile<D>::keys * 64], v[kStages][Tile<D>::pieces * Tile<D>::keys * 64];
  Plan<D> plan[Tile<D>::plans];
  uint64_t q_full[Tile<D>::warpgroups], q_empty[Tile<D>::warpgroups];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages], v_clean[kStages];
  uint64_t plan_full[Tile<D>::plans], plan_empty[Tile<D>::plans];
};

// Calls body(its number in this block, plan) for every item, by a whole warp, and then gives the plan back.
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
// Item numbers count, from the fastest: splits, heads, tiles of rows from the last to the first (under most masks the later
// rows have more keys, and long items should not come last), batch entries.
template <int D> ILLADA_DEVICE void place_item(const Problem& p, int item, Plan<D>& plan) {
  const int heads = p.heads / p.pack;
  plan.split = item % p.splits;
  plan.head = item / p.splits % heads * p.pack;
  plan.query = (p.tiles - 1 - item / p.splits / heads % p.tiles) * p.queries() * Tile<D>::warpgroups;
  plan.batch = item / p.splits / heads / p.tiles;
}

// By one warp, which has few registers.
template <int D> ILLADA_DEVICE void fill_plan(const Problem& p, int item, Plan<D>& plan) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) place_item<D>(p, item, plan);
  __syncwarp();
#pragma unroll 1
  for (int wg = 0; wg < Tile<D>::warpgroups; ++wg) {
    Hulls hulls;
#pragma unroll 1
    for (int i = lane; i < kRows; i += 32) {
      const int query = plan.query + wg * p.queries() + i;
      RowRanges r = {{0, 0}, {0, 0}};
      if (i < p.queries() && query < p.rows) {
        r = p.bounds.of_row(plan.batch, query);
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
  for (int wg = 1; wg < Tile<D>::warpgroups; ++wg) of_tile.widen(plan.hulls[wg]);
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
    if (p.counter) {
      if (lane == 0) item = atomicAdd(p.counter, 1);
      item = __shfl_sync(~0u, item, 0);
    }
    if (item < p.items)
      fill_plan<D>(p, item, shared.plan[slot]);
    else if (lane == 0)
      shared.plan[slot].batch = -1;
    __syncwarp();
    if (lane == 0) mbar_arrive(&shared.plan_full[slot]);
    if (item >= p.items) return;
  }
}

// ---- copying -------------------------------------------------------------------------------------------------------
template <int D, class S>
ILLADA_DEVICE void copy_queries(S& shared, const Problem& p, const CUtensorMap* map) {
  for_each_item<D>(shared, [&](int i, const Plan<D>& plan) {
    if (threadIdx.x % 32) return;
    for (int wg = 0; wg < Tile<D>::warpgroups; ++wg) {
      mbar_wait(&shared.q_empty[wg], i % 2 ^ 1);
      mbar_arrive_expect_tx(&shared.q_full[wg], Tile<D>::pieces * p.queries() * p.pack * 128);
      for (int piece = 0; piece < Tile<D>::pieces; ++piece)
        tma_load(shared.q[wg] + piece * kRows * 64, map, &shared.q_full[wg], piece * 64, plan.head,
                 plan.query + wg * p.queries(), plan.batch);
    }
  });
}

template <int D, class T>
ILLADA_DEVICE void copy_tile(T* tile, const CUtensorMap* map, uint64_t* full, int key, int head, int batch) {
  mbar_arrive_expect_tx(full, Tile<D>::pieces * Tile<D>::keys * 128);
  for (int piece = 0; piece < Tile<D>::pieces; ++piece)
    tma_load(tile + piece * Tile<D>::keys * 64, map, full, piece * 64, key, head, batch);
}

template <int D, class S>
ILLADA_DEVICE void copy_keys_and_values(S& shared, const Problem& p, const CUtensorMap* k, const CUtensorMap* v) {
  int use = 0;  // of the rings
  for_each_item<D>(shared, [&](int, const Plan<D>& plan) {
    if (threadIdx.x % 32) return;
    const int head = plan.head / p.group;
    for (int n = plan.begin; n < plan.end; ++n, ++use) {
      const int stage = use % kStages, phase = use / kStages % 2, key = plan.tiles.at(n) * Tile<D>::keys;
      mbar_wait(&shared.k_empty[stage], phase ^ 1);
      copy_tile<D>(shared.k[stage], k, &shared.k_full[stage], key, head, plan.batch);
      mbar_wait(&shared.v_empty[stage], phase ^ 1);
      copy_tile<D>(shared.v[stage], v, &shared.v_full[stage], key, head, plan.batch);
    }
  });
}

// ---- values that no row of the tile may read -----------------------------------------------------------------------
// 0 * NaN is NaN: where no row attends to a key, its probability 0 is not enough. True if a tile may hold such keys.
template <int D> ILLADA_DEVICE bool needs_cleaning(const Problem& p, const Plan<D>& plan, int start) {
  const int end = Min{}(start + Tile<D>::keys, p.bounds.num_keys);  // what lies beyond was copied as zeros
  bool all = false;
#pragma unroll
  for (int wg = 0; wg < Tile<D>::warpgroups; ++wg) all |= plan.hulls[wg].cover(start, end) == Cover::all;
  return !all;
}

// Ones at bits from .. to of a word, whatever of that lies in it.
ILLADA_DEVICE uint32_t bits_between(int from, int to) {
  const int a = Min{}(Max{}(from, 0), 32), b = Min{}(Max{}(to, 0), 32);
  return a < b ? ~0u >> (32 - (b - a)) << a : 0u;
}

// By one warp: zeros for the values of the tile that no row attends to.
template <int D, class T> ILLADA_DEVICE void clean_values(const Problem& p, const Plan<D>& plan, int start, T* tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < Tile<D>::keys; first += 32) {
    uint32_t read = 0;  // bit j: is key start + first + j read?
    for (int i = lane; i < Tile<D>::warpgroups * kRows; i += 32) {
      const int4 r = plan.ranges[i / kRows][i % kRows];
      const int origin = start + first;
      read |= bits_between(r.x - origin, r.y - origin) | bits_between(r.z - origin, r.w - origin);
    }
    read = __reduce_or_sync(~0u, read);
    const int count = Min{}(32, Tile<D>::keys - first);
    for (int j = lane / 8; j < count; j += 4)  // a row is 8 times 16 bytes, four rows at a time
      if (!(read >> j & 1))
        for (int piece = 0; piece < Tile<D>::pieces; ++piece)
          store16(tile + (piece * Tile<D>::keys + first + j) * 64 + lane % 8 * 8, Vec16<T>{});
  }
  fence_proxy_async();
}

template <int D, class S> ILLADA_DEVICE void keep_values_clean(S& shared, const Problem& p) {
  int use = 0;
  for_each_item<D>(shared, [&](int, const Plan<D>& plan) {
    for (int n = plan.begin; n < plan.end; ++n, ++use) {
      const int stage = use % kStages, start = plan.tiles.at(n) * Tile<D>::keys;
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

// ---- a step of a warpgroup -----------------------------------------------------------------------------------------
// Thread t of a warpgroup holds rows t / 32 * 16 + t % 32 / 4 and that + 8, columns as in wgmma.cuh.
ILLADA_DEVICE int row_of_thread() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

template <int D> struct Rows {
  float o[D / 2];        // (64, D), not yet divided by the sum
  float top[2], sum[2];  // the largest score so far; exp(score - top) summed over this thread's columns
};

// So many 16-bit elements further on: what to add to a descriptor, whose address counts 16 bytes and never overflows.
ILLADA_DEVICE uint64_t units(int elements) { return elements * 2 / 16; }

// s (64, keys) = q k^T
template <int D, class T> ILLADA_DEVICE void multiply_q_k(float (&s)[Tile<D>::keys / 2], const T* q, const T* k) {
  const uint64_t a = smem_desc(q), b = smem_desc(k);
  reg_fence(s);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < D; d += 16)
    wgmma<T>(s, a + units(d / 64 * kRows * 64 + d % 64), b + units(d / 64 * Tile<D>::keys * 64 + d % 64), d > 0);
  wgmma_commit();
}

// o (64, D) += p (64, keys) v: 16 keys are 16 rows of 128 bytes
template <int D, class T>
ILLADA_DEVICE void multiply_p_v(float (&o)[D / 2], uint32_t (&p)[Tile<D>::keys / 16][4], const T* v) {
  const uint64_t b = smem_desc(v, 1024, Tile<D>::keys * 128);
  reg_fence(o);
#pragma unroll
  for (int i = 0; i < Tile<D>::keys / 16; ++i) reg_fence(p[i]);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < Tile<D>::keys / 16; ++i)
    wgmma<T, Major::MN>(o, p[i], b + units(i * 16 * 64), true);
  wgmma_commit();
}

// How many of a thread's columns, in ascending order, lie before column `end` of the tile.
ILLADA_DEVICE int columns_before(int end) {
  const int x = end - threadIdx.x % 4 * 2;
  return (x >> 3) * 2 + Min{}(x & 7, 2);
}

// Scores of keys outside a row's ranges become -inf. Bit i / 4 * 2 + i % 2 of a row's word stands for register i.
ILLADA_DEVICE uint32_t columns_within(const int4& r, int start) {
  return bits_between(columns_before(r.x - start), columns_before(r.y - start)) |
         bits_between(columns_before(r.z - start), columns_before(r.w - start));
}
template <int N> ILLADA_DEVICE void mask_scores(float (&s)[N], const int4& first, const int4& second, int start) {
  const uint32_t attended[2] = {columns_within(first, start), columns_within(second, start)};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (!(attended[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) s[i] = minus_infinity();
}

// Scores to probabilities, relative to the running maximum; o and the sums follow it. A row with only -inf so far stays 0.
template <int D, class T>
ILLADA_DEVICE void softmax(float (&s)[Tile<D>::keys / 2], uint32_t (&p)[Tile<D>::keys / 16][4], Rows<D>& rows,
                           float scale_log2) {
  float high[4] = {s[0], s[1], s[2], s[3]}, shift[2], factor[2];  // high: two for each row, shorter chains
#pragma unroll
  for (int i = 4; i < Tile<D>::keys / 2; ++i) high[i % 4] = fmaxf(high[i % 4], s[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float old = rows.top[r];
    rows.top[r] = fmaxf(old, warp_max<4>(fmaxf(high[2 * r], high[2 * r + 1])));
    shift[r] = rows.top[r] == minus_infinity() ? 0.0f : rows.top[r] * scale_log2;
    factor[r] = fast_exp2(old * scale_log2 - shift[r]);
    rows.sum[r] *= factor[r];
  }
#pragma unroll
  for (int i = 0; i < Tile<D>::keys / 2; i += 2) {
    const int r = i / 2 % 2;
    s[i] = fast_exp2(s[i] * scale_log2 - shift[r]);
    s[i + 1] = fast_exp2(s[i + 1] * scale_log2 - shift[r]);
    rows.sum[r] += s[i] + s[i + 1];
    p[i / 8][i / 2 % 4] = pack<T>(s[i], s[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < D / 2; ++i) rows.o[i] *= factor[i / 2 % 2];
}

// One lane of each warp tells that the warpgroup's products, which it has waited for, no longer read a stage.
ILLADA_DEVICE void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) mbar_arrive(empty);
}

template <bool MASKED, class T, int D>
ILLADA_DEVICE void step(Shared<T, D>& shared, const Problem& problem, const Plan<D>& plan, int wg, int start, int use,
                        Rows<D>& rows) {
  const int stage = use % kStages, phase = use / kStages % 2;
  float s[Tile<D>::keys / 2];
  uint32_t p[Tile<D>::keys / 16][4];
  mbar_wait(&shared.k_full[stage], phase);
  multiply_q_k<D>(s, shared.q[wg], shared.k[stage]);
  wgmma_wait<0>();
  reg_fence(s);
  release(&shared.k_empty[stage]);
  if constexpr (MASKED) {
    const int row = row_of_thread();
    mask_scores(s, plan.ranges[wg][row / problem.pack], plan.ranges[wg][(row + 8) / problem.pack], start);
  }
  softmax<D, T>(s, p, rows, problem.scale_log2);
  mbar_wait(&shared.v_full[stage], phase);
  if constexpr (MASKED)
    if (needs_cleaning<D>(problem, plan, start)) mbar_wait(&shared.v_clean[stage], phase);
  multiply_p_v<D>(rows.o, p, shared.v[stage]);
  wgmma_wait<0>();
  reg_fence(rows.o);
  release(&shared.v_empty[stage]);
}

// A tile of which this warpgroup needs nothing: it passes it on once it is there, so that stages stay in step.
template <class T, int D> ILLADA_DEVICE void skip(Shared<T, D>& shared, int use) {
  const int stage = use % kStages, phase = use / kStages % 2;
  mbar_wait(&shared.k_full[stage], phase);
  __syncwarp();  // a lane that waits on may miss a phase
  release(&shared.k_empty[stage]);
  mbar_wait(&shared.v_full[stage], phase);
  __syncwarp();
  release(&shared.v_empty[stage]);
}

// ---- results -------------------------------------------------------------------------------------------------------
// The sums of rows to their log-sum-exps; o to the result. Of (batch, heads, rows), `parts` of (splits, ...).
template <int D> ILLADA_DEVICE void finish_rows(const Problem& p, const Plan<D>& plan, int wg, Rows<D>& rows) {
  float inverse[2];
  const int64_t all = p.batch * p.heads * p.rows, part = plan.split * all;
  float* const lse = p.parts ? p.parts + p.splits * all * D + part : p.lse;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = warp_sum<4>(rows.sum[r]);
    inverse[r] = 1.0f / sum;
    const int row = row_of_thread() + 8 * r;
    const int64_t query = int64_t(plan.query) + wg * p.queries() + row / p.pack;
    const int64_t at = (int64_t(plan.batch) * p.heads + plan.head + row % p.pack) * p.rows + query;
#pragma unroll
    for (int i = 2 * r; i < D / 2; i += 4) {  // 0 without keys, even if 0 * NaN was added
      rows.o[i] = sum == 0.0f ? 0.0f : rows.o[i] * inverse[r];
      rows.o[i + 1] = sum == 0.0f ? 0.0f : rows.o[i + 1] * inverse[r];
    }
    if (row / p.pack >= p.queries() || query >= p.rows) continue;
    if (threadIdx.x % 4 == 0) lse[at] = sum == 0.0f ? minus_infinity() : rows.top[r] * p.scale + logf(sum);
    if (!p.parts) continue;
    float* const out = p.parts + (part + at) * D + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 2 * r; i < D / 2; i += 4)
      *reinterpret_cast<float2*>(out + i / 4 * 8) = make_float2(rows.o[i], rows.o[i + 1]);
  }
}

// By a warpgroup: the result to the shared memory of its queries, swizzled as the map of out says, then to global memory.
template <class T, int D>
ILLADA_DEVICE void store_result(T* tile, const float (&o)[D / 2], const CUtensorMap* out, const Problem& p,
                                const Plan<D>& plan, int wg) {
  const int t = threadIdx.x % 128, matrix = t % 32 / 8, row = t / 32 * 16 + matrix % 2 * 8 + t % 8;
#pragma unroll
  for (int i = 0; i < D / 2; i += 8) {
    const int column = i * 2 + matrix / 2 * 8, byte = column % 64 * 2 ^ row % 8 * 16;
    const uint32_t words[4] = {pack<T>(o[i], o[i + 1]), pack<T>(o[i + 2], o[i + 3]), pack<T>(o[i + 4], o[i + 5]),
                               pack<T>(o[i + 6], o[i + 7])};
    stmatrix(tile + (column / 64 * kRows + row) * 64 + byte / 2, words);
  }
  fence_proxy_async();
  bar_sync(1 + wg, 128);
  if (t != 0) return;
  for (int piece = 0; piece < Tile<D>::pieces; ++piece)
    tma_store(out, tile + piece * kRows * 64, piece * 64, plan.head, plan.query + wg * p.queries(), plan.batch);
  bulk_commit();
  bulk_wait_read<0>();
}

// Rows that no query fills, where `pack` does not divide 64: their scores must only be numbers that nobody reads.
template <class T, int D> ILLADA_DEVICE void fill_spare_rows(T* q, const Problem& p) {
  for (int row = p.queries() * p.pack + threadIdx.x % 128 / 8; row < kRows; row += 16)
    for (int piece = 0; piece < Tile<D>::pieces; ++piece)
      store16(q + (piece * kRows + row) * 64 + threadIdx.x % 8 * 8, Vec16<T>{});
  fence_proxy_async();
}

template <class T, int D>
ILLADA_DEVICE void consume(Shared<T, D>& shared, const Problem& p, const CUtensorMap* out) {
  const int wg = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler then knows that the warp agrees
  int use = 0;                                            // of the rings
  fill_spare_rows<T, D>(shared.q[wg], p);
  bar_sync(1 + wg, 128);
  for_each_item<D>(shared, [&](int i, const Plan<D>& plan) {
    Rows<D> rows{{}, {minus_infinity(), minus_infinity()}, {}};
    const auto start = [&](int n) { return plan.tiles.at(n) * Tile<D>::keys; };
    const auto cover = [&](int n) { return plan.hulls[wg].cover(start(n), start(n) + Tile<D>::keys); };
    mbar_wait(&shared.q_full[wg], i % 2);
    for (int n = plan.begin; n < plan.end;) {
      for (; n < plan.end && cover(n) == Cover::all; ++n) step<false>(shared, p, plan, wg, start(n), use++, rows);
      if (n == plan.end) break;
      if (cover(n) == Cover::some)
        step<true>(shared, p, plan, wg, start(n), use++, rows);
      else
        skip(shared, use++);
      ++n;
    }
    finish_rows<D>(p, plan, wg, rows);
    bar_sync(1 + wg, 128);  // the warpgroup has read its queries
    if (!p.parts) store_result<T, D>(shared.q[wg], rows.o, out, p, plan, wg);
    if (threadIdx.x % 128 == 0) mbar_arrive(&shared.q_empty[wg]);
  });
}

// ---- kernels -------------------------------------------------------------------------------------------------------
template <class T, int D> ILLADA_DEVICE void init_barriers(Shared<T, D>& s) {
  constexpr int warps = Tile<D>::warpgroups * 4;
  for (int i = 0; i < kStages; ++i) {
    mbar_init(&s.k_full[i], 1);
    mbar_init(&s.v_full[i], 1);
    mbar_init(&s.v_clean[i], 1);
    mbar_init(&s.k_empty[i], warps);
    mbar_init(&s.v_empty[i], warps + 1);  // and the warp that keeps values clean
  }
  for (int i = 0; i < Tile<D>::warpgroups; ++i) {
    mbar_init(&s.q_full[i], 1);
    mbar_init(&s.q_empty[i], 1);
  }
  for (int i = 0; i < Tile<D>::plans; ++i) {
    mbar_init(&s.plan_full[i], 1);
    mbar_init(&s.plan_empty[i], warps + 3);
  }
  mbar_init_fence();
}

template <class T, int D>
__global__ void __launch_bounds__(Tile<D>::threads, 1)
    attention_fwd(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                  const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap out,
                  const __grid_constant__ Problem p) {
  Shared<T, D>& s = *reinterpret_cast<Shared<T, D>*>(dynamic_smem());
  if (threadIdx.x == 0) init_barriers(s);
  __syncthreads();
  if (threadIdx.x < Tile<D>::warpgroups * 128) {
    reg_increase<Tile<D>::consumer_registers>();
    consume<T, D>(s, p, &out);
    return;
  }
  reg_decrease<Tile<D>::producer_registers>();
  const int role = threadIdx.x / 32 % 4;
  if (role == 0) copy_keys_and_values<D>(s, p, &k, &v);
  if (role == 1) copy_queries<D>(s, p, &q);
  if (role == 2) plan_items<D>(s, p);
  if (role == 3) keep_values_clean<D>(s, p);
}

// Adds up the shares of the keys, in order of their number: one warp for a row.
template <class T, int D>
__global__ void __launch_bounds__(256)
    combine(const float* parts, T* out, float* lse, int splits, int64_t batch, int heads, int rows) {
  const int64_t all = batch * heads * rows, at = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (at >= all) return;
  const int lane = threadIdx.x % 32;
  const float mine = lane < splits ? parts[splits * all * D + lane * all + at] : minus_infinity();
  const float top = warp_max(mine), shift = top == minus_infinity() ? 0.0f : top;
  const float weight = fast_exp2((mine - shift) * kLog2e), sum = warp_sum(weight);
  const int64_t row = at % rows, head = at / rows % heads, entry = at / rows / heads;
  float total[D / 32] = {};
  for (int split = 0; split < splits; ++split) {
    const float w = __shfl_sync(~0u, weight, split);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) total[i] += w * parts[(split * all + at) * D + i * 32 + lane];
  }
#pragma unroll
  for (int i = 0; i < D / 32; ++i)
    out[((entry * rows + row) * heads + head) * D + i * 32 + lane] = from_float<T>(sum == 0 ? 0.0f : total[i] / sum);
  if (lane == 0) lse[at] = sum == 0 ? minus_infinity() : top + logf(sum);
}

// ---- host ----------------------------------------------------------------------------------------------------------
struct Forward {
  const void *q, *k, *v;
  void* out;
  int64_t keys, key_heads, dim;
  const int64_t* strides;  // elements: batch, row, head of q, k, v
  int blocks;
  cudaStream_t stream;
};

// A map of x (batch, rows, heads, dim) with its dimensions in the order given by `order`; those of one element may have any
// stride, so they get one that passes.
template <class T>
int map_of(CUtensorMap* map, const void* x, int64_t dim, const int64_t (&size)[3], const int64_t (&stride)[3],
           const uint32_t (&box)[4]) {
  uint64_t sizes[4] = {uint64_t(dim)}, bytes[3];
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = uint64_t(size[i]);
    bytes[i] = size[i] > 1 ? uint64_t(stride[i]) * sizeof(T) : 512;
  }
  return make_tensor_map<4>(map, static_cast<const T*>(x), sizes, bytes, box, Swizzle::bytes128);
}

template <class T, int D> int run(const Forward& f, Problem p) {
  const int64_t* s = f.strides;
  const int queries = kRows / p.pack;
  p.tiles = int((p.rows + int64_t(queries) * Tile<D>::warpgroups - 1) / (queries * Tile<D>::warpgroups));
  p.items = int(p.batch * (p.heads / p.pack) * p.tiles * p.splits);
  const uint32_t of_queries[] = {64, uint32_t(p.pack), uint32_t(queries), 1}, of_keys[] = {64, Tile<D>::keys, 1, 1};
  CUtensorMap q, k, v, out;
  int e = map_of<T>(&q, f.q, D, {p.heads, p.rows, p.batch}, {s[2], s[1], s[0]}, of_queries);
  if (!e) e = map_of<T>(&k, f.k, D, {f.keys, f.key_heads, p.batch}, {s[4], s[5], s[3]}, of_keys);
  if (!e) e = map_of<T>(&v, f.v, D, {f.keys, f.key_heads, p.batch}, {s[7], s[8], s[6]}, of_keys);
  if (!e) e = map_of<T>(&out, f.out, D, {p.heads, p.rows, p.batch}, {D, p.heads * D, p.rows * p.heads * D}, of_queries);
  if (e) return e;
  const Launch l{dim3(f.blocks), dim3(Tile<D>::threads), sizeof(Shared<T, D>), f.stream};
  e = launch(l, attention_fwd<T, D>, q, k, v, out, p);
  if (e || !p.parts) return e;
  const Launch last{dim3(unsigned((p.batch * p.heads * p.rows + 7) / 8)), dim3(256), 0, f.stream};
  return launch(last, combine<T, D>, p.parts, static_cast<T*>(f.out), p.lse, p.splits, p.batch, p.heads, p.rows);
}

template <class T> int run_any(const Forward& f, const Problem& p) {
  if (f.dim == 64) return run<T, 64>(f, p);
  if (f.dim == 96) return run<T, 96>(f, p);
  if (f.dim == 128) return run<T, 128>(f, p);
  if (f.dim == 256) return run<T, 256>(f, p);
  return int(cudaErrorInvalidValue);
}

}  // namespace

// Defines the entry point for one type; RUN takes (Forward, Problem).
#define ILLADA_ATTENTION_FWD(NAME, RUN)                                                                                \
  extern "C" int NAME(ILLADA_ATTENTION_FWD_ARGUMENTS) {                                                                \
    const KeyBounds ranges{bounds, strides[9], strides[10], int(keys)};                                                \
    const Forward f{q, k, v, out, keys, key_heads, dim, strides, blocks, static_cast<cudaStream_t>(stream)};           \
    return RUN(f, {ranges, lse, parts, counter, batch, int(rows), int(heads), int(heads / key_heads), 0, pack, splits, \
                   0, scale, scale * kLog2e});                                                                         \
  }
