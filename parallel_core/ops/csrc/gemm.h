// Two matrix products: oneDNN's for large ones, and one for small tiles whose operands are in cache already.
#pragma once

#include "common.h"

namespace pc {

using Sgemm = int (*)(char, char, i64, i64, i64, float, const float*, i64, const float*, i64, float, float*, i64);
extern Sgemm sgemm;  // row-major C = alpha * op(A) op(B) + beta * C, one thread

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline i64 padded(i64 n) { return (n + kLanes - 1) / kLanes * kLanes; }

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

template <int NV>
inline void column(i64 M, i64 K, const float* A, i64 a_row, i64 a_col, const float* B, i64 ldb, float* C, i64 ldc,
                   bool add) {
  i64 i = 0;
  for (; i + kTileRows <= M; i += kTileRows)
    tile<kTileRows, NV>(K, A + i * a_row, a_row, a_col, B, ldb, C + i * ldc, ldc, add);
  for (; i + 4 <= M; i += 4) tile<4, NV>(K, A + i * a_row, a_row, a_col, B, ldb, C + i * ldc, ldc, add);
  for (; i < M; ++i) tile<1, NV>(K, A + i * a_row, a_row, a_col, B, ldb, C + i * ldc, ldc, add);
}

// C [M, N] (+)= A [M, K] B [K, N]. Element (i, k) of A is A[i * a_row + k * a_col]; N is a multiple of kLanes.
inline void small_gemm(i64 M, i64 N, i64 K, const float* A, i64 a_row, i64 a_col, const float* B, i64 ldb, float* C,
                       i64 ldc, bool add) {
  i64 j = 0;
  for (; j + 2 * kLanes <= N; j += 2 * kLanes) column<2>(M, K, A, a_row, a_col, B + j, ldb, C + j, ldc, add);
  for (; j < N; j += kLanes) column<1>(M, K, A, a_row, a_col, B + j, ldb, C + j, ldc, add);
}

}  // namespace pc
