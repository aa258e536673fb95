// Kernel launches: by the CUDA runtime on a GPU, or block by block on the host in the tests' emulation.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

// Declares the dynamic shared memory of a kernel as an array `name` of `type`, aligned to 16 bytes. Once per kernel.
#define DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#else
#include "cuda_on_host.h"
#endif

namespace bagel_rt {

// printf into a std::string of at most 511 characters.
[[gnu::format(printf, 1, 2)]] inline std::string format_string(const char* format, ...) {
  char buffer[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the error, or the next check would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Attributes of a kernel on the current device, queried once and cached.
class KernelInfo {
 public:
  bool supports_pdl = false;  // programmatic dependent launch: the kernel was compiled for sm_90 or newer

  static KernelInfo& of(const void* kernel, std::size_t shared_bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, KernelInfo> cache;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cannot query the current device");
    const std::lock_guard<std::mutex> lock(mutex);
    KernelInfo& info = cache[{kernel, device}];
    info.update(kernel, shared_bytes);
    return info;
  }

 private:
  bool initialized_ = false;
  std::size_t max_shared_bytes_ = 48 * 1024;  // dynamic shared memory available without opting in

  void update(const void* kernel, std::size_t shared_bytes) {
    if (!initialized_) {
      cudaFuncAttributes attributes;
      check_cuda(cudaFuncGetAttributes(&attributes, kernel), "no code for this GPU");
      supports_pdl = attributes.ptxVersion >= 90;  // of the code, not the GPU: sm_80 code has no griddepcontrol.wait
      max_shared_bytes_ -= std::min(max_shared_bytes_, attributes.sharedSizeBytes);
      initialized_ = true;
    }
    if (shared_bytes > max_shared_bytes_) {
      check_cuda(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          format_string("cannot reserve %zu bytes of shared memory per block", shared_bytes));
      max_shared_bytes_ = shared_bytes;
    }
  }
};

// Number of blocks of a kernel that are resident on the current GPU at once, at least 1: the grid of a persistent
// kernel. A larger grid would leave a partial last wave; a smaller one would leave multiprocessors idle.
template <class... Parameters>
unsigned resident_blocks(void (*kernel)(Parameters...), unsigned threads, std::size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned, std::size_t>, unsigned> cache;
  const void* const address = reinterpret_cast<const void*>(kernel);
  KernelInfo::of(address, shared_bytes);  // opts in to the shared memory, which occupancy depends on
  int device = 0, multiprocessors = 0, blocks = 0;
  check_cuda(cudaGetDevice(&device), "cannot query the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned& count = cache[{address, device, threads, shared_bytes}];
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "cannot query the number of multiprocessors");
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared_bytes),
               "cannot query occupancy");
    count = static_cast<unsigned>(std::max(1, blocks) * multiprocessors);
  }
  return count;
}

// Launch kernel(arguments...) on a stream, which is a cudaStream_t as an integer.
//
// On sm_90 and newer this is a programmatic dependent launch: blocks may start once all blocks of the previous kernel
// have called trigger_next_kernel() or exited, and must call wait_for_previous_kernel() before they touch memory that a
// kernel writes (device.h). Call inside with_context(), so that errors name the kernel.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, std::uintptr_t stream,
            Arguments&&... arguments) {
  cudaLaunchAttribute pdl{};
  pdl.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  pdl.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &pdl;
  config.numAttrs = KernelInfo::of(reinterpret_cast<const void*>(kernel), shared_bytes).supports_pdl ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch failed");
}

#else

// Small, so that persistent kernels loop over several tiles in the tests.
template <class... Parameters>
unsigned resident_blocks(void (*)(Parameters...), unsigned, std::size_t) {
  return 3;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, std::uintptr_t,
            Arguments&&... arguments) {
  cuda_on_host::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

#endif

// Call run() and prefix its errors with describe(), the kernel and its shapes:
//
//     with_context([&] { return format_string("decode_linear [%d, %d]", B, K); }, [&] { launch(kernel, grid, ...); });
template <class Describe, class Run>
void with_context(const Describe& describe, const Run& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(describe()) + ": " + error.what());
  }
}

}  // namespace bagel_rt
