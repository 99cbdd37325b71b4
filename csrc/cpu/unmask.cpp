// unmask on a CPU, between Python's matrix products: plan (which candidate rows take part), rows (one pass over their logits), select.
//   rows: per row of l: max, second max, sum of exp, sum of e * z, and argmax of l + T * Gumbel, in segments of kSegment ids that fit
//   the first-level cache and are read from memory once. Each segment leaves a Partial; select merges them in order of id. So results
//   do not depend on threads, on other rows, or on how a caller slices the vocabulary.
//   Noise costs 9 integer products per id pair; logarithms are computed only for ids that can still win: T * g > best - max l needs
//   u < exp(-(best - max l) / T), which the top word of u tells. The bound is one-sided, so the argmax is exact.
//   Sums are double, so that rows which are permutations of each other tie (exactly, while the vocabulary fits a segment).
//   Ties: argmax to the lowest id, ranks to the lowest position. A NaN or +inf logit, or no id above -inf, makes the row bad: -1, -inf.
#include <algorithm>
#include <cmath>
#include <new>

#include "illada/api.h"
#include "isa.h"
#include "illada/philox.h"
#include "vec.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored                                                                           \
    "-Wmaybe-uninitialized"  // GCC 12 warns of the undefined operands inside its own AVX-512 intrinsics
#endif

namespace {

constexpr int kSegment = ILLADA_UNMASK_SEGMENT, kBlock = 512;
static_assert(kSegment % kBlock == 0 && kBlock % (4 * kWidth) == 0, "whole vectors");

enum Revise { kNoRevision, kEdit, kRemask, kRemaskByScores };
enum Rule { kTopK, kThreshold, kFactor, kEntropyBound, kEntropyBoundInclusive };
enum Confidence { kProbability, kMargin, kNegEntropy, kRandom };
// columns of the (B, 4) parameter arrays
enum Integer { kSeed, kStep, kCount, kRemaskCount, kIntegers };
enum Number { kTemperature, kConfidenceTemperature, kRuleNumber, kEditTau, kNumbers };

struct Row {  // a candidate that needs its logits
  int64_t index;  // b * K + k; first, Python reads it
  int64_t held;
  uint64_t seed;
  uint32_t position, step;
  float temperature, scale;  // of the noise (0: none), 1 / of the confidence
  int64_t masked;
};
static_assert(sizeof(Row) == ILLADA_UNMASK_ROW_BYTES, "as api.h says");

struct Partial {  // a row's segment, or some of them
  double sum, sum_ez;  // of e = exp(z), e * z, z = (l - top) * scale
  float top, second;
  float best_score, best_logit, held_logit;
  int32_t top_id, best_id;  // -1: none
  int32_t bad;
};
static_assert(sizeof(Partial) == ILLADA_UNMASK_PARTIAL_BYTES, "as api.h says");

// ---- vectors -----------------------------------------------------------------------------------------------------------------
typedef uint64_t v64 __attribute__((vector_size(kWidth * 4)));  // kWidth / 2 counters, one per 64-bit lane
typedef double vd __attribute__((vector_size(kWidth * 4)));

inline vf min(vf a, vf b) { return a < b ? a : b; }

inline v64 mul32(v64 a, v64 b) {  // product of the low halves: the high halves may hold anything
#if defined(__AVX512F__)
  return bit_cast<v64>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<v64>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

inline v64 high32(v64 a) {  // the high halves, moved low; a shuffle, as the shifts' port is taken by the products
#if defined(__AVX512F__)
  return bit_cast<v64>(_mm512_shuffle_epi32(bit_cast<__m512i>(a), _MM_PERM_DDBB));
#elif defined(__AVX2__)
  return bit_cast<v64>(_mm256_shuffle_epi32(bit_cast<__m256i>(a), 0xf5));
#else
  return a >> 32;
#endif
}

inline bool any(vi mask) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  int64_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

inline bool any_at_most(vu v, uint32_t limit) {
#if defined(__AVX512F__)
  return _mm512_cmple_epu32_mask(bit_cast<__m512i>(v), _mm512_set1_epi32(int(limit))) != 0;
#else
  return any(v <= limit);
#endif
}

struct NaNs {  // has one of the vectors held a NaN?
#if defined(__AVX512F__)
  __mmask16 seen = 0;
  void look(vf a, vf b) { seen |= _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_UNORD_Q); }
  bool found() const { return seen != 0; }
#else
  vi seen{};
  void look(vf a, vf b) { seen |= (a != a) | (b != b); }
  bool found() const { return any(seen); }
#endif
};

struct Doubles {
  vd low, high;
};
inline void accumulate(Doubles& sum, vf v) {
#if defined(__AVX512F__)
  const __m512 x = bit_cast<__m512>(v);
  sum.low += bit_cast<vd>(_mm512_cvtps_pd(_mm512_castps512_ps256(x)));
  sum.high += bit_cast<vd>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
#elif defined(__AVX2__)
  const __m256 x = bit_cast<__m256>(v);
  sum.low += bit_cast<vd>(_mm256_cvtps_pd(_mm256_castps256_ps128(x)));
  sum.high += bit_cast<vd>(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
#else
  for (int i = 0; i < kWidth / 2; ++i) sum.low[i] += double(v[i]), sum.high[i] += double(v[i + kWidth / 2]);
#endif
}
inline double total(const Doubles& sum) {
  const vd s = sum.low + sum.high;
  double r = 0;
  for (int i = 0; i < kWidth / 2; ++i) r += s[i];
  return r;
}

// exp(max(z, -87.3)), below 2 ulp; exp(0) = 1 exactly. For z <= 0: 1.2e-38 instead of 0 is lost beside the maximum's 1.
// N vectors side by side, as one waits for its own multiply-adds.
template <int N> inline __attribute__((always_inline)) void exp_not_positive(vf (&z)[N]) {
  static const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                       5.0000001201e-1f};
  const vf shift = splat(0x1.8p23f);
  vf biased[N], r[N], p[N];
  for (int c = 0; c < N; ++c) z[c] = max(z[c], splat(-87.3f));
  for (int c = 0; c < N; ++c) biased[c] = z[c] * 1.44269504f + shift;
  for (int c = 0; c < N; ++c) r[c] = z[c] - (biased[c] - shift) * 0.693359375f;
  for (int c = 0; c < N; ++c) r[c] = r[c] - (biased[c] - shift) * -2.12194440e-4f;
  for (int c = 0; c < N; ++c) p[c] = splat(1.9875691500e-4f);
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i)
    for (int c = 0; c < N; ++c) p[c] = p[c] * r[c] + coefficients[i];
  for (int c = 0; c < N; ++c) p[c] = (p[c] * r[c]) * r[c] + r[c] + 1.0f;
  // p lies in [0.7, 1.42]: add n to its exponent
  for (int c = 0; c < N; ++c) z[c] = bit_cast<vf>(bit_cast<vi>(p[c]) + (bit_cast<vi>(biased[c]) << 23));
}

// ---- noise -------------------------------------------------------------------------------------------------------------------
// Philox of one row: the first two rounds are partly the same for all counters, as only the pair index varies. The constants are
// whole vectors in memory: broadcasting them in the loop would take the port that the shuffles need.
struct RowNoise {
  v64 first, a1, b2, b3;  // xors of round one and two, and word 3 after round two
  v64 k0[10], k1[10];  // round keys, from round three on

  RowNoise(uint64_t seed, uint32_t position, uint32_t step) {
    const auto key0 = [=](uint32_t round) { return uint32_t(seed) + round * illada::kPhiloxW0; };
    const auto key1 = [=](uint32_t round) { return uint32_t(seed >> 32) + round * illada::kPhiloxW1; };
    const uint64_t p1 = uint64_t(illada::kPhiloxM1) * step;
    const uint64_t p0 = uint64_t(illada::kPhiloxM0) * (uint32_t(p1 >> 32) ^ position ^ key0(0));
    first = v64{} + key1(0);
    a1 = v64{} + (uint32_t(p1) ^ key0(1));
    b2 = v64{} + (uint32_t(p0 >> 32) ^ key1(1));
    b3 = v64{} + uint32_t(p0);
    for (uint32_t i = 2; i < 10; ++i) k0[i] = v64{} + key0(i), k1[i] = v64{} + key1(i);
  }
};

// Groups of kWidth ids whose rounds go side by side: one alone waits for its products, and a processor does not look far enough
// ahead to fill the gaps with the next. Four fit AVX-512's registers.
#if defined(__AVX512F__)
constexpr int kSideBySide = 4;
#else
constexpr int kSideBySide = 2;
#endif
static_assert(kBlock % (kSideBySide * kWidth) == 0, "whole steps");

template <int N>
struct Words {  // of N groups: word w of pair i in the low half of lane i; the high half holds anything
  v64 w0[N], w1[N], w2[N], w3[N];
  // lane i: the top, or the low, 32 bits of id i of group g
  vu top(int g) const { return bit_cast<vu>((w0[g] & 0xffffffff) | w2[g] << 32); }
  vu low(int g) const { return bit_cast<vu>((w1[g] & 0xffffffff) | w3[g] << 32); }
};

// The words of N * kWidth / 2 pairs: lane i of group g has index pairs[i] + g * kWidth / 2.
template <int N> inline __attribute__((always_inline)) Words<N> philox_groups(const RowNoise& row, v64 pairs) {
  const v64 m0 = v64{} + illada::kPhiloxM0, m1 = v64{} + illada::kPhiloxM1;
  Words<N> w;
  v64 p[N], q[N];
  for (int g = 0; g < N; ++g) p[g] = mul32(pairs + g * (kWidth / 2), m0);
  for (int g = 0; g < N; ++g) q[g] = mul32(high32(p[g]) ^ row.first, m1);
  for (int g = 0; g < N; ++g)
    w.w0[g] = high32(q[g]) ^ row.a1, w.w1[g] = q[g], w.w2[g] = p[g] ^ row.b2, w.w3[g] = row.b3;
#pragma GCC unroll 8
  for (int round = 2; round < 10; ++round) {
    for (int g = 0; g < N; ++g) p[g] = mul32(w.w0[g], m0), q[g] = mul32(w.w2[g], m1);
    for (int g = 0; g < N; ++g) {
      w.w0[g] = high32(q[g]) ^ w.w1[g] ^ row.k0[round];
      w.w2[g] = high32(p[g]) ^ w.w3[g] ^ row.k1[round];
      w.w1[g] = q[g], w.w3[g] = p[g];
    }
  }
  return w;
}

inline v64 first_pairs(int64_t first_id) {
  v64 pairs;
  for (int i = 0; i < kWidth / 2; ++i) pairs[i] = uint64_t(first_id / 2 + i);
  return pairs;
}

struct Best {
  float score, logit;
  int32_t id;
  void offer(float l, float s, int32_t i) {
    if (s > score || (s == score && i < id)) score = s, logit = l, id = i;
  }
};

// Whether an id of the group can reach `bar`, from the exponents of the top words: u >= 2^e gives g <= -e log 2.
inline bool can_win(vu top, const float* logits, float temperature, float bar) {
  const vf leading = __builtin_convertvector(bit_cast<vi>(top >> 8), vf);  // exact, so its exponent is that of the word
  const vf negative_e = __builtin_convertvector(151 - (bit_cast<vi>(leading) >> 23), vf);
  return any(load(logits) + negative_e * (temperature * 0.69315f) >= bar);
}

// The ids of one group whose top word is at most `threshold`. Rare, so kept out of the loop's registers.
__attribute__((noinline)) void offer_hits(const RowNoise& noise, float temperature, const float* logits,
                                          int64_t first_id, uint32_t threshold, Best& best) {
  const Words<1> words = philox_groups<1>(noise, first_pairs(first_id));
  const vu high = words.top(0), low = words.low(0);
  for (int i = 0; i < kWidth; ++i)
    if (high[i] <= threshold && logits[i] > -kInf)
      best.offer(logits[i], illada::noised_score(logits[i], temperature, illada::gumbel(high[i], low[i])),
                 int32_t(first_id + i));
}

// Of kBlock ids from first_id on, whose logits are at most `top`: those that beat or tie best.
inline void noise_block(const RowNoise& noise, float temperature, const float* logits, int64_t first_id, float top,
                        Best& best) {
  // what rounding can add to a score, at most: a few ulp of each of its parts
  const double slack = 1e-6 * (std::fabs(double(best.score)) + std::fabs(double(top)) + 64.0 * temperature);
  const double need = (double(best.score) - top - slack) / temperature;  // the Gumbel value a winner must reach
  if (need > 44.5) return;  // no 64-bit uniform gives more than 44.37
  const double limit = std::exp(-need) * 1.0001 * 0x1p32;  // g >= need implies u <= exp(-need)
  const uint32_t threshold = limit < 4294967295.0 ? uint32_t(limit) : 0xffffffff;
  v64 pairs = first_pairs(first_id);
  for (int j = 0; j < kBlock; j += kSideBySide * kWidth, pairs += kSideBySide * (kWidth / 2)) {
    const Words<kSideBySide> words = philox_groups<kSideBySide>(noise, pairs);
    vu lowest = words.top(0);
    for (int g = 1; g < kSideBySide; ++g) lowest = words.top(g) < lowest ? words.top(g) : lowest;
    if (__builtin_expect(!any_at_most(lowest, threshold), 1)) continue;
    for (int g = 0; g < kSideBySide; ++g)
      if (can_win(words.top(g), logits + j + g * kWidth, temperature, float(best.score - 2 * slack)))
        offer_hits(noise, temperature, logits + j + g * kWidth, first_id + j + g * kWidth, threshold, best);
  }
}

// ---- one segment of one row --------------------------------------------------------------------------------------------------
struct Edits {  // sorted by id; a value of -inf forbids
  const int64_t* ids;
  const float* values;
  int64_t count;
  int64_t lower_bound(int64_t id) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (ids[mid] < id) low = mid + 1;
      else high = mid;
    }
    return low;
  }
};

// The n logits of a segment as floats, edited, with -inf up to a whole block; `scratch` only where that differs from memory.
template <class T> inline const float* fetch(const T* p, int n, int64_t first_id, const Edits& edits, float* scratch) {
  int64_t edit = edits.lower_bound(first_id);
  const bool edited = edit < edits.count && edits.ids[edit] < first_id + n;
  if (std::is_same<T, float>::value && !edited && n % kBlock == 0) return reinterpret_cast<const float*>(p);
  for (int j = 0; j < n; j += kWidth) store(scratch + j, load_n(p + j, n - j, -kInf));
  const int whole = (n + kBlock - 1) / kBlock * kBlock;
  for (int j = (n + kWidth - 1) / kWidth * kWidth; j < whole; j += kWidth) store(scratch + j, splat(-kInf));
  for (; edit < edits.count && edits.ids[edit] < first_id + n; ++edit) {
    float& l = scratch[edits.ids[edit] - first_id];
    l = edits.values[edit] == -kInf ? -kInf : l + edits.values[edit];
  }
  return scratch;
}

// Maxima of the segment and of each block, the first id at the maximum, NaNs; the second maximum if asked for.
template <bool kSecond>
inline void find_top(const float* logits, int blocks, int64_t first_id, float* block_top, Partial& out) {
  vf top = splat(-kInf), second = splat(-kInf);
  NaNs nans;
  int at = 0;
  for (int b = 0; b < blocks; ++b) {
    const float* x = logits + b * kBlock;
    vf t[4], s[4];
    for (int c = 0; c < 4; ++c) t[c] = s[c] = splat(-kInf);
    for (int j = 0; j < kBlock; j += 4 * kWidth) {
      vf v[4];
      for (int c = 0; c < 4; ++c) {
        v[c] = load(x + j + c * kWidth);
        if (kSecond) s[c] = max(min(v[c], t[c]), s[c]);
        t[c] = max(v[c], t[c]);
      }
      nans.look(v[0], v[1]);
      nans.look(v[2], v[3]);
    }
    for (int c = 1; c < 4; ++c) {
      if (kSecond) s[0] = max(max(s[c], s[0]), min(t[c], t[0]));
      t[0] = max(t[c], t[0]);
    }
    if (kSecond) second = max(max(s[0], second), min(t[0], top));
    top = max(t[0], top);
    block_top[b] = reduce_max(t[0]);
    if (block_top[b] > block_top[at]) at = b;
  }
  out.top = block_top[at];
  out.bad = nans.found() || out.top == kInf;
  if (kSecond) {  // lanes hold one maximum each: all but the largest of them count
    float first = -kInf, other = reduce_max(second);
    for (int i = 0; i < kWidth; ++i) {
      other = std::max(other, std::min(first, top[i]));
      first = std::max(first, top[i]);
    }
    out.second = other;
  }
  if (out.top == -kInf || out.bad) return;
  const float* x = logits + at * kBlock;
  int j = 0;
  while (x[j] != out.top) ++j;
  out.top_id = int32_t(first_id + at * kBlock + j);
}

// `ahead`: memory that the next segment will read; asked for here, where the memory bus is idle.
template <bool kEntropy>
inline void add_exponentials(const float* logits, int n, float scale, const char* ahead, int ahead_step, Partial& out) {
  constexpr int kTogether = 4;
  Doubles sum{}, sum_ez{};
  for (int j = 0; j < n; j += kTogether * kWidth) {
    vf z[kTogether], e[kTogether];
    for (int c = 0; c < kTogether; ++c, ahead += ahead_step) {
      __builtin_prefetch(ahead);
      e[c] = z[c] = (load(logits + j + c * kWidth) - out.top) * scale;
    }
    exp_not_positive(e);
    for (int c = 0; c < kTogether; ++c) {
      accumulate(sum, e[c]);
      if (kEntropy) accumulate(sum_ez, z[c] < -87.3f ? vf{} : e[c] * z[c]);  // exactly 0 for a row that is certain
    }
  }
  out.sum = total(sum);
  out.sum_ez = total(sum_ez);
}

enum Needs { kEntropy = 1, kSecond = 2 };

template <class T>
inline void run_segment(const T* p, int n, int64_t first_id, const Edits& edits, const Row& row, const RowNoise& noise,
                        int needs, Best& best, Partial& out) {
  alignas(64) float scratch[kSegment];
  float block_top[kSegment / kBlock];
  const float* logits = fetch(p, n, first_id, edits, scratch);
  const int blocks = (n + kBlock - 1) / kBlock;
  out = Partial{0, 0, -kInf, -kInf, -kInf, -kInf, -kInf, -1, -1, 0};
  if (needs & kSecond) find_top<true>(logits, blocks, first_id, block_top, out);
  else find_top<false>(logits, blocks, first_id, block_top, out);
  if (out.bad || out.top == -kInf) return;
  const char* ahead = reinterpret_cast<const char*>(p + kSegment);
  if (needs & kEntropy) add_exponentials<true>(logits, blocks * kBlock, row.scale, ahead, kWidth * sizeof(T), out);
  else add_exponentials<false>(logits, blocks * kBlock, row.scale, ahead, kWidth * sizeof(T), out);
  if (row.held >= first_id && row.held < first_id + n) out.held_logit = logits[row.held - first_id];
  if (!(row.temperature > 0)) {
    out.best_score = out.best_logit = out.top, out.best_id = out.top_id;
    return;
  }
  // the segment's most likely winner first: a high bar spares work. It is offered again in its turn, to no effect.
  const illada::PhiloxWords w = illada::philox(row.seed, uint32_t(out.top_id / 2), row.position, row.step, 0);
  const float g = out.top_id % 2 ? illada::gumbel(w.w2, w.w3) : illada::gumbel(w.w0, w.w1);
  const int32_t before = best.id;
  best.offer(out.top, illada::noised_score(out.top, row.temperature, g), out.top_id);
  for (int b = 0; b < blocks; ++b)
    if (block_top[b] > -kInf)
      noise_block(noise, row.temperature, logits + b * kBlock, first_id + b * kBlock, block_top[b], best);
  if (best.id != before) out.best_score = best.score, out.best_logit = best.logit, out.best_id = best.id;
}

struct Logits {  // the logits of ids [first, first + ids) of all rows
  const void* data;
  int64_t stride_b, stride_k, count, first, ids, segments;
  const Row* rows;
  int64_t offset(int64_t r) const {
    return count ? rows[r].index / count * stride_b + rows[r].index % count * stride_k : r * stride_k;
  }
};

template <class T>
void run_rows(const Logits& in, int64_t rows, const Edits& edits, int needs, Partial* partials, int threads) {
  const int64_t here = (in.ids + kSegment - 1) / kSegment, first_segment = in.first / kSegment;
  // few rows: several threads share one. Each span starts without a bar to beat, which costs time but changes nothing.
  const int64_t spans =
      rows >= 4 * threads ? 1 : std::min<int64_t>(here, (4 * threads + rows - 1) / std::max<int64_t>(rows, 1));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < rows * spans; ++item) {
    const int64_t r = item / spans, span = item % spans;
    const Row& row = in.rows[r];
    const T* p = static_cast<const T*>(in.data) + in.offset(r);
    const RowNoise noise(row.seed, row.position, row.step);
    Partial* out = partials + r * in.segments + first_segment;
    Best best{-kInf, -kInf, -1};
    if (span == 0)
      for (const Partial* q = out - first_segment; q != out; ++q)
        if (q->best_score > best.score) best = Best{q->best_score, q->best_logit, q->best_id};
    for (int64_t s = here * span / spans; s < here * (span + 1) / spans; ++s) {
      const int n = int(std::min<int64_t>(kSegment, in.ids - s * kSegment));
      run_segment(p + s * kSegment, n, in.first + s * kSegment, edits, row, noise, needs, best, out[s]);
    }
  }
}

// ---- selection ---------------------------------------------------------------------------------------------------------------
struct Result {
  int64_t proposal;  // -1: a bad row
  float confidence, probability, entropy, held_probability;
};

inline float exponential(float logit, const Partial& p, float scale) {  // of a logit, in units of sum
  return float(std::exp(double(std::max((logit - p.top) * scale, -1e4f))));
}

Partial merge(const Partial* parts, int64_t segments, float scale) {
  Partial all{0, 0, -kInf, -kInf, -kInf, -kInf, -kInf, -1, -1, 0};
  Best best{-kInf, -kInf, -1};
  for (const Partial* p = parts; p != parts + segments; ++p) {
    all.bad |= p->bad;
    all.second = std::max(std::max(all.second, p->second), std::min(p->top, all.top));
    if (p->top > all.top) all.top = p->top, all.top_id = p->top_id;
    all.held_logit = std::max(all.held_logit, p->held_logit);
    if (p->best_id >= 0) best.offer(p->best_logit, p->best_score, p->best_id);
  }
  all.best_logit = best.logit, all.best_id = best.id;
  for (const Partial* p = parts; p != parts + segments; ++p) {
    if (p->top == -kInf) continue;
    const double z = std::max((double(p->top) - all.top) * scale, -1e4), weight = std::exp(z);
    all.sum += weight * p->sum;
    all.sum_ez += weight * (p->sum_ez + z * p->sum);
  }
  return all;
}

Result finish(const Row& row, const Partial* parts, int64_t segments, int confidence) {
  const Partial p = merge(parts, segments, row.scale);
  if (p.bad || p.best_id < 0) return Result{-1, -kInf, 0, 0, 0};
  Result r{p.best_id, 0, float(exponential(p.best_logit, p, row.scale) / p.sum), 0, 0};
  r.entropy = float(std::max(std::log(p.sum) - p.sum_ez / p.sum, 0.0));
  if (p.held_logit > -kInf) r.held_probability = float(exponential(p.held_logit, p, row.scale) / p.sum);
  if (confidence == kProbability) r.confidence = r.probability;
  if (confidence == kMargin) r.confidence = float((1.0 - exponential(p.second, p, row.scale)) / p.sum);
  if (confidence == kNegEntropy) r.confidence = 0.0f - r.entropy;
  if (confidence == kRandom) {
    const illada::PhiloxWords w = illada::philox(row.seed, 0, row.position, row.step, 1);
    r.confidence = illada::philox_unit(w.w0, w.w1);
  }
  return r;
}

struct Ranked {
  float key;  // rises with rank
  int64_t position, k;
  const Result* result;
  bool operator<(const Ranked& o) const {
    return key != o.key ? key < o.key : position != o.position ? position < o.position : k < o.k;
  }
};

// How many of the n ranked candidates the rule commits, from the front.
int64_t commit_count(int rule, const Ranked* ranked, int64_t n, int64_t count, float number) {
  if (rule == kTopK) return std::min(n, std::max<int64_t>(count, 0));
  double entropies = 0;
  for (int64_t r = 0; r < n; ++r) {
    const Result& at = *ranked[r].result;
    bool pass = true;
    if (rule == kThreshold) pass = at.confidence >= number;
    if (rule == kFactor) pass = at.confidence >= 1.0f - number / float(r + 2);  // ranks count from 1: f / (r + 1)
    if (rule == kEntropyBound) pass = entropies <= double(number);
    entropies += at.entropy;
    if (rule == kEntropyBoundInclusive) pass = entropies <= double(number);
    if (!pass && r > 0) return r;
  }
  return n;
}

struct Call {  // what all sequences share
  int64_t* tokens;
  int64_t token_stride, length;
  const int64_t* positions;
  int64_t count;
  const uint8_t* frozen;
  int64_t frozen_stride, mask_id;
  int rule, revise;
  const float* scores;
  const int64_t* integers;
  const float* numbers;
  int64_t* proposal;
  float* confidence;
  uint8_t* committed;
  int32_t* remaining;

  bool candidate(int64_t b, int64_t k) const {
    const int64_t at = positions[b * count + k];
    return at >= 0 && at < length && !(frozen && frozen[b * frozen_stride + at]);
  }
  int64_t& token(int64_t b, int64_t k) const { return tokens[b * token_stride + positions[b * count + k]]; }
};

// One sequence. `rows` and `results` are its rows, in order of k; `ranked` and `lowest` have room for K entries each.
void select_sequence(const Call& c, int64_t b, const Row* rows, const Result* results, int64_t n_rows, Ranked* ranked,
                     Ranked* lowest) {
  int64_t n = 0, m = 0, next = 0;
  const float tau = c.numbers[b * kNumbers + kEditTau];
  for (int64_t k = 0; k < c.count; ++k) {
    const int64_t i = b * c.count + k;
    c.proposal[i] = -1, c.confidence[i] = -kInf, c.committed[i] = 0;
    const bool has_row = next < n_rows && rows[next].index == i;
    const Row* row = has_row ? rows + next : nullptr;
    const Result* result = has_row ? results + next : nullptr;
    next += has_row;
    if (!c.candidate(b, k)) continue;
    const int64_t position = c.positions[i];
    if (c.revise == kRemaskByScores && !has_row) {  // holds a token
      const float score = c.scores[i];
      if (score == score)
        lowest[m++] = Ranked{score, position, k, nullptr}, c.proposal[i] = c.token(b, k), c.confidence[i] = score;
    }
    if (!has_row || result->proposal < 0) continue;
    c.proposal[i] = result->proposal, c.confidence[i] = result->confidence;
    if (row->masked) {
      const float key =
          c.rule == kEntropyBound || c.rule == kEntropyBoundInclusive ? result->entropy : -result->confidence;
      ranked[n++] = Ranked{key, position, k, result};
    } else if (c.revise == kEdit) {
      c.committed[i] = result->proposal != row->held && result->probability >= tau;
    } else {
      lowest[m++] = Ranked{result->held_probability, position, k, nullptr};
      c.proposal[i] = row->held, c.confidence[i] = result->held_probability;
    }
  }
  std::sort(ranked, ranked + n);
  const int64_t chosen =
      commit_count(c.rule, ranked, n, c.integers[b * kIntegers + kCount], c.numbers[b * kNumbers + kRuleNumber]);
  for (int64_t r = 0; r < chosen; ++r) c.committed[b * c.count + ranked[r].k] = 1;
  for (int64_t k = 0; k < c.count; ++k)
    if (c.committed[b * c.count + k]) c.token(b, k) = c.proposal[b * c.count + k];
  std::sort(lowest, lowest + m);
  for (int64_t r = 0; r < std::min(m, c.integers[b * kIntegers + kRemaskCount]); ++r)
    c.token(b, lowest[r].k) = c.mask_id;
  c.remaining[b] = 0;
  for (int64_t k = 0; k < c.count; ++k) c.remaining[b] += c.candidate(b, k) && c.token(b, k) == c.mask_id;
}

}  // namespace

// Lists the rows whose logits are needed, in order of (b, k); their number goes to *row_count.
extern "C" int ILLADA_ISA_FN(illada_unmask_plan_cpu)(const int64_t* tokens, int64_t token_stride, int64_t batch,
                                                     int64_t length, const int64_t* positions, int64_t count,
                                                     const uint8_t* frozen, int64_t frozen_stride,
                                                     const int64_t* noise_positions, int64_t mask_id, int revise,
                                                     const int64_t* integers, const float* numbers, void* rows,
                                                     int64_t* row_count) {
  Row* out = static_cast<Row*>(rows);
  const float largest = std::numeric_limits<float>::max();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = b * count + k, at = positions[i];
      if (at < 0 || at >= length || (frozen && frozen[b * frozen_stride + at])) continue;
      const int64_t held = tokens[b * token_stride + at];
      const bool masked = held == mask_id;
      if (!masked && revise != kEdit && revise != kRemask) continue;
      const float t = numbers[b * kNumbers + kTemperature], tc = numbers[b * kNumbers + kConfidenceTemperature];
      *out++ = Row{i,
                   held,
                   uint64_t(integers[b * kIntegers + kSeed]),
                   uint32_t(noise_positions ? noise_positions[i] : at),
                   uint32_t(integers[b * kIntegers + kStep]),
                   masked && t > 0 ? std::min(t, largest) : 0.0f,
                   tc > 0 ? std::min(1.0f / tc, largest) : 1.0f,
                   masked};
    }
  *row_count = out - static_cast<Row*>(rows);
  return ILLADA_OK;
}

// Logits of ids [first, first + ids), first a multiple of ILLADA_UNMASK_SEGMENT, of the rows from `rows` on. count = K: row r lies at
// (index / K) * stride_b + (index % K) * stride_k; count = 0: at r * stride_k. Fills those ids' entries of partials (rows, segments).
// edit_ids rise; edit_values are added, -inf forbids. needs: 1 if the entropy is needed, plus 2 if the second maximum is.
extern "C" int ILLADA_ISA_FN(illada_unmask_rows_cpu)(const void* logits, int dtype, int64_t stride_b, int64_t stride_k,
                                                     int64_t count, const void* rows, int64_t row_count, int64_t first,
                                                     int64_t ids, int64_t segments, const int64_t* edit_ids,
                                                     const float* edit_values, int64_t edits, int needs, void* partials,
                                                     int threads) {
  if (first % kSegment || first + ids > segments * kSegment) return ILLADA_BAD_ARGUMENT;
  const Logits in{logits, stride_b, stride_k, count, first, ids, segments, static_cast<const Row*>(rows)};
  const Edits changes{edit_ids, edit_values, edits};
  Partial* out = static_cast<Partial*>(partials);
  if (dtype == ILLADA_F32) run_rows<float>(in, row_count, changes, needs, out, threads);
  else if (dtype == ILLADA_BF16) run_rows<bf16>(in, row_count, changes, needs, out, threads);
  else if (dtype == ILLADA_F16) run_rows<fp16>(in, row_count, changes, needs, out, threads);
  else return ILLADA_BAD_DTYPE;
  return ILLADA_OK;
}

extern "C" int ILLADA_ISA_FN(illada_unmask_select_cpu)(int64_t* tokens, int64_t token_stride, int64_t batch,
                                                       int64_t length, const int64_t* positions, int64_t count,
                                                       const uint8_t* frozen, int64_t frozen_stride, int64_t mask_id,
                                                       int rule, int confidence, int revise, const float* scores,
                                                       const int64_t* integers, const float* numbers, const void* rows,
                                                       int64_t row_count, const void* partials, int64_t segments,
                                                       int64_t* proposal, float* confidences, uint8_t* committed,
                                                       int32_t* remaining, int threads) {
  const Row* all_rows = static_cast<const Row*>(rows);
  const Call call{tokens, token_stride, length,   positions, count,    frozen,      frozen_stride, mask_id,  rule,
                  revise, scores,       integers, numbers,   proposal, confidences, committed,     remaining};
  Result* results = new (std::nothrow) Result[row_count + 1];
  Ranked* room = new (std::nothrow) Ranked[2 * batch * count + 1];
  int64_t* starts = new (std::nothrow) int64_t[batch + 1];
  const bool ok = results && room && starts;
  if (ok) {
#pragma omp parallel for num_threads(threads) if (row_count * segments > 256)
    for (int64_t r = 0; r < row_count; ++r)
      results[r] = finish(all_rows[r], static_cast<const Partial*>(partials) + r * segments, segments, confidence);
    for (int64_t b = 0, r = 0; b <= batch; starts[b++] = r)
      while (b > 0 && r < row_count && all_rows[r].index < b * count) ++r;
#pragma omp parallel for num_threads(threads) if (batch * count > 4096)
    for (int64_t b = 0; b < batch; ++b)
      select_sequence(call, b, all_rows + starts[b], results + starts[b], starts[b + 1] - starts[b],
                      room + 2 * b * count, room + (2 * b + 1) * count);
  }
  delete[] starts;
  delete[] room;
  delete[] results;
  return ok ? ILLADA_OK : ILLADA_NO_MEMORY;
}

// The noise as `rows` draws it, for tests: words (ids / 2, 4) and Gumbel values (ids), ids a multiple of ILLADA_UNMASK_SEGMENT.
extern "C" int ILLADA_ISA_FN(illada_unmask_noise_cpu)(int64_t seed, int64_t position, int64_t step, int64_t ids,
                                                      uint32_t* words, float* noise) {
  if (ids % kSegment) return ILLADA_BAD_ARGUMENT;
  const RowNoise row{uint64_t(seed), uint32_t(position), uint32_t(step)};
  for (int64_t id = 0; id < ids; id += kWidth) {
    const Words<1> w = philox_groups<1>(row, first_pairs(id));
    const vu high = w.top(0), low = w.low(0);
    for (int i = 0; i < kWidth; ++i) {
      words[2 * (id + i)] = high[i], words[2 * (id + i) + 1] = low[i];
      noise[id + i] = illada::gumbel(high[i], low[i]);
    }
  }
  return ILLADA_OK;
}
