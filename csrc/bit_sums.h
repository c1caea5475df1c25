// Weighted sums of the bits of values: what two copies, or two runs, are compared by.
#pragma once

#include <cstdint>

namespace holdfast {

// The sum modulo 2^64 of word(values[i]) * weight(first + i): a value's bits as an unsigned number,
// and weight(n) = (n * 0x9E3779B97F4A7C15) | 1. Weights are odd, so that a change of a single value
// always changes the sum; they differ, so that the order of values counts. Sums of disjoint ranges
// of places add up to that of all, in any order.
template <class Word>
std::uint64_t bit_sum(const Word* values, std::int64_t count, std::uint64_t first);

}  // namespace holdfast
