// Linear layers: products by oneDNN, shared between threads along the longer dim; no transposed copies.
#include "gemm.h"
#include "kernels.h"
#include "matmul.h"

namespace {

using namespace pc;

thread_local std::vector<float> wide_weight;  // of the last layer whose weight has 16 bits

// Returns `room` for n numbers, or, without it, that of a product's first operand.
uint16_t* room_or(void* room, i64 n) {
  return room != nullptr ? static_cast<uint16_t*>(room) : room_for(n, rounded_operands[0]);
}

void add_bias(const float* bias, float* y, i64 T, i64 O) {
  if (bias == nullptr) return;
  parallel(T * O, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      float* row = y + t * O;
#pragma omp simd
      for (i64 o = 0; o < O; ++o) row[o] += bias[o];
    }
  });
}

// Whether oneDNN's matmul primitive multiplies float32 numbers faster than its sgemm does, by a tenth to a quarter:
// sgemm reads lines of A or B that stand far apart one by one, and those a page apart share few places in the caches.
bool far_lines(bool ta, bool tb, i64 N, i64 K, i64 lda) {
#if defined(__AVX512F__)
  constexpr i64 kPage = 4096 / sizeof(float);
  return float32_products && ((ta && lda % kPage == 0 && N <= 512) || (tb && K >= N));
#else
  return false;
#endif
}

// C [M, N] = op(A) op(B) (+ C) on all threads. Each thread computes a block of rows or of columns of C.
void product(bool ta, bool tb, i64 M, i64 N, i64 K, const float* A, i64 lda, const float* B, i64 ldb, Target C) {
  const Strided a = {A, kFloat32, ta ? 1 : lda, ta ? lda : 1}, b = {B, kFloat32, tb ? 1 : ldb, tb ? ldb : 1};
  if (far_lines(ta, tb, N, K, lda)) return onednn_product(M, N, K, a, b, C);
  by_blocks(M, N, K, C, [&](int, i64 i, i64 j, i64 m, i64 n, float* c, i64 row, bool add) {
    sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, K, 1.0f, A + i * a.row, lda, B + j * b.column, ldb, add ? 1.0f : 0.0f, c,
          row);
  });
}

// y[t, o] of kR rows of x and kO rows of w: each a sum of kLanes partial sums, in an order that depends on I alone.
template <int kR, int kO>
void few_tile(const float* x, const float* w, const float* bias, float* y, i64 I, i64 O) {
  Vec sum[kR][kO] = {};
  i64 i = 0;
  for (; i + kLanes <= I; i += kLanes) {
    Vec b[kO];
    for (int o = 0; o < kO; ++o) {
      b[o] = *reinterpret_cast<const Vec*>(w + o * I + i);
      __builtin_prefetch(w + (kO + o) * I + i, 0, 2);  // of the next tile: memory is read while other rows are computed
    }
    for (int r = 0; r < kR; ++r) {
      const Vec a = *reinterpret_cast<const Vec*>(x + r * I + i);
      for (int o = 0; o < kO; ++o) sum[r][o] += a * b[o];
    }
  }
  for (int r = 0; r < kR; ++r)
    for (int o = 0; o < kO; ++o) {
      float total = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) total += sum[r][o][lane];
      for (i64 j = i; j < I; ++j) total += x[r * I + j] * w[o * I + j];
      y[r * O + o] = total + (bias ? bias[o] : 0.0f);
    }
}

template <int kO>
void few_column(const float* x, const float* w, const float* bias, float* y, i64 T, i64 I, i64 O) {
  i64 t = 0;
  for (; t + 4 <= T; t += 4) few_tile<4, kO>(x + t * I, w, bias, y + t * O, I, O);
  for (; t < T; ++t) few_tile<1, kO>(x + t * I, w, bias, y + t * O, I, O);
}

// The same as `product` for a few rows of x: the weights are read once, in order, which is all the time it takes; and
// a row's result does not depend on the rows beside it, so that a sequence is continued alike in any batch.
void few_rows(const float* x, const float* w, const float* bias, float* y, i64 T, i64 I, i64 O) {
  parallel(T * I * O / 16, [&](int part, int parts) {
    const Range r = share((O + 3) / 4, part, parts);
    for (i64 o = r.begin * 4; o < r.end * 4 && o < O; o += 4) {
      if (o + 4 <= O)
        few_column<4>(x, w + o * I, bias ? bias + o : nullptr, y + o, T, I, O);
      else
        for (i64 j = o; j < O; ++j) few_column<1>(x, w + j * I, bias ? bias + j : nullptr, y + j, T, I, O);
    }
  }, kPieces);
}

}  // namespace

// Whether `pc_linear` and `pc_linear_grad_input` multiply a rounded copy of so many rows: not of a few, read in order.
PC_API int pc_rounds_operand(int64_t rows) { return rounds(rows); }

// y [T, O] = x [T, I] w [O, I]^T (+ bias [O]). `rounded` has room for a copy of x in bfloat16, or is null.
PC_API void pc_linear(const float* x, const void* weight, int kind, const float* bias, float* y, void* rounded, i64 T,
                      i64 I, i64 O) {
  if (rounds(T)) {
    const uint16_t *a = room_or(rounded, T * I), *b = as_bf16(weight, kind, O * I, rounded_operands[1]);
    onednn_product(T, O, I, {a, kBfloat16, I, 1}, {b, kBfloat16, 1, I}, {y, kFloat32, false}, x);
  } else if (T <= kFewRows) {
    return few_rows(x, widened(weight, kind, O * I, wide_weight), bias, y, T, I, O);
  } else if (products_with[kind]) {
    onednn_product(T, O, I, {x, kFloat32, I, 1}, {weight, kind, 1, I}, {y, kFloat32, false});
  } else {
    product(false, true, T, O, I, x, I, widened(weight, kind, O * I, wide_weight), I, {y, kFloat32, false});
  }
  add_bias(bias, y, T, O);
}

// dx [T, I] = dy [T, O] w [O, I]. `rounded` has room for a copy of dy in bfloat16, or is null.
PC_API void pc_linear_grad_input(const float* dy, const void* weight, int kind, float* dx, void* rounded, i64 T, i64 I,
                                 i64 O) {
  if (bf16_products) {
    const uint16_t *a = room_or(rounded, T * O), *b = as_bf16(weight, kind, O * I, rounded_operands[1]);
    return onednn_product(T, I, O, {a, kBfloat16, O, 1}, {b, kBfloat16, I, 1}, {dx, kFloat32, false}, dy);
  }
  if (products_with[kind])
    return onednn_product(T, I, O, {dy, kFloat32, O, 1}, {weight, kind, I, 1}, {dx, kFloat32, false});
  product(false, false, T, I, O, dy, O, widened(weight, kind, O * I, wide_weight), I, {dx, kFloat32, false});
}

// dw [O, I] = dy [T, O]^T x [T, I], added to dw if `add`. Operands of 16 bits are only the copies that the two above
// have made.
PC_API void pc_linear_grad_weight(const void* dy, int dy_kind, const void* x, int x_kind, void* dw, int dw_kind, i64 T,
                                  i64 I, i64 O, int add) {
  if (T == 0) {  // no product: libraries leave the target as it is
    if (!add) std::memset(dw, 0, static_cast<size_t>(O * I * bytes_of(dw_kind)));
    return;
  }
  const Target target = {dw, dw_kind, add != 0};
  if (bf16_products) {
    const uint16_t *a = as_bf16(dy, dy_kind, T * O, rounded_operands[0]);
    const uint16_t* b = as_bf16(x, x_kind, T * I, rounded_operands[1]);
    return onednn_product(O, I, T, {a, kBfloat16, 1, O}, {b, kBfloat16, I, 1}, target);
  }
  product(true, false, O, I, T, static_cast<const float*>(dy), O, static_cast<const float*>(x), I, target);
}

// sum over T of dy [T, O], in `sum` or onto it; a thread owns columns, so the result does not depend on the threads.
PC_API void pc_sum_rows(const float* dy, void* sum, int kind, i64 T, i64 O, int add) {
  parallel(T * O, [&](int part, int parts) {
    const Range r = share(O, part, parts);
    constexpr i64 kColumns = 512, kRows = 64;
    float block[kColumns], total[kColumns];
    for (i64 o = r.begin; o < r.end; o += kColumns) {
      const i64 n = r.end - o < kColumns ? r.end - o : kColumns;
      std::memset(total, 0, sizeof(total));
      for (i64 t0 = 0; t0 < T; t0 += kRows) {  // blockwise, so that rounding grows with 64 + T / 64, not T
        const i64 t1 = t0 + kRows < T ? t0 + kRows : T;
        std::memset(block, 0, sizeof(block));
        for (i64 t = t0; t < t1; ++t) {
          const float* row = dy + t * O + o;
#pragma omp simd
          for (i64 i = 0; i < n; ++i) block[i] += row[i];
        }
        for (i64 i = 0; i < n; ++i) total[i] += block[i];
      }
      put(total, at(sum, kind, o), kind, n, add != 0);
    }
  });
}
