// Runs weight_average/cuda.cu on the processor, one thread of one block after another, as an operator of its own on the CPU key.
//
// The file that is included below is the kernel's own source in which the test has put `emulate(kernel, blocks, threads, table)`
// in the place of the launch. What CUDA gives to device code alone is here in plain C++, bit for bit as its manual defines it.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#undef __global__
#undef __device__
#undef __grid_constant__
#undef __launch_bounds__
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

struct Place {
  unsigned x;
} threadIdx, blockIdx;

template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To found;
  std::memcpy(&found, &value, sizeof(To));
  return found;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }
inline uint32_t __float_as_uint(float value) { return bits<uint32_t>(value); }
inline float __uint_as_float(uint32_t value) { return bits<float>(value); }

// Threads run from the last to the first: none may count on what another has done.
template <typename Kernel, typename... Arguments>
void emulate(Kernel kernel, int blocks, int threads, const Arguments&... arguments) {
  for (blockIdx.x = blocks; blockIdx.x-- > 0;) {
    for (threadIdx.x = threads; threadIdx.x-- > 0;) kernel(arguments...);
  }
}

}  // namespace

// The runtime's answers on a machine with one device.
extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // what CPU tensors say
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}

#include EMULATED_SOURCE

STABLE_TORCH_LIBRARY_IMPL(cl_kernels_emulated, CPU, m) { m.impl("average_", TORCH_BOX(&clk::average_cuda)); }
