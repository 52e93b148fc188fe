#include "moe_adapter/cpu_gradients.h"

#include <algorithm>
#include <cstring>

namespace clk {
namespace moe {
namespace {

// Where the data of one expert begins.
char* of_expert(const Tensor& stacked, int64_t expert) {
  return data<char>(stacked) + expert * (stacked.numel() / stacked.size(0)) * static_cast<int64_t>(stacked.element_size());
}

}  // namespace

ExpertSums::ExpertSums(const Problem& p, const Pairs& pairs, const ExpertTensors& results)
    : problem_(p), pairs_(pairs), results_(results), size_(p.type == Element::f64 ? 8 : 4) {
  for (int64_t e = 0; e < p.experts; ++e) {
    if (pairs.count(e) > 0 && p.length > 0) {
      used_.push_back(e);
      continue;
    }
    for (const Tensor* t : {&results_.down_weight, &results_.down_bias, &results_.up_weight, &results_.up_bias}) {
      std::memset(of_expert(*t, e), 0, static_cast<size_t>(t->numel() / p.experts) * t->element_size());
    }
  }
  if (static_cast<int64_t>(results_.down_weight.element_size()) == size_) return;
  numbers_ = (2 * p.rank + 1) * p.width + p.rank;
  memory_.reset(new char[used_.size() * static_cast<size_t>(numbers_ * size_)]);
}

ExpertSums::Sums ExpertSums::sums_of(int64_t used) const {
  const int64_t expert = used_[static_cast<size_t>(used)];
  if (!memory_) {
    return {of_expert(results_.down_weight, expert), of_expert(results_.down_bias, expert), of_expert(results_.up_weight, expert),
            of_expert(results_.up_bias, expert)};
  }
  const int64_t weights = problem_.rank * problem_.width;
  char* from = memory_.get() + used * numbers_ * size_;
  return {from, from + 2 * weights * size_, from + weights * size_, from + (2 * weights + problem_.rank) * size_};
}

void ExpertSums::add(const Backward& backward, const View& x, int64_t first, int64_t end) {
  struct Work {
    int64_t used, begin, count;  // which expert, and its pairs in this piece
    bool first;
  };
  std::vector<Work> work;
  for (size_t u = 0; u < used_.size(); ++u) {
    const size_t e = static_cast<size_t>(used_[u]);
    const auto pair = [&](size_t i) { return pairs_.pairs.begin() + pairs_.begin[i]; };
    const auto begin = std::lower_bound(pair(e), pair(e + 1), first * problem_.slots);
    const auto stop = std::lower_bound(begin, pair(e + 1), end * problem_.slots);
    if (begin != stop) work.push_back({static_cast<int64_t>(u), begin - pairs_.pairs.begin(), stop - begin, begin == pair(e)});
  }
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t columns = CLK_CALL(gradient_columns, problem_.type, problem_.width, threads);
  const int64_t blocks = (problem_.width + columns - 1) / columns, experts = static_cast<int64_t>(work.size());
  const int64_t bytes = CLK_CALL(gradient_scratch, problem_);
  // Blocks outermost: however the experts share the tokens, all threads have as much to do.
  torch::stable::parallel_for(0, blocks * experts, 1, [&](int64_t from, int64_t to) {
    const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(bytes) + 64]);
    char* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    for (int64_t i = from; i < to; ++i) {
      const Work& one = work[static_cast<size_t>(i % experts)];
      const Sums sums = sums_of(one.used);
      ExpertGradients op{};
      static_cast<Problem&>(op) = problem_;
      op.x = x;
      op.grad = backward.grad;
      op.hidden = backward.hidden;
      op.grad_pre = backward.grad_pre;
      op.first_row = backward.first_row;
      op.expert = used_[static_cast<size_t>(one.used)];
      op.count = one.count;
      op.pairs = pairs_.pairs.data() + one.begin;
      op.first = one.first;
      op.down_weight = sums.down_weight;
      op.down_bias = sums.down_bias;
      op.up_weight = sums.up_weight;
      op.up_bias = sums.up_bias;
      const int64_t start = i / experts * columns;
      CLK_CALL(gradient_block, op, start, std::min(columns, problem_.width - start), scratch);
    }
  });
}

void ExpertSums::finish() {
  if (!memory_) return;
  const Tensor* results[] = {&results_.down_weight, &results_.down_bias, &results_.up_weight, &results_.up_bias};
  torch::stable::parallel_for(0, static_cast<int64_t>(used_.size()), 1 + (1 << 16) / (numbers_ + 1), [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const Sums sums = sums_of(u);
      const char* from[] = {sums.down_weight, sums.down_bias, sums.up_weight, sums.up_bias};
      for (int i = 0; i < 4; ++i) {
        char* to = of_expert(*results[i], used_[static_cast<size_t>(u)]);
        CLK_CALL(store_numbers, problem_.type, from[i], results[i]->numel() / problem_.experts, to);
      }
    }
  });
}

}  // namespace moe
}  // namespace clk
