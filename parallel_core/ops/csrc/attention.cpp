// Causal attention in tiles (Dao et al., "FlashAttention"): no S x S array exists, forward or backward.
//
// A thread works on one (batch, key/value head) at a time: keys and values are packed once, then every query head of
// the group passes over them in blocks of kQ rows and kK keys. The backward pass recomputes the weights from the
// saved log-sum-exp and accumulates dK and dV locally, so the result does not depend on the thread count.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "gemm.h"

namespace {

using namespace pc;

constexpr i64 kQ = 32, kK = 256;

struct Shape {
  i64 S, B, N, G, D;
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
  Visible(const int32_t* start, i64 s, i64 k0, i64 k1) {
    const i64 from = start ? std::min<i64>(start[s], s) : 0;
    first = std::clamp<i64>(from - k0, 0, k1 - k0);
    last = std::clamp<i64>(s + 1 - k0, first, k1 - k0);
  }
};

i64 first_key(const int32_t* start, i64 q0, i64 q1) {
  if (!start) return 0;
  i64 first = q0;
  for (i64 s = q0; s < q1; ++s) first = std::min<i64>(first, start[s]);
  return std::max<i64>(first, 0) / 16 * 16;  // dropout counters and vector loads want round positions
}

struct Attention {
  Shape n;
  float scale, rate;
  Dropout dropout;
  const int32_t* document_start;  // [B, S] or null

  const int32_t* start(i64 b) const { return document_start ? document_start + b * n.S : nullptr; }

  void keep(float* out, i64 b, i64 head, i64 s, i64 k0, i64 count) const {
    dropout.fill(out, static_cast<u32>(k0 / 4), (count + 3) / 4, static_cast<u32>(s), static_cast<u32>(b * n.N + head),
                 2);
  }

  // One block of query rows: online softmax over tiles of keys.
  void forward_block(const float* q, const float* kt, const float* v, i64 b, i64 head, i64 q0, i64 q1, i64 Sp, i64 Dp,
                     float* p, float* o, float* keep_row, float* out, i64 out_stride, float* lse) const {
    float top[kQ], sum[kQ];
    const i64 rows = q1 - q0;
    std::fill(top, top + rows, -INFINITY);
    std::fill(sum, sum + rows, 0.0f);
    bool first_tile = true;
    for (i64 k0 = first_key(start(b), q0, q1); k0 < q1; k0 += kK, first_tile = false) {
      const i64 k1 = std::min(k0 + kK, q1), width = padded(k1 - k0);
      small_gemm(rows, width, n.D, q, Dp, 1, kt + k0, Sp, p, kK, false);
      for (i64 i = 0; i < rows; ++i) {
        float* row = p + i * kK;
        const Visible seen(start(b), q0 + i, k0, k1);
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
          for (i64 d = 0; d < Dp; ++d) o[i * Dp + d] *= shrink;
        top[i] = best;
        if (rate > 0.0f) {
          keep(keep_row, b, head, q0 + i, k0, k1 - k0);
#pragma omp simd
          for (i64 t = seen.first; t < seen.last; ++t) row[t] *= keep_row[t];
        }
      }
      small_gemm(rows, Dp, k1 - k0, p, kK, 1, v + k0 * Dp, Dp, o, Dp, !first_tile);
    }
    for (i64 i = 0; i < rows; ++i) {
      const float inverse = 1.0f / sum[i];
      float* to = out + (q0 + i) * out_stride;
#pragma omp simd
      for (i64 d = 0; d < n.D; ++d) to[d] = o[i * Dp + d] * inverse;
      lse[q0 + i] = top[i] + std::log(sum[i]);
    }
  }

  void forward(const float* q, Strides qs, const float* k, Strides ks, const float* v, Strides vs, float* out,
               float* lse) const {
    const i64 Sp = padded(n.S), Dp = padded(n.D), heads = n.N / n.G;
    const Strides os{n.B * n.N * n.D, n.N * n.D, heads * n.D};
    parallel(n.S * n.S * n.B * n.N, [&](int part, int parts) {
      Buffer kt(n.D * Sp), vp(n.S * Dp), qb(kQ * Dp), p(kQ * kK), o(kQ * Dp), keep_row(kK + 4);
      const Range r = share(n.B * n.G, part, parts);
      for (i64 bg = r.begin; bg < r.end; ++bg) {
        const i64 b = bg / n.G, g = bg % n.G;
        pack_transposed(k + ks.at(0, b, g), ks.s, n.S, Sp, n.D, kt);
        pack(v + vs.at(0, b, g), vs.s, n.S, n.D, Dp, 1.0f, vp);
        for (i64 h = 0; h < heads; ++h)
          for (i64 q0 = 0; q0 < n.S; q0 += kQ) {
            const i64 q1 = std::min(q0 + kQ, n.S), head = g * heads + h;
            pack(q + qs.at(q0, b, g) + h * n.D, qs.s, q1 - q0, n.D, Dp, scale, qb);
            forward_block(qb, kt, vp, b, head, q0, q1, Sp, Dp, p, o, keep_row, out + os.at(0, b, g) + h * n.D, os.s,
                          lse + (b * n.N + head) * n.S);
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
      const Visible seen(start(b), q0 + i, k0, k1);
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
    const i64 S = n.S, D = n.D, Sp = padded(S), Dp = padded(D), heads = n.N / n.G;
    const Strides os{n.B * n.N * D, n.N * D, heads * D};
    parallel(S * S * n.B * n.N, [&](int part, int parts) {
      Buffer kp(S * Dp), kt(D * Sp), vt(D * Sp), dkp(S * Dp), dvp(S * Dp);
      Buffer qb(kQ * Dp), dob(kQ * Dp), dqb(kQ * Dp), p(kQ * kK), ds(kQ * kK), keep_row(kK + 4);
      const Range r = share(n.B * n.G, part, parts);
      for (i64 bg = r.begin; bg < r.end; ++bg) {
        const i64 b = bg / n.G, g = bg % n.G;
        pack(k + ks.at(0, b, g), ks.s, S, D, Dp, scale, kp);
        pack_transposed(k + ks.at(0, b, g), ks.s, S, Sp, D, kt);
        pack_transposed(v + vs.at(0, b, g), vs.s, S, Sp, D, vt);
        std::fill(dkp.data, dkp.data + S * Dp, 0.0f);
        std::fill(dvp.data, dvp.data + S * Dp, 0.0f);
        for (i64 h = 0; h < heads; ++h)
          for (i64 q0 = 0; q0 < S; q0 += kQ) {
            const i64 q1 = std::min(q0 + kQ, S), rows = q1 - q0, head = g * heads + h;
            const i64 o_at = os.at(q0, b, g) + h * D;
            const float* norm = lse + (b * n.N + head) * S;
            pack(q + qs.at(q0, b, g) + h * D, qs.s, rows, D, Dp, scale, qb);
            pack(dout + o_at, os.s, rows, D, Dp, 1.0f, dob);
            float delta[kQ];
            for (i64 i = 0; i < rows; ++i) {
              const float* o_row = out + o_at + i * os.s;
              float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
              for (i64 d = 0; d < D; ++d) sum += o_row[d] * dob[i * Dp + d];
              delta[i] = sum;
            }
            bool first_tile = true;
            for (i64 k0 = first_key(start(b), q0, q1); k0 < q1; k0 += kK, first_tile = false) {
              const i64 k1 = std::min(k0 + kK, q1), keys = k1 - k0, width = padded(keys);
              small_gemm(rows, width, D, qb, Dp, 1, kt + k0, Sp, p, kK, false);
              small_gemm(rows, width, D, dob, Dp, 1, vt + k0, Sp, ds, kK, false);
              backward_tile(p, ds, norm, delta, keep_row, b, head, q0, q1, k0, k1);
              small_gemm(keys, Dp, rows, p, 1, kK, dob, Dp, dvp + k0 * Dp, Dp, true);
              small_gemm(keys, Dp, rows, ds, 1, kK, qb, Dp, dkp + k0 * Dp, Dp, true);
              small_gemm(rows, Dp, keys, ds, kK, 1, kp + k0 * Dp, Dp, dqb, Dp, !first_tile);
            }
            for (i64 i = 0; i < rows; ++i)
              std::copy(dqb + i * Dp, dqb + i * Dp + D, dq + dqs.at(q0 + i, b, g) + h * D);
          }
        for (i64 s = 0; s < S; ++s) {
          std::copy(dkp + s * Dp, dkp + s * Dp + D, dk + dks.at(s, b, g));
          std::copy(dvp + s * Dp, dvp + s * Dp + D, dv + dvs.at(s, b, g));
        }
      }
    }, kPieces);
  }
};

Attention make(const i64* shape, const int32_t* start, float scale, float rate, u64 seed0, u64 seed1) {
  return {{shape[0], shape[1], shape[2], shape[3], shape[4]}, scale, rate, Dropout(rate, seed0, seed1), start};
}

Strides strides(const i64* s) { return {s[0], s[1], s[2]}; }

}  // namespace

// shape: S, B, N, G, D, then (s, b, g) strides of q, k and v. out [S, B, N * D]; lse [B, N, S].
PC_API void pc_attention(const float* q, const float* k, const float* v, const int32_t* document_start, float* out,
                         float* lse, const i64* shape, float scale, float rate, u64 seed0, u64 seed1) {
  make(shape, document_start, scale, rate, seed0, seed1)
      .forward(q, strides(shape + 5), k, strides(shape + 8), v, strides(shape + 11), out, lse);
}

// shape continues with the strides of dq, dk and dv.
PC_API void pc_attention_grad(const float* q, const float* k, const float* v, const int32_t* document_start,
                              const float* out, const float* dout, const float* lse, float* dq, float* dk, float* dv,
                              const i64* shape, float scale, float rate, u64 seed0, u64 seed1) {
  make(shape, document_start, scale, rate, seed0, seed1)
      .backward(q, strides(shape + 5), k, strides(shape + 8), v, strides(shape + 11), out, dout, lse, dq,
                strides(shape + 14), dk, strides(shape + 17), dv, strides(shape + 20));
}
