// unmask, the last step: confidences, ranking, and which candidates are written. A block owns a sequence.
//
// 8 lanes merge the parts of a candidate (unmask.cuh) in a fixed order, accumulating in float64. A bitonic network
// sorts the candidates by (key, position, place), in shared memory, or in a workspace for more than 1024. A scan and a
// minimum find the rule's first failing rank; then tokens are written and the remaining masks counted. Keys:
// -confidence; the entropy for EntropyBound; the score for Remask, where a NaN does not rank. Bad rows (a NaN or +inf
// logit, no id allowed) propose -1 and are not written. RENOISE also writes what the rule did not accept, uniformly
// drawn tokens, and reports the best token of each row, not the one drawn. Reads 32 bytes for each part of a row that
// takes part. Time is latency: about 55 barriers for 1024 candidates.
#include "unmask.cuh"

namespace {

using namespace illada;

constexpr int kThreads = 512, kLanes = 8;
constexpr uint64_t kNoKey = ~uint64_t(0);
constexpr int32_t kNoId = 0x7fffffff;
constexpr float kRemaskable = -1.0f;  // stands in the place of an entropy
constexpr double kLog2 = 0.69314718055994531;

struct Best {
  float score, logit;
  int32_t id;
};
struct Better {
  ILLADA_DEVICE Best operator()(const Best& a, const Best& b) const {
    return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
  }
};
ILLADA_DEVICE Best best_of_lanes(Best x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Best other{__shfl_xor_sync(0xffffffffu, x.score, step), __shfl_xor_sync(0xffffffffu, x.logit, step),
                     __shfl_xor_sync(0xffffffffu, x.id, step)};
    x = Better{}(x, other);
  }
  return x;
}

struct Result {
  int64_t proposal;  // -1: a bad row
  int64_t top_id;  // of the largest logit; RENOISE alone
  float confidence, probability, entropy, held_probability;
};

ILLADA_DEVICE float confidence_of(const Call& c, const Row& row, const Result& r, float second, float best, float top,
                                  double sum) {
  switch (c.confidence) {
    case ILLADA_PROBABILITY: return r.probability;
    case ILLADA_MARGIN: return float((1.0 - double(expf((second - top) * row.scale))) / sum);
    case ILLADA_NEG_ENTROPY: return 0.0f - r.entropy;
    case ILLADA_SAMPLED: {
      const float likeness = row.temperature > 0.0f ? expf((best - top) / row.temperature) : 1.0f;
      return fminf(float(1.0 / sum), likeness);
    }
    default: {
      const PhiloxWords w = philox(row.seed, 0, row.noise_position, row.step, 1);
      return philox_unit(w.w0, w.w1);
    }
  }
}

// Merges a candidate's parts with kLanes neighbouring lanes; a lane takes parts lane, lane + kLanes, ... All 32 lanes
// of the warp must call it.
template <bool RENOISE> ILLADA_DEVICE Result merge_parts(const Call& c, const Row& row, int64_t r) {
  const int lane = threadIdx.x % kLanes;
  const int64_t parts = row.needed ? c.parts : 0;  // partials of rows that are not needed were never written
  float top = -infinity(), second = -infinity(), held = -infinity();
  Best best{-infinity(), -infinity(), kNoId}, largest = best;
#pragma unroll 8
  for (int64_t p = lane; p < parts; p += kLanes) {  // without branches, so that the loads of 8 parts fly at once
    const float t = *partial(c, kTop, r, p);
    second = fmaxf(fmaxf(second, *partial(c, kSecondTop, r, p)), fminf(t, top));
    top = fmaxf(top, t);
    const float of_held = *partial(c, kHeldLogit, r, p);
    if (RENOISE) largest = Better{}(largest, Best{t, t, __float_as_int(of_held)});
    else held = fmaxf(held, of_held);
    const int32_t id = __float_as_int(*partial(c, kBestId, r, p));
    // a part without an id has score -inf and loses
    best = Better{}(best, Best{*partial(c, kBestScore, r, p), *partial(c, kBestLogit, r, p), id < 0 ? kNoId : id});
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, top, step);
    second = fmaxf(fmaxf(second, __shfl_xor_sync(0xffffffffu, second, step)), fminf(top, other));
    top = fmaxf(top, other);
  }
  if (RENOISE) largest = best_of_lanes(largest);
  else held = warp_max<kLanes>(held);
  best = best_of_lanes(best);
  double sum = 0.0, sum_ez = 0.0;
#pragma unroll 8
  for (int64_t p = lane; p < parts; p += kLanes) {
    const Weight of_part = weight_of(*partial(c, kTop, r, p), top, row);
    const float drop = of_part.z, kept = of_part.e;
    const double part = *partial(c, kSum, r, p);
    sum = fma(double(kept), part, sum);
    if (c.needs & ILLADA_NEEDS_ENTROPY)
      sum_ez = fma(double(kept), fma(double(drop), part, double(*partial(c, kSumEz, r, p))), sum_ez);
  }
  sum = warp_sum<kLanes>(sum);
  if (c.needs & ILLADA_NEEDS_ENTROPY) sum_ez = warp_sum<kLanes>(sum_ez) * kLog2;
  Result result{-1, -1, -infinity(), 0.0f, 0.0f, 0.0f};
  if (top == infinity() || best.id == kNoId) return result;
  result.proposal = best.id;
  if (RENOISE) result.top_id = largest.id, best.logit = top;
  result.probability = float(double(expf((best.logit - top) * row.scale)) / sum);
  if (held > -infinity()) result.held_probability = float(double(expf((held - top) * row.scale)) / sum);
  if (c.needs & ILLADA_NEEDS_ENTROPY) {
    const double entropy = log(sum) - sum_ez / sum;
    result.entropy = entropy > 0.0 ? float(entropy) : 0.0f;
  }
  result.confidence = confidence_of(c, row, result, second, best.logit, top, sum);
  return result;
}

// ---- the candidates of a sequence, and their order -------------------------------------------------------------
struct Candidates {
  uint64_t* keys;  // (n), n a power of two
  uint32_t* places;  // (n): k of the candidate with this key
  float* entropies;  // (n), by k
};

// Returns a key that ascends with (deferred, x, position); positions are below 2^31.
ILLADA_DEVICE uint64_t key_of(float x, int64_t position, bool deferred = false) {
  const uint32_t bits = __float_as_uint(x + 0.0f), ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(deferred) << 63 | uint64_t(ordered) << 31 | uint64_t(position);
}

template <bool RENOISE> ILLADA_DEVICE bool by_entropy(const Call& c) {
  return RENOISE || c.rule == ILLADA_ENTROPY_BOUND || c.rule == ILLADA_ENTROPY_BOUND_INCLUSIVE;
}

// Returns the key that a masked candidate ranks by.
template <bool RENOISE> ILLADA_DEVICE uint64_t rank_key(const Call& c, int64_t b, const Row& row, const Result& r) {
  float score = by_entropy<RENOISE>(c) ? -r.entropy : r.confidence;
  const float t = number_of(c.rank_temperature, b);
  if (t > 0.0f) {
    const PhiloxWords w = philox(row.seed, 0, row.noise_position, row.step, 2);
    score = noised_score(score, fminf(t, kHighestT), gumbel(w.w0, w.w1));
  }
  if (c.order == ILLADA_FROM_LEFT) score = 0.0f;
  bool deferred = false;
  for (int64_t i = 0; i < c.defers; ++i) deferred |= c.defer[i] == r.proposal;
  return key_of(-score, row.position, deferred);
}

ILLADA_DEVICE void sort(const Candidates& s, uint32_t n) {
  for (uint32_t size = 2; size <= n; size *= 2)
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
      for (uint32_t i = threadIdx.x; i < n / 2; i += kThreads) {
        const uint32_t low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t a = s.keys[low], b = s.keys[high];
        const uint32_t at_a = s.places[low], at_b = s.places[high];
        const bool after = a > b || (a == b && at_a > at_b);
        if (after == ((low & size) == 0))
          s.keys[low] = b, s.keys[high] = a, s.places[low] = at_b, s.places[high] = at_a;
      }
      __syncthreads();
    }
}

// Returns the sum over the threads before this one.
ILLADA_DEVICE double sum_before(double x, double* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double through = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, through, step);
    if (lane >= step) through = other + through;
  }
  const double before = __shfl_up_sync(0xffffffffu, through, 1);
  if (lane == 31) scratch[warp] = through;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < warp; ++w) total += scratch[w];
  __syncthreads();
  return lane == 0 ? total : total + before;
}

// Returns how many of the m ranked candidates the rule commits, from the front.
template <bool RENOISE>
ILLADA_DEVICE int64_t commit_count(const Call& c, int64_t b, const Candidates& s, int64_t m, const float* confidence,
                                   double* scratch) {
  const int64_t least = integer_of(c.least, b);
  const float number = number_of(c.rule_number, b);
  const bool sums = by_entropy<RENOISE>(c);
  const int64_t share = (m + kThreads - 1) / kThreads, start = threadIdx.x * share,
                end = start + share < m ? start + share : m;
  double entropies = 0.0;
  if (sums) {
    for (int64_t r = start; r < end; ++r) entropies += double(s.entropies[s.places[r]]);
    entropies = sum_before(entropies, scratch);
  }
  int64_t failing = m;
  for (int64_t r = start; r < end && failing == m; ++r) {
    const int64_t k = s.places[r];
    bool pass = false;
    if (c.rule == ILLADA_THRESHOLD) pass = confidence[k] >= number;
    if (c.rule == ILLADA_FACTOR)
      pass = confidence[k] >= 1.0f - number / float(r + 2);  // ranks count from 1: f / (r + 1)
    if (RENOISE || c.rule == ILLADA_ENTROPY_BOUND) pass = entropies <= double(number);
    if (sums) entropies += double(s.entropies[k]);
    if (c.rule == ILLADA_ENTROPY_BOUND_INCLUSIVE) pass = entropies <= double(number);
    if (!pass && r >= least) failing = r;
  }
  return block_reduce<kThreads>(failing, reinterpret_cast<int64_t*>(scratch), Min{});
}

struct Outputs {
  int64_t* proposal;
  float* confidence;
  uint8_t* committed;
  int32_t* remaining;
};

// Writes everything about candidate k but its rank, with one lane. Returns its key, or kNoKey where the rule does not
// rank it. RENOISE writes the token drawn at once, and renoise() overwrites those that are not accepted.
template <bool RENOISE>
ILLADA_DEVICE uint64_t propose(const Call& c, int64_t b, int64_t k, const Row& row, const Result& result,
                               const Outputs& out, float* entropy) {
  Result shown{-1, -1, -infinity(), 0.0f, 0.0f, 0.0f};
  bool edited = false;
  uint64_t key = kNoKey;
  *entropy = result.entropy;
  if (row.position >= 0 && !row.masked && c.revise >= ILLADA_REMASK) {
    const bool by_scores = c.revise == ILLADA_REMASK_BY_SCORES;
    const float score = by_scores ? at<float>(c.scores, b, k) : result.held_probability;
    if (by_scores ? score == score : result.proposal >= 0)
      shown.proposal = row.held, shown.confidence = score, *entropy = kRemaskable;
  } else if (row.needed && result.proposal >= 0) {
    shown = result;
    if (RENOISE) {
      shown.proposal = result.top_id;
      c.tokens[b * c.token_stride + row.position] = result.proposal;
    }
    if (row.masked) key = rank_key<RENOISE>(c, b, row, result);
    else edited = result.proposal != row.held && result.probability >= number_of(c.revise_number, b);
  }
  const int64_t i = b * c.count + k;
  out.proposal[i] = shown.proposal;
  out.confidence[i] = shown.confidence;
  out.committed[i] = edited;
  return key;
}

ILLADA_DEVICE void remask(const Call& c, int64_t b, const Candidates& s, uint32_t n, const float* confidence,
                          int64_t* tokens, double* scratch) {
  int64_t mine = 0;
  for (uint32_t k = threadIdx.x; k < n; k += kThreads) {
    const bool eligible = k < c.count && s.entropies[k] == kRemaskable;
    s.keys[k] = eligible ? key_of(confidence[k], at<int64_t>(c.positions, b, k)) : kNoKey;
    s.places[k] = k;
    mine += eligible;
  }
  const int64_t eligible = block_reduce<kThreads>(mine, reinterpret_cast<int64_t*>(scratch), Sum{});
  sort(s, n);
  const int64_t wanted = integer_of(c.revise_number, b), most = wanted < eligible ? wanted : eligible;
  for (int64_t r = threadIdx.x; r < most; r += kThreads) tokens[at<int64_t>(c.positions, b, s.places[r])] = c.mask_id;
  __syncthreads();
}

// Writes a token drawn from [0, vocab) wherever a proposal was not accepted.
ILLADA_DEVICE void renoise(const Call& c, int64_t b, const int64_t* proposal, const uint8_t* committed,
                           int64_t* tokens) {
  for (int64_t k = threadIdx.x; k < c.count; k += kThreads) {
    if (proposal[k] < 0 || committed[k]) continue;
    const Row row = load_row<true>(c, b, k);
    const PhiloxWords w = philox(row.seed, 0, row.noise_position, row.step, 3);
    tokens[row.position] = int64_t(__umul64hi(uint64_t(w.w0) << 32 | w.w1, uint64_t(c.vocab)));
  }
}

template <bool RENOISE>
__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(const __grid_constant__ Call c, uint8_t* workspace, uint32_t n, Outputs out) {
  const int64_t b = blockIdx.x;
  double* scratch = reinterpret_cast<double*>(dynamic_smem());
  uint8_t* room = workspace ? workspace + b * n * 16 : dynamic_smem() + kThreads / 32 * sizeof(double);
  const Candidates s{reinterpret_cast<uint64_t*>(room), reinterpret_cast<uint32_t*>(room + n * 8ull),
                     reinterpret_cast<float*>(room + n * 12ull)};
  int64_t mine = 0;
  for (uint32_t first = threadIdx.x / 32 * (32 / kLanes); first < n; first += kThreads / kLanes) {
    const uint32_t k = first + threadIdx.x % 32 / kLanes;
    const Row row = k < c.count ? load_row<RENOISE>(c, b, k) : Row{-1, 0, 0, 0, 0, 0.0f, 0.0f, 0.0f, 0, 0};
    const Result result = merge_parts<RENOISE>(c, row, b * c.count + k);
    if (threadIdx.x % kLanes != 0 || k >= n) continue;
    const uint64_t key = k < c.count ? propose<RENOISE>(c, b, k, row, result, out, s.entropies + k) : kNoKey;
    s.keys[k] = key;
    s.places[k] = k;
    mine += key != kNoKey;
  }
  const int64_t ranked = block_reduce<kThreads>(mine, reinterpret_cast<int64_t*>(scratch), Sum{});
  sort(s, n);
  int64_t* tokens = c.tokens + b * c.token_stride;
  const float* confidence = out.confidence + b * c.count;
  uint8_t* committed = out.committed + b * c.count;
  const int64_t chosen = commit_count<RENOISE>(c, b, s, ranked, confidence, scratch);
  for (int64_t r = threadIdx.x; r < chosen; r += kThreads) committed[s.places[r]] = 1;
  __syncthreads();
  if (RENOISE) {
    renoise(c, b, out.proposal + b * c.count, committed, tokens);
  } else {
    for (int64_t k = threadIdx.x; k < c.count; k += kThreads)
      if (committed[k]) tokens[at<int64_t>(c.positions, b, k)] = out.proposal[b * c.count + k];
  }
  __syncthreads();
  if (c.revise >= ILLADA_REMASK) remask(c, b, s, n, confidence, tokens, scratch);
  int left = 0;
  for (int64_t k = threadIdx.x; k < c.count; k += kThreads) {
    const int64_t position = at<int64_t>(c.positions, b, k);
    const bool candidate =
        position >= 0 && position < c.length && !(c.frozen.data && at<uint8_t>(c.frozen, b, position));
    left += candidate && (RENOISE ? !committed[k] : tokens[position] == c.mask_id);
  }
  left = block_reduce<kThreads>(left, reinterpret_cast<int*>(scratch), Sum{});
  if (threadIdx.x == 0) out.remaining[b] = left;
}

}  // namespace

#ifndef __CUDACC_RTC__  // where NVRTC compiles, Python launches: illada_kernels/ops/unmask/nvrtc.py
extern "C" int illada_unmask_select_cuda(const illada_unmask_call* call, void* workspace, int64_t* proposal,
                                         float* confidence, uint8_t* committed, int32_t* remaining, void* stream) {
  const Call& c = *call;
  if (c.batch > 0x7fffffff || c.count > 1 << 30) return int(cudaErrorInvalidValue);
  uint32_t n = 1;
  while (n < c.count) n *= 2;
  const bool in_shared = n <= ILLADA_UNMASK_SORT_IN_SHARED;
  if (!in_shared && !workspace) return int(cudaErrorInvalidValue);
  const size_t smem = kThreads / 32 * sizeof(double) + (in_shared ? n * 16 : 0);
  return launch({dim3(unsigned(c.batch)), dim3(kThreads), smem, static_cast<cudaStream_t>(stream)},
                c.rule == ILLADA_RENOISE ? select_kernel<true> : select_kernel<false>, c,
                static_cast<uint8_t*>(in_shared ? nullptr : workspace), n,
                Outputs{proposal, confidence, committed, remaining});
}
#endif
