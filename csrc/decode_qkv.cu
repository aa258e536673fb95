// RMSNorm, QKV projection, QK-norm, RoPE and cache write. Reference: kernels/decode_qkv.py.
//
// A block computes 16 channels of one head. QK-norm needs the whole head, so the blocks of a query or key head write
// their channels to the workspace, and the last of them to finish normalizes and rotates the head, one warp per row of
// the batch. Values need no such step and are written to the cache directly.
#include "gemv.h"

namespace bagel_rt {
namespace {

constexpr int PAIRS = 2;  // channel pairs (i, i + D / 2) per lane, which RoPE rotates together
constexpr int MAX_CHANNELS = 2 * PAIRS * WARP;

template <class T>
struct QkvOperands {
  int Hq, Hkv, D;
  const T *bias, *qk_norm;
  const float *cosines, *sines;
  const std::int64_t* slots;
  T *q, *k_cache, *v_cache, *workspace;
  int* counters;
  std::int64_t S, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride;
};

// Destination of row b of a head; null for a key or value whose slot is outside the cache.
template <class T>
__device__ T* destination(const QkvOperands<T>& heads, int b, int head) {
  if (head < heads.Hq) return heads.q + (static_cast<std::int64_t>(b) * heads.Hq + head) * heads.D;
  const std::int64_t slot = heads.slots[b];
  if (slot < 0 || slot >= heads.S) return nullptr;
  if (head < heads.Hq + heads.Hkv) {
    return heads.k_cache + slot * heads.k_slot_stride + (head - heads.Hq) * heads.k_head_stride;
  }
  return heads.v_cache + slot * heads.v_slot_stride + (head - heads.Hq - heads.Hkv) * heads.v_head_stride;
}

// Normalize and rotate a head of one row as in kernels/qk_norm_rope.py. Called by one warp.
template <class T>
__device__ void finish_head(const QkvOperands<T>& heads, int b, int head, int N, float eps) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, half = heads.D / 2;
  const T* const source = heads.workspace + static_cast<std::int64_t>(b) * N + head * heads.D;
  const T* const norm = heads.qk_norm + head * heads.D;
  T* const target = destination(heads, b, head);
  float low[PAIRS], high[PAIRS], low_norm[PAIRS], high_norm[PAIRS], cosine[PAIRS], sine[PAIRS], sum = 0;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {  // all loads precede the reduction, so none waits for it
    const int i = lane + p * WARP;
    low[p] = high[p] = 0;
    if (i >= half) continue;
    low_norm[p] = to_float(norm[i]), high_norm[p] = to_float(norm[half + i]);
    cosine[p] = heads.cosines[b * half + i], sine[p] = heads.sines[b * half + i];
    low[p] = to_float(load_from_l2(source + i));
    high[p] = to_float(load_from_l2(source + half + i));
  }
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) sum = fmaf(low[p], low[p], fmaf(high[p], high[p], sum));
  const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(heads.D) + eps);
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = lane + p * WARP;
    if (i >= half || target == nullptr) continue;
    const float x = low[p] * (scale * low_norm[p]), y = high[p] * (scale * high_norm[p]);
    target[i] = from_float<T>(fmaf(x, cosine[p], -(y * sine[p])));  // explicit fma: same bits in every kernel
    target[half + i] = from_float<T>(fmaf(y, cosine[p], x * sine[p]));
  }
}

template <class T, int MAX_ROWS>
__global__ void __launch_bounds__(THREADS, MAX_ROWS <= 2 ? 3 : 2)
    decode_qkv_kernel(GemvOperands<T> gemv, QkvOperands<T> heads) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  const int b = lane / WARP_ROWS, r = lane % WARP_ROWS;
  const auto addend = [&](int row) { return to_float(heads.bias[row + r]); };
  const auto finish = [&](int row, const float (&sums)[WARP_ROWS][MAX_ROWS], float added) {
    const int head = row / heads.D;  // the same for all warps of the block
    const bool is_value = head >= heads.Hq + heads.Hkv;
    const T value = from_float<T>(select_own_sum(sums) + added);
    if (b < gemv.B && !is_value) {
      heads.workspace[static_cast<std::int64_t>(b) * gemv.N + row + r] = value;
    } else if (b < gemv.B) {
      if (T* const target = destination(heads, b, head)) target[row + r - head * heads.D] = value;
    }
    if (is_value || !is_last_block(heads.counters + head, heads.D / BLOCK_ROWS)) return;
    if (warp < gemv.B) finish_head(heads, warp, head, gemv.N, gemv.eps);
  };
  run_gemv<T, MAX_ROWS, true>(gemv, addend, finish);
}

template <class T>
QkvOperands<T> qkv_operands(const QkvArgs& heads, std::uintptr_t workspace, std::uintptr_t counters) {
  QkvOperands<T> operands;
  operands.Hq = heads.Hq, operands.Hkv = heads.Hkv, operands.D = heads.D;
  operands.bias = reinterpret_cast<const T*>(heads.bias);
  operands.qk_norm = reinterpret_cast<const T*>(heads.qk_norm);
  operands.cosines = reinterpret_cast<const float*>(heads.cosines);
  operands.sines = reinterpret_cast<const float*>(heads.sines);
  operands.slots = reinterpret_cast<const std::int64_t*>(heads.slots);
  operands.q = reinterpret_cast<T*>(heads.q), operands.workspace = reinterpret_cast<T*>(workspace);
  operands.k_cache = reinterpret_cast<T*>(heads.k_cache), operands.v_cache = reinterpret_cast<T*>(heads.v_cache);
  operands.counters = reinterpret_cast<int*>(counters);
  operands.S = heads.S;
  operands.k_slot_stride = heads.k_slot_stride, operands.k_head_stride = heads.k_head_stride;
  operands.v_slot_stride = heads.v_slot_stride, operands.v_head_stride = heads.v_head_stride;
  return operands;
}

}  // namespace

void decode_qkv(const GemvArgs& args, const QkvArgs& heads, std::uintptr_t workspace, std::uintptr_t counters,
                std::uintptr_t stream) {
  const auto describe = [&] {
    return format_string("decode_qkv of [%d, %d] by [%d, %d]", args.B, args.K, args.N, args.K);
  };
  const auto start = [&](auto type, auto rows, auto) {
    using T = decltype(type);
    const auto kernel = decode_qkv_kernel<T, rows()>;
    const std::size_t bytes = shared_bytes<T, rows()>(args);
    const unsigned groups = static_cast<unsigned>(args.N / BLOCK_ROWS);
    const unsigned blocks = min(groups, resident_blocks(kernel, THREADS, bytes));
    launch(kernel, blocks, THREADS, bytes, stream, gemv_operands<T>(args), qkv_operands<T>(heads, workspace, counters));
  };
  with_context(describe, [&] {
    if (heads.D % BLOCK_ROWS != 0 || heads.D > MAX_CHANNELS) {
      throw std::runtime_error(
          format_string("head_dim must be a multiple of %d up to %d, got %d", BLOCK_ROWS, MAX_CHANNELS, heads.D));
    }
    dispatch(args, start);
  });
}

}  // namespace bagel_rt
