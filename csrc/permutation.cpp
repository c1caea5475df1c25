#include "permutation.h"

#include <array>
#include <bit>
#include <stdexcept>
#include <string>

namespace holdfast {
namespace {

constexpr int rounds = 8;

// Finaliser of MurmurHash3 (Appleby): every input bit reaches every output bit.
std::uint64_t mix(std::uint64_t value) {
  value = (value ^ (value >> 33)) * 0xff51afd7ed558ccdULL;
  value = (value ^ (value >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return value ^ (value >> 33);
}

// Feistel network over the smallest domain of an even number of bits that holds [0, size); an index
// that leaves [0, size) is permuted again until it is back (Black and Rogaway 2002, cycle walking).
class Permutation {
 public:
  Permutation(std::int64_t size, std::uint64_t key) : size_(static_cast<std::uint64_t>(size)) {
    if (size < 1)
      throw std::invalid_argument("size is " + std::to_string(size) + "; it must be at least 1");
    half_bits_ = (std::bit_width(size_ - 1) + 1) / 2;
    mask_ = (std::uint64_t{1} << half_bits_) - 1;
    for (int round = 0; round < rounds; ++round)
      keys_[round] = mix(key + 0x9e3779b97f4a7c15ULL * static_cast<std::uint64_t>(round + 1));
  }

  std::int64_t operator()(std::int64_t index) const {
    auto value = static_cast<std::uint64_t>(index);
    do value = network(value);
    while (value >= size_);
    return static_cast<std::int64_t>(value);
  }

 private:
  std::uint64_t network(std::uint64_t value) const {
    std::uint64_t left = value >> half_bits_, right = value & mask_;
    for (const std::uint64_t key : keys_) {
      const std::uint64_t next = left ^ (mix(right ^ key) & mask_);
      left = right;
      right = next;
    }
    return (left << half_bits_) | right;
  }

  std::uint64_t size_;
  std::uint64_t mask_;
  int half_bits_;
  std::array<std::uint64_t, rounds> keys_;
};

}  // namespace

std::int64_t permute_index(std::int64_t index, std::int64_t size, std::uint64_t key) {
  std::int64_t result;
  permute_indices(&result, index, 1, size, key);
  return result;
}

void permute_indices(std::int64_t* output, std::int64_t start, std::int64_t count,
                     std::int64_t size, std::uint64_t key) {
  const Permutation permutation(size, key);
  if (start < 0 || count < 0 || count > size || start > size - count)
    throw std::invalid_argument("indices " + std::to_string(start) + " and the next " +
                                std::to_string(count) + " must lie in [0, " + std::to_string(size) +
                                ")");
  for (std::int64_t i = 0; i < count; ++i) output[i] = permutation(start + i);
}

}  // namespace holdfast
