// How a thread rounds: to nearest, subnormals kept. torch.set_flush_denormal changes the calling thread alone, and
// OpenMP's threads keep what their creator had, so that without this a result would depend on which thread computed it.
// Every parallel region and every entry from Python begins with a FloatMode; what the thread had before comes back at
// its end.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

class FloatMode {
#if defined(__x86_64__)
  static constexpr uint32_t kFlush = 0x8040, kRounding = 0x6000;  // of MXCSR: flush to zero, denormals are zero
  static uint32_t get() { return _mm_getcsr(); }
  static void set(uint32_t word) { _mm_setcsr(word); }
  using Word = uint32_t;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1u << 24 | 1u << 19, kRounding = 3u << 22;  // of FPCR: FZ, FZ16
  static uint64_t get() {
    uint64_t word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(uint64_t word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
  using Word = uint64_t;
#else
  static constexpr uint32_t kFlush = 0, kRounding = 0;
  static uint32_t get() { return 0; }
  static void set(uint32_t) {}
  using Word = uint32_t;
#endif
  const Word before_;

 public:
  FloatMode() : before_(get()) {
    set(before_ & ~(kFlush | kRounding));
    asm volatile("" : : : "memory");  // nothing loaded later is computed with earlier
  }
  ~FloatMode() {
    asm volatile("" : : : "memory");
    set(before_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
};

}  // namespace
