// unmask on the CPU: the draw from the ids that top_k, top_p and min_p keep.
//
// Runs after a pass that left the maxima and sums of a row in its partials, while the row is in L2. All three are a
// least logit (unmask_bound.h); what lies below counts as -inf, so that the ids that are kept have the noise that they
// always have.
#pragma once
#include <algorithm>

#include "unmask_bound.h"

namespace {

// The settings of one sequence.
struct Truncation {
  int64_t top_k;  // 0 or less: all
  float top_p, log_min_p;  // not below 1, -inf: all
};

struct Truncations {
  int64_t per_sequence;  // rows
  const int64_t* top_ks;
  const float *top_ps, *log_min_ps;
  Truncation of(const Row& row) const {
    const int64_t b = row.index / per_sequence;
    return Truncation{top_ks[b], top_ps[b], log_min_ps[b]};
  }
};

// Draws again a row whose partials hold its maxima and sums, from the ids that are kept.
void draw_truncated(const RowLogits& logits, const Row& row, const Truncation& how, Partial* parts) {
  float top = -kInf;
  for (int64_t s = 0; s < logits.segments(); ++s) {
    if (parts[s].bad) return;
    top = std::max(top, parts[s].top);
  }
  if (top == -kInf) return;
  float bound = -kInf;
  const bool by_count = how.top_k > 0 && how.top_k < logits.ids;
  if (by_count || how.top_p < 1) {
    Bound find(logits, top);
    if (by_count) bound = find.by_count(how.top_k);
    // what all ids weigh, where the first pass has weighed them at this temperature
    double total = 0;
    if (!by_count && row.scale == 1.0f / row.temperature)
      for (int64_t s = 0; s < logits.segments(); ++s)
        total += parts[s].sum * std::exp((double(parts[s].top) - top) * row.scale);
    if (how.top_p < 1) bound = std::max(bound, find.by_mass(row.temperature, how.top_p, bound, total));
  }
  volatile float drop = row.temperature * how.log_min_p;  // rounds before the sum: no fused multiply-add
  bound = std::max(bound, top + drop);

  alignas(64) float scratch[kSegment], kept[kSegment];
  float block_top[kSegment / kBlock];
  const RowNoise noise(row.seed, row.position, row.step);
  Best best{-kInf, -kInf, -1};
  for (int64_t s = 0; s < logits.segments(); ++s) {
    Partial& out = parts[s];
    out.best_score = out.best_logit = -kInf, out.best_id = -1;
    if (!(out.top >= bound) || out.top == -kInf) continue;
    const float* all = logits.segment(s, scratch);
    const int blocks = logits.padded(s) / kBlock;
    for (int b = 0; b < blocks; ++b) {
      vf largest = splat(-kInf);
      for (int j = b * kBlock; j < (b + 1) * kBlock; j += kWidth) {
        const vf v = load(all + j), x = v >= bound ? v : splat(-kInf);
        store(kept + j, x);
        largest = max(x, largest);
      }
      block_top[b] = reduce_max(largest);
    }
    draw_segment<true>(kept, blocks, s * kSegment, block_top, row, noise, best, out);
  }
}

void draw_truncated_rows(const Logits& in, int64_t rows, const Edits& edits, int needs, const Truncations& truncations,
                         Partial* partials, int threads) {
  const bool shared = rows < 4 * threads;  // by threads: the first pass of a row
  if (shared) run_rows(in, rows, edits, needs, partials, threads);
#pragma omp parallel num_threads(threads)
  {
    const FloatMode mode;
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < rows; ++r) {
      const Row& row = in.rows[r];
      if (!shared) run_segments(in, r, edits, needs, 0, in.segments, partials);
      if (!(row.temperature > 0)) continue;
      Partial* parts = partials + r * in.segments;
      const RowLogits logits{in.reader, in.row(r), in.ids, edits, parts};
      draw_truncated(logits, row, truncations.of(row), parts);
    }
  }
}

}  // namespace
