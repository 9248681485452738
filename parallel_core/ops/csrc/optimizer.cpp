// Adam and the sum of squares over flat buffers.
#include <vector>

#include "half.h"
#include "kernels.h"

namespace {

using namespace pc;

struct Adam {
  float grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2, decay, step_size, inverse_root_correction, eps;

  void update(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, i64 n) const {
#pragma omp simd
    for (i64 i = 0; i < n; ++i) {
      const float g = grad[i] * grad_scale;
      const float m = exp_avg[i] * beta1 + one_minus_beta1 * g;
      const float v = exp_avg_sq[i] * beta2 + one_minus_beta2 * g * g;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      param[i] = param[i] * decay - step_size * m / (std::sqrt(v) * inverse_root_correction + eps);
    }
  }
};

// Returns n numbers as float32: themselves, or widened into `block`.
const float* numbers(const void* data, int kind, i64 first, i64 n, float* block) {
  const void* here = at(data, kind, first);
  if (kind == kFloat32) return static_cast<const float*>(here);
  widen(here, kind, block, n);
  return block;
}

}  // namespace

// `rounded` gets the weights too, in its kind; null: nothing does.
PC_API void pc_adam(float* param, const void* grad, int grad_kind, float* exp_avg, float* exp_avg_sq, void* rounded,
                    int rounded_kind, i64 n, float grad_scale, float beta1, float beta2, float one_minus_beta1,
                    float one_minus_beta2, float decay, float step_size, float inverse_root_correction, float eps) {
  const Adam adam = {grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2, decay, step_size,
                     inverse_root_correction, eps};
  each_block(n, [&](i64 first, i64 length, float* block) {
    adam.update(param + first, numbers(grad, grad_kind, first, length, block), exp_avg + first, exp_avg_sq + first,
                length);
    if (rounded != nullptr) narrow(param + first, at(rounded, rounded_kind, first), rounded_kind, length);
  });
}

// Blocks of 4096 are summed in float32, the blocks in float64 in order: the same bits for every thread count.
PC_API double pc_sum_of_squares(const void* x, int kind, i64 n) {
  constexpr i64 kBlock = 4096;
  constexpr int kLanes = 64;
  const i64 blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
  parallel(n, [&](int part, int parts) {
    const Range r = share(blocks, part, parts);
    float room[kBlock];
    for (i64 b = r.begin; b < r.end; ++b) {
      const i64 length = (b + 1) * kBlock < n ? kBlock : n - b * kBlock;
      const float* block = numbers(x, kind, b * kBlock, length, room);
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
