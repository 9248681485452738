// Products of bfloat16 numbers, summed in float32, by the matmul primitive of the oneDNN library that MindSpore ships.
#pragma once

#include "common.h"

namespace pc {

extern bool bf16_products;  // linear layers round the operands of their products to bfloat16

// C [M, N] = A [M, K] B [K, N] (+ C) on all threads. Element (i, k) of A is A[i * a_row + k * a_col], and so for B.
void bf16_product(i64 M, i64 N, i64 K, const uint16_t* A, i64 a_row, i64 a_col, const uint16_t* B, i64 b_row, i64 b_col,
                  float* C, bool add);

}  // namespace pc
