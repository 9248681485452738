// Linear layers: products with oneDNN's sgemm, shared between threads along the longer dim; no transposed copies.
#include "gemm.h"

namespace {

using namespace pc;

// C [M, N] = op(A) op(B) + beta * C on all threads. Each thread computes a block of rows or of columns of C.
void product(bool ta, bool tb, i64 M, i64 N, i64 K, const float* A, i64 lda, const float* B, i64 ldb, float beta,
             float* C) {
  parallel(M * N * K / 64, [&](int part, int parts) {
    const bool rows = M >= N;
    const Range r = share(rows ? M : N, part, parts);
    if (r.begin == r.end) return;
    const float* a = rows ? A + r.begin * (ta ? 1 : lda) : A;
    const float* b = rows ? B : B + r.begin * (tb ? ldb : 1);
    float* c = C + r.begin * (rows ? N : 1);
    const i64 m = rows ? r.end - r.begin : M, n = rows ? N : r.end - r.begin;
    sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, K, 1.0f, a, lda, b, ldb, beta, c, N);
  });
}

}  // namespace

// y [T, O] = x [T, I] w [O, I]^T (+ bias [O])
PC_API void pc_linear(const float* x, const float* w, const float* bias, float* y, i64 T, i64 I, i64 O) {
  product(false, true, T, O, I, x, I, w, I, 0.0f, y);
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

// dx [T, I] = dy [T, O] w [O, I]
PC_API void pc_linear_grad_input(const float* dy, const float* w, float* dx, i64 T, i64 I, i64 O) {
  product(false, false, T, I, O, dy, O, w, I, 0.0f, dx);
}

// dw [O, I] = dy [T, O]^T x [T, I], added to dw if `add`
PC_API void pc_linear_grad_weight(const float* dy, const float* x, float* dw, i64 T, i64 I, i64 O, int add) {
  product(true, false, O, I, T, dy, O, x, I, add ? 1.0f : 0.0f, dw);
}

// sum over T of dy [T, O]; a thread owns columns, so the result does not depend on the thread count.
PC_API void pc_sum_rows(const float* dy, float* sum, i64 T, i64 O, int add) {
  parallel(T * O, [&](int part, int parts) {
    const Range r = share(O, part, parts);
    if (!add) std::memset(sum + r.begin, 0, static_cast<size_t>(r.end - r.begin) * sizeof(float));
    constexpr i64 kColumns = 512, kRows = 64;
    float block[kColumns];
    for (i64 o = r.begin; o < r.end; o += kColumns) {
      const i64 n = r.end - o < kColumns ? r.end - o : kColumns;
      for (i64 t0 = 0; t0 < T; t0 += kRows) {  // blockwise, so that rounding grows with 64 + T / 64, not T
        const i64 t1 = t0 + kRows < T ? t0 + kRows : T;
        std::memset(block, 0, sizeof(block));
        for (i64 t = t0; t < t1; ++t) {
          const float* row = dy + t * O + o;
#pragma omp simd
          for (i64 i = 0; i < n; ++i) block[i] += row[i];
        }
        for (i64 i = 0; i < n; ++i) sum[o + i] += block[i];
      }
    }
  });
}
