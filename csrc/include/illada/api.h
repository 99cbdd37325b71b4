// Every extern "C" entry point of the library. No torch, no Python: raw pointers, sizes, strides in elements.
//
// Conventions: returns 0 or an error code (CPU: illada_error below; CUDA: cudaError_t). `dtype` is an illada_dtype. Strides are in
// elements, offsets are 64-bit. `threads` is the number of OpenMP threads. Null pointers stand for absent optional tensors.
#pragma once
#include <cstdint>

enum illada_dtype { ILLADA_F32 = 0, ILLADA_BF16 = 1, ILLADA_F16 = 2 };
enum illada_error { ILLADA_OK = 0, ILLADA_BAD_DTYPE = 1, ILLADA_BAD_ARGUMENT = 2, ILLADA_NO_MEMORY = 3 };

// A CPU function exists once per instruction set; bindings.cpp chooses at run time. Other architectures than x86-64 have scalar only.
#if defined(__x86_64__) && !defined(ILLADA_SCALAR_ONLY)
#define ILLADA_CPU(name, ...)            \
  extern "C" int name##_scalar(__VA_ARGS__); \
  extern "C" int name##_avx2(__VA_ARGS__);   \
  extern "C" int name##_avx512(__VA_ARGS__);
#else
#define ILLADA_CPU(name, ...) extern "C" int name##_scalar(__VA_ARGS__);
#endif

// ---- attention (csrc/cpu/attention.cpp) ------------------------------------------------------------------------------------

// ---- masked_loss (csrc/cpu/masked_loss.cpp, csrc/cuda/masked_loss_rows.cu) -------------------------------------------------

// ---- unmask (csrc/cpu/unmask.cpp) ------------------------------------------------------------------------------------------
