// Which variant of the kernels runs: chosen once at import, the same bits from each.
#pragma once

#include <string>

#if defined(__x86_64__)
#define HOLDFAST_X86 1
#else
#define HOLDFAST_X86 0
#endif

namespace holdfast {

enum class InstructionSet { portable, avx2, avx512 };

// "auto" (or empty) takes the best one this machine has. Throws std::invalid_argument for a name
// that is unknown or that this machine cannot run.
void choose_instruction_set(const std::string& name);
InstructionSet instruction_set();
const char* instruction_set_name();

// The variant of a kernel for the chosen instruction set.
template <class Function>
Function variant([[maybe_unused]] Function portable, [[maybe_unused]] Function avx2,
                 [[maybe_unused]] Function avx512) {
  switch (instruction_set()) {
    case InstructionSet::avx512: return avx512;
    case InstructionSet::avx2: return avx2;
    default: return portable;
  }
}

}  // namespace holdfast

#if HOLDFAST_X86
#define HOLDFAST_VARIANT(kernel) \
  ::holdfast::variant(portable::kernel, avx2::kernel, avx512::kernel)
#else
#define HOLDFAST_VARIANT(kernel) portable::kernel
#endif

// Inputs and outputs may be the same memory, element for element; a vector may still be used.
#if defined(__clang__)
#define HOLDFAST_ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define HOLDFAST_ELEMENTWISE _Pragma("GCC ivdep")
#endif
