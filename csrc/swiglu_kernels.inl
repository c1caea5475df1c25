// Included once per instruction set by for_each_instruction_set.h.
namespace holdfast::HOLDFAST_ISA {

// 1 / (1 + exp(-x)) for -87 <= x <= 87, else of the nearer end: off by 3 units in the last place at
// most. exp(t) = 2^n exp(r) with a polynomial of degree 7 (as in Cephes' expf, Moshier 1989).
inline float sigmoid(float x) {
  float t = -x;
  t = t > 87.0f ? 87.0f : t;
  t = t < -87.0f ? -87.0f : t;
  constexpr float rounds = 12582912.0f;  // 1.5 * 2^23: adding it leaves no place for a fraction
  const float n = (t * 1.44269504088896341f + rounds) - rounds;
  const float r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float of_r = (p * r) * r + r + 1.0f;
  const float power = std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23);
  return 1.0f / (1.0f + of_r * power);
}

inline void swiglu(const float* gate_up, float* out, std::int64_t rows, std::int64_t width) {
  for (std::int64_t row = 0; row < rows; ++row, gate_up += 2 * width, out += width) {
    const float* up = gate_up + width;
    HOLDFAST_ELEMENTWISE
    for (std::int64_t i = 0; i < width; ++i) out[i] = (gate_up[i] * sigmoid(gate_up[i])) * up[i];
  }
}

inline void swiglu_backward(const float* gradient, const float* gate_up, float* out,
                            float* by_gate_up, std::int64_t rows, std::int64_t width) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* up = gate_up + width;
    float* by_up = by_gate_up + width;
    HOLDFAST_ELEMENTWISE
    for (std::int64_t i = 0; i < width; ++i) {
      const float g = gate_up[i], s = sigmoid(g), activated = g * s;
      out[i] = activated * up[i];
      by_up[i] = gradient[i] * activated;
      by_gate_up[i] = (gradient[i] * up[i]) * (s * (1.0f + g * (1.0f - s)));
    }
    gradient += width, gate_up += 2 * width, out += width, by_gate_up += 2 * width;
  }
}

}  // namespace holdfast::HOLDFAST_ISA
