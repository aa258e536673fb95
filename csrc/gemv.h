// The product of a few rows with a large matrix, y [B, N] = x [B, K] w^T, for decode_linear.cu and decode_qkv.cu.
//
// All the time goes into streaming w from memory, so everything serves to keep loads of w in flight. A warp makes two
// neighbouring rows of w at a time (a gate and its up, with SwiGLU) over all of K: each lane takes every 32nd 16-byte
// chunk of both rows, and holds DEPTH chunks of each that it asked for ahead, across the end of the rows into the next
// two it will make. The first of them are asked for before the previous kernel has ended, as they depend on nothing.
//
// Sums are float32, in an order that depends on K and the type alone: lane by lane in order of k, then across lanes. So
// a row of a batch gets the bits it would get alone.
#pragma once

#include <type_traits>

#include "decode.h"
#include "device.h"

namespace bagel_rt {

constexpr int WARPS = 8;        // of a block
constexpr int ROWS = 2;         // of w, side by side in a warp
constexpr int BLOCK_ROWS = WARPS * ROWS;
constexpr int DEPTH = 4;        // chunks of each row in flight: with two rows, 128 bytes a lane, 32 KB a block

// Device's view of a GemvArgs.
template <class T>
struct Matrices {
  const T* x;
  const T* norm;  // null: x is multiplied as it is
  const T* w;
  std::int64_t x_stride, w_stride;
  int B, K, N;
  float eps;
};

// Bytes of shared memory a block needs: normalised x, for up to MAX_ROWS rows of it.
template <class T, int MAX_ROWS>
std::size_t shared_bytes(const GemvArgs& args) {
  return args.norm == 0 ? 0 : sizeof(T) * MAX_ROWS * static_cast<std::size_t>(args.K);
}

// The norm's weight into `normed`, where each thread finds its chunks again: it comes from memory while we wait.
template <class T>
__device__ void fetch_norm(const Matrices<T>& given, T* normed) {
#pragma unroll 2
  for (int at = static_cast<int>(threadIdx.x) * WIDTH<T>; at < given.K; at += WARPS * WARP * WIDTH<T>) {
    store_vector(normed + at, load_vector(given.norm + at));
  }
}

// rms_norm(x), rounded as kernels/norm.py rounds, into `normed` [MAX_ROWS, K]; rows past B repeat the last. Every
// thread of the block takes part. The sum of squares of a row is the same whatever B is.
template <class T, int MAX_ROWS>
__device__ void normalise(const Matrices<T>& given, T* normed) {
  __shared__ float squares[MAX_ROWS][WARPS], scales[MAX_ROWS];
  const int thread = static_cast<int>(threadIdx.x), stride = WARPS * WARP * WIDTH<T>;
#pragma unroll
  for (int b = 0; b < MAX_ROWS; ++b) {
    const T* const row = given.x + min(b, given.B - 1) * given.x_stride;
    float sum = 0;
#pragma unroll 2
    for (int at = thread * WIDTH<T>; at < given.K; at += stride) {
      float x[WIDTH<T>];
      unpack<T>(load_vector(row + at), x);
#pragma unroll
      for (int i = 0; i < WIDTH<T>; ++i) sum = fmaf(x[i], x[i], sum);
    }
    sum = warp_sum(sum);
    if (thread % WARP == 0) squares[b][thread / WARP] = sum;
  }
  __syncthreads();
  if (thread < MAX_ROWS) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += squares[thread][warp];
    scales[thread] = rsqrtf(sum / static_cast<float>(given.K) + given.eps);
  }
  __syncthreads();
#pragma unroll 1
  for (int at = thread * WIDTH<T>; at < given.K; at += stride) {
    float weight[WIDTH<T>];
    unpack<T>(load_vector(normed + at), weight);
#pragma unroll 4
    for (int b = 0; b < MAX_ROWS; ++b) {
      float x[WIDTH<T>];
      unpack<T>(load_vector(given.x + min(b, given.B - 1) * given.x_stride + at), x);
#pragma unroll
      for (int i = 0; i < WIDTH<T>; ++i) x[i] = rounded<T>(x[i] * scales[b]) * weight[i];
      store_vector(normed + b * given.K + at, pack<T>(x));
    }
  }
  __syncthreads();
}

// The chunks of two rows of w that a lane has asked for and not yet used.
template <class T>
struct Stream {
  uint4 held[DEPTH][ROWS];

  // Ask for chunk `chunk` of row `row`, which `address` is the beginning of, and of the next; of the last row, twice.
  __device__ void ask(const Matrices<T>& given, int slot, const T* address, int row, int chunk, int chunks) {
    if (row >= given.N || chunk >= chunks) return;
    address += chunk * WIDTH<T>;
    held[slot][0] = load_streaming(address);
    held[slot][1] = load_streaming(row + 1 < given.N ? address + given.w_stride : address);
  }
};

// Lane ROWS * b + r stores the product of row r of the pair with row b of x.
template <int MAX_ROWS>
__device__ float own_sum(const float (&sums)[ROWS][MAX_ROWS]) {
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  float own = 0;
#pragma unroll
  for (int b = 0; b < MAX_ROWS; ++b) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) own = lane == ROWS * b + r ? sums[r][b] : own;
  }
  return own;
}

// Call finish(row, sums, addend(row)) for every pair of rows of w that is this warp's: sums[r][b] is the product of row
// `row` + r with row b of x, the same in all lanes. What is to be added is asked for first and used last. All warps of
// a block call it equally often; for some, in the last round, row >= N.
template <class T, int MAX_ROWS, bool NORM, class Addend, class Finish>
__device__ void multiply(const Matrices<T>& given, const Addend& addend, const Finish& finish) {
  DYNAMIC_SHARED(T, normed);
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  const int chunks = given.K / WIDTH<T>;
  const int stride = static_cast<int>(gridDim.x) * BLOCK_ROWS;
  int first = static_cast<int>(blockIdx.x) * BLOCK_ROWS;  // of this round of the block
  int row = first + static_cast<int>(threadIdx.x) / WARP * ROWS;
  const T* w = given.w + row * given.w_stride;

  let_next_kernel_start();
  Stream<T> stream;
#pragma unroll
  for (int slot = 0; slot < DEPTH; ++slot) stream.ask(given, slot, w, row, lane + slot * WARP, chunks);
  if constexpr (NORM) fetch_norm(given, normed);
  wait_for_previous_kernel();
  if constexpr (NORM) normalise<T, MAX_ROWS>(given, normed);

  for (; first < given.N; first += stride, row += stride) {
    const T* const next_w = w + stride * given.w_stride;
    const float added = addend(row);
    float sums[ROWS][MAX_ROWS] = {};
    for (int start = 0; start < chunks; start += DEPTH * WARP) {
      const bool last = start + DEPTH * WARP >= chunks;  // then ask for the beginning of the next two rows
#pragma unroll
      for (int slot = 0; slot < DEPTH; ++slot) {
        const int within = lane + slot * WARP, chunk = start + within;
        if (row < given.N && chunk < chunks) {
          float a[ROWS][WIDTH<T>];
#pragma unroll
          for (int r = 0; r < ROWS; ++r) unpack<T>(stream.held[slot][r], a[r]);
#pragma unroll
          for (int b = 0; b < MAX_ROWS; ++b) {
            const T* const x = NORM ? normed + b * given.K : given.x + min(b, given.B - 1) * given.x_stride;
            float values[WIDTH<T>];
            unpack<T>(load_vector(x + chunk * WIDTH<T>), values);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
              for (int i = 0; i < WIDTH<T>; ++i) sums[r][b] = fmaf(a[r][i], values[i], sums[r][b]);
            }
          }
        }
        stream.ask(given, slot, last ? next_w : w, last ? row + stride : row,
                   last ? within : chunk + DEPTH * WARP, chunks);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int b = 0; b < MAX_ROWS; ++b) sums[r][b] = warp_sum(sums[r][b]);
    }
    finish(row, sums, added);
    w = next_w;
  }
}

template <class T>
Matrices<T> matrices(const GemvArgs& args) {
  return {reinterpret_cast<const T*>(args.x), reinterpret_cast<const T*>(args.norm),
          reinterpret_cast<const T*>(args.w), args.x_stride, args.w_stride,
          args.B, args.K, args.N, args.eps};
}

template <int MAX_ROWS>
using Rows = std::integral_constant<int, MAX_ROWS>;

// start(T{}, Rows<MAX_ROWS>{}, NORM) for the dtype, the number of rows rounded up, and whether it has a norm.
// float32 is for small models and for comparison: fewer kernels, not the fastest.
template <class Start>
void dispatch(const GemvArgs& args, const Start& start) {
  const auto with_norm = [&](auto type, auto rows) {
    if (args.norm != 0) return start(type, rows, std::true_type{});
    start(type, rows, std::false_type{});
  };
  if (args.B > 8) throw std::runtime_error(text("%d rows; the kernel takes at most 8", args.B));
  if (!args.is_bfloat16) return args.B == 1 ? with_norm(float{}, Rows<1>{}) : with_norm(float{}, Rows<8>{});
  if (args.B == 1) return with_norm(bfloat16{}, Rows<1>{});
  if (args.B == 2) return with_norm(bfloat16{}, Rows<2>{});
  if (args.B <= 4) return with_norm(bfloat16{}, Rows<4>{});
  with_norm(bfloat16{}, Rows<8>{});
}

}  // namespace bagel_rt
