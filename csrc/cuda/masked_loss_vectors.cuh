// How the threads of a block read and write a row of masked_loss: aligned 16-byte vectors, several loads in flight, and
// single elements at both ends.
#pragma once
#include "masked_loss.cuh"

namespace illada {
namespace loss {

// Returns the number of elements before a row's first 16-byte boundary.
template <class T> ILLADA_DEVICE int unaligned_head(const T* row, int width) {
  const int head = int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  return head < width ? head : width;
}

// Widen a word of a row, and a vector. Loads stay opaque words until here: as 16-bit elements they would be unpacked,
// and so waited for, where they are issued.
ILLADA_DEVICE void widen(float, uint32_t word, float* x) { x[0] = __uint_as_float(word); }
ILLADA_DEVICE void widen(bf16, uint32_t word, float* x) {
  x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000u);
}
ILLADA_DEVICE void widen(fp16, uint32_t word, float* x) {
  x[0] = float_of_fp16(uint16_t(word)), x[1] = float_of_fp16(uint16_t(word >> 16));
}
template <class T> ILLADA_DEVICE void widen(const uint4& bits, float (&x)[Vec16<T>::size]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) widen(T{}, words[k], x + Vec16<T>::size / 4 * k);
}

// Calls body(number, bits) for vectors from, from + THREADS, ... of `vectors`. Keeps AHEAD loads in flight: loads a
// slot of the ring again once its body is done. Unrolled over the slots, because a move of a pending load's registers
// would wait for the load. ONCE: the row is not read again.
template <int THREADS, int AHEAD, bool ONCE, class Body>
ILLADA_DEVICE void over_vectors(const uint4* row, int from, int vectors, Body body) {
  uint4 ring[AHEAD];
  const auto load_slot = [&](uint4& slot, int i) {
    if (i < vectors) slot = ONCE ? __ldcs(row + i) : row[i];
  };
#pragma unroll
  for (int u = 0; u < AHEAD; ++u) load_slot(ring[u], from + u * THREADS);
#pragma unroll 1
  for (;; from += AHEAD * THREADS) {
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      const int i = from + u * THREADS;
      if (i >= vectors) return;
      body(i, ring[u]);
      load_slot(ring[u], i + AHEAD * THREADS);
    }
  }
}

// Calls body(column, float (&)[N]) for this thread's share of a row: aligned 16-byte vectors from number `from` on,
// which keep(number, bits) sees first, and single elements at both ends.
template <int THREADS, int AHEAD, bool ONCE, class T, class Keep, class Body>
ILLADA_DEVICE void over_row(const T* row, int width, int from, Keep keep, Body body) {
  constexpr int kVector = Vec16<T>::size;
  const int head = unaligned_head(row, width), vectors = (width - head) / kVector,
            tail = head + vectors * kVector + int(threadIdx.x);
  over_vectors<THREADS, AHEAD, ONCE>(reinterpret_cast<const uint4*>(row + head), from + int(threadIdx.x), vectors,
                                     [&](int i, const uint4& bits) {
                                       float x[kVector];
                                       keep(i, bits);
                                       widen<T>(bits, x);
                                       body(head + i * kVector, x);
                                     });
  float x[1];
  if (int(threadIdx.x) < head) load(row + threadIdx.x, x), body(int(threadIdx.x), x);
  if (tail < width) load(row + tail, x), body(tail, x);
}

template <int THREADS, class T> ILLADA_DEVICE void fill_row(T* row, int width, float value) {
  constexpr int kVector = Vec16<T>::size;
  const int head = unaligned_head(row, width), vectors = (width - head) / kVector,
            tail = head + vectors * kVector + int(threadIdx.x);
  float x[kVector], one[1] = {value};
  for (float& at : x) at = value;
  for (int i = threadIdx.x; i < vectors; i += THREADS) store(row + head + i * kVector, x);
  if (int(threadIdx.x) < head) store(row + threadIdx.x, one);
  if (tail < width) store(row + tail, one);
}

}  // namespace loss
}  // namespace illada
