#include "philox.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "instruction_set.h"

#if HOLDFAST_X86
#include <immintrin.h>
#endif

static_assert(std::endian::native == std::endian::little, "words are stored in pairs");

namespace holdfast {
namespace {

constexpr std::int64_t chunk_blocks = 512;  // 8 KiB of words: stays in the first-level cache

typedef std::uint32_t __attribute__((may_alias)) Word32;

struct Chunk {
  alignas(64) std::uint64_t words[2 * chunk_blocks];
  const Word32* halves() const { return reinterpret_cast<const Word32*>(words); }
};

void check(std::int64_t count, std::int64_t offset) {
  if (count < 0 || offset < 0)
    throw std::invalid_argument("count is " + std::to_string(count) + " and offset " +
                                std::to_string(offset) + "; neither may be negative");
}

}  // namespace
}  // namespace holdfast

#define HOLDFAST_KERNELS "philox_kernels.inl"
#include "for_each_instruction_set.h"

namespace holdfast {
namespace {

auto normal_kernel(const float*) { return HOLDFAST_VARIANT(normal_f32); }
auto normal_kernel(const double*) { return HOLDFAST_VARIANT(normal_f64); }
auto dropout_kernel(const float*) { return HOLDFAST_VARIANT(dropout_f32); }
auto dropout_kernel(const bfloat16*) { return HOLDFAST_VARIANT(dropout_bf16); }
auto dropout_kernel(const double*) { return HOLDFAST_VARIANT(dropout_f64); }

}  // namespace

void philox_words(std::uint32_t* output, std::int64_t count, const Draw& draw) {
  check(count, draw.offset);
  HOLDFAST_VARIANT(words)(output, count, draw);
}

template <>
void philox_uniform(float* output, std::int64_t count, const Draw& draw) {
  check(count, draw.offset);
  HOLDFAST_VARIANT(uniform_f32)(output, count, draw);
}

template <>
void philox_uniform(double* output, std::int64_t count, const Draw& draw) {
  check(count, draw.offset);
  HOLDFAST_VARIANT(uniform_f64)(output, count, draw);
}

template <class Value>
void philox_normal(Value* output, std::int64_t count, const Draw& draw, double mean, double std) {
  check(count, draw.offset);
  normal_kernel(output)(output, count, draw, mean, std);
}

template <class Value>
void philox_normal_box(Value* output, const Window& window, const Draw& draw, double mean,
                       double std) {
  check(window.rows, window.row_start);
  check(window.columns, window.column_start);
  if (window.columns > window.total_columns - window.column_start)
    throw std::invalid_argument("columns " + std::to_string(window.column_start) + " and the next " +
                                std::to_string(window.columns) + " must lie in [0, " +
                                std::to_string(window.total_columns) + ")");
  const auto kernel = normal_kernel(output);
  if (window.columns == window.total_columns) {
    kernel(output, window.rows * window.columns,
           {draw.key, draw.stream, window.row_start * window.columns}, mean, std);
    return;
  }
  for (std::int64_t row = 0; row < window.rows; ++row) {
    const std::int64_t offset =
        (window.row_start + row) * window.total_columns + window.column_start;
    kernel(output + row * window.columns, window.columns, {draw.key, draw.stream, offset}, mean,
           std);
  }
}

template <class Value>
void dropout_scale(Value* output, const Value* input, std::int64_t count, const Draw& draw,
                   double probability) {
  check(count, draw.offset);
  if (!(probability >= 0.0 && probability < 1.0))
    throw std::invalid_argument("dropout probability is " + std::to_string(probability) +
                                "; allowed: 0 <= probability < 1");
  const auto threshold = static_cast<std::uint32_t>(std::floor(probability * 0x1p32));
  dropout_kernel(output)(output, input, count, draw, threshold, 1.0 / (1.0 - probability));
}

template void philox_normal(float*, std::int64_t, const Draw&, double, double);
template void philox_normal(double*, std::int64_t, const Draw&, double, double);
template void philox_normal_box(float*, const Window&, const Draw&, double, double);
template void philox_normal_box(double*, const Window&, const Draw&, double, double);
template void dropout_scale(float*, const float*, std::int64_t, const Draw&, double);
template void dropout_scale(bfloat16*, const bfloat16*, std::int64_t, const Draw&, double);
template void dropout_scale(double*, const double*, std::int64_t, const Draw&, double);

}  // namespace holdfast
