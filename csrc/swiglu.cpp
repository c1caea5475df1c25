#include "swiglu.h"

#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "instruction_set.h"

#define HOLDFAST_KERNELS "swiglu_kernels.inl"
#include "for_each_instruction_set.h"

namespace holdfast {
namespace {

void check(std::int64_t rows, std::int64_t width) {
  if (rows < 0 || width < 0)
    throw std::invalid_argument("rows is " + std::to_string(rows) + " and width " +
                                std::to_string(width) + "; neither may be negative");
}

}  // namespace

void swiglu(const float* gate_up, float* out, std::int64_t rows, std::int64_t width) {
  check(rows, width);
  HOLDFAST_VARIANT(swiglu)(gate_up, out, rows, width);
}

void swiglu_backward(const float* gradient, const float* gate_up, float* out, float* by_gate_up,
                     std::int64_t rows, std::int64_t width) {
  check(rows, width);
  HOLDFAST_VARIANT(swiglu_backward)(gradient, gate_up, out, by_gate_up, rows, width);
}

}  // namespace holdfast
