// unmask on a CPU, between Python's matrix products: plan (which candidate rows take part), rows (one pass over their logits), select.
//   rows: per row of l: max, second max, sum of exp, sum of e * z, and argmax of l + T * Gumbel, in segments of kSegment ids that fit
//   the L1 cache and are read from memory once. Each segment leaves a Partial; select merges them in order of id. So results
//   do not depend on threads, on other rows, or on how a caller slices the vocab.
//   Noise costs 9 integer products per id pair; logarithms are computed only for ids that can still win: T * g > best - max l needs
//   u < exp(-(best - max l) / T), which the top word of u tells. The bound is one-sided, so the argmax is exact.
//   Sums are double, so that rows which are permutations of each other tie (exactly, while the vocab fits a segment).
//   Ties: argmax to the lowest id, ranks to the lowest position. A NaN or +inf logit, or no id above -inf, makes the row bad: -1, -inf.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored                                                                           \
    "-Wmaybe-uninitialized"  // GCC 12 warns of the undefined operands inside its own AVX-512 intrinsics
#endif

#include <algorithm>
#include <limits>
#include <new>

#include "illada/api.h"
#include "isa.h"
#include "unmask_select.h"

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
