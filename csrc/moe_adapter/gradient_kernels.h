// Gradients of one expert's weights, for per-instruction-set files: internal linkage.
//
// down_weight (R, D) is the sum over tokens of pre_r · x_d, up_weight (D, R) that of grad_d · (gate · scale · hidden_r). Tokens come in
// chunks that stay in cache; both products of a chunk follow each other, while the next chunk is fetched. The block of columns of D
// that one task works on never changes the order of a sum.
#pragma once

#include "common/convert.h"
#include "common/gemm.h"
#include "common/scalar.h"
#include "moe_adapter/arena.h"
#include "moe_adapter/cpu_kernels.h"

namespace clk {
namespace moe {
namespace {

constexpr int64_t kChunk = 112;            // tokens at most whose products are formed together
constexpr int64_t kWholeRun = 32;          // runs from this length on are cut into chunks of their own
constexpr int64_t kGradientColumns = 256;  // of D at most, per task

template <typename C>
struct GradientScratch {
  int64_t ldd, ldr;   // columns of a task in whole panels, R + 1 in whole vectors; one vector more spreads rows over the cache
  C *x, *grad;        // (kChunk, ldd), where they cannot be read in place
  C* pre;             // (kChunk, R), where it cannot be read in place
  C* hidden;          // (kChunk, ldr): times gate · scale, and that factor itself in column R
  C *down, *up;       // (R, ldd) and (R + 1, ldd): the last row is the gradient of up_bias
  C* down_bias;       // (R)

  GradientScratch(Arena& arena, const Problem& p)
      : ldd(padded<C>(p.width < kGradientColumns ? p.width : kGradientColumns) + kLanes<C>),
        ldr((p.rank / kLanes<C> + 1) * kLanes<C>),
        x(arena.take<C>(kChunk * ldd)),
        grad(arena.take<C>(kChunk * ldd)),
        pre(arena.take<C>(kChunk * p.rank)),
        hidden(arena.take<C>(kChunk * ldr)),
        down(arena.take<C>(p.rank * ldd)),
        up(arena.take<C>((p.rank + 1) * ldd)),
        down_bias(arena.take<C>(p.rank)) {}
};

// Walks over the rows of one expert, run after run.
template <typename T>
struct Cursor {
  const ExpertGradients& op;
  int64_t position, token;  // which run, and which of its tokens
  int64_t index;            // of (sample, slot, token) in (B, k, L)
  const T *x, *grad;

  Cursor(const ExpertGradients& op, int64_t i) : op(op), position(i / op.run), token(i % op.run) { locate(); }

  void advance() {
    if (++token < op.run) {
      ++index, x += op.x.token_stride, grad += op.grad.token_stride;
    } else {
      ++position, token = 0;
      if (position < op.count) locate();
    }
  }

  template <typename C>
  C weight() const {
    return static_cast<const C*>(op.gates)[index / op.length] * static_cast<C>(op.scale);
  }

  template <typename C>
  const C* grad_pre() const {
    return static_cast<const C*>(op.grad_pre) + (op.grad_pre_rows[position] + token) * op.rank;
  }

 private:
  void locate() {
    index = op.rows[position] + token;
    const int64_t sample = index / op.length / op.slots, row = index % op.length;
    x = static_cast<const T*>(op.x.data) + sample * op.x.sample_stride + row * op.x.token_stride;
    grad = static_cast<const T*>(op.grad.data) + sample * op.grad.sample_stride + row * op.grad.token_stride;
  }
};

// Where the rows of one expert are cut into chunks. Long runs never share one.
struct Chunks {
  int64_t run, total, pieces, count;
  bool whole;

  explicit Chunks(const ExpertGradients& op) : run(op.run), total(op.count * op.run), whole(op.run >= kWholeRun) {
    pieces = (run + kChunk - 1) / kChunk;
    count = whole ? op.count * pieces : (total + kChunk - 1) / kChunk;
  }
  int64_t begin(int64_t chunk) const {
    if (whole) return chunk / pieces * run + run * (chunk % pieces) / pieces;
    return chunk * kChunk < total ? chunk * kChunk : total;
  }
};

// Whether so many rows from `row` on lie evenly spaced, and how far apart.
template <typename T>
struct Spacing {
  int64_t x = 0, grad = 0;
  bool even = true;

  Spacing(Cursor<T> row, int64_t rows) {
    const T *first_x = row.x, *first_grad = row.grad;
    for (int64_t i = 1; i < rows && even; ++i) {
      row.advance();
      if (i == 1) x = row.x - first_x, grad = row.grad - first_grad;
      even = row.x - first_x == i * x && row.grad - first_grad == i * grad;
    }
  }
};

// Fetches the rows of x and grad from `cursor` on into the second-level cache, a few cache lines at a time.
template <typename T>
struct Ahead {
  Cursor<T> cursor;
  int64_t rows, first_column, lines, line = 0;

  void fetch(int64_t n) {
    for (; n > 0 && rows > 0; --n) {
      const int64_t column = first_column + line * (64 / static_cast<int64_t>(sizeof(T)));
      __builtin_prefetch(cursor.x + column, 0, 2);
      __builtin_prefetch(cursor.grad + column, 0, 2);
      if (++line == lines) {
        line = 0, --rows;
        cursor.advance();
      }
    }
  }
};

// C (m, n) (+)= Aᵀ B for A (K, m) and B (K, n), n a multiple of the panel width.
template <typename C, typename Step>
void add_transposed_product(int64_t m, int64_t n, int64_t K, Matrix<C> a, Matrix<C> b, C* c, int64_t ldc, bool accumulate, Step step) {
  const int64_t width = panel_width<C>(n), tiles = (m + kTileRows - 1) / kTileRows;
  for (int64_t panel = 0; panel < n; panel += width) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = m * t / tiles;
      const int rows = static_cast<int>(m * (t + 1) / tiles - first);
      multiply_panel<C, true>(rows, a.data + first, a.ld, b.data + panel, b.ld, K, width, c + first * ldc + panel, ldc, accumulate);
      step();
    }
  }
}

// to (n) = from, or += from.
template <typename C>
void pass_on(const C* from, int64_t n, C* to, bool add) {
  if (!add) return convert(from, n, to);
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template <typename T>
void gradient(const ExpertGradients& op, int64_t first_column, int64_t columns, void* memory) {
  using C = compute_t<T>;
  Arena arena{static_cast<char*>(memory)};
  const GradientScratch<C> s(arena, op);
  const int64_t rank = op.rank, n = padded<C>(columns), tiles = 2 * (rank / kTileRows + 1) * (n / panel_width<C>(n));
  const int64_t lines = (columns * static_cast<int64_t>(sizeof(T)) + 63) / 64;
  for (int64_t r = 0; r < rank; ++r) s.down_bias[r] = C(0);

  const Chunks chunks(op);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t start = chunks.begin(chunk), rows = chunks.begin(chunk + 1) - start;
    Cursor<T> row(op, start);
    Matrix<C> x{s.x, s.ldd}, grad{s.grad, s.ldd}, pre{s.pre, rank};
    bool in_place = false;
    if constexpr (sizeof(T) == sizeof(C)) {
      const Spacing<T> apart(row, columns == n ? rows : 0);
      in_place = columns == n && apart.even;
      if (in_place) {
        x = {row.x + first_column, apart.x};
        grad = {row.grad + first_column, apart.grad};
      }
    }
    if (chunks.whole) pre.data = row.template grad_pre<C>();
    for (int64_t i = 0; i < rows; ++i, row.advance()) {
      const C weight = row.template weight<C>();
      const C* grad_pre = row.template grad_pre<C>();
      if (!in_place) {
        C *x_row = s.x + i * s.ldd, *grad_row = s.grad + i * s.ldd;
        convert(row.x + first_column, columns, x_row);
        convert(row.grad + first_column, columns, grad_row);
        for (int64_t d = columns; d < n; ++d) x_row[d] = grad_row[d] = C(0);
      }
      if (!chunks.whole) convert(grad_pre, rank, s.pre + i * rank);
      C* hidden = s.hidden + i * s.ldr;
      convert(static_cast<const T*>(op.hidden) + row.index * rank, rank, hidden);
      for (int64_t r = 0; r < rank; ++r) hidden[r] *= weight;
      hidden[rank] = weight;
      if (first_column == 0) {
        for (int64_t r = 0; r < rank; ++r) s.down_bias[r] += grad_pre[r];
      }
    }
    const int64_t after = chunk + 1 < chunks.count ? chunks.begin(chunk + 2) - start - rows : 0;
    Ahead<T> ahead{row, after, first_column, lines};
    const int64_t share = (after * lines + tiles - 1) / tiles;
    const auto step = [&] { ahead.fetch(share); };
    add_transposed_product(rank, n, rows, pre, x, s.down, s.ldd, chunk > 0, step);
    add_transposed_product(rank + 1, n, rows, Matrix<C>{s.hidden, s.ldr}, grad, s.up, s.ldd, chunk > 0, step);
  }

  const bool add = !op.first;
  C* down = static_cast<C*>(op.down_weight) + first_column;
  C* up = static_cast<C*>(op.up_weight) + first_column * rank;
  for (int64_t r = 0; r < rank; ++r) pass_on(s.down + r * s.ldd, columns, down + r * op.width, add);
  if (add) {
    transposed_copy<true>(s.up, s.ldd, rank, columns, up, rank);
  } else {
    transposed_copy(s.up, s.ldd, rank, columns, up, rank);
  }
  pass_on(s.up + rank * s.ldd, columns, static_cast<C*>(op.up_bias) + first_column, add);
  if (first_column == 0) pass_on(s.down_bias, rank, static_cast<C*>(op.down_bias), add);
}

}  // namespace
}  // namespace moe
}  // namespace clk
