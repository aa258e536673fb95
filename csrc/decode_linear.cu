// GEMV with RMSNorm prologue and residual or SwiGLU epilogue. Reference: kernels/decode_linear.py.
#include "gemv.h"

namespace bagel_rt {
namespace {

// Blocks per multiprocessor, which limits registers.
template <int MAX_ROWS>
constexpr int RESIDENT_BLOCKS = MAX_ROWS == 1   ? 4
                                : MAX_ROWS == 2 ? 3
                                                : 2;

// y [B, N], with swiglu [B, N / 2], both contiguous; residual [B, N] or null.
template <class T, int MAX_ROWS, bool NORM>
__global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS<MAX_ROWS>)
    decode_linear_kernel(GemvOperands<T> gemv, const T* residual, bool swiglu, T* y) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, b = lane / WARP_ROWS, r = lane % WARP_ROWS;
  const auto addend = [&](int row) {
    if (residual == nullptr || b >= gemv.B || row + r >= gemv.N) return 0.0f;
    return to_float(residual[static_cast<std::int64_t>(b) * gemv.N + row + r]);
  };
  const auto finish = [&](int row, const float (&sums)[WARP_ROWS][MAX_ROWS], float added) {
    const float sum = select_own_sum(sums);
    const float up = __shfl_xor_sync(ALL_LANES, sum, 1);
    if (b >= gemv.B || row + r >= gemv.N) return;
    if (!swiglu) {
      y[static_cast<std::int64_t>(b) * gemv.N + row + r] = from_float<T>(sum + added);
    } else if (r == 0) {
      y[static_cast<std::int64_t>(b) * (gemv.N / 2) + row / 2] = from_float<T>(sum / (1 + expf(-sum)) * up);
    }
  };
  run_gemv<T, MAX_ROWS, NORM>(gemv, addend, finish);
}

}  // namespace

std::size_t norm_shared_bytes(const GemvArgs& args) {
  std::size_t bytes = 0;
  dispatch(args, [&](auto type, auto rows, auto) { bytes = shared_bytes<decltype(type), rows()>(args); });
  return bytes;
}

void decode_linear(const GemvArgs& args, std::uintptr_t residual, bool swiglu, std::uintptr_t y,
                   std::uintptr_t stream) {
  const auto describe = [&] {
    return format_string("decode_linear of [%d, %d] by [%d, %d]", args.B, args.K, args.N, args.K);
  };
  const auto start = [&](auto type, auto rows, auto norm) {
    using T = decltype(type);
    const auto kernel = decode_linear_kernel<T, rows(), norm()>;
    const std::size_t bytes = shared_bytes<T, rows()>(args);
    const unsigned groups = static_cast<unsigned>((args.N + BLOCK_ROWS - 1) / BLOCK_ROWS);
    const unsigned blocks = min(groups, resident_blocks(kernel, THREADS, bytes));
    launch(kernel, blocks, THREADS, bytes, stream, gemv_operands<T>(args), reinterpret_cast<const T*>(residual), swiglu,
           reinterpret_cast<T*>(y));
  };
  with_context(describe, [&] { dispatch(args, start); });
}

}  // namespace bagel_rt
