// unmask fused with the LM head, for up to 128 candidate rows: logits = hidden head^T, reduced to statistics
// (unmask.cuh) while they are in shared memory.
//
// A persistent block owns every gridDim-th tile of 256 ids. One thread loads the head through a ring of stages by TMA,
// 64 columns of all rows beside it. Two warpgroups multiply (vocab on M, candidates on N) and hand 128 ids of logits at
// a time through shared memory to a third, whose warps fold them into their rows' statistics while the next MMAs run.
// Reads the head once, hidden once per tile from L2, writes 32 bytes per row and block; 512 N flops for 512 + 2 N bytes
// a column. Accumulates in float32. Which tiles a block has depends on the vocab and the grid alone, so rows do not
// influence each other. Rows that take no part are multiplied and ignored (a NaN stays in its row); if none takes part,
// blocks leave at once. Rows that truncate list logits in place of drawing (unmask_lists.cuh).
#include "hopper.cuh"
#include "unmask_lists.cuh"

namespace {

using namespace illada;

constexpr int kIds = kTile, kDepth = 64;
constexpr int kMultiplying = 256, kMeeting = 7 * 32, kThreads = kMultiplying + kMeeting + 32;
constexpr int kAtOnce = kIds / 2, kPitch = kAtOnce + 4;  // of logits in shared memory; this pitch has no bank conflicts

template <int N> constexpr int kStages = N <= 16 ? 6 : N <= 32 ? 5 : 3;
template <int N> constexpr int kBuffers = N <= 64 ? 2 : 1;

// A row that truncates lists what reaches a floor, which rises towards the row's bound and never passes it.
struct Listing {
  float drop;  // from the largest logit to the least that min_p keeps
  float floor;  // at least `wanted` of the ids met reach it
  int32_t wanted;  // top_k; 0: keeps all
  int32_t count;  // listed; -1: the row draws as it is met
  float* words;  // as in PartList
  Threshold* thresholds;
};

// Tiles are multiples of 1024 bytes, as the swizzle requires.
template <class T, int N> struct Shared {
  T head[kStages<N>][kIds * kDepth], hidden[kStages<N>][N * kDepth];
  float logits[kBuffers<N>][N][kPitch];
  Row rows[N];
  Running running[N];
  Listing listings[N];
  uint64_t full[kStages<N>], empty[kStages<N>];
  uint64_t ready[kBuffers<N>], met[kBuffers<N>];  // of the logits
};

struct Sizes {
  int rows, tiles, steps;  // of the whole call; steps of kDepth columns
  int blocks;  // of a cluster, 1 or 2
};

// Calls body(tile) for this block's tiles. The blocks of a cluster have equally many, because they load for each other:
// one may lie beyond the vocab, where the head loads as zeros and no id is allowed.
template <class Body> ILLADA_DEVICE void over_tiles(const Sizes& z, Body body) {
  const int rank = int(blockIdx.x) & (z.blocks - 1);
  for (int tile = blockIdx.x; tile - rank < z.tiles; tile += gridDim.x) body(tile);
}

// In a cluster of two, blocks take turns to load hidden for both.
template <class T, int N>
ILLADA_DEVICE void produce(Shared<T, N>& s, const CUtensorMap* head, const CUtensorMap* hidden, const Sizes& z) {
  int turn = 0;
  over_tiles(z, [&](int tile) {
    for (int step = 0; step < z.steps; ++step, ++turn) {
      const int stage = turn % kStages<N>, phase = turn / kStages<N> % 2;
      mbar_wait(&s.empty[stage], phase ^ 1);
      mbar_arrive_expect_tx(&s.full[stage], uint32_t(sizeof s.head[0]) + z.rows * kDepth * uint32_t(sizeof(T)));
      tma_load(s.head[stage], head, &s.full[stage], step * kDepth, tile * kIds);
      if (z.blocks == 1) tma_load(s.hidden[stage], hidden, &s.full[stage], step * kDepth, 0, 0);
      else if (turn % 2 == int(cluster_rank()))
        tma_load_multicast(s.hidden[stage], hidden, &s.full[stage], 3, step * kDepth, 0, 0);
    }
  });
}

// Gives a stage up, in every block that may load into it.
template <class T, int N> ILLADA_DEVICE void release(Shared<T, N>& s, int stage, const Sizes& z) {
  if (threadIdx.x % 128) return;
  mbar_arrive(&s.empty[stage]);
  if (z.blocks == 2) mbar_arrive_cluster(&s.empty[stage], cluster_rank() ^ 1);
}

// Stores the accumulators of 64 ids of this warpgroup to shared memory.
template <int N> ILLADA_DEVICE void put_logits(float (&logits)[N][kPitch], const float (&sum)[N / 2]) {
  const int warpgroup = threadIdx.x / 128, t = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int id = warpgroup * 64 + t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, row = i / 4 * 8 + t % 4 * 2 + i % 2;
    logits[row][id] = sum[i];
  }
}

template <class T, int N> ILLADA_DEVICE void multiply(Shared<T, N>& s, const Sizes& z) {
  const int warpgroup = threadIdx.x / 128;
  int turn = 0, half = 0;
  over_tiles(z, [&](int) {
    float low[N / 2], high[N / 2];  // ids of the tile's first and second half
    for (int step = 0; step < z.steps; ++step, ++turn) {
      const int stage = turn % kStages<N>, phase = turn / kStages<N> % 2;
      mbar_wait(&s.full[stage], phase);
      reg_fence(low);
      reg_fence(high);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        const T* head = s.head[stage] + warpgroup * 64 * kDepth + k;
        const uint64_t hidden = smem_desc(s.hidden[stage] + k);
        wgmma<T>(low, smem_desc(head), hidden, step + k > 0);
        wgmma<T>(high, smem_desc(head + kAtOnce * kDepth), hidden, step + k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the MMAs of the step before are done
      if (step > 0) release(s, (turn - 1) % kStages<N>, z);
    }
    wgmma_wait<0>();
    reg_fence(low);
    reg_fence(high);
    release(s, (turn - 1) % kStages<N>, z);
#pragma unroll
    for (int h = 0; h < 2; ++h, ++half) {
      const int buffer = half % kBuffers<N>, phase = half / kBuffers<N> % 2;
      mbar_wait(&s.met[buffer], phase ^ 1);
      if (h == 0) put_logits<N>(s.logits[buffer], low);
      else put_logits<N>(s.logits[buffer], high);
      mbar_arrive(&s.ready[buffer]);
    }
  });
}

// ---- rows that truncate ----------------------------------------------------------------------------------------
// Returns what a row begins with. Takes the noise away from one that lists: it waits for the bound.
ILLADA_DEVICE Listing begin_listing(const Call& c, int64_t r, Row& row) {
  const Listing none{-infinity(), -infinity(), 0, -1, nullptr, nullptr};
  if (!c.truncate || !(row.temperature > 0.0f)) return none;
  const Truncation by = truncation_of(c, r / c.count, row.temperature);
  if (by.keeps_all()) return none;
  row.temperature = 0.0f;
  const PartList list = list_of(c, r, int(blockIdx.x));
  const float drop = by.top_p < 1.0f ? -infinity() : by.drop;  // top_p weighs all that top_k keeps
  return Listing{drop, -infinity(), int32_t(by.top_k), 0, list.words, list.thresholds};
}

// Returns the floor after 128 ids more, whose largest in this lane is `mine`. A lane counts what reaches its threshold;
// one that the floor has passed becomes `mine`, and the count begins here.
ILLADA_DEVICE float raised(const Listing& at, float mine, const float* logits) {
  uint32_t left = __ballot_sync(0xffffffffu, mine > at.floor);  // lanes with ids that may count
  if (!left) return at.floor;
  Threshold* const own = at.thresholds + threadIdx.x % 32;
  Threshold t = at.count ? *own : Threshold{-infinity(), 0};
  if (t.at <= at.floor && mine > at.floor) t = Threshold{mine, 0};
#pragma unroll 1
  for (; left; left &= left - 1) {
    const float4 x = *reinterpret_cast<const float4*>(logits + (__ffs(int(left)) - 1) * 4);
    t.reached += int(x.x >= t.at) + int(x.y >= t.at) + int(x.z >= t.at) + int(x.w >= t.at);
  }
  *own = t;
  return fmaxf(at.floor, warp_top(t.reached >= at.wanted ? t.at : -infinity()));
}

// Lists a warp's 128 ids, a half of one of the block's tiles. top: the largest logit met so far.
ILLADA_DEVICE void list_logits(const float* logits, int half, float top, Listing& listing) {
  const int lane = threadIdx.x % 32;
  Listing at = listing;
  const PartList list{at.words, int(gridDim.x) * kTileWords, nullptr};
  const float4 four = *reinterpret_cast<const float4*>(logits + lane * 4);
  const float l[4] = {four.x, four.y, four.z, four.w};
  const float mine = fmaxf(fmaxf(l[0], l[1]), fmaxf(l[2], l[3]));
  if (at.wanted > 0) at.floor = raised(at, mine, logits);
  const float floor = fmaxf(at.floor, __fadd_rn(top, at.drop));
  Places places{{}, warp_top(mine), at.count, 0, 0};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const bool kept = l[j] > -infinity() && l[j] >= floor;
    places.of[j] = __ballot_sync(0xffffffffu, kept);
    if (kept) *list.logit(at.count + __popc(places.of[j] & ((1u << lane) - 1))) = l[j];
    at.count += __popc(places.of[j]);
  }
  if (lane != 0) return;
  listing.floor = at.floor;
  listing.count = places.after = at.count;
  *list.places(half) = places;
}

// Folds logits into statistics. A warp has every seventh row; no other warp touches their statistics.
template <class T, int N> ILLADA_DEVICE void meet_tiles(const Call& c, Shared<T, N>& s, const Sizes& z) {
  const int lane = threadIdx.x % 32, warp = (threadIdx.x - kMultiplying) / 32;
  int half = 0;
  over_tiles(z, [&](int tile) {
    for (int h = 0; h < 2; ++h, ++half) {
      const int first = tile * kIds + h * kAtOnce;
      const int buffer = half % kBuffers<N>, phase = half / kBuffers<N> % 2;
      float head_bias[4], bias[4];
      load_head_bias(c, first, head_bias);
      load_biases(c, first, bias);
      mbar_wait(&s.ready[buffer], phase);
      for (int r = warp; r < z.rows; r += kMeeting / 32) {
        const Row row = s.rows[r];
        if (!row.needed) continue;
        Running running = s.running[r];
        const float4 four = *reinterpret_cast<const float4*>(&s.logits[buffer][r][lane * 4]);
        float l[4] = {four.x, four.y, four.z, four.w};
        add_head_bias(head_bias, l);
        add_biases(bias, l);
        meet(l, first, row, c.needs, running);
        if (c.truncate)  // for the lists
          *reinterpret_cast<float4*>(&s.logits[buffer][r][lane * 4]) = make_float4(l[0], l[1], l[2], l[3]);
        if (lane == 0) s.running[r] = running;
        __syncwarp();
      }
#pragma unroll 1
      for (int r = warp; c.truncate && r < z.rows; r += kMeeting / 32)  // apart, because registers are few
        if (s.listings[r].count >= 0 && s.running[r].top < infinity())
          list_logits(s.logits[buffer][r], half, s.running[r].top, s.listings[r]);
      __syncwarp();
      if (lane == 0) mbar_arrive(&s.met[buffer]);
    }
  });
#pragma unroll 1
  for (int r = warp; r < z.rows; r += kMeeting / 32) {
    if (lane != 0 || !s.rows[r].needed) continue;
    Running running = s.running[r];
    if (s.listings[r].count >= 0)  // no best yet
      running.best_score = running.best_logit = -infinity(), running.best_id = -1;
    store_partial(c, r, blockIdx.x, running);
  }
}

template <class T, int N> ILLADA_DEVICE void init_barriers(Shared<T, N>& s, int blocks) {
  for (int i = 0; i < kStages<N>; ++i) {
    mbar_init(&s.full[i], 1);
    mbar_init(&s.empty[i], kMultiplying / 128 * blocks);
  }
  for (int i = 0; i < kBuffers<N>; ++i) {
    mbar_init(&s.ready[i], kMultiplying);
    mbar_init(&s.met[i], kMeeting / 32);
  }
  mbar_init_fence();
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1)
    head_kernel(const __grid_constant__ Call c, const __grid_constant__ CUtensorMap head_map,
                const __grid_constant__ CUtensorMap hidden_map, Sizes z) {
  Shared<T, N>& s = *reinterpret_cast<Shared<T, N>*>(dynamic_smem());
  if (threadIdx.x ==
      kMultiplying + kMeeting) {  // the first loads find their bytes in L2, whatever the rows' loads take
    for (int step = 0; step < kStages<N> && step < z.steps; ++step)
      tma_prefetch_tile(&head_map, step * kDepth, int(blockIdx.x) * kIds);
    init_barriers(s, z.blocks);
  }
  bool needed = false;
  for (int r = threadIdx.x; r < z.rows; r += blockDim.x) {
    Row row = load_row(c, r / c.count, r % c.count);
    s.listings[r] = begin_listing(c, r, row);
    s.rows[r] = row;
    s.running[r] = nothing_met();
    needed |= row.needed;
  }
  // columns of the MMA without a row are never loaded
  const int loaded = z.rows * kDepth, rest = N * kDepth - loaded;
  for (int i = threadIdx.x; i < kStages<N> * rest; i += blockDim.x)
    s.hidden[i / rest][loaded + i % rest] = from_float<T>(0.0f);
  fence_proxy_async();
  if (!__syncthreads_or(needed)) return;  // in no block
  if (z.blocks > 1) cluster_sync();  // the barriers of both are there
  if (threadIdx.x < kMultiplying) {
    reg_increase<160>();
    multiply(s, z);
  } else {
    reg_decrease<96>();
    if (threadIdx.x < kMultiplying + kMeeting) meet_tiles(c, s, z);
    else if (threadIdx.x == kMultiplying + kMeeting) produce(s, &head_map, &hidden_map, z);
  }
  __syncwarp();
  if (z.blocks > 1) cluster_sync();  // the other block no longer writes here
}

struct Operands {
  const void *hidden, *head;
  int64_t stride_b, stride_k, head_stride, dim, blocks;
};

template <class T, int N> int run(const Call& c, const Operands& o, cudaStream_t stream) {
  const uint64_t dim = o.dim, count = c.count, batch = c.batch;
  const uint64_t head_bytes = o.head_stride * sizeof(T);
  // the stride of a dimension of one row is never used, but must be valid
  const uint64_t row_bytes = dim * sizeof(T), aligned = (row_bytes + 15) / 16 * 16;
  const uint64_t hidden_bytes[2] = {count > 1 ? o.stride_k * sizeof(T) : aligned,
                                    batch > 1 ? o.stride_b * sizeof(T) : aligned * count};
  CUtensorMap head_map, hidden_map;
  int e = make_tensor_map<2>(&head_map, static_cast<const T*>(o.head), {dim, uint64_t(c.vocab)}, &head_bytes,
                             {kDepth, kIds}, Swizzle::bytes128);
  if (!e)
    e = make_tensor_map<3>(&hidden_map, static_cast<const T*>(o.hidden), {dim, count, batch}, hidden_bytes,
                           {kDepth, uint32_t(count), uint32_t(batch)}, Swizzle::bytes128);
  if (e) return e;
  const int cluster = N > 64 && o.blocks % 2 == 0 ? 2 : 1;  // hidden's tiles are half a stage's bytes from 65 rows on
  const Sizes z{int(count * batch), int((c.vocab + kIds - 1) / kIds), int((o.dim + kDepth - 1) / kDepth), cluster};
  return launch({dim3(unsigned(o.blocks)), dim3(kThreads), sizeof(Shared<T, N>), stream, cluster}, head_kernel<T, N>, c,
                head_map, hidden_map, z);
}

template <class T> int choose(const Call& c, const Operands& o, cudaStream_t stream) {
  const int64_t rows = c.batch * c.count;
  if (rows <= 16) return run<T, 16>(c, o, stream);
  if (rows <= 32) return run<T, 32>(c, o, stream);
  if (rows <= 64) return run<T, 64>(c, o, stream);
  return run<T, 128>(c, o, stream);
}

}  // namespace

extern "C" int illada_unmask_head_sm90a(const illada_unmask_call* call, int dtype, const void* hidden, int64_t stride_b,
                                        int64_t stride_k, const void* head, int64_t head_stride, int64_t dim,
                                        int64_t blocks, void* stream) {
  const Call& c = *call;
  const int64_t rows = c.batch * c.count, tiles = (c.vocab + kIds - 1) / kIds;
  if (rows < 1 || rows > 128 || dim < 1 || c.vocab > 0x7fff0000) return int(cudaErrorInvalidValue);
  if (blocks < 1 || blocks > tiles || blocks > c.parts) return int(cudaErrorInvalidValue);
  if (c.truncate && (!c.lists || blocks != c.parts)) return int(cudaErrorInvalidValue);
  const Operands o{hidden, head, stride_b, stride_k, head_stride, dim, blocks};
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == ILLADA_BF16) return choose<bf16>(c, o, on);
  if (dtype == ILLADA_F16) return choose<fp16>(c, o, on);
  return int(cudaErrorInvalidValue);
}
