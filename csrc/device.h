// Device primitives: bfloat16, 16-byte vectors, cache-hinted loads, warp reductions, programmatic dependent launch.
#pragma once

#include "launch.h"

namespace bagel_rt {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct bfloat16 {
  std::uint16_t bits;
};

__host__ __device__ inline float to_float(float value) { return value; }

__host__ __device__ inline float to_float(bfloat16 value) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
#else
  const std::uint32_t word = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &word, sizeof wide);
  return wide;
#endif
}

// Round to the nearest T, ties to even.
template <class T>
__host__ __device__ T from_float(float value);

template <>
__host__ __device__ inline float from_float<float>(float value) {
  return value;
}

template <>
__host__ __device__ inline bfloat16 from_float<bfloat16>(float value) {
  bfloat16 narrow;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
#else
  std::uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
  narrow.bits = nan ? std::uint16_t{0x7fff} : static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
#endif
  return narrow;
}

// Round to T and back, as if stored in a tensor of T.
template <class T>
__device__ inline float round_to(float value) {
  return to_float(from_float<T>(value));
}

// Number of elements of a 16-byte vector.
template <class T>
constexpr int WIDTH = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ inline void unpack(const uint4& words, float (&values)[WIDTH<T>]) {
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(word[i]);
    } else {
      values[2 * i] = __uint_as_float(word[i] << 16);
      values[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
}

template <class T>
__device__ inline uint4 pack(const float (&values)[WIDTH<T>]) {
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = __float_as_uint(values[i]);
    } else {
      word[i] = from_float<T>(values[2 * i]).bits | static_cast<unsigned>(from_float<T>(values[2 * i + 1]).bits) << 16;
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

#ifdef __CUDACC__
// Load 16 bytes with a PTX instruction; further arguments are its clobbers.
#define LOAD_16_BYTES(instruction, words, address, ...)                     \
  asm volatile(instruction ".v4.u32 {%0, %1, %2, %3}, [%4];"                \
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) \
               : "l"(address)                                               \
               : __VA_ARGS__)
#else
#define LOAD_16_BYTES(instruction, words, address, ...) words = cuda_on_host::aligned<uint4>(address)
#endif

// Load 16 bytes of read-only, streamed data (weights): non-coherent, not allocated in L1, 256-byte L2 prefetch.
__device__ inline uint4 load_streaming(const void* address) {
  uint4 words;
  LOAD_16_BYTES("ld.global.nc.L1::no_allocate.L2::256B", words, address);
  return words;
}

// Load 16 bytes that an earlier kernel may have written and this kernel reads once: coherent, not allocated in L1.
__device__ inline uint4 load_once(const void* address) {
  uint4 words;
  LOAD_16_BYTES("ld.global.L1::no_allocate", words, address, "memory");
  return words;
}

// Load 16 bytes through L1.
__device__ inline uint4 load_vector(const void* address) {
#ifdef __CUDACC__
  return *static_cast<const uint4*>(address);
#else
  return cuda_on_host::aligned<uint4>(address);
#endif
}

__device__ inline void store_vector(void* address, const uint4& words) {
#ifdef __CUDACC__
  *static_cast<uint4*>(address) = words;
#else
  cuda_on_host::aligned<uint4>(address) = words;
#endif
}

// Load data that another block of this launch wrote before its __threadfence(). Bypasses L1, which may hold stale data.
#ifdef __CUDACC__
#define LOAD_FROM_L2(type, suffix, constraint, reg)                                                \
  __device__ inline type load_from_l2(const type* address) {                                       \
    type value;                                                                                    \
    asm volatile("ld.global.cg." suffix " %0, [%1];" : constraint(reg) : "l"(address) : "memory"); \
    return value;                                                                                  \
  }
#else
#define LOAD_FROM_L2(type, suffix, constraint, reg) \
  __device__ inline type load_from_l2(const type* address) { return *address; }
#endif
LOAD_FROM_L2(float, "f32", "=f", value)
LOAD_FROM_L2(unsigned, "u32", "=r", value)
LOAD_FROM_L2(unsigned long long, "u64", "=l", value)
LOAD_FROM_L2(bfloat16, "u16", "=h", value.bits)

__device__ inline uint4 load_from_l2(const uint4* address) {
  uint4 words;
  LOAD_16_BYTES("ld.global.cg", words, address, "memory");
  return words;
}
#undef LOAD_16_BYTES
#undef LOAD_FROM_L2

// Sum over groups of `lanes` consecutive lanes (a power of two); every lane gets the result. The butterfly adds the
// same pair of values in both lanes of each exchange, so all lanes get the same bits.
template <class V>
__device__ inline V warp_sum(V value, int lanes = WARP) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    if (offset < lanes) value += __shfl_xor_sync(ALL_LANES, value, offset);
  }
  return value;
}

template <class V>
__device__ inline V warp_max(V value, int lanes = WARP) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    if (offset < lanes) {
      const V other = __shfl_xor_sync(ALL_LANES, value, offset);
      value = other > value ? other : value;
    }
  }
  return value;
}

// Programmatic dependent launch (PDL), on sm_90 and newer. Older GPUs run the kernels of a stream one after another,
// and both functions are no-ops. With PDL, the prologue of a kernel overlaps the tail of the previous one:
//
//     previous:  ... trigger_next_kernel() ........ last write | exit
//     this:                    starts, prefetches weights .... | wait_for_previous_kernel() returns, reads activations
//
// wait_for_previous_kernel() returns when all earlier kernels of the stream have completed and their writes are
// visible. Before it, a block may only read weights, which no kernel writes, and must not write. Every block that reads
// or writes anything else must call it.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_on_host::wait_for_previous_kernel();
#endif
}

// Allow the next kernel to start once all blocks have called this. Safe at the top of a kernel, since the next one
// waits for our completion before it touches our results.
__device__ inline void trigger_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Whether this block is the last of `blocks` to arrive at the counter. The last block sees the earlier writes of the
// others through load_from_l2, and resets the counter to 0 for the next launch, so no memset is needed. All threads of
// the block must call it and get the same result.
__device__ inline bool is_last_block(int* counter, int blocks) {
  __shared__ bool last;
  __threadfence();  // publish each thread's writes before the block is counted
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == blocks - 1;
    if (last) *counter = 0;  // all blocks have arrived, so no one increments it again
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace bagel_rt
