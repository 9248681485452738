// Causal attention in tiles (Dao et al., "FlashAttention"): no S x S array exists, forward or backward.
//
// A thread works on one (batch, key/value head) at a time: keys and values are packed once, then every query head of
// the group passes over them in blocks of kQ rows and kK keys. The backward pass recomputes the weights from the
// saved log-sum-exp and accumulates dK and dV locally, so the result does not depend on the thread count. It takes as
// many keys at a time as the cache holds in all their forms, and continues dQ from where the keys before them left it.
//
// Queries and keys are each a run of positions, [q_first, q_first + S) and [k_first, k_first + T): a whole sequence has
// both at 0 and S = T, a rank of a cut sequence or a step of generation has less. A key is visible to a query when it
// is not behind it and not before the query's start. A query that sees no key gives 0, with log-sum-exp -infinity.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "gemm.h"

namespace {

using namespace pc;

constexpr i64 kQ = 32, kK = 256;
constexpr i64 kCached = 1 << 18;  // floats that stay in a core's own cache: one megabyte

struct Shape {
  i64 S, T, B, N, G, D, E;   // queries, keys, microbatch, query heads, key/value heads, head sizes of keys and values
  i64 q_first, k_first;      // positions of the first query and the first key
  i64 head_first, all_heads; // where these heads stand among the layer's, for dropout
};

// Where element (s, b, g) of a tensor begins; heads of one group stand D apart.
struct Strides {
  i64 s, b, g;
  i64 at(i64 si, i64 bi, i64 gi) const { return si * s + bi * b + gi * g; }
};

struct Buffer {
  float* data;
  explicit Buffer(i64 n) : data(static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return data; }
};

// out [rows, Dp] = factor * in, zeros beyond D.
void pack(const float* in, i64 stride, i64 rows, i64 D, i64 Dp, float factor, float* out) {
  for (i64 s = 0; s < rows; ++s) {
#pragma omp simd
    for (i64 d = 0; d < D; ++d) out[s * Dp + d] = factor * in[s * stride + d];
    for (i64 d = D; d < Dp; ++d) out[s * Dp + d] = 0.0f;
  }
}

// out [D, Sp] = in [S, D] transposed, zeros beyond S.
void pack_transposed(const float* in, i64 stride, i64 S, i64 Sp, i64 D, float* out) {
  for (i64 s0 = 0; s0 < Sp; s0 += 16)
    for (i64 d = 0; d < D; ++d)
      for (i64 s = s0; s < std::min(s0 + 16, Sp); ++s) out[d * Sp + s] = s < S ? in[s * stride + d] : 0.0f;
}

// The keys that row s of a block may see within the tile of keys [k0, k1): local positions [first, last).
struct Visible {
  i64 first, last;
  Visible(const Shape& n, const int32_t* start, i64 s, i64 k0, i64 k1) {
    const i64 position = n.q_first + s, from = start ? std::min<i64>(start[s], position) : 0;
    first = std::clamp<i64>(from - n.k_first - k0, 0, k1 - k0);
    last = std::clamp<i64>(position + 1 - n.k_first - k0, first, k1 - k0);
  }
};

// The keys [begin, end) that some query of [q0, q1) may see; begin is round for dropout counters and vector loads.
Range visible_keys(const Shape& n, const int32_t* start, i64 q0, i64 q1) {
  const i64 end = std::clamp<i64>(n.q_first + q1 - n.k_first, 0, n.T);
  i64 first = start ? n.q_first + q0 : 0;
  for (i64 s = q0; start && s < q1; ++s) first = std::min<i64>(first, start[s]);
  return {std::min(std::max<i64>(first - n.k_first, 0) / 16 * 16, end), end};
}

struct Attention {
  Shape n;
  float scale, rate;
  Dropout dropout;
  const int32_t* document_start;  // [B, S] or null

  const int32_t* start(i64 b) const { return document_start ? document_start + b * n.S : nullptr; }

  void keep(float* out, i64 b, i64 head, i64 s, i64 k0, i64 count) const {
    dropout.fill(out, static_cast<u32>((n.k_first + k0) / 4), (count + 3) / 4, static_cast<u32>(n.q_first + s),
                 static_cast<u32>(b * n.all_heads + n.head_first + head), 2);
  }

  // One block of query rows: online softmax over tiles of keys.
  void forward_block(const float* q, const float* kt, const float* v, i64 b, i64 head, i64 q0, i64 q1, i64 Tp, i64 Dp,
                     i64 Ep, float* p, float* o, float* keep_row, float* out, i64 out_stride, float* lse) const {
    float top[kQ], sum[kQ];
    const i64 rows = q1 - q0;
    std::fill(top, top + rows, -INFINITY);
    std::fill(sum, sum + rows, 0.0f);
    const Range keys = visible_keys(n, start(b), q0, q1);
    bool first_tile = true;
    for (i64 k0 = keys.begin; k0 < keys.end; k0 += kK, first_tile = false) {
      const i64 k1 = std::min(k0 + kK, keys.end), width = padded(k1 - k0);
      small_gemm(rows, width, n.D, q, Dp, 1, kt + k0, Tp, p, kK, false);
      for (i64 i = 0; i < rows; ++i) {
        float* row = p + i * kK;
        const Visible seen(n, start(b), q0 + i, k0, k1);
        float best = top[i], total = 0.0f;
#pragma omp simd reduction(max : best)
        for (i64 t = seen.first; t < seen.last; ++t) best = row[t] > best ? row[t] : best;
        std::fill(row, row + seen.first, 0.0f);
        std::fill(row + seen.last, row + width, 0.0f);
        if (seen.first == seen.last) continue;
#pragma omp simd reduction(+ : total)
        for (i64 t = seen.first; t < seen.last; ++t) {
          row[t] = fast_exp(row[t] - best);
          total += row[t];
        }
        const float shrink = first_tile ? 0.0f : fast_exp(top[i] - best);
        sum[i] = sum[i] * shrink + total;
        if (!first_tile && shrink != 1.0f)
          for (i64 d = 0; d < Ep; ++d) o[i * Ep + d] *= shrink;
        top[i] = best;
        if (rate > 0.0f) {
          keep(keep_row, b, head, q0 + i, k0, k1 - k0);
#pragma omp simd
          for (i64 t = seen.first; t < seen.last; ++t) row[t] *= keep_row[t];
        }
      }
      small_gemm(rows, Ep, k1 - k0, p, kK, 1, v + k0 * Ep, Ep, o, Ep, !first_tile);
    }
    if (first_tile) std::fill(o, o + rows * Ep, 0.0f);
    for (i64 i = 0; i < rows; ++i) {
      const bool sees = sum[i] > 0.0f;
      const float inverse = sees ? 1.0f / sum[i] : 0.0f;
      float* to = out + (q0 + i) * out_stride;
#pragma omp simd
      for (i64 d = 0; d < n.E; ++d) to[d] = o[i * Ep + d] * inverse;
      lse[q0 + i] = sees ? top[i] + std::log(sum[i]) : -INFINITY;
    }
  }

  void forward(const float* q, Strides qs, const float* k, Strides ks, const float* v, Strides vs, float* out,
               float* lse) const {
    const i64 Tp = padded(n.T), Dp = padded(n.D), Ep = padded(n.E), heads = n.N / n.G;
    const Strides os{n.B * n.N * n.E, n.N * n.E, heads * n.E};
    parallel(n.S * n.T * n.B * n.N, [&](int part, int parts) {
      Buffer kt(n.D * Tp), vp(n.T * Ep), qb(kQ * Dp), p(kQ * kK), o(kQ * Ep), keep_row(kK + 4);
      const Range r = share(n.B * n.G, part, parts);
      for (i64 bg = r.begin; bg < r.end; ++bg) {
        const i64 b = bg / n.G, g = bg % n.G;
        pack_transposed(k + ks.at(0, b, g), ks.s, n.T, Tp, n.D, kt);
        pack(v + vs.at(0, b, g), vs.s, n.T, n.E, Ep, 1.0f, vp);
        for (i64 h = 0; h < heads; ++h)
          for (i64 q0 = 0; q0 < n.S; q0 += kQ) {
            const i64 q1 = std::min(q0 + kQ, n.S), head = g * heads + h;
            pack(q + qs.at(q0, b, g) + h * n.D, qs.s, q1 - q0, n.D, Dp, scale, qb);
            forward_block(qb, kt, vp, b, head, q0, q1, Tp, Dp, Ep, p, o, keep_row, out + os.at(0, b, g) + h * n.E,
                          os.s, lse + (b * n.N + head) * n.S);
          }
      }
    }, kPieces);
  }

  // One tile of weights P and score gradients dS; p enters with the scores, ds with dO V^T.
  void backward_tile(float* p, float* ds, const float* lse, const float* delta, float* keep_row, i64 b, i64 head,
                     i64 q0, i64 q1, i64 k0, i64 k1) const {
    const i64 width = padded(k1 - k0);
    for (i64 i = 0; i < q1 - q0; ++i) {
      float *prow = p + i * kK, *drow = ds + i * kK;
      const Visible seen(n, start(b), q0 + i, k0, k1);
      const float norm = lse[q0 + i], shift = delta[i];
      std::fill(prow, prow + seen.first, 0.0f);
      std::fill(drow, drow + seen.first, 0.0f);
      std::fill(prow + seen.last, prow + width, 0.0f);
      std::fill(drow + seen.last, drow + width, 0.0f);
      if (rate > 0.0f) {
        keep(keep_row, b, head, q0 + i, k0, k1 - k0);
#pragma omp simd
        for (i64 t = seen.first; t < seen.last; ++t) {
          const float weight = fast_exp(prow[t] - norm);
          prow[t] = weight * keep_row[t];
          drow[t] = weight * (drow[t] * keep_row[t] - shift);
        }
      } else {
#pragma omp simd
        for (i64 t = seen.first; t < seen.last; ++t) {
          const float weight = fast_exp(prow[t] - norm);
          prow[t] = weight;
          drow[t] = weight * (drow[t] - shift);
        }
      }
    }
  }

  void backward(const float* q, Strides qs, const float* k, Strides ks, const float* v, Strides vs, const float* out,
                const float* dout, const float* lse, float* dq, Strides dqs, float* dk, Strides dks, float* dv,
                Strides dvs) const {
    const i64 S = n.S, T = n.T, D = n.D, E = n.E, Dp = padded(D), Ep = padded(E), heads = n.N / n.G;
    const i64 most = std::min(std::max(kCached / (3 * Dp + 2 * Ep) / kK, i64{1}) * kK, T), Kp = padded(most);
    const Strides os{n.B * n.N * E, n.N * E, heads * E};
    parallel(S * T * n.B * n.N, [&](int part, int parts) {
      Buffer kp(most * Dp), kt(D * Kp), vt(E * Kp), dkp(most * Dp), dvp(most * Ep);
      Buffer qb(kQ * Dp), dob(kQ * Ep), dqb(kQ * Dp), p(kQ * kK), ds(kQ * kK), keep_row(kK + 4);
      const Range r = share(n.B * n.G, part, parts);
      for (i64 bg = r.begin; bg < r.end; ++bg) {
        const i64 b = bg / n.G, g = bg % n.G;
        for (i64 first = 0; first < T; first += most) {  // the keys and values [first, end), by all that see them
          const i64 end = std::min(first + most, T), count = end - first;
          pack(k + ks.at(first, b, g), ks.s, count, D, Dp, scale, kp);
          pack_transposed(k + ks.at(first, b, g), ks.s, count, Kp, D, kt);
          pack_transposed(v + vs.at(first, b, g), vs.s, count, Kp, E, vt);
          std::fill(dkp.data, dkp.data + count * Dp, 0.0f);
          std::fill(dvp.data, dvp.data + count * Ep, 0.0f);
          for (i64 h = 0; h < heads; ++h)
            for (i64 q0 = 0; q0 < S; q0 += kQ) {
              const i64 q1 = std::min(q0 + kQ, S), rows = q1 - q0, head = g * heads + h;
              const Range visible = visible_keys(n, start(b), q0, q1);
              const Range seen{std::max(visible.begin, first), std::min(visible.end, end)};
              if (seen.begin >= seen.end && first > 0) continue;
              const i64 o_at = os.at(q0, b, g) + h * E;
              const float* norm = lse + (b * n.N + head) * S;
              float* dq_at = dq + dqs.at(q0, b, g) + h * D;
              pack(q + qs.at(q0, b, g) + h * D, qs.s, rows, D, Dp, scale, qb);
              pack(dout + o_at, os.s, rows, E, Ep, 1.0f, dob);
              float delta[kQ];
              for (i64 i = 0; i < rows; ++i) {
                const float* o_row = out + o_at + i * os.s;
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (i64 d = 0; d < E; ++d) sum += o_row[d] * dob[i * Ep + d];
                delta[i] = sum;
              }
              bool begun = first > 0;
              if (begun)
                pack(dq_at, dqs.s, rows, D, Dp, 1.0f, dqb);
              else if (seen.begin >= seen.end)
                std::fill(dqb.data, dqb.data + rows * Dp, 0.0f);
              for (i64 k0 = seen.begin; k0 < seen.end; k0 += kK) {
                const i64 k1 = std::min(k0 + kK, seen.end), keys = k1 - k0, width = padded(keys), at = k0 - first;
                small_gemm(rows, width, D, qb, Dp, 1, kt + at, Kp, p, kK, false);
                small_gemm(rows, width, E, dob, Ep, 1, vt + at, Kp, ds, kK, false);
                backward_tile(p, ds, norm, delta, keep_row, b, head, q0, q1, k0, k1);
                small_gemm(keys, Ep, rows, p, 1, kK, dob, Ep, dvp + at * Ep, Ep, true);
                small_gemm(keys, Dp, rows, ds, 1, kK, qb, Dp, dkp + at * Dp, Dp, true);
                small_gemm(rows, Dp, keys, ds, kK, 1, kp + at * Dp, Dp, dqb, Dp, begun);
                begun = true;
              }
              for (i64 i = 0; i < rows; ++i) std::copy(dqb + i * Dp, dqb + i * Dp + D, dq_at + i * dqs.s);
            }
          for (i64 t = 0; t < count; ++t) {
            std::copy(dkp + t * Dp, dkp + t * Dp + D, dk + dks.at(first + t, b, g));
            std::copy(dvp + t * Ep, dvp + t * Ep + E, dv + dvs.at(first + t, b, g));
          }
        }
      }
    }, kPieces);
  }
};

constexpr i64 kNumbers = 11;  // of a Shape

Attention make(const i64* shape, const int32_t* start, float scale, float rate, u64 seed0, u64 seed1) {
  const Shape n{shape[0], shape[1], shape[2], shape[3], shape[4],  shape[5],
                shape[6], shape[7], shape[8], shape[9], shape[10]};
  return {n, scale, rate, Dropout(rate, seed0, seed1), start};
}

Strides strides(const i64* s) { return {s[0], s[1], s[2]}; }

// ---- one new token a sequence ---------------------------------------------------------------------------------------
// Every sum runs in an order of its own position alone: vectors of kLanes partial sums, joined in one order.
float joined(Vec sum) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

float dot(const float* a, const float* b, i64 D) {
  Vec sum{};
  i64 d = 0;
  for (; d + kLanes <= D; d += kLanes) sum += *reinterpret_cast<const Vec*>(a + d) * *reinterpret_cast<const Vec*>(b + d);
  float total = joined(sum);
  for (; d < D; ++d) total += a[d] * b[d];
  return total;
}

// out [E] = softmax(scale * q K^T) V over the positions [first, last); the weights are left in p.
void attend_one(const float* q, const float* keys, const float* values, i64 first, i64 last, i64 D, i64 E, float scale,
                float* p, float* out) {
  float top = -INFINITY, total = 0.0f;
  for (i64 t = first; t < last; ++t) {
    p[t - first] = scale * dot(q, keys + t * D, D);
    top = std::max(top, p[t - first]);
  }
#pragma omp simd
  for (i64 t = 0; t < last - first; ++t) p[t] = fast_exp(p[t] - top);
  for (i64 t = 0; t < last - first; ++t) total += p[t];
  std::fill(out, out + E, 0.0f);
  for (i64 t = first; t < last; ++t) {
    const float weight = p[t - first];
    const float* value = values + t * E;
#pragma omp simd
    for (i64 e = 0; e < E; ++e) out[e] += weight * value[e];
  }
  const float inverse = 1.0f / total;
  for (i64 e = 0; e < E; ++e) out[e] *= inverse;
}

}  // namespace

// shape: the numbers of a Shape, then (s, b, g) strides of q, k and v. out [S, B, N * E]; lse [B, N, S].
PC_API void pc_attention(const float* q, const float* k, const float* v, const int32_t* document_start, float* out,
                         float* lse, const i64* shape, float scale, float rate, u64 seed0, u64 seed1) {
  make(shape, document_start, scale, rate, seed0, seed1)
      .forward(q, strides(shape + kNumbers), k, strides(shape + kNumbers + 3), v, strides(shape + kNumbers + 6), out,
               lse);
}

// shape continues with the strides of dq, dk and dv.
PC_API void pc_attention_grad(const float* q, const float* k, const float* v, const int32_t* document_start,
                              const float* out, const float* dout, const float* lse, float* dq, float* dk, float* dv,
                              const i64* shape, float scale, float rate, u64 seed0, u64 seed1) {
  make(shape, document_start, scale, rate, seed0, seed1)
      .backward(q, strides(shape + kNumbers), k, strides(shape + kNumbers + 3), v, strides(shape + kNumbers + 6), out,
                dout, lse, dq, strides(shape + kNumbers + 9), dk, strides(shape + kNumbers + 12), dv,
                strides(shape + kNumbers + 15));
}

// Attention over two sets of keys from the attention over each, a and b [S, B, N, E] with log-sum-exps [B, N, S].
PC_API void pc_join_blocks(const float* a, const float* a_lse, const float* b, const float* b_lse, float* out,
                           float* out_lse, i64 S, i64 B, i64 N, i64 E) {
  constexpr float kNothing = -1e30f;  // what is below has seen no key
  parallel(S * B * N * E, [&](int part, int parts) {
    const Range r = share(S, part, parts);
    for (i64 s = r.begin; s < r.end; ++s)
      for (i64 bn = 0; bn < B * N; ++bn) {
        const float la = a_lse[bn * S + s], lb = b_lse[bn * S + s], top = std::max(la, lb);
        const float* from_a = a + (s * B * N + bn) * E;
        const float* from_b = b + (s * B * N + bn) * E;
        float* to = out + (s * B * N + bn) * E;
        float weight_a = la > kNothing ? std::exp(la - top) : 0.0f, weight_b = lb > kNothing ? std::exp(lb - top) : 0.0f;
        const float total = weight_a + weight_b;
        out_lse[bn * S + s] = total > 0.0f ? top + std::log(total) : -INFINITY;
        if (total > 0.0f) weight_a /= total, weight_b /= total;
        for (i64 e = 0; e < E; ++e) to[e] = weight_a * from_a[e] + weight_b * from_b[e];
      }
  });
}

// Attention of S new tokens of B sequences to those in a cache, where their keys and values are put first.
// q, k, v [S, B, ..] with strides; keys [rows, G, T, D]; values [rows, G, T, E]; sequence b is row rows[b] and has
// firsts[b] tokens already. shape: S, B, N, G, D, E, T, window, then the strides of q, k and v. out [S, B, N * E].
PC_API void pc_cached_attention(const float* q, const float* k, const float* v, float* keys, float* values,
                                const int32_t* rows, const int32_t* firsts, float* out, const i64* shape,
                                float scale) {
  const i64 S = shape[0], B = shape[1], N = shape[2], G = shape[3], D = shape[4], E = shape[5], T = shape[6],
            window = shape[7], heads = N / G;
  const Strides qs = strides(shape + 8), ks = strides(shape + 11), vs = strides(shape + 14);
  i64 work = 0;
  for (i64 b = 0; b < B; ++b) work += (firsts[b] + S) * N * D;
  parallel(work, [&](int part, int parts) {
    const Range r = share(B * G, part, parts);
    Buffer p(S == 1 ? T : 1);
    for (i64 bg = r.begin; bg < r.end; ++bg) {
      const i64 b = bg / G, g = bg % G, first = firsts[b];
      float* own_keys = keys + (rows[b] * G + g) * T * D;
      float* own_values = values + (rows[b] * G + g) * T * E;
      for (i64 s = 0; s < S; ++s) {
        std::copy_n(k + ks.at(s, b, g), D, own_keys + (first + s) * D);
        std::copy_n(v + vs.at(s, b, g), E, own_values + (first + s) * E);
      }
      if (S > 1) continue;
      for (i64 h = 0; h < heads; ++h)
        attend_one(q + qs.at(0, b, g) + h * D, own_keys, own_values, std::max<i64>(first - window, 0), first + 1, D, E,
                   scale, p, out + (b * N + g * heads + h) * E);
    }
  });
  if (S == 1) return;
  // Several new tokens of a sequence: blocks of queries, as in training.
  Buffer start(S), context(S * N * E), lse(N * S);
  int32_t* from = reinterpret_cast<int32_t*>(start.data);
  for (i64 b = 0; b < B; ++b) {
    const i64 first = firsts[b];
    for (i64 s = 0; s < S; ++s) from[s] = static_cast<int32_t>(std::max<i64>(first + s - window, 0));
    const i64 numbers[kNumbers] = {S, first + S, 1, N, G, D, E, first, 0, 0, N};
    make(numbers, from, scale, 0.0f, 0, 0)
        .forward(q + b * qs.b, qs, keys + rows[b] * G * T * D, {D, 0, T * D}, values + rows[b] * G * T * E,
                 {E, 0, T * E}, context, lse);
    for (i64 s = 0; s < S; ++s) std::copy_n(context + s * N * E, N * E, out + (s * B + b) * N * E);
  }
}
