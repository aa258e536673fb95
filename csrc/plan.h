// Plan of one packed forward, built on the host. Rules and numpy reference: bagel_rt/runtime/plan.py.
#pragma once

#include <cstdint>
#include <vector>

namespace bagel_rt {

// Consecutive tokens of one kind in one context. The caller has checked that rows > 0, that nothing is negative, and
// that every slot fits in 32 bits.
struct Segment {
  bool causal;              // row i attends to the segment's rows up to i; otherwise to all of them
  const std::uint8_t* gen;  // nonzero for rows of the generation expert
  std::int64_t rows;
  std::int64_t key_start;
  std::int64_t visible;
  std::int64_t write;
};

// A query block: at most block_q packed rows of one expert with the same spans. A row of the array returned to Python.
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

// Per-row outputs of the plan. The caller owns the arrays of `total` elements each.
struct RowArrays {
  std::int64_t* order;
  std::int32_t* limits;
  std::int64_t* slots;
};

// Fill `rows` and return the query blocks; block_q >= 1.
std::vector<Block> build_plan(const std::vector<Segment>& segments, RowCounts counts, std::int64_t block_q,
                              RowArrays rows);

}  // namespace bagel_rt
