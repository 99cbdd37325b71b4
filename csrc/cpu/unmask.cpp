// unmask on the CPU, between Python's matmuls: plan (which candidate rows take part), rows (unmask_rows.h: one pass
// over their logits l), truncate (unmask_truncate.h: only with top_k, top_p or min_p), select (unmask_select.h).
//
//   proposal = argmax l + T * Gumbel;  z = (l - max l) / Tc;  confidences from sum exp(z), sum z exp(z), the second max
//
// rows: a thread owns segments of 2048 ids, which fit L1 and are read from memory once; each leaves a Partial of 48
// bytes. select merges the Partials in order of id, so results do not depend on threads, other rows, or slices of the
// vocab. Noise costs 9 integer multiplies per pair of ids (unmask_noise.h); logarithms only where an id can still win.
// Sums accumulate in float64, so rows that are permutations of each other tie, exactly if the vocab fits a segment.
// Ties: argmax to the lowest id, ranks to the lowest position. A NaN or +inf logit, or no id above -inf, makes a row
// bad: proposal -1, confidence -inf.
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of undefined operands inside its own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <algorithm>
#include <limits>
#include <new>

#include "illada/api.h"
#include "float_mode.h"
#include "isa.h"
#include "unmask_select.h"
#include "unmask_truncate.h"

// Lists the rows whose logits are needed, in order of (b, k), and their number in *row_count.
extern "C" int ILLADA_ISA_FN(illada_unmask_plan_cpu)(const int64_t* tokens, int64_t token_stride, int64_t batch,
                                                     int64_t length, const int64_t* positions, int64_t count,
                                                     const uint8_t* frozen, int64_t frozen_stride,
                                                     const int64_t* noise_positions, int64_t mask_id, int rule,
                                                     int revise, const int64_t* integers, const float* numbers,
                                                     void* rows, int64_t* row_count) {
  Row* out = static_cast<Row*>(rows);
  const float largest = std::numeric_limits<float>::max();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = b * count + k, at = positions[i];
      if (at < 0 || at >= length || (frozen && frozen[b * frozen_stride + at])) continue;
      const int64_t held = tokens[b * token_stride + at];
      const bool masked = held == mask_id || rule == ILLADA_RENOISE;
      if (!masked && revise != ILLADA_EDIT && revise != ILLADA_REMASK) continue;
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

// Fills the entries of partials (rows, segments) for ids [first, first + ids); first is a multiple of
// ILLADA_UNMASK_SEGMENT. count = K: a row's logits start at (index / K) * stride_b + (index % K) * stride_k; count = 0:
// row r's at r * stride_k. edit_ids ascend; edit_values are added, -inf forbids. needs: illada_unmask_needs.
extern "C" int ILLADA_ISA_FN(illada_unmask_rows_cpu)(const void* logits, int dtype, int64_t stride_b, int64_t stride_k,
                                                     int64_t count, const void* rows, int64_t row_count, int64_t first,
                                                     int64_t ids, int64_t segments, const int64_t* edit_ids,
                                                     const float* edit_values, int64_t edits, int needs, void* partials,
                                                     int threads) {
  if (first % kSegment || first + ids > segments * kSegment) return ILLADA_BAD_ARGUMENT;
  const Reader reader = reader_of(dtype);
  if (!reader.fetch) return ILLADA_BAD_DTYPE;
  const Logits in{reader, logits, stride_b, stride_k, count, first, ids, segments, static_cast<const Row*>(rows)};
  run_rows(in, row_count, Edits{edit_ids, edit_values, edits}, needs, static_cast<Partial*>(partials), threads);
  return ILLADA_OK;
}

extern "C" int ILLADA_ISA_FN(illada_unmask_truncate_cpu)(const void* logits, int dtype, int64_t stride_b,
                                                         int64_t stride_k, int64_t count, const void* rows,
                                                         int64_t row_count, int64_t ids, int64_t segments,
                                                         const int64_t* edit_ids, const float* edit_values,
                                                         int64_t edits, int needs, int64_t per_sequence,
                                                         const int64_t* top_ks, const float* top_ps,
                                                         const float* log_min_ps, void* partials, int threads) {
  const Reader reader = reader_of(dtype);
  if (!reader.fetch) return ILLADA_BAD_DTYPE;
  const Logits in{reader, logits, stride_b, stride_k, count, 0, ids, segments, static_cast<const Row*>(rows)};
  const Truncations how{per_sequence, top_ks, top_ps, log_min_ps};
  draw_truncated_rows(in, row_count, Edits{edit_ids, edit_values, edits}, needs, how, static_cast<Partial*>(partials),
                      threads);
  return ILLADA_OK;
}

extern "C" int ILLADA_ISA_FN(illada_unmask_select_cpu)(
    int64_t* tokens, int64_t token_stride, int64_t batch, int64_t length, const int64_t* positions, int64_t count,
    const uint8_t* frozen, int64_t frozen_stride, int64_t mask_id, int64_t vocab, int rule, int confidence, int revise,
    int order, const int64_t* defer, int64_t defers, const float* scores, const int64_t* integers, const float* numbers,
    const void* rows, int64_t row_count, const void* partials, int64_t segments, int64_t* proposal, float* confidences,
    uint8_t* committed, int32_t* remaining, int threads) {
  const Row* all_rows = static_cast<const Row*>(rows);
  const Call call{tokens,  token_stride, length,  positions, count,       frozen,    frozen_stride,
                  mask_id, vocab,        rule,    revise,    order,       defer,     defers,
                  scores,  integers,     numbers, proposal,  confidences, committed, remaining};
  Result* results = new (std::nothrow) Result[row_count + 1];
  Ranked* room = new (std::nothrow) Ranked[2 * batch * count + 1];
  int64_t* starts = new (std::nothrow) int64_t[batch + 1];
  const bool ok = results && room && starts;
  if (ok) {
#pragma omp parallel num_threads(threads) if (row_count * segments > 256)
    {
      const FloatMode mode;
#pragma omp for
      for (int64_t r = 0; r < row_count; ++r)
        results[r] =
            finish(all_rows[r], static_cast<const Partial*>(partials) + r * segments, segments, rule, confidence);
    }
    for (int64_t b = 0, r = 0; b <= batch; starts[b++] = r)
      while (b > 0 && r < row_count && all_rows[r].index < b * count) ++r;
#pragma omp parallel num_threads(threads) if (batch * count > 4096)
    {
      const FloatMode mode;
#pragma omp for
      for (int64_t b = 0; b < batch; ++b)
        select_sequence(call, b, all_rows + starts[b], results + starts[b], starts[b + 1] - starts[b],
                        room + 2 * b * count, room + (2 * b + 1) * count);
    }
  }
  delete[] starts;
  delete[] room;
  delete[] results;
  return ok ? ILLADA_OK : ILLADA_NO_MEMORY;
}

// Draws the noise as `rows` does, for tests: words (ids / 2, 4) and Gumbel values (ids); ids is a multiple of
// ILLADA_UNMASK_SEGMENT.
extern "C" int ILLADA_ISA_FN(illada_unmask_noise_cpu)(int64_t seed, int64_t position, int64_t step, int64_t ids,
                                                      uint32_t* words, float* noise) {
  if (ids % kSegment) return ILLADA_BAD_ARGUMENT;
  const RowNoise row{uint64_t(seed), uint32_t(position), uint32_t(step)};
  for (int64_t id = 0; id < ids; id += kWidth) {
    const Words<1> w = philox_groups<1>(row, [=](int) { return first_pairs(id); });
    const vu high = w.top(0), low = w.low(0);
    for (int i = 0; i < kWidth; ++i) {
      words[2 * (id + i)] = high[i], words[2 * (id + i) + 1] = low[i];
      noise[id + i] = illada::gumbel(high[i], low[i]);
    }
  }
  return ILLADA_OK;
}
