// Sample one token per row of logits. Reference and algorithm: kernels/sample.py.
//
// Every block scores its part of the row (scaled logits plus Gumbel noise) and stores the best token of each warp. The
// last block of the row to finish takes the best of all, and with top-k or top-p checks that it is a kept token.
#include "decode.h"
#include "device.h"

#include <algorithm>

namespace bagel_rt {
namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int MAX_BLOCKS = 32;  // per row
static_assert(MAX_BLOCKS * WARPS == THREADS, "the last block of a row needs one thread per warp of the row");
constexpr std::int64_t NOT_FINITE = -1;  // as in kernels/sample.py
constexpr int MAX_CANDIDATES = 4096;     // of kth_logit, in shared memory

// Unnormalized probabilities as 42-bit fixed-point numbers: an integer sum does not depend on its order.
using Probability = unsigned long long;
constexpr float PROBABILITY_ONE = 4398046511104.0f;  // 2^42: the probability of the most likely token

// Map a float to an unsigned integer of the same order. All NaNs map to the largest value, 0 and -0 to the same one.
// The result is never 0, which stands for "no value".
__device__ unsigned to_ordered(float value) {
  if (value != value) return 0xffffffffu;
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 + 0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float from_ordered(unsigned order) {
  return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

// A token and its score in one integer, ordered by score and then by lower column, so that max() breaks ties as argmax
// does.
using RankedToken = unsigned long long;
constexpr RankedToken NO_TOKEN = 0;

__device__ RankedToken rank_token(float score, int column) {
  return static_cast<RankedToken>(to_ordered(score)) << 32 | ~static_cast<unsigned>(column);
}

__device__ int column_of(RankedToken token) { return static_cast<int>(~static_cast<unsigned>(token)); }

// First word of Philox4x32-10 with counter (column, step, 0, 0).
__device__ unsigned philox(unsigned column, unsigned step, unsigned k0, unsigned k1) {
  unsigned c0 = column, c1 = step, c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<unsigned>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<unsigned>(p1);
    c2 = static_cast<unsigned>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<unsigned>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// settings [rows, 3]: temperature, top_k, top_p. Null for greedy rows, with seed and step.
struct SamplingParams {
  const float* settings;
  const std::int64_t *seed, *step;
};

template <class T>
struct Row {
  const T* logits;
  int columns;
  float temperature;  // 1 for a greedy row
  bool samples;
  unsigned seed_low, seed_high, step;

  __device__ Row(const LogitsArgs& args, const SamplingParams& sampling, int row)
      : logits(reinterpret_cast<const T*>(args.logits) + row * args.row_stride), columns(args.columns) {
    const float requested = sampling.settings ? sampling.settings[3 * row] : 0.0f;
    samples = requested > 0.0f;
    temperature = samples ? requested : 1.0f;
    const std::uint64_t seed = samples ? static_cast<std::uint64_t>(sampling.seed[row]) : 0;
    seed_low = static_cast<unsigned>(seed);
    seed_high = static_cast<unsigned>(seed >> 32);
    step = samples ? static_cast<unsigned>(sampling.step[row]) : 0;
  }

  __device__ float scaled(float logit) const { return logit / temperature; }

  __device__ RankedToken score(float scaled, int column) const {
    if (!samples) return rank_token(scaled, column);
    const unsigned word = philox(static_cast<unsigned>(column), step, seed_low, seed_high);
    const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
    return rank_token(scaled - logf(-logf(u)), column);
  }

  // Call visitor(scaled logit, column) for the columns of one of `workers` threads. Loads 16 bytes at a time, except
  // for the unaligned head and tail of the row.
  template <class Visitor>
  __device__ void for_each_logit(int worker, int workers, const Visitor& visitor) const {
    const int misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(logits) % 16 / sizeof(T));
    const int head = min((WIDTH<T> - misaligned) % WIDTH<T>, columns);
    const int vectors = (columns - head) / WIDTH<T>, tail = head + vectors * WIDTH<T>;
    if (worker < head) visitor(scaled(to_float(logits[worker])), worker);
    for (int vector = worker; vector < vectors; vector += workers) {
      const int first = head + vector * WIDTH<T>;
      float values[WIDTH<T>];
      unpack<T>(load_vector(logits + first), values);
#pragma unroll
      for (int i = 0; i < WIDTH<T>; ++i) visitor(scaled(values[i]), first + i);
    }
    if (worker < columns - tail) visitor(scaled(to_float(logits[tail + worker])), tail + worker);
  }
};

// Reduce a value over the block with `reduce`, a warp reduction. Every thread gets the result.
template <class V, class Reduce>
__device__ V block_reduce(V value, const Reduce& reduce) {
  __shared__ V parts[WARPS];
  value = reduce(value, WARP);
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
  __syncthreads();
  value = reduce(parts[threadIdx.x % WARPS], WARPS);
  __syncthreads();
  return value;
}

template <class V>
__device__ V block_max(V value) {
  return block_reduce(value, [](V mine, int lanes) { return warp_max(mine, lanes); });
}

template <class V>
__device__ V block_sum(V value) {
  return block_reduce(value, [](V mine, int lanes) { return warp_sum(mine, lanes); });
}

// The k-th largest of a set of unsigned integers by radix selection, one bit per step from the highest: a bit is set if
// at least k numbers are no smaller than the prefix with it. at_least(n) counts the numbers >= n. Needs no sort and no
// memory.
template <class AtLeast>
__device__ unsigned kth_largest(unsigned k, const AtLeast& at_least) {
  unsigned found = 0;
#pragma unroll 1
  for (unsigned bit = 1u << 31; bit != 0; bit >>= 1) {
    if (at_least(found | bit) >= k) found |= bit;
  }
  return found;
}

// The k-th largest of one number per thread; 0 stands for no number.
__device__ unsigned kth_of_threads(unsigned k, unsigned mine) {
  return kth_largest(k, [&](unsigned from) { return static_cast<unsigned>(__syncthreads_count(mine >= from)); });
}

// The k-th largest scaled logit of the row, mapped by to_ordered. Each thread passes the largest logit of one of the
// row's warps. The k-th largest of those maxima is a lower bound, since k logits are at least as large, and usually few
// others are. Logits at or above the bound are compacted into shared memory, where radix selection is cheap. If they do
// not fit, radix selection reads the row 32 times.
template <class T>
__device__ unsigned kth_logit(const Row<T>& row, unsigned k, unsigned largest_of_warp) {
  __shared__ unsigned candidates[MAX_CANDIDATES];
  __shared__ unsigned count;
  const unsigned bound = kth_of_threads(k, largest_of_warp);  // 0, below every logit, if fewer than k warps have one
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  row.for_each_logit(threadIdx.x, THREADS, [&](float scaled, int) {
    const unsigned order = to_ordered(scaled);
    if (order < bound) return;
    const unsigned place = atomicAdd(&count, 1u);
    if (place < MAX_CANDIDATES) candidates[place] = order;
  });
  __syncthreads();
  if (count <= THREADS) return kth_of_threads(k, threadIdx.x < count ? candidates[threadIdx.x] : 0);
  if (count <= MAX_CANDIDATES) {
    return kth_largest(k, [&](unsigned from) {
      unsigned found = 0;
      for (unsigned i = threadIdx.x; i < count; i += THREADS) found += candidates[i] >= from ? 1u : 0u;
      return block_sum(found);
    });
  }
  return kth_largest(k, [&](unsigned from) {
    unsigned found = 0;
    row.for_each_logit(threadIdx.x, THREADS, [&](float scaled, int) { found += to_ordered(scaled) >= from ? 1u : 0u; });
    return block_sum(found);
  });
}

// The best kept token, given the best token of all. top-k keeps tokens from the k-th largest logit on (k = 0: all). Of
// those, top-p keeps a token if the tokens above it have less than the share top_p of their probability. The loop
// starts with the best token of all; while the current token is not kept, it moves to the best token among those with
// larger logits. It ends, since the token with the largest logit has nothing above it.
template <class T>
__device__ RankedToken best_kept(const Row<T>& row, RankedToken best, unsigned k, float top_p,
                                 unsigned largest_of_warp) {
  const float largest = from_ordered(block_max(largest_of_warp));
  if (!(fabsf(largest) < INFINITY)) return best;  // a small temperature overflowed

  const auto order_of = [&](RankedToken token) {
    return to_ordered(row.scaled(to_float(row.logits[column_of(token)])));
  };
  const unsigned lowest = k == 0 ? 0 : kth_logit(row, k, largest_of_warp);
  if (order_of(best) < lowest) {
    best = NO_TOKEN;
    row.for_each_logit(threadIdx.x, THREADS, [&](float scaled, int column) {
      if (to_ordered(scaled) >= lowest) best = max(best, row.score(scaled, column));
    });
    best = block_max(best);
  }
  if (!(top_p < 1.0f)) return best;
  while (true) {
    const unsigned order_of_best = order_of(best);
    Probability kept = 0, above = 0;
    RankedToken next = NO_TOKEN;
    row.for_each_logit(threadIdx.x, THREADS, [&](float scaled, int column) {
      const unsigned order = to_ordered(scaled);
      if (order < lowest) return;
      const Probability probability = static_cast<Probability>(expf(scaled - largest) * PROBABILITY_ONE + 0.5f);
      kept += probability;
      if (order <= order_of_best) return;
      above += probability;
      next = max(next, row.score(scaled, column));
    });
    kept = block_sum(kept);
    above = block_sum(above);
    if (above == 0 || static_cast<double>(above) < static_cast<double>(top_p) * static_cast<double>(kept)) return best;
    best = block_max(next);
  }
}

__device__ bool is_finite(unsigned order) { return fabsf(from_ordered(order)) < INFINITY; }

// Whether the largest logit of the row, before the division by the temperature, is finite. Called only if the largest
// scaled logit is not: a small temperature may have overflowed.
template <class T>
__device__ bool has_finite_maximum(Row<T> row) {
  row.temperature = 1.0f;
  unsigned highest = 0;
  row.for_each_logit(threadIdx.x, THREADS, [&](float logit, int) { highest = max(highest, to_ordered(logit)); });
  return is_finite(block_max(highest));
}

// Block (i, b) processes part i of row b. `found` and `largest` [rows, THREADS]: best token and largest logit of each
// warp.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    sample_kernel(LogitsArgs args, SamplingParams sampling, std::int64_t* token, RankedToken* found, unsigned* largest,
                  int* counters) {
  trigger_next_kernel();
  wait_for_previous_kernel();
  const int number = static_cast<int>(blockIdx.y);
  const Row<T> row(args, sampling, number);
  found += static_cast<std::int64_t>(number) * THREADS;
  largest += static_cast<std::int64_t>(number) * THREADS;

  RankedToken best = NO_TOKEN;
  unsigned highest = 0;
  const int worker = static_cast<int>(blockIdx.x * THREADS + threadIdx.x);
  row.for_each_logit(worker, static_cast<int>(gridDim.x) * THREADS, [&](float scaled, int column) {
    best = max(best, row.score(scaled, column));
    highest = max(highest, to_ordered(scaled));
  });
  best = warp_max(best);
  highest = warp_max(highest);
  if (threadIdx.x % WARP == 0) {
    found[worker / WARP] = best;
    largest[worker / WARP] = highest;
  }
  if (!is_last_block(counters + number, static_cast<int>(gridDim.x))) return;

  const bool has_warp = threadIdx.x < gridDim.x * WARPS;  // one thread per warp of the row
  best = block_max(has_warp ? load_from_l2(found + threadIdx.x) : NO_TOKEN);
  highest = has_warp ? load_from_l2(largest + threadIdx.x) : 0;
  if (!is_finite(block_max(highest)) && !has_finite_maximum(row)) {
    if (threadIdx.x == 0) token[number] = NOT_FINITE;
    return;
  }
  if (row.samples) {
    const float requested = sampling.settings[3 * number + 1], top_p = sampling.settings[3 * number + 2];
    const bool limited = requested >= 1.0f && requested < static_cast<float>(row.columns);
    const unsigned k = limited ? static_cast<unsigned>(requested) : 0;
    if (k != 0 || top_p < 1.0f) best = best_kept(row, best, k, top_p, highest);
  }
  if (threadIdx.x == 0) token[number] = column_of(best);
}

}  // namespace

void sample(const LogitsArgs& args, std::uintptr_t settings, std::uintptr_t seed, std::uintptr_t step,
            std::uintptr_t token, std::uintptr_t workspace, std::uintptr_t counters, std::uintptr_t stream) {
  const SamplingParams sampling{reinterpret_cast<const float*>(settings), reinterpret_cast<const std::int64_t*>(seed),
                                reinterpret_cast<const std::int64_t*>(step)};
  RankedToken* const found = reinterpret_cast<RankedToken*>(workspace);
  unsigned* const largest = reinterpret_cast<unsigned*>(found + static_cast<std::int64_t>(args.rows) * THREADS);
  const int columns = THREADS * (args.is_bfloat16 ? WIDTH<bfloat16> : WIDTH<float>);  // one vector per thread
  const int blocks = std::min((args.columns + columns - 1) / columns, MAX_BLOCKS);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.rows));
  const auto kernel = args.is_bfloat16 ? sample_kernel<bfloat16> : sample_kernel<float>;
  with_context([&] { return format_string("sample of [%d, %d] logits", args.rows, args.columns); },
               [&] {
                 launch(kernel, grid, dim3(THREADS), 0, stream, args, sampling, reinterpret_cast<std::int64_t*>(token),
                        found, largest, reinterpret_cast<int*>(counters));
               });
}

}  // namespace bagel_rt
