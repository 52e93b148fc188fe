// In-place weight averaging on the CPU: one parallel pass over all tensors, cut into pieces so that threads share the work
// evenly however the sizes differ. Nothing tensor-sized is allocated.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "common/isa.h"
#include "weight_average/average.h"
#include "weight_average/cpu_kernels.h"

namespace clk {
namespace {

constexpr int64_t kPiece = 1 << 16;
constexpr int64_t kOneThread = 1 << 19;  // elements in all that are averaged before a second thread has woken up

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, "average_: expected float32, float64, bfloat16 or float16");
  }
}

struct Whole {
  AveragePiece all;
  int64_t first_piece;
};

// The piece of a tensor that begins at element `start`.
AveragePiece cut(AveragePiece piece, int64_t start) {
  piece.dst = static_cast<char*>(piece.dst) + start * bytes_of(piece.dst_type);
  piece.src = static_cast<const char*>(piece.src) + start * bytes_of(piece.src_type);
  if (piece.other != nullptr) piece.other = static_cast<const char*>(piece.other) + start * bytes_of(piece.other_type);
  piece.n = std::min(kPiece, piece.n - start);
  piece.counter += static_cast<uint64_t>(start / kElementsPerCounter);
  return piece;
}

}  // namespace

void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> values, double weight, std::vector<Tensor> others, double other_weight,
                 std::optional<int64_t> seed) {
  check_tensors(averages, values, others);
  const AverageRule rule{weight, other_weight, seed.has_value(), static_cast<uint64_t>(seed.value_or(0))};
  std::vector<Whole> tensors;
  tensors.reserve(averages.size());
  int64_t pieces = 0, counter = 0, elements = 0;
  for (size_t i = 0; i < averages.size(); ++i) {
    const int64_t total = averages[i].numel();
    if (total == 0) continue;
    AveragePiece all{};
    all.dst_type = storage_of(averages[i].scalar_type());
    all.src_type = storage_of(values[i].scalar_type());
    all.other_type = others.empty() ? all.src_type : storage_of(others[i].scalar_type());
    all.dst = averages[i].data_ptr();
    all.src = values[i].data_ptr();
    all.other = others.empty() ? nullptr : others[i].data_ptr();
    all.n = total;
    all.counter = static_cast<uint64_t>(counter);
    tensors.push_back({all, pieces});
    pieces += (total + kPiece - 1) / kPiece;
    counter += counters_of(total);
    elements += total;
  }
  if (pieces == 0) return;
  const int64_t grain = elements < kOneThread ? pieces : 1;
  torch::stable::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
    const auto after = [](int64_t piece, const Whole& whole) { return piece < whole.first_piece; };
    auto tensor = std::upper_bound(tensors.begin(), tensors.end(), begin, after) - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (tensor + 1 != tensors.end() && i >= (tensor + 1)->first_piece) ++tensor;
      const AveragePiece piece = cut(tensor->all, (i - tensor->first_piece) * kPiece);
      CLK_CALL(average_piece, piece, rule);
    }
  });
}

}  // namespace clk
