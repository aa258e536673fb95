// Batched GEMV for a few rows: y [B, N] = x [B, K] w^T, used by decode_linear.cu and decode_qkv.cu.
//
// The time is spent streaming w from memory, so the design keeps loads of w in flight. The grid is persistent. A warp
// computes two consecutive rows of w at a time (a gate and its up, with SwiGLU) over all of K. Each lane reads every
// 32nd 16-byte chunk of both rows and keeps PREFETCH_DEPTH chunks of each row in registers ahead of their use.
// Prefetching continues past the end of the two rows into the warp's next two. The first chunks are requested before
// the previous kernel has completed, since weights do not depend on it.
//
// Sums are float32 in an order that depends only on K and the dtype: per lane in order of k, then across lanes. A row
// of a batch is therefore bitwise equal to the same row alone.
#pragma once

#include <type_traits>

#include "decode.h"
#include "device.h"

namespace bagel_rt {

constexpr int WARPS = 8;  // per block
constexpr int THREADS = WARPS * WARP;
constexpr int WARP_ROWS = 2;  // rows of w that a warp computes together
constexpr int BLOCK_ROWS = WARPS * WARP_ROWS;
constexpr int PREFETCH_DEPTH = 4;  // chunks of each row in flight: with two rows, 128 bytes per lane, 32 KB per block

// GemvArgs with typed pointers.
template <class T>
struct GemvOperands {
  const T* x;
  const T* norm;  // null: no norm
  const T* w;
  std::int64_t x_stride, w_stride;
  int B, K, N;
  float eps;
};

// Bytes of dynamic shared memory per block: up to MAX_ROWS normalized rows of x.
template <class T, int MAX_ROWS>
std::size_t shared_bytes(const GemvArgs& args) {
  return args.norm == 0 ? 0 : sizeof(T) * MAX_ROWS * static_cast<std::size_t>(args.K);
}

// Stage the norm's weight in row 0 of `normed` while the previous kernel finishes. normalize() reads each chunk in the
// thread that wrote it, so no barrier is needed, and overwrites it with row 0 of the result.
template <class T>
__device__ void load_norm_weight(const GemvOperands<T>& gemv, T* normed) {
#pragma unroll 2
  for (int at = static_cast<int>(threadIdx.x) * WIDTH<T>; at < gemv.K; at += THREADS * WIDTH<T>) {
    store_vector(normed + at, load_vector(gemv.norm + at));
  }
}

// Write rms_norm(x), rounded as in kernels/norm.py, to `normed` [MAX_ROWS, K]; rows from B on repeat the last one. All
// threads of the block must call it. The sum of squares of a row does not depend on B.
template <class T, int MAX_ROWS>
__device__ void normalize(const GemvOperands<T>& gemv, T* normed) {
  __shared__ float squares[MAX_ROWS][WARPS], scales[MAX_ROWS];
  const int thread = static_cast<int>(threadIdx.x), stride = THREADS * WIDTH<T>;
#pragma unroll
  for (int b = 0; b < MAX_ROWS; ++b) {
    const T* const row = gemv.x + min(b, gemv.B - 1) * gemv.x_stride;
    float sum = 0;
#pragma unroll 2
    for (int at = thread * WIDTH<T>; at < gemv.K; at += stride) {
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
    scales[thread] = rsqrtf(sum / static_cast<float>(gemv.K) + gemv.eps);
  }
  __syncthreads();
#pragma unroll 1
  for (int at = thread * WIDTH<T>; at < gemv.K; at += stride) {
    float weight[WIDTH<T>];
    unpack<T>(load_vector(normed + at), weight);
#pragma unroll 4
    for (int b = 0; b < MAX_ROWS; ++b) {
      float x[WIDTH<T>];
      unpack<T>(load_vector(gemv.x + min(b, gemv.B - 1) * gemv.x_stride + at), x);
#pragma unroll
      for (int i = 0; i < WIDTH<T>; ++i) x[i] = round_to<T>(x[i] * scales[b]) * weight[i];
      store_vector(normed + b * gemv.K + at, pack<T>(x));
    }
  }
  __syncthreads();
}

// A lane's register queue of prefetched chunks of two rows of w.
template <class T>
struct WeightPrefetch {
  uint4 chunks_[PREFETCH_DEPTH][WARP_ROWS];

  // Prefetch chunk `chunk` of row `row`, which starts at `address`, and of the next row. The last of an odd number of
  // rows is loaded twice, which avoids a branch; its second product is not stored.
  __device__ void prefetch(const GemvOperands<T>& gemv, int slot, const T* address, int row, int chunk, int chunks) {
    if (row >= gemv.N || chunk >= chunks) return;
    address += chunk * WIDTH<T>;
    chunks_[slot][0] = load_streaming(address);
    chunks_[slot][1] = load_streaming(row + 1 < gemv.N ? address + gemv.w_stride : address);
  }
};

// The sum that this lane stores: lane WARP_ROWS * b + r gets the product of row r of the pair with row b of x.
template <int MAX_ROWS>
__device__ float select_own_sum(const float (&sums)[WARP_ROWS][MAX_ROWS]) {
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  float own = 0;
#pragma unroll
  for (int b = 0; b < MAX_ROWS; ++b) {
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) own = lane == WARP_ROWS * b + r ? sums[r][b] : own;
  }
  return own;
}

// Call finish(row, sums, addend(row)) for every pair of rows of w of this warp. sums[r][b] is the product of row `row`
// + r with row b of x, equal in all lanes. addend(row) loads the bias or residual early, to hide its latency behind the
// product. All warps of a block call finish equally often, so it may contain barriers; in the last round row may be >=
// N.
template <class T, int MAX_ROWS, bool NORM, class Addend, class Finish>
__device__ void run_gemv(const GemvOperands<T>& gemv, const Addend& addend, const Finish& finish) {
  DYNAMIC_SHARED(T, normed);
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  const int chunks = gemv.K / WIDTH<T>;
  const int stride = static_cast<int>(gridDim.x) * BLOCK_ROWS;
  int first = static_cast<int>(blockIdx.x) * BLOCK_ROWS;  // first row of the block in this round
  int row = first + static_cast<int>(threadIdx.x) / WARP * WARP_ROWS;
  const T* w = gemv.w + row * gemv.w_stride;

  trigger_next_kernel();
  WeightPrefetch<T> weights;
#pragma unroll
  for (int slot = 0; slot < PREFETCH_DEPTH; ++slot) weights.prefetch(gemv, slot, w, row, lane + slot * WARP, chunks);
  if constexpr (NORM) load_norm_weight(gemv, normed);
  wait_for_previous_kernel();
  if constexpr (NORM) normalize<T, MAX_ROWS>(gemv, normed);

  for (; first < gemv.N; first += stride, row += stride) {
    const T* const next_w = w + stride * gemv.w_stride;
    const float added = addend(row);
    float sums[WARP_ROWS][MAX_ROWS] = {};
    for (int start = 0; start < chunks; start += PREFETCH_DEPTH * WARP) {
      const bool last = start + PREFETCH_DEPTH * WARP >= chunks;  // then prefetch the next two rows
#pragma unroll
      for (int slot = 0; slot < PREFETCH_DEPTH; ++slot) {
        const int within = lane + slot * WARP, chunk = start + within;
        if (row < gemv.N && chunk < chunks) {
          float a[WARP_ROWS][WIDTH<T>];
#pragma unroll
          for (int r = 0; r < WARP_ROWS; ++r) unpack<T>(weights.chunks_[slot][r], a[r]);
#pragma unroll
          for (int b = 0; b < MAX_ROWS; ++b) {
            const T* const x = NORM ? normed + b * gemv.K : gemv.x + min(b, gemv.B - 1) * gemv.x_stride;
            float values[WIDTH<T>];
            unpack<T>(load_vector(x + chunk * WIDTH<T>), values);
#pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r) {
#pragma unroll
              for (int i = 0; i < WIDTH<T>; ++i) sums[r][b] = fmaf(a[r][i], values[i], sums[r][b]);
            }
          }
        }
        weights.prefetch(gemv, slot, last ? next_w : w, last ? row + stride : row,
                         last ? within : chunk + PREFETCH_DEPTH * WARP, chunks);
      }
    }
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) {
#pragma unroll
      for (int b = 0; b < MAX_ROWS; ++b) sums[r][b] = warp_sum(sums[r][b]);
    }
    finish(row, sums, added);
    w = next_w;
  }
}

template <class T>
GemvOperands<T> gemv_operands(const GemvArgs& args) {
  return {reinterpret_cast<const T*>(args.x),
          reinterpret_cast<const T*>(args.norm),
          reinterpret_cast<const T*>(args.w),
          args.x_stride,
          args.w_stride,
          args.B,
          args.K,
          args.N,
          args.eps};
}

template <int MAX_ROWS>
using MaxRows = std::integral_constant<int, MAX_ROWS>;

// Call start(T{}, MaxRows<MAX_ROWS>{}, NORM) for the dtype, the number of rows rounded up, and whether there is a norm.
// float32 serves small models and comparisons, so it has fewer instantiations.
template <class Start>
void dispatch(const GemvArgs& args, const Start& start) {
  const auto with_norm = [&](auto type, auto rows) {
    if (args.norm != 0) return start(type, rows, std::true_type{});
    start(type, rows, std::false_type{});
  };
  if (args.B > 8) throw std::runtime_error(format_string("rows must be at most 8, got %d", args.B));
  if (!args.is_bfloat16) return args.B == 1 ? with_norm(float{}, MaxRows<1>{}) : with_norm(float{}, MaxRows<8>{});
  if (args.B == 1) return with_norm(bfloat16{}, MaxRows<1>{});
  if (args.B == 2) return with_norm(bfloat16{}, MaxRows<2>{});
  if (args.B <= 4) return with_norm(bfloat16{}, MaxRows<4>{});
  with_norm(bfloat16{}, MaxRows<8>{});
}

}  // namespace bagel_rt
