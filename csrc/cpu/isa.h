// Every csrc/cpu/*.cpp is compiled once per instruction set, with ILLADA_ISA set to scalar, avx2, avx512 or
// avx512_bf16. The code is written against vec.h, whose vectors are as wide as the instruction set. ILLADA_ISA_FN(name)
// is a function's exported name.
#pragma once

#ifndef ILLADA_ISA
#define ILLADA_ISA scalar
#endif

#define ILLADA_CONCAT_(a, b) a##_##b
#define ILLADA_CONCAT(a, b) ILLADA_CONCAT_(a, b)
#define ILLADA_ISA_FN(name) ILLADA_CONCAT(name, ILLADA_ISA)
