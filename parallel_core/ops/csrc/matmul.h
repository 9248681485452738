// Products by the matmul primitive of the oneDNN library that MindSpore ships, summed in float32.
#pragma once

#include "half.h"

namespace pc {

extern bool bf16_products;     // linear layers round the operands of their products to bfloat16
extern bool float32_products;  // the primitive multiplies float32 numbers as it should

// A matrix of which element (i, j) is data[i * row + j * column].
struct Strided {
  const void* data;
  i64 row, column;
};

// C [M, N] = A [M, K] B [K, N] (+ C) on all threads; A and B both float32 or both bfloat16. With `wide`, A is the room
// for these numbers [M, K] in bfloat16: they are rounded first, by the thread that multiplies them where rows are shared.
void primitive_product(Kind kind, i64 M, i64 N, i64 K, Strided A, Strided B, float* C, bool add,
                       const float* wide = nullptr);

}  // namespace pc
