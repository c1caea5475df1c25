// Included once per instruction set by for_each_instruction_set.h.
namespace holdfast::HOLDFAST_ISA {

// One generator block per 64-bit lane; of a lane's counter words only the low half counts.
typedef std::uint64_t Words __attribute__((vector_size(HOLDFAST_VECTOR_BYTES)));
constexpr int lanes = HOLDFAST_VECTOR_BYTES / 8;
constexpr int groups = HOLDFAST_VECTOR_BYTES == 64 ? 4 : 2;  // in flight, as registers allow
static_assert(chunk_blocks % (lanes * groups) == 0);

inline Words all(std::uint64_t value) { return Words{} + value; }

inline Words multiply_low_halves(Words a, Words b) {
#if HOLDFAST_X86 && HOLDFAST_VECTOR_BYTES == 64
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif HOLDFAST_X86 && HOLDFAST_VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif HOLDFAST_X86
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Lane j's two words go to words[2 * block(j)] and the next, block(j) as `first_lanes` assigns them:
// even lanes the first half of the blocks, odd lanes the second, which two unpacks undo.
inline void store(std::uint64_t* words, Words low, Words high) {
#if HOLDFAST_X86 && HOLDFAST_VECTOR_BYTES == 64
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64((__m512i)low, (__m512i)high));
  _mm512_storeu_si512(words + lanes, _mm512_unpackhi_epi64((__m512i)low, (__m512i)high));
#elif HOLDFAST_X86 && HOLDFAST_VECTOR_BYTES == 32
  _mm256_storeu_si256((__m256i*)words, _mm256_unpacklo_epi64((__m256i)low, (__m256i)high));
  _mm256_storeu_si256((__m256i*)(words + lanes), _mm256_unpackhi_epi64((__m256i)low, (__m256i)high));
#else
  for (int j = 0; j < lanes; ++j) {
    const int block = j / 2 + (j % 2) * (lanes / 2);
    words[2 * block] = low[j];
    words[2 * block + 1] = high[j];
  }
#endif
}

// words[2b] and words[2b + 1] hold generator block first + b; writes up to the next multiple of
// lanes * groups blocks, within chunk_blocks.
inline void fill(Chunk& chunk, std::int64_t blocks, std::uint64_t first, std::uint64_t key,
                 std::uint64_t stream) {
  Words first_lanes;
  for (int j = 0; j < lanes; ++j) first_lanes[j] = j / 2 + (j % 2) * (lanes / 2);
  const Words low_half = all(0xffffffffu);
  const Words multiplier_0 = all(0xd2511f53u), multiplier_1 = all(0xcd9e8d57u);
  for (std::int64_t start = 0; start < blocks; start += lanes * groups) {
    Words c0[groups], c1[groups], c2[groups], c3[groups];
    for (int g = 0; g < groups; ++g) {
      c0[g] = first_lanes + (first + static_cast<std::uint64_t>(start + g * lanes));
      c1[g] = c0[g] >> 32;
      c2[g] = all(stream);
      c3[g] = all(stream >> 32);
    }
    auto key_0 = static_cast<std::uint32_t>(key), key_1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const Words k0 = all(key_0), k1 = all(key_1);
      for (int g = 0; g < groups; ++g) {
        const Words p0 = multiply_low_halves(c0[g], multiplier_0);
        const Words p1 = multiply_low_halves(c2[g], multiplier_1);
        c0[g] = (p1 >> 32) ^ c1[g] ^ k0;
        c1[g] = p1;
        c2[g] = (p0 >> 32) ^ c3[g] ^ k1;
        c3[g] = p0;
      }
      key_0 += 0x9e3779b9u;
      key_1 += 0xbb67ae85u;
    }
    for (int g = 0; g < groups; ++g)
      store(chunk.words + 2 * (start + g * lanes), (c0[g] & low_half) | (c1[g] << 32),
            (c2[g] & low_half) | (c3[g] << 32));
  }
}

// Calls consume(chunk, skip, done, size) for consecutive pieces of the elements, of which each block
// holds `per_block`: the piece's first element is element `skip` of the chunk.
template <class Consumer>
inline void each_chunk(std::int64_t count, const Draw& draw, int per_block,
                       const Consumer& consume) {
  Chunk chunk;
  std::int64_t done = 0;
  while (done < count) {
    const std::int64_t element = draw.offset + done;
    const std::int64_t skip = element % per_block;
    const std::int64_t room = chunk_blocks * per_block - skip;
    const std::int64_t size = count - done < room ? count - done : room;
    fill(chunk, (skip + size + per_block - 1) / per_block,
         static_cast<std::uint64_t>(element / per_block), draw.key, draw.stream);
    consume(chunk, skip, done, size);
    done += size;
  }
}

struct CopyWords {
  std::uint32_t* output;
  void operator()(const Chunk& chunk, std::int64_t skip, std::int64_t done,
                  std::int64_t size) const {
    std::memcpy(output + done, reinterpret_cast<const char*>(chunk.words) + 4 * skip,
                static_cast<std::size_t>(4 * size));
  }
};

struct UniformFloat {
  float* output;
  void operator()(const Chunk& chunk, std::int64_t skip, std::int64_t done,
                  std::int64_t size) const {
    const Word32* words = chunk.halves() + skip;
    for (std::int64_t i = 0; i < size; ++i)
      output[done + i] =
          static_cast<float>(static_cast<std::int32_t>(words[i] >> 8)) * 0x1p-24f;
  }
};

// The pair's first word is the upper half. 53 bits as a double, times 2^-53, without a 64-bit
// conversion, which AVX2 lacks: both halves are put into mantissas and the offsets taken off exactly.
inline double unit_double(std::uint64_t pair) {
  const std::uint64_t bits = ((pair << 32) | (pair >> 32)) >> 11;
  const double high = std::bit_cast<double>(0x4530000000000000u | (bits >> 32)) - 0x1p84;
  const double low = std::bit_cast<double>(0x4330000000000000u | (bits & 0xffffffffu)) - 0x1p52;
  return (high + low) * 0x1p-53;
}

struct UniformDouble {
  double* output;
  void operator()(const Chunk& chunk, std::int64_t skip, std::int64_t done,
                  std::int64_t size) const {
    const std::uint64_t* pairs = chunk.words + skip;
    for (std::int64_t i = 0; i < size; ++i) output[done + i] = unit_double(pairs[i]);
  }
};

// For normal positive x. fdlibm's e_log.c (Sun Microsystems 1993): below 1 ulp.
inline double natural_log(double x) {
  constexpr std::uint64_t root_half = 0x3fe6a09e00000000u;
  const std::uint64_t shifted =
      std::bit_cast<std::uint64_t>(x) + (0x3ff0000000000000u - root_half);
  const double exponent =
      std::bit_cast<double>(0x4330000000000000u | (shifted >> 52)) - (0x1p52 + 1023.0);
  const double f = std::bit_cast<double>((shifted & 0x000fffffffffffffu) + root_half) - 1.0;
  const double s = f / (2.0 + f), z = s * s, w = z * z, half = 0.5 * f * f;
  const double even = w * (3.999999999940941908e-01 +
                           w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double odd = z * (6.666666666666735130e-01 +
                          w * (2.857142874366239149e-01 +
                               w * (1.818357216161805012e-01 + w * 1.479819860510658591e-01)));
  return exponent * 6.93147180369123816490e-01 -
         ((half - (s * (half + (even + odd)) + exponent * 1.90821492927058770002e-10)) - f);
}

// One pair of standard normals per block: radius from the first uniform, angle from the second.
inline void normal_pairs(const Chunk& chunk, std::int64_t blocks, double* normals) {
  for (std::int64_t b = 0; b < blocks; ++b) {
    const double u = unit_double(chunk.words[2 * b]), v = unit_double(chunk.words[2 * b + 1]);
    const double radius = sqrt(-2.0 * natural_log(1.0 - u));
    // Angle 2 pi v = (quarter + rest) pi / 2 with |rest| <= 1/2, exact; fdlibm's k_sin.c, k_cos.c.
    const double turns = 4.0 * v, shifted = turns + 0x1.8p52;
    const std::uint64_t quarter = std::bit_cast<std::uint64_t>(shifted);
    const double x = (turns - (shifted - 0x1.8p52)) * 1.57079632679489661923, z = x * x;
    const double sine =
        x + x * z *
                (-1.66666666666666324348e-01 +
                 z * (8.33333333332248946124e-03 +
                      z * (-1.98412698298579493134e-04 +
                           z * (2.75573137070700676789e-06 +
                                z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    const double cosine =
        1.0 - 0.5 * z +
        z * z *
            (4.16666666666666019037e-02 +
             z * (-1.38888888888741095749e-03 +
                  z * (2.48015872894767294178e-05 +
                       z * (-2.75573143513906633035e-07 +
                            z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
    // quarter mod 4 = 0, 1, 2, 3: (c, s), (-s, c), (-c, -s), (s, -c)
    const std::uint64_t swap = std::uint64_t{0} - (quarter & 1);
    const auto c = std::bit_cast<std::uint64_t>(cosine), s = std::bit_cast<std::uint64_t>(sine);
    const std::uint64_t first = (((s ^ c) & swap) ^ c) ^ (((quarter + 1) & 2) << 62);
    const std::uint64_t second = (((s ^ c) & swap) ^ s) ^ ((quarter & 2) << 62);
    normals[2 * b] = radius * std::bit_cast<double>(first);
    normals[2 * b + 1] = radius * std::bit_cast<double>(second);
  }
}

template <class Value>
struct Normal {
  Value* output;
  double mean;
  double std;
  void operator()(const Chunk& chunk, std::int64_t skip, std::int64_t done,
                  std::int64_t size) const {
    alignas(64) double normals[2 * chunk_blocks];
    normal_pairs(chunk, (skip + size + 1) / 2, normals);
    for (std::int64_t i = 0; i < size; ++i)
      output[done + i] = static_cast<Value>(mean + std * normals[skip + i]);
  }
};

template <class Value>
struct Dropout {
  Value* output;
  const Value* input;
  std::uint32_t threshold;
  double scale;
  void operator()(const Chunk& chunk, std::int64_t skip, std::int64_t done,
                  std::int64_t size) const {
    const Word32* words = chunk.halves() + skip;
    const auto factor = static_cast<Value>(scale);
    HOLDFAST_ELEMENTWISE
    for (std::int64_t i = 0; i < size; ++i)
      output[done + i] = input[done + i] * (words[i] >= threshold ? factor : Value{0});
  }
};

template <>
struct Dropout<bfloat16> {
  bfloat16* output;
  const bfloat16* input;
  std::uint32_t threshold;
  double scale;
  void operator()(const Chunk& chunk, std::int64_t skip, std::int64_t done,
                  std::int64_t size) const {
    const Word32* words = chunk.halves() + skip;
    const auto factor = static_cast<float>(scale);
    HOLDFAST_ELEMENTWISE
    for (std::int64_t i = 0; i < size; ++i) {
      const auto wide =
          std::bit_cast<float>(static_cast<std::uint32_t>(input[done + i].bits) << 16);
      const auto bits =
          std::bit_cast<std::uint32_t>(wide * (words[i] >= threshold ? factor : 0.0f));
      const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
      output[done + i].bits = static_cast<std::uint16_t>(number ? rounded : 0x7fc0u);
    }
  }
};

void words(std::uint32_t* output, std::int64_t count, const Draw& draw) {
  each_chunk(count, draw, 4, CopyWords{output});
}
void uniform_f32(float* output, std::int64_t count, const Draw& draw) {
  each_chunk(count, draw, 4, UniformFloat{output});
}
void uniform_f64(double* output, std::int64_t count, const Draw& draw) {
  each_chunk(count, draw, 2, UniformDouble{output});
}
void normal_f32(float* output, std::int64_t count, const Draw& draw, double mean, double std) {
  each_chunk(count, draw, 2, Normal<float>{output, mean, std});
}
void normal_f64(double* output, std::int64_t count, const Draw& draw, double mean, double std) {
  each_chunk(count, draw, 2, Normal<double>{output, mean, std});
}
void dropout_f32(float* output, const float* input, std::int64_t count, const Draw& draw,
                 std::uint32_t threshold, double scale) {
  each_chunk(count, draw, 4, Dropout<float>{output, input, threshold, scale});
}
void dropout_bf16(bfloat16* output, const bfloat16* input, std::int64_t count, const Draw& draw,
                  std::uint32_t threshold, double scale) {
  each_chunk(count, draw, 4, Dropout<bfloat16>{output, input, threshold, scale});
}
void dropout_f64(double* output, const double* input, std::int64_t count, const Draw& draw,
                 std::uint32_t threshold, double scale) {
  each_chunk(count, draw, 4, Dropout<double>{output, input, threshold, scale});
}

}  // namespace holdfast::HOLDFAST_ISA
