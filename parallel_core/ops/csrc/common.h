// Shared by all kernels: fixed work partition, vector-friendly exp and erf, a counter-based random generator.
// Everything is float32 and row-major; sizes are int64. Results depend on the number of shares (of threads, unless it is
// fixed), never on timing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define PC_API extern "C" __attribute__((visibility("default")))

namespace pc {

using i64 = int64_t;
using u32 = uint32_t;
using u64 = uint64_t;

extern int num_threads;
extern int fixed_shares;  // into so many shares work is divided, whatever the number of threads; 0: one for each thread

inline int shares() { return fixed_shares > 0 ? fixed_shares : num_threads; }

// Calls body(context, part, parts) once for every part, on this thread and on the pool's workers, and returns when all
// are done. Parts are claimed one by one: a worker that is off its core holds nobody up but by the part it is on.
void run_parts(void (*body)(const void* context, int part, int parts), const void* context, int parts);

// Runs body(part, parts) for every part: `pieces` for each share, or one part in all when there is too little work to
// share. What a part covers depends on the number of shares only, never on who runs it.
template <class Body>
void parallel(i64 elements, Body body, int pieces = 1) {
  const int parts = elements < 65536 || shares() == 1 ? 1 : shares() * pieces;
  if (parts == 1 || num_threads == 1) {
    for (int part = 0; part < parts; ++part) body(part, parts);
    return;
  }
  run_parts([](const void* context, int part, int all) { (*static_cast<const Body*>(context))(part, all); }, &body,
            parts);
}

constexpr int kPieces = 4;  // pieces per thread where smaller ones cost nothing

struct Range {
  i64 begin, end;
};

inline Range share(i64 total, int part, int parts) { return {total * part / parts, total * (part + 1) / parts}; }

// exp(x) for x <= 88 (larger arguments give exp(88)), 0 below -87.3; about 1 ulp. NaN stays NaN.
inline float fast_exp(float x) {
  const float clamped = x > 88.0f ? 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const float shifted = clamped * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98756912e-4f;
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  u32 bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float two_n;
  std::memcpy(&two_n, &bits, 4);
  return x < -87.3f ? 0.0f : p * two_n;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// The standard normal distribution at x, and exp(-x^2 / 2).
// erfc(z) = exp(-z^2) t P(t), t = 1 / (1 + 0.4 z): P is a least-squares fit of degree 8, relative error 6e-8.
inline float normal_cdf(float x, float* exp_half_square) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.4f * z);
  float p = 0.041257817f;
  p = p * t - 0.14034204f;
  p = p * t + 0.084033407f;
  p = p * t + 0.087912902f;
  p = p * t + 0.079790972f;
  p = p * t + 0.19337903f;
  p = p * t + 0.20189106f;
  p = p * t + 0.22644265f;
  p = p * t + 0.22563426f;
  const float e = fast_exp(-z * z);
  *exp_half_square = e;
  const float tail = 0.5f * e * t * p;
  return x > 0.0f ? 1.0f - tail : tail;
}

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): four random words of a counter.
inline void philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1, u32 out[4]) {
  for (int round = 0; round < 10; ++round) {
    const u64 a = static_cast<u64>(c0) * 0xD2511F53u, b = static_cast<u64>(c2) * 0xCD9E8D57u;
    c0 = static_cast<u32>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<u32>(b);
    c2 = static_cast<u32>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<u32>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

struct Dropout {
  u32 key0, key1, threshold;
  float scale;

  Dropout(float rate, u64 seed0, u64 seed1)
      : key0(static_cast<u32>(seed0)),
        key1(static_cast<u32>(seed1)),
        threshold(static_cast<u32>(static_cast<double>(rate) * 4294967296.0)),
        scale(1.0f / (1.0f - rate)) {}

  // keep[i] = 0 or 1 / (1 - rate) for elements 4 * group ... of the stream (c1, c2, c3).
  void fill(float* keep, u32 group, i64 groups, u32 c1, u32 c2, u32 c3) const {
#pragma omp simd
    for (i64 g = 0; g < groups; ++g) {
      u32 word[4];
      philox(group + static_cast<u32>(g), c1, c2, c3, key0, key1, word);
      for (int j = 0; j < 4; ++j) keep[4 * g + j] = word[j] >= threshold ? scale : 0.0f;
    }
  }
};

}  // namespace pc
