#include "crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "instruction_set.h"

#if HOLDFAST_X86
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace holdfast {
namespace {

constexpr std::uint32_t polynomial = 0x82f63b78;  // bit-reflected

// Product of two polynomials modulo the CRC's, bit-reflected: bit 31 is x^0.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit) {
    if ((a >> bit) & 1) product ^= b;
    b = (b & 1) ? (b >> 1) ^ polynomial : b >> 1;
  }
  return product;
}

// x^(8 * bytes): the operator that appends `bytes` zero bytes.
constexpr std::uint32_t zeros(std::uint64_t bytes) {
  std::uint32_t result = 0x80000000;
  std::uint32_t power = 0x00800000;  // x^8
  for (; bytes != 0; bytes >>= 1) {
    if (bytes & 1) result = multiply(power, result);
    power = multiply(power, power);
  }
  return result;
}

using Table = std::array<std::uint32_t, 256>;

template <std::size_t Tables>
using TableSet = std::array<Table, Tables>;

constexpr TableSet<8> slicing_tables() {
  TableSet<8> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ polynomial : crc >> 1;
    tables[0][byte] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t crc = tables[k - 1][byte];
      tables[k][byte] = (crc >> 8) ^ tables[0][crc & 0xff];
    }
  return tables;
}

// Appends a fixed number of zero bytes with four look-ups.
constexpr TableSet<4> zero_tables(std::uint64_t bytes) {
  const std::uint32_t operation = zeros(bytes);
  TableSet<4> tables{};
  for (std::uint32_t k = 0; k < 4; ++k)
    for (std::uint32_t byte = 0; byte < 256; ++byte)
      tables[k][byte] = multiply(operation, byte << (8 * k));
  return tables;
}

constexpr std::size_t long_stream = 8192;
constexpr std::size_t short_stream = 256;

const TableSet<8> slicing = slicing_tables();
const TableSet<4> after_long = zero_tables(long_stream);
const TableSet<4> after_short = zero_tables(short_stream);

inline std::uint32_t append_zeros(const TableSet<4>& tables, std::uint32_t crc) {
  return tables[0][crc & 0xff] ^ tables[1][(crc >> 8) & 0xff] ^ tables[2][(crc >> 16) & 0xff] ^
         tables[3][crc >> 24];
}

inline std::uint64_t load(const unsigned char* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

std::uint32_t by_table(const unsigned char* data, std::size_t bytes, std::uint32_t crc) {
  for (; bytes >= 8; data += 8, bytes -= 8) {
    const std::uint64_t word = load(data) ^ crc;
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= slicing[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; bytes > 0; ++data, --bytes) crc = (crc >> 8) ^ slicing[0][(crc ^ *data) & 0xff];
  return crc;
}

#if HOLDFAST_X86
#define HOLDFAST_CRC_TARGET __attribute__((target("sse4.2")))
#define HOLDFAST_CRC_WORD(crc, word) _mm_crc32_u64(crc, word)
#define HOLDFAST_CRC_BYTE(crc, byte) _mm_crc32_u8(static_cast<std::uint32_t>(crc), byte)
bool has_instruction() {
  return instruction_set() != InstructionSet::portable && __builtin_cpu_supports("sse4.2");
}
#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
#define HOLDFAST_CRC_TARGET
inline std::uint32_t arm_word(std::uint32_t crc, std::uint64_t word) {
  __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word));
  return crc;
}
inline std::uint32_t arm_byte(std::uint32_t crc, std::uint32_t byte) {
  __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(byte));
  return crc;
}
#define HOLDFAST_CRC_WORD(crc, word) arm_word(static_cast<std::uint32_t>(crc), word)
#define HOLDFAST_CRC_BYTE(crc, byte) arm_byte(static_cast<std::uint32_t>(crc), byte)
bool has_instruction() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#else
  return true;
#endif
}
#endif

#if defined(HOLDFAST_CRC_TARGET)
// The instruction takes three cycles and starts every cycle: three streams keep it busy
// (Gopal et al. 2011, "Fast CRC computation for iSCSI polynomial using CRC32 instruction").
template <std::size_t Stream>
HOLDFAST_CRC_TARGET inline std::uint64_t three_streams(const unsigned char* data, std::uint64_t crc,
                                                       const TableSet<4>& tables) {
  std::uint64_t first = crc, second = 0, third = 0;
  for (std::size_t i = 0; i < Stream; i += 8) {
    first = HOLDFAST_CRC_WORD(first, load(data + i));
    second = HOLDFAST_CRC_WORD(second, load(data + Stream + i));
    third = HOLDFAST_CRC_WORD(third, load(data + 2 * Stream + i));
  }
  second ^= append_zeros(tables, static_cast<std::uint32_t>(first));
  return third ^ append_zeros(tables, static_cast<std::uint32_t>(second));
}

HOLDFAST_CRC_TARGET std::uint32_t by_instruction(const unsigned char* data, std::size_t bytes,
                                                 std::uint32_t initial) {
  std::uint64_t crc = initial;
  for (; bytes >= 3 * long_stream; data += 3 * long_stream, bytes -= 3 * long_stream)
    crc = three_streams<long_stream>(data, crc, after_long);
  for (; bytes >= 3 * short_stream; data += 3 * short_stream, bytes -= 3 * short_stream)
    crc = three_streams<short_stream>(data, crc, after_short);
  for (; bytes >= 8; data += 8, bytes -= 8) crc = HOLDFAST_CRC_WORD(crc, load(data));
  for (; bytes > 0; ++data, --bytes) crc = HOLDFAST_CRC_BYTE(crc, *data);
  return static_cast<std::uint32_t>(crc);
}
#endif

}  // namespace

std::uint32_t crc32c(const unsigned char* data, std::size_t bytes, std::uint32_t initial) {
#if defined(HOLDFAST_CRC_TARGET)
  if (has_instruction()) return ~by_instruction(data, bytes, ~initial);
#endif
  return ~by_table(data, bytes, ~initial);
}

std::uint32_t crc32c_combine(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_b) {
  return multiply(zeros(bytes_b), a) ^ b;
}

std::uint32_t copy_crc32c(unsigned char* destination, const unsigned char* source,
                          std::size_t bytes, std::uint32_t initial) {
  // Small enough that what the checksum reads is still in the first-level cache.
  constexpr std::size_t kCached = 24 << 10;
  std::uint32_t crc = initial;
  for (std::size_t done = 0; done < bytes; done += kCached) {
    const std::size_t part = std::min(kCached, bytes - done);
    std::memcpy(destination + done, source + done, part);
    crc = crc32c(source + done, part, crc);
  }
  return crc;
}

}  // namespace holdfast
