// Adam and the sum of squares over flat buffers.
#include <vector>

#include "common.h"
#include "kernels.h"

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
  constexpr int kLanes = 64;
  const i64 blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
  parallel(n, [&](int part, int parts) {
    const Range r = share(blocks, part, parts);
    for (i64 b = r.begin; b < r.end; ++b) {
      const float* block = x + b * kBlock;
      const i64 length = (b + 1) * kBlock < n ? kBlock : n - b * kBlock;
      // Lanes of their own, so that the additions need not wait for each other.
      float lanes[kLanes] = {};
      i64 i = 0;
      for (; i + kLanes <= length; i += kLanes)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) lanes[l] += block[i + l] * block[i + l];
      for (int l = 0; i < length; ++i, ++l) lanes[l] += block[i] * block[i];
      float sum = 0.0f;
      for (float lane : lanes) sum += lane;
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
