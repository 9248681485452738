// Two matrix products: oneDNN's for large ones, and one for small tiles whose operands are in cache already.
#pragma once

#include <type_traits>

#include "common.h"

namespace pc {

using Sgemm = int (*)(char, char, i64, i64, i64, float, const float*, i64, const float*, i64, float, float*, i64);
extern Sgemm sgemm;  // row-major C = alpha * op(A) op(B) + beta * C, one thread

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 8;
#endif

template <int M, int NV>
inline void tile(i64 K, const float* A, i64 a_row, i64 a_col, const float* B, i64 ldb, float* C, i64 ldc, bool add) {
  Vec c[M][NV];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) c[i][j] = add ? *reinterpret_cast<const Vec*>(C + i * ldc + j * kLanes) : Vec{};
  for (i64 k = 0; k < K; ++k) {
    Vec b[NV];
    for (int j = 0; j < NV; ++j) b[j] = *reinterpret_cast<const Vec*>(B + k * ldb + j * kLanes);
    for (int i = 0; i < M; ++i) {
      const float a = A[i * a_row + k * a_col];
      for (int j = 0; j < NV; ++j) c[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) *reinterpret_cast<Vec*>(C + i * ldc + j * kLanes) = c[i][j];
}

// Rows [i, i + m) of C sum over the k in sums(i, m).
template <int NV, class Sums>
inline void column(i64 M, Sums sums, const float* A, i64 a_row, i64 a_col, const float* B, i64 ldb, float* C, i64 ldc,
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
// Element (i, k) of A is A[i * a_row + k * a_col]; N is a multiple of kLanes.
template <class Sums>
inline void small_gemm(i64 M, i64 N, Sums sums, const float* A, i64 a_row, i64 a_col, const float* B, i64 ldb, float* C,
                       i64 ldc, bool add) {
  i64 j = 0;
  for (; j + 2 * kLanes <= N; j += 2 * kLanes) column<2>(M, sums, A, a_row, a_col, B + j, ldb, C + j, ldc, add);
  for (; j < N; j += kLanes) column<1>(M, sums, A, a_row, a_col, B + j, ldb, C + j, ldc, add);
}

// The same with all K columns of A.
inline void small_gemm(i64 M, i64 N, i64 K, const float* A, i64 a_row, i64 a_col, const float* B, i64 ldb, float* C,
                       i64 ldc, bool add) {
  small_gemm(M, N, [K](i64, i64) { return Range{0, K}; }, A, a_row, a_col, B, ldb, C, ldc, add);
}

}  // namespace pc
