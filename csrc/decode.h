// The kernels of the one-token path, for bagel_rt/kernels/decode_*.py and sample.py, which say what they compute and
// check what they are given. Addresses are of the current device (in the tests' emulation, of the host); `stream` is a
// cudaStream_t; `is_bfloat16` tells bfloat16 from float32 for all tensors that are not said to be of a fixed type.
// Strides count elements. A launch that fails throws std::runtime_error with the shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace bagel_rt {

// Why no kernel of this extension runs on the current GPU; empty if they do.
std::string cuda_error();

// What decode_linear.py and decode_qkv.py share: y [B, N] = rms_norm(x) w^T; x [B, K], w [N, K], norm [K] or null.
// On sm_90 and newer w and norm are read while kernels before it in the stream still run, so none of those may write
// them: they are weights, not copies made for the call.
struct GemvArgs {
  bool is_bfloat16;
  std::uintptr_t x, norm, w;
  std::int64_t x_stride, w_stride;  // between rows
  int B, K, N;
  float eps;
};

// Bytes of shared memory in which a block keeps normalised x; 0 without a norm.
std::size_t normalised_bytes(const GemvArgs& args);

// y [B, N], with swiglu [B, N / 2]; residual [B, N] or null.
void decode_linear(const GemvArgs& args, std::uintptr_t residual, bool swiglu, std::uintptr_t y,
                   std::uintptr_t stream);

// Where decode_qkv puts what it made: query heads in q [B, Hq, D], key and value heads in slots of the caches
// [S, Hkv, D].
struct Heads {
  int Hq, Hkv, D;
  std::uintptr_t bias, qk_norm;   // [(Hq + 2 Hkv) D], [Hq + Hkv, D]
  std::uintptr_t cosines, sines;  // float32 [B, D / 2]
  std::uintptr_t slots;           // int64 [B]
  std::uintptr_t q, k_cache, v_cache;
  std::int64_t S, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride;
};

// workspace: [B, N] of the tensors' type. counters: int32, one for each of Hq + 2 Hkv heads, zero before and after.
void decode_qkv(const GemvArgs& args, const Heads& heads, std::uintptr_t workspace, std::uintptr_t counters,
                std::uintptr_t stream);

// What decode_attention.py attends: q [B, Hq, D] to slots of the caches [S, Hkv, D]; out [B, Hq, D].
struct DecodeAttentionArgs {
  bool is_bfloat16;
  int B, Hq, Hkv, D;
  std::uintptr_t q, k, v, out;
  std::int64_t q_row, q_head, k_slot, k_head, v_slot, v_head;  // strides
  std::uintptr_t starts, lengths;                              // [B], int64 if wide, else int32
  bool wide_starts, wide_lengths;
  float scale_log2;  // the scale of the scores, times log2(e)
};

// Groups of up to 8 query heads of a KV head make a run. workspace: float32, B * (runs of all KV heads) * 32 *
// min(group, 8) * (D + 2). counters: int32, B * (runs of all KV heads), zero before and after.
void decode_attention(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                      std::uintptr_t stream);

// What sample.py draws from: [rows, columns].
struct Logits {
  bool is_bfloat16;
  int rows, columns;
  std::uintptr_t logits;
  std::int64_t row_stride;
};

// settings float32 [rows, 3], seed and step int64 [rows], or null all three; token int64 [rows]. workspace: 512 * 12
// bytes a row. counters: int32, one a row, zero before and after.
void sample(const Logits& given, std::uintptr_t settings, std::uintptr_t seed, std::uintptr_t step,
            std::uintptr_t token, std::uintptr_t workspace, std::uintptr_t counters, std::uintptr_t stream);

}  // namespace bagel_rt
