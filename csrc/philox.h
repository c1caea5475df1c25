// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") without state:
// element i depends on (key, stream, i) alone, so that any shard draws its own part.
#pragma once

#include <cstdint>

#include "fixed_point.h"

namespace holdfast {

// Elements offset, offset + 1, ... of the stream named by (key, stream).
struct Draw {
  std::uint64_t key;
  std::uint64_t stream;
  std::int64_t offset;
};

// Element i is word i % 4 of the generator's block i / 4.
void philox_words(std::uint32_t* output, std::int64_t count, const Draw& draw);

// In [0, 1): 24 bits of word i (float), 53 bits of words 2i and 2i + 1 (double).
template <class Value>
void philox_uniform(Value* output, std::int64_t count, const Draw& draw);

// Box-Muller in float64 on the two 53-bit uniforms of block i / 2: cosine for even i, sine for odd.
// Logarithm, sine and cosine are implemented here: those of C libraries differ between versions and processors.
template <class Value>
void philox_normal(Value* output, std::int64_t count, const Draw& draw, double mean, double std);

// Rows and columns of a logical matrix: output[r, c] is element
// (row_start + r) * total_columns + column_start + c of the stream; draw.offset is not used.
struct Window {
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_start;
  std::int64_t column_start;
  std::int64_t total_columns;
};

template <class Value>
void philox_normal_box(Value* output, const Window& window, const Draw& draw, double mean,
                       double std);

// output[i] = input[i] * (word >= floor(probability * 2^32) ? 1 / (1 - probability) : 0).
// May be in place.
template <class Value>
void dropout_scale(Value* output, const Value* input, std::int64_t count, const Draw& draw,
                   double probability);

}  // namespace holdfast
