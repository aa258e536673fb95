// Kernel launches: on a GPU by the CUDA runtime, in the tests of the kernels block by block on the host.
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

// The shared memory whose size the launch gives, as an array `name` of `type`. One a kernel, aligned to 16 bytes.
#define DYNAMIC_SHARED(type, name)                             \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#else
#include "cuda_on_host.h"
#endif

namespace bagel_rt {

// What printf would print.
[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
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
  cudaGetLastError();  // or the next check finds it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// What the runtime knows of a kernel on the current device, asked once.
class KernelFacts {
 public:
  bool overlaps = false;  // compiled for sm_90 or newer: it may start before the previous kernel ends, and then waits

  static KernelFacts& of(const void* kernel, std::size_t shared_bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, KernelFacts> known;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "no current device");
    const std::lock_guard<std::mutex> lock(mutex);
    KernelFacts& facts = known[{kernel, device}];
    facts.prepare(kernel, shared_bytes);
    return facts;
  }

 private:
  bool asked_ = false;
  std::size_t allowed_ = 48 * 1024;  // bytes of shared memory that need no leave

  void prepare(const void* kernel, std::size_t shared_bytes) {
    if (!asked_) {
      cudaFuncAttributes attributes;
      check_cuda(cudaFuncGetAttributes(&attributes, kernel), "no code for this GPU");
      overlaps = attributes.ptxVersion >= 90;  // not the GPU's: code of sm_80 has no instruction to wait with
      allowed_ -= std::min(allowed_, attributes.sharedSizeBytes);
      asked_ = true;
    }
    if (shared_bytes > allowed_) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 text("%zu bytes of shared memory a block", shared_bytes));
      allowed_ = shared_bytes;
    }
  }
};

// How many blocks of a kernel the current GPU runs side by side; at least 1.
template <class... Parameters>
unsigned resident_blocks(void (*kernel)(Parameters...), unsigned threads, std::size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned, std::size_t>, unsigned> known;
  const void* const address = reinterpret_cast<const void*>(kernel);
  KernelFacts::of(address, shared_bytes);  // allows the shared memory
  int device = 0, multiprocessors = 0, blocks = 0;
  check_cuda(cudaGetDevice(&device), "no current device");
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned& found = known[{address, device, threads, shared_bytes}];
  if (found == 0) {
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "no multiprocessors");
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared_bytes),
               "no occupancy");
    found = static_cast<unsigned>(std::max(1, blocks) * multiprocessors);
  }
  return found;
}

// Launch kernel(arguments...) on a stream, which is a cudaStream_t as an integer.
//
// On sm_90 and newer the launch is programmatically serialised: blocks may start when all blocks of the kernel before
// have called let_next_kernel_start() or ended, and must call wait_for_previous_kernel() before they touch anything
// that a kernel wrote (device.h). All that can go wrong goes wrong inside of named(), for the message.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, std::uintptr_t stream,
            Arguments&&... arguments) {
  cudaLaunchAttribute serialised{};
  serialised.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  serialised.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &serialised;
  config.numAttrs = KernelFacts::of(reinterpret_cast<const void*>(kernel), shared_bytes).overlaps ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "not launched");
}

#else

// Few, so that kernels which loop over their work do it in the tests.
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

// run(), whose errors then begin with what describe() says of the kernel and its shapes:
//
//     named([&] { return text("decode_linear [%d, %d]", B, K); }, [&] { launch(kernel, grid, block, ...); });
template <class Describe, class Run>
void named(const Describe& describe, const Run& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(describe()) + ": " + error.what());
  }
}

}  // namespace bagel_rt
