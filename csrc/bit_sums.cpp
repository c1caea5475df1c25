#include "bit_sums.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "instruction_set.h"

#define HOLDFAST_KERNELS "bit_sums_kernels.inl"
#include "for_each_instruction_set.h"

namespace holdfast {
namespace {

void check(std::int64_t count) {
  if (count < 0)
    throw std::invalid_argument("count is " + std::to_string(count) + "; it may not be negative");
}

}  // namespace

template <>
std::uint64_t bit_sum(const std::uint16_t* values, std::int64_t count, std::uint64_t first) {
  check(count);
  return HOLDFAST_VARIANT(bit_sum_16)(values, count, first);
}

template <>
std::uint64_t bit_sum(const std::uint32_t* values, std::int64_t count, std::uint64_t first) {
  check(count);
  return HOLDFAST_VARIANT(bit_sum_32)(values, count, first);
}

template <>
std::uint64_t bit_sum(const std::uint64_t* values, std::int64_t count, std::uint64_t first) {
  check(count);
  return HOLDFAST_VARIANT(bit_sum_64)(values, count, first);
}

}  // namespace holdfast
