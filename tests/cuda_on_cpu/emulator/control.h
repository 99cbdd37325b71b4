// Settings of the next launch, and the global memory it may touch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator::control {

extern uint64_t seed, most_steps;
extern int host_threads;
void count(uint64_t steps);

// Global memory that kernels may touch. Without any range nothing is checked.
struct ScopedRange {
  ScopedRange(const void* p, size_t bytes, const char* name);
  ~ScopedRange();
  ScopedRange(const ScopedRange&) = delete;
};

}  // namespace emulator::control
