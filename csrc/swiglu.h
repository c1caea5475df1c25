// SwiGLU (Shazeer 2020) and its gradients, each in one pass over memory.
#pragma once

#include <cstdint>

namespace holdfast {

// out[r, i] = silu(g) * u with g = gate_up[r, i] and u = gate_up[r, width + i].
// gate_up: [rows, 2 * width]; out: [rows, width]. An element's bits depend on g and u alone.
void swiglu(const float* gate_up, float* out, std::int64_t rows, std::int64_t width);

// From the gradient by `out` above, the gradients by g and u, and `out` itself again, bit for bit.
// gradient, out: [rows, width]; gate_up, by_gate_up: [rows, 2 * width].
void swiglu_backward(const float* gradient, const float* gate_up, float* out, float* by_gate_up,
                     std::int64_t rows, std::int64_t width);

}  // namespace holdfast
