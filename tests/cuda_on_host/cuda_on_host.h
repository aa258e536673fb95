// CUDA kernels as ordinary C++, to prove their arithmetic and their indices where there is no GPU.
//
// Each thread of a block is a fiber. A fiber runs until it needs the others, at a barrier or a shuffle, and goes on
// when all whom it waits for are there. Blocks run one after another, on one thread of the host. What a GPU would leave
// undefined is an error here: a barrier that some threads never reach, a shuffle that a lane of the mask does not
// execute, a vector that is not aligned, more shared memory than a block may have. Dynamic shared memory begins as NaN
// and is a piece of heap of its own, so that -fsanitize=address finds what is read past its end.
//
// `schedule` changes the order of the blocks and of the threads between barriers, which a right kernel does not notice.
// `unfinished` is what the kernel before would still be writing: until a block has waited for that kernel the bytes are
// 0xff, not a number, and what the block writes there is lost.
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
constexpr std::size_t MAX_SHARED_BYTES = 232448;  // a block's on sm_90

struct Span {
  void* begin;
  std::size_t bytes;
};

inline unsigned schedule = 0;  // 0: blocks and threads in order; otherwise the seed of another order
inline std::vector<Span> unfinished;

template <class V, class Address>
auto& aligned(Address* address) {
  using Element = std::conditional_t<std::is_const_v<Address>, const V, V>;
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(V) != 0) {
    throw std::runtime_error("a vector at an address that is not a multiple of its size");
  }
  return *reinterpret_cast<Element*>(address);
}

// Where threads wait for one another, and leave a value each for the others to read. There are two sets of values, as
// the first thread may be at the next meeting before the last one has read what was left at this one.
struct Meeting {
  unsigned mask = 0;  // of lanes; not of a block's
  unsigned expected = 0, arrived = 0, generation = 0;
  std::vector<std::uint64_t> values[2];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  bool done = false;
  const Meeting* meeting = nullptr;  // that it waits at,
  unsigned generation = 0;           // until this one is over
  void* sanitizer = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  Meeting barrier;
  std::vector<std::vector<Meeting>> warps;  // of each warp, one for every mask it uses
  std::unique_ptr<float[]> shared;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::function<void()> kernel;
  std::exception_ptr failure;
  void* sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  std::vector<std::vector<char>> finished;  // what `unfinished` will hold; empty when the block has waited
};

inline Block* block = nullptr;

inline void* dynamic_shared() { return block->shared.get(); }
inline unsigned linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline unsigned lane() { return linear_thread() % LANES; }

// From the running fiber back to the scheduler; for good if it has ended.
inline void leave() {
  Fiber& fiber = *block->running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.sanitizer, block->scheduler_stack, block->scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.sanitizer, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
}

inline void enter(Fiber& fiber) {
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

// What a fiber runs: the kernel, once for every block.
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
    leave();
  }
}

// Leave a value at the meeting, as participant `place`; returns everybody's when all are there.
inline const std::vector<std::uint64_t>& meet(Meeting& meeting, unsigned place, std::uint64_t value) {
  const unsigned generation = meeting.generation;
  std::vector<std::uint64_t>& values = meeting.values[generation % 2];
  values[place] = value;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    Fiber& fiber = *block->running;
    fiber.meeting = &meeting;
    fiber.generation = generation;
    leave();
    fiber.meeting = nullptr;
  }
  return values;
}

inline const std::vector<std::uint64_t>& meet_block(std::uint64_t value) {
  return meet(block->barrier, linear_thread(), value);
}

inline const std::vector<std::uint64_t>& meet_warp(unsigned mask, std::uint64_t value) {
  if ((mask >> lane() & 1u) == 0) throw std::runtime_error("a lane that is not in the mask of its shuffle");
  std::vector<Meeting>& meetings = block->warps[linear_thread() / LANES];
  auto found = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (found == meetings.end()) {
    if (meetings.size() == meetings.capacity()) throw std::runtime_error("more masks in a warp than are foreseen");
    found = meetings.emplace(meetings.end());
    found->mask = mask;
    found->expected = static_cast<unsigned>(__builtin_popcount(mask));
    for (auto& values : found->values) values.resize(LANES);
  }
  return meet(*found, lane(), value);
}

// All threads of one block, each as far as it gets, until all have ended.
inline void run_block(std::mt19937& random) {
  const std::size_t threads = block->fibers.size();
  block->barrier = Meeting{};
  block->barrier.expected = static_cast<unsigned>(threads);
  for (auto& values : block->barrier.values) values.resize(threads);
  block->warps.assign((threads + LANES - 1) / LANES, {});
  for (auto& meetings : block->warps) meetings.reserve(16);  // waiting fibers point to them
  std::vector<std::size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (schedule != 0) std::shuffle(order.begin(), order.end(), random);
  for (Fiber& fiber : block->fibers) fiber.done = false;
  for (std::size_t ended = 0; ended < threads;) {
    bool moved = false;
    for (const std::size_t index : order) {
      Fiber& fiber = block->fibers[index];
      if (fiber.done || (fiber.meeting && fiber.meeting->generation == fiber.generation)) continue;
      enter(fiber);
      moved = true;
      if (block->failure) return;
      ended += fiber.done;
    }
    if (!moved) throw std::runtime_error("threads wait at a barrier or a shuffle that others have not reached");
  }
}

inline void hide_unfinished() {
  for (const Span& span : unfinished) {
    const char* const begin = static_cast<const char*>(span.begin);
    block->finished.emplace_back(begin, begin + span.bytes);
    std::memset(span.begin, 0xff, span.bytes);
  }
}

inline void wait_for_previous_kernel() {
  for (std::size_t i = block->finished.size(); i-- > 0;) {  // backwards, as spans may overlap
    std::memcpy(unfinished[i].begin, block->finished[i].data(), unfinished[i].bytes);
  }
  block->finished.clear();
}

// kernel() by every thread of every block.
inline void run(dim3 grid, dim3 threads, std::size_t shared_bytes, std::function<void()> kernel) {
  const std::size_t count = std::size_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("a grid or block of no, or of too many, threads");
  }
  if (shared_bytes > MAX_SHARED_BYTES) throw std::runtime_error("too much shared memory");
  if (block != nullptr) throw std::runtime_error("two launches at once");
  Block running;
  running.kernel = std::move(kernel);
  running.fibers = std::vector<Fiber>(count);
  struct Cleared {
    ~Cleared() {
      wait_for_previous_kernel();
      block = nullptr;
    }
  } cleared;
  block = &running;
  gridDim = grid;
  blockDim = threads;
  for (unsigned thread = 0; thread < count; ++thread) {
    Fiber& fiber = running.fibers[thread];
    fiber.thread = thread;
    fiber.stack.reset(new char[STACK_BYTES]);  // not touched, so not there until it is used
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
    hide_unfinished();
    run_block(random);
    if (running.failure) std::rethrow_exception(running.failure);
    if (!running.finished.empty()) throw std::runtime_error("a block that did not wait for the kernel before");
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
  const std::uint64_t word = meet_warp(mask, as_word(value))[source];
  if ((mask >> source & 1u) == 0) throw std::runtime_error("a shuffle from a lane that is not in its mask");
  V result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::meet_block(0); }

inline int __syncthreads_count(int predicate) {
  const auto& values = cuda_on_host::meet_block(predicate != 0);
  return static_cast<int>(std::count(values.begin(), values.end(), 1u));
}
inline void __threadfence() {}

template <class V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32) {
  const unsigned size = static_cast<unsigned>(width), lane = cuda_on_host::lane();
  return cuda_on_host::shuffled(mask, value, lane / size * size + static_cast<unsigned>(source) % size);
}

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int apart, int width = 32) {
  const unsigned size = static_cast<unsigned>(width), lane = cuda_on_host::lane();
  const unsigned source = lane ^ static_cast<unsigned>(apart);
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
