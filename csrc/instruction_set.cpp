#include "instruction_set.h"

#include <stdexcept>

namespace holdfast {
namespace {

InstructionSet chosen = InstructionSet::portable;

InstructionSet best() {
#if HOLDFAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2")) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

}  // namespace

void choose_instruction_set(const std::string& name) {
  InstructionSet wanted = best();
  if (name == "portable")
    wanted = InstructionSet::portable;
  else if (name == "avx2")
    wanted = InstructionSet::avx2;
  else if (name == "avx512")
    wanted = InstructionSet::avx512;
  else if (!name.empty() && name != "auto")
    throw std::invalid_argument("HOLDFAST_NATIVE_ISA is '" + name +
                                "'; allowed: auto, portable, avx2, avx512");
  if (wanted > best())
    throw std::invalid_argument("HOLDFAST_NATIVE_ISA is '" + name +
                                "', which this machine cannot run; unset it or use auto");
  chosen = wanted;
}

InstructionSet instruction_set() { return chosen; }

const char* instruction_set_name() {
  switch (chosen) {
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace holdfast
