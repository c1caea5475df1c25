// Exact reduction: sums of gradients as int64 multiples of 2^-fraction_bits, and the way back.
#pragma once

#include <cstdint>

namespace holdfast {

struct bfloat16 {
  std::uint16_t bits;
};

constexpr int nonfinite_flag = 1;
constexpr int out_of_range_flag = 2;
constexpr int largest_fraction_bits = 62;

// sums[i] += rint(gradient[i] * 2^fraction_bits), half to even; returns flags. An element that is
// not finite, or not below 2^63 in size, adds nothing; an overflowing sum wraps. Both are flagged.
// `first`: as if all sums had been zero.
template <class Gradient>
int accumulate(std::int64_t* sums, const Gradient* gradient, std::int64_t count, int fraction_bits,
               bool first);

// Adds likewise for rows[k] of `sums` and row k of `gradient`.
template <class Gradient>
int accumulate_rows(std::int64_t* sums, const Gradient* gradient, const std::int64_t* rows,
                    std::int64_t row_count, std::int64_t row_elements, int fraction_bits);

int add_integers(std::int64_t* sums, const std::int64_t* other, std::int64_t count);

// output[i] = sums[i] * 2^-fraction_bits, rounded once; returns sum_squares(output).
template <class Output>
double reduce_convert(const std::int64_t* sums, Output* output, std::int64_t count,
                      int fraction_bits);

// In float64: lane i % 16 adds element i in ascending order; lanes are then added pairwise
// (j and j+8, j+4, j+2, j+1).
template <class Value>
double sum_squares(const Value* values, std::int64_t count);

}  // namespace holdfast
