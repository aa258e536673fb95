// kernels/decode_linear.py: a product of a few rows with RMSNorm before it, and a residual or SwiGLU after it.
#include "gemv.h"

namespace bagel_rt {
namespace {

// y [B, N], with swiglu [B, N / 2], both contiguous; residual [B, N] or null.
template <class T, int MAX_ROWS, bool NORM>
__global__ void __launch_bounds__(WARPS * WARP, MAX_ROWS == 1 ? 4 : MAX_ROWS == 2 ? 3 : 2)
    decode_linear_kernel(Matrices<T> given, const T* residual, bool swiglu, T* y) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, b = lane / ROWS, r = lane % ROWS;
  const auto addend = [&](int row) {
    if (residual == nullptr || b >= given.B || row + r >= given.N) return 0.0f;
    return to_float(residual[static_cast<std::int64_t>(b) * given.N + row + r]);
  };
  const auto finish = [&](int row, const float (&sums)[ROWS][MAX_ROWS], float added) {
    const float sum = own_sum(sums);
    const float up = __shfl_xor_sync(ALL_LANES, sum, 1);
    if (b >= given.B || row + r >= given.N) return;
    if (!swiglu) {
      y[static_cast<std::int64_t>(b) * given.N + row + r] = from_float<T>(sum + added);
    } else if (r == 0) {
      y[static_cast<std::int64_t>(b) * (given.N / 2) + row / 2] = from_float<T>(sum / (1 + expf(-sum)) * up);
    }
  };
  multiply<T, MAX_ROWS, NORM>(given, addend, finish);
}

}  // namespace

std::size_t normalised_bytes(const GemvArgs& args) {
  std::size_t bytes = 0;
  dispatch(args, [&](auto type, auto rows, auto) { bytes = shared_bytes<decltype(type), rows()>(args); });
  return bytes;
}

void decode_linear(const GemvArgs& args, std::uintptr_t residual, bool swiglu, std::uintptr_t y,
                   std::uintptr_t stream) {
  const auto describe = [&] {
    return text("decode_linear of [%d, %d] by [%d, %d]", args.B, args.K, args.N, args.K);
  };
  const auto start = [&](auto type, auto rows, auto norm) {
    using T = decltype(type);
    const auto kernel = decode_linear_kernel<T, rows(), norm()>;
    const std::size_t bytes = shared_bytes<T, rows()>(args);
    const unsigned groups = static_cast<unsigned>((args.N + BLOCK_ROWS - 1) / BLOCK_ROWS);
    const unsigned blocks = min(groups, resident_blocks(kernel, WARPS * WARP, bytes));
    launch(kernel, blocks, WARPS * WARP, bytes, stream, matrices<T>(args), reinterpret_cast<const T*>(residual),
           swiglu, reinterpret_cast<T*>(y));
  };
  named(describe, [&] { dispatch(args, start); });
}

}  // namespace bagel_rt
