// Bias + activation, rotary positions, dropout and bias + dropout + residual.
#include <type_traits>
#include <vector>

#include "common.h"
#include "kernels.h"

namespace {

using namespace pc;

// Each activation gives its value and its derivative at x.
struct GeluErf {
  // 0.5 + x P(x^2) within `edge` of zero, below it 0, above it what it is there: P, the highest power first, is the
  // polynomial of u = 2 (x / edge)^2 - 1 with the least absolute error. No exponential and no division.
  template <int n>
  static Vec step(Vec x, float edge, const float (&p)[n]) {
    const Vec low = Vec{} - edge, high = Vec{} + edge, upper = x > high ? high : x, near = upper < low ? low : upper;
    const Vec u = near * near * (2.0f / (edge * edge)) - 1.0f, square = u * u;
    Vec even = Vec{} + p[0], odd = Vec{} + p[1];  // two sums, so that additions wait less for each other
#pragma GCC unroll 16
    for (int i = 2; i < n; i += 2) even = even * square + p[i], odd = odd * square + p[i + 1];
    return x < low ? Vec{} : near * (even * u + odd) + 0.5f;
  }
  // x times the normal distribution, with an error below 3e-7 |x|.
  static Vec value(Vec x) {
    constexpr float p[] = {0.0f,
                           5.38067718e-04f,  -1.36882544e-03f, 1.02387893e-03f,  -1.22941262e-03f, 4.23633307e-03f,
                           -7.67465727e-03f, 1.04686515e-02f,  -1.46713732e-02f, 2.02879719e-02f,  -2.61124671e-02f,
                           3.20817418e-02f,  -3.87872681e-02f, 4.77369912e-02f,  -6.41724691e-02f, 1.28551930e-01f};
    return x * step(x, 5.5f, p);
  }
  // Error below 4e-7.
  static Vec slope(Vec x) {
    constexpr float p[] = {-2.44530430e-03f, 6.21703593e-03f,  -2.83254171e-03f, 1.06223393e-03f,  -1.62198357e-02f,
                           3.16929482e-02f,  -3.49288434e-02f, 4.31631058e-02f,  -5.93590401e-02f, 6.93850145e-02f,
                           -7.05782846e-02f, 6.67546019e-02f,  -5.95244355e-02f, 5.17064855e-02f,  -4.72942367e-02f,
                           4.93672229e-02f,  -6.22814074e-02f, 1.23071827e-01f};
    return step(x, 5.75f, p);
  }
};
struct GeluTanh {  // 0.5 (1 + tanh u) = sigmoid(2 u)
  static Vec value(Vec x) { return x * sigmoid(1.59576912f * x * (1.0f + 0.044715f * x * x)); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid(1.59576912f * x * (1.0f + 0.044715f * x * x));
    return s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x);
  }
};
struct FastGelu {
  static Vec value(Vec x) { return x * sigmoid(1.702f * x); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid(1.702f * x);
    return s + x * s * (1.0f - s) * 1.702f;
  }
};
struct Silu {
  static Vec value(Vec x) { return x * sigmoid(x); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid(x);
    return s + x * s * (1.0f - s);
  }
};
struct Relu {
  static Vec value(Vec x) { return x < 0.0f ? Vec{} : x; }
  static Vec slope(Vec x) { return x > 0.0f ? Vec{} + 1.0f : Vec{}; }
};
struct SquaredRelu {
  static Vec value(Vec x) { return x < 0.0f ? Vec{} : x * x; }
  static Vec slope(Vec x) { return x > 0.0f ? 2.0f * x : Vec{}; }
};

template <class Activation>
void forward(const float* x, const float* bias, float* y, i64 T, i64 F) {
  parallel(T * F, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float* row = x + t * F;
      if (bias)
        map(F, y + t * F, [](Vec a, Vec b) { return Activation::value(a + b); }, row, bias);
      else
        map(F, y + t * F, [](Vec a) { return Activation::value(a); }, row);
    }
  }, kPieces);
}

template <class Activation>
void backward(const float* dy, const float* x, const float* bias, float* dx, i64 T, i64 F) {
  parallel(T * F, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float *row = x + t * F, *g = dy + t * F;
      if (bias)
        map(F, dx + t * F, [](Vec d, Vec a, Vec b) { return d * Activation::slope(a + b); }, g, row, bias);
      else
        map(F, dx + t * F, [](Vec d, Vec a) { return d * Activation::slope(a); }, g, row);
    }
  }, kPieces);
}

}  // namespace

// kind: 0 gelu (erf), 1 gelu (tanh), 2 silu, 3 relu, 4 squared relu, 5 fast gelu
PC_API void pc_activation(const float* x, const float* bias, float* y, i64 T, i64 F, int kind) {
  switch (kind) {
    case 0: return forward<GeluErf>(x, bias, y, T, F);
    case 1: return forward<GeluTanh>(x, bias, y, T, F);
    case 2: return forward<Silu>(x, bias, y, T, F);
    case 3: return forward<Relu>(x, bias, y, T, F);
    case 4: return forward<SquaredRelu>(x, bias, y, T, F);
    default: return forward<FastGelu>(x, bias, y, T, F);
  }
}

PC_API void pc_activation_grad(const float* dy, const float* x, const float* bias, float* dx, i64 T, i64 F, int kind) {
  switch (kind) {
    case 0: return backward<GeluErf>(dy, x, bias, dx, T, F);
    case 1: return backward<GeluTanh>(dy, x, bias, dx, T, F);
    case 2: return backward<Silu>(dy, x, bias, dx, T, F);
    case 3: return backward<Relu>(dy, x, bias, dx, T, F);
    case 4: return backward<SquaredRelu>(dy, x, bias, dx, T, F);
    default: return backward<FastGelu>(dy, x, bias, dx, T, F);
  }
}

// y [T, F] = silu(gate) * up of x [T, 2 F] (+ bias [2 F])
PC_API void pc_swiglu(const float* x, const float* bias, float* y, i64 T, i64 F) {
  const std::vector<float> zeros(bias ? 0 : 2 * F);
  const float* b = bias ? bias : zeros.data();
  parallel(2 * T * F, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float* row = x + t * 2 * F;
      map(F, y + t * F, [](Vec g, Vec u, Vec bg, Vec bu) { return Silu::value(g + bg) * (u + bu); }, row, row + F, b, b + F);
    }
  }, kPieces);
}

PC_API void pc_swiglu_grad(const float* dy, const float* x, const float* bias, float* dx, i64 T, i64 F) {
  const std::vector<float> zeros(bias ? 0 : 2 * F);
  const float* b = bias ? bias : zeros.data();
  parallel(2 * T * F, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    for (i64 t = r.begin; t < r.end; ++t) {
      const float *row = x + t * 2 * F, *g = dy + t * F;
      float* out = dx + t * 2 * F;
      by_vectors(F, [&](i64 f, auto io) {
        const Vec d = io.load(g + f), gate = io.load(row + f) + io.load(b + f);
        const Vec up = io.load(row + F + f) + io.load(b + F + f), s = sigmoid(gate);
        io.store(out + f, d * up * (s + gate * s * (1.0f - s)));
        io.store(out + F + f, d * gate * s);
      });
    }
  }, kPieces);
}

// Queries and keys [S, B, N, X] and values [S, B, N, Y - (X - R)] from q [S, B, N, X], kv [S, B, N, Y] and the keys'
// shared channels [S, B, R]: the last R of X channels turn, in neighbouring pairs, by cos and sin [S, 1 or B, R].
// `inverse` goes the other way: from the gradients of these to those of q, kv and the shared channels.
PC_API void pc_latent_heads(float* q, float* kv, float* k_pos, float* query, float* key, float* value, const float* cos,
                            const float* sin, i64 S, i64 B, i64 N, i64 X, i64 Y, i64 R, int per_batch, int inverse) {
  const i64 plain = X - R, E = Y - plain;
  const auto copy = [](float* to, const float* from, i64 n) { std::memcpy(to, from, static_cast<size_t>(n) * 4); };
  parallel(S * B * N * (X + Y), [&](int part, int parts) {
    const Range r = share(S * B, part, parts);
    std::vector<float> turned(static_cast<size_t>(R));
    for (i64 sb = r.begin; sb < r.end; ++sb) {
      const i64 angle = (per_batch ? sb : sb / B) * R;
      const float *c = cos + angle, *s = sin + angle;
      const auto turn = [&](float* to, const float* from) {
        for (i64 i = 0; i < R; i += 2) {
          const float a = from[i], b = from[i + 1];
          to[i] = a * c[i] - b * s[i];
          to[i + 1] = b * c[i + 1] + a * s[i + 1];
        }
      };
      const auto turn_back = [&](float* to, const float* from) {
        for (i64 i = 0; i < R; i += 2) {
          const float a = from[i], b = from[i + 1];
          to[i] = a * c[i] + b * s[i + 1];
          to[i + 1] = b * c[i + 1] - a * s[i];
        }
      };
      float* shared = k_pos + sb * R;
      if (inverse)
        std::fill(turned.begin(), turned.end(), 0.0f);
      else
        turn(turned.data(), shared);
      for (i64 n = sb * N; n < (sb + 1) * N; ++n) {
        float *q_n = q + n * X, *kv_n = kv + n * Y, *query_n = query + n * X, *key_n = key + n * X;
        if (inverse) {
          copy(q_n, query_n, plain);
          turn_back(q_n + plain, query_n + plain);
          copy(kv_n, key_n, plain);
          copy(kv_n + plain, value + n * E, E);
          for (i64 i = 0; i < R; ++i) turned[static_cast<size_t>(i)] += key_n[plain + i];
        } else {
          copy(query_n, q_n, plain);
          turn(query_n + plain, q_n + plain);
          copy(key_n, kv_n, plain);
          copy(key_n + plain, turned.data(), R);
          copy(value + n * E, kv_n + plain, E);
        }
      }
      if (inverse) turn_back(shared, turned.data());
    }
  });
}

namespace {

// Turns the `pairs` pairs at p = i * step and p + apart, or turns them back. With a constant step they are vectors.
template <class Step>
void rotate(Step step, i64 apart, const float* in, const float* c, const float* s, float* out, i64 pairs, bool back) {
  if (back) {
#pragma omp simd
    for (i64 i = 0; i < pairs; ++i) {
      const i64 p = i * step, q = p + apart;
      const float a = in[p], b = in[q];
      out[p] = a * c[p] + b * s[q];
      out[q] = b * c[q] - a * s[p];
    }
  } else {
#pragma omp simd
    for (i64 i = 0; i < pairs; ++i) {
      const i64 p = i * step, q = p + apart;
      const float a = in[p], b = in[q];
      out[p] = a * c[p] - b * s[p];
      out[q] = b * c[q] + a * s[q];
    }
  }
}

}  // namespace

// Rotates the first R of D dims of x [S, B, N, D] by cos and sin [S, 1 or B, R]; `inverse` applies the transpose.
// Of every `period` heads the last is copied as it is (the values among packed queries, keys and values); 0: of none.
PC_API void pc_rotary(const float* x, const float* cos, const float* sin, float* y, i64 S, i64 B, i64 N, i64 D, i64 R,
                      int per_batch, int interleaved, int inverse, i64 period) {
  const i64 half = R / 2;
  parallel(S * B * N * D, [&](int part, int parts) {
    const Range r = share(S * B, part, parts);
    for (i64 sb = r.begin; sb < r.end; ++sb) {
      const i64 angle = (per_batch ? sb : sb / B) * R;
      const float *c = cos + angle, *s = sin + angle;
      for (i64 n = 0; n < N; ++n) {
        const float* in = x + (sb * N + n) * D;
        float* out = y + (sb * N + n) * D;
        if (period && n % period == period - 1) {
          std::memcpy(out, in, static_cast<size_t>(D) * sizeof(float));
          continue;
        }
        if (interleaved)
          rotate(std::integral_constant<int, 2>(), i64{1}, in, c, s, out, half, inverse != 0);
        else
          rotate(std::integral_constant<int, 1>(), half, in, c, s, out, half, inverse != 0);
        std::memcpy(out + R, in + R, static_cast<size_t>(D - R) * sizeof(float));
      }
    }
  }, kPieces);
}

// y [T, H] = residual + dropout(x + bias); bias and residual may be null.
PC_API void pc_bias_dropout_add(const float* x, const float* bias, const float* residual, float* y, i64 T, i64 H,
                                float rate, u64 seed0, u64 seed1) {
  const Dropout dropout(rate, seed0, seed1);
  const std::vector<float> zeros(bias && residual ? 0 : H);
  parallel(T * H, [&](int part, int parts) {
    const Range r = share(T, part, parts);
    std::vector<float> keep(padded((H + 3) / 4) * 4, 1.0f);
    for (i64 t = r.begin; t < r.end; ++t) {
      for (i64 group = 0; rate > 0.0f && 4 * group < H; group += kLanes) {
        Vec factors[4];
        dropout.fill(factors, lane_numbers() + static_cast<u32>(group), WordVec{} + static_cast<u32>(t),
                     static_cast<u32>(t >> 32), 1);
        for (int l = 0; l < kLanes; ++l)
          for (int j = 0; j < 4; ++j) keep[4 * (group + l) + j] = factors[j][l];
      }
      const float *row = x + t * H, *k = keep.data(), *added = bias ? bias : zeros.data();
      const float* rest = residual ? residual + t * H : zeros.data();
      float* out = y + t * H;
#pragma omp simd
      for (i64 h = 0; h < H; ++h) out[h] = (row[h] + added[h]) * k[h] + rest[h];
    }
  }, kPieces);
}

// to[i * to_stride ...] = from[i * from_stride ...], `width` elements for each of `rows` rows.
PC_API void pc_copy_rows(const float* from, i64 from_stride, float* to, i64 to_stride, i64 width, i64 rows) {
  parallel(rows * width, [&](int part, int parts) {
    const Range r = share(rows, part, parts);
    for (i64 i = r.begin; i < r.end; ++i)
      std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<size_t>(width) * sizeof(float));
  }, kPieces);
}
