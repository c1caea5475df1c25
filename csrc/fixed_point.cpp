#include "fixed_point.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "instruction_set.h"

namespace holdfast {
namespace {

struct Lanes {
  double sums[16];
};

inline double to_double(float value) { return value; }
inline double to_double(double value) { return value; }
inline double to_double(bfloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

inline std::int64_t wrapping_add(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
}

// Handles any gradient, one by one: for the rare block with a large or non-finite one.
template <class Gradient>
int add_any(std::int64_t* sums, const Gradient* gradient, std::int64_t count, double scale) {
  int flags = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = to_double(gradient[i]);
    const double scaled = value * scale;
    if (!std::isfinite(value)) {
      flags |= nonfinite_flag;
    } else if (!(std::fabs(scaled) < 9223372036854775808.0)) {
      flags |= out_of_range_flag;
    } else {
      const auto term = static_cast<std::int64_t>(std::nearbyint(scaled));
      const std::int64_t before = sums[i];
      sums[i] = wrapping_add(before, term);
      if (((before ^ sums[i]) & (term ^ sums[i])) < 0) flags |= out_of_range_flag;
    }
  }
  return flags;
}

double scale_of(int fraction_bits) {
  if (fraction_bits < 0 || fraction_bits > largest_fraction_bits)
    throw std::invalid_argument("fraction_bits is " + std::to_string(fraction_bits) +
                                "; allowed: 0 to 62");
  return std::ldexp(1.0, fraction_bits);
}

void check_count(std::int64_t count) {
  if (count < 0)
    throw std::invalid_argument("count is " + std::to_string(count) + "; it must not be negative");
}

}  // namespace
}  // namespace holdfast

#define HOLDFAST_KERNELS "fixed_point_kernels.inl"
#include "for_each_instruction_set.h"

namespace holdfast {
namespace {

auto kernel_for(const float*) { return HOLDFAST_VARIANT(accumulate_f32); }
auto kernel_for(const bfloat16*) { return HOLDFAST_VARIANT(accumulate_bf16); }
auto kernel_for(const double*) { return HOLDFAST_VARIANT(accumulate_f64); }

}  // namespace

template <class Gradient>
int accumulate(std::int64_t* sums, const Gradient* gradient, std::int64_t count,
               int fraction_bits, bool first) {
  check_count(count);
  return kernel_for(gradient)(sums, gradient, count, scale_of(fraction_bits), first);
}

template <class Gradient>
int accumulate_rows(std::int64_t* sums, const Gradient* gradient, const std::int64_t* rows,
                    std::int64_t row_count, std::int64_t row_elements, int fraction_bits) {
  check_count(row_count);
  check_count(row_elements);
  const auto kernel = kernel_for(gradient);
  const double scale = scale_of(fraction_bits);
  int flags = 0;
  for (std::int64_t k = 0; k < row_count; ++k)
    flags |= kernel(sums + rows[k] * row_elements, gradient + k * row_elements, row_elements, scale,
                    false);
  return flags;
}

template int accumulate(std::int64_t*, const float*, std::int64_t, int, bool);
template int accumulate(std::int64_t*, const bfloat16*, std::int64_t, int, bool);
template int accumulate(std::int64_t*, const double*, std::int64_t, int, bool);
template int accumulate_rows(std::int64_t*, const float*, const std::int64_t*, std::int64_t,
                             std::int64_t, int);
template int accumulate_rows(std::int64_t*, const bfloat16*, const std::int64_t*, std::int64_t,
                             std::int64_t, int);
template int accumulate_rows(std::int64_t*, const double*, const std::int64_t*, std::int64_t,
                             std::int64_t, int);

int add_integers(std::int64_t* sums, const std::int64_t* other, std::int64_t count) {
  check_count(count);
  return HOLDFAST_VARIANT(add_integers)(sums, other, count);
}

template <>
double reduce_convert(const std::int64_t* sums, float* output, std::int64_t count,
                      int fraction_bits) {
  check_count(count);
  const auto scale = static_cast<float>(1.0 / scale_of(fraction_bits));
  return HOLDFAST_VARIANT(reduce_convert_f32)(sums, output, count, scale);
}

template <>
double reduce_convert(const std::int64_t* sums, double* output, std::int64_t count,
                      int fraction_bits) {
  check_count(count);
  return HOLDFAST_VARIANT(reduce_convert_f64)(sums, output, count, 1.0 / scale_of(fraction_bits));
}

template <>
double sum_squares(const float* values, std::int64_t count) {
  check_count(count);
  return HOLDFAST_VARIANT(sum_squares_f32)(values, count);
}

template <>
double sum_squares(const double* values, std::int64_t count) {
  check_count(count);
  return HOLDFAST_VARIANT(sum_squares_f64)(values, count);
}

}  // namespace holdfast
