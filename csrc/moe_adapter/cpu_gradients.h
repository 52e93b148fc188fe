// Gradients of the experts' weights, added up while the batch passes piece by piece.
#pragma once

#include "moe_adapter/cpu_tiles.h"

namespace clk {
namespace moe {

struct ExpertTensors {
  Tensor down_weight, down_bias, up_weight, up_bias;  // (E, R, D), (E, R), (E, D, R), (E, D)
};

// Sums in compute type: the results themselves where they are of that type, else memory of its own.
class ExpertSums {
 public:
  // Writes zeros for experts without a token.
  ExpertSums(const Problem& problem, const Usage& usage, const ExpertTensors& results);
  // Adds the rows of a piece, whose grad_pre `backward` has just left.
  void add(const Backward& backward, const View& x, const Choices& choices);
  // Brings sums in memory of their own into the results.
  void finish();

 private:
  struct Sums {
    char *down_weight, *down_bias, *up_weight, *up_bias;
  };
  Sums sums_of(int64_t expert) const;

  const Problem& problem_;
  ExpertTensors results_;
  std::vector<int64_t> used_;   // experts with tokens
  std::vector<int64_t> place_;  // of every expert among them
  std::vector<bool> begun_;     // by expert: whether there are sums already
  int64_t size_, numbers_ = 0;      // bytes of a number, and how many of them an expert has
  std::unique_ptr<char[]> memory_;  // of the sums; null where they are the results
};

}  // namespace moe
}  // namespace clk
