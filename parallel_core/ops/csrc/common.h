// Shared by all kernels: fixed work partition, vectors and their exp, a counter-based random generator.
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

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef u32 WordVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec& vec(float* x) { return *reinterpret_cast<Vec*>(x); }
inline const Vec& vec(const float* x) { return *reinterpret_cast<const Vec*>(x); }

inline i64 padded(i64 n) { return (n + kLanes - 1) / kLanes * kLanes; }

// How a vector is read and written: whole, or the first n numbers of it, with `other` in the place of the others.
struct Whole {
  Vec load(const float* from, float = 0.0f) const { return vec(from); }
  void store(float* to, Vec x) const { vec(to) = x; }
};
struct First {
  i64 n;
  Vec load(const float* from, float other = 0.0f) const {
    Vec x = Vec{} + other;
    std::memcpy(&x, from, static_cast<size_t>(n) * sizeof(float));
    return x;
  }
  void store(float* to, Vec x) const { std::memcpy(to, &x, static_cast<size_t>(n) * sizeof(float)); }
};

// Calls body(i, io) for every vector of n numbers, where io reads and writes it. A loop over floats that the compiler
// turns into vectors is slower where it has conditions: these become masks and branches of all that follows.
template <class Body>
inline void by_vectors(i64 n, Body body) {
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole());
  if (i < n) body(i, First{n - i});
}

// The sum of n lanes, a power of two: of halves, of their halves ...
template <int n>
inline float sum_of(const float* lanes) {
  typedef float Half __attribute__((vector_size(n * 2), aligned(4), may_alias));
  const Half sum = *reinterpret_cast<const Half*>(lanes) + *reinterpret_cast<const Half*>(lanes + n / 2);
  float sums[n / 2];
  std::memcpy(sums, &sum, sizeof(sum));
  return sum_of<n / 2>(sums);
}
template <>
inline float sum_of<1>(const float* lanes) {
  return *lanes;
}
inline float sum_of(Vec x) { return sum_of<kLanes>(reinterpret_cast<const float*>(&x)); }

// out[i] = f(in[i] ...) for n numbers.
template <class Function, class... In>
inline void map(i64 n, float* out, Function f, const In*... in) {
  by_vectors(n, [&](i64 i, auto io) { io.store(out + i, f(io.load(in + i)...)); });
}

// exp(x) for x <= 88 (larger arguments give exp(88)), 0 below -87.3; about 1 ulp. NaN stays NaN.
// For a float or a Vec, with words as wide.
template <class Float, class Word>
inline Float exp_of(Float x) {
  const Float most = Float{} + 88.0f, nothing{};
  const Float clamped = x > most ? most : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const Float shifted = clamped * 1.44269504f + magic;
  const Float n = shifted - magic;
  const Float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  const Float square = r * r;  // the polynomial in parts that need not wait for each other
  const Float high = r * 1.98756912e-4f + 1.39819994e-3f, middle = r * 8.33345205e-3f + 4.16657962e-2f;
  const Float p = ((high * square + middle) * square + (r * 1.66666657e-1f + 0.5f)) * square + r + 1.0f;
  Word bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  Float two_n;
  std::memcpy(&two_n, &bits, sizeof(bits));
  return x < -87.3f ? nothing : p * two_n;
}

inline float fast_exp(float x) { return exp_of<float, u32>(x); }
inline Vec fast_exp(Vec x) { return exp_of<Vec, WordVec>(x); }

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + fast_exp(-x)); }

// 0, 1, 2, ...
inline WordVec lane_numbers() {
  WordVec numbers;
  for (int l = 0; l < kLanes; ++l) numbers[l] = static_cast<u32>(l);
  return numbers;
}

// Low and high words of each word of x times m.
inline void wide_product(WordVec x, u32 m, WordVec* low, WordVec* high) {
  typedef u64 Pairs __attribute__((vector_size(kLanes * 4)));
  const Pairs lower = Pairs{} + 0xffffffffu;
  const Pairs even = ((Pairs)x & lower) * m, odd = ((Pairs)x >> 32) * m;
  *low = (WordVec)((even & lower) | odd << 32);
  *high = (WordVec)(even >> 32 | (odd & ~lower));
}

struct Dropout {
  u32 key0, key1, threshold;
  float scale;

  Dropout(float rate, u64 seed0, u64 seed1)
      : key0(static_cast<u32>(seed0)),
        key1(static_cast<u32>(seed1)),
        threshold(static_cast<u32>(static_cast<double>(rate) * 4294967296.0)),
        scale(1.0f / (1.0f - rate)) {}

  // keep[j][l] = 0 or 1 / (1 - rate): by word j of Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as
  // 1, 2, 3") for the counter (c0[l], c1[l], c2, c3).
  void fill(Vec keep[4], WordVec c0, WordVec c1, u32 c2, u32 c3) const {
    WordVec c[4] = {c0, c1, WordVec{} + c2, WordVec{} + c3};
    for (u32 round = 0; round < 10; ++round) {
      WordVec low[2], high[2];
      wide_product(c[0], 0xD2511F53u, &low[0], &high[0]);
      wide_product(c[2], 0xCD9E8D57u, &low[1], &high[1]);
      c[0] = high[1] ^ c[1] ^ (key0 + round * 0x9E3779B9u);
      c[1] = low[1];
      c[2] = high[0] ^ c[3] ^ (key1 + round * 0xBB67AE85u);
      c[3] = low[0];
    }
    for (int j = 0; j < 4; ++j) keep[j] = c[j] >= threshold ? Vec{} + scale : Vec{};
  }
};

}  // namespace pc
