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
constexpr int kTensors = 400;
constexpr int kChunks = 2560;  // the 2481 of ViT-B/16 are one launch

enum class Storage : uint8_t { f32, f64, bf16, f16 };

struct Table {
  void* dst[kTensors];
  const void* src[kTensors];
  const void* other[kTensors];  // null where two models are averaged
  int64_t numel[kTensors];
  uint64_t counter[kTensors];   // of the first element
  uint8_t types[kTensors];      // storage of dst * 4 + storage of src
  uint8_t other_type[kTensors];
  uint16_t tensor_of[kChunks];
  uint32_t chunk_of[kChunks];
  double weight, other_weight;
  uint64_t seed;
  bool stochastic;
};
static_assert(sizeof(Table) <= 32764, "the table must fit into the kernel parameters");

// One chunk: n elements from `start` of a tensor.
struct Chunk {
  const Table& table;
  int tensor;
  int64_t start;
  int n;
};

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

// The four words of a counter (Philox-4x32-10).
__device__ uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// The 16 bits of the element at `index` of its tensor.
__device__ __forceinline__ uint32_t random_bits(const uint4& words, int64_t index) {
  const int place = static_cast<int>(index % kElementsPerCounter);
  const uint32_t word = place < 4 ? (place < 2 ? words.x : words.y) : (place < 6 ? words.z : words.w);
  return place % 2 ? word >> 16 : word & 0xffffu;
}

// See stochastic.h.
__device__ __forceinline__ __nv_bfloat16 round_stochastically(float value, uint32_t random, __nv_bfloat16) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(value != value ? 0x7fc0u : (__float_as_uint(value) + random) >> 16));
}
__device__ __forceinline__ __half round_stochastically(float value, uint32_t random, __half) {
  const float magnitude = fabsf(value);
  const float normal = __uint_as_float((__float_as_uint(magnitude) + (random >> 3)) & 0xffffe000u);
  const float subnormal = truncf(fmaf(magnitude, 16777216.0f, static_cast<float>(random) * 1.52587890625e-5f)) * 5.9604644775390625e-8f;
  return __float2half_rn(value != value ? value : copysignf(magnitude < 6.103515625e-5f ? subnormal : normal, value));
}

// N elements from index i on; their address is a multiple of their size.
template <typename C, int N, typename T>
__device__ __forceinline__ void load_pack(C (&out)[N], const T* p, int i) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p + i);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = convert<C>(pack.v[j]);
}

template <typename C, int N>
__device__ __forceinline__ void load_any(C (&out)[N], Storage type, const void* p, int64_t i) {
  switch (type) {
    case Storage::f32: return load_pack<C, N>(out, static_cast<const float*>(p) + i, 0);
    case Storage::f64: return load_pack<C, N>(out, static_cast<const double*>(p) + i, 0);
    case Storage::bf16: return load_pack<C, N>(out, static_cast<const __nv_bfloat16*>(p) + i, 0);
    case Storage::f16: return load_pack<C, N>(out, static_cast<const __half*>(p) + i, 0);
  }
}

__device__ __forceinline__ int bytes_of(Storage type) { return type == Storage::f64 ? 8 : type == Storage::f32 ? 4 : 2; }

// N elements from element i of the chunk on. N is 1, or all of them lie in the eight of one counter.
template <int N, bool THREE, typename Dst, typename Src>
__device__ __forceinline__ void average_pack(const Chunk& chunk, Dst* dst, const Src* src, int i) {
  using C = typename Arithmetic<Dst>::type;
  const Table& table = chunk.table;
  const C w = static_cast<C>(table.weight), u = static_cast<C>(table.other_weight);
  C a[N], v[N], o[N];
  load_pack<C, N>(a, dst, i);
  load_pack<C, N>(v, src, i);
  if (THREE) load_any<C, N>(o, static_cast<Storage>(table.other_type[chunk.tensor]), table.other[chunk.tensor], chunk.start + i);
  Pack<Dst, N> stored;
  uint4 words = {};
  if (sizeof(Dst) == 2 && table.stochastic) {
    words = philox(table.seed, table.counter[chunk.tensor] + static_cast<uint64_t>((chunk.start + i) / kElementsPerCounter));
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    C result = a[j] + w * (v[j] - a[j]);
    if (THREE) result += u * (o[j] - a[j]);
    if constexpr (sizeof(Dst) == 2) {
      stored.v[j] = table.stochastic ? round_stochastically(result, random_bits(words, chunk.start + i + j), Dst{}) : convert<Dst>(result);
    } else {
      stored.v[j] = convert<Dst>(result);
    }
  }
  *reinterpret_cast<Pack<Dst, N>*>(dst + i) = stored;
}

template <bool THREE, typename Dst, typename Src>
__device__ void average(const Chunk& chunk, Dst* dst, const Src* src) {
  constexpr int wide = sizeof(Dst) > sizeof(Src) ? sizeof(Dst) : sizeof(Src);
  constexpr int N = 16 / wide;
  int done = 0;
  bool aligned = reinterpret_cast<uintptr_t>(dst) % (N * sizeof(Dst)) == 0 && reinterpret_cast<uintptr_t>(src) % (N * sizeof(Src)) == 0;
  if (THREE) {
    const int bytes = bytes_of(static_cast<Storage>(chunk.table.other_type[chunk.tensor]));
    aligned = aligned && (reinterpret_cast<uintptr_t>(chunk.table.other[chunk.tensor]) + chunk.start * bytes) % (N * bytes) == 0;
  }
  if (aligned) {
    const int packs = chunk.n / N;
    for (int i = threadIdx.x; i < packs; i += kThreads) average_pack<N, THREE>(chunk, dst, src, i * N);
    done = packs * N;
  }
  for (int i = done + threadIdx.x; i < chunk.n; i += kThreads) average_pack<1, THREE>(chunk, dst, src, i);
}

template <bool THREE, typename Dst>
__device__ void average_from(const Chunk& chunk) {
  Dst* dst = static_cast<Dst*>(chunk.table.dst[chunk.tensor]) + chunk.start;
  const void* src = chunk.table.src[chunk.tensor];
  switch (static_cast<Storage>(chunk.table.types[chunk.tensor] % 4)) {
    case Storage::f32: return average<THREE>(chunk, dst, static_cast<const float*>(src) + chunk.start);
    case Storage::f64: return average<THREE>(chunk, dst, static_cast<const double*>(src) + chunk.start);
    case Storage::bf16: return average<THREE>(chunk, dst, static_cast<const __nv_bfloat16*>(src) + chunk.start);
    case Storage::f16: return average<THREE>(chunk, dst, static_cast<const __half*>(src) + chunk.start);
  }
}

template <bool THREE>
__global__ void __launch_bounds__(kThreads) average_kernel(const __grid_constant__ Table table) {
  const int t = table.tensor_of[blockIdx.x];
  const int64_t start = static_cast<int64_t>(table.chunk_of[blockIdx.x]) * kChunk;
  const int64_t left = table.numel[t] - start;
  const Chunk chunk{table, t, start, static_cast<int>(left < kChunk ? left : kChunk)};
  switch (static_cast<Storage>(table.types[t] / 4)) {
    case Storage::f32: return average_from<THREE, float>(chunk);
    case Storage::f64: return average_from<THREE, double>(chunk);
    case Storage::bf16: return average_from<THREE, __nv_bfloat16>(chunk);
    case Storage::f16: return average_from<THREE, __half>(chunk);
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

void average_cuda(std::vector<Tensor> averages, std::vector<Tensor> values, double weight, std::vector<Tensor> others, double other_weight,
                  std::optional<int64_t> seed) {
  check_tensors(averages, values, others);
  if (averages.empty()) return;
  const int32_t device = averages[0].get_device_index();
  int previous = 0;
  STD_CUDA_CHECK(cudaGetDevice(&previous));
  if (previous != device) STD_CUDA_CHECK(cudaSetDevice(device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  Table table;
  table.weight = weight;
  table.other_weight = other_weight;
  table.seed = static_cast<uint64_t>(seed.value_or(0));
  table.stochastic = seed.has_value();
  uint64_t counter = 0;
  int tensors = 0, chunks = 0;
  const auto launch = [&] {
    if (chunks == 0) return;
    const auto kernel = others.empty() ? average_kernel<false> : average_kernel<true>;
    kernel<<<chunks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table);
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
      table.other[tensors] = others.empty() ? nullptr : others[i].data_ptr();
      table.other_type[tensors] = others.empty() ? 0 : static_cast<uint8_t>(storage_of(others[i].scalar_type()));
      table.numel[tensors] = total;
      table.counter[tensors] = counter;
      table.types[tensors] = static_cast<uint8_t>(static_cast<int>(storage_of(averages[i].scalar_type())) * 4 +
                                                  static_cast<int>(storage_of(values[i].scalar_type())));
      for (; chunk * kChunk < total && chunks < kChunks; ++chunk, ++chunks) {
        table.tensor_of[chunks] = static_cast<uint16_t>(tensors);
        table.chunk_of[chunks] = static_cast<uint32_t>(chunk);
      }
      ++tensors;
    }
    counter += static_cast<uint64_t>(counters_of(total));
  }
  launch();
  if (previous != device) STD_CUDA_CHECK(cudaSetDevice(previous));
}

}  // namespace clk
