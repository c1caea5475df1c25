// Included once per instruction set by for_each_instruction_set.h.
namespace holdfast::HOLDFAST_ISA {

// The highest bit of v ^ (v << 1) is v's sign bit at its least size; no bit is set for 0 alone.
inline int width_of(const std::int64_t* sums, std::int64_t count) {
  std::uint64_t changes = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<std::uint64_t>(sums[i]);
    changes |= value ^ (value << 1);
  }
  return static_cast<int>(71 - __builtin_clzll(changes | 1)) / 8 * (changes != 0);
}

template <class Word>
inline std::uint8_t* write_plane(const std::int64_t* __restrict sums, std::int64_t count, int shift,
                                 std::uint8_t* __restrict output) {
  constexpr std::int64_t size = sizeof(Word);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto word = static_cast<Word>(static_cast<std::uint64_t>(sums[i]) >> shift);
    std::memcpy(output + size * i, &word, size);
  }
  return output + size * count;
}

std::int64_t pack_runs(const std::int64_t* sums, std::int64_t count, std::uint8_t* output) {
  std::uint8_t* const payload = output + header_bytes(count);
  std::uint8_t* next = payload;
  std::uint8_t* header = output;
  for (std::int64_t start = 0; start < count; start += run_elements) {
    const std::int64_t* const run = sums + start;
    const std::int64_t size = run_at(start, count);
    const int width = width_of(run, size);
    *header++ = static_cast<std::uint8_t>(width);
    if (width == 8) next = write_plane<std::uint64_t>(run, size, 0, next);
    if (width & 4) next = write_plane<std::uint32_t>(run, size, 0, next);
    if (width & 2) next = write_plane<std::uint16_t>(run, size, width & 4 ? 32 : 0, next);
    if (width & 1) next = write_plane<std::uint8_t>(run, size, 8 * (width & 6), next);
  }
  while (header < payload) *header++ = 0;
  return next - output;
}

// Element i of a plane, shifted to its place; the highest plane of a run extends its sign.
template <class Word, bool highest>
inline std::uint64_t element(const std::uint8_t* plane, std::int64_t i, int shift) {
  std::conditional_t<highest, std::make_signed_t<Word>, Word> word;
  std::memcpy(&word, plane + static_cast<std::int64_t>(sizeof(Word)) * i, sizeof(Word));
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(word)) << shift;
}

template <int width>
inline std::int64_t value_at(const std::uint8_t* run, std::int64_t count, std::int64_t i) {
  std::uint64_t value = 0;
  if constexpr (width == 8) value |= element<std::uint64_t, true>(run, i, 0);
  if constexpr ((width & 4) != 0) value |= element<std::uint32_t, width == 4>(run, i, 0);
  if constexpr ((width & 2) != 0)
    value |= element<std::uint16_t, (width & 1) == 0>(run + (width & 4) * count, i,
                                                      8 * (width & 4));
  if constexpr ((width & 1) != 0)
    value |= element<std::uint8_t, true>(run + (width & 6) * count, i, 8 * (width & 6));
  return static_cast<std::int64_t>(value);
}

// The sign bit of the result tells of a wrapped sum.
template <int width>
std::int64_t unpack_run(const std::uint8_t* run, const std::int64_t* base, std::int64_t* output,
                        std::int64_t count) {
  if (base == nullptr) {
    HOLDFAST_ELEMENTWISE
    for (std::int64_t i = 0; i < count; ++i) output[i] = value_at<width>(run, count, i);
    return 0;
  }
  std::int64_t overflow = 0;
  HOLDFAST_ELEMENTWISE
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t before = base[i], term = value_at<width>(run, count, i);
    const auto after = static_cast<std::int64_t>(static_cast<std::uint64_t>(before) +
                                                 static_cast<std::uint64_t>(term));
    overflow |= (before ^ after) & (term ^ after);
    output[i] = after;
  }
  return overflow;
}

int unpack_runs(const std::uint8_t* packed, const std::int64_t* base, std::int64_t* output,
                std::int64_t count) {
  constexpr decltype(&unpack_run<0>) by_width[] = {
      unpack_run<0>, unpack_run<1>, unpack_run<2>, unpack_run<3>, unpack_run<4>,
      unpack_run<5>, unpack_run<6>, unpack_run<7>, unpack_run<8>};
  const std::uint8_t* run = packed + header_bytes(count);
  std::int64_t overflow = 0;
  for (std::int64_t start = 0; start < count; start += run_elements) {
    const int width = packed[start / run_elements];
    const std::int64_t size = run_at(start, count);
    overflow |= by_width[width](run, base ? base + start : nullptr, output + start, size);
    run += width * size;
  }
  return overflow < 0 ? out_of_range_flag : 0;
}

}  // namespace holdfast::HOLDFAST_ISA
