// LayerNorm and RMSNorm over the last dim H of [T, H].
#include <vector>

#include "common.h"
#include "kernels.h"

namespace {

using namespace pc;

// Adds dw and db of rows in blocks of 64, so that rounding grows with 64 + T / 64, not T.
struct ColumnSums {
  std::vector<float> block, total;
  i64 H, rows = 0;

  ColumnSums(i64 H, int sums) : block(sums * H), total(sums * H), H(H) {}
  float* sum(int i) { return block.data() + i * H; }
  void end_row() {
    if (++rows % 64 == 0) flush();
  }
  void flush() {
    for (size_t i = 0; i < block.size(); ++i) total[i] += block[i], block[i] = 0.0f;
  }
};

// Sums the threads' totals in order into the outputs.
void combine(const std::vector<std::vector<float>>& totals, float* dw, float* db, i64 H) {
  for (size_t p = 0; p < totals.size(); ++p) {
    if (totals[p].empty()) continue;
    for (i64 h = 0; h < H; ++h) {
      dw[h] = (p ? dw[h] : 0.0f) + totals[p][h];
      if (db) db[h] = (p ? db[h] : 0.0f) + totals[p][H + h];
    }
  }
}

// The gradients of one row. Functions of their own: GCC 12 makes loops with sums half as fast or worse inside a lambda,
// and does not vectorize one that adds to sums of rows and to sums of columns.
void layer_norm_row_grad(const float* g, const float* row, const float* w, float m, float s, float shift, float* dx,
                         float* dw, float* db, i64 H) {
  float a = 0.0f, b = 0.0f;
#pragma omp simd reduction(+ : a, b)
  for (i64 h = 0; h < H; ++h) {
    const float gradient = g[h] * w[h];
    a += gradient;
    b += gradient * ((row[h] - m) * s - shift);
  }
  a /= static_cast<float>(H);
  b /= static_cast<float>(H);
  a -= shift * b;
#pragma omp simd
  for (i64 h = 0; h < H; ++h) {
    const float centred = (row[h] - m) * s;
    dw[h] += g[h] * (centred - shift);
    db[h] += g[h];
    dx[h] = s * (g[h] * w[h] - a - centred * b);
  }
}

void rms_norm_row_grad(const float* g, const float* row, const float* w, float s, float* dx, float* dw, i64 H) {
  float b = 0.0f;
#pragma omp simd reduction(+ : b)
  for (i64 h = 0; h < H; ++h) b += g[h] * w[h] * row[h];
  b *= s * s / static_cast<float>(H);
#pragma omp simd
  for (i64 h = 0; h < H; ++h) {
    dw[h] += g[h] * row[h] * s;
    dx[h] = s * (g[h] * w[h] - row[h] * b);
  }
}

}  // namespace

// mean is [2, T]: the mean as the float nearest to it, and what that one lacks. With a mean far from zero the second part
// is as large as the rounding of the sum, 1e-3 standard deviations at an offset of 1e4, and would shift every output.
PC_API void pc_layer_norm(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd, i64 T,
                          i64 H, float eps) {
  parallel(T * H, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    const float share_of_one = 1.0f / static_cast<float>(H);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float* row = x + t * H;
      float* out = y + t * H;
      float sum = 0.0f, rest = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (i64 h = 0; h < H; ++h) sum += row[h];
      const float m = sum * share_of_one;
#pragma omp simd reduction(+ : rest, square)
      for (i64 h = 0; h < H; ++h) {
        const float d = row[h] - m;
        rest += d;
        square += d * d;
      }
      const float e = rest * share_of_one;
      // Of equal elements the difference may round to less than nothing.
      const float variance = square * share_of_one - e * e;
      const float s = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps);
#pragma omp simd
      for (i64 h = 0; h < H; ++h) out[h] = ((row[h] - m) * s - e * s) * w[h] + b[h];
      mean[t] = m;
      mean[T + t] = e;
      rstd[t] = s;
    }
  });
}

PC_API void pc_layer_norm_grad(const float* dy, const float* x, const float* w, const float* mean, const float* rstd,
                               float* dx, float* dw, float* db, i64 T, i64 H) {
  std::vector<std::vector<float>> totals(shares());
  parallel(T * H, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    ColumnSums sums(H, 2);
    float *dw_block = sums.sum(0), *db_block = sums.sum(1);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float *row = x + t * H, *g = dy + t * H, m = mean[t], s = rstd[t], shift = mean[T + t] * s;
      layer_norm_row_grad(g, row, w, m, s, shift, dx + t * H, dw_block, db_block, H);
      sums.end_row();
    }
    sums.flush();
    totals[part] = std::move(sums.total);
  });
  combine(totals, dw, db, H);
}

PC_API void pc_rms_norm(const float* x, const float* w, float* y, float* rstd, i64 T, i64 H, float eps) {
  parallel(T * H, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float* row = x + t * H;
      float* out = y + t * H;
      float square = 0.0f;
#pragma omp simd reduction(+ : square)
      for (i64 h = 0; h < H; ++h) square += row[h] * row[h];
      const float s = 1.0f / std::sqrt(square / static_cast<float>(H) + eps);
#pragma omp simd
      for (i64 h = 0; h < H; ++h) out[h] = row[h] * s * w[h];
      rstd[t] = s;
    }
  });
}

PC_API void pc_rms_norm_grad(const float* dy, const float* x, const float* w, const float* rstd, float* dx, float* dw,
                             i64 T, i64 H) {
  std::vector<std::vector<float>> totals(shares());
  parallel(T * H, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    ColumnSums sums(H, 1);
    float* dw_block = sums.sum(0);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float *row = x + t * H, *g = dy + t * H, s = rstd[t];
      rms_norm_row_grad(g, row, w, s, dx + t * H, dw_block, H);
      sums.end_row();
    }
    sums.flush();
    totals[part] = std::move(sums.total);
  });
  combine(totals, dw, nullptr, H);
}
