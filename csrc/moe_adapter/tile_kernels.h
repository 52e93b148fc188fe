// Forward and backward pass over one tile of tokens, for per-instruction-set files: internal linkage.
#pragma once

#include "common/philox.h"
#include "moe_adapter/tile_rows.h"

namespace clk {
namespace moe {
namespace {

// Calls `body(a, slot, e, valid)` for every expert of the tile, the a-th of them; row i has it in slot[i].
template <typename C, typename Body>
void for_each_expert(const Problem& p, const Tile& t, const Rows& rows, const Scratch<C>& s, Body body) {
  for (int64_t i = 0; i < rows.n; ++i) {
    const int64_t* ids = p.expert_ids + rows.sample[i] * p.slots;
    order_slots(p.experts, ids, t, s.slot + i, kTileRows);
  }
  for (int64_t a = 0; a < t.end_slot - t.first_slot; ++a) {
    const int64_t* slot = s.slot + a * kTileRows;
    const int64_t e = p.expert_ids[rows.sample[0] * p.slots + slot[0]];
    body(a, slot, e, e >= 0 && e < p.experts);
  }
}

template <typename T>
void forward(const Forward& op, const Tile& t, void* memory) {
  using C = compute_t<T>;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<C> s(arena, op);
  const Rows rows(op, t);
  const Matrix<C> x = compute_rows<T, C>(op.x, t, rows, op.width, s.rows);
  const C* gates = static_cast<const C*>(op.gates);
  T* hidden = static_cast<T*>(op.hidden);
  const C grown = static_cast<C>(1.0 / (1.0 - op.dropout_p));
  const float p = static_cast<float>(op.dropout_p);
  int64_t active = 0;
  for_each_expert(op, t, rows, s, [&](int64_t, const int64_t* slot, int64_t e, bool valid) {
    if (!valid) {
      for (int64_t i = 0; hidden && i < rows.n; ++i) {
        T* saved = hidden + rows.index(op, i, slot[i]) * op.rank;
        for (int64_t r = 0; r < op.rank; ++r) store(saved + r, C(0));
      }
      return;
    }
    C* h = s.hidden + active * kTileRows * s.ldh;
    multiply<C>(rows.n, x, op.narrow, e, op.width, op.rank, h, s.ldh);
    const T* bias = static_cast<const T*>(op.down_bias[e]);
    for (int64_t i = 0; i < rows.n; ++i) {
      C* line = h + i * s.ldh;
      const int64_t offset = rows.index(op, i, slot[i]) * op.rank;
      const C weight = gates[rows.sample[i] * op.slots + slot[i]] * static_cast<C>(op.scale);
      for (int64_t r = 0; r < op.rank; ++r) {
        const C value = line[r] + static_cast<C>(load(bias + r));
        line[r] = value < C(0) ? C(0) : value;  // NaN passes
      }
      if (op.dropout_p > 0) {
        const int64_t counter = (op.first_row + rows.index(op, i, slot[i])) * ((op.rank + 3) / 4);
        apply_dropout(op.seed, static_cast<uint64_t>(counter), p, grown, op.rank, line);
      }
      if (hidden) {
        convert(line, op.rank, hidden + offset);
      }
      for (int64_t r = 0; r < op.rank; ++r) line[r] *= weight;
      line[op.rank] = weight;  // times up_bias, the last row of `widen`
    }
    s.expert[active++] = e;
  });
  write_rows<T, C>(op, t, rows, s, active, op.rank + 1, op.x, op.residual, op.add_input ? op.x : View{}, op.out);
}

template <typename T>
void backward(const Backward& op, const Tile& t, void* memory) {
  using C = compute_t<T>;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<C> s(arena, op);
  const Rows rows(op, t);
  const Matrix<C> grad = compute_rows<T, C>(op.grad, t, rows, op.width, s.rows);
  const C* gates = static_cast<const C*>(op.gates);
  C* gate_terms = static_cast<C*>(op.gate_terms);
  C* grad_pre = static_cast<C*>(op.grad_pre);
  const C scale = static_cast<C>(op.scale), grown = static_cast<C>(1.0 / (1.0 - op.dropout_p));
  int64_t active = 0;
  for_each_expert(op, t, rows, s, [&](int64_t a, const int64_t* slot, int64_t e, bool valid) {
    if (!valid) {
      for (int64_t i = 0; gate_terms && i < rows.n; ++i) gate_terms[rows.index(op, i, slot[i])] = C(0);
      return;
    }
    C* g = s.hidden + active * kTileRows * s.ldh;
    multiply<C>(rows.n, grad, op.narrow, e, op.width, op.rank, g, s.ldh);
    for (int64_t i = 0; i < rows.n; ++i) {
      C* line = g + i * s.ldh;
      const int64_t index = rows.index(op, i, slot[i]);
      const T* h = static_cast<const T*>(op.hidden) + index * op.rank;
      if (gate_terms) {
        const T* bias = static_cast<const T*>(op.up_bias[e]);
        gate_terms[index] = scale * (dot(line, h, op.rank) + dot(grad.data + i * grad.ld, bias, op.width));
      }
      const C factor = gates[rows.sample[i] * op.slots + slot[i]] * scale * grown;
      for (int64_t r = 0; r < op.rank; ++r) line[r] = load(h + r) <= C(0) ? C(0) : factor * line[r];
      if (grad_pre) {
        const int64_t row = t.gathered ? gathered_row(t, op.first_row, i, a) : index - op.first_row;
        convert(line, op.rank, grad_pre + row * op.rank);
      }
    }
    s.expert[active++] = e;
  });
  if (op.grad_x.data) write_rows<T, C>(op, t, rows, s, active, op.rank, op.grad, op.add_grad ? op.grad : View{}, View{}, op.grad_x);
}

}  // namespace
}  // namespace moe
}  // namespace clk
