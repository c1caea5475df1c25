// int64 sums without the bytes that only repeat the sign, for the wire.
//
// Format. The elements are cut into runs of 512; the last may be shorter. Header: one byte a run,
// its width w = 0 to 8, the low bytes in two's complement that hold every value of the run (0: all
// are zero); zero bytes pad it to a multiple of 8. Then the runs' payloads, without padding. The
// payload of n elements is a plane for each bit set in w, those of 8, 4, 2 and 1 bytes in this
// order: the plane of k bytes has k bytes of each element in turn, little-endian, the lowest that
// no earlier plane has. A run of width 5: n uint32 with bits 0 to 31, then n uint8 with bits 32 to
// 39. Reading extends the sign from bit 8w - 1. A writer takes the least width; a reader takes any,
// and does not read the padding.
#pragma once

#include <cstdint>

namespace holdfast {

constexpr std::int64_t run_elements = 512;

// The most bytes that `count` packed elements take: the header and 8 bytes an element.
std::int64_t packed_bound(std::int64_t count);

// Returns the bytes written to `output`, which has room for packed_bound(count).
std::int64_t pack_integers(const std::int64_t* sums, std::int64_t count, std::uint8_t* output);

// output[i] = base[i] + element i; base may be output, or null (the elements alone). Returns
// out_of_range_flag if a sum wrapped. Throws std::invalid_argument, before it writes anything, if a
// width is above 8 or the payload is longer than packed_bytes allow.
int unpack_add(const std::uint8_t* packed, std::int64_t packed_bytes, const std::int64_t* base,
               std::int64_t* output, std::int64_t count);

}  // namespace holdfast
