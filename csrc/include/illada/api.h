// Every extern "C" entry point of the library, and every number that C++, CUDA and Python share. No torch, no Python.
//
// Returns 0 or an error code (CPU: illada_error; CUDA: cudaError_t). `dtype` is an illada_dtype. Strides are in
// elements, offsets are 64-bit. `threads`: OpenMP threads. A null pointer stands for an absent optional tensor. Names
// end in what they run on: cpu, cuda (any GPU), sm90a (compute capability 9.0).
#pragma once
#include <cstdint>

enum illada_dtype { ILLADA_F32 = 0, ILLADA_BF16 = 1, ILLADA_F16 = 2 };
enum illada_error { ILLADA_OK = 0, ILLADA_BAD_DTYPE = 1, ILLADA_BAD_ARGUMENT = 2, ILLADA_NO_MEMORY = 3 };

// Declares a CPU function once per instruction set; bindings.cpp chooses one at run time. Only x86-64 has more than
// scalar, and only what multiplies bf16 is another for avx512_bf16 than for avx512.
#if defined(__x86_64__) && !defined(ILLADA_SCALAR_ONLY)
#define ILLADA_CPU(name, ...)                \
  extern "C" int name##_scalar(__VA_ARGS__); \
  extern "C" int name##_avx2(__VA_ARGS__);   \
  extern "C" int name##_avx512(__VA_ARGS__);
#define ILLADA_CPU_BF16(name, ...)                \
  ILLADA_CPU(name, __VA_ARGS__)                   \
  extern "C" int name##_avx512_bf16(__VA_ARGS__);
#else
#define ILLADA_CPU(name, ...) extern "C" int name##_scalar(__VA_ARGS__);
#define ILLADA_CPU_BF16(name, ...) ILLADA_CPU(name, __VA_ARGS__)
#endif

// ---- attention (csrc/cpu/attention_{fwd,bwd}.cpp) -------------------------------------------------------------------
// q (batch, queries, heads, dim); k, v (batch, keys, kv_heads, dim or dim_v), the last dimension contiguous:
// strides[0..8] are those of batch, row and head of each. bounds: int32 (batch or 1, queries or 1, 4) or null;
// strides[9..10] are those of batch and row. out (batch, queries, heads, dim_v) and lse (batch, heads, queries) are
// contiguous.
ILLADA_CPU_BF16(illada_attention_fwd_cpu, int dtype, const void* q, const void* k, const void* v, const int32_t* bounds,
                void* out, float* lse, int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                int64_t dim, int64_t dim_v, const int64_t* strides, float scale, int threads)
// The same; strides[11..16] are those of out and dout. lse and dlse (or null) are contiguous. dq is float32 for every
// dtype, contiguous, zeros on entry; dk and dv are contiguous.
ILLADA_CPU_BF16(illada_attention_bwd_cpu, int dtype, const void* q, const void* k, const void* v, const int32_t* bounds,
                const void* out, const float* lse, const void* dout, const float* dlse, float* dq, void* dk, void* dv,
                int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                int64_t dim_v, const int64_t* strides, float scale, int threads)
// CUDA (csrc/cuda/attention_fwd_sm90a.cuh): one function per dtype. scale > 0; dim 64, 96, 128 or 256. Addresses and
// strides of q, k and v are multiples of 16 bytes; rows of bounds are 16 bytes. pack: query heads of a kv head in one
// tile, 1 or all of them. parts: (splits, batch, heads, queries, dim), then (splits, batch, heads, queries); null with
// one split. counter: one zero, or null. blocks: of the grid.
#define ILLADA_ATTENTION_FWD_ARGUMENTS                                                                      \
  const void *q, const void *k, const void *v, const int32_t *bounds, void *out, float *lse, int64_t batch, \
      int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim, const int64_t *strides,  \
      float scale, int pack, int splits, float *parts, int32_t *counter, int blocks, void *stream
extern "C" int illada_attention_fwd_bf16_sm90a(ILLADA_ATTENTION_FWD_ARGUMENTS);
extern "C" int illada_attention_fwd_fp16_sm90a(ILLADA_ATTENTION_FWD_ARGUMENTS);

// CUDA (csrc/cuda/attention_bwd_*_sm90a.cu): bf16 and fp16; dims, strides and alignment as in the forward. preprocess
// fills the workspace that the others read; keys and queries follow, once each, in any order, on at most `blocks`
// blocks. With tiles = ceil(queries / 64): stats float32 (batch, heads, tiles, 2, 64), spans int32 (batch or 1, tiles *
// 64, 4), hulls int32 (batch or 1, tiles, 9), drawn int32 (2).
extern "C" int illada_attention_bwd_preprocess_sm90a(int dtype, const void* out, const float* lse, const void* dout,
                                                     const float* dlse, const int32_t* bounds, void* stats, void* spans,
                                                     void* hulls, int32_t* drawn, int64_t batch, int64_t queries,
                                                     int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                                                     int64_t bounds_batches, const int64_t* strides, void* stream);
extern "C" int illada_attention_bwd_keys_sm90a(int dtype, const void* q, const void* k, const void* v, const void* dout,
                                               const void* stats, const void* spans, const void* hulls, int32_t* drawn,
                                               void* dk, void* dv, int64_t batch, int64_t queries, int64_t keys,
                                               int64_t heads, int64_t kv_heads, int64_t dim, int64_t bounds_batches,
                                               const int64_t* strides, float scale, int blocks, void* stream);
extern "C" int illada_attention_bwd_queries_sm90a(int dtype, const void* q, const void* k, const void* v,
                                                  const void* dout, const void* stats, const void* spans,
                                                  const void* hulls, int32_t* drawn, void* dq, int64_t batch,
                                                  int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                                                  int64_t dim, int64_t bounds_batches, const int64_t* strides,
                                                  float scale, int blocks, void* stream);
// Replaces keys and queries, dim <= 128. sums: float32 (batch, heads, tiles, dim, 64), zeros on entry. The last bits of
// dq vary from run to run.
extern "C" int illada_attention_bwd_fused_sm90a(int dtype, const void* q, const void* k, const void* v,
                                                const void* dout, const void* stats, const void* spans,
                                                const void* hulls, int32_t* drawn, float* sums, void* dq, void* dk,
                                                void* dv, int64_t batch, int64_t queries, int64_t keys, int64_t heads,
                                                int64_t kv_heads, int64_t dim, int64_t bounds_batches,
                                                const int64_t* strides, float scale, int blocks, void* stream);

// ---- a layer between its matmuls (csrc/cpu/layer.cpp) ---------------------------------------------------------------
// sum = x + delta, or x where delta is null and sum is not written; out = norm(sum). All are (rows, dim), contiguous.
// in_fp32: rounds once, after the weight; else before it too.
ILLADA_CPU(illada_layer_rms_norm_cpu, int dtype, const void* x, const void* delta, const void* weight, int64_t rows,
           int64_t dim, float eps, int in_fp32, void* sum, void* out, int threads)
// q (batch, length, heads, dim); k, v with kv_heads; cos and sin (batch or 1, length, dim / 2). rotated, of q, is
// contiguous. Token i of sequence b has slot starts[b] + i (null: start + i), clamped, of keys and values (batch,
// slots, kv_heads, dim). Only where keep (batch, length) is true is written; null: all. values null: v is not looked
// at. strides[0..14]: batch, row and head of q, k, v, keys and values; strides[15]: batch of cos and sin.
ILLADA_CPU(illada_layer_rope_cpu, int dtype, const void* q, const void* k, const void* v, const float* cos,
           const float* sin, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t dim,
           const int64_t* strides, void* rotated, void* keys, void* values, int64_t slots, int64_t start,
           const int64_t* starts, const uint8_t* keep, int threads)
// gate_up (rows, 2 * width): gate, then up; out (rows, width). Contiguous.
ILLADA_CPU(illada_layer_swiglu_cpu, int dtype, const void* gate_up, int64_t rows, int64_t width, void* out, int threads)

// ---- the LM head (csrc/cpu/head.cpp) --------------------------------------------------------------------------------
// logits (rows, ids), out_stride from row to row, of ids first .. first + ids. hidden (rows, dim), contiguous, float32
// or of the weight's dtype; weight: `stride` from id to id; bias: float32 or null.
ILLADA_CPU_BF16(illada_head_cpu, const void* hidden, int hidden_dtype, int64_t rows, int64_t dim, const void* weight,
                const float* bias, int dtype, int64_t stride, int64_t first, int64_t ids, float* logits,
                int64_t out_stride, int threads)

// ---- masked_loss (csrc/cpu/masked_loss.cpp, csrc/cuda/masked_loss_*.cu) ---------------------------------------------
// Row r of a call is row row_index[r] (null: r) of logits; its columns [0, count) are the ids first .. first + count.
// bias: of those ids, or null. softcap 0: none. targets: (rows). forbid: ascending ids. Updates state (rows, 4)
// float64: max, sum of exp(z - max), z at the target, sum of allowed z (if want_total); these start from -inf, 0, -inf,
// 0.
ILLADA_CPU(illada_masked_loss_stats_cpu, const void* logits, int dtype, int64_t rows, int64_t stride,
           const int64_t* row_index, int64_t first, int64_t count, const float* bias, float softcap,
           const int64_t* targets, const int64_t* forbid, int64_t n_forbid, int want_total, double* state, int threads)
// out = (c1 exp(z - c0) - c2 - [target] c3) dz/dlogit, 0 at forbidden ids. coefficients: (rows, 4), c0 .. c3. out may
// be logits.
ILLADA_CPU(illada_masked_loss_dlogits_cpu, const void* logits, int64_t stride, void* out, int64_t out_stride, int dtype,
           int64_t rows, const int64_t* row_index, int64_t first, int64_t count, const float* bias, float softcap,
           const int64_t* targets, const int64_t* forbid, int64_t n_forbid, const float* coefficients, int threads)
// CUDA; illada_kernels/ops/masked_loss/row_kernels.py says what each does. Masked rows are compacted: index, targets
// and scale hold `held` or `capacity` of them from place `start` on; slot (rows) is each row's place or -1; info is
// {number of masked rows, first row whose target is not an id or -1}. Row r of x or logits starts at r / inner *
// outer_stride + r % inner * stride.
extern "C" int illada_masked_loss_compact_cuda(const uint8_t* masked, const int64_t* targets, const float* weight,
                                               int64_t rows, int64_t vocab, int64_t capacity, int mean, int32_t* index,
                                               int64_t* row_targets, float* scale, int32_t* slot, int32_t* info,
                                               void* stream);
extern "C" int illada_masked_loss_gather_cuda(const void* x, int dtype, int64_t inner, int64_t outer_stride,
                                              int64_t stride, const int32_t* index, const int32_t* info, int64_t start,
                                              int64_t rows, int64_t width, const float* factors, void* out,
                                              int out_dtype, void* stream);
extern "C" int illada_masked_loss_scatter_cuda(const float* dx, const int32_t* slot, const int32_t* info,
                                               int64_t capacity, int64_t rows, int64_t held, int64_t width,
                                               const float* factors, void* out, int dtype, void* stream);
extern "C" int illada_masked_loss_factors_cuda(const float* scale, const int32_t* index, const int32_t* info,
                                               int64_t start, int64_t rows, int what, const float* grad,
                                               int grad_per_row, float* out, void* stream);
extern "C" int illada_masked_loss_losses_cuda(const float* state, const int64_t* targets, const float* scale,
                                              const int32_t* slot, const int32_t* info, int64_t capacity, int64_t rows,
                                              int64_t held, int64_t vocab, int64_t allowed, float label_smoothing,
                                              float z_loss, int per_row, float* out, void* stream);
extern "C" int illada_masked_loss_rows_stats_cuda(const void* logits, int dtype, int64_t inner, int64_t outer_stride,
                                                  int64_t stride, const int32_t* slot, const int32_t* info,
                                                  int64_t start, int64_t rows, int64_t held, int64_t first,
                                                  int64_t width, const int64_t* targets, int64_t vocab,
                                                  const float* bias, float softcap, float label_smoothing, float z_loss,
                                                  const int64_t* forbid, int64_t n_forbid, float* state, void* stream);
extern "C" int illada_masked_loss_rows_dlogits_cuda(const void* logits, int dtype, int64_t inner, int64_t outer_stride,
                                                    int64_t stride, void* out, int64_t out_stride, const int32_t* slot,
                                                    const int32_t* info, int64_t start, int64_t rows, int64_t held,
                                                    int64_t capacity, int64_t first, int64_t width,
                                                    const int64_t* targets, const float* state, const float* scales,
                                                    int64_t vocab, const float* bias, float softcap,
                                                    float label_smoothing, float z_loss, const int64_t* forbid,
                                                    int64_t n_forbid, void* stream);
// shared_memory: bytes that a block may take, at least 128. Keeps as much of the row there as fits.
extern "C" int illada_masked_loss_rows_gradients_cuda(void* logits, int dtype, int64_t stride, const int32_t* info,
                                                      int64_t start, int64_t rows, const int64_t* targets,
                                                      const float* scales, int64_t vocab, const float* bias,
                                                      float softcap, float label_smoothing, float z_loss,
                                                      const int64_t* forbid, int64_t n_forbid, float* state,
                                                      int64_t shared_memory, void* stream);

// ---- unmask (csrc/cpu/unmask.cpp, csrc/cuda/unmask_*.cu) ------------------------------------------------------------
// The kinds of rule, revision and confidence, numbered as in illada_kernels/rules.py, which says what each does.
enum illada_unmask_rule {
  ILLADA_TOP_K = 0,
  ILLADA_THRESHOLD = 1,
  ILLADA_FACTOR = 2,
  ILLADA_ENTROPY_BOUND = 3,
  ILLADA_ENTROPY_BOUND_INCLUSIVE = 4,
  ILLADA_RENOISE = 5
};
enum illada_unmask_revise { ILLADA_NO_REVISION = 0, ILLADA_EDIT = 1, ILLADA_REMASK = 2, ILLADA_REMASK_BY_SCORES = 3 };
enum illada_unmask_confidence {
  ILLADA_PROBABILITY = 0,
  ILLADA_MARGIN = 1,
  ILLADA_NEG_ENTROPY = 2,
  ILLADA_RANDOM = 3,
  ILLADA_SAMPLED = 4
};
// What ranks the candidates: falling confidence (rising entropy for the entropy bounds), or their position.
enum illada_unmask_order { ILLADA_BY_CONFIDENCE = 0, ILLADA_FROM_LEFT = 1 };
// Bits: which statistics of a row a call needs beside its maximum and its best token. NO_DRAW (CPU): the best token is
// the maximum, because the draw comes later. TOP_ID (CUDA): the lowest id with the largest logit, for Renoise.
enum illada_unmask_needs {
  ILLADA_NEEDS_ENTROPY = 1,
  ILLADA_NEEDS_SECOND = 2,
  ILLADA_NEEDS_HELD = 4,
  ILLADA_NEEDS_NO_DRAW = 8,
  ILLADA_NEEDS_TOP_ID = 16
};
// Bits: what truncates the ids that noise may draw.
enum illada_unmask_truncate { ILLADA_BY_TOP_K = 1, ILLADA_BY_TOP_P = 2, ILLADA_BY_MIN_P = 4 };
// Bytes that callers allocate per row and per (row, segment), and the ids that a segment covers.
#define ILLADA_UNMASK_ROW_BYTES 48
#define ILLADA_UNMASK_PARTIAL_BYTES 48
#define ILLADA_UNMASK_SEGMENT 2048
// (l - max l) / Tc below which an id counts neither in a sum nor in the entropy: exp of less is not a normal float.
#define ILLADA_UNMASK_LEAST_SHIFTED -87.3f
// integers (batch, 4): seed, step, ranks that the rule always commits, Remask's n. numbers (batch, 5): temperature,
// confidence temperature, the rule's number, Edit's tau, rank temperature. positions, noise_positions, scores and the
// outputs are contiguous (batch, count). defer: ids whose proposals rank last.
ILLADA_CPU(illada_unmask_plan_cpu, const int64_t* tokens, int64_t token_stride, int64_t batch, int64_t length,
           const int64_t* positions, int64_t count, const uint8_t* frozen, int64_t frozen_stride,
           const int64_t* noise_positions, int64_t mask_id, int rule, int revise, const int64_t* integers,
           const float* numbers, void* rows, int64_t* row_count)
ILLADA_CPU(illada_unmask_rows_cpu, const void* logits, int dtype, int64_t stride_b, int64_t stride_k, int64_t count,
           const void* rows, int64_t row_count, int64_t first, int64_t ids, int64_t segments, const int64_t* edit_ids,
           const float* edit_values, int64_t edits, int needs, void* partials, int threads)
// As illada_unmask_rows_cpu with all ids at once, but draws from the ids that top_k, top_p and min_p keep. needs has
// NO_DRAW; sequences of per_sequence rows have their own top_ks (0: all), top_ps (1: all) and log_min_ps
// (-inf: all).
ILLADA_CPU(illada_unmask_truncate_cpu, const void* logits, int dtype, int64_t stride_b, int64_t stride_k, int64_t count,
           const void* rows, int64_t row_count, int64_t ids, int64_t segments, const int64_t* edit_ids,
           const float* edit_values, int64_t edits, int needs, int64_t per_sequence, const int64_t* top_ks,
           const float* top_ps, const float* log_min_ps, void* partials, int threads)
ILLADA_CPU(illada_unmask_select_cpu, int64_t* tokens, int64_t token_stride, int64_t batch, int64_t length,
           const int64_t* positions, int64_t count, const uint8_t* frozen, int64_t frozen_stride, int64_t mask_id,
           int64_t vocab, int rule, int confidence, int revise, int order, const int64_t* defer, int64_t defers,
           const float* scores, const int64_t* integers, const float* numbers, const void* rows, int64_t row_count,
           const void* partials, int64_t segments, int64_t* proposal, float* confidences, uint8_t* committed,
           int32_t* remaining, int threads)
ILLADA_CPU(illada_unmask_noise_cpu, int64_t seed, int64_t position, int64_t step, int64_t ids, uint32_t* words,
           float* noise)

// (B, K), or (B, L) for frozen; null: absent.
struct illada_unmask_view {
  const void* data;
  int64_t stride_b, stride_k;
};
// tensor[b] where per_sequence, else tensor[0], int64 or float; null: the number of that type.
struct illada_unmask_parameter {
  const void* tensor;
  int64_t integer;
  float number;
  int32_t per_sequence;
};
// CUDA: describes one call. Lives in host memory and is copied into the kernels' arguments; its pointers point to the
// device.
struct illada_unmask_call {
  int64_t* tokens;
  int64_t token_stride, batch, count, length, vocab, mask_id;
  illada_unmask_view positions, noise_positions, scores, frozen;  // int64, int64, float, uint8
  illada_unmask_parameter temperature, confidence_temperature, rule_number, revise_number, seed, step, least,
      rank_temperature, top_k, top_p, min_p;  // least: ranks that the rule always commits
  const int64_t* forbid;  // ids whose logit is -inf
  const int64_t* bias_ids;
  const float* bias_values;  // added to their ids' logits, in order; ignores ids out of range
  const void* head_bias;  // (vocab), of head_bias_dtype
  const int64_t* defer;  // ids whose proposals rank last
  int64_t forbids, biases, head_bias_dtype, defers;
  float* partials;  // (ILLADA_UNMASK_FIELDS, B * K, parts)
  int64_t parts;
  float* bounds;  // (B * K), the least logit that is kept; null without truncation, and with lists
  float* lists;  // (B * K, (tiles of 256 ids + 1) * TILE_WORDS + parts * PART_WORDS) for a fused head that truncates
  int32_t rule, confidence, revise, needs, order, truncate;
};
#define ILLADA_UNMASK_FIELDS 8
#define ILLADA_UNMASK_TILE_WORDS 272  // 256 logits, and which of the ids they belong to
#define ILLADA_UNMASK_PART_WORDS 64  // thresholds of top_k
#define ILLADA_UNMASK_SPAN 4096  // ids of one part of illada_unmask_rows_cuda
#define ILLADA_UNMASK_SORT_IN_SHARED 1024  // candidates of a sequence; with more the selection needs its workspace
// Fills parts from hidden (B, K, dim) @ head (V, dim)^T, bf16 or fp16: part i comes from block i of `blocks`, at most
// one per tile of 256 ids, as many as parts where the call truncates. B * K <= 128; addresses and strides are multiples
// of 16 bytes.
extern "C" int illada_unmask_head_sm90a(const illada_unmask_call* call, int dtype, const void* hidden, int64_t stride_b,
                                        int64_t stride_k, const void* head, int64_t head_stride, int64_t dim,
                                        int64_t blocks, void* stream);
// Draws in the rows that illada_unmask_head_sm90a listed, and stores the best of each in its parts. Runs after it where
// the call truncates. Lists need not be initialised.
extern "C" int illada_unmask_draw_sm90a(const illada_unmask_call* call, void* stream);
// Fills parts of `rows` rows from first_row on (of B * K) from the logits of ids first .. first + ids; first is a
// multiple of ILLADA_UNMASK_SPAN, and part s covers ids [s, s + 1) * ILLADA_UNMASK_SPAN. The logit of (b, k) and id
// lies at b * stride_b + k * stride_k + id; if stride_b < 0, that of row r at (r - first_row) * stride_k + id - first.
extern "C" int illada_unmask_rows_cuda(const illada_unmask_call* call, int dtype, const void* logits, int64_t stride_b,
                                       int64_t stride_k, int64_t first_row, int64_t rows, int64_t first, int64_t ids,
                                       void* stream);
// Fills the bounds of `rows` rows from first_row on by call.truncate, from the logits of all ids, placed as above. Runs
// before illada_unmask_rows_cuda, which truncates by them.
extern "C" int illada_unmask_bounds_cuda(const illada_unmask_call* call, int dtype, const void* logits,
                                         int64_t stride_b, int64_t stride_k, int64_t first_row, int64_t rows,
                                         void* stream);
// Merges the parts, ranks, commits. Outputs are contiguous. workspace: null where count <=
// ILLADA_UNMASK_SORT_IN_SHARED, else 16 bytes times B times the least power of two >= count.
extern "C" int illada_unmask_select_cuda(const illada_unmask_call* call, void* workspace, int64_t* proposal,
                                         float* confidence, uint8_t* committed, int32_t* remaining, void* stream);
