// How the work on the CPU is cut: rows of tokens into tiles that choose the same experts, and tiles into pieces, small enough that the
// second half of the backward pass finds in cache what the first has read.
#pragma once

#include "moe_adapter/cpu_driver.h"

namespace clk {
namespace moe {

// Rows that choose the same experts in some slots, one run of slots after another, cut into tiles.
struct Grouping {
  std::vector<int64_t> order;         // linear token indices, group after group
  std::vector<Tile> entries;          // `first` is where the rows start in `order`
  std::vector<int64_t> passes = {0};  // first tile of every run of slots, and the end

  // Groups all rows by their experts in the slots from first_slot to end_slot.
  void append(const Shape& shape, const int64_t* expert_ids, int64_t first_slot, int64_t end_slot, int64_t rows);
  int64_t tiles() const { return static_cast<int64_t>(entries.size()); }
};

// Tiles from first to end, of one pass over the slots.
struct Piece {
  int64_t first, end;
};

// What each expert was given in a piece: runs of `run` rows of (B, k, L), in the order in which they are summed.
struct Choices {
  int64_t run;
  std::vector<int64_t> experts, begin;   // who was chosen, and where its runs begin in the other two; the end comes last
  std::vector<int64_t> rows, grad_pre;   // where each run starts in (B, k, L), and where its rows of grad_pre do
};

// The tiles of a batch; for tokens routed one by one, slot after slot.
class Tiles {
 public:
  Tiles(const Shape& shape, const int64_t* expert_ids);  // which must outlive them
  // Whether rows are visited once per slot, so that 16-bit results need `sums` between the visits.
  bool revisits() const { return passes_.size() > 1; }

  // All tiles, in the order in which they must be worked through.
  const std::vector<Piece>& passes() const { return passes_; }
  // The same in pieces of about so many rows; larger ones where small ones would visit experts for a few tokens each.
  std::vector<Piece> pieces(int64_t rows) const;
  // Of grad_pre: how many rows belong to a piece, and what Backward::first_row is for it.
  int64_t bottleneck_rows(Piece piece) const;
  int64_t first_row(Piece piece) const;
  Choices choices(Piece piece) const;

  // Calls `run(tile, scratch)` for the tiles of a piece, in parallel.
  template <typename Run>
  void for_each(const Problem& problem, Piece piece, Run run) const {
    const int64_t bytes = CLK_CALL(tile_scratch, problem);
    torch::stable::parallel_for(piece.first, piece.end, grain_, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(bytes) + 64]);
      char* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
      for (int64_t i = begin; i < end; ++i) run(tile(i), scratch);
    });
  }

 private:
  Tile tile(int64_t i) const;
  std::vector<Piece> gathered_pieces(int64_t rows) const;
  int64_t visits(const std::vector<Piece>& pieces) const;
  template <typename Visit>
  void for_each_run(Piece piece, Visit visit) const;

  Shape shape_;
  const int64_t* expert_ids_;
  bool gathered_;
  int64_t tiles_per_sample_ = 0, grain_ = 1;
  Grouping grouping_;  // of gathered rows
  std::vector<Piece> passes_;
};

}  // namespace moe
}  // namespace clk
