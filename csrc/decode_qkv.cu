// kernels/decode_qkv.py: RMSNorm, the QKV projection, and what makes queries, keys and values of it.
//
// A block makes 16 channels of one head. The blocks of a query or key head leave theirs in the workspace; the last of
// them to finish normalises and rotates the head, a warp for each row of the batch.
#include "gemv.h"

namespace bagel_rt {
namespace {

constexpr int PAIRS = 2;  // of channels that rotate together, held by a lane
constexpr int MAX_CHANNELS = 2 * PAIRS * WARP;

template <class T>
struct Tensors {
  int Hq, Hkv, D;
  const T *bias, *qk_norm;
  const float *cosines, *sines;
  const std::int64_t* slots;
  T *q, *k_cache, *v_cache, *workspace;
  int* counters;
  std::int64_t S, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride;
};

// Where row b of head `head` goes; null for a key or value whose slot is not the cache's.
template <class T>
__device__ T* destination(const Tensors<T>& heads, int b, int head) {
  if (head < heads.Hq) return heads.q + (static_cast<std::int64_t>(b) * heads.Hq + head) * heads.D;
  const std::int64_t slot = heads.slots[b];
  if (slot < 0 || slot >= heads.S) return nullptr;
  if (head < heads.Hq + heads.Hkv) {
    return heads.k_cache + slot * heads.k_slot_stride + (head - heads.Hq) * heads.k_head_stride;
  }
  return heads.v_cache + slot * heads.v_slot_stride + (head - heads.Hq - heads.Hkv) * heads.v_head_stride;
}

// Normalise and rotate the head of one row: kernels/qk_norm_rope.py. By one warp.
template <class T>
__device__ void finish_head(const Tensors<T>& heads, int b, int head, int N, float eps) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, half = heads.D / 2;
  const T* const from = heads.workspace + static_cast<std::int64_t>(b) * N + head * heads.D;
  const T* const norm = heads.qk_norm + head * heads.D;
  T* const to = destination(heads, b, head);
  float low[PAIRS], high[PAIRS], low_norm[PAIRS], high_norm[PAIRS], cosine[PAIRS], sine[PAIRS], sum = 0;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {  // all loads before the sum, so that none waits for it
    const int i = lane + p * WARP;
    low[p] = high[p] = 0;
    if (i >= half) continue;
    low_norm[p] = to_float(norm[i]), high_norm[p] = to_float(norm[half + i]);
    cosine[p] = heads.cosines[b * half + i], sine[p] = heads.sines[b * half + i];
    low[p] = to_float(load_shared_by_blocks(from + i));
    high[p] = to_float(load_shared_by_blocks(from + half + i));
  }
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) sum = fmaf(low[p], low[p], fmaf(high[p], high[p], sum));
  const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(heads.D) + eps);
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = lane + p * WARP;
    if (i >= half || to == nullptr) continue;
    const float x = low[p] * (scale * low_norm[p]), y = high[p] * (scale * high_norm[p]);
    to[i] = from_float<T>(fmaf(x, cosine[p], -(y * sine[p])));  // spelt out: the same for every number of rows
    to[half + i] = from_float<T>(fmaf(y, cosine[p], x * sine[p]));
  }
}

template <class T, int MAX_ROWS>
__global__ void __launch_bounds__(WARPS * WARP, MAX_ROWS <= 2 ? 3 : 2)
    decode_qkv_kernel(Matrices<T> given, Tensors<T> heads) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  const int b = lane / ROWS, r = lane % ROWS;
  const auto addend = [&](int row) { return to_float(heads.bias[row + r]); };
  const auto finish = [&](int row, const float (&sums)[ROWS][MAX_ROWS], float added) {
    const int head = row / heads.D;  // one for all warps of the block
    const bool is_value = head >= heads.Hq + heads.Hkv;
    const T value = from_float<T>(own_sum(sums) + added);
    if (b < given.B && !is_value) {
      heads.workspace[static_cast<std::int64_t>(b) * given.N + row + r] = value;
    } else if (b < given.B) {
      if (T* const to = destination(heads, b, head)) to[row + r - head * heads.D] = value;
    }
    if (is_value || !is_last_block(heads.counters + head, heads.D / BLOCK_ROWS)) return;
    if (warp < given.B) finish_head(heads, warp, head, given.N, given.eps);
  };
  multiply<T, MAX_ROWS, true>(given, addend, finish);
}

template <class T>
Tensors<T> tensors(const Heads& heads, std::uintptr_t workspace, std::uintptr_t counters) {
  Tensors<T> found;
  found.Hq = heads.Hq, found.Hkv = heads.Hkv, found.D = heads.D;
  found.bias = reinterpret_cast<const T*>(heads.bias), found.qk_norm = reinterpret_cast<const T*>(heads.qk_norm);
  found.cosines = reinterpret_cast<const float*>(heads.cosines);
  found.sines = reinterpret_cast<const float*>(heads.sines);
  found.slots = reinterpret_cast<const std::int64_t*>(heads.slots);
  found.q = reinterpret_cast<T*>(heads.q), found.workspace = reinterpret_cast<T*>(workspace);
  found.k_cache = reinterpret_cast<T*>(heads.k_cache), found.v_cache = reinterpret_cast<T*>(heads.v_cache);
  found.counters = reinterpret_cast<int*>(counters);
  found.S = heads.S;
  found.k_slot_stride = heads.k_slot_stride, found.k_head_stride = heads.k_head_stride;
  found.v_slot_stride = heads.v_slot_stride, found.v_head_stride = heads.v_head_stride;
  return found;
}

}  // namespace

void decode_qkv(const GemvArgs& args, const Heads& heads, std::uintptr_t workspace, std::uintptr_t counters,
                std::uintptr_t stream) {
  const auto describe = [&] {
    return text("decode_qkv of [%d, %d] by [%d, %d]", args.B, args.K, args.N, args.K);
  };
  const auto start = [&](auto type, auto rows, auto) {
    using T = decltype(type);
    const auto kernel = decode_qkv_kernel<T, rows()>;
    const std::size_t bytes = shared_bytes<T, rows()>(args);
    const unsigned groups = static_cast<unsigned>(args.N / BLOCK_ROWS);
    const unsigned blocks = min(groups, resident_blocks(kernel, WARPS * WARP, bytes));
    launch(kernel, blocks, WARPS * WARP, bytes, stream, matrices<T>(args), tensors<T>(heads, workspace, counters));
  };
  named(describe, [&] {
    if (heads.D % BLOCK_ROWS != 0 || heads.D > MAX_CHANNELS) {
      throw std::runtime_error(text("heads of %d channels; a multiple of %d up to %d is needed", heads.D, BLOCK_ROWS,
                                    MAX_CHANNELS));
    }
    dispatch(args, start);
  });
}

}  // namespace bagel_rt
