// Whether the kernels of this extension run on the current GPU.
#include "decode.h"
#include "launch.h"

namespace bagel_rt {
namespace {

__global__ void no_work() {}

}  // namespace

std::string cuda_error() {
#ifdef __CUDACC__
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&no_work));
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return text("%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
#else
  launch(no_work, 1, 1, 0, 0);
  return "";
#endif
}

}  // namespace bagel_rt
