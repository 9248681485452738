// One layer of a decoder over a cache: the kernels of its parts, with nothing but this function between them.
#include <vector>

#include "half.h"
#include "kernels.h"

using pc::i64;

namespace {

struct Pointers {  // in the order that the caller has them in; biases, and cos with sin, may be null
  const float *x, *input_norm, *input_norm_bias;
  const void* qkv;
  const float* qkv_bias;
  const void* proj;
  const float *proj_bias, *mlp_norm, *mlp_norm_bias;
  const void* fc1;
  const float* fc1_bias;
  const void* fc2;
  const float *fc2_bias, *cos, *sin;
  float *keys, *values;
  const int32_t *rows, *firsts;
  float* out;
};

struct Numbers {
  i64 S, B, H, N, G, D, wide, narrow, capacity, window;  // wide: of fc1's output; narrow: of fc2's input
  i64 rotary, per_batch, interleaved;                      // channels that turn; 0: none
  i64 activation;                                          // as pc_activation counts them; -1: SwiGLU
  i64 qkv_kind, proj_kind, fc1_kind, fc2_kind;             // of the weights
};

// Room that a thread keeps from one layer to the next.
float* room(std::vector<float>& kept, i64 n) {
  if (static_cast<i64>(kept.size()) < n) kept.resize(static_cast<size_t>(n));
  return kept.data();
}

void norm(const float* x, const float* w, const float* b, float* y, float* moments, i64 T, i64 H, float eps) {
  if (b == nullptr)
    pc_rms_norm(x, w, y, moments, T, H, eps);
  else
    pc_layer_norm(x, w, b, y, moments, moments + 2 * T, T, H, eps);
}

}  // namespace

// pointers, numbers: the structs above. A norm without bias is RMSNorm.
PC_API void pc_cached_layer(const void* pointers, const void* numbers, float eps, float scale) {
  const Pointers& p = *static_cast<const Pointers*>(pointers);
  const Numbers& n = *static_cast<const Numbers*>(numbers);
  static thread_local std::vector<float> rooms[5];
  const i64 T = n.S * n.B, X = (n.N / n.G + 2) * n.D, mixed_size = T * n.G * X;
  float* moments = room(rooms[0], 3 * T);
  float* normed = room(rooms[1], T * (n.H > n.N * n.D ? n.H : n.N * n.D));  // then the context
  float* hidden = room(rooms[2], T * n.H);
  float* mixed = room(rooms[3], mixed_size > T * n.wide ? mixed_size : T * n.wide);  // then fc1's output
  const i64 others[3] = {mixed_size, T * n.narrow, T * n.H};  // turned; the activation; what is added
  i64 most = 0;
  for (const i64 size : others) most = size > most ? size : most;
  float* other = room(rooms[4], 2 * most);
  float* branch = other + most;

  norm(p.x, p.input_norm, p.input_norm_bias, normed, moments, T, n.H, eps);
  pc_linear(normed, p.qkv, static_cast<int>(n.qkv_kind), p.qkv_bias, mixed, nullptr, T, n.H, n.G * X);
  const float* turned = mixed;
  if (n.rotary) {
    const i64 period = n.N / n.G + 2;
    pc_rotary(mixed, p.cos, p.sin, other, n.S, n.B, n.G * period, n.D, n.rotary, static_cast<int>(n.per_batch),
              static_cast<int>(n.interleaved), 0, period);
    turned = other;
  }
  const i64 stride = n.B * n.G * X;
  const i64 shape[17] = {n.S, n.B, n.N, n.G, n.D, n.D, n.capacity, n.window, stride, n.G * X,
                         X,   stride, n.G * X, X, stride, n.G * X, X};
  pc_cached_attention(turned, turned + X - 2 * n.D, turned + X - n.D, p.keys, p.values, p.rows, p.firsts, normed, shape,
                      scale);
  pc_linear(normed, p.proj, static_cast<int>(n.proj_kind), nullptr, branch, nullptr, T, n.N * n.D, n.H);
  pc_bias_dropout_add(branch, p.proj_bias, p.x, hidden, T, n.H, 0.0f, 0, 0);

  norm(hidden, p.mlp_norm, p.mlp_norm_bias, normed, moments, T, n.H, eps);
  pc_linear(normed, p.fc1, static_cast<int>(n.fc1_kind), nullptr, mixed, nullptr, T, n.H, n.wide);
  if (n.activation < 0)
    pc_swiglu(mixed, p.fc1_bias, other, T, n.narrow);
  else
    pc_activation(mixed, p.fc1_bias, other, T, n.narrow, static_cast<int>(n.activation));
  pc_linear(other, p.fc2, static_cast<int>(n.fc2_kind), nullptr, branch, nullptr, T, n.narrow, n.H);
  pc_bias_dropout_add(branch, p.fc2_bias, hidden, p.out, T, n.H, 0.0f, 0, 0);
}
