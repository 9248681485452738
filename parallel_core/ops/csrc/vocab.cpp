// Cross entropy over a part of the vocabulary, and the embedding table.
#include <algorithm>
#include <vector>

#include "half.h"

namespace {

using namespace pc;

// The largest logit and the sum of exponentials relative to it, of each lane's logits so far: a row is read once.
struct Softmax {
  Vec top = Vec{} - INFINITY, exps{}, total{};

  // Takes in at most kBlock logits; sums of blocks are added up, so that rounding grows with the blocks, not the logits.
  static constexpr i64 kBlock = 32 * kLanes;
  void take(const float* logits, i64 n) {
    const Vec before = top;
    Vec sum{}, block{};
    by_vectors(n, [&](i64 v, auto io) {
      const Vec x = io.load(logits + v, -INFINITY);
      top = x > top ? x : top;
      sum += io.load(logits + v);
    });
    const Vec shift = top == -INFINITY ? Vec{} : top;
    by_vectors(n, [&](i64 v, auto io) { block += fast_exp(io.load(logits + v, -INFINITY) - shift); });
    exps = exps * fast_exp(before - shift) + block;
    total += sum;
  }
};

}  // namespace

// `sums` [3, T]: of exp(logit - largest), the target's logit, of the logits.
PC_API void pc_vocab_statistics(const float* logits, const int32_t* target, float* largest, float* sums, i64 T, i64 V,
                                i64 first_row) {
  parallel(T * V, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float* row = logits + t * V;
      Softmax lanes;
      for (i64 v = 0; v < V; v += Softmax::kBlock) lanes.take(row + v, V - v < Softmax::kBlock ? V - v : Softmax::kBlock);
      float top = lanes.top[0];
      for (int l = 1; l < kLanes; ++l) top = lanes.top[l] > top ? lanes.top[l] : top;
      const i64 at = target[t] - first_row;
      largest[t] = top;
      sums[t] = sum_of(lanes.exps * fast_exp(lanes.top - top));
      sums[T + t] = at >= 0 && at < V ? row[at] : 0.0f;
      sums[2 * T + t] = sum_of(lanes.total);
    }
  }, kPieces);
}

PC_API void pc_vocab_sums_of(const float* sums, const float* largest, const float* highest, float* out, i64 T) {
  std::memcpy(out, sums, static_cast<size_t>(3 * T) * sizeof(float));
  for (i64 t = 0; t < T; ++t) out[t] *= std::exp(largest[t] - highest[t]);
}

PC_API void pc_vocab_losses(const float* largest, const float* sums, const int32_t* target, float* loss,
                            float* log_sum_exp, i64 T, float target_weight, float uniform_weight) {
  for (i64 t = 0; t < T; ++t) {
    const float lse = std::log(sums[t]) + largest[t];
    log_sum_exp[t] = lse;
    loss[t] = target[t] < 0 ? 0.0f : lse - target_weight * sums[T + t] - uniform_weight * sums[2 * T + t];
  }
}

// `grad` may be `logits`.
PC_API void pc_vocab_grad_logits(const float* logits, const float* log_sum_exp, const int32_t* target,
                                 const float* dloss, float* grad, i64 T, i64 V, i64 first_row, float target_weight,
                                 float uniform_weight) {
  parallel(T * V, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float lse = log_sum_exp[t], d = target[t] < 0 ? 0.0f : dloss[t];
      float* out = grad + t * V;
      map(V, out, [=](Vec x) { return (fast_exp(x - lse) - uniform_weight) * d; }, logits + t * V);
      const i64 at = target[t] - first_row;
      if (at >= 0 && at < V) out[at] -= target_weight * d;
    }
  }, kPieces);
}

// Rows of the table as they are, or as float32; zeros for ids outside of it.
PC_API void pc_embedding(const int32_t* ids, const void* table, int kind, void* out, int out_kind, i64 T, i64 V, i64 H,
                         i64 first_row) {
  const i64 bytes = H * bytes_of(out_kind);
  parallel(T * H, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const i64 row = ids[t] - first_row;
      const void* from = at(table, kind, row * H);
      void* to = at(out, out_kind, t * H);
      if (row < 0 || row >= V)
        std::memset(to, 0, static_cast<size_t>(bytes));
      else if (kind == out_kind)
        std::memcpy(to, from, static_cast<size_t>(bytes));
      else
        widen(from, kind, static_cast<float*>(to), H);
    }
  }, kPieces);
}

// Adds the rows t of dy with ids[t] = row to each row of `grad` (set to zero first unless `add`), one by one, or to a row
// of 16 bits their sum. A thread owns rows of the table and takes the tokens in order, so the result does not depend on
// the thread count.
PC_API void pc_embedding_grad(const float* dy, const int32_t* ids, void* grad, int kind, i64 T, i64 V, i64 H,
                              i64 first_row, int add) {
  std::vector<int32_t> first(static_cast<size_t>(V), -1), next(static_cast<size_t>(T));  // of each row's tokens
  for (i64 t = T - 1; t >= 0; --t) {
    const i64 row = ids[t] - first_row;
    if (row < 0 || row >= V) continue;
    next[static_cast<size_t>(t)] = first[static_cast<size_t>(row)];
    first[static_cast<size_t>(row)] = static_cast<int32_t>(t);
  }
  parallel((T + V) * H, [&](int part, int parts) {
    const Range r = share(V, part, parts);
    if (!add) std::memset(at(grad, kind, r.begin * H), 0, static_cast<size_t>((r.end - r.begin) * H * bytes_of(kind)));
    std::vector<float> sum(kind == kFloat32 ? 0 : static_cast<size_t>(H));
    for (i64 row = r.begin; row < r.end; ++row) {
      int32_t t = first[static_cast<size_t>(row)];
      if (t < 0) continue;
      void* to = at(grad, kind, row * H);
      std::fill(sum.begin(), sum.end(), 0.0f);
      float* out = kind == kFloat32 ? static_cast<float*>(to) : sum.data();
      for (; t >= 0; t = next[static_cast<size_t>(t)]) {
        const float* in = dy + t * H;
#pragma omp simd
        for (i64 h = 0; h < H; ++h) out[h] += in[h];
      }
      if (kind != kFloat32) put(out, to, kind, H, true);
    }
  });
}
