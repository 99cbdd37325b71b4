// KeyRanges on the GPU: the bounds of a query row, brought into normal form whenever they are read, so that malformed
// ones never lead out of range. csrc/include/illada/query_tiles.h is the same on the CPU.
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
  const int32_t* data;  // (batch or 1, rows or 1, 4), 16-byte aligned rows; or null: every row attends to every key
  int64_t batch_stride, row_stride;  // elements; 0 where broadcast
  int num_keys;

  // Each bound at least the one before it and at most num_keys; two ranges that touch become one.
  ILLADA_DEVICE RowRanges of_row(int64_t batch, int64_t row) const {
    if (!data) return {{0, num_keys}, {num_keys, num_keys}};
    const int4 b = *reinterpret_cast<const int4*>(data + batch * batch_stride + row * row_stride);
    const int e0 = clamp(b.x, 0), e1 = clamp(b.y, e0), e2 = clamp(b.z, e1), e3 = clamp(b.w, e2);
    if (e0 < e1 && e1 == e2) return {{e0, e3}, {e3, e3}};
    return {{e0, e2}, {e1, e3}};
  }
  ILLADA_DEVICE int clamp(int bound, int least) const { return Max{}(least, Min{}(bound, num_keys)); }
};

}  // namespace illada
