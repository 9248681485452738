// A mixture of experts: products of rows with their expert's weight, rows by number, rows scaled.
#include "gemm.h"
#include "matmul.h"

namespace {

using namespace pc;

i64 sum(const i64* counts, i64 experts) {
  i64 rows = 0;
  for (i64 e = 0; e < experts; ++e) rows += counts[e];
  return rows;
}

// Calls body(expert, first row, rows) for every expert; rows of one expert stand together. Threads share experts where
// there are enough of them, so that no product is cut into slivers.
template <class Body>
void each_expert(const i64* counts, i64 experts, i64 work_per_row, Body body) {
  const i64 rows = sum(counts, experts);
  parallel(rows * work_per_row / 64, [&](int part, int parts) {
    const Range mine = share(rows, part, parts);  // by rows, so that uneven experts are shared evenly
    i64 first = 0;
    for (i64 e = 0; e < experts; first += counts[e++]) {
      const i64 begin = first > mine.begin ? first : mine.begin;
      const i64 end = first + counts[e] < mine.end ? first + counts[e] : mine.end;
      if (begin < end) body(e, begin, end - begin);
    }
  });
}

// y [N, M] = x [N, K] op(w[e]), of an expert's matrix with K * M numbers of a kind. A thread makes what it multiplies
// of its rows and experts: their numbers differ from step to step, which oneDNN's primitive would be made anew for.
void by_experts(bool transposed, const float* x, const void* w, int kind, float* y, const i64* counts, i64 E, i64 K,
                i64 M) {
  const bool rounded = has_gemm_of_bf16 && rounds(sum(counts, E));
  const i64 line = transposed ? K : M;
  if (rounded) {
    w = as_bf16(w, kind, E * K * M, rounded_operands[0]);
    kind = kBfloat16;
  }
  each_expert(counts, E, K * M, [&](i64 e, i64 first, i64 n) {
    static thread_local std::vector<float> wide;
    static thread_local std::vector<uint16_t> narrowed;
    const float* rows = x + first * K;
    const void* weight = at(w, kind, e * K * M);
    float* to = y + first * M;
    if (rounded) {
      uint16_t* a = room_for(n * K, narrowed);
      narrow(rows, a, kBfloat16, n * K);
      return gemm_of_bf16(false, transposed, n, M, K, a, K, weight, line, false, to, M);
    }
    if (kind != kFloat32) {
      float* numbers = room_for(K * M, wide);
      widen(weight, kind, numbers, K * M);
      weight = numbers;
    }
    sgemm('N', transposed ? 'T' : 'N', n, M, K, 1.0f, rows, K, static_cast<const float*>(weight), line, 0.0f, to, M);
  });
}

}  // namespace

// y [N, O] = x [N, I] w[e] [O, I]^T
PC_API void pc_grouped_linear(const float* x, const void* w, int kind, float* y, const i64* counts, i64 E, i64 I,
                              i64 O) {
  by_experts(true, x, w, kind, y, counts, E, I, O);
}

// dx [N, I] = dy [N, O] w[e] [O, I]
PC_API void pc_grouped_linear_grad_input(const float* dy, const void* w, int kind, float* dx, const i64* counts, i64 E,
                                         i64 I, i64 O) {
  by_experts(false, dy, w, kind, dx, counts, E, O, I);
}

// dw[e] [O, I] = dy^T x over the expert's rows, added to dw if `add`; a thread owns rows of every dw.
PC_API void pc_grouped_linear_grad_weight(const float* dy, const float* x, void* dw, int kind, const i64* counts, i64 E,
                                          i64 I, i64 O, int add) {
  const i64 rows = sum(counts, E);
  const bool rounded = has_gemm_of_bf16 && rounds(rows), narrows = kind != kFloat32;
  const int from = rounded ? kBfloat16 : kFloat32;
  const void* a = rounded ? static_cast<const void*>(as_bf16(dy, kFloat32, rows * O, rounded_operands[0])) : dy;
  const void* b = rounded ? static_cast<const void*>(as_bf16(x, kFloat32, rows * I, rounded_operands[1])) : x;
  parallel((rows + E) * I * O / 64, [&](int part, int parts) {
    static thread_local std::vector<float> room;
    const Range r = share(O, part, parts);
    const i64 m = r.end - r.begin;
    if (m == 0) return;
    i64 first = 0;
    for (i64 e = 0; e < E; first += counts[e++]) {
      void* to = at(dw, kind, (e * O + r.begin) * I);
      if (counts[e] == 0) {
        if (!add) std::memset(to, 0, static_cast<size_t>(m * I * bytes_of(kind)));
        continue;
      }
      float* c = narrows ? room_for(m * I, room) : static_cast<float*>(to);
      const bool more = add && !narrows;
      const void *A = at(a, from, first * O + r.begin), *B = at(b, from, first * I);
      if (rounded)
        gemm_of_bf16(true, false, m, I, counts[e], A, O, B, I, more, c, I);
      else
        sgemm('T', 'N', m, I, counts[e], 1.0f, static_cast<const float*>(A), O, static_cast<const float*>(B), I,
              more ? 1.0f : 0.0f, c, I);
      if (narrows) put(c, to, kind, m * I, add != 0);
    }
  });
}

// y [N, H] = x[index], zeros where the index is negative
PC_API void pc_gather_rows(const float* x, const int32_t* index, float* y, i64 N, i64 H) {
  parallel(N * H, [&](int part, int parts) {
    const Range r = share(N, part, parts);
    for (i64 n = r.begin; n < r.end; ++n) {
      if (index[n] < 0)
        std::memset(y + n * H, 0, static_cast<size_t>(H) * sizeof(float));
      else
        std::memcpy(y + n * H, x + index[n] * H, static_cast<size_t>(H) * sizeof(float));
    }
  }, kPieces);
}

// y [T, H] = the sum of x[index[t, k]] over k, without negative indices
PC_API void pc_sum_rows_at(const float* x, const int32_t* index, float* y, i64 T, i64 K, i64 H) {
  parallel(T * K * H, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      float* out = y + t * H;
      bool begun = false;
      for (i64 k = 0; k < K; ++k) {
        const i64 row = index[t * K + k];
        if (row < 0) continue;
        const float* in = x + row * H;
        if (begun) {
#pragma omp simd
          for (i64 h = 0; h < H; ++h) out[h] += in[h];
        } else {
          std::memcpy(out, in, static_cast<size_t>(H) * sizeof(float));
          begun = true;
        }
      }
      if (!begun) std::memset(out, 0, static_cast<size_t>(H) * sizeof(float));
    }
  }, kPieces);
}

// y [N, F] = x [N, F] scale [N]; y may be x
PC_API void pc_scale_rows(const float* x, const float* scale, float* y, i64 N, i64 F) {
  parallel(N * F, [&](int part, int parts) {
    const Range r = share(N, part, parts);
    for (i64 n = r.begin; n < r.end; ++n) {
      const float s = scale[n];
      const float* in = x + n * F;
      float* out = y + n * F;
#pragma omp simd
      for (i64 f = 0; f < F; ++f) out[f] = in[f] * s;
    }
  }, kPieces);
}

// out [N] = the sum of a b over F, for a and b [N, F]
PC_API void pc_row_products(const float* a, const float* b, float* out, i64 N, i64 F) {
  parallel(N * F, [&](int part, int parts) {
    const Range r = share(N, part, parts);
    for (i64 n = r.begin; n < r.end; ++n) {
      const float *x = a + n * F, *y = b + n * F;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (i64 f = 0; f < F; ++f) sum += x[f] * y[f];
      out[n] = sum;
    }
  }, kPieces);
}
