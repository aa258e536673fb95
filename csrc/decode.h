// Decode kernels: entry points for kernels/decode_*.py and kernels/sample.py, which define the ops and check arguments.
//
// Addresses are device addresses on the current GPU (host addresses in the tests' emulation); `stream` is a
// cudaStream_t. `is_bfloat16` selects bfloat16 or float32 for all tensors without a fixed type. Strides are in
// elements. A failed launch throws std::runtime_error with the shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace bagel_rt {

// The reason why kernels of this extension cannot run on the current GPU; empty if they can.
std::string cuda_error();

// GEMV shared by decode_linear and decode_qkv: y [B, N] = rms_norm(x) w^T with x [B, K], w [N, K], norm [K] or null. On
// sm_90 and newer w and norm may be read while earlier kernels of the stream still run (programmatic dependent launch),
// so those must not write them: w and norm must be weights, not copies made for the call.
struct GemvArgs {
  bool is_bfloat16;
  std::uintptr_t x, norm, w;
  std::int64_t x_stride, w_stride;  // between rows
  int B, K, N;
  float eps;
};

// Bytes of shared memory for normalized x, per block; 0 without a norm.
std::size_t norm_shared_bytes(const GemvArgs& args);

// y [B, N], with swiglu [B, N / 2]; residual [B, N] or null.
void decode_linear(const GemvArgs& args, std::uintptr_t residual, bool swiglu, std::uintptr_t y, std::uintptr_t stream);

// Epilogue of decode_qkv: query heads are written to q [B, Hq, D], key and value heads to slots of the caches [S, Hkv,
// D].
struct QkvArgs {
  int Hq, Hkv, D;
  std::uintptr_t bias, qk_norm;   // [(Hq + 2 Hkv) D], [Hq + Hkv, D]
  std::uintptr_t cosines, sines;  // float32 [B, D / 2]
  std::uintptr_t slots;           // int64 [B]
  std::uintptr_t q, k_cache, v_cache;
  std::int64_t S, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride;
};

// workspace: [B, N] of the tensors' type. counters: int32, one per head (Hq + 2 Hkv), zero before and after.
void decode_qkv(const GemvArgs& args, const QkvArgs& heads, std::uintptr_t workspace, std::uintptr_t counters,
                std::uintptr_t stream);

// decode_attention: q [B, Hq, D] attends to slots of the caches [S, Hkv, D]; out [B, Hq, D].
struct DecodeAttentionArgs {
  bool is_bfloat16;
  int B, Hq, Hkv, D;
  std::uintptr_t q, k, v, out;
  std::int64_t q_row, q_head, k_slot, k_head, v_slot, v_head;  // strides
  std::uintptr_t starts, lengths;                              // [B], int64 if wide_*, else int32
  bool wide_starts, wide_lengths;
  float scale_log2;  // the scale of the scores, times log2(e)
};

// A head tile is up to 8 query heads that share a KV head. workspace: float32, B * (head tiles) * 32 * min(Hq / Hkv, 8)
// * (D + 2). counters: int32, B * (head tiles), zero before and after.
void decode_attention(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                      std::uintptr_t stream);

// Logits [rows, columns] to sample from.
struct LogitsArgs {
  bool is_bfloat16;
  int rows, columns;
  std::uintptr_t logits;
  std::int64_t row_stride;
};

// settings: float32 [rows, 3]; seed, step: int64 [rows]; all three may be null. token: int64 [rows]. workspace: 512 *
// 12 bytes per row. counters: int32, one per row, zero before and after.
void sample(const LogitsArgs& args, std::uintptr_t settings, std::uintptr_t seed, std::uintptr_t step,
            std::uintptr_t token, std::uintptr_t workspace, std::uintptr_t counters, std::uintptr_t stream);

}  // namespace bagel_rt
