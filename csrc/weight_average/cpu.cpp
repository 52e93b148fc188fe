// In-place weight averaging on the CPU: one parallel pass over all tensors, cut into chunks so that threads share the work
// evenly however the sizes differ. Nothing tensor-sized is allocated.
#include <algorithm>
#include <cstddef>

#include "common/isa.h"
#include "weight_average/average.h"
#include "weight_average/cpu_kernels.h"

namespace clk {
namespace {

constexpr int64_t kChunk = 1 << 16;

struct Chunk {
  Storage dst_type, src_type;
  char* dst;
  const char* src;
  int64_t n;
};

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

void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> values, double weight) {
  check_pairs(averages, values);
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < averages.size(); ++i) {
    const Storage dst_type = storage_of(averages[i].scalar_type());
    const Storage src_type = storage_of(values[i].scalar_type());
    char* dst = data<char>(averages[i]);
    const char* src = data<char>(values[i]);
    const int64_t total = averages[i].numel();
    for (int64_t start = 0; start < total; start += kChunk) {
      chunks.push_back({dst_type, src_type, dst + start * bytes_of(dst_type), src + start * bytes_of(src_type),
                        std::min(kChunk, total - start)});
    }
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& c = chunks[static_cast<size_t>(i)];
      CLK_CALL(average_chunk, c.dst_type, c.dst, c.src_type, c.src, c.n, weight);
    }
  });
}

}  // namespace clk
