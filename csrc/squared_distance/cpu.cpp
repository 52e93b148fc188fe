// Squared distance of two lists of tensors on the CPU: one pass over both, none of whose intermediate results is as large as a tensor;
// its gradient is a second one. Bound by memory, so that one build serves every instruction set. No sum depends on the number of threads.
#include "squared_distance/distance.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>

namespace clk {
namespace {

constexpr int64_t kPiece = 1 << 16;      // elements
constexpr int64_t kOneThread = 1 << 18;  // elements in all that are not worth a second thread

// Tensors that stand in the same place of every list.
struct Row {
  std::array<void*, 4> columns;
  int64_t numel, first_piece;

  template <typename T>
  T* at(size_t column, int64_t start) const {
    return static_cast<T*>(columns[column]) + start;
  }
};

struct Rows {
  std::vector<Row> rows;  // those with elements
  int64_t pieces = 0, grain = 1;

  // Tensors, references, and lists as long as these.
  Rows(const char* name, std::initializer_list<const std::vector<Tensor>*> lists) {
    const std::vector<Tensor>& tensors = **lists.begin();
    STD_TORCH_CHECK(!tensors.empty(), name, ": expected at least one tensor");
    const ScalarType type = tensors[0].scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, ": expected float32 or float64");
    for (const std::vector<Tensor>* list : lists) {
      STD_TORCH_CHECK(list->size() == tensors.size(), name, ": expected as many references as tensors, and all other lists as long");
    }
    int64_t elements = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      Row row{{}, tensors[i].numel(), pieces};
      const auto sizes = tensors[i].sizes();
      size_t column = 0;
      for (const std::vector<Tensor>* list : lists) {
        const Tensor& tensor = (*list)[i];
        const auto its = tensor.sizes();
        STD_TORCH_CHECK(sizes.size() == its.size() && std::equal(sizes.begin(), sizes.end(), its.begin()), name,
                        ": expected a tensor and its reference, and what else belongs to it, of the same shape");
        STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), name, ": expected contiguous tensors of one dtype");
        row.columns[column++] = tensor.data_ptr();
      }
      if (row.numel == 0) continue;
      rows.push_back(row);
      pieces += (row.numel + kPiece - 1) / kPiece;
      elements += row.numel;
    }
    if (elements < kOneThread) grain = std::max<int64_t>(pieces, 1);
  }

  // Calls work(row, start, n, piece) for all pieces, in parallel; `row` is an index.
  template <typename Work>
  void for_each(Work work) const {
    torch::stable::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
      const auto after = [](int64_t piece, const Row& row) { return piece < row.first_piece; };
      auto row = std::upper_bound(rows.begin(), rows.end(), begin, after) - 1;
      for (int64_t i = begin; i < end; ++i) {
        while (row + 1 != rows.end() && i >= (row + 1)->first_piece) ++row;
        const int64_t start = (i - row->first_piece) * kPiece;
        work(static_cast<size_t>(row - rows.begin()), start, std::min(kPiece, row->numel - start), i);
      }
    });
  }
};

template <bool WEIGHTED, typename T>
double distance(const Row& row, int64_t start, int64_t n) {
  constexpr int64_t kSums = 32, kBlock = 4096;  // sums in parallel, and elements until they are added up in double precision
  const T *a = row.at<const T>(0, start), *b = row.at<const T>(1, start), *w = WEIGHTED ? row.at<const T>(2, start) : nullptr;
  const auto term = [&](int64_t i) {
    const T difference = a[i] - b[i];
    if constexpr (WEIGHTED) return w[i] * (difference * difference);
    return difference * difference;
  };
  double total = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t end = std::min(n, block + kBlock);
    T sums[kSums] = {};
    int64_t i = block;
    for (; i + kSums <= end; i += kSums) {
      for (int64_t u = 0; u < kSums; ++u) sums[u] += term(i + u);
    }
    for (; i < end; ++i) sums[0] += term(i);
    for (T sum : sums) total += static_cast<double>(sum);
  }
  return total;
}

template <bool WEIGHTED>
Tensor sum_of(const Rows& all, const Tensor& like) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  std::vector<double> sums(static_cast<size_t>(all.pieces));
  all.for_each([&](size_t row, int64_t start, int64_t n, int64_t piece) {
    sums[static_cast<size_t>(piece)] =
        wide ? distance<WEIGHTED, double>(all.rows[row], start, n) : distance<WEIGHTED, float>(all.rows[row], start, n);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  Tensor result = torch::stable::new_empty(like, {});
  if (wide) {
    *data<double>(result) = total;
  } else {
    *data<float>(result) = static_cast<float>(total);
  }
  return result;
}

template <typename T>
void gradient(const Row& row, int64_t start, int64_t n, T factor, T* out) {
  const T *a = row.at<const T>(0, start), *b = row.at<const T>(1, start);
  for (int64_t i = 0; i < n; ++i) out[i] = factor * (a[i] - b[i]);
}

// Columns: tensors, references, gradients and, with WEIGHTED, weights.
template <bool WEIGHTED, typename T>
void add_difference(const Row& row, int64_t start, int64_t n, T factor) {
  const T *a = row.at<const T>(0, start), *b = row.at<const T>(1, start), *w = WEIGHTED ? row.at<const T>(3, start) : nullptr;
  T* out = row.at<T>(2, start);
  for (int64_t i = 0; i < n; ++i) {
    const T difference = a[i] - b[i];
    out[i] += factor * (WEIGHTED ? w[i] * difference : difference);
  }
}

template <bool WEIGHTED>
void add_differences(const Rows& all, bool wide, double factor) {
  all.for_each([&](size_t row, int64_t start, int64_t n, int64_t) {
    if (wide) {
      add_difference<WEIGHTED, double>(all.rows[row], start, n, factor);
    } else {
      add_difference<WEIGHTED, float>(all.rows[row], start, n, static_cast<float>(factor));
    }
  });
}

}  // namespace

Tensor squared_distance_cpu(std::vector<Tensor> tensors, std::vector<Tensor> references) {
  return sum_of<false>(Rows("squared_distance", {&tensors, &references}), tensors[0]);
}

Tensor weighted_squared_distance_cpu(std::vector<Tensor> tensors, std::vector<Tensor> references, std::vector<Tensor> weights) {
  return sum_of<true>(Rows("weighted_squared_distance", {&tensors, &references, &weights}), tensors[0]);
}

std::vector<Tensor> squared_distance_backward_cpu(Tensor grad, std::vector<Tensor> tensors, std::vector<Tensor> references) {
  const Rows all("squared_distance_backward", {&tensors, &references});
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == tensors[0].scalar_type(),
                  "squared_distance_backward: expected one number of the tensors' dtype");
  std::vector<Tensor> results;
  std::vector<void*> out;
  for (const Tensor& tensor : tensors) {
    results.push_back(torch::stable::empty_like(tensor));
    if (tensor.numel() > 0) out.push_back(results.back().data_ptr());
  }
  const bool wide = tensors[0].scalar_type() == ScalarType::Double;
  all.for_each([&](size_t row, int64_t start, int64_t n, int64_t) {
    if (wide) {
      gradient(all.rows[row], start, n, 2 * *data<double>(grad), static_cast<double*>(out[row]) + start);
    } else {
      gradient(all.rows[row], start, n, 2 * *data<float>(grad), static_cast<float*>(out[row]) + start);
    }
  });
  return results;
}

void add_difference_cpu(std::vector<Tensor> gradients, std::vector<Tensor> tensors, std::vector<Tensor> references,
                        std::vector<Tensor> weights, double factor) {
  constexpr const char* name = "add_difference_";
  const bool wide = !tensors.empty() && tensors[0].scalar_type() == ScalarType::Double;
  if (weights.empty()) {
    add_differences<false>(Rows(name, {&tensors, &references, &gradients}), wide, factor);
  } else {
    add_differences<true>(Rows(name, {&tensors, &references, &gradients, &weights}), wide, factor);
  }
}

}  // namespace clk
