// Checks that the kernels of this extension can run on the current GPU.
#include "decode.h"
#include "launch.h"

namespace bagel_rt {
namespace {

__global__ void empty_kernel() {}

}  // namespace

std::string cuda_error() {
#ifdef __CUDACC__
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&empty_kernel));
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return format_string("%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
#else
  launch(empty_kernel, 1, 1, 0, 0);
  return "";
#endif
}

}  // namespace bagel_rt
