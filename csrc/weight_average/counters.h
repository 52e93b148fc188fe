// How stochastic rounding draws its bits; for every file of this operation.
#pragma once

#include <cstdint>

namespace clk {

// Counter c under the seed of a call serves elements 8 (c - first) … 8 (c - first) + 7 of a tensor: 16 bits each, in the order of the four
// Philox words, low half first. The counters of a tensor follow those of the tensor before it in the list.
constexpr int64_t kElementsPerCounter = 8;

}  // namespace clk
