// Emulation of CUDA kernels as ordinary C++, to test their arithmetic and indexing without a GPU.
//
// Each thread of a block is a fiber that runs until it reaches a barrier or a shuffle, and resumes when all
// participants have arrived. Blocks run one after another on one host thread. Undefined behavior on a GPU is an error
// here: a barrier that some threads never reach, a shuffle that a lane of its mask does not execute, a misaligned
// vector, too much shared memory. Dynamic shared memory starts as NaN in a heap allocation of its own, so
// -fsanitize=address detects reads past its end.
//
// `schedule` permutes the order of blocks and of threads between barriers; a correct kernel gives the same result.
// `pending_writes` emulates programmatic dependent launch: memory that the previous kernel is still writing. Until a
// block has called wait_for_previous_kernel(), those bytes are 0xff (NaN), and what the block writes there is lost.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_host::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned columns = 1, unsigned rows = 1, unsigned layers = 1) : x(columns), y(rows), z(layers) {}
};

struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK_BYTES = 256 * 1024;
constexpr std::size_t MAX_SHARED_BYTES = 232448;  // per block on sm_90

struct Span {
  void* begin;
  std::size_t bytes;
};

inline unsigned schedule = 0;  // 0: blocks and threads in order; otherwise a seed
inline std::vector<Span> pending_writes;

template <class V, class Address>
auto& aligned(Address* address) {
  using Element = std::conditional_t<std::is_const_v<Address>, const V, V>;
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(V) != 0) {
    throw std::runtime_error("misaligned vector: the address must be a multiple of its size");
  }
  return *reinterpret_cast<Element*>(address);
}

// A barrier or shuffle at which threads wait for one another and exchange one value each. The values are double
// buffered, since the first thread may reach the next one before the last thread has read the values of this one.
struct SyncPoint {
  unsigned mask = 0;  // of lanes; unused by the block's barrier
  unsigned expected = 0, arrived = 0, generation = 0;
  std::vector<std::uint64_t> values[2];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  bool done = false;
  const SyncPoint* sync_point = nullptr;  // that the fiber waits at,
  unsigned generation = 0;           // in this generation
  void* sanitizer = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  SyncPoint barrier;
  std::vector<std::vector<SyncPoint>> warps;  // per warp, one per shuffle mask
  std::unique_ptr<float[]> shared;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::function<void()> kernel;
  std::exception_ptr failure;
  void* sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  std::vector<std::vector<char>> hidden_bytes;  // true contents of `pending_writes`; empty after the wait
};

inline Block* block = nullptr;

inline void* dynamic_shared() { return block->shared.get(); }
inline unsigned linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline unsigned lane() { return linear_thread() % LANES; }

// Switch from the running fiber to the scheduler.
inline void yield_to_scheduler() {
  Fiber& fiber = *block->running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.sanitizer, block->scheduler_stack, block->scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.sanitizer, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
}

inline void resume(Fiber& fiber) {
  block->running = &fiber;
  const unsigned in_layer = fiber.thread % (blockDim.x * blockDim.y);
  threadIdx = dim3(in_layer % blockDim.x, in_layer / blockDim.x, fiber.thread / (blockDim.x * blockDim.y));
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->sanitizer, fiber.stack.get(), STACK_BYTES);
#endif
  swapcontext(&block->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->sanitizer, nullptr, nullptr);
#endif
}

// Entry point of a fiber: runs the kernel once per block.
inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  while (true) {
    try {
      block->kernel();
    } catch (...) {
      if (!block->failure) block->failure = std::current_exception();
    }
    block->running->done = true;
    yield_to_scheduler();
  }
}

// Deposit a value as participant `place`, wait until all have arrived, and return all values.
inline const std::vector<std::uint64_t>& arrive_and_wait(SyncPoint& sync_point, unsigned place, std::uint64_t value) {
  const unsigned generation = sync_point.generation;
  std::vector<std::uint64_t>& values = sync_point.values[generation % 2];
  values[place] = value;
  if (++sync_point.arrived == sync_point.expected) {
    sync_point.arrived = 0;
    ++sync_point.generation;
  } else {
    Fiber& fiber = *block->running;
    fiber.sync_point = &sync_point;
    fiber.generation = generation;
    yield_to_scheduler();
    fiber.sync_point = nullptr;
  }
  return values;
}

inline const std::vector<std::uint64_t>& sync_block(std::uint64_t value) {
  return arrive_and_wait(block->barrier, linear_thread(), value);
}

inline const std::vector<std::uint64_t>& sync_warp(unsigned mask, std::uint64_t value) {
  if ((mask >> lane() & 1u) == 0) throw std::runtime_error("a shuffle executed by a lane that is not in its mask");
  std::vector<SyncPoint>& sync_points = block->warps[linear_thread() / LANES];
  auto found = std::find_if(sync_points.begin(), sync_points.end(), [&](const SyncPoint& m) { return m.mask == mask; });
  if (found == sync_points.end()) {
    if (sync_points.size() == sync_points.capacity()) throw std::runtime_error("more than 16 shuffle masks in a warp");
    found = sync_points.emplace(sync_points.end());
    found->mask = mask;
    found->expected = static_cast<unsigned>(__builtin_popcount(mask));
    for (auto& values : found->values) values.resize(LANES);
  }
  return arrive_and_wait(*found, lane(), value);
}

// Run the threads of one block, each until it has to wait, until all are done.
inline void run_block(std::mt19937& random) {
  const std::size_t threads = block->fibers.size();
  block->barrier = SyncPoint{};
  block->barrier.expected = static_cast<unsigned>(threads);
  for (auto& values : block->barrier.values) values.resize(threads);
  block->warps.assign((threads + LANES - 1) / LANES, {});
  for (auto& sync_points : block->warps) sync_points.reserve(16);  // waiting fibers hold pointers to the elements
  std::vector<std::size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (schedule != 0) std::shuffle(order.begin(), order.end(), random);
  for (Fiber& fiber : block->fibers) fiber.done = false;
  for (std::size_t done_threads = 0; done_threads < threads;) {
    bool progressed = false;
    for (const std::size_t index : order) {
      Fiber& fiber = block->fibers[index];
      if (fiber.done || (fiber.sync_point && fiber.sync_point->generation == fiber.generation)) continue;
      resume(fiber);
      progressed = true;
      if (block->failure) return;
      done_threads += fiber.done;
    }
    if (!progressed) throw std::runtime_error("deadlock: threads wait at a barrier or shuffle that others never reach");
  }
}

inline void hide_pending_writes() {
  for (const Span& span : pending_writes) {
    const char* const begin = static_cast<const char*>(span.begin);
    block->hidden_bytes.emplace_back(begin, begin + span.bytes);
    std::memset(span.begin, 0xff, span.bytes);
  }
}

inline void wait_for_previous_kernel() {
  for (std::size_t i = block->hidden_bytes.size(); i-- > 0;) {  // in reverse: spans may overlap
    std::memcpy(pending_writes[i].begin, block->hidden_bytes[i].data(), pending_writes[i].bytes);
  }
  block->hidden_bytes.clear();
}

// Run kernel() in every thread of every block.
inline void run(dim3 grid, dim3 threads, std::size_t shared_bytes, std::function<void()> kernel) {
  const std::size_t count = std::size_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("invalid grid or block size");
  }
  if (shared_bytes > MAX_SHARED_BYTES) throw std::runtime_error("too much shared memory");
  if (block != nullptr) throw std::runtime_error("nested launch");
  Block running;
  running.kernel = std::move(kernel);
  running.fibers = std::vector<Fiber>(count);
  struct Cleanup {
    ~Cleanup() {
      wait_for_previous_kernel();
      block = nullptr;
    }
  } cleanup;
  block = &running;
  gridDim = grid;
  blockDim = threads;
  for (unsigned thread = 0; thread < count; ++thread) {
    Fiber& fiber = running.fibers[thread];
    fiber.thread = thread;
    fiber.stack.reset(new char[STACK_BYTES]);  // uninitialized, so pages are committed on use
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
  std::vector<std::size_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(schedule);
  if (schedule != 0) std::shuffle(order.begin(), order.end(), random);
  const std::size_t words = (shared_bytes + 3) / 4;
  for (const std::size_t index : order) {
    blockIdx = dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y));
    running.shared.reset(new float[words]);
    std::fill_n(running.shared.get(), words, NAN);
    hide_pending_writes();
    run_block(random);
    if (running.failure) std::rethrow_exception(running.failure);
    if (!running.hidden_bytes.empty()) throw std::runtime_error("a block did not call wait_for_previous_kernel()");
  }
}

template <class V>
std::uint64_t as_word(V value) {
  static_assert(sizeof(V) <= 8 && std::is_trivially_copyable_v<V>);
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class V>
V shuffled(unsigned mask, V value, unsigned source) {
  const std::uint64_t word = sync_warp(mask, as_word(value))[source];
  if ((mask >> source & 1u) == 0) throw std::runtime_error("a shuffle from a lane that is not in its mask");
  V result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::sync_block(0); }

inline int __syncthreads_count(int predicate) {
  const auto& values = cuda_on_host::sync_block(predicate != 0);
  return static_cast<int>(std::count(values.begin(), values.end(), 1u));
}
inline void __threadfence() {}

template <class V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32) {
  const unsigned size = static_cast<unsigned>(width), lane = cuda_on_host::lane();
  return cuda_on_host::shuffled(mask, value, lane / size * size + static_cast<unsigned>(source) % size);
}

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lane_mask, int width = 32) {
  const unsigned size = static_cast<unsigned>(width), lane = cuda_on_host::lane();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  return cuda_on_host::shuffled(mask, value, source < lane / size * size + size ? source : lane);
}

template <class V, class W>
V atomicAdd(V* address, W value) {
  const V before = *address;
  *address = static_cast<V>(before + static_cast<V>(value));
  return before;
}
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(cuda_on_host::as_word(value)); }
inline float __uint_as_float(unsigned word) {
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
using std::max;
using std::min;
