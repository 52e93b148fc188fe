// Squared distance of two lists of tensors on the CPU: one pass over both, none of whose intermediate results is as large as a tensor;
// its gradient is a second one. Bound by memory, so that one build serves every instruction set. No sum depends on the number of threads.
#include "squared_distance/distance.h"

#include <algorithm>
#include <cstddef>

namespace clk {
namespace {

constexpr int64_t kPiece = 1 << 16;      // elements
constexpr int64_t kOneThread = 1 << 18;  // elements in all that are not worth a second thread

struct Row {
  const void *tensor, *reference;
  int64_t numel, first_piece;
};

struct Rows {
  std::vector<Row> rows;  // those with elements
  int64_t pieces = 0, grain = 1;

  Rows(const std::vector<Tensor>& tensors, const std::vector<Tensor>& references) {
    STD_TORCH_CHECK(!tensors.empty() && tensors.size() == references.size(), "squared_distance: expected as many references as tensors");
    const ScalarType type = tensors[0].scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "squared_distance: expected float32 or float64");
    int64_t elements = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto sizes = tensors[i].sizes(), its = references[i].sizes();
      STD_TORCH_CHECK(sizes.size() == its.size() && std::equal(sizes.begin(), sizes.end(), its.begin()),
                      "squared_distance: expected a tensor and its reference of the same shape");
      for (const Tensor* tensor : {&tensors[i], &references[i]}) {
        STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous(),
                        "squared_distance: expected contiguous tensors of one dtype");
      }
      const int64_t numel = tensors[i].numel();
      if (numel == 0) continue;
      rows.push_back({tensors[i].data_ptr(), references[i].data_ptr(), numel, pieces});
      pieces += (numel + kPiece - 1) / kPiece;
      elements += numel;
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

template <typename T>
double distance(const Row& row, int64_t start, int64_t n) {
  constexpr int64_t kSums = 32, kBlock = 4096;  // sums in parallel, and elements until they are added up in double precision
  const T *a = static_cast<const T*>(row.tensor) + start, *b = static_cast<const T*>(row.reference) + start;
  double total = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t end = std::min(n, block + kBlock);
    T sums[kSums] = {};
    int64_t i = block;
    for (; i + kSums <= end; i += kSums) {
      for (int64_t u = 0; u < kSums; ++u) {
        const T difference = a[i + u] - b[i + u];
        sums[u] += difference * difference;
      }
    }
    for (; i < end; ++i) sums[0] += (a[i] - b[i]) * (a[i] - b[i]);
    for (T sum : sums) total += static_cast<double>(sum);
  }
  return total;
}

template <typename T>
void gradient(const Row& row, int64_t start, int64_t n, T factor, T* out) {
  const T *a = static_cast<const T*>(row.tensor) + start, *b = static_cast<const T*>(row.reference) + start;
  for (int64_t i = 0; i < n; ++i) out[i] = factor * (a[i] - b[i]);
}

}  // namespace

Tensor squared_distance_cpu(std::vector<Tensor> tensors, std::vector<Tensor> references) {
  const Rows all(tensors, references);
  const bool wide = tensors[0].scalar_type() == ScalarType::Double;
  std::vector<double> sums(static_cast<size_t>(all.pieces));
  all.for_each([&](size_t row, int64_t start, int64_t n, int64_t piece) {
    sums[static_cast<size_t>(piece)] = wide ? distance<double>(all.rows[row], start, n) : distance<float>(all.rows[row], start, n);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  Tensor result = torch::stable::new_empty(tensors[0], {});
  if (wide) {
    *data<double>(result) = total;
  } else {
    *data<float>(result) = static_cast<float>(total);
  }
  return result;
}

std::vector<Tensor> squared_distance_backward_cpu(Tensor grad, std::vector<Tensor> tensors, std::vector<Tensor> references) {
  const Rows all(tensors, references);
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

}  // namespace clk
