// A mixture of experts: products of rows with their expert's weight, rows by number, rows scaled.
#include "gemm.h"

namespace {

using namespace pc;

// Calls body(expert, first row, rows) for every expert; rows of one expert stand together. Threads share experts where
// there are enough of them, so that no product is cut into slivers.
template <class Body>
void each_expert(const i64* counts, i64 experts, i64 work_per_row, Body body) {
  i64 rows = 0;
  for (i64 e = 0; e < experts; ++e) rows += counts[e];
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

}  // namespace

// y [N, O] = x [N, I] w[e] [O, I]^T
PC_API void pc_grouped_linear(const float* x, const float* w, float* y, const i64* counts, i64 E, i64 I, i64 O) {
  each_expert(counts, E, I * O, [&](i64 e, i64 first, i64 n) {
    sgemm('N', 'T', n, O, I, 1.0f, x + first * I, I, w + e * O * I, I, 0.0f, y + first * O, O);
  });
}

// dx [N, I] = dy [N, O] w[e] [O, I]
PC_API void pc_grouped_linear_grad_input(const float* dy, const float* w, float* dx, const i64* counts, i64 E, i64 I,
                                         i64 O) {
  each_expert(counts, E, I * O, [&](i64 e, i64 first, i64 n) {
    sgemm('N', 'N', n, I, O, 1.0f, dy + first * O, O, w + e * O * I, I, 0.0f, dx + first * I, I);
  });
}

// dw[e] [O, I] = dy^T x over the expert's rows, added to dw if `add`; a thread owns rows of every dw.
PC_API void pc_grouped_linear_grad_weight(const float* dy, const float* x, float* dw, const i64* counts, i64 E, i64 I,
                                          i64 O, int add) {
  i64 rows = 0;
  for (i64 e = 0; e < E; ++e) rows += counts[e];
  parallel((rows + E) * I * O / 64, [&](int part, int parts) {
    const Range r = share(O, part, parts);
    if (r.begin == r.end) return;
    i64 first = 0;
    for (i64 e = 0; e < E; first += counts[e++]) {
      float* to = dw + (e * O + r.begin) * I;
      if (counts[e])
        sgemm('T', 'N', r.end - r.begin, I, counts[e], 1.0f, dy + first * O + r.begin, O, x + first * I, I,
              add ? 1.0f : 0.0f, to, I);
      else if (!add)
        std::memset(to, 0, static_cast<size_t>((r.end - r.begin) * I) * sizeof(float));
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
