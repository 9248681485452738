// Causal attention in tiles (Dao et al., "FlashAttention"): no S x S array exists, forward or backward.
//
// A thread works on one (batch, key/value head) at a time: keys and values are packed once, then every query head of
// the group passes over them in blocks of kQ queries and kK keys. Scores are held with a row for each key, so that the
// lanes of a vector are queries: largest scores, sums and masks then need no step across lanes. The backward pass
// recomputes the weights from the saved log-sum-exp and accumulates dK and dV locally, so the result does not depend on
// the thread count. It takes as many keys at a time as the cache holds with their gradients, and adds up dQ over them.
//
// Queries and keys are each a run of positions, [q_first, q_first + S) and [k_first, k_first + T): a whole sequence has
// both at 0 and S = T, a rank of a cut sequence or a step of generation has less. A key is visible to a query when it
// is not behind it and not before the query's start. A query that sees no key gives 0, with log-sum-exp -infinity.
//
// X is what products are of, float or u32; see gemm.h. Scores, weights and all sums are float32 numbers either way.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "gemm.h"
#include "kernels.h"
#include "matmul.h"

namespace {

using namespace pc;

constexpr i64 kQ = 32, kK = 256;
constexpr i64 kVecs = kQ / kLanes;
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

template <class X>
struct Buffer {
  X* data;
  explicit Buffer(i64 n) : data(static_cast<X*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator X*() const { return data; }
};

// out [rows, Dp] = factor * in, zeros beyond D.
void pack(const float* in, i64 stride, i64 rows, i64 D, i64 Dp, float factor, float* out) {
  for (i64 s = 0; s < rows; ++s) {
#pragma omp simd
    for (i64 d = 0; d < D; ++d) out[s * Dp + d] = factor * in[s * stride + d];
    for (i64 d = D; d < Dp; ++d) out[s * Dp + d] = 0.0f;
  }
}

// out [rows / 2, width], of `line` numbers: pairs of those of in [rows, width] that stand below one another. A last row
// that is alone has zeros below it.
void pair(const float* in, i64 rows, i64 width, i64 line, u32* out) {
  for (i64 r = 0; r < rows; r += 2, in += 2 * line, out += line)
    for (i64 i = 0; i < width; i += kLanes) {
      const WordVec high = r + 1 < rows ? rounded_bits(vec(in + line + i)) : WordVec{};
      *reinterpret_cast<WordVec*>(out + i) = rounded_bits(vec(in + i)) >> 16 | high;
    }
}

// An operand [rows, Dp] that is summed along its rows, zeros beyond D.
void pack_rows(const float* in, i64 stride, i64 rows, i64 D, i64 Dp, float* out) {
  pack(in, stride, rows, D, Dp, 1.0f, out);
}
void pack_rows(const float* in, i64 stride, i64 rows, i64 D, i64 Dp, u32* out) {
  Buffer<float> row(Dp);
  for (i64 s = 0; s < rows; ++s) {
    pack(in + s * stride, stride, 1, D, Dp, 1.0f, row);
    narrow(row, out + s * Dp / 2, kBfloat16, Dp);
  }
}

// An operand that is summed over its rows.
void pack_lines(const float* in, i64 stride, i64 rows, i64 D, i64 Dp, float* out) {
  pack(in, stride, rows, D, Dp, 1.0f, out);
}
void pack_lines(const float* in, i64 stride, i64 rows, i64 D, i64 Dp, u32* out) {
  Buffer<float> two(2 * Dp);
  for (i64 s = 0; s < rows; s += 2) {
    const i64 count = std::min<i64>(2, rows - s);
    pack(in + s * stride, stride, count, D, Dp, 1.0f, two);
    pair(two, count, Dp, Dp, out + s / 2 * Dp);
  }
}

// out [D, kQ] = in [kQ, D] transposed, for D a multiple of kLanes. A perfect shuffle of n numbers moves the one at x to
// 2 x mod (n - 1): five of them move the one at (i, d) of [32, D] to (d, i).
void transpose(const float* in, i64 D, float* out) {
  static_assert(kQ == 32, "2^5");
  constexpr i64 n = kQ * kLanes;
  const auto shuffle = [](const float* from, float* to) {
#pragma omp simd
    for (i64 x = 0; x < n / 2; ++x) {
      to[2 * x] = from[x];
      to[2 * x + 1] = from[n / 2 + x];
    }
  };
  for (i64 d = 0; d < D; d += kLanes) {
    float a[n], b[n];
    for (i64 i = 0; i < kQ; ++i) vec(a + i * kLanes) = vec(in + i * D + d);
    shuffle(a, b);
    shuffle(b, a);
    shuffle(a, b);
    shuffle(b, a);
    shuffle(a, out + d * kQ);
  }
}

// Numbers [kQ, D] of a block of queries: as rows, padded, and transposed. Rows that it lacks are zero. With pairs they
// are rounded, so that sums of `lanes` agree with products.
template <class X>
struct Block {
  i64 D, width;
  Buffer<float> rows, lanes;
  Buffer<u32> row_pairs, lane_pairs;

  explicit Block(i64 D)
      : D(D), width(padded(D)), rows(kQ * width), lanes(kQ * width), row_pairs(kPer<X> == 2 ? kQ * width / 2 : 0),
        lane_pairs(kPer<X> == 2 ? kQ * width / 2 : 0) {}

  void take(const float* in, i64 stride, i64 count, float factor) {
    pack(in, stride, count, D, width, factor, rows);
    std::fill(rows + count * width, rows + kQ * width, 0.0f);
    for (i64 i = 0; kPer<X> == 2 && i < count * width; i += kLanes) vec(rows + i) = (Vec)rounded_bits(vec(rows + i));
    transpose(rows, width, lanes);
    if (kPer<X> == 2) {
      pair(rows, kQ, width, width, row_pairs);
      pair(lanes, width, kQ, kQ, lane_pairs);
    }
  }

  // For sums over queries.
  const X* over_queries() const {
    if constexpr (kPer<X> == 2)
      return row_pairs;
    else
      return rows;
  }

  // For sums over features.
  const X* over_features() const {
    if constexpr (kPer<X> == 2)
      return lane_pairs;
    else
      return lanes;
  }
};

// What a block of queries sees of the keys: query i those of [first[i], last + i], as positions among the keys.
struct Sight {
  int32_t first[kQ] = {};
  i64 last, earliest = 0, latest = 0;  // the smallest and the largest of `first`

  Sight(const Shape& n, const int32_t* start, i64 q0, i64 q1) : last(n.q_first + q0 - n.k_first) {
    if (start == nullptr) return;
    for (i64 i = 0; i < q1 - q0; ++i) {
      const i64 position = n.q_first + q0 + i, from = std::min<i64>(start[q0 + i], position);
      first[i] = static_cast<int32_t>(std::max<i64>(from - n.k_first, 0));
    }
    const auto ends = std::minmax_element(first, first + (q1 - q0));
    earliest = *ends.first;
    latest = *ends.second;
  }

  // The keys of [begin, end) that some of the `rows` queries see; from a place that is round for dropout's counters.
  Range keys(i64 rows, i64 begin, i64 end) const {
    end = std::clamp<i64>(last + rows, begin, end);
    return {std::min(std::max(earliest / 16 * 16, begin), end), end};
  }
};

i64 whole_tiles(i64 rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// The keys [k0, k0 + keys) before a block of queries. Scores and weights [keys, kQ] of a vector of queries exist up to
// the last key that is seen by one of them, or by one that products take together with one of them.
struct Tile {
  const Sight& sight;
  i64 k0, keys;

  i64 last() const { return sight.last - k0; }
  i64 end(i64 v) const {
    const i64 queries = std::min(whole_tiles((v + 1) * kLanes), kQ);
    return std::min(whole_tiles(std::max<i64>(last() + queries, 0)), keys);
  }

  // scores = a [keys, K] b [K, kQ]
  template <class X>
  void scores(const X* a, i64 lda, i64 K, const X* b, float* to) const {
    lda /= kPer<X>;
    K = steps<X>(K);
    for (i64 v = 0, begin = 0; v < kVecs; begin = std::max(begin, end(v++)))
      if (end(v) > begin)
        small_gemm(end(v) - begin, (kVecs - v) * kLanes, K, a + begin * lda, lda, 1, b + v * kLanes, kQ,
                   to + begin * kQ + v * kLanes, kQ, false);
  }

  // out [rows, N] (+)= weights^T b [keys, N]
  template <class X>
  void by_query(i64 rows, i64 N, const X* weights, const X* b, float* out, bool add) const {
    const auto seen = [&](i64 i, i64 m) { return Range{0, steps<X>(std::clamp<i64>(last() + i + m, 0, keys))}; };
    small_gemm(rows, N, seen, weights, 1, kQ, b, N, out, N, add);
  }

  // out [keys, N] += weights b [rows, N]
  template <class X>
  void by_key(i64 rows, i64 N, const X* weights, const X* b, float* out) const {
    const auto seen = [&](i64 t, i64) {
      return Range{std::clamp<i64>(t - last(), 0, rows) / kPer<X>, steps<X>(rows)};
    };
    small_gemm(keys, N, seen, weights, kQ / kPer<X>, 1, b, N, out, N, true);
  }

  // Returns weights as they are, or rounded into room for [keys, kQ] of them, for sums over keys. Of pairs one half can
  // be of a key that a query does not see: its weight is zero.
  const float* over_keys(const float* weights, float*) const { return weights; }
  const u32* over_keys(const float* weights, u32* room) const {
    for (i64 v = 0; v < kVecs; ++v) pair(weights + v * kLanes, end(v), kLanes, kQ, room + v * kLanes);
    return room;
  }

  // The same for sums over queries.
  const float* over_queries(const float* weights, float*) const { return weights; }
  const u32* over_queries(const float* weights, u32* room) const {
    narrow(weights, room, kBfloat16, keys * kQ);
    return room;
  }

  template <class X>
  static i64 steps(i64 n) {
    return (n + kPer<X> - 1) / kPer<X>;
  }

  // Makes the scores of what queries do not see -infinity.
  void hide(float* scores) const {
    for (i64 v = 0; v < kVecs; ++v) {
      const IntVec first = *reinterpret_cast<const IntVec*>(sight.first + v * kLanes) - static_cast<int32_t>(k0);
      const IntVec last_of = (IntVec)lane_numbers() + static_cast<int32_t>(last() + v * kLanes);
      const auto cover = [&](i64 begin, i64 end) {
        for (i64 t = begin; t < end; ++t) {
          Vec& score = vec(scores + t * kQ + v * kLanes);
          const IntVec key = IntVec{} + static_cast<int32_t>(t);
          score = (key < first) | (key > last_of) ? Vec{} - INFINITY : score;
        }
      };
      const i64 head = std::clamp<i64>(sight.latest - k0, 0, end(v));  // from here on nobody has yet to begin
      cover(0, head);
      cover(std::clamp<i64>(last() + v * kLanes + 1, head, end(v)), end(v));
    }
  }
};

struct Attention {
  Shape n;
  float scale, rate;
  Dropout dropout;
  const int32_t* document_start;  // [B, S] or null
  i64 start_stride;               // from one sample's to the next one's
  bool further = false;           // results are given of other keys, or gradients, and these are joined or added

  const int32_t* start(i64 b) const { return document_start ? document_start + b * start_stride : nullptr; }

  // The factors of four keys from `key` on for the vector of queries from `query` on.
  void keep(Vec* factors, i64 b, i64 head, i64 query, i64 key) const {
    dropout.fill(factors, WordVec{} + static_cast<u32>((n.k_first + key) / 4),
                 lane_numbers() + static_cast<u32>(n.q_first + query),
                 static_cast<u32>(b * n.all_heads + n.head_first + head), 2);
  }

  // Weights from the scores of `keys` keys for a vector of queries, relative to their largest score, and what they
  // change in `top` and `sum`. Returns by what the queries' earlier weights shrink.
  static Vec softmax(float* scores, i64 keys, Vec& top, Vec& sum) {
    Vec best = top, total{};
    for (i64 t = 0; t < keys; ++t) best = vec(scores + t * kQ) > best ? vec(scores + t * kQ) : best;
    const Vec shift = best == -INFINITY ? Vec{} : best;  // nothing is seen yet: every weight is 0
    for (i64 t = 0; t < keys; ++t) {
      const Vec weight = fast_exp(vec(scores + t * kQ) - shift);
      vec(scores + t * kQ) = weight;
      total += weight;
    }
    const Vec shrink = fast_exp(top - shift);
    top = best;
    sum = sum * shrink + total;
    return shrink;
  }

  // One block of queries: online softmax over tiles of keys.
  template <class X>
  void forward_block(const Block<X>& q, const X* k, const X* v, i64 b, i64 head, i64 q0, i64 q1, float* p, X* room,
                     float* o, float* out, i64 out_stride, float* lse) const {
    const i64 Dp = q.width, Ep = padded(n.E);
    const Sight sight(n, start(b), q0, q1);
    const Range seen = sight.keys(q1 - q0, 0, n.T);
    Vec top[kVecs], sum[kVecs] = {};
    std::fill(top, top + kVecs, Vec{} - INFINITY);
    std::fill(o, o + kQ * Ep, 0.0f);
    if (further) {  // what is known is one more key of that weight
      pack(out + q0 * out_stride, out_stride, q1 - q0, n.E, Ep, 1.0f, o);
      for (i64 i = 0; i < q1 - q0; ++i) {
        top[i / kLanes][i % kLanes] = lse[q0 + i];
        sum[i / kLanes][i % kLanes] = lse[q0 + i] == -INFINITY ? 0.0f : 1.0f;
      }
    }
    for (i64 k0 = seen.begin; k0 < seen.end; k0 += kK) {
      const Tile tile{sight, k0, std::min(kK, seen.end - k0)};
      tile.scores(k + k0 * Dp / kPer<X>, Dp, n.D, q.over_features(), p);
      tile.hide(p);
      for (i64 i = 0; i < kVecs; ++i) {
        const i64 keys = tile.end(i);
        float* weights = p + i * kLanes;
        const Vec shrink = softmax(weights, keys, top[i], sum[i]);
        for (i64 l = 0; (further || k0 > seen.begin) && l < kLanes; ++l)
          if (shrink[l] != 1.0f)
            for (i64 d = 0; d < Ep; d += kLanes) vec(o + (i * kLanes + l) * Ep + d) *= shrink[l];
        for (i64 t = 0; rate > 0.0f && t < keys; t += 4) {
          Vec factors[4];
          keep(factors, b, head, q0 + i * kLanes, k0 + t);
          for (i64 j = 0; j < std::min<i64>(4, keys - t); ++j) vec(weights + (t + j) * kQ) *= factors[j];
        }
      }
      tile.by_query(q1 - q0, Ep, tile.over_keys(p, room), v + k0 / kPer<X> * Ep, o, further || k0 > seen.begin);
    }
    for (i64 i = 0; i < q1 - q0; ++i) {
      const float total = sum[i / kLanes][i % kLanes], largest = top[i / kLanes][i % kLanes];
      const bool blind = total == 0.0f;
      const float inverse = blind ? 0.0f : 1.0f / total;
      float* to = out + (q0 + i) * out_stride;
#pragma omp simd
      for (i64 d = 0; d < n.E; ++d) to[d] = o[i * Ep + d] * inverse;
      lse[q0 + i] = blind ? -INFINITY : largest + std::log(total);
    }
  }

  // Products of so many queries round their operands where those of linear layers do.
  template <class... Arguments>
  void forward(Arguments... arguments) const {
    rounds(n.S * n.B) ? forward_of<u32>(arguments...) : forward_of<float>(arguments...);
  }
  template <class... Arguments>
  void backward(Arguments... arguments) const {
    rounds(n.S * n.B) ? backward_of<u32>(arguments...) : backward_of<float>(arguments...);
  }

  template <class X>
  void forward_of(const float* q, Strides qs, const float* k, Strides ks, const float* v, Strides vs, float* out,
               float* lse) const {
    const i64 Dp = padded(n.D), Ep = padded(n.E), heads = n.N / n.G;
    const Strides os{n.B * n.N * n.E, n.N * n.E, heads * n.E};
    parallel(n.S * n.T * n.B * n.N, [&](int part, int parts) {
      Buffer<X> kp(n.T * Dp / kPer<X>), vp(Tile::steps<X>(n.T) * Ep), room(kPer<X> == 2 ? kQ * kK / 2 : 0);
      Buffer<float> p(kQ * kK), o(kQ * Ep);
      Block<X> block(n.D);
      const Range r = share(n.B * n.G, part, parts);
      for (i64 bg = r.begin; bg < r.end; ++bg) {
        const i64 b = bg / n.G, g = bg % n.G;
        pack_rows(k + ks.at(0, b, g), ks.s, n.T, n.D, Dp, kp);
        pack_lines(v + vs.at(0, b, g), vs.s, n.T, n.E, Ep, vp);
        for (i64 h = 0; h < heads; ++h)
          for (i64 q0 = 0; q0 < n.S; q0 += kQ) {
            const i64 q1 = std::min(q0 + kQ, n.S), head = g * heads + h;
            block.take(q + qs.at(q0, b, g) + h * n.D, qs.s, q1 - q0, scale);
            forward_block<X>(block, kp, vp, b, head, q0, q1, p, room, o, out + os.at(0, b, g) + h * n.E, os.s,
                          lse + (b * n.N + head) * n.S);
          }
      }
    }, kPieces);
  }

  // Weights and the gradients of scores, in place of the scores p and of dp = V dO^T, for a vector of queries.
  void weights_grad(float* p, float* dp, i64 keys, Vec norm, Vec delta, i64 b, i64 head, i64 query, i64 k0) const {
    Vec factors[4];
    for (i64 t = 0; t < keys; ++t) {
      const Vec weight = fast_exp(vec(p + t * kQ) - norm);
      Vec kept = weight, gradient = vec(dp + t * kQ);
      if (rate > 0.0f) {
        if (t % 4 == 0) keep(factors, b, head, query, k0 + t);
        kept *= factors[t % 4];
        gradient *= factors[t % 4];
      }
      vec(p + t * kQ) = kept;
      vec(dp + t * kQ) = weight * (gradient - delta);
    }
  }

  template <class X>
  void backward_of(const float* q, Strides qs, const float* k, Strides ks, const float* v, Strides vs, const float* out,
                const float* dout, const float* lse, float* dq, Strides dqs, float* dk, Strides dks, float* dv,
                Strides dvs) const {
    const i64 S = n.S, T = n.T, D = n.D, E = n.E, Dp = padded(D), Ep = padded(E), heads = n.N / n.G;
    const i64 most = std::min(std::max(kCached / (2 * Dp + 2 * Ep) / kK, i64{1}) * kK, T);
    const Strides os{n.B * n.N * E, n.N * E, heads * E};
    parallel(S * T * n.B * n.N, [&](int part, int parts) {
      Buffer<X> kp(most * Dp / kPer<X>), vp(most * Ep / kPer<X>), room(kPer<X> == 2 ? kQ * kK / 2 : 0);
      Buffer<X> key_lines(kPer<X> == 2 ? Tile::steps<X>(most) * Dp : 0);
      Buffer<float> dkp(most * Dp), dvp(most * Ep), p(kQ * kK), dp(kQ * kK), dqb(kQ * Dp);
      Block<X> query(D), gradient(E);
      Block<float> output(E);
      const Range r = share(n.B * n.G, part, parts);
      for (i64 bg = r.begin; bg < r.end; ++bg) {
        const i64 b = bg / n.G, g = bg % n.G;
        for (i64 first = 0; first < T; first += most) {  // the keys and values [first, end), by all that see them
          const i64 end = std::min(first + most, T), count = end - first;
          pack_rows(k + ks.at(first, b, g), ks.s, count, D, Dp, kp);
          pack_rows(v + vs.at(first, b, g), vs.s, count, E, Ep, vp);
          if (kPer<X> == 2) pack_lines(k + ks.at(first, b, g), ks.s, count, D, Dp, key_lines);
          if (further) {
            pack(dk + dks.at(first, b, g), dks.s, count, D, Dp, 1.0f, dkp);
            pack(dv + dvs.at(first, b, g), dvs.s, count, E, Ep, 1.0f, dvp);
          } else {
            std::fill(dkp.data, dkp.data + count * Dp, 0.0f);
            std::fill(dvp.data, dvp.data + count * Ep, 0.0f);
          }
          for (i64 h = 0; h < heads; ++h)
            for (i64 q0 = 0; q0 < S; q0 += kQ) {
              const i64 q1 = std::min(q0 + kQ, S), rows = q1 - q0, head = g * heads + h;
              const Sight sight(n, start(b), q0, q1);
              const Range seen = sight.keys(rows, first, end);
              const bool add = further || first > 0;
              if (seen.begin >= seen.end && add) continue;
              const i64 o_at = os.at(q0, b, g) + h * E;
              float* dq_at = dq + dqs.at(q0, b, g) + h * D;
              query.take(q + qs.at(q0, b, g) + h * D, qs.s, rows, scale);
              gradient.take(dout + o_at, os.s, rows, 1.0f);
              output.take(out + o_at, os.s, rows, 1.0f);
              float norm[kQ] = {}, delta[kQ];
              for (i64 i = 0; i < kQ; i += kLanes) {
                Vec sum{};  // in the order of dO V^T: equal where a query sees one key, with pairs nearly so
                for (i64 d = 0; d < E; ++d) sum += vec(output.lanes + d * kQ + i) * vec(gradient.lanes + d * kQ + i);
                vec(delta + i) = sum;
              }
              for (i64 i = 0; i < rows; ++i) {
                const float own = lse[(b * n.N + head) * S + q0 + i];
                norm[i] = own == -INFINITY ? 0.0f : own;  // of one that sees no key
              }
              std::fill(dqb.data, dqb.data + rows * Dp, 0.0f);
              for (i64 k0 = seen.begin; k0 < seen.end; k0 += kK) {
                const Tile tile{sight, k0, std::min(kK, seen.end - k0)};
                const i64 at = k0 - first;
                tile.scores<X>(kp + at * Dp / kPer<X>, Dp, D, query.over_features(), p);
                tile.scores<X>(vp + at * Ep / kPer<X>, Ep, E, gradient.over_features(), dp);
                tile.hide(p);
                for (i64 i = 0; i < kVecs; ++i)
                  weights_grad(p + i * kLanes, dp + i * kLanes, tile.end(i), vec(norm + i * kLanes),
                               vec(delta + i * kLanes), b, head, q0 + i * kLanes, k0);
                const X* lines = kPer<X> == 2 ? key_lines + at / kPer<X> * Dp : kp + at * Dp;
                tile.by_key(rows, Ep, tile.over_queries(p, room), gradient.over_queries(), dvp + at * Ep);
                tile.by_key(rows, Dp, tile.over_queries(dp, room), query.over_queries(), dkp + at * Dp);
                tile.by_query(rows, Dp, tile.over_keys(dp, room), lines, dqb, k0 > seen.begin);
              }
              for (i64 i = 0; i < rows; ++i) {
                const float* from = dqb + i * Dp;
                float* to = dq_at + i * dqs.s;
#pragma omp simd
                for (i64 d = 0; d < D; ++d) to[d] = (add ? to[d] : 0.0f) + scale * from[d];
              }
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
  return {n, scale, rate, Dropout(rate, seed0, seed1), start, n.S};
}

Strides strides(const i64* s) { return {s[0], s[1], s[2]}; }

// ---- one new token a sequence ---------------------------------------------------------------------------------------
// Every sum runs in an order of its own position alone: vectors of kLanes partial sums, joined in one order.
float dot(const float* a, const float* b, i64 D) {
  Vec sum{};
  i64 d = 0;
  for (; d + kLanes <= D; d += kLanes) sum += *reinterpret_cast<const Vec*>(a + d) * *reinterpret_cast<const Vec*>(b + d);
  float total = sum_of(sum);
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

// A run of queries, and a run of keys that they see some of: the rows where they begin, and the positions of these.
struct Meeting {
  i64 query_row, q_first, key_row, k_first, num_keys;
};

// Calls body(attention, rows of queries, rows of keys) for `count` meetings. `shape` has the queries of each for S;
// document_start [B, positions] is of the whole sequence.
template <class Body>
void for_meetings(const i64* shape, const i64* meetings, i64 count, const int32_t* document_start, i64 positions,
                  float scale, float rate, u64 seed0, u64 seed1, Body body) {
  for (i64 i = 0; i < count; ++i) {
    Meeting m;
    std::memcpy(&m, meetings + i * static_cast<i64>(sizeof(m) / sizeof(i64)), sizeof(m));
    Attention a = make(shape, document_start ? document_start + m.q_first : nullptr, scale, rate, seed0, seed1);
    a.n.T = m.num_keys;
    a.n.q_first = m.q_first;
    a.n.k_first = m.k_first;
    a.start_stride = positions;
    a.further = true;
    body(a, m.query_row, m.key_row);
  }
}

// What queries see of further keys, joined with out [rows, B, N * E] and lse [rows / S, B, N, S], the attention over
// those before: 0 and -infinity where there were none.
PC_API void pc_attention_meetings(const float* q, const float* k, const float* v, const int32_t* document_start,
                                  i64 positions, float* out, float* lse, const i64* shape, const i64* meetings,
                                  i64 count, float scale, float rate, u64 seed0, u64 seed1) {
  const Strides qs = strides(shape + kNumbers), ks = strides(shape + kNumbers + 3), vs = strides(shape + kNumbers + 6);
  for_meetings(shape, meetings, count, document_start, positions, scale, rate, seed0, seed1,
               [&](const Attention& a, i64 row, i64 key_row) {
                 const i64 heads = row * a.n.B * a.n.N;
                 a.forward(q + row * qs.s, qs, k + key_row * ks.s, ks, v + key_row * vs.s, vs, out + heads * a.n.E,
                           lse + heads);
               });
}

// Adds to dq, dk and dv, whose strides are those of q, k and v; out and lse are over all keys.
PC_API void pc_attention_meetings_grad(const float* q, const float* k, const float* v, const int32_t* document_start,
                                       i64 positions, const float* out, const float* dout, const float* lse, float* dq,
                                       float* dk, float* dv, const i64* shape, const i64* meetings, i64 count,
                                       float scale, float rate, u64 seed0, u64 seed1) {
  const Strides qs = strides(shape + kNumbers), ks = strides(shape + kNumbers + 3), vs = strides(shape + kNumbers + 6);
  for_meetings(shape, meetings, count, document_start, positions, scale, rate, seed0, seed1,
               [&](const Attention& a, i64 row, i64 key_row) {
                 const i64 heads = row * a.n.B * a.n.N, keys = key_row * ks.s, values = key_row * vs.s;
                 a.backward(q + row * qs.s, qs, k + keys, ks, v + values, vs, out + heads * a.n.E,
                            dout + heads * a.n.E, lse + heads, dq + row * qs.s, qs, dk + keys, ks, dv + values, vs);
               });
}

// A ring of ranks that pass memory on: functions of the collectives' library, what they know of the ring by, and the
// fields of a float32 message.
struct Ring {
  void* group;
  int (*send_to)(void* group, const void* x, i64 bytes, int dtype, int to, double limit);
  int (*receive_from)(void* group, void* x, i64 bytes, int dtype, int from, double limit);
  i64 dtype, next, previous;
  double limit;

  int send(const float* x, i64 n) const {
    return send_to(group, x, n * static_cast<i64>(sizeof(float)), static_cast<int>(dtype), static_cast<int>(next), limit);
  }
  int receive(float* x, i64 n) const {
    return receive_from(group, x, n * static_cast<i64>(sizeof(float)), static_cast<int>(dtype),
                        static_cast<int>(previous), limit);
  }
};

// Calls body(keys, first meeting, meetings) for the n numbers of this rank's keys and those of all others, which visit
// one after another in `room`, and travel on while the body computes. Returns the status of what failed, or 0.
template <class Body>
int for_visits(const Ring& ring, const float* keys, float* room, i64 n, const i64* meetings, const i64* counts,
               i64 ranks, Body body) {
  for (i64 r = 0; r < ranks; meetings += counts[r++] * static_cast<i64>(sizeof(Meeting) / sizeof(i64))) {
    const bool last = r + 1 == ranks;
    if (const int status = last ? 0 : ring.send(keys, n)) return status;
    if (const int status = body(r, keys, meetings, counts[r])) return status;
    if (const int status = last ? 0 : ring.receive(room, n)) return status;
    keys = room;
  }
  return 0;
}

// pc_attention_meetings with the keys of all ranks; `keys` has n numbers, the values stand D behind the keys.
PC_API int pc_ring_attention(const void* passing, const float* q, const float* keys, float* room, i64 n,
                             const int32_t* document_start, i64 positions, float* out, float* lse, const i64* shape,
                             const i64* meetings, const i64* counts, i64 ranks, float scale, float rate, u64 seed0,
                             u64 seed1) {
  return for_visits(*static_cast<const Ring*>(passing), keys, room, n, meetings, counts, ranks,
                    [&](i64, const float* k, const i64* met, i64 count) {
                      pc_attention_meetings(q, k, k + shape[5], document_start, positions, out, lse, shape, met, count,
                                            scale, rate, seed0, seed1);
                      return 0;
                    });
}

// pc_attention_meetings_grad with the keys of all ranks; dkeys are the gradients of this rank's, from all queries. They
// travel a step behind the keys, and come home last. `room` is for 2 n numbers.
PC_API int pc_ring_attention_grad(const void* passing, const float* q, const float* keys, float* room, i64 n,
                                  const int32_t* document_start, i64 positions, const float* out, const float* dout,
                                  const float* lse, float* dq, float* dkeys, const i64* shape, const i64* meetings,
                                  const i64* counts, i64 ranks, float scale, float rate, u64 seed0, u64 seed1) {
  const Ring& ring = *static_cast<const Ring*>(passing);
  float* home = room + n;
  const int status = for_visits(
      ring, keys, room, n, meetings, counts, ranks, [&](i64 r, const float* k, const i64* met, i64 count) {
        std::fill(dkeys, dkeys + n, 0.0f);
        pc_attention_meetings_grad(q, k, k + shape[5], document_start, positions, out, dout, lse, dq, dkeys,
                                   dkeys + shape[5], shape, met, count, scale, rate, seed0, seed1);
        if (r > 0) {
          if (const int failed = ring.receive(home, n)) return failed;
          pc_add(dkeys, home, n);
        }
        return ring.send(dkeys, n);
      });
  return status ? status : ring.receive(dkeys, n);
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
    Buffer<float> p(S == 1 ? T : 1);
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
  Buffer<int32_t> from(S);
  Buffer<float> context(S * N * E), lse(N * S);
  for (i64 b = 0; b < B; ++b) {
    const i64 first = firsts[b];
    for (i64 s = 0; s < S; ++s) from[s] = static_cast<int32_t>(std::max<i64>(first + s - window, 0));
    const i64 numbers[kNumbers] = {S, first + S, 1, N, G, D, E, first, 0, 0, N};
    make(numbers, from, scale, 0.0f, 0, 0)
        .forward_of<float>(q + b * qs.b, qs, keys + rows[b] * G * T * D, {D, 0, T * D}, values + rows[b] * G * T * E,
                 {E, 0, T * E}, context, lse);
    for (i64 s = 0; s < S; ++s) std::copy_n(context + s * N * E, N * E, out + (s * B + b) * N * E);
  }
}
