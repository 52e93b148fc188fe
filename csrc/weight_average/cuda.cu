// In-place weight averaging of a whole model in as few launches as the kernel-parameter space allows.
//
// The table of tensors and of chunks travels by value in the kernel parameters (32,764 bytes since CUDA 12.1, sm_70 and newer),
// so there is no copy to the device and nothing is allocated. A chunk is up to kChunk elements of one tensor; a block
// handles one chunk, with 16-byte accesses wherever both pointers allow them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include "weight_average/average.h"

// The CUDA shims live in libtorch_cuda. Weak references let one library load on a CPU torch, where nothing calls them.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace clk {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 1 << 16;
constexpr int kTensors = 480;
constexpr int kChunks = 2400;

enum class Storage : uint8_t { f32, f64, bf16, f16 };

struct Table {
  void* dst[kTensors];
  const void* src[kTensors];
  int64_t numel[kTensors];
  uint8_t types[kTensors];  // storage of dst * 4 + storage of src
  uint16_t tensor_of[kChunks];
  uint32_t chunk_of[kChunks];
  double weight;
};
static_assert(sizeof(Table) <= 32764, "the table must fit into the kernel parameters");

template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

template <typename To, typename From>
__device__ __forceinline__ To convert(From v) {
  return static_cast<To>(v);
}
template <>
__device__ __forceinline__ float convert<float, __nv_bfloat16>(__nv_bfloat16 v) { return __bfloat162float(v); }
template <>
__device__ __forceinline__ float convert<float, __half>(__half v) { return __half2float(v); }
template <>
__device__ __forceinline__ double convert<double, __nv_bfloat16>(__nv_bfloat16 v) { return __bfloat162float(v); }
template <>
__device__ __forceinline__ double convert<double, __half>(__half v) { return __half2float(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16, float>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ __half convert<__half, float>(float v) { return __float2half_rn(v); }

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <typename Dst, typename Src>
__device__ void average(Dst* dst, const Src* src, int n, double weight) {
  using C = typename Arithmetic<Dst>::type;
  const C w = static_cast<C>(weight);
  constexpr int wide = sizeof(Dst) > sizeof(Src) ? sizeof(Dst) : sizeof(Src);
  constexpr int N = 16 / wide;
  using DstPack = Pack<Dst, N>;
  using SrcPack = Pack<Src, N>;
  int done = 0;
  const bool aligned = reinterpret_cast<uintptr_t>(dst) % sizeof(DstPack) == 0 && reinterpret_cast<uintptr_t>(src) % sizeof(SrcPack) == 0;
  if (aligned) {
    const int packs = n / N;
    for (int i = threadIdx.x; i < packs; i += kThreads) {
      DstPack d = reinterpret_cast<DstPack*>(dst)[i];
      const SrcPack s = reinterpret_cast<const SrcPack*>(src)[i];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const C a = convert<C>(d.v[j]);
        d.v[j] = convert<Dst>(a + w * (convert<C>(s.v[j]) - a));
      }
      reinterpret_cast<DstPack*>(dst)[i] = d;
    }
    done = packs * N;
  }
  for (int i = done + threadIdx.x; i < n; i += kThreads) {
    const C a = convert<C>(dst[i]);
    dst[i] = convert<Dst>(a + w * (convert<C>(src[i]) - a));
  }
}

template <typename Dst>
__device__ void average_from(Dst* dst, const void* src, int64_t start, Storage type, int n, double weight) {
  switch (type) {
    case Storage::f32: return average(dst, static_cast<const float*>(src) + start, n, weight);
    case Storage::f64: return average(dst, static_cast<const double*>(src) + start, n, weight);
    case Storage::bf16: return average(dst, static_cast<const __nv_bfloat16*>(src) + start, n, weight);
    case Storage::f16: return average(dst, static_cast<const __half*>(src) + start, n, weight);
  }
}

__global__ void __launch_bounds__(kThreads) average_kernel(const __grid_constant__ Table table) {
  const int t = table.tensor_of[blockIdx.x];
  const int64_t start = static_cast<int64_t>(table.chunk_of[blockIdx.x]) * kChunk;
  const int64_t left = table.numel[t] - start;
  const int n = static_cast<int>(left < kChunk ? left : kChunk);
  const Storage src_type = static_cast<Storage>(table.types[t] % 4);
  switch (static_cast<Storage>(table.types[t] / 4)) {
    case Storage::f32: return average_from(static_cast<float*>(table.dst[t]) + start, table.src[t], start, src_type, n, table.weight);
    case Storage::f64: return average_from(static_cast<double*>(table.dst[t]) + start, table.src[t], start, src_type, n, table.weight);
    case Storage::bf16: return average_from(static_cast<__nv_bfloat16*>(table.dst[t]) + start, table.src[t], start, src_type, n, table.weight);
    case Storage::f16: return average_from(static_cast<__half*>(table.dst[t]) + start, table.src[t], start, src_type, n, table.weight);
  }
}

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, "average_: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace

void average_cuda(std::vector<Tensor> averages, std::vector<Tensor> values, double weight) {
  check_pairs(averages, values);
  if (averages.empty()) return;
  const int32_t device = averages[0].get_device_index();
  int previous = 0;
  STD_CUDA_CHECK(cudaGetDevice(&previous));
  if (previous != device) STD_CUDA_CHECK(cudaSetDevice(device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  Table table;
  table.weight = weight;
  int tensors = 0, chunks = 0;
  const auto launch = [&] {
    if (chunks == 0) return;
    average_kernel<<<chunks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    tensors = chunks = 0;
  };
  for (size_t i = 0; i < averages.size(); ++i) {
    const int64_t total = averages[i].numel();
    int64_t chunk = 0;
    while (chunk * kChunk < total) {
      if (tensors == kTensors || chunks == kChunks) launch();
      table.dst[tensors] = averages[i].data_ptr();
      table.src[tensors] = values[i].data_ptr();
      table.numel[tensors] = total;
      table.types[tensors] = static_cast<uint8_t>(static_cast<int>(storage_of(averages[i].scalar_type())) * 4 +
                                                  static_cast<int>(storage_of(values[i].scalar_type())));
      for (; chunk * kChunk < total && chunks < kChunks; ++chunk, ++chunks) {
        table.tensor_of[chunks] = static_cast<uint16_t>(tensors);
        table.chunk_of[chunks] = static_cast<uint32_t>(chunk);
      }
      ++tensors;
    }
  }
  launch();
  if (previous != device) STD_CUDA_CHECK(cudaSetDevice(previous));
}

}  // namespace clk
