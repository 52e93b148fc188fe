#include "moe_adapter/cpu_tiles.h"

#include <algorithm>

namespace clk {
namespace moe {
namespace {

// Samples shorter than this are handled token by token, gathered by expert: their tiles would be nearly empty.
constexpr int64_t kShortSample = 4;
constexpr int64_t kGrainWork = 1 << 20;  // multiply-adds that are worth a thread
constexpr int64_t kLargestPiece = 4;     // times as many rows as asked for; beyond that, whole passes

// Choices of experts over all slots, ids out of range as one expert more; at most a large number.
int64_t combinations(const Shape& s) {
  int64_t keys = 1;
  for (int64_t j = 0; j < s.slots && keys < (int64_t{1} << 31); ++j) keys *= s.experts + 1;
  return keys;
}

}  // namespace

Tiles::Tiles(const Shape& s, const int64_t* ids) : shape_(s), expert_ids_(ids), gathered_(s.length < kShortSample) {
  const int64_t rows = CLK_CALL(tile_rows);
  grain_ = std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, rows * s.width * s.rank * (gathered_ ? 1 : s.slots)));
  if (!gathered_) {
    tiles_per_sample_ = (s.length + rows - 1) / rows;
    passes_ = {{0, s.batch * tiles_per_sample_}};
    return;
  }
  const int64_t slots = std::max<int64_t>(s.slots, 1);  // without a single slot, one pass still hands the residual on
  Grouping apart;
  for (int64_t j = 0; j < slots; ++j) apart.append(s, ids, j, std::min(j + 1, s.slots), rows);
  // Groups by the experts of all slots read and write every row once. They are smaller, and leave more tiles unfinished.
  std::optional<Grouping> together;
  if (s.slots > 1 && combinations(s) <= s.batch) {
    together.emplace();
    together->append(s, ids, 0, s.slots, rows);
  }
  grouping_ = together && 8 * s.slots * together->tiles() <= 9 * apart.tiles() ? std::move(*together) : std::move(apart);
  for (size_t i = 0; i + 1 < grouping_.passes.size(); ++i) passes_.push_back({grouping_.passes[i], grouping_.passes[i + 1]});
}

void Grouping::append(const Shape& s, const int64_t* ids, int64_t first_slot, int64_t end_slot, int64_t rows) {
  const int64_t total = s.batch * s.length;
  int64_t keys = 1;
  for (int64_t j = first_slot; j < end_slot; ++j) keys *= s.experts + 1;
  std::vector<int64_t> chosen(static_cast<size_t>(end_slot - first_slot));
  const auto key_of = [&](int64_t sample) {
    for (int64_t j = first_slot; j < end_slot; ++j) {
      chosen[static_cast<size_t>(j - first_slot)] = known_expert(s.experts, ids[sample * s.slots + j]);
    }
    std::sort(chosen.begin(), chosen.end());
    int64_t key = 0;
    for (int64_t e : chosen) key = key * (s.experts + 1) + e;
    return static_cast<size_t>(key);
  };
  std::vector<int64_t> begin(static_cast<size_t>(keys) + 1);
  for (int64_t b = 0; b < s.batch; ++b) begin[key_of(b) + 1] += s.length;
  for (size_t key = 1; key < begin.size(); ++key) begin[key] += begin[key - 1];
  const size_t start = order.size();
  order.resize(start + static_cast<size_t>(total));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t b = 0; b < s.batch; ++b) {
    int64_t& position = next[key_of(b)];
    for (int64_t l = 0; l < s.length; ++l) order[start + static_cast<size_t>(position++)] = b * s.length + l;
  }
  for (size_t key = 0; key + 1 < begin.size(); ++key) {
    for (int64_t i = begin[key]; i < begin[key + 1]; i += rows) {
      const int64_t end = std::min(i + rows, begin[key + 1]);
      Tile tile{};
      tile.rows = end - i;
      tile.first = static_cast<int64_t>(start) + i;
      tile.first_slot = first_slot;
      tile.end_slot = end_slot;
      tile.opens = first_slot == 0;
      tile.closes = end_slot == s.slots;
      tile.following = std::min(rows, total - end);
      entries.push_back(tile);
    }
  }
  passes.push_back(tiles());
}

Tile Tiles::tile(int64_t i) const {
  if (gathered_) {
    Tile tile = grouping_.entries[static_cast<size_t>(i)];
    tile.gathered = grouping_.order.data() + tile.first;
    return tile;
  }
  const int64_t sample = i / tiles_per_sample_, t = i % tiles_per_sample_;
  const int64_t first = shape_.length * t / tiles_per_sample_;
  return {shape_.length * (t + 1) / tiles_per_sample_ - first, sample, first, nullptr, 0, shape_.slots, true, true, 0};
}

std::vector<Piece> Tiles::gathered_pieces(int64_t rows) const {
  std::vector<Piece> found;
  for (const Piece& pass : passes_) {
    int64_t held = 0;
    for (int64_t i = pass.first; i < pass.end; ++i) {
      const int64_t more = grouping_.entries[static_cast<size_t>(i)].rows;
      if (held == 0 || held + more > rows) {
        found.push_back({i, i});
        held = 0;
      }
      held += more;
      ++found.back().end;
    }
  }
  return found;
}

// How often an expert's gradients are taken up, over all pieces.
int64_t Tiles::visits(const std::vector<Piece>& pieces) const {
  int64_t found = 0;
  std::vector<size_t> last(static_cast<size_t>(shape_.experts), pieces.size());
  for (size_t p = 0; p < pieces.size(); ++p) {
    for (int64_t i = pieces[p].first; i < pieces[p].end; ++i) {
      const Tile tile = this->tile(i);
      const int64_t* ids = expert_ids_ + tile.gathered[0] / shape_.length * shape_.slots;
      for (int64_t j = tile.first_slot; j < tile.end_slot; ++j) {
        const int64_t e = known_expert(shape_.experts, ids[j]);
        if (e < shape_.experts && std::exchange(last[static_cast<size_t>(e)], p) != p) ++found;
      }
    }
  }
  return found;
}

std::vector<Piece> Tiles::pieces(int64_t rows) const {
  rows = std::max<int64_t>(rows, 1);
  if (gathered_) {
    // A visit reads and writes both weights of an expert, 2 R rows; it must bring at least as many.
    const int64_t worth = shape_.batch * shape_.length * shape_.slots / std::max<int64_t>(1, 2 * shape_.rank);
    for (int64_t larger = 1; larger <= kLargestPiece; larger *= 2) {
      std::vector<Piece> found = gathered_pieces(larger * rows);
      if (visits(found) <= worth) return found;
    }
    return passes_;
  }
  const int64_t samples = std::clamp<int64_t>(rows / std::max<int64_t>(1, shape_.length), 1, std::max<int64_t>(1, shape_.batch));
  std::vector<Piece> found;
  for (int64_t first = 0; first < shape_.batch; first += samples) {
    found.push_back({first * tiles_per_sample_, std::min(first + samples, shape_.batch) * tiles_per_sample_});
  }
  return found;
}

int64_t Tiles::bottleneck_rows(Piece piece) const {
  if (piece.first == piece.end) return 0;
  if (!gathered_) return (piece.end - piece.first) / tiles_per_sample_ * shape_.slots * shape_.length;
  const Tile &first = grouping_.entries[static_cast<size_t>(piece.first)], &last = grouping_.entries[static_cast<size_t>(piece.end) - 1];
  return (last.first + last.rows - first.first) * (first.end_slot - first.first_slot);
}

int64_t Tiles::first_row(Piece piece) const {
  if (piece.first == piece.end) return 0;
  if (gathered_) return grouping_.entries[static_cast<size_t>(piece.first)].first;
  return piece.first / tiles_per_sample_ * shape_.slots * shape_.length;
}

// Calls `visit(expert, row, grad_pre)` for every run of a piece whose expert exists, as Choices has them.
template <typename Visit>
void Tiles::for_each_run(Piece piece, Visit visit) const {
  const int64_t origin = first_row(piece), slots = shape_.slots, length = shape_.length;
  if (!gathered_) {
    for (int64_t pair = piece.first / tiles_per_sample_ * slots; pair < piece.end / tiles_per_sample_ * slots; ++pair) {
      const int64_t e = known_expert(shape_.experts, expert_ids_[pair]);
      if (e < shape_.experts) visit(e, pair * length, pair * length - origin);
    }
    return;
  }
  std::vector<int64_t> order(static_cast<size_t>(slots));
  for (int64_t i = piece.first; i < piece.end; ++i) {
    const Tile tile = this->tile(i);
    const int64_t run = tile.end_slot - tile.first_slot;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t sample = tile.gathered[r] / length, token = tile.gathered[r] % length;
      const int64_t* ids = expert_ids_ + sample * slots;
      order_slots(shape_.experts, ids, tile, order.data(), 1);
      for (int64_t a = 0; a < run; ++a) {
        const int64_t slot = order[static_cast<size_t>(a)], e = known_expert(shape_.experts, ids[slot]);
        if (e < shape_.experts) visit(e, (sample * slots + slot) * length + token, gathered_row(tile, origin, r, a));
      }
    }
  }
}

Choices Tiles::choices(Piece piece) const {
  std::vector<int64_t> next(static_cast<size_t>(shape_.experts));
  for_each_run(piece, [&](int64_t e, int64_t, int64_t) { ++next[static_cast<size_t>(e)]; });
  Choices found{gathered_ ? 1 : shape_.length, {}, {0}, {}, {}};
  for (int64_t e = 0; e < shape_.experts; ++e) {
    const int64_t count = std::exchange(next[static_cast<size_t>(e)], found.begin.back());
    if (count == 0) continue;
    found.experts.push_back(e);
    found.begin.push_back(found.begin.back() + count);
  }
  found.rows.resize(static_cast<size_t>(found.begin.back()));
  found.grad_pre.resize(found.rows.size());
  for_each_run(piece, [&](int64_t e, int64_t row, int64_t grad_pre) {
    const size_t at = static_cast<size_t>(next[static_cast<size_t>(e)]++);
    found.rows[at] = row;
    found.grad_pre[at] = grad_pre;
  });
  return found;
}

}  // namespace moe
}  // namespace clk
