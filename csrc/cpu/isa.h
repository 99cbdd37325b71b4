// Every csrc/cpu/*.cpp is compiled once per instruction set, with ILLADA_ISA set to scalar, avx2 or avx512. The code is
// written against vec.h, whose vectors are as wide as the instruction set. ILLADA_ISA_FN(name) is a function's exported
// name. Files that multiply bf16 (ILLADA_CPU_BF16 in api.h) are compiled for avx512_bf16 too; what those functions do
// not multiply so, they pass on to avx512's.
#pragma once

#ifndef ILLADA_ISA
#define ILLADA_ISA scalar
#endif

#define ILLADA_CONCAT_(a, b) a##_##b
#define ILLADA_CONCAT(a, b) ILLADA_CONCAT_(a, b)
#define ILLADA_ISA_FN(name) ILLADA_CONCAT(name, ILLADA_ISA)
