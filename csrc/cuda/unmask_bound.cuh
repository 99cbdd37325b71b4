// The least logit that top_k, top_p and min_p keep in a row, which a block finds from any source of its logits:
//
//   top_k: the largest t that at least k logits reach;  top_p: the largest t such that those >= t, of what top_k keeps,
//   have top_p of its sum of e = exp((l - max) / T);  min_p: max + T log(min_p).  bound = the largest of the three
//
// Both t are searched alike: a pass sums what reaches each of 8 thresholds, the next one lies between the two among
// which t was found, and what is left between these moves to shared memory once it fits: 3 to 5 passes as a rule, 13 at
// most. Sums are integers, e in units of 2^-44 (fewer bits from 2^18 ids on), so that they have no order.
#pragma once
#include "unmask.cuh"

namespace illada {

constexpr int kBoundWarps = 16, kBoundThreads = kBoundWarps * 32;
constexpr int kWays = 8, kList = 8192;

struct BoundShared {
  uint64_t of_warp[kBoundWarps][kWays], sums[kWays];
  float top[kBoundWarps];
  uint32_t listed;
  float list[kList];
};

// Returns a key that rises with x, which is neither a NaN nor -0; never 0.
ILLADA_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
ILLADA_DEVICE float logit_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// Returns the warp's sum, below 2^63, in three parts that 32 bits hold.
ILLADA_DEVICE uint64_t warp_total(uint64_t x) {
  const uint32_t part = (1u << 21) - 1;
  const uint64_t low = __reduce_add_sync(0xffffffffu, uint32_t(x) & part);
  const uint64_t middle = __reduce_add_sync(0xffffffffu, uint32_t(x >> 21) & part);
  const uint64_t high = __reduce_add_sync(0xffffffffu, uint32_t(x >> 42));
  return low + (middle << 21) + (high << 42);
}

// The search of the largest t that enough reaches: the weights of the logits >= t sum up to the target at least.
struct Search {
  uint32_t from[kWays], end;  // thresholds, rising; enough reaches from[0], too little reaches `end`
  uint64_t above;  // what reaches `end`
  bool listed;  // the list holds what lay between from[0] and `end` when it was made,
  uint64_t beyond;  // and this reached that end
};

// What a search is for. By top_k an id weighs 1 and the target is `wanted`, above 0; by top_p it weighs e, and the
// target is `share` of all weights. One search serves both: each copy of a pass over a row takes 1500 instructions.
struct Goal {
  uint64_t wanted;
  float share, top, one;  // one: what e = 1 weighs
  Row row;
  ILLADA_DEVICE uint64_t weight(float l) const {
    return wanted > 0 ? 1 : uint64_t(ceilf(weight_of(l, top, row).e * one));
  }
  ILLADA_DEVICE uint64_t enough(uint64_t total) const {
    return wanted > 0 ? wanted : uint64_t(ceil(double(share) * double(total)));
  }
};

// Sums what reaches each threshold, for the whole block. each(visit) calls visit(logit) for this thread's logits.
template <class Each> ILLADA_DEVICE void sum_ways(BoundShared& s, const Search& at, const Goal& goal, Each each) {
  uint64_t mine[kWays] = {};
  each([&](float l) {
    const uint32_t key = key_of(l);
    if (key < at.from[0]) return;  // most of a row, from the second pass on
    const uint64_t weight = goal.weight(l);
    mine[0] += weight;
#pragma unroll
    for (int i = 1; i < kWays; ++i) mine[i] += key >= at.from[i] ? weight : 0;
  });
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kWays; ++i) {
    const uint64_t sum = warp_total(mine[i]);
    if (lane == i) s.of_warp[warp][i] = sum;
  }
  __syncthreads();
  if (warp < kWays) {
    const uint64_t sum = warp_total(lane < kBoundWarps ? s.of_warp[lane][warp] : 0);
    if (lane == 0) s.sums[warp] = sum + at.beyond;
  }
  __syncthreads();
}

// Continues between the last threshold that enough reaches and the next one. Returns what lies there, summed.
ILLADA_DEVICE uint64_t narrow(const BoundShared& s, uint64_t target, Search& at) {
  uint32_t low = at.from[0], high = at.end;
  uint64_t reached = s.sums[0], above = at.above;
#pragma unroll
  for (int i = kWays - 1; i > 0; --i) {
    if (s.sums[i] < target) high = at.from[i], above = s.sums[i];
  }
#pragma unroll
  for (int i = 1; i < kWays; ++i) {
    if (s.sums[i] >= target) low = at.from[i], reached = s.sums[i];
  }
  const uint32_t step = (high - low + kWays - 1) / kWays;
#pragma unroll
  for (int i = 0; i < kWays; ++i) at.from[i] = high - low > i * step ? low + i * step : high;
  at.end = high;
  at.above = above;
  return reached - above;
}

template <class Each> ILLADA_DEVICE void fill_list(BoundShared& s, const Search& at, Each each) {
  if (threadIdx.x == 0) s.listed = 0;
  __syncthreads();
  each([&](float l) {
    if (key_of(l) < at.from[0] || key_of(l) >= at.end) return;
    const uint32_t place = atomicAdd(&s.listed, 1u);
    if (place < kList) s.list[place] = l;  // always, by `most` of the caller
  });
  __syncthreads();
}

// Returns the key of the largest t >= the logit of `least` that enough reaches, 0 if there is none.
template <class Each>
ILLADA_DEVICE uint32_t largest_reached(BoundShared& s, const Goal& goal, float temperature, uint32_t least, Each each) {
  Search at{{}, key_of(goal.top) + 1, 0, false, 0};
#pragma unroll
  for (int i = 0; i < kWays; ++i) {  // least, then 32, 16 .. 0.5 temperatures below the maximum
    const float below = goal.top - temperature * (64.0f / float(1 << i));
    at.from[i] = i > 0 && below > -infinity() && key_of(below) > least ? key_of(below) : least;
  }
  uint64_t enough = 0;  // of the first pass, then above 0
  for (;;) {
    if (at.listed) {
      sum_ways(s, at, goal, [&](auto visit) {
        for (uint32_t i = threadIdx.x; i < s.listed; i += kBoundThreads) visit(s.list[i]);
      });
    } else {
      sum_ways(s, at, goal, each);
    }
    if (enough == 0) enough = goal.enough(s.sums[0]);
    if (s.sums[0] < enough) return 0;
    const uint64_t between = narrow(s, enough, at);
    if (at.end - at.from[0] <= 1) return at.from[0];
    const uint64_t lightest = goal.weight(logit_of(at.from[0]));
    if (!at.listed && lightest > 0 && between / lightest <= kList * 15 / 16) {  // weights err by less than a 16th
      fill_list(s, at, each);
      at.listed = true, at.beyond = at.above;
    }
  }
}

// Returns the bound of a row. each(visit) calls visit(logit) for this thread's logits: all of them, or at least those
// that reach the bound and, with top_p, what top_k keeps. top: the largest, finite.
template <class Each>
ILLADA_DEVICE float bound_of(BoundShared& s, const Call& c, const Row& row, const Truncation& by, float top,
                             Each each) {
  const float t = row.temperature;
  float bound = -infinity();
  Goal goal{0, 1.0f, top, float(uint64_t(1) << (c.vocab < 1 << 18 ? 44 : 31)), row};
  goal.row.scale = fminf(1.0f / t, kLargest);
  goal.row.scale2 = fminf(goal.row.scale * kLog2e, kLargest);
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {  // top_k, then top_p
    goal.wanted = turn == 0 ? uint64_t(by.top_k) : 0;
    goal.share = turn == 0 ? 1.0f : by.top_p;
    if (goal.share <= 0.0f) bound = top;
    if (goal.wanted == 0 && !(goal.share > 0.0f && goal.share < 1.0f)) continue;
    const uint32_t key = largest_reached(s, goal, t, key_of(fmaxf(bound, -kLargest)), each);
    if (key > 0) bound = logit_of(key);
  }
  return fmaxf(bound, __fadd_rn(top, by.drop));
}

}  // namespace illada
