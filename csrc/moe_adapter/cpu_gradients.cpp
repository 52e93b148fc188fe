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

ExpertSums::ExpertSums(const Problem& p, const Usage& usage, const ExpertTensors& results)
    : problem_(p),
      results_(results),
      used_(usage.experts),
      place_(static_cast<size_t>(p.experts)),
      begun_(static_cast<size_t>(p.experts)),
      size_(p.type == Element::f64 ? 8 : 4) {
  for (size_t u = 0; u < used_.size(); ++u) place_[static_cast<size_t>(used_[u])] = static_cast<int64_t>(u);
  for (int64_t e = 0; e < p.experts; ++e) {
    if (usage.rows[static_cast<size_t>(e)] > 0) continue;
    for (const Tensor* t : {&results_.down_weight, &results_.down_bias, &results_.up_weight, &results_.up_bias}) {
      std::memset(of_expert(*t, e), 0, static_cast<size_t>(t->numel() / p.experts) * t->element_size());
    }
  }
  if (static_cast<int64_t>(results_.down_weight.element_size()) == size_) return;
  numbers_ = (2 * p.rank + 1) * p.width + p.rank;
  memory_.reset(new char[used_.size() * static_cast<size_t>(numbers_ * size_)]);
}

ExpertSums::Sums ExpertSums::sums_of(int64_t expert) const {
  if (!memory_) {
    return {of_expert(results_.down_weight, expert), of_expert(results_.down_bias, expert), of_expert(results_.up_weight, expert),
            of_expert(results_.up_bias, expert)};
  }
  const int64_t weights = problem_.rank * problem_.width;
  char* from = memory_.get() + place_[static_cast<size_t>(expert)] * numbers_ * size_;
  return {from, from + 2 * weights * size_, from + weights * size_, from + (2 * weights + problem_.rank) * size_};
}

void ExpertSums::add(const Backward& backward, const View& x, const Choices& choices) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t columns = CLK_CALL(gradient_columns, problem_.type, problem_.width, threads);
  const int64_t blocks = (problem_.width + columns - 1) / columns, experts = static_cast<int64_t>(choices.experts.size());
  const int64_t bytes = CLK_CALL(gradient_scratch, problem_);
  // Blocks outermost: however the experts share the tokens, all threads have as much to do.
  torch::stable::parallel_for(0, blocks * experts, 1, [&](int64_t from, int64_t to) {
    const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(bytes) + 64]);
    char* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    for (int64_t i = from; i < to; ++i) {
      const size_t chosen = static_cast<size_t>(i % experts);
      const int64_t expert = choices.experts[chosen], first = choices.begin[chosen];
      const Sums sums = sums_of(expert);
      ExpertGradients op{};
      static_cast<Problem&>(op) = problem_;
      op.x = x;
      op.grad = backward.grad;
      op.hidden = backward.hidden;
      op.grad_pre = backward.grad_pre;
      op.run = choices.run;
      op.count = choices.begin[chosen + 1] - first;
      op.rows = choices.rows.data() + first;
      op.grad_pre_rows = choices.grad_pre.data() + first;
      op.first = !begun_[static_cast<size_t>(expert)];
      op.down_weight = sums.down_weight;
      op.down_bias = sums.down_bias;
      op.up_weight = sums.up_weight;
      op.up_bias = sums.up_bias;
      const int64_t start = i / experts * columns;
      CLK_CALL(gradient_block, op, start, std::min(columns, problem_.width - start), scratch);
    }
  });
  for (int64_t expert : choices.experts) begun_[static_cast<size_t>(expert)] = true;
}

void ExpertSums::finish() {
  if (!memory_) return;
  const Tensor* results[] = {&results_.down_weight, &results_.down_bias, &results_.up_weight, &results_.up_bias};
  torch::stable::parallel_for(0, static_cast<int64_t>(used_.size()), 1 + (1 << 16) / (numbers_ + 1), [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t expert = used_[static_cast<size_t>(u)];
      const Sums sums = sums_of(expert);
      const char* from[] = {sums.down_weight, sums.down_bias, sums.up_weight, sums.up_bias};
      for (int i = 0; i < 4; ++i) {
        char* to = of_expert(*results[i], expert);
        CLK_CALL(store_numbers, problem_.type, from[i], results[i]->numel() / problem_.experts, to);
      }
    }
  });
}

}  // namespace moe
}  // namespace clk
