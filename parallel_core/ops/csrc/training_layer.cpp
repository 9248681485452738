// A layer's forward and backward pass as sequences of its kernels. Steps have numbers, so that a caller whose weights
// are cut over ranks runs those up to where the ranks exchange something, puts the address of what they have got in the
// place of what they have given, and goes on behind it. Where ranks cut the sequence between the products too, the
// norms and the sums are of `rows`, the products and attention of all `tokens`.
#include "half.h"
#include "kernels.h"

using pc::i64;
using pc::u64;

namespace {

struct Linear {
  const void* weight;
  i64 kind;              // of the weight's numbers, as half.h has them
  const float* bias;     // may be null
  void *rounded, *dout;  // copies of the input and of the output's gradient in bfloat16; null: products are of float32
};

struct Norm {
  const float *weight, *bias;  // without a bias it is RMSNorm
};

struct Gradient {  // of a parameter: where it is written or added, to numbers of which kind; null: it has none
  void* into;
  i64 kind, add;
};

struct LinearGradient {
  Gradient weight, bias;
};

struct NormGradient {
  Gradient weight, bias;
};

// The order is that of ops/training_layer.py.
struct Layer {
  i64 S, B, H, N, G, D, wide, narrow;              // wide: of fc1's output; narrow: of fc2's input
  i64 parts;                                       // of the sequence, of which norms and sums have one
  i64 rotary, per_batch, interleaved, activation;  // channels that turn, 0: none; -1: SwiGLU
  u64 seeds[6];                                    // of attention, and of what attention and MLP add
  double eps, scale, attention_rate, hidden_rate;
  Norm norm1, norm2, norm_q, norm_k;  // of queries and keys without a weight: they stay as they are
  Linear qkv, proj, fc1, fc2;
  const float *cos, *sin;
  const int32_t* start;

  const float* x;
  float *moments1, *normed1, *mixed, *moments_q, *moments_k, *headed, *heads, *context, *log_sum_exp, *attended, *hidden,
      *moments2, *normed2, *spread, *activated, *fed, *y;
  // Packed queries, keys and values are mixed, then headed with their norms, then heads that have turned: one array
  // where a step has nothing to do. [3, T * N * D] is for one kind of them.
  float* apart;

  const float* dy;
  float *dfed, *dactivated, *dspread, *dnormed2, *dhidden, *dattended, *dcontext, *dheads, *dheaded, *dmixed, *dnormed1,
      *dx, *sums;  // [2, H or D]
  NormGradient of_norm1, of_norm2, of_norm_q, of_norm_k;
  LinearGradient of_qkv, of_proj, of_fc1, of_fc2;

  i64 tokens() const { return S * B; }
  i64 rows() const { return S / parts * B; }
  i64 width() const { return (N / G + 2) * D; }  // of a group in the packed heads
  i64 packed() const { return G * width(); }

  void attention_shape(i64* shape) const {
    const i64 X = width(), strides[3] = {B * G * X, G * X, X};
    const i64 sizes[11] = {S, S, B, N, G, D, D, 0, 0, 0, N};
    std::memcpy(shape, sizes, sizeof(sizes));
    for (int i = 0; i < 6; ++i) std::memcpy(shape + 11 + 3 * i, strides, sizeof(strides));
  }
};

void norm(const Norm& n, const float* x, float* y, float* moments, i64 T, i64 H, float eps) {
  if (n.bias == nullptr)
    pc_rms_norm(x, n.weight, y, moments, T, H, eps);
  else
    pc_layer_norm(x, n.weight, n.bias, y, moments, moments + 2 * T, T, H, eps);
}

void give(const Gradient& g, const float* values, i64 n) {
  if (g.into == nullptr) return;
  pc::put(values, g.into, static_cast<int>(g.kind), n, g.add != 0);
}

void norm_grad(const Norm& n, const NormGradient& g, const float* dy, const float* x, const float* moments, float* dx,
               float* sums, i64 T, i64 H) {
  if (n.bias == nullptr)
    pc_rms_norm_grad(dy, x, n.weight, moments, dx, sums, T, H);
  else
    pc_layer_norm_grad(dy, x, n.weight, moments, moments + 2 * T, dx, sums, sums + H, T, H);
  give(g.weight, sums, H);
  if (n.bias != nullptr) give(g.bias, sums + H, H);
}

void linear(const Linear& l, const float* x, const float* bias, float* y, i64 T, i64 I, i64 O) {
  pc_linear(x, l.weight, static_cast<int>(l.kind), bias, y, l.rounded, T, I, O);
}

void linear_grad(const Linear& l, const float* dy, float* dx, i64 T, i64 I, i64 O) {
  pc_linear_grad_input(dy, l.weight, static_cast<int>(l.kind), dx, l.dout, T, I, O);
}

void weight_grad(const Linear& l, const Gradient& g, const float* dy, const float* x, i64 T, i64 I, i64 O) {
  if (g.into == nullptr) return;
  const void *left = l.dout ? l.dout : static_cast<const void*>(dy), *right = l.rounded ? l.rounded : x;
  const int left_kind = l.dout ? pc::kBfloat16 : pc::kFloat32, right_kind = l.rounded ? pc::kBfloat16 : pc::kFloat32;
  pc_linear_grad_weight(left, left_kind, right, right_kind, g.into, static_cast<int>(g.kind), T, I, O,
                        static_cast<int>(g.add));
}

void bias_grad(const Gradient& g, const float* dy, i64 T, i64 O) {
  if (g.into) pc_sum_rows(dy, g.into, static_cast<int>(g.kind), T, O, static_cast<int>(g.add));
}

// Queries, keys or values of all groups: columns [first, first + size) of a group's packed heads.
struct Columns {
  i64 first, size;
};

void take(const Layer& l, Columns c, const float* packed, float* apart) {
  pc_copy_rows(packed + c.first, l.width(), apart, c.size, c.size, l.tokens() * l.G);
}

void put(const Layer& l, Columns c, const float* apart, float* packed) {
  pc_copy_rows(apart, c.size, packed + c.first, l.width(), c.size, l.tokens() * l.G);
}

void norm_columns(const Layer& l, Columns c, const Norm& n, float* moments) {
  float* normed = l.apart + l.tokens() * l.N * l.D;
  take(l, c, l.mixed, l.apart);
  norm(n, l.apart, normed, moments, l.tokens() * l.G * c.size / l.D, l.D, static_cast<float>(l.eps));
  put(l, c, normed, l.headed);
}

void norm_columns_grad(const Layer& l, Columns c, const Norm& n, const NormGradient& g, const float* moments) {
  const i64 room = l.tokens() * l.N * l.D;
  float *dy = l.apart + room, *dx = dy + room;
  take(l, c, l.mixed, l.apart);
  take(l, c, l.dheaded, dy);
  norm_grad(n, g, dy, l.apart, moments, dx, l.sums, l.tokens() * l.G * c.size / l.D, l.D);
  put(l, c, dx, l.dmixed);
}

void norm_heads(const Layer& l) {
  if (l.norm_q.weight == nullptr) return;
  const i64 X = l.width(), D = l.D;
  norm_columns(l, {0, X - 2 * D}, l.norm_q, l.moments_q);
  norm_columns(l, {X - 2 * D, D}, l.norm_k, l.moments_k);
  pc_copy_rows(l.mixed + X - D, X, l.headed + X - D, X, D, l.tokens() * l.G);
}

void norm_heads_grad(const Layer& l) {
  if (l.norm_q.weight == nullptr) return;
  const i64 X = l.width(), D = l.D;
  norm_columns_grad(l, {0, X - 2 * D}, l.norm_q, l.of_norm_q, l.moments_q);
  norm_columns_grad(l, {X - 2 * D, D}, l.norm_k, l.of_norm_k, l.moments_k);
  pc_copy_rows(l.dheaded + X - D, X, l.dmixed + X - D, X, D, l.tokens() * l.G);
}

void attend(const Layer& l) {
  const float *keys = l.heads + l.width() - 2 * l.D, *values = l.heads + l.width() - l.D;
  i64 shape[29];
  l.attention_shape(shape);
  pc_attention(l.heads, keys, values, l.start, l.context, l.log_sum_exp, shape, static_cast<float>(l.scale),
               static_cast<float>(l.attention_rate), l.seeds[0], l.seeds[1]);
}

void attend_grad(const Layer& l) {
  const i64 keys = l.width() - 2 * l.D, values = l.width() - l.D;
  i64 shape[29];
  l.attention_shape(shape);
  pc_attention_grad(l.heads, l.heads + keys, l.heads + values, l.start, l.context, l.dcontext, l.log_sum_exp, l.dheads,
                    l.dheads + keys, l.dheads + values, shape, static_cast<float>(l.scale),
                    static_cast<float>(l.attention_rate), l.seeds[0], l.seeds[1]);
}

void turn(const Layer& l, const float* from, float* to, int inverse) {
  if (l.rotary)
    pc_rotary(from, l.cos, l.sin, to, l.S, l.B, l.packed() / l.D, l.D, l.rotary, static_cast<int>(l.per_batch),
              static_cast<int>(l.interleaved), inverse, l.width() / l.D);
}

// `residual` and what a branch gives, with its bias and as its mask leaves it.
void add_branch(const Layer& l, const float* branch, const float* bias, const float* residual, float* y, int seeds) {
  pc_bias_dropout_add(branch, bias, residual, y, l.rows(), l.H, static_cast<float>(l.hidden_rate), l.seeds[seeds],
                      l.seeds[seeds + 1]);
}

// The gradient of what a branch gives, and of its bias. Where nothing is dropped, `into` is where `dy` is.
void add_branch_grad(const Layer& l, const float* dy, float* into, const Gradient& bias, int seeds) {
  if (l.hidden_rate != 0.0) add_branch(l, dy, nullptr, nullptr, into, seeds);
  bias_grad(bias, into, l.rows(), l.H);
}

void forward_step(const Layer& l, int step) {
  const i64 T = l.tokens(), R = l.rows(), H = l.H, ND = l.N * l.D;
  const float eps = static_cast<float>(l.eps);
  switch (step) {
    case 0: return norm(l.norm1, l.x, l.normed1, l.moments1, R, H, eps);
    case 1: return linear(l.qkv, l.normed1, l.qkv.bias, l.mixed, T, H, l.packed());
    case 2:
      norm_heads(l);
      return turn(l, l.headed, l.heads, 0);
    case 3: return attend(l);
    case 4: return linear(l.proj, l.context, nullptr, l.attended, T, ND, H);
    case 5: return add_branch(l, l.attended, l.proj.bias, l.x, l.hidden, 2);
    case 6: return norm(l.norm2, l.hidden, l.normed2, l.moments2, R, H, eps);
    case 7: return linear(l.fc1, l.normed2, nullptr, l.spread, T, H, l.wide);
    case 8:
      if (l.activation < 0) return pc_swiglu(l.spread, l.fc1.bias, l.activated, T, l.narrow);
      return pc_activation(l.spread, l.fc1.bias, l.activated, T, l.narrow, static_cast<int>(l.activation));
    case 9: return linear(l.fc2, l.activated, nullptr, l.fed, T, l.narrow, H);
    case 10: return add_branch(l, l.fed, l.fc2.bias, l.hidden, l.y, 4);
  }
}

void backward_step(const Layer& l, int step) {
  const i64 T = l.tokens(), R = l.rows(), H = l.H, ND = l.N * l.D;
  switch (step) {
    case 0: return add_branch_grad(l, l.dy, l.dfed, l.of_fc2.bias, 4);
    case 1: return linear_grad(l.fc2, l.dfed, l.dactivated, T, l.narrow, H);
    case 2: return weight_grad(l.fc2, l.of_fc2.weight, l.dfed, l.activated, T, l.narrow, H);
    case 3:
      if (l.activation < 0) return pc_swiglu_grad(l.dactivated, l.spread, l.fc1.bias, l.dspread, T, l.narrow);
      return pc_activation_grad(l.dactivated, l.spread, l.fc1.bias, l.dspread, T, l.narrow,
                                static_cast<int>(l.activation));
    case 4: return linear_grad(l.fc1, l.dspread, l.dnormed2, T, H, l.wide);
    case 5:
      weight_grad(l.fc1, l.of_fc1.weight, l.dspread, l.normed2, T, H, l.wide);
      return bias_grad(l.of_fc1.bias, l.dspread, T, l.wide);
    case 6: return norm_grad(l.norm2, l.of_norm2, l.dnormed2, l.hidden, l.moments2, l.dhidden, l.sums, R, H);
    case 7: return pc_add(l.dhidden, l.dy, R * H);
    case 8: return add_branch_grad(l, l.dhidden, l.dattended, l.of_proj.bias, 2);
    case 9: return linear_grad(l.proj, l.dattended, l.dcontext, T, ND, H);
    case 10: return weight_grad(l.proj, l.of_proj.weight, l.dattended, l.context, T, ND, H);
    case 11: return attend_grad(l);
    case 12:
      turn(l, l.dheads, l.dheaded, 1);
      return norm_heads_grad(l);
    case 13: return linear_grad(l.qkv, l.dmixed, l.dnormed1, T, H, l.packed());
    case 14:
      weight_grad(l.qkv, l.of_qkv.weight, l.dmixed, l.normed1, T, H, l.packed());
      return bias_grad(l.of_qkv.bias, l.dmixed, T, l.packed());
    case 15: return norm_grad(l.norm1, l.of_norm1, l.dnormed1, l.x, l.moments1, l.dx, l.sums, R, H);
    case 16: return pc_add(l.dx, l.dhidden, R * H);
  }
}

}  // namespace

// Steps [first, last) of 11: norm, qkv, rotation, attention, projection; sum, norm, fc1, activation, fc2; sum.
PC_API void pc_layer_forward(const void* layer, int first, int last) {
  for (int step = first; step < last; ++step) forward_step(*static_cast<const Layer*>(layer), step);
}

// Steps [first, last) of 17, in the opposite order; behind each linear layer's gradient stand those of its parameters.
PC_API void pc_layer_backward(const void* layer, int first, int last) {
  for (int step = first; step < last; ++step) backward_step(*static_cast<const Layer*>(layer), step);
}
