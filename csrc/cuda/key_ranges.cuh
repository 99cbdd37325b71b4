// KeyRanges on the GPU: the key ranges of a query row, and what the rows of a query tile have in common. Bounds are
// clamped to normal form on every read, so malformed bounds never read out of range. csrc/cpu/key_ranges.h is the same
// on the CPU.
#pragma once
#include "device.cuh"

namespace illada {

// The keys of one query row: lo[0] <= key < hi[0] or lo[1] <= key < hi[1]. An empty range has lo == hi.
struct RowRanges {
  int lo[2], hi[2];
  ILLADA_DEVICE bool holds(int key) const { return (lo[0] <= key && key < hi[0]) || (lo[1] <= key && key < hi[1]); }
  ILLADA_DEVICE bool empty() const { return lo[0] >= hi[0] && lo[1] >= hi[1]; }
};

struct KeyBounds {
  // (batch or 1, queries or 1, 4), rows aligned to 16 bytes; null: every row attends to every key.
  const int32_t* data;
  int64_t batch_stride, row_stride;  // elements; 0 where broadcast
  int num_keys;

  // Returns a row's ranges: each bound at least the one before it and at most num_keys; ranges that touch become one.
  ILLADA_DEVICE RowRanges of_row(int64_t batch, int64_t row) const { return data ? normal(*at(batch, row)) : all(); }
  ILLADA_DEVICE RowRanges all() const { return {{0, num_keys}, {num_keys, num_keys}}; }
  ILLADA_DEVICE const int4* at(int64_t batch, int64_t row) const {
    return reinterpret_cast<const int4*>(data + batch * batch_stride + row * row_stride);
  }
  ILLADA_DEVICE RowRanges normal(const int4& b) const {
    const int e0 = clamp(b.x, 0), e1 = clamp(b.y, e0), e2 = clamp(b.z, e1), e3 = clamp(b.w, e2);
    if (e0 < e1 && e1 == e2) return {{e0, e3}, {e3, e3}};
    return {{e0, e2}, {e1, e3}};
  }
  ILLADA_DEVICE int clamp(int bound, int least) const { return Max{}(least, Min{}(bound, num_keys)); }
};

// How keys start .. end of a tile meet the rows of a tile: no pair attends, some pairs may, all pairs attend.
enum class Cover { none, some, all };

// What some query rows have in common: two hulls that hold every row's ranges, and the keys that range 0, or range 1,
// of every row holds. An empty range does not widen a hull. Without rows nothing is touched.
struct Hulls {
  static constexpr int kMost = 0x7fffffff;
  int lo[2] = {kMost, kMost}, hi[2] = {0, 0};
  int common_lo[2] = {0, 0}, common_hi[2] = {kMost, kMost};

  ILLADA_DEVICE void add(const RowRanges& r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (r.lo[i] < r.hi[i]) lo[i] = Min{}(lo[i], r.lo[i]), hi[i] = Max{}(hi[i], r.hi[i]);
      common_lo[i] = Max{}(common_lo[i], r.lo[i]);
      common_hi[i] = Min{}(common_hi[i], r.hi[i]);
    }
  }
  // Adds the rows of `other`.
  ILLADA_DEVICE void merge(const Hulls& other) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lo[i] = Min{}(lo[i], other.lo[i]), hi[i] = Max{}(hi[i], other.hi[i]);
      common_lo[i] = Max{}(common_lo[i], other.common_lo[i]), common_hi[i] = Min{}(common_hi[i], other.common_hi[i]);
    }
  }
  // Merges the hulls of all lanes of the warp; every lane gets the result.
  ILLADA_DEVICE void reduce_over_warp() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lo[i] = __reduce_min_sync(~0u, lo[i]), hi[i] = __reduce_max_sync(~0u, hi[i]);
      common_lo[i] = __reduce_max_sync(~0u, common_lo[i]), common_hi[i] = __reduce_min_sync(~0u, common_hi[i]);
    }
  }
  // Returns whether some row may attend to a key of start .. end.
  ILLADA_DEVICE bool touches(int start, int end) const {
    return (lo[0] < end && start < hi[0]) || (lo[1] < end && start < hi[1]);
  }
  // Returns whether every row attends to every key of start .. end: no mask needed.
  ILLADA_DEVICE bool all_attend(int start, int end) const {
    return (common_lo[0] <= start && end <= common_hi[0]) || (common_lo[1] <= start && end <= common_hi[1]);
  }
  // Spells out the two above, because nvcc 13 makes 72 instructions more of the forward from calls of them.
  ILLADA_DEVICE Cover cover(int start, int end) const {
    if ((common_lo[0] <= start && end <= common_hi[0]) || (common_lo[1] <= start && end <= common_hi[1]))
      return lo[0] < hi[0] || lo[1] < hi[1] ? Cover::all : Cover::none;
    return (lo[0] < end && start < hi[0]) || (lo[1] < end && start < hi[1]) ? Cover::some : Cover::none;
  }
  // Returns the start of the first key tile at or after `start` that a hull touches, else `none`. `start` is a multiple
  // of `size`.
  ILLADA_DEVICE int first_touched(int start, int size, int none) const {
    int found = none;
    for (int i = 0; i < 2; ++i)
      if (lo[i] < hi[i] && start < hi[i]) found = Min{}(found, Max{}(start, lo[i] / size * size));
    return found;
  }
};

// The key tiles of `size` keys that two hulls touch, ascending, each once: first[0] .. last[0], then first[1] ..
// last[1].
struct KeyTiles {
  int first[2], last[2];

  ILLADA_DEVICE KeyTiles(const Hulls& h, int size) {
    const int low = h.lo[1] < h.lo[0];  // which hull comes first
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int lo = i == low ? h.lo[0] : h.lo[1], hi = i == low ? h.hi[0] : h.hi[1];
      first[i] = lo < hi ? lo / size : 0;
      last[i] = lo < hi ? (hi - 1) / size + 1 : 0;
    }
    if (first[1] < last[0] && last[1] > 0) {  // they meet in a tile: one run
      last[0] = Max{}(last[0], last[1]);
      first[1] = last[1] = 0;
    }
  }
  ILLADA_DEVICE int count() const { return last[0] - first[0] + last[1] - first[1]; }
  ILLADA_DEVICE int at(int n) const {
    const int of_first = last[0] - first[0];
    return n < of_first ? first[0] + n : first[1] + n - of_first;
  }
};

}  // namespace illada
