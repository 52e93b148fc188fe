// In-place weight averaging on the CPU: one parallel pass over all tensors, cut into chunks so that threads share the work
// evenly however the sizes differ. Nothing tensor-sized is allocated.
#include <algorithm>
#include <cstddef>

#include "common/isa.h"
#include "weight_average/average.h"
#include "weight_average/cpu_kernels.h"

namespace clk {
namespace {

constexpr int64_t kPiece = 1 << 16;

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, "average_: expected float32, float64, bfloat16 or float16");
  }
}

int64_t bytes_of(Storage type) { return type == Storage::f64 ? 8 : type == Storage::f32 ? 4 : 2; }

}  // namespace

void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> values, double weight, std::vector<Tensor> others, double other_weight,
                 std::optional<int64_t> seed) {
  check_tensors(averages, values, others);
  const AverageRule rule{weight, other_weight, seed.has_value(), static_cast<uint64_t>(seed.value_or(0))};
  std::vector<AveragePiece> pieces;
  int64_t counter = 0;
  for (size_t i = 0; i < averages.size(); ++i) {
    const Storage dst_type = storage_of(averages[i].scalar_type());
    const Storage src_type = storage_of(values[i].scalar_type());
    const Storage other_type = others.empty() ? src_type : storage_of(others[i].scalar_type());
    char* dst = data<char>(averages[i]);
    const char* src = data<char>(values[i]);
    const char* other = others.empty() ? nullptr : data<char>(others[i]);
    const int64_t total = averages[i].numel();
    for (int64_t start = 0; start < total; start += kPiece) {
      pieces.push_back({dst_type, src_type, other_type, dst + start * bytes_of(dst_type), src + start * bytes_of(src_type),
                        other ? other + start * bytes_of(other_type) : nullptr, std::min(kPiece, total - start),
                        static_cast<uint64_t>(counter + start / kElementsPerCounter)});
    }
    counter += counters_of(total);
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) CLK_CALL(average_piece, pieces[static_cast<size_t>(i)], rule);
  });
}

}  // namespace clk
