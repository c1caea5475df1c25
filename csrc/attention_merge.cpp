#include "attention_merge.h"

#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

namespace holdfast {
namespace {

inline float wide(float value) { return value; }
inline double wide(double value) { return value; }
inline float wide(bfloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

inline void store(float& place, float value) { place = value; }
inline void store(double& place, double value) { place = value; }
inline void store(bfloat16& place, float value) {  // to nearest, ties to even
  if (std::isnan(value)) {
    place.bits = 0x7fc0;
    return;
  }
  const auto bits = std::bit_cast<std::uint32_t>(value);
  place.bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

template <class Value, class Sum>
void merge_attention(Value* out1, Sum* lse1, const Value* out2, const Sum* lse2, std::int64_t rows,
                     std::int64_t dim) {
  if (rows < 0 || dim < 0)
    throw std::invalid_argument("rows is " + std::to_string(rows) + " and dim " +
                                std::to_string(dim) + "; neither may be negative");
  for (std::int64_t row = 0; row < rows; ++row, out1 += dim, out2 += dim) {
    const double first = lse1[row], second = lse2[row];
    const double most = std::fmax(first, second);
    const double share1 = std::exp(first - most), share2 = std::exp(second - most);
    const double total = share1 + share2;
    const Sum weight1 = static_cast<Sum>(share1 / total), weight2 = static_cast<Sum>(share2 / total);
    for (std::int64_t i = 0; i < dim; ++i)
      store(out1[i], weight1 * wide(out1[i]) + weight2 * wide(out2[i]));
    lse1[row] = static_cast<Sum>(most + std::log(total));
  }
}

template void merge_attention(float*, float*, const float*, const float*, std::int64_t,
                              std::int64_t);
template void merge_attention(double*, double*, const double*, const double*, std::int64_t,
                              std::int64_t);
template void merge_attention(bfloat16*, float*, const bfloat16*, const float*, std::int64_t,
                              std::int64_t);

}  // namespace holdfast
