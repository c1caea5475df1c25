// Includes HOLDFAST_KERNELS once per instruction set, each time in a namespace of that name
// (HOLDFAST_ISA) and compiled for it. No include guard: each kernel family includes it once.
// What the kernels need from the standard library is included before, for the baseline, so that no
// inline function of it is compiled for a machine that may not be there.

#define HOLDFAST_ISA portable
#define HOLDFAST_VECTOR_BYTES 16
#include HOLDFAST_KERNELS
#undef HOLDFAST_ISA
#undef HOLDFAST_VECTOR_BYTES

#if HOLDFAST_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define HOLDFAST_ISA avx2
#define HOLDFAST_VECTOR_BYTES 32
#include HOLDFAST_KERNELS
#undef HOLDFAST_ISA
#undef HOLDFAST_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512dq,avx512bw,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#endif
#define HOLDFAST_ISA avx512
#define HOLDFAST_VECTOR_BYTES 64
#include HOLDFAST_KERNELS
#undef HOLDFAST_ISA
#undef HOLDFAST_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#undef HOLDFAST_KERNELS
