// KeyRanges on the CPU: the key ranges of a query row, and what the rows of a query tile have in common. Bounds are
// clamped to normal form on every read (each at least the one before it, all within [0, num_keys]), so malformed bounds
// never read out of range. csrc/cuda/key_ranges.cuh is the same on the GPU.
#pragma once
#include <cstdint>

namespace {

inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }

// The keys of one query row: lo[0] <= key < hi[0] or lo[1] <= key < hi[1]. An empty range has lo >= hi.
struct RowRanges {
  int lo[2], hi[2];
  bool empty() const { return lo[0] >= hi[0] && lo[1] >= hi[1]; }
};

// int32 (batch or 1, queries or 1, 4), or null: every row attends to every key.
struct KeyBounds {
  const int32_t* data;
  int64_t batch_stride, row_stride;
  int num_keys;

  RowRanges of_row(int64_t batch, int64_t row) const {
    if (!data) return {{0, 0}, {num_keys, 0}};
    const int32_t* b = data + batch * batch_stride + row * row_stride;
    int edge[4], least = 0;
    for (int i = 0; i < 4; ++i) edge[i] = least = larger(least, smaller(b[i], num_keys));
    RowRanges r = {{edge[0], edge[2]}, {edge[1], edge[3]}};
    if (edge[0] < edge[1] && edge[1] == edge[2]) r = {{edge[0], 0}, {edge[3], 0}};  // ranges that touch become one
    return r;
  }
};

// Columns first .. last of a key tile.
struct Window {
  int first, last;
  bool empty() const { return first >= last; }
};

// What some query rows have in common: two hulls that hold every row's ranges, and the keys that range 0, or range 1,
// of every row holds. An empty range does not widen a hull. Without rows nothing is touched.
struct Hulls {
  static constexpr int kMost = 0x7fffffff;
  int lo[2] = {kMost, kMost}, hi[2] = {0, 0};
  int common_lo[2] = {0, 0}, common_hi[2] = {kMost, kMost};

  void add(const RowRanges& r) {
    for (int i = 0; i < 2; ++i) {
      if (r.lo[i] < r.hi[i]) lo[i] = smaller(lo[i], r.lo[i]), hi[i] = larger(hi[i], r.hi[i]);
      common_lo[i] = larger(common_lo[i], r.lo[i]);
      common_hi[i] = smaller(common_hi[i], r.hi[i]);
    }
  }
  int64_t keys() const { return int64_t(larger(hi[0] - lo[0], 0)) + larger(hi[1] - lo[1], 0); }  // in both hulls
  // Returns the columns of the key tile at key `start` that some row may need, rounded outwards to multiples of `step`.
  Window window(int start, int size, int step) const {
    int first = size, last = 0;
    for (int i = 0; i < 2; ++i) {
      const int a = larger(lo[i], start), b = smaller(hi[i], start + size);
      if (a < b) first = smaller(first, a - start), last = larger(last, b - start);
    }
    return {first / step * step, (last + step - 1) / step * step};
  }
  // Returns whether some row may attend to a key of start .. end.
  bool touches(int start, int end) const { return (lo[0] < end && start < hi[0]) || (lo[1] < end && start < hi[1]); }
  // Returns whether every row attends to every key of start .. end: no mask needed.
  bool all_attend(int start, int end) const {
    return (common_lo[0] <= start && end <= common_hi[0]) || (common_lo[1] <= start && end <= common_hi[1]);
  }
  // Returns the start of the first key tile at or after `start` that a hull touches, else `none`. `start` is a multiple
  // of `size`.
  int first_touched(int start, int size, int none) const {
    int found = none;
    for (int i = 0; i < 2; ++i)
      if (lo[i] < hi[i] && start < hi[i]) found = smaller(found, larger(start, lo[i] / size * size));
    return found;
  }
  // Returns the last chunk of `size` keys before `chunk` that a hull touches, or -1.
  int touched_before(int chunk, int size) const {
    int last = -1;
    for (int i = 0; i < 2; ++i)
      if (lo[i] < hi[i] && lo[i] / size < chunk) last = larger(last, smaller(chunk - 1, (hi[i] - 1) / size));
    return last;
  }
};

inline Hulls hulls_of(const KeyBounds& bounds, int64_t batch, int64_t first_row, int rows) {
  Hulls hulls;
  for (int row = 0; row < rows; ++row) {
    hulls.add(bounds.of_row(batch, first_row + row));
    if (!bounds.data || bounds.row_stride == 0) break;  // all rows have the same bounds
  }
  return hulls;
}

// Adds to `edges` (size + 1 entries) +1 where a range of a row enters the key tile and -1 where it leaves.
inline void mark_edges(const KeyBounds& bounds, int64_t batch, int64_t first_row, int rows, int start, int size,
                       int* edges) {
  for (int row = 0; row < rows; ++row) {
    const RowRanges r = bounds.of_row(batch, first_row + row);
    for (int i = 0; i < 2; ++i) {
      const int a = larger(r.lo[i], start) - start, b = smaller(r.hi[i], start + size) - start;
      if (a < b) ++edges[a], --edges[b];
    }
    if (!bounds.data || bounds.row_stride == 0) break;
  }
}

}  // namespace
