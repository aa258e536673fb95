// Attention of one query row per sequence. The rules, and the same in PyTorch: kernels/decode_attention.py.
//
// A sequence's keys are split among blocks, in a way that depends on its length alone. In a block, D / WIDTH<T> lanes
// share a key: each loads 16 bytes of it, once for all query heads of the KV head. The block that finishes last puts
// together what all blocks of the sequence found.
#include "decode.h"
#include "device.h"

namespace bagel_rt {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int SPLITS = 32;      // blocks of a sequence and KV head, at most
constexpr int KEYS = 4;         // that a group of lanes has in flight
constexpr int LEAST_KEYS = 64;  // of a block: with D = 128 in bfloat16, what it has in flight
constexpr int MAX_HEADS = 8;   // query heads that a block takes
constexpr int VECTOR = 4;       // channels that a thread puts together

// What to take off scores before exp2, given the largest so far: of none, -inf - -inf would be nan.
__device__ float base_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

__device__ std::int64_t bound(std::uintptr_t bounds, bool wide, int sequence) {
  return wide ? reinterpret_cast<const std::int64_t*>(bounds)[sequence]
              : reinterpret_cast<const std::int32_t*>(bounds)[sequence];
}

// Softmaxes over parts of the keys: the largest score of each, and the sum of exp2(score - largest).
template <int HEADS>
struct Parts {
  float largest[SPLITS][HEADS], total[SPLITS][HEADS];
  float weight[SPLITS][HEADS];  // that a part has in all of them together, whose largest score and sum are:
  float joint_largest[HEADS], joint_total[HEADS];

  // All threads call, when the parts are there.
  __device__ void join(int parts) {
    const int thread = static_cast<int>(threadIdx.x), part = thread / HEADS, head = thread % HEADS;
    if (part < parts) {
      float larger = -INFINITY;
      for (int other = 0; other < parts; ++other) larger = fmaxf(larger, largest[other][head]);
      weight[part][head] = exp2f(largest[part][head] - base_of(larger));
      if (part == 0) joint_largest[head] = larger;
    }
    __syncthreads();
    if (part == 0) {
      float sum = 0.0f;
      for (int other = 0; other < parts; ++other) sum += weight[other][head] * total[other][head];
      joint_total[head] = sum;
    }
    __syncthreads();
  }

  // store(head, channel, sums): VECTOR channels of the sum over parts, in their order, of weight times
  // load(part, head, channel).
  template <class Load, class Store>
  __device__ void add(int parts, int heads, int D, const Load& load, const Store& store) const {
    for (int place = static_cast<int>(threadIdx.x) * VECTOR; place < heads * D; place += THREADS * VECTOR) {
      const int head = place / D, channel = place % D;
      float sums[VECTOR] = {};
#pragma unroll 8
      for (int part = 0; part < parts; ++part) {
        float values[VECTOR];
        unpack<float>(load(part, head, channel), values);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sums[i] += weight[part][head] * values[i];
      }
      store(head, channel, sums);
    }
  }
};
static_assert(SPLITS * MAX_HEADS <= THREADS && WARPS <= SPLITS);

// Block (s, i, b): split s of sequence b, and the i-th run of at most HEADS query heads that read one KV head.
template <class T, int HEADS>
__global__ void __launch_bounds__(THREADS, 1)
    decode_attention_kernel(DecodeAttentionArgs given, int runs, float* workspace, int* counters) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int split = static_cast<int>(blockIdx.x), sequence = static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y) / runs, run = static_cast<int>(blockIdx.y) % runs;
  const int group = given.Hq / given.Hkv, heads = min(HEADS, group - run * HEADS), D = given.D;
  const std::int64_t first_head = kv_head * group + run * HEADS;
  T* const out = reinterpret_cast<T*>(given.out) + (static_cast<std::int64_t>(sequence) * given.Hq + first_head) * D;

  const int length = static_cast<int>(bound(given.lengths, given.wide_lengths, sequence));
  const int keys_of_split = max(LEAST_KEYS, (length + SPLITS - 1) / SPLITS);
  const int splits = (length + keys_of_split - 1) / keys_of_split;
  if (length <= 0 && split == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < heads * D; i += THREADS) out[i] = from_float<T>(0.0f);
  }
  if (split >= splits) return;
  const int count = min(keys_of_split, length - split * keys_of_split);
  const std::int64_t first_slot = bound(given.starts, given.wide_starts, sequence) + split * keys_of_split;

  const int lanes = D / WIDTH<T>;  // that share a key
  const int channel = static_cast<int>(threadIdx.x) % lanes * WIDTH<T>;
  const int worker = static_cast<int>(threadIdx.x) / lanes, workers = THREADS / lanes;
  const std::int64_t k_step = workers * given.k_slot, v_step = workers * given.v_slot;
  const T* k =  // of the key that this thread asks for next
      reinterpret_cast<const T*>(given.k) + (first_slot + worker) * given.k_slot + kv_head * given.k_head + channel;
  const T* v =
      reinterpret_cast<const T*>(given.v) + (first_slot + worker) * given.v_slot + kv_head * given.v_head + channel;

  float q[HEADS][WIDTH<T>], sums[HEADS][WIDTH<T>] = {}, total[HEADS] = {}, largest[HEADS];
#pragma unroll
  for (int head = 0; head < HEADS; ++head) {
    largest[head] = -INFINITY;
    const std::int64_t place = sequence * given.q_row + (first_head + head) * given.q_head + channel;
    const uint4 words =
        head < heads ? load_vector(reinterpret_cast<const T*>(given.q) + place) : make_uint4(0, 0, 0, 0);
    unpack<T>(words, q[head]);
#pragma unroll
    for (int i = 0; i < WIDTH<T>; ++i) q[head][i] *= given.scale_log2;
  }

  // Values are on their way while their keys are multiplied, and the next keys while these values are.
  uint4 k_words[KEYS], v_words[KEYS];
  const auto ask = [&](uint4(&words)[KEYS], const T*& from, std::int64_t step, int begin) {
#pragma unroll
    for (int i = 0; i < KEYS; ++i, from += step) {
      words[i] = begin + i * workers + worker < count ? load_once(from) : make_uint4(0, 0, 0, 0);
    }
  };
  ask(k_words, k, k_step, 0);
  for (int begin = 0; begin < count; begin += workers * KEYS) {  // as often in all threads: they exchange numbers
    ask(v_words, v, v_step, begin);
    float scores[KEYS][HEADS];
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      float values[WIDTH<T>];
      unpack<T>(k_words[i], values);
#pragma unroll
      for (int head = 0; head < HEADS; ++head) {
        float product = 0.0f;
#pragma unroll
        for (int j = 0; j < WIDTH<T>; ++j) product += q[head][j] * values[j];
        scores[i][head] = product;
      }
    }
    ask(k_words, k, k_step, begin + workers * KEYS);
#pragma unroll 1
    for (int apart = lanes / 2; apart > 0; apart /= 2) {
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
          scores[i][head] += __shfl_xor_sync(ALL_LANES, scores[i][head], apart);
        }
      }
    }
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      float larger = largest[head];
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
        if (begin + i * workers + worker >= count) scores[i][head] = -INFINITY;
        larger = fmaxf(larger, scores[i][head]);
      }
      const float base = base_of(larger), shrink = exp2f(largest[head] - base);
      largest[head] = larger;
      total[head] *= shrink;
#pragma unroll
      for (int j = 0; j < WIDTH<T>; ++j) sums[head][j] *= shrink;
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
        scores[i][head] = exp2f(scores[i][head] - base);
        total[head] += scores[i][head];
      }
    }
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      float values[WIDTH<T>];
      unpack<T>(v_words[i], values);
#pragma unroll
      for (int head = 0; head < HEADS; ++head) {
#pragma unroll
        for (int j = 0; j < WIDTH<T>; ++j) sums[head][j] += scores[i][head] * values[j];
      }
    }
  }

  // The groups of lanes of a warp.
#pragma unroll 1
  for (int apart = lanes; apart < WARP; apart *= 2) {
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      const float other = __shfl_xor_sync(ALL_LANES, largest[head], apart);
      const float larger = fmaxf(largest[head], other), base = base_of(larger);
      const float mine = exp2f(largest[head] - base), theirs = exp2f(other - base);
      largest[head] = larger;
      total[head] = mine * total[head] + theirs * __shfl_xor_sync(ALL_LANES, total[head], apart);
#pragma unroll
      for (int j = 0; j < WIDTH<T>; ++j) {
        sums[head][j] = mine * sums[head][j] + theirs * __shfl_xor_sync(ALL_LANES, sums[head][j], apart);
      }
    }
  }

  // The warps of the block.
  __shared__ Parts<HEADS> parts;
  DYNAMIC_SHARED(float, sums_of_warps);  // [WARPS, HEADS, D]
  const int warp = static_cast<int>(threadIdx.x) / WARP;
  if (static_cast<int>(threadIdx.x) % WARP < lanes) {
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      if (channel == 0) {
        parts.largest[warp][head] = largest[head];
        parts.total[warp][head] = total[head];
      }
      float* const place = sums_of_warps + (warp * HEADS + head) * D + channel;
#pragma unroll
      for (int j = 0; j < WIDTH<T>; j += VECTOR) {
        store_vector(place + j, pack<float>({sums[head][j], sums[head][j + 1], sums[head][j + 2], sums[head][j + 3]}));
      }
    }
  }
  __syncthreads();
  parts.join(WARPS);
  const auto of_warp = [&](int part, int head, int first) {
    return load_vector(sums_of_warps + (part * HEADS + head) * D + first);
  };
  const auto finish = [&](int head, int first, const float(&joint)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[head * D + first + i] = from_float<T>(joint[i] / parts.joint_total[head]);
  };
  if (splits == 1) return parts.add(WARPS, heads, D, of_warp, finish);

  // The splits of the sequence: [SPLITS, most, D] sums, [SPLITS, most] largest scores, [SPLITS, most] totals.
  const int most = min(HEADS, group), number = sequence * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y);
  float* const sums_of_splits = workspace + static_cast<std::int64_t>(number) * SPLITS * most * (D + 2);
  float* const largest_of_splits = sums_of_splits + SPLITS * most * D;
  float* const total_of_splits = largest_of_splits + SPLITS * most;
  parts.add(WARPS, heads, D, of_warp, [&](int head, int first, const float(&joint)[VECTOR]) {
    store_vector(sums_of_splits + (split * most + head) * D + first, pack<float>(joint));
  });
  if (static_cast<int>(threadIdx.x) < heads) {
    const int head = static_cast<int>(threadIdx.x);
    largest_of_splits[split * most + head] = parts.joint_largest[head];
    total_of_splits[split * most + head] = parts.joint_total[head];
  }
  if (!is_last_block(counters + number, splits)) return;
  for (int i = static_cast<int>(threadIdx.x); i < splits * heads; i += THREADS) {
    const int part = i / heads, head = i % heads;
    parts.largest[part][head] = load_shared_by_blocks(largest_of_splits + part * most + head);
    parts.total[part][head] = load_shared_by_blocks(total_of_splits + part * most + head);
  }
  __syncthreads();
  parts.join(splits);
  parts.add(
      splits, heads, D,
      [&](int part, int head, int first) {
        const float* const place = sums_of_splits + (part * most + head) * D + first;
        return load_shared_by_blocks(reinterpret_cast<const uint4*>(place));
      },
      finish);
}

template <class T, int HEADS>
void launch_kernel(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                   std::uintptr_t stream) {
  const int group = args.Hq / args.Hkv, runs = (group + HEADS - 1) / HEADS;
  const dim3 grid(SPLITS, static_cast<unsigned>(args.Hkv * runs), static_cast<unsigned>(args.B));
  const std::size_t shared_bytes = sizeof(float) * WARPS * HEADS * static_cast<std::size_t>(args.D);
  launch(decode_attention_kernel<T, HEADS>, grid, dim3(THREADS), shared_bytes, stream, args, runs,
         reinterpret_cast<float*>(workspace), reinterpret_cast<int*>(counters));
}

// Kernels for groups of 1, up to 4, up to 7 and more: fewer to compile, and 7 is BAGEL's.
template <class T>
void launch_for(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                std::uintptr_t stream) {
  const int group = args.Hq / args.Hkv;
  const auto run = group == 1   ? launch_kernel<T, 1>
                   : group <= 4 ? launch_kernel<T, 4>
                   : group <= 7 ? launch_kernel<T, 7>
                                : launch_kernel<T, MAX_HEADS>;
  run(args, workspace, counters, stream);
}

}  // namespace

void decode_attention(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                      std::uintptr_t stream) {
  const auto describe = [&] {
    return text("decode_attention of [%d, %d, %d] queries over %d KV heads", args.B, args.Hq, args.D, args.Hkv);
  };
  const auto run = args.is_bfloat16 ? launch_for<bfloat16> : launch_for<float>;
  named(describe, [&] { run(args, workspace, counters, stream); });
}

}  // namespace bagel_rt
