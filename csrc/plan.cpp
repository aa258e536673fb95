#include "plan.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace bagel_rt {
namespace {

// The two key ranges of a row: the prefix, from key_start up to the row's limit, and the own span, which every row of
// the segment sees in full.
struct Spans {
  std::int64_t key_start, own_start, own_end;

  bool operator==(const Spans& other) const {
    return key_start == other.key_start && own_start == other.own_start && own_end == other.own_end;
  }
};

// Consecutive packed rows of one expert with the same spans.
struct Run {
  Spans spans;
  std::int64_t row_start, row_end;
};

// Whether the segment is stored elsewhere than directly after its visible context, so that each needs its own range.
bool is_detached(const Segment& segment) { return segment.write != segment.key_start + segment.visible; }

Spans spans_of(const Segment& segment) {
  if (!is_detached(segment)) return {segment.key_start, 0, 0};
  if (!segment.causal) return {segment.key_start, segment.write, segment.write + segment.rows};
  // A causal row sees the segment only up to itself. Only the prefix has a limit per row, so the segment becomes the
  // prefix. All rows see the context in full, so it becomes the own span.
  if (segment.visible == 0) return {segment.write, 0, 0};
  return {segment.write, segment.key_start, segment.key_start + segment.visible};
}

// Write rows [begin, end) of a segment to the packed rows that start at `packed`. `segment_row` is the index of the
// segment's first row before packing.
void fill_rows(const Segment& segment, std::int64_t begin, std::int64_t end, std::int64_t segment_row,
               std::int64_t packed, RowArrays rows) {
  const std::int64_t count = end - begin;
  std::iota(rows.order + packed, rows.order + packed + count, segment_row + begin);
  std::iota(rows.slots + packed, rows.slots + packed + count, segment.write + begin);
  std::int32_t* const limits = rows.limits + packed;
  if (segment.causal) {
    const std::int64_t seen = is_detached(segment) ? 0 : segment.visible;
    std::iota(limits, limits + count, static_cast<std::int32_t>(seen + begin + 1));
  } else {
    std::fill_n(limits, count, static_cast<std::int32_t>(segment.visible + (is_detached(segment) ? 0 : segment.rows)));
  }
}

void append_rows(std::vector<Run>& runs, const Spans& spans, std::int64_t row_start, std::int64_t row_end) {
  if (!runs.empty() && runs.back().spans == spans) {
    runs.back().row_end = row_end;
  } else {
    runs.push_back({spans, row_start, row_end});
  }
}

void append_blocks(std::vector<Block>& blocks, const Run& run, std::int64_t block_q, const std::int32_t* limits) {
  for (std::int64_t start = run.row_start; start < run.row_end;) {
    const std::int64_t end = start + std::min(block_q, run.row_end - start);
    std::int32_t least = limits[start], most = limits[start];
    for (std::int64_t row = start; row < end; ++row) {
      least = std::min(least, limits[row]);
      most = std::max(most, limits[row]);
    }
    const auto narrow = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    blocks.push_back({narrow(start), narrow(end), narrow(run.spans.key_start), least, most, narrow(run.spans.own_start),
                      narrow(run.spans.own_end)});
    start = end;
  }
}

}  // namespace

RowCounts count_rows(const std::vector<Segment>& segments) {
  RowCounts counts;
  for (const Segment& segment : segments) {
    counts.total += segment.rows;
    counts.gen += segment.rows - std::count(segment.gen, segment.gen + segment.rows, std::uint8_t{0});
  }
  return counts;
}

std::vector<Block> build_plan(const std::vector<Segment>& segments, RowCounts counts, std::int64_t block_q,
                              RowArrays rows) {
  // Index 0: the generation expert, 1: the understanding expert.
  std::array<std::int64_t, 2> next_packed = {0, counts.gen};
  std::array<std::vector<Run>, 2> runs;

  std::int64_t segment_row = 0;
  for (const Segment& segment : segments) {
    const Spans spans = spans_of(segment);
    for (std::int64_t begin = 0; begin < segment.rows;) {
      const bool is_und = segment.gen[begin] == 0;
      std::int64_t end = begin + 1;  // end of a run of rows of one expert
      while (end < segment.rows && (segment.gen[end] == 0) == is_und) ++end;

      const std::int64_t packed = next_packed[is_und];
      next_packed[is_und] += end - begin;
      fill_rows(segment, begin, end, segment_row, packed, rows);
      append_rows(runs[is_und], spans, packed, next_packed[is_und]);
      begin = end;
    }
    segment_row += segment.rows;
  }

  std::vector<Block> blocks;
  for (const std::vector<Run>& part : runs) {
    for (const Run& run : part) append_blocks(blocks, run, block_q, rows.limits);
  }
  return blocks;
}

}  // namespace bagel_rt
