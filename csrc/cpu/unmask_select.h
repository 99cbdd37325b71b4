// unmask on the CPU, the last step: merges the segments of a row, ranks a sequence's candidates, writes tokens.
#pragma once
#include <algorithm>
#include <cmath>

#include "illada/api.h"
#include "unmask_rows.h"

namespace {

// Columns of the (B, n) parameter arrays.
enum Integer { kSeed, kStep, kLeast, kRemaskCount, kIntegers };
enum Number { kTemperature, kConfidenceTemperature, kRuleNumber, kEditTau, kRankTemperature, kNumbers };

struct Result {
  int64_t proposal;  // drawn; -1: a bad row
  int64_t best;  // the id of the maximum
  float confidence, probability, entropy, held_probability;
};

// Returns exp of a logit, in units of p.sum.
inline float exponential(float logit, const Partial& p, float scale) {
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
    if (!((p->top - all.top) * scale >= kLeastShifted)) continue;
    const double z = (double(p->top) - all.top) * scale, weight = std::exp(z);
    all.sum += weight * p->sum;
    all.sum_ez += weight * (p->sum_ez + z * p->sum);
  }
  return all;
}

Result finish(const Row& row, const Partial* parts, int64_t segments, int rule, int confidence) {
  const Partial p = merge(parts, segments, row.scale);
  if (p.bad || p.best_id < 0) return Result{-1, -1, -kInf, 0, 0, 0};
  const float rated = rule == ILLADA_RENOISE ? p.top : p.best_logit;  // the logit of the token that is reported
  Result r{p.best_id, p.top_id, 0, float(exponential(rated, p, row.scale) / p.sum), 0, 0};
  r.entropy = float(std::max(std::log(p.sum) - p.sum_ez / p.sum, 0.0));
  if (p.held_logit > -kInf) r.held_probability = float(exponential(p.held_logit, p, row.scale) / p.sum);
  if (confidence == ILLADA_PROBABILITY) r.confidence = r.probability;
  if (confidence == ILLADA_MARGIN) r.confidence = float((1.0 - exponential(p.second, p, row.scale)) / p.sum);
  if (confidence == ILLADA_NEG_ENTROPY) r.confidence = 0.0f - r.entropy;
  if (confidence == ILLADA_RANDOM) {
    const illada::PhiloxWords w = illada::philox(row.seed, 0, row.position, row.step, 1);
    r.confidence = illada::philox_unit(w.w0, w.w1);
  }
  if (confidence == ILLADA_SAMPLED) {
    const float z = row.temperature > 0 ? (rated - p.top) / row.temperature : 0.0f;
    r.confidence = std::min(float(1.0 / p.sum), float(std::exp(double(z))));
  }
  return r;
}

struct Ranked {
  bool deferred;  // ranks after those that are not
  float key;  // ascends with rank
  int64_t position, k;
  const Result* result;
  bool operator<(const Ranked& o) const {
    return deferred != o.deferred   ? o.deferred
           : key != o.key           ? key < o.key
           : position != o.position ? position < o.position
                                    : k < o.k;
  }
};

// Returns how many of the n ranked candidates the rule commits, from the front: `least`, and what passes after them.
int64_t commit_count(int rule, const Ranked* ranked, int64_t n, int64_t least, float number) {
  double entropies = 0;
  for (int64_t r = 0; r < n; ++r) {
    const Result& at = *ranked[r].result;
    bool pass = false;
    if (rule == ILLADA_THRESHOLD) pass = at.confidence >= number;
    if (rule == ILLADA_FACTOR) pass = at.confidence >= 1.0f - number / float(r + 2);  // ranks count from 1: f / (r + 1)
    if (rule == ILLADA_ENTROPY_BOUND || rule == ILLADA_RENOISE) pass = entropies <= double(number);
    entropies += at.entropy;
    if (rule == ILLADA_ENTROPY_BOUND_INCLUSIVE) pass = entropies <= double(number);
    if (!pass && r >= least) return r;
  }
  return n;
}

// What all sequences share.
struct Call {
  int64_t* tokens;
  int64_t token_stride, length;
  const int64_t* positions;
  int64_t count;
  const uint8_t* frozen;
  int64_t frozen_stride, mask_id, vocab;
  int rule, revise, order;
  const int64_t* defer;
  int64_t defers;
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
  Ranked ranked(int64_t b, int64_t k, const Row& row, const Result& result) const {
    const bool by_entropy =
        rule == ILLADA_ENTROPY_BOUND || rule == ILLADA_ENTROPY_BOUND_INCLUSIVE || rule == ILLADA_RENOISE;
    float score = by_entropy ? -result.entropy : result.confidence;
    const float t = numbers[b * kNumbers + kRankTemperature];
    if (t > 0) {
      const illada::PhiloxWords w = illada::philox(row.seed, 0, row.position, row.step, 2);
      score = illada::noised_score(score, t, illada::gumbel(w.w0, w.w1));
    }
    if (order == ILLADA_FROM_LEFT) score = 0.0f;
    const bool deferred = std::find(defer, defer + defers, result.proposal) != defer + defers;
    return Ranked{deferred, -score, positions[b * count + k], k, &result};
  }
};

// Returns floor(u * vocab / 2^64) for a u of 64 bits.
inline int64_t redrawn(const Row& row, int64_t vocab) {
  const illada::PhiloxWords w = illada::philox(row.seed, 0, row.position, row.step, 3);
  return int64_t((w.w0 * uint64_t(vocab) + (w.w1 * uint64_t(vocab) >> 32)) >> 32);  // vocab < 2^31
}

// Selects in one sequence. `rows` and `results`: its rows, in order of k. `ranked` and `lowest` have room for K
// entries.
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
    if (c.revise == ILLADA_REMASK_BY_SCORES && !has_row) {  // holds a token
      const float score = c.scores[i];
      if (score == score)
        lowest[m++] = Ranked{false, score, position, k, nullptr}, c.proposal[i] = c.token(b, k),
        c.confidence[i] = score;
    }
    if (!has_row || result->proposal < 0) continue;
    c.proposal[i] = c.rule == ILLADA_RENOISE ? result->best : result->proposal;
    c.confidence[i] = result->confidence;
    if (row->masked) {
      ranked[n++] = c.ranked(b, k, *row, *result);
    } else if (c.revise == ILLADA_EDIT) {
      c.committed[i] = result->proposal != row->held && result->probability >= tau;
    } else {
      lowest[m++] = Ranked{false, result->held_probability, position, k, nullptr};
      c.proposal[i] = row->held, c.confidence[i] = result->held_probability;
    }
  }
  std::sort(ranked, ranked + n);
  const int64_t chosen =
      commit_count(c.rule, ranked, n, c.integers[b * kIntegers + kLeast], c.numbers[b * kNumbers + kRuleNumber]);
  for (int64_t r = 0; r < chosen; ++r) c.committed[b * c.count + ranked[r].k] = 1;
  if (c.rule == ILLADA_RENOISE) {
    for (int64_t r = 0; r < n; ++r)
      c.token(b, ranked[r].k) =
          r < chosen ? ranked[r].result->proposal : redrawn(rows[ranked[r].result - results], c.vocab);
    c.remaining[b] = int32_t(-chosen);
    for (int64_t k = 0; k < c.count; ++k) c.remaining[b] += c.candidate(b, k);
    return;
  }
  for (int64_t k = 0; k < c.count; ++k)
    if (c.committed[b * c.count + k]) c.token(b, k) = c.proposal[b * c.count + k];
  std::sort(lowest, lowest + m);
  for (int64_t r = 0; r < std::min(m, c.integers[b * kIntegers + kRemaskCount]); ++r)
    c.token(b, lowest[r].k) = c.mask_id;
  c.remaining[b] = 0;
  for (int64_t k = 0; k < c.count; ++k) c.remaining[b] += c.candidate(b, k) && c.token(b, k) == c.mask_id;
}

}  // namespace
