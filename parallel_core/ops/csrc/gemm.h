// Two matrix products: oneDNN's for large ones, and one for small tiles whose operands are in cache already.
#pragma once

#include <type_traits>

#include "half.h"

namespace pc {

using Sgemm = int (*)(char, char, i64, i64, i64, float, const float*, i64, const float*, i64, float, float*, i64);
extern Sgemm sgemm;  // row-major C = alpha * op(A) op(B) + beta * C, one thread

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 8;
#endif

// What small tiles are multiplied of: numbers, or pairs of bfloat16 numbers that stand next to each other in a sum, the
// first in the lower bits. A step of a sum is then two products.
template <class T>
constexpr i64 kPer = 1;
template <>
constexpr i64 kPer<u32> = 2;

inline void multiply_add(Vec& c, float a, Vec b) { c += a * b; }
inline void multiply_add(Vec& c, u32 a, WordVec b) {
#if defined(__AVX512BF16__)
  c = (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#else
  const WordVec both = WordVec{} + a, high = WordVec{} + 0xffff0000u;
  c += (Vec)(both << 16) * (Vec)(b << 16) + (Vec)(both & high) * (Vec)(b & high);
#endif
}

typedef u32 Word __attribute__((may_alias));  // what is read as a pair has been written as two numbers
inline float number_of(const float* x) { return *x; }
inline u32 number_of(const u32* x) { return *reinterpret_cast<const Word*>(x); }
inline Vec lanes_of(const float* x) { return vec(x); }
inline WordVec lanes_of(const u32* x) { return *reinterpret_cast<const WordVec*>(x); }

template <int M, int NV, class T>
inline void tile(i64 K, const T* A, i64 a_row, i64 a_col, const T* B, i64 ldb, float* C, i64 ldc, bool add) {
  Vec c[M][NV];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) c[i][j] = add ? *reinterpret_cast<const Vec*>(C + i * ldc + j * kLanes) : Vec{};
  for (i64 k = 0; k < K; ++k) {
    decltype(lanes_of(B)) b[NV];
    for (int j = 0; j < NV; ++j) b[j] = lanes_of(B + k * ldb + j * kLanes);
    for (int i = 0; i < M; ++i) {
      const T a = number_of(A + i * a_row + k * a_col);
      for (int j = 0; j < NV; ++j) multiply_add(c[i][j], a, b[j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) *reinterpret_cast<Vec*>(C + i * ldc + j * kLanes) = c[i][j];
}

// Rows [i, i + m) of C sum over the k in sums(i, m).
template <int NV, class T, class Sums>
inline void column(i64 M, Sums sums, const T* A, i64 a_row, i64 a_col, const T* B, i64 ldb, float* C, i64 ldc,
                   bool add) {
  const auto rows = [&](auto size, i64 i) {
    const Range k = sums(i, size);
    tile<size, NV>(k.end - k.begin, A + i * a_row + k.begin * a_col, a_row, a_col, B + k.begin * ldb, ldb, C + i * ldc,
                   ldc, add);
  };
  i64 i = 0;
  for (; i + kTileRows <= M; i += kTileRows) rows(std::integral_constant<int, kTileRows>(), i);
  for (; i + 4 <= M; i += 4) rows(std::integral_constant<int, 4>(), i);
  for (; i < M; ++i) rows(std::integral_constant<int, 1>(), i);
}

// C [M, N] (+)= A [M, K] B [K, N], where rows [i, i + m) of A are known to be zero outside of columns sums(i, m).
// Element (i, k) of A is A[i * a_row + k * a_col]; N is a multiple of kLanes. With pairs, K counts these.
template <class T, class Sums>
inline void small_gemm(i64 M, i64 N, Sums sums, const T* A, i64 a_row, i64 a_col, const T* B, i64 ldb, float* C, i64 ldc,
                       bool add) {
  i64 j = 0;
  for (; j + 2 * kLanes <= N; j += 2 * kLanes) column<2>(M, sums, A, a_row, a_col, B + j, ldb, C + j, ldc, add);
  for (; j < N; j += kLanes) column<1>(M, sums, A, a_row, a_col, B + j, ldb, C + j, ldc, add);
}

// The same with all K columns of A.
template <class T>
inline void small_gemm(i64 M, i64 N, i64 K, const T* A, i64 a_row, i64 a_col, const T* B, i64 ldb, float* C, i64 ldc,
                       bool add) {
  small_gemm(M, N, [K](i64, i64) { return Range{0, K}; }, A, a_row, a_col, B, ldb, C, ldc, add);
}

}  // namespace pc
