// A keyed bijection of [0, size): the order in which a dataset is read.
#pragma once

#include <cstdint>

namespace holdfast {

// Throws std::invalid_argument unless 0 <= index < size.
std::int64_t permute_index(std::int64_t index, std::int64_t size, std::uint64_t key);

// output[i] = permute_index(start + i, size, key).
void permute_indices(std::int64_t* output, std::int64_t start, std::int64_t count,
                     std::int64_t size, std::uint64_t key);

}  // namespace holdfast
