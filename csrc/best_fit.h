// Best-fit packing of items into bins of one size, with a bounded number of open bins.
#pragma once

#include <cstdint>

namespace holdfast {

// Puts items into bins in their order: each into the open bin with the least room that suffices,
// of these into the one that has had this room for longest; otherwise into a new bin, for which
// the fullest one is closed if `open` bins are open. bins[i] is the bin of item i; bins are
// numbered in the order in which they are opened. Returns their number.
// Throws std::invalid_argument unless room >= 1, open >= 1 and 1 <= sizes[i] <= room.
std::int64_t best_fit(std::int64_t* bins, const std::int64_t* sizes, std::int64_t count,
                      std::int64_t room, std::int64_t open);

}  // namespace holdfast
