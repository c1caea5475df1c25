#include "packing.h"

#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fixed_point.h"
#include "instruction_set.h"

static_assert(std::endian::native == std::endian::little, "planes are written as words");

namespace holdfast {
namespace {

inline std::int64_t header_bytes(std::int64_t count) {
  const std::int64_t runs = (count + run_elements - 1) / run_elements;
  return (runs + 7) & ~std::int64_t{7};
}

inline std::int64_t run_at(std::int64_t start, std::int64_t count) {
  return count - start < run_elements ? count - start : run_elements;
}

void check_count(std::int64_t count) {
  if (count < 0 || count > std::int64_t{1} << 59)
    throw std::invalid_argument("count is " + std::to_string(count) + "; allowed: 0 to 2**59");
}

void check_packed(const std::uint8_t* packed, std::int64_t packed_bytes, std::int64_t count) {
  check_count(count);
  std::int64_t needed = header_bytes(count);
  if (packed_bytes < needed)
    throw std::invalid_argument("the header of " + std::to_string(count) + " packed elements has " +
                                std::to_string(needed) + " bytes; there are " +
                                std::to_string(packed_bytes));
  for (std::int64_t start = 0; start < count; start += run_elements) {
    const int width = packed[start / run_elements];
    if (width > 8)
      throw std::invalid_argument("run " + std::to_string(start / run_elements) +
                                  " has a width of " + std::to_string(width) +
                                  " bytes; allowed: 0 to 8");
    needed += width * run_at(start, count);
  }
  if (packed_bytes < needed)
    throw std::invalid_argument(std::to_string(count) + " elements of these widths are packed in " +
                                std::to_string(needed) + " bytes; there are " +
                                std::to_string(packed_bytes));
}

}  // namespace
}  // namespace holdfast

#define HOLDFAST_KERNELS "packing_kernels.inl"
#include "for_each_instruction_set.h"

namespace holdfast {

std::int64_t packed_bound(std::int64_t count) {
  check_count(count);
  return header_bytes(count) + 8 * count;
}

std::int64_t pack_integers(const std::int64_t* sums, std::int64_t count, std::uint8_t* output) {
  check_count(count);
  return HOLDFAST_VARIANT(pack_runs)(sums, count, output);
}

int unpack_add(const std::uint8_t* packed, std::int64_t packed_bytes, const std::int64_t* base,
               std::int64_t* output, std::int64_t count) {
  check_packed(packed, packed_bytes, count);
  return HOLDFAST_VARIANT(unpack_runs)(packed, base, output, count);
}

}  // namespace holdfast
