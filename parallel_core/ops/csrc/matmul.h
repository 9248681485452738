// Products of matrices on all threads, and those by the oneDNN library that MindSpore ships.
#pragma once

#include "half.h"

namespace pc {

extern bool bf16_products;       // linear layers, experts and attention round the operands of their products to bfloat16
extern bool float32_products;    // oneDNN's matmul primitive multiplies float32 numbers as it should
extern bool products_with[3];    // it multiplies float32 numbers by those of a kind of 16 bits, which it packs as they are

extern bool has_gemm_of_bf16;    // oneDNN has a gemm of bfloat16 numbers

// C [M, N] = op(A) op(B) (+ C) on this thread, of bfloat16 numbers with float32 sums, by that gemm. lda, ldb and ldc are
// the steps between rows.
void gemm_of_bf16(bool ta, bool tb, i64 M, i64 N, i64 K, const void* A, i64 lda, const void* B, i64 ldb, bool add,
                  float* C, i64 ldc);

inline thread_local std::vector<uint16_t> rounded_operands[2];  // of the last product that had no other room for them

constexpr i64 kFewRows = 32;  // so few are multiplied in float32, each alike whatever rows are beside it

// Whether products of so many rows round their operands to bfloat16.
inline bool rounds(i64 rows) { return bf16_products && rows > kFewRows; }

// A matrix of which element (i, j) is data[i * row + j * column].
struct Strided {
  const void* data;
  int kind;
  i64 row, column;
};

// Where a product goes: to a matrix [M, N], or onto what stands there.
struct Target {
  void* data;
  int kind;
  bool add;
};

// Divides `target` [M, N] along its longer dim and calls multiply(part, i, j, m, n, c, row, add) for blocks of it: the
// block [m, n] at (i, j) is written to c, or added to it, with `row` numbers from row to row. A block of a matrix of
// 16 bits is multiplied in float32 first, in room that stays in the thread's cache, and each number is rounded once.
template <class Multiply>
void by_blocks(i64 M, i64 N, i64 K, Target target, Multiply multiply) {
  const bool rows = M >= N, narrows = target.kind != kFloat32;
  const i64 length = rows ? M : N, across = rows ? N : M;
  constexpr i64 kRoom = 1 << 18, kLeast = 64;
  const i64 most = !narrows ? length : kRoom / across > kLeast ? kRoom / across : kLeast;
  parallel(M * N * K / 64, [&](int part, int parts) {
    static thread_local std::vector<float> room;
    const Range r = share(length, part, parts);
    for (i64 first = r.begin; first < r.end; first += most) {
      const i64 count = r.end - first < most ? r.end - first : most;
      const i64 i = rows ? first : 0, j = rows ? 0 : first, m = rows ? count : M, n = rows ? N : count;
      void* to = at(target.data, target.kind, i * N + j);
      if (!narrows) {
        multiply(part, i, j, m, n, static_cast<float*>(to), N, target.add);
        continue;
      }
      float* c = room_for(m * n, room);
      multiply(part, i, j, m, n, c, n, false);
      for (i64 row = 0; row < m; ++row)
        put(c + row * n, at(to, target.kind, row * N), target.kind, n, target.add);
    }
  });
}

// C [M, N] = A [M, K] B [K, N] (+ C) on all threads by oneDNN; A and B both float32 or both bfloat16, or A float32 and B of a
// kind in `products_with`. With `wide`, A is the room for these numbers [M, K] in bfloat16: they are rounded first, by
// the thread that multiplies them where rows are shared.
void onednn_product(i64 M, i64 N, i64 K, Strided A, Strided B, Target C, const float* wide = nullptr);

}  // namespace pc
