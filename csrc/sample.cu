// One token per row of logits. The rules, and the same in PyTorch: kernels/sample.py.
#include "decode.h"
#include "device.h"

#include <algorithm>

namespace bagel_rt {
namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int MAX_BLOCKS = 32;  // of a row
static_assert(MAX_BLOCKS * WARPS == THREADS, "the last block of a row has a thread for what each of its warps found");
constexpr int MAX_LISTED = 4096;

using Mass = unsigned long long;
constexpr float ONE = 4398046511104.0f;  // 2^42: the mass of the most likely token

// An integer in the order of the values: nan, as one value, above all, 0 and -0 the same. Above 0, which is nothing.
__device__ unsigned ordered(float value) {
  if (value != value) return 0xffffffffu;
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 + 0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(unsigned order) {
  return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

// A token with its score, in the order of scores, the first of equals above the others.
using Scored = unsigned long long;
constexpr Scored NOTHING = 0;

__device__ Scored scored(float score, int column) {
  return static_cast<Scored>(ordered(score)) << 32 | ~static_cast<unsigned>(column);
}

__device__ int column_of(Scored token) { return static_cast<int>(~static_cast<unsigned>(token)); }

// The first word of Philox4x32-10.
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

// settings [rows, 3]: temperature, top_k, top_p; or null, and then so are the others.
struct Drawing {
  const float* settings;
  const std::int64_t *seed, *step;
};

template <class T>
struct Row {
  const T* logits;
  int columns;
  float temperature;  // 1 where nothing is drawn
  bool draws;
  unsigned seed_low, seed_high, step;

  __device__ Row(const Logits& given, const Drawing& drawing, int row)
      : logits(reinterpret_cast<const T*>(given.logits) + row * given.row_stride), columns(given.columns) {
    const float asked = drawing.settings ? drawing.settings[3 * row] : 0.0f;
    draws = asked > 0.0f;
    temperature = draws ? asked : 1.0f;
    const std::uint64_t seed = draws ? static_cast<std::uint64_t>(drawing.seed[row]) : 0;
    seed_low = static_cast<unsigned>(seed);
    seed_high = static_cast<unsigned>(seed >> 32);
    step = draws ? static_cast<unsigned>(drawing.step[row]) : 0;
  }

  __device__ float scaled(float logit) const { return logit / temperature; }

  __device__ Scored score(float scaled, int column) const {
    if (!draws) return scored(scaled, column);
    const unsigned word = philox(static_cast<unsigned>(column), step, seed_low, seed_high);
    const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
    return scored(scaled - logf(-logf(u)), column);
  }

  // visit(scaled logit, column) for the columns of one of `workers`: 16 bytes at a time, but at ragged ends.
  template <class Visit>
  __device__ void visit(int worker, int workers, const Visit& visit) const {
    const int misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(logits) % 16 / sizeof(T));
    const int head = min((WIDTH<T> - misaligned) % WIDTH<T>, columns);
    const int vectors = (columns - head) / WIDTH<T>, tail = head + vectors * WIDTH<T>;
    if (worker < head) visit(scaled(to_float(logits[worker])), worker);
    for (int vector = worker; vector < vectors; vector += workers) {
      const int first = head + vector * WIDTH<T>;
      float values[WIDTH<T>];
      unpack<T>(load_vector(logits + first), values);
#pragma unroll
      for (int i = 0; i < WIDTH<T>; ++i) visit(scaled(values[i]), first + i);
    }
    if (worker < columns - tail) visit(scaled(to_float(logits[tail + worker])), tail + worker);
  }
};

// What `reduce`, which takes the values of neighbouring lanes, makes of those of all threads; every thread has it.
template <class V, class Reduce>
__device__ V over_block(V value, const Reduce& reduce) {
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
  return over_block(value, [](V mine, int lanes) { return warp_max(mine, lanes); });
}

template <class V>
__device__ V block_sum(V value) {
  return over_block(value, [](V mine, int lanes) { return warp_sum(mine, lanes); });
}

// The k-th largest of some numbers, bit by bit; at_least(n) counts those from n on.
template <class AtLeast>
__device__ unsigned kth_largest(unsigned k, const AtLeast& at_least) {
  unsigned found = 0;
#pragma unroll 1
  for (unsigned bit = 1u << 31; bit != 0; bit >>= 1) {
    if (at_least(found | bit) >= k) found |= bit;
  }
  return found;
}

// Of numbers that threads have one each of; 0 counts as none.
__device__ unsigned kth_of_threads(unsigned k, unsigned mine) {
  return kth_largest(k, [&](unsigned from) { return static_cast<unsigned>(__syncthreads_count(mine >= from)); });
}

// The k-th largest scaled logit of the row, as `ordered` has it. A thread gives the largest of one of the row's warps:
// of those the k-th largest has k logits or more from it on, and as a rule not many more, so they are put in a list.
template <class T>
__device__ unsigned kth_logit(const Row<T>& row, unsigned k, unsigned largest_of_warp) {
  __shared__ unsigned listed[MAX_LISTED];
  __shared__ unsigned count;
  const unsigned bound = kth_of_threads(k, largest_of_warp);  // 0, below all logits, if fewer than k warps have any
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  row.visit(threadIdx.x, THREADS, [&](float scaled, int) {
    const unsigned order = ordered(scaled);
    if (order < bound) return;
    const unsigned place = atomicAdd(&count, 1u);
    if (place < MAX_LISTED) listed[place] = order;
  });
  __syncthreads();
  if (count <= THREADS) return kth_of_threads(k, threadIdx.x < count ? listed[threadIdx.x] : 0);
  if (count <= MAX_LISTED) {
    return kth_largest(k, [&](unsigned from) {
      unsigned found = 0;
      for (unsigned i = threadIdx.x; i < count; i += THREADS) found += listed[i] >= from ? 1u : 0u;
      return block_sum(found);
    });
  }
  return kth_largest(k, [&](unsigned from) {
    unsigned found = 0;
    row.visit(threadIdx.x, THREADS, [&](float scaled, int) { found += ordered(scaled) >= from ? 1u : 0u; });
    return block_sum(found);
  });
}

// The best token among those from the k-th largest on (k = 0: all) that weigh less than top_p of them together with
// what is above, given the best token of all.
template <class T>
__device__ Scored best_kept(const Row<T>& row, Scored best, unsigned k, float top_p, unsigned largest_of_warp) {
  const float largest = value_of(block_max(largest_of_warp));
  if (!(fabsf(largest) < INFINITY)) return best;  // the first nan or inf, or nothing above -inf

  const auto order_of = [&](Scored token) { return ordered(row.scaled(to_float(row.logits[column_of(token)]))); };
  const unsigned lowest = k == 0 ? 0 : kth_logit(row, k, largest_of_warp);
  if (order_of(best) < lowest) {
    best = NOTHING;
    row.visit(threadIdx.x, THREADS, [&](float scaled, int column) {
      if (ordered(scaled) >= lowest) best = max(best, row.score(scaled, column));
    });
    best = block_max(best);
  }
  if (!(top_p < 1.0f)) return best;
  while (true) {
    const unsigned order_of_best = order_of(best);
    Mass kept = 0, above = 0;
    Scored next = NOTHING;
    row.visit(threadIdx.x, THREADS, [&](float scaled, int column) {
      const unsigned order = ordered(scaled);
      if (order < lowest) return;
      const Mass mass = static_cast<Mass>(expf(scaled - largest) * ONE + 0.5f);
      kept += mass;
      if (order <= order_of_best) return;
      above += mass;
      next = max(next, row.score(scaled, column));
    });
    kept = block_sum(kept);
    above = block_sum(above);
    if (above == 0 || static_cast<double>(above) < static_cast<double>(top_p) * static_cast<double>(kept)) return best;
    best = block_max(next);
  }
}

// Block (i, b): part i of row b. `found` [rows, THREADS] and `largest` [rows, THREADS] are of the row's warps.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    sample_kernel(Logits given, Drawing drawing, std::int64_t* token, Scored* found, unsigned* largest, int* counters) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int number = static_cast<int>(blockIdx.y);
  const Row<T> row(given, drawing, number);
  found += static_cast<std::int64_t>(number) * THREADS;
  largest += static_cast<std::int64_t>(number) * THREADS;

  Scored best = NOTHING;
  unsigned highest = 0;
  const int worker = static_cast<int>(blockIdx.x * THREADS + threadIdx.x);
  row.visit(worker, static_cast<int>(gridDim.x) * THREADS, [&](float scaled, int column) {
    best = max(best, row.score(scaled, column));
    highest = max(highest, ordered(scaled));
  });
  best = warp_max(best);
  highest = warp_max(highest);
  if (threadIdx.x % WARP == 0) {
    found[worker / WARP] = best;
    largest[worker / WARP] = highest;
  }
  if (!is_last_block(counters + number, static_cast<int>(gridDim.x))) return;

  const bool has = threadIdx.x < gridDim.x * WARPS;  // something of a warp to put together with the others'
  best = block_max(has ? load_shared_by_blocks(found + threadIdx.x) : NOTHING);
  if (row.draws) {
    const float asked = drawing.settings[3 * number + 1], top_p = drawing.settings[3 * number + 2];
    const unsigned k = asked >= 1.0f && asked < static_cast<float>(row.columns) ? static_cast<unsigned>(asked) : 0;
    highest = has ? load_shared_by_blocks(largest + threadIdx.x) : 0;
    if (k != 0 || top_p < 1.0f) best = best_kept(row, best, k, top_p, highest);
  }
  if (threadIdx.x == 0) token[number] = column_of(best);
}

}  // namespace

void sample(const Logits& given, std::uintptr_t settings, std::uintptr_t seed, std::uintptr_t step,
            std::uintptr_t token, std::uintptr_t workspace, std::uintptr_t counters, std::uintptr_t stream) {
  const Drawing drawing{reinterpret_cast<const float*>(settings), reinterpret_cast<const std::int64_t*>(seed),
                        reinterpret_cast<const std::int64_t*>(step)};
  Scored* const found = reinterpret_cast<Scored*>(workspace);
  unsigned* const largest = reinterpret_cast<unsigned*>(found + static_cast<std::int64_t>(given.rows) * THREADS);
  const int columns = THREADS * (given.is_bfloat16 ? WIDTH<bfloat16> : WIDTH<float>);  // a vector for every thread
  const int blocks = std::min((given.columns + columns - 1) / columns, MAX_BLOCKS);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(given.rows));
  const auto kernel = given.is_bfloat16 ? sample_kernel<bfloat16> : sample_kernel<float>;
  named([&] { return text("sample of [%d, %d] logits", given.rows, given.columns); }, [&] {
    launch(kernel, grid, dim3(THREADS), 0, stream, given, drawing, reinterpret_cast<std::int64_t*>(token), found,
           largest, reinterpret_cast<int*>(counters));
  });
}

}  // namespace bagel_rt
