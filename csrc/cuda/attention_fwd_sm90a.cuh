// Attention forward on Hopper: out = softmax(scale q k^T) v and its log-sum-exp, over at most two key ranges a row.
//
// A block owns one item after another: 64 rows for each of 3 warpgroups (2 for head_dim 256), of one batch entry and of
// one query head, or of all heads that share a kv head; with `splits`, also a share of the keys. Four more warps serve
// the warpgroups (attention_fwd_plan_sm90a.cuh). One warpgroup's MMAs fill the gaps of the others' softmax. Reads q
// once, k and v once an item (mostly from L2), writes out and lse once; 4 * head_dim flops a pair. Accumulates in
// float32; probabilities are rounded to T for the second matmul. The order of a row's sums depends on shapes, bounds
// and splits alone: equal inputs give equal bits. Rows without keys give 0 and -inf. Keys to which no row of the tile
// attends are not loaded, or their scores are replaced and their values zeroed, so a NaN or inf in them reaches no
// output. Tiles without a masked pair run no mask code.
#pragma once
#include "attention_fwd_plan_sm90a.cuh"
#include "illada/api.h"

namespace {

// ---- a step of a warpgroup -----------------------------------------------------------------------------------------
template <int D> struct Rows {
  float o[columns_of<D> / 2];  // (64, D), before the division by the sum
  float top[2], sum[2];  // largest score so far; sum of exp(score - top) over this thread's columns
};

// Returns how many of a thread's columns, in ascending order, lie before column `end` of the tile.
ILLADA_DEVICE int columns_before(int end) {
  const int x = end - threadIdx.x % 4 * 2;
  return (x >> 3) * 2 + Min{}(x & 7, 2);
}

// Returns which of a row's scores are of keys within its ranges: bit i / 4 * 2 + i % 2 for register i.
ILLADA_DEVICE uint32_t columns_within(const int4& r, int start) {
  return bits_between(columns_before(r.x - start), columns_before(r.y - start)) |
         bits_between(columns_before(r.z - start), columns_before(r.w - start));
}

// Turns scores into probabilities relative to the running maximum, and rescales o and the sums. A row whose scores are
// all -inf so far keeps probability 0.
template <int D, class T>
ILLADA_DEVICE void softmax(float (&s)[Tile<D>::keys / 2], uint32_t (&p)[Tile<D>::keys / 16][4], Rows<D>& rows,
                           float scale_log2) {
  float high[4] = {s[0], s[1], s[2], s[3]}, shift[2], factor[2];  // high: two for each row, for shorter chains
#pragma unroll
  for (int i = 4; i < Tile<D>::keys / 2; ++i) high[i % 4] = fmaxf(high[i % 4], s[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float old = rows.top[r];
    rows.top[r] = fmaxf(old, warp_max<4>(fmaxf(high[2 * r], high[2 * r + 1])));
    shift[r] = rows.top[r] == -infinity() ? 0.0f : rows.top[r] * scale_log2;
    factor[r] = fast_exp2(old * scale_log2 - shift[r]);
    rows.sum[r] *= factor[r];
  }
#pragma unroll
  for (int i = 0; i < D / 2; ++i) rows.o[i] *= factor[i / 2 % 2];
#pragma unroll
  for (int i = 0; i < Tile<D>::keys / 2; i += 2) {
    const int r = i / 2 % 2;
    s[i] = fast_exp2(s[i] * scale_log2 - shift[r]);
    s[i + 1] = fast_exp2(s[i + 1] * scale_log2 - shift[r]);
    rows.sum[r] += s[i] + s[i + 1];
    p[i / 8][i / 2 % 4] = pack<T>(s[i], s[i + 1]);
  }
}

// Releases a stage that the warpgroup's MMAs no longer read: one arrival per warp.
ILLADA_DEVICE void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) mbar_arrive(empty);
}

#ifdef ILLADA_ATTENTION_FWD_ROTATION
// A variant that is only measured (benchmarks/on_gpu/variants.py): warpgroups issue S in turn, so that the exponentials
// of one run beside the MMAs of another.
ILLADA_DEVICE void await_turn(int wg) { bar_sync(4 + wg, 256); }
template <int D> ILLADA_DEVICE void pass_turn(int wg) { bar_arrive(4 + (wg + 1) % Tile<D>::warpgroups, 256); }
#else
ILLADA_DEVICE void await_turn(int) {}
template <int D> ILLADA_DEVICE void pass_turn(int) {}
#endif

template <bool MASKED, class T, int D>
ILLADA_DEVICE void step(Shared<T, D>& shared, const Problem& problem, const Plan<D>& plan, int wg, int n, int use,
                        Rows<D>& rows) {
  const int stage = use % kStages, phase = use / kStages % 2;
  float s[Tile<D>::keys / 2];
  uint32_t p[Tile<D>::keys / 16][4];
  mbar_wait(&shared.k_full[stage], phase);
  await_turn(wg);
  multiply_transposed<D, kRows>(s, shared.q[wg], shared.k[stage]);
  pass_turn<D>(wg);
  uint32_t attended[2];
  if constexpr (MASKED) {  // while the MMA runs
#pragma unroll
    for (int r = 0; r < 2; ++r)
      attended[r] = columns_within(plan.ranges[wg][(row_of_thread() + 8 * r) / problem.pack], plan.first_key(n));
  }
  wgmma_wait<0>();
  reg_fence(s);
  release(&shared.k_empty[stage]);
  if (n == plan.end - 1) release(&shared.q_empty[wg]);  // the next queries load while this item is finished
  if constexpr (MASKED) {
#pragma unroll
    for (int i = 0; i < Tile<D>::keys / 2; ++i)
      if (!(attended[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) s[i] = -infinity();
  }
  softmax<D, T>(s, p, rows, problem.scale_log2);
  mbar_wait(&shared.v_full[stage], phase);
  if constexpr (MASKED)
    if (needs_cleaning<D>(problem, plan, plan.first_key(n))) mbar_wait(&shared.v_clean[stage], phase);
  multiply_add(rows.o, p, shared.v[stage]);
  wgmma_wait<0>();
  reg_fence(rows.o);
  release(&shared.v_empty[stage]);
}

// Skips a key tile to which no row of this warpgroup attends. Still waits for both loads and arrives on both `empty`
// barriers; otherwise the producer could not refill the stage.
template <class T, int D> ILLADA_DEVICE void skip(Shared<T, D>& shared, const Plan<D>& plan, int wg, int n, int use) {
  const int stage = use % kStages, phase = use / kStages % 2;
  mbar_wait(&shared.k_full[stage], phase);
  __syncwarp();  // because a lane that still waits could miss a phase
  await_turn(wg);
  pass_turn<D>(wg);
  release(&shared.k_empty[stage]);
  mbar_wait(&shared.v_full[stage], phase);
  __syncwarp();
  release(&shared.v_empty[stage]);
  if (n == plan.end - 1) release(&shared.q_empty[wg]);
}

// ---- results -------------------------------------------------------------------------------------------------------
// Transposes four words of each lane of a quad: lane t gets word t of the four lanes.
ILLADA_DEVICE void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i | bit], bit);
      (upper ? w[i] : w[i | bit]) = got;
    }
  }
}

// Stores row r of this thread, 8 columns of T at a time: a quad holds 32 columns as 4 words of each lane.
template <class T, int D> ILLADA_DEVICE void store_row(T* to, const float (&o)[columns_of<D> / 2], int r, bool there) {
#pragma unroll
  for (int i = 2 * r; i < D / 2; i += 16) {
    uint32_t words[4] = {pack<T>(o[i], o[i + 1]), pack<T>(o[i + 4], o[i + 5]), pack<T>(o[i + 8], o[i + 9]),
                         pack<T>(o[i + 12], o[i + 13])};
    transpose_quad(words);
    if (there)
      *reinterpret_cast<uint4*>(to + i / 16 * 32 + threadIdx.x % 4 * 8) =
          make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Divides by the sums and stores from registers, because the queries' shared memory already belongs to the next item.
// With `parts`, stores float32 at the share's place among (splits, batch, heads, queries).
template <class T, int D> ILLADA_DEVICE void finish_rows(const Problem& p, const Plan<D>& plan, int wg, Rows<D>& rows) {
  const int64_t all = p.batch * p.heads * p.queries, part = plan.split * all;
  float* const lse = p.parts ? p.parts + p.splits * all * D + part : p.lse;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row_of_thread() + 8 * r, head = plan.head + row % p.pack;
    const int query = plan.query + wg * p.warpgroup_queries() + row / p.pack;
    const bool there = row / p.pack < p.warpgroup_queries() && query < p.queries;
    const int64_t at = (int64_t(plan.batch) * p.heads + head) * p.queries + query;
    const float sum = warp_sum<4>(rows.sum[r]), inverse = 1.0f / sum;
#pragma unroll
    for (int i = 2 * r; i < D / 2; i += 4) {  // 0 without keys, even if 0 * NaN was added
      rows.o[i] = sum == 0.0f ? 0.0f : rows.o[i] * inverse;
      rows.o[i + 1] = sum == 0.0f ? 0.0f : rows.o[i + 1] * inverse;
    }
    if (there && threadIdx.x % 4 == 0) lse[at] = sum == 0.0f ? -infinity() : rows.top[r] * p.scale + logf(sum);
    if (!p.parts) {
      const int64_t place = ((int64_t(plan.batch) * p.queries + query) * p.heads + head) * D;
      store_row<T, D>(static_cast<T*>(p.out) + place, rows.o, r, there);
    } else if (there) {
      float* const to = p.parts + (part + at) * D + threadIdx.x % 4 * 2;
#pragma unroll
      for (int i = 2 * r; i < D / 2; i += 4)
        *reinterpret_cast<float2*>(to + i / 4 * 8) = make_float2(rows.o[i], rows.o[i + 1]);
    }
  }
}

// Zeros rows that no query fills (where `pack` does not divide 64), because their scores must not be NaN.
template <class T, int D> ILLADA_DEVICE void fill_spare_rows(T* q, const Problem& p) {
  for (int row = p.warpgroup_queries() * p.pack + threadIdx.x % 128 / 8; row < kRows; row += 16)
    for (int piece = 0; piece < pieces<D>; ++piece)
      store16(q + (piece * kRows + row) * 64 + threadIdx.x % 8 * 8, Vec16<T>{});
  fence_proxy_async();
}

template <class T, int D> ILLADA_DEVICE void consume(Shared<T, D>& shared, const Problem& p) {
  const int wg = warpgroup_of_thread();
  int use = 0;  // stages of the rings used so far
  fill_spare_rows<T, D>(shared.q[wg], p);
  bar_sync(1 + wg, 128);
  if (wg == Tile<D>::warpgroups - 1) pass_turn<D>(wg);  // the first turn is warpgroup 0's
  for_each_item<D>(shared, [&](int i, const Plan<D>& plan) {
    Rows<D> rows{{}, {-infinity(), -infinity()}, {}};
    const auto cover = [&](int n) {
      const int start = plan.first_key(n);
      return plan.hulls[wg].cover(start, start + Tile<D>::keys);
    };
    mbar_wait(&shared.q_full[wg], i % 2);
    __syncwarp();
    if (plan.begin == plan.end) release(&shared.q_empty[wg]);
    for (int n = plan.begin; n < plan.end; ++n, ++use) {
      for (; n < plan.end && cover(n) == Cover::all; ++n, ++use) step<false>(shared, p, plan, wg, n, use, rows);
      if (n == plan.end) break;
      if (cover(n) == Cover::some) step<true>(shared, p, plan, wg, n, use, rows);
      else skip(shared, plan, wg, n, use);
    }
    finish_rows<T, D>(p, plan, wg, rows);
  });
  if (wg == 0) await_turn(wg);  // takes the turn that is left
}

// ---- kernels -------------------------------------------------------------------------------------------------------
template <class T, int D> ILLADA_DEVICE void init_barriers(Shared<T, D>& s) {
  constexpr int warps = Tile<D>::warpgroups * 4;
  for (int i = 0; i < kStages; ++i) {
    mbar_init(&s.k_full[i], 1);
    mbar_init(&s.v_full[i], 1);
    mbar_init(&s.v_clean[i], 1);
    mbar_init(&s.k_empty[i], warps);
    mbar_init(&s.v_empty[i], warps + 1);  // and the warp that cleans values
  }
  for (int i = 0; i < Tile<D>::warpgroups; ++i) {
    mbar_init(&s.q_full[i], 1);
    mbar_init(&s.q_empty[i], 4);
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
                  const __grid_constant__ CUtensorMap v, const __grid_constant__ Problem p) {
  Shared<T, D>& s = *reinterpret_cast<Shared<T, D>*>(dynamic_smem());
  if (threadIdx.x == 0) init_barriers(s);
  if (threadIdx.x == 32) tma_prefetch(&q), tma_prefetch(&k), tma_prefetch(&v);
  __syncthreads();
  if (threadIdx.x < Tile<D>::warpgroups * 128) {
    reg_increase<Tile<D>::consumer_registers>();
    consume<T, D>(s, p);
    return;
  }
  reg_decrease<Tile<D>::producer_registers>();
  const int role = threadIdx.x / 32 % 4;
  if (role == 0) copy_keys_and_values<D>(s, p, &k, &v);
  if (role == 1) copy_queries<D>(s, p, &q);
  if (role == 2) plan_items<D>(s, p);
  if (role == 3) keep_values_clean<D>(s, p);
}

// Adds up the shares of the keys in ascending order, with one warp a row. Loads shares while their weights come.
template <class T, int D>
__global__ void __launch_bounds__(256)
    combine(const float* parts, T* out, float* lse, int splits, int64_t batch, int heads, int queries) {
  const int64_t all = batch * heads * queries, at = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (at >= all) return;
  constexpr int kAhead = 4, kVectors = (D + 127) / 128;  // of 4 columns of a lane
  const int lane = threadIdx.x % 32;
  const float4* const of_row = reinterpret_cast<const float4*>(parts + at * D);
  float4 ring[kAhead][kVectors];
  const auto load_slot = [&](float4(&slot)[kVectors], int split) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (split < splits && v * 32 + lane < D / 4) slot[v] = of_row[split * all * (D / 4) + v * 32 + lane];
  };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) load_slot(ring[u], u);
  const float mine = lane < splits ? parts[splits * all * D + lane * all + at] : -infinity();
  const float top = warp_max(mine), shift = top == -infinity() ? 0.0f : top;
  const float weight = fast_exp2((mine - shift) * kLog2e), sum = warp_sum(weight);
  const int64_t row = at % queries, head = at / queries % heads, entry = at / queries / heads;
  float4 total[kVectors] = {};
  for (int first = 0; first < splits; first += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u >= splits) break;
      const float w = __shfl_sync(~0u, weight, first + u);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        total[v].x += w * ring[u][v].x, total[v].y += w * ring[u][v].y;
        total[v].z += w * ring[u][v].z, total[v].w += w * ring[u][v].w;
      }
      load_slot(ring[u], first + u + kAhead);
    }
  }
  T* const to = out + ((entry * queries + row) * heads + head) * D;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (v * 32 + lane < D / 4) {
      const float4 x = sum == 0 ? float4{} : total[v];
      const float y = sum == 0 ? 1.0f : sum;
      reinterpret_cast<uint2*>(to)[v * 32 + lane] = make_uint2(pack<T>(x.x / y, x.y / y), pack<T>(x.z / y, x.w / y));
    }
  if (lane == 0) lse[at] = sum == 0 ? -infinity() : top + logf(sum);
}

// ---- host ----------------------------------------------------------------------------------------------------------
struct Forward {
  const void *q, *k, *v;
  int64_t keys, kv_heads, dim;
  const int64_t* strides;  // elements: of batch, row and head of q, k, v
  int blocks;
  cudaStream_t stream;
};

template <class T, int D> int run(const Forward& f, Problem p) {
  const int64_t* s = f.strides;
  const int per_warpgroup = kRows / p.pack;
  p.tiles = int((p.queries + int64_t(per_warpgroup) * Tile<D>::warpgroups - 1) / (per_warpgroup * Tile<D>::warpgroups));
  p.items = int(p.batch * (p.heads / p.pack) * p.tiles * p.splits);
  const uint32_t of_queries[] = {64, uint32_t(p.pack), uint32_t(per_warpgroup), 1},
                 of_keys[] = {64, Tile<D>::keys, 1, 1};
  CUtensorMap q, k, v;
  int e = map_of_tiles<T>(&q, f.q, D, {p.heads, p.queries, p.batch}, {s[2], s[1], s[0]}, of_queries);
  if (!e) e = map_of_tiles<T>(&k, f.k, D, {f.keys, f.kv_heads, p.batch}, {s[4], s[5], s[3]}, of_keys);
  if (!e) e = map_of_tiles<T>(&v, f.v, D, {f.keys, f.kv_heads, p.batch}, {s[7], s[8], s[6]}, of_keys);
  if (e) return e;
  const Launch l{dim3(f.blocks), dim3(Tile<D>::threads), sizeof(Shared<T, D>), f.stream};
  e = launch(l, attention_fwd<T, D>, q, k, v, p);
  if (e || !p.parts) return e;
  const Launch last{dim3(unsigned((p.batch * p.heads * p.queries + 7) / 8)), dim3(256), 0, f.stream};
  return launch(last, combine<T, D>, p.parts, static_cast<T*>(p.out), p.lse, p.splits, p.batch, p.heads, p.queries);
}

template <class T> int run_any(const Forward& f, const Problem& p) {
  if (f.dim == 64) return run<T, 64>(f, p);
  if (f.dim == 96) return run<T, 96>(f, p);
  if (f.dim == 128) return run<T, 128>(f, p);
  if (f.dim == 256) return run<T, 256>(f, p);
  return int(cudaErrorInvalidValue);
}

}  // namespace

// Defines the entry point for one dtype. RUN takes (Forward, Problem).
#define ILLADA_ATTENTION_FWD(NAME, RUN)                                                                               \
  extern "C" int NAME(ILLADA_ATTENTION_FWD_ARGUMENTS) {                                                               \
    const KeyBounds ranges{bounds, strides[9], strides[10], int(keys)};                                               \
    const Forward f{q, k, v, keys, kv_heads, dim, strides, blocks, static_cast<cudaStream_t>(stream)};                \
    return RUN(f, {ranges, out, lse, parts, counter, batch, int(queries), int(heads), int(heads / kv_heads), 0, pack, \
                   splits, 0, scale, scale * kLog2e});                                                                \
  }
