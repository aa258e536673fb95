// The plan of one packed forward, on the host. The rules, and the same in numpy: bagel_rt/runtime/plan.py.
#pragma once

#include <cstdint>
#include <vector>

namespace bagel_rt {

// A run of tokens of one kind in one context. The caller has checked that it has rows, that nothing is negative, and that
// every slot fits in 32 bits.
struct Segment {
  bool causal;              // row i sees the segment's rows up to i; otherwise all of them
  const std::uint8_t* gen;  // nonzero where the generation expert takes the row
  std::int64_t rows;
  std::int64_t key_start;
  std::int64_t visible;
  std::int64_t write;
};

// At most block_q packed rows of one expert with the same spans. A row of the array that Python sees.
struct Block {
  std::int32_t row_start, row_end;
  std::int32_t key_start, full_end, part_end;
  std::int32_t own_start, own_end;
};
static_assert(sizeof(Block) == 7 * sizeof(std::int32_t));

struct RowCounts {
  std::int64_t gen = 0;
  std::int64_t total = 0;
};

RowCounts count_rows(const std::vector<Segment>& segments);

// What the plan says of each packed row. The caller owns the arrays, `total` elements each.
struct RowArrays {
  std::int64_t* order;
  std::int32_t* limits;
  std::int64_t* slots;
};

// Fills `rows` and returns the query blocks; block_q is at least 1.
std::vector<Block> build_plan(const std::vector<Segment>& segments, RowCounts counts, std::int64_t block_q,
                              RowArrays rows);

}  // namespace bagel_rt
