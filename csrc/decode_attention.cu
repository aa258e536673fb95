// Attention of one query row per sequence (split-KV). Reference: kernels/decode_attention.py.
//
// The keys of a sequence are split over blocks in a way that depends only on the sequence length. A block processes a
// head tile: up to 8 query heads that share a KV head. Within a block, D / WIDTH<T> lanes form a lane group that
// processes one key at a time: each lane loads 16 bytes of the key and uses them for all query heads of the tile.
// Partial softmaxes are combined on three levels: the lane groups of a warp by shuffles, the warps of a block through
// shared memory, and the splits of a sequence through the workspace, by the block that finishes last.
#include "decode.h"
#include "device.h"

namespace bagel_rt {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int MAX_SPLITS = 32;      // blocks per sequence and head tile
constexpr int KEYS_IN_FLIGHT = 4;   // keys per lane group
constexpr int MIN_SPLIT_KEYS = 64;  // per block: the keys in flight of a block with D = 128 in bfloat16
constexpr int MAX_HEADS = 8;        // query heads per block
constexpr int OUT_CHANNELS = 4;     // output channels per thread when partial results are combined

// Value to subtract from scores before exp2: the running maximum, or 0 while it is -inf, since -inf - -inf is NaN.
__device__ float softmax_base(float largest) { return largest == -INFINITY ? 0.0f : largest; }

__device__ std::int64_t load_bound(std::uintptr_t bounds, bool wide, int sequence) {
  return wide ? reinterpret_cast<const std::int64_t*>(bounds)[sequence]
              : reinterpret_cast<const std::int32_t*>(bounds)[sequence];
}

// Statistics of softmaxes over disjoint parts of the keys: the largest score of each part, and its sum of
// exp2(score - largest).
template <int HEADS>
struct PartialSoftmaxes {
  float largest[MAX_SPLITS][HEADS], total[MAX_SPLITS][HEADS];
  float weight[MAX_SPLITS][HEADS];  // exp2(largest - combined_largest)
  float combined_largest[HEADS], combined_total[HEADS];

  // Compute the weights and the combined statistics. All threads must call it, after a barrier behind the writes of
  // `largest` and `total`.
  __device__ void combine(int parts) {
    const int thread = static_cast<int>(threadIdx.x), part = thread / HEADS, head = thread % HEADS;
    if (part < parts) {
      float new_largest = -INFINITY;
      for (int other = 0; other < parts; ++other) new_largest = fmaxf(new_largest, largest[other][head]);
      weight[part][head] = exp2f(largest[part][head] - softmax_base(new_largest));
      if (part == 0) combined_largest[head] = new_largest;
    }
    __syncthreads();
    if (part == 0) {
      float sum = 0.0f;
      for (int other = 0; other < parts; ++other) sum += weight[other][head] * total[other][head];
      combined_total[head] = sum;
    }
    __syncthreads();
  }

  // Call store(head, channel, sums) with the sums over parts, in order, of weight * load(part, head, channel), for
  // OUT_CHANNELS channels at a time.
  template <class Load, class Store>
  __device__ void add(int parts, int heads, int D, const Load& load, const Store& store) const {
    const int step = THREADS * OUT_CHANNELS;
    for (int element = static_cast<int>(threadIdx.x) * OUT_CHANNELS; element < heads * D; element += step) {
      const int head = element / D, channel = element % D;
      float sums[OUT_CHANNELS] = {};
#pragma unroll 8
      for (int part = 0; part < parts; ++part) {
        float values[OUT_CHANNELS];
        unpack<float>(load(part, head, channel), values);
#pragma unroll
        for (int i = 0; i < OUT_CHANNELS; ++i) sums[i] += weight[part][head] * values[i];
      }
      store(head, channel, sums);
    }
  }
};
static_assert(MAX_SPLITS * MAX_HEADS <= THREADS && WARPS <= MAX_SPLITS);

// Block (s, i, b) processes split s of sequence b for head tile i: at most HEADS query heads that share a KV head.
template <class T, int HEADS>
__global__ void __launch_bounds__(THREADS, 1)
    decode_attention_kernel(DecodeAttentionArgs args, int head_tiles, float* workspace, int* counters) {
  trigger_next_kernel();
  wait_for_previous_kernel();
  const int split = static_cast<int>(blockIdx.x), sequence = static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y) / head_tiles, head_tile = static_cast<int>(blockIdx.y) % head_tiles;
  const int group = args.Hq / args.Hkv, heads = min(HEADS, group - head_tile * HEADS), D = args.D;
  const std::int64_t first_head = kv_head * group + head_tile * HEADS;
  T* const out = reinterpret_cast<T*>(args.out) + (static_cast<std::int64_t>(sequence) * args.Hq + first_head) * D;

  const int length = static_cast<int>(load_bound(args.lengths, args.wide_lengths, sequence));
  const int keys_of_split = max(MIN_SPLIT_KEYS, (length + MAX_SPLITS - 1) / MAX_SPLITS);
  const int splits = (length + keys_of_split - 1) / keys_of_split;
  if (length <= 0 && split == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < heads * D; i += THREADS) out[i] = from_float<T>(0.0f);
  }
  if (split >= splits) return;
  const int count = min(keys_of_split, length - split * keys_of_split);
  const std::int64_t first_slot = load_bound(args.starts, args.wide_starts, sequence) + split * keys_of_split;

  const int lanes = D / WIDTH<T>;  // per lane group
  const int channel = static_cast<int>(threadIdx.x) % lanes * WIDTH<T>;
  const int key_group = static_cast<int>(threadIdx.x) / lanes, key_groups = THREADS / lanes;
  const std::int64_t k_step = key_groups * args.k_slot, v_step = key_groups * args.v_slot;
  const T* k =  // next key to prefetch; a lane group takes every key_groups-th key
      reinterpret_cast<const T*>(args.k) + (first_slot + key_group) * args.k_slot + kv_head * args.k_head + channel;
  const T* v =
      reinterpret_cast<const T*>(args.v) + (first_slot + key_group) * args.v_slot + kv_head * args.v_head + channel;

  float q[HEADS][WIDTH<T>], sums[HEADS][WIDTH<T>] = {}, total[HEADS] = {}, largest[HEADS];
#pragma unroll
  for (int head = 0; head < HEADS; ++head) {
    largest[head] = -INFINITY;
    const std::int64_t element = sequence * args.q_row + (first_head + head) * args.q_head + channel;
    const uint4 words =
        head < heads ? load_vector(reinterpret_cast<const T*>(args.q) + element) : make_uint4(0, 0, 0, 0);
    unpack<T>(words, q[head]);
#pragma unroll
    for (int i = 0; i < WIDTH<T>; ++i) q[head][i] *= args.scale_log2;
  }

  // Software pipeline: values are loaded while their keys are multiplied, and the next keys while these values are
  // used.
  uint4 k_words[KEYS_IN_FLIGHT], v_words[KEYS_IN_FLIGHT];
  const auto prefetch = [&](uint4(&words)[KEYS_IN_FLIGHT], const T*& from, std::int64_t step, int begin) {
#pragma unroll
    for (int i = 0; i < KEYS_IN_FLIGHT; ++i, from += step) {
      words[i] = begin + i * key_groups + key_group < count ? load_once(from) : make_uint4(0, 0, 0, 0);
    }
  };
  prefetch(k_words, k, k_step, 0);
  for (int begin = 0; begin < count; begin += key_groups * KEYS_IN_FLIGHT) {  // uniform trip count: shuffles below
    prefetch(v_words, v, v_step, begin);
    float scores[KEYS_IN_FLIGHT][HEADS];
#pragma unroll
    for (int i = 0; i < KEYS_IN_FLIGHT; ++i) {
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
    prefetch(k_words, k, k_step, begin + key_groups * KEYS_IN_FLIGHT);
#pragma unroll 1
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < KEYS_IN_FLIGHT; ++i) {
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
          scores[i][head] += __shfl_xor_sync(ALL_LANES, scores[i][head], offset);
        }
      }
    }
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      float new_largest = largest[head];
#pragma unroll
      for (int i = 0; i < KEYS_IN_FLIGHT; ++i) {
        if (begin + i * key_groups + key_group >= count) scores[i][head] = -INFINITY;
        new_largest = fmaxf(new_largest, scores[i][head]);
      }
      const float base = softmax_base(new_largest), rescale = exp2f(largest[head] - base);
      largest[head] = new_largest;
      total[head] *= rescale;
#pragma unroll
      for (int j = 0; j < WIDTH<T>; ++j) sums[head][j] *= rescale;
#pragma unroll
      for (int i = 0; i < KEYS_IN_FLIGHT; ++i) {
        scores[i][head] = exp2f(scores[i][head] - base);
        total[head] += scores[i][head];
      }
    }
#pragma unroll
    for (int i = 0; i < KEYS_IN_FLIGHT; ++i) {
      float values[WIDTH<T>];
      unpack<T>(v_words[i], values);
#pragma unroll
      for (int head = 0; head < HEADS; ++head) {
#pragma unroll
        for (int j = 0; j < WIDTH<T>; ++j) sums[head][j] += scores[i][head] * values[j];
      }
    }
  }

  // Combine the lane groups of a warp.
#pragma unroll 1
  for (int offset = lanes; offset < WARP; offset *= 2) {
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      const float other = __shfl_xor_sync(ALL_LANES, largest[head], offset);
      const float new_largest = fmaxf(largest[head], other), base = softmax_base(new_largest);
      const float mine = exp2f(largest[head] - base), theirs = exp2f(other - base);
      largest[head] = new_largest;
      total[head] = mine * total[head] + theirs * __shfl_xor_sync(ALL_LANES, total[head], offset);
#pragma unroll
      for (int j = 0; j < WIDTH<T>; ++j) {
        sums[head][j] = mine * sums[head][j] + theirs * __shfl_xor_sync(ALL_LANES, sums[head][j], offset);
      }
    }
  }

  // Combine the warps of the block.
  __shared__ PartialSoftmaxes<HEADS> parts;
  DYNAMIC_SHARED(float, sums_of_warps);  // [WARPS, HEADS, D]
  const int warp = static_cast<int>(threadIdx.x) / WARP;
  if (static_cast<int>(threadIdx.x) % WARP < lanes) {
#pragma unroll
    for (int head = 0; head < HEADS; ++head) {
      if (channel == 0) {
        parts.largest[warp][head] = largest[head];
        parts.total[warp][head] = total[head];
      }
      float* const element = sums_of_warps + (warp * HEADS + head) * D + channel;
#pragma unroll
      for (int j = 0; j < WIDTH<T>; j += OUT_CHANNELS) {
        const float (&s)[WIDTH<T>] = sums[head];
        store_vector(element + j, pack<float>({s[j], s[j + 1], s[j + 2], s[j + 3]}));
      }
    }
  }
  __syncthreads();
  parts.combine(WARPS);
  const auto of_warp = [&](int part, int head, int first) {
    return load_vector(sums_of_warps + (part * HEADS + head) * D + first);
  };
  const auto finish = [&](int head, int first, const float (&combined)[OUT_CHANNELS]) {
#pragma unroll
    for (int i = 0; i < OUT_CHANNELS; ++i) {
      out[head * D + first + i] = from_float<T>(combined[i] / parts.combined_total[head]);
    }
  };
  if (splits == 1) return parts.add(WARPS, heads, D, of_warp, finish);

  // Combine the splits of the sequence. Workspace of a head tile: sums [MAX_SPLITS, tile_heads, D], then largest scores
  // and totals [MAX_SPLITS, tile_heads] each.
  const int tile_heads = min(HEADS, group);
  const int number = sequence * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y);
  float* const sums_of_splits = workspace + static_cast<std::int64_t>(number) * MAX_SPLITS * tile_heads * (D + 2);
  float* const largest_of_splits = sums_of_splits + MAX_SPLITS * tile_heads * D;
  float* const total_of_splits = largest_of_splits + MAX_SPLITS * tile_heads;
  parts.add(WARPS, heads, D, of_warp, [&](int head, int first, const float (&combined)[OUT_CHANNELS]) {
    store_vector(sums_of_splits + (split * tile_heads + head) * D + first, pack<float>(combined));
  });
  if (static_cast<int>(threadIdx.x) < heads) {
    const int head = static_cast<int>(threadIdx.x);
    largest_of_splits[split * tile_heads + head] = parts.combined_largest[head];
    total_of_splits[split * tile_heads + head] = parts.combined_total[head];
  }
  if (!is_last_block(counters + number, splits)) return;
  for (int i = static_cast<int>(threadIdx.x); i < splits * heads; i += THREADS) {
    const int part = i / heads, head = i % heads;
    parts.largest[part][head] = load_from_l2(largest_of_splits + part * tile_heads + head);
    parts.total[part][head] = load_from_l2(total_of_splits + part * tile_heads + head);
  }
  __syncthreads();
  parts.combine(splits);
  parts.add(
      splits, heads, D,
      [&](int part, int head, int first) {
        const float* const element = sums_of_splits + (part * tile_heads + head) * D + first;
        return load_from_l2(reinterpret_cast<const uint4*>(element));
      },
      finish);
}

template <class T, int HEADS>
void launch_kernel(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                   std::uintptr_t stream) {
  const int group = args.Hq / args.Hkv, head_tiles = (group + HEADS - 1) / HEADS;
  const dim3 grid(MAX_SPLITS, static_cast<unsigned>(args.Hkv * head_tiles), static_cast<unsigned>(args.B));
  const std::size_t shared_bytes = sizeof(float) * WARPS * HEADS * static_cast<std::size_t>(args.D);
  launch(decode_attention_kernel<T, HEADS>, grid, dim3(THREADS), shared_bytes, stream, args, head_tiles,
         reinterpret_cast<float*>(workspace), reinterpret_cast<int*>(counters));
}

// Instantiations for 1, up to 4, up to 7 and up to 8 query heads per KV head limit compile time; 7 is BAGEL's.
template <class T>
void launch_for(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                std::uintptr_t stream) {
  const int group = args.Hq / args.Hkv;
  const auto head_tile = group == 1   ? launch_kernel<T, 1>
                         : group <= 4 ? launch_kernel<T, 4>
                         : group <= 7 ? launch_kernel<T, 7>
                                      : launch_kernel<T, MAX_HEADS>;
  head_tile(args, workspace, counters, stream);
}

}  // namespace

void decode_attention(const DecodeAttentionArgs& args, std::uintptr_t workspace, std::uintptr_t counters,
                      std::uintptr_t stream) {
  const auto describe = [&] {
    return format_string("decode_attention of [%d, %d, %d] queries over %d KV heads", args.B, args.Hq, args.D,
                         args.Hkv);
  };
  const auto head_tile = args.is_bfloat16 ? launch_for<bfloat16> : launch_for<float>;
  with_context(describe, [&] { head_tile(args, workspace, counters, stream); });
}

}  // namespace bagel_rt
