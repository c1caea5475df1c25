// CRC-32C (Castagnoli, RFC 3720 appendix B.4), by the processor's instruction where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace holdfast {

// Checksum of `bytes` bytes that follow data whose checksum is `initial` (0 for none).
std::uint32_t crc32c(const unsigned char* data, std::size_t bytes, std::uint32_t initial);

// Copies `bytes` bytes and returns their checksum, as crc32c does; the ranges must not overlap.
std::uint32_t copy_crc32c(unsigned char* destination, const unsigned char* source,
                          std::size_t bytes, std::uint32_t initial);

// Checksum of A followed by B from those of A and B.
std::uint32_t crc32c_combine(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_b);

}  // namespace holdfast
