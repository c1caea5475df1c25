// Included once per instruction set by for_each_instruction_set.h.
namespace holdfast::HOLDFAST_ISA {

// The sign bit of the result is set when any gradient is not finite or |gradient| >= limit.
inline std::int64_t beyond(const float* gradient, std::int64_t count, double limit) {
  const auto bound = std::bit_cast<std::int32_t>(static_cast<float>(limit)) - 1;
  std::int32_t found = 0;
  for (std::int64_t i = 0; i < count; ++i)
    found |= bound - (std::bit_cast<std::int32_t>(gradient[i]) & 0x7fffffff);
  return found;
}

inline std::int64_t beyond(const bfloat16* gradient, std::int64_t count, double limit) {
  const auto bound = (std::bit_cast<std::int32_t>(static_cast<float>(limit)) >> 16) - 1;
  std::int32_t found = 0;
  for (std::int64_t i = 0; i < count; ++i)
    found |= bound - static_cast<std::int32_t>(gradient[i].bits & 0x7fffu);
  return found;
}

inline std::int64_t beyond(const double* gradient, std::int64_t count, double limit) {
  const auto bound = std::bit_cast<std::int64_t>(limit) - 1;
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i)
    found |= bound - (std::bit_cast<std::int64_t>(gradient[i]) & 0x7fffffffffffffff);
  return found;
}

// For |gradient * scale| < 2^51: adding 1.5 * 2^52 rounds to an integer, half to even, and leaves it
// in the low bits, on every instruction set. The sign bit of the result tells of an overflowed sum.
inline std::int64_t small_term(double gradient, double scale) {
  constexpr double shifter = 6755399441055744.0;
  constexpr auto shifter_bits = std::bit_cast<std::int64_t>(shifter);
  return std::bit_cast<std::int64_t>(gradient * scale + shifter) - shifter_bits;
}

template <class Gradient>
inline std::int64_t add_small(std::int64_t* __restrict sums, const Gradient* __restrict gradient,
                              std::int64_t count, double scale) {
  std::int64_t overflow = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t term = small_term(to_double(gradient[i]), scale);
    const std::int64_t before = sums[i];
    const std::int64_t after = wrapping_add(before, term);
    overflow |= (before ^ after) & (term ^ after);
    sums[i] = after;
  }
  return overflow;
}

constexpr std::int64_t block_elements = 1024;

template <class Gradient>
int accumulate_blocks(std::int64_t* sums, const Gradient* gradient, std::int64_t count,
                      double scale) {
  const double limit = 2251799813685248.0 / scale;
  int flags = 0;
  for (std::int64_t start = 0; start < count; start += block_elements) {
    const std::int64_t size = std::min(count - start, block_elements);
    if (beyond(gradient + start, size, limit) < 0)
      flags |= add_any(sums + start, gradient + start, size, scale);
    else if (add_small(sums + start, gradient + start, size, scale) < 0)
      flags |= out_of_range_flag;
  }
  return flags;
}

template <class Gradient>
int set_blocks(std::int64_t* __restrict sums, const Gradient* __restrict gradient,
               std::int64_t count, double scale) {
  const double limit = 2251799813685248.0 / scale;
  int flags = 0;
  for (std::int64_t start = 0; start < count; start += block_elements) {
    const std::int64_t stop = std::min(count, start + block_elements);
    if (beyond(gradient + start, stop - start, limit) < 0) {
      std::fill(sums + start, sums + stop, 0);
      flags |= add_any(sums + start, gradient + start, stop - start, scale);
    } else {
      for (std::int64_t i = start; i < stop; ++i)
        sums[i] = small_term(to_double(gradient[i]), scale);
    }
  }
  return flags;
}

template <class Gradient>
int accumulate_any(std::int64_t* sums, const Gradient* gradient, std::int64_t count, double scale,
                   bool first) {
  return first ? set_blocks(sums, gradient, count, scale)
               : accumulate_blocks(sums, gradient, count, scale);
}

int accumulate_f32(std::int64_t* sums, const float* gradient, std::int64_t count, double scale,
                   bool first) {
  return accumulate_any(sums, gradient, count, scale, first);
}

int accumulate_bf16(std::int64_t* sums, const bfloat16* gradient, std::int64_t count, double scale,
                    bool first) {
  return accumulate_any(sums, gradient, count, scale, first);
}

int accumulate_f64(std::int64_t* sums, const double* gradient, std::int64_t count, double scale,
                   bool first) {
  return accumulate_any(sums, gradient, count, scale, first);
}

int add_integers(std::int64_t* sums, const std::int64_t* other, std::int64_t count) {
  std::int64_t overflow = 0;
  HOLDFAST_ELEMENTWISE
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t before = sums[i], term = other[i];
    const std::int64_t after = wrapping_add(before, term);
    overflow |= (before ^ after) & (term ^ after);
    sums[i] = after;
  }
  return overflow < 0 ? out_of_range_flag : 0;
}

template <class Value>
inline void add_squares(Lanes& lanes, const Value* values, std::int64_t count) {
  double sums[16];
  for (int j = 0; j < 16; ++j) sums[j] = lanes.sums[j];
  const std::int64_t whole = count & ~std::int64_t{15};
  for (std::int64_t i = 0; i < whole; i += 16)
    for (int j = 0; j < 16; ++j) {
      const double value = values[i + j];
      sums[j] += value * value;
    }
  for (std::int64_t i = whole; i < count; ++i) {
    const double value = values[i];
    sums[i - whole] += value * value;
  }
  for (int j = 0; j < 16; ++j) lanes.sums[j] = sums[j];
}

inline double total(Lanes& lanes) {
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes.sums[j] += lanes.sums[j + width];
  return lanes.sums[0];
}

// |sum| >= 1 and fraction_bits <= 62 keep the scaled value normal: only the conversion rounds.
template <class Output>
double convert_block(const std::int64_t* __restrict sums, Output* __restrict output,
                     std::int64_t count, Output scale) {
  constexpr std::int64_t block = 1024;
  Lanes lanes{};
  for (std::int64_t start = 0; start < count; start += block) {
    const std::int64_t size = count - start < block ? count - start : block;
    for (std::int64_t i = start; i < start + size; ++i)
      output[i] = static_cast<Output>(sums[i]) * scale;
    add_squares(lanes, output + start, size);
  }
  return total(lanes);
}

double reduce_convert_f32(const std::int64_t* sums, float* output, std::int64_t count,
                          float scale) {
  return convert_block(sums, output, count, scale);
}

double reduce_convert_f64(const std::int64_t* sums, double* output, std::int64_t count,
                          double scale) {
  return convert_block(sums, output, count, scale);
}

double sum_squares_f32(const float* values, std::int64_t count) {
  Lanes lanes{};
  add_squares(lanes, values, count);
  return total(lanes);
}

double sum_squares_f64(const double* values, std::int64_t count) {
  Lanes lanes{};
  add_squares(lanes, values, count);
  return total(lanes);
}

}  // namespace holdfast::HOLDFAST_ISA
