// wgmma for every N from 8 to 256: D[64][N] (+)= A[64][16] * B[16][N], float32 accumulators. Thread t of a warpgroup
// holds N / 2 of them: register i is row t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8, column i / 4 * 8 + t % 4 * 2 + i %
// 2. Kernels call wgmma() at the end of this file; the lists before it only spell out the operands, because nvcc does
// not know names of asm operands.
#pragma once
#include "device.cuh"

namespace illada {

// Which index of a tile runs along memory. K: a row holds consecutive k. MN: the row of A, or the column of B.
enum class Major { K = 0, MN = 1 };

#define ILLADA_REGISTERS_8 "%0, %1, %2, %3"
#define ILLADA_REGISTERS_16 ILLADA_REGISTERS_8 ", %4, %5, %6, %7"
#define ILLADA_REGISTERS_24 ILLADA_REGISTERS_16 ", %8, %9, %10, %11"
#define ILLADA_REGISTERS_32 ILLADA_REGISTERS_24 ", %12, %13, %14, %15"
#define ILLADA_REGISTERS_40 ILLADA_REGISTERS_32 ", %16, %17, %18, %19"
#define ILLADA_REGISTERS_48 ILLADA_REGISTERS_40 ", %20, %21, %22, %23"
#define ILLADA_REGISTERS_56 ILLADA_REGISTERS_48 ", %24, %25, %26, %27"
#define ILLADA_REGISTERS_64 ILLADA_REGISTERS_56 ", %28, %29, %30, %31"
#define ILLADA_REGISTERS_72 ILLADA_REGISTERS_64 ", %32, %33, %34, %35"
#define ILLADA_REGISTERS_80 ILLADA_REGISTERS_72 ", %36, %37, %38, %39"
#define ILLADA_REGISTERS_88 ILLADA_REGISTERS_80 ", %40, %41, %42, %43"
#define ILLADA_REGISTERS_96 ILLADA_REGISTERS_88 ", %44, %45, %46, %47"
#define ILLADA_REGISTERS_104 ILLADA_REGISTERS_96 ", %48, %49, %50, %51"
#define ILLADA_REGISTERS_112 ILLADA_REGISTERS_104 ", %52, %53, %54, %55"
#define ILLADA_REGISTERS_120 ILLADA_REGISTERS_112 ", %56, %57, %58, %59"
#define ILLADA_REGISTERS_128 ILLADA_REGISTERS_120 ", %60, %61, %62, %63"
#define ILLADA_REGISTERS_136 ILLADA_REGISTERS_128 ", %64, %65, %66, %67"
#define ILLADA_REGISTERS_144 ILLADA_REGISTERS_136 ", %68, %69, %70, %71"
#define ILLADA_REGISTERS_152 ILLADA_REGISTERS_144 ", %72, %73, %74, %75"
#define ILLADA_REGISTERS_160 ILLADA_REGISTERS_152 ", %76, %77, %78, %79"
#define ILLADA_REGISTERS_168 ILLADA_REGISTERS_160 ", %80, %81, %82, %83"
#define ILLADA_REGISTERS_176 ILLADA_REGISTERS_168 ", %84, %85, %86, %87"
#define ILLADA_REGISTERS_184 ILLADA_REGISTERS_176 ", %88, %89, %90, %91"
#define ILLADA_REGISTERS_192 ILLADA_REGISTERS_184 ", %92, %93, %94, %95"
#define ILLADA_REGISTERS_200 ILLADA_REGISTERS_192 ", %96, %97, %98, %99"
#define ILLADA_REGISTERS_208 ILLADA_REGISTERS_200 ", %100, %101, %102, %103"
#define ILLADA_REGISTERS_216 ILLADA_REGISTERS_208 ", %104, %105, %106, %107"
#define ILLADA_REGISTERS_224 ILLADA_REGISTERS_216 ", %108, %109, %110, %111"
#define ILLADA_REGISTERS_232 ILLADA_REGISTERS_224 ", %112, %113, %114, %115"
#define ILLADA_REGISTERS_240 ILLADA_REGISTERS_232 ", %116, %117, %118, %119"
#define ILLADA_REGISTERS_248 ILLADA_REGISTERS_240 ", %120, %121, %122, %123"
#define ILLADA_REGISTERS_256 ILLADA_REGISTERS_248 ", %124, %125, %126, %127"

#define ILLADA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ILLADA_OPERANDS_8 ILLADA_FOUR(0)
#define ILLADA_OPERANDS_16 ILLADA_OPERANDS_8, ILLADA_FOUR(4)
#define ILLADA_OPERANDS_24 ILLADA_OPERANDS_16, ILLADA_FOUR(8)
#define ILLADA_OPERANDS_32 ILLADA_OPERANDS_24, ILLADA_FOUR(12)
#define ILLADA_OPERANDS_40 ILLADA_OPERANDS_32, ILLADA_FOUR(16)
#define ILLADA_OPERANDS_48 ILLADA_OPERANDS_40, ILLADA_FOUR(20)
#define ILLADA_OPERANDS_56 ILLADA_OPERANDS_48, ILLADA_FOUR(24)
#define ILLADA_OPERANDS_64 ILLADA_OPERANDS_56, ILLADA_FOUR(28)
#define ILLADA_OPERANDS_72 ILLADA_OPERANDS_64, ILLADA_FOUR(32)
#define ILLADA_OPERANDS_80 ILLADA_OPERANDS_72, ILLADA_FOUR(36)
#define ILLADA_OPERANDS_88 ILLADA_OPERANDS_80, ILLADA_FOUR(40)
#define ILLADA_OPERANDS_96 ILLADA_OPERANDS_88, ILLADA_FOUR(44)
#define ILLADA_OPERANDS_104 ILLADA_OPERANDS_96, ILLADA_FOUR(48)
#define ILLADA_OPERANDS_112 ILLADA_OPERANDS_104, ILLADA_FOUR(52)
#define ILLADA_OPERANDS_120 ILLADA_OPERANDS_112, ILLADA_FOUR(56)
#define ILLADA_OPERANDS_128 ILLADA_OPERANDS_120, ILLADA_FOUR(60)
#define ILLADA_OPERANDS_136 ILLADA_OPERANDS_128, ILLADA_FOUR(64)
#define ILLADA_OPERANDS_144 ILLADA_OPERANDS_136, ILLADA_FOUR(68)
#define ILLADA_OPERANDS_152 ILLADA_OPERANDS_144, ILLADA_FOUR(72)
#define ILLADA_OPERANDS_160 ILLADA_OPERANDS_152, ILLADA_FOUR(76)
#define ILLADA_OPERANDS_168 ILLADA_OPERANDS_160, ILLADA_FOUR(80)
#define ILLADA_OPERANDS_176 ILLADA_OPERANDS_168, ILLADA_FOUR(84)
#define ILLADA_OPERANDS_184 ILLADA_OPERANDS_176, ILLADA_FOUR(88)
#define ILLADA_OPERANDS_192 ILLADA_OPERANDS_184, ILLADA_FOUR(92)
#define ILLADA_OPERANDS_200 ILLADA_OPERANDS_192, ILLADA_FOUR(96)
#define ILLADA_OPERANDS_208 ILLADA_OPERANDS_200, ILLADA_FOUR(100)
#define ILLADA_OPERANDS_216 ILLADA_OPERANDS_208, ILLADA_FOUR(104)
#define ILLADA_OPERANDS_224 ILLADA_OPERANDS_216, ILLADA_FOUR(108)
#define ILLADA_OPERANDS_232 ILLADA_OPERANDS_224, ILLADA_FOUR(112)
#define ILLADA_OPERANDS_240 ILLADA_OPERANDS_232, ILLADA_FOUR(116)
#define ILLADA_OPERANDS_248 ILLADA_OPERANDS_240, ILLADA_FOUR(120)
#define ILLADA_OPERANDS_256 ILLADA_OPERANDS_248, ILLADA_FOUR(124)

// The instruction with A in shared memory (operands after the accumulators: A, B, accumulate, transposes), and with A
// in registers (four words, B, accumulate, transpose of B).
#define ILLADA_WGMMA_SHARED(N, TYPE, A, B, P, TA, TB)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                                   \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ILLADA_REGISTERS_##N \
               "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                                  \
               : ILLADA_OPERANDS_##N                                                                     \
               : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B))
#define ILLADA_WGMMA_REGISTERS(N, TYPE, A0, A1, A2, A3, B, P, TB)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                                   \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ILLADA_REGISTERS_##N \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}\n"           \
               : ILLADA_OPERANDS_##N                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B))

template <int N> struct WgmmaShape;
#define ILLADA_WGMMA_SHAPE(N, I0, I1, I2, I3, I4, I5, I6)                                                        \
  template <> struct WgmmaShape<N> {                                                                             \
    template <class T, int TRANSPOSE_A, int TRANSPOSE_B>                                                         \
    static ILLADA_DEVICE void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                \
      if constexpr (IsBf16<T>::value) ILLADA_WGMMA_SHARED(N, "bf16", I0, I1, I2, I3, I4);                        \
      else ILLADA_WGMMA_SHARED(N, "f16", I0, I1, I2, I3, I4);                                                    \
    }                                                                                                            \
    template <class T, int TRANSPOSE_B>                                                                          \
    static ILLADA_DEVICE void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      if constexpr (IsBf16<T>::value) ILLADA_WGMMA_REGISTERS(N, "bf16", I0, I1, I2, I3, I4, I5, I6);             \
      else ILLADA_WGMMA_REGISTERS(N, "f16", I0, I1, I2, I3, I4, I5, I6);                                         \
    }                                                                                                            \
  };
template <class T> struct IsBf16 {
  static constexpr bool value = false;
};
template <> struct IsBf16<bf16> {
  static constexpr bool value = true;
};
ILLADA_WGMMA_SHAPE(8, 4, 5, 6, 7, 8, 9, 10)
ILLADA_WGMMA_SHAPE(16, 8, 9, 10, 11, 12, 13, 14)
ILLADA_WGMMA_SHAPE(24, 12, 13, 14, 15, 16, 17, 18)
ILLADA_WGMMA_SHAPE(32, 16, 17, 18, 19, 20, 21, 22)
ILLADA_WGMMA_SHAPE(40, 20, 21, 22, 23, 24, 25, 26)
ILLADA_WGMMA_SHAPE(48, 24, 25, 26, 27, 28, 29, 30)
ILLADA_WGMMA_SHAPE(56, 28, 29, 30, 31, 32, 33, 34)
ILLADA_WGMMA_SHAPE(64, 32, 33, 34, 35, 36, 37, 38)
ILLADA_WGMMA_SHAPE(72, 36, 37, 38, 39, 40, 41, 42)
ILLADA_WGMMA_SHAPE(80, 40, 41, 42, 43, 44, 45, 46)
ILLADA_WGMMA_SHAPE(88, 44, 45, 46, 47, 48, 49, 50)
ILLADA_WGMMA_SHAPE(96, 48, 49, 50, 51, 52, 53, 54)
ILLADA_WGMMA_SHAPE(104, 52, 53, 54, 55, 56, 57, 58)
ILLADA_WGMMA_SHAPE(112, 56, 57, 58, 59, 60, 61, 62)
ILLADA_WGMMA_SHAPE(120, 60, 61, 62, 63, 64, 65, 66)
ILLADA_WGMMA_SHAPE(128, 64, 65, 66, 67, 68, 69, 70)
ILLADA_WGMMA_SHAPE(136, 68, 69, 70, 71, 72, 73, 74)
ILLADA_WGMMA_SHAPE(144, 72, 73, 74, 75, 76, 77, 78)
ILLADA_WGMMA_SHAPE(152, 76, 77, 78, 79, 80, 81, 82)
ILLADA_WGMMA_SHAPE(160, 80, 81, 82, 83, 84, 85, 86)
ILLADA_WGMMA_SHAPE(168, 84, 85, 86, 87, 88, 89, 90)
ILLADA_WGMMA_SHAPE(176, 88, 89, 90, 91, 92, 93, 94)
ILLADA_WGMMA_SHAPE(184, 92, 93, 94, 95, 96, 97, 98)
ILLADA_WGMMA_SHAPE(192, 96, 97, 98, 99, 100, 101, 102)
ILLADA_WGMMA_SHAPE(200, 100, 101, 102, 103, 104, 105, 106)
ILLADA_WGMMA_SHAPE(208, 104, 105, 106, 107, 108, 109, 110)
ILLADA_WGMMA_SHAPE(216, 108, 109, 110, 111, 112, 113, 114)
ILLADA_WGMMA_SHAPE(224, 112, 113, 114, 115, 116, 117, 118)
ILLADA_WGMMA_SHAPE(232, 116, 117, 118, 119, 120, 121, 122)
ILLADA_WGMMA_SHAPE(240, 120, 121, 122, 123, 124, 125, 126)
ILLADA_WGMMA_SHAPE(248, 124, 125, 126, 127, 128, 129, 130)
ILLADA_WGMMA_SHAPE(256, 128, 129, 130, 131, 132, 133, 134)

// Multiplies operands in shared memory, given by descriptors (smem_desc in hopper.cuh). accumulate = false: D = A * B.
template <class T, Major A = Major::K, Major B = Major::K, int R>
ILLADA_DEVICE void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  WgmmaShape<2 * R>::template shared<T, int(A), int(B)>(d, a, b, accumulate);
}
// Multiplies A in registers: four words of two k each, rows as the accumulators'. An accumulator of 16 columns, packed,
// is such an A.
template <class T, Major B = Major::K, int R>
ILLADA_DEVICE void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  WgmmaShape<2 * R>::template registers<T, int(B)>(d, a, b, accumulate);
}

}  // namespace illada
