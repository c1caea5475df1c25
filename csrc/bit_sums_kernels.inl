// Included once per instruction set by for_each_instruction_set.h.
namespace holdfast::HOLDFAST_ISA {

template <class Word>
inline std::uint64_t bit_sum_of(const Word* values, std::int64_t count, std::uint64_t first) {
  constexpr std::uint64_t odd = 0x9E3779B97F4A7C15ull;
  const std::uint64_t start = first * odd;
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i)
    sum += static_cast<std::uint64_t>(values[i]) *
           ((start + static_cast<std::uint64_t>(i) * odd) | 1u);
  return sum;
}

std::uint64_t bit_sum_16(const std::uint16_t* values, std::int64_t count, std::uint64_t first) {
  return bit_sum_of(values, count, first);
}

std::uint64_t bit_sum_32(const std::uint32_t* values, std::int64_t count, std::uint64_t first) {
  return bit_sum_of(values, count, first);
}

std::uint64_t bit_sum_64(const std::uint64_t* values, std::int64_t count, std::uint64_t first) {
  return bit_sum_of(values, count, first);
}

}  // namespace holdfast::HOLDFAST_ISA
