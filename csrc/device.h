// What the kernels are written with: bfloat16, 16-byte loads, sums over a warp, and the order of kernels in a stream.
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

// The nearest T, ties to even.
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

// `value` as a tensor of T would hold it.
template <class T>
__device__ inline float rounded(float value) {
  return to_float(from_float<T>(value));
}

// 16 bytes: WIDTH<T> neighbouring numbers.
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

// 16 bytes that nobody reads again and no kernel writes: weights. They take no room in L1.
__device__ inline uint4 load_streaming(const void* address) {
#ifdef __CUDACC__
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address));
  return words;
#else
  return cuda_on_host::aligned<uint4>(address);
#endif
}

// 16 bytes that this kernel reads once and that an earlier kernel may have written. They take no room in L1 either.
__device__ inline uint4 load_once(const void* address) {
#ifdef __CUDACC__
  uint4 words;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address)
               : "memory");
  return words;
#else
  return cuda_on_host::aligned<uint4>(address);
#endif
}

// 16 bytes by way of L1.
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

// What another block of this launch wrote before its __threadfence(): from L2, as L1 may hold what was there before.
__device__ inline float load_shared_by_blocks(const float* address) {
#ifdef __CUDACC__
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
#else
  return *address;
#endif
}

__device__ inline unsigned load_shared_by_blocks(const unsigned* address) {
#ifdef __CUDACC__
  unsigned value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#else
  return *address;
#endif
}

__device__ inline unsigned long long load_shared_by_blocks(const unsigned long long* address) {
#ifdef __CUDACC__
  unsigned long long value;
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
#else
  return *address;
#endif
}

__device__ inline bfloat16 load_shared_by_blocks(const bfloat16* address) {
#ifdef __CUDACC__
  bfloat16 value;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(value.bits) : "l"(address) : "memory");
  return value;
#else
  return *address;
#endif
}

__device__ inline uint4 load_shared_by_blocks(const uint4* address) {
#ifdef __CUDACC__
  uint4 words;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address)
               : "memory");
  return words;
#else
  return cuda_on_host::aligned<uint4>(address);
#endif
}

// Over groups of `lanes` neighbouring lanes (a power of two); every lane gets the result. Each of the additions is
// between the same two numbers in whatever lane, so all lanes have the same bits.
template <class V>
__device__ inline V warp_sum(V value, int lanes = WARP) {
#pragma unroll
  for (int apart = WARP / 2; apart > 0; apart /= 2) {
    if (apart < lanes) value += __shfl_xor_sync(ALL_LANES, value, apart);
  }
  return value;
}

template <class V>
__device__ inline V warp_max(V value, int lanes = WARP) {
#pragma unroll
  for (int apart = WARP / 2; apart > 0; apart /= 2) {
    if (apart < lanes) {
      const V other = __shfl_xor_sync(ALL_LANES, value, apart);
      value = other > value ? other : value;
    }
  }
  return value;
}

// Programmatic dependent launch (sm_90 and newer; elsewhere nothing, and kernels run one after another).
//
// After this call everything that earlier kernels of the stream wrote is there. Before it a kernel may read weights,
// which no kernel writes while requests run, and must write nothing. Every block that touches more must call it.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_on_host::wait_for_previous_kernel();
#endif
}

// The next kernel may start, as far as its own wait, when all blocks have called this: at once is right, as it touches
// nothing of ours before we end.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Whether this block is the last of `blocks` to call; it sees what the others wrote before, through
// load_shared_by_blocks, and leaves the counter at 0 for the next launch. All threads of the block call, and get the
// same answer.
__device__ inline bool is_last_block(int* counter, int blocks) {
  __shared__ bool last;
  __threadfence();  // each thread's own writes, before the count
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == blocks - 1;
    if (last) *counter = 0;  // nobody counts again in this launch
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace bagel_rt
