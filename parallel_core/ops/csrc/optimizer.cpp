// Adam and the sum of squares over flat buffers.
#include <vector>

#include "common.h"

namespace {
using namespace pc;
}

PC_API void pc_adam(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, i64 n, float grad_scale,
                    float beta1, float beta2, float one_minus_beta1, float one_minus_beta2, float decay,
                    float step_size, float inverse_root_correction, float eps) {
  parallel(n, [&](int part, int parts) {
    const Range r = share(n, part, parts);
#pragma omp simd
    for (i64 i = r.begin; i < r.end; ++i) {
      const float g = grad[i] * grad_scale;
      const float m = exp_avg[i] * beta1 + one_minus_beta1 * g;
      const float v = exp_avg_sq[i] * beta2 + one_minus_beta2 * g * g;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      param[i] = param[i] * decay - step_size * m / (std::sqrt(v) * inverse_root_correction + eps);
    }
  }, kPieces);
}

// Blocks of 4096 are summed in float32, the blocks in float64 in order: the same bits for every thread count.
PC_API double pc_sum_of_squares(const float* x, i64 n) {
  constexpr i64 kBlock = 4096;
  const i64 blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
  parallel(n, [&](int part, int parts) {
    const Range r = share(blocks, part, parts);
    for (i64 b = r.begin; b < r.end; ++b) {
      const i64 end = (b + 1) * kBlock < n ? (b + 1) * kBlock : n;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (i64 i = b * kBlock; i < end; ++i) sum += x[i] * x[i];
      sums[b] = sum;
    }
  }, kPieces);
  double total = 0.0;
  for (double s : sums) total += s;
  return total;
}

// into += from
PC_API void pc_add(float* into, const float* from, i64 n) {
  parallel(n, [&](int part, int parts) {
    const Range r = share(n, part, parts);
#pragma omp simd
    for (i64 i = r.begin; i < r.end; ++i) into[i] += from[i];
  }, kPieces);
}
