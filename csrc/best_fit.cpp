#include "best_fit.h"

#include <bit>
#include <stdexcept>
#include <string>
#include <vector>

namespace holdfast {
namespace {

// The open bins by their room: a queue for each room, and a tree of bits that tells which queues
// have any, so that the least sufficient room is found in a few steps.
class OpenBins {
 public:
  explicit OpenBins(std::int64_t room) : first_(room + 1, none), last_(room + 1, none) {
    for (std::int64_t bits = room + 1; ; bits = words_of(bits)) {
      levels_.emplace_back(words_of(bits), 0);
      if (words_of(bits) == 1) break;
    }
  }

  std::int64_t count() const { return count_; }

  void add(std::int64_t bin, std::int64_t room) {
    if (static_cast<std::int64_t>(next_.size()) <= bin) next_.resize(bin + 1, none);
    next_[bin] = none;
    if (first_[room] == none) {
      first_[room] = bin;
      for (std::int64_t at = room; auto& level : levels_) {
        level[at / 64] |= std::uint64_t{1} << (at % 64);
        at /= 64;
      }
    } else {
      next_[last_[room]] = bin;
    }
    last_[room] = bin;
    ++count_;
  }

  // The least room of an open bin that is `wanted` or more; -1 if there is none.
  std::int64_t least_room(std::int64_t wanted) const {
    std::size_t level = 0;
    std::int64_t at = wanted;
    while (true) {
      if (at / 64 < static_cast<std::int64_t>(levels_[level].size())) {
        const std::uint64_t word = levels_[level][at / 64] >> (at % 64);
        if (word) {
          at += std::countr_zero(word);
          break;
        }
      }
      if (++level == levels_.size()) return -1;
      at = at / 64 + 1;
    }
    while (level-- > 0) at = 64 * at + std::countr_zero(levels_[level][at]);
    return at;
  }

  // Takes out the bin that has had this room for longest.
  std::int64_t take(std::int64_t room) {
    const std::int64_t bin = first_[room];
    first_[room] = next_[bin];
    if (first_[room] == none)
      for (std::int64_t at = room; auto& level : levels_) {
        level[at / 64] &= ~(std::uint64_t{1} << (at % 64));
        if (level[at / 64]) break;
        at /= 64;
      }
    --count_;
    return bin;
  }

 private:
  static constexpr std::int64_t none = -1;
  static std::int64_t words_of(std::int64_t bits) { return (bits + 63) / 64; }

  std::vector<std::int64_t> first_, last_, next_;  // queues: by room, by room, by bin
  std::vector<std::vector<std::uint64_t>> levels_;  // bit i of a level: any bit in word i below
  std::int64_t count_ = 0;
};

}  // namespace

std::int64_t best_fit(std::int64_t* bins, const std::int64_t* sizes, std::int64_t count,
                      std::int64_t room, std::int64_t open) {
  if (count < 0 || room < 1 || open < 1)
    throw std::invalid_argument("count is " + std::to_string(count) + ", room " +
                                std::to_string(room) + " and open " + std::to_string(open) +
                                "; these are 0, 1 and 1 or more");
  OpenBins bins_open(room);
  std::int64_t opened = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t size = sizes[i];
    if (size < 1 || size > room)
      throw std::invalid_argument("item " + std::to_string(i) + " has size " +
                                  std::to_string(size) + "; allowed are 1 to " +
                                  std::to_string(room));
    std::int64_t left = bins_open.least_room(size);
    if (left >= 0) {
      bins[i] = bins_open.take(left);
    } else {
      if (bins_open.count() == open) bins_open.take(bins_open.least_room(1));
      bins[i] = opened++;
      left = room;
    }
    if (left > size) bins_open.add(bins[i], left - size);
  }
  return opened;
}

}  // namespace holdfast
