// Attention over two parts of the keys, joined by their logarithms of sums of exponentials.
#pragma once

#include <cstdint>

#include "fixed_point.h"

namespace holdfast {

// For each row r: weights w1, w2 = softmax(lse1[r], lse2[r]), computed in double;
// out1[r] = w1 * out1[r] + w2 * out2[r], and lse1[r] = log(exp(lse1[r]) + exp(lse2[r])).
// A row's bits depend on the row alone. out1, out2: [rows, dim]; lse1, lse2: [rows].
template <class Value, class Sum>
void merge_attention(Value* out1, Sum* lse1, const Value* out2, const Sum* lse2, std::int64_t rows,
                     std::int64_t dim);

}  // namespace holdfast
