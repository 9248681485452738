// The kernels that layers of one call run one behind another; the files that define them are held to this too.
#pragma once

#include "common.h"

PC_API void pc_layer_norm(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd, pc::i64 T,
                          pc::i64 H, float eps);
PC_API void pc_layer_norm_grad(const float* dy, const float* x, const float* w, const float* mean, const float* rstd,
                               float* dx, float* dw, float* db, pc::i64 T, pc::i64 H);
PC_API void pc_rms_norm(const float* x, const float* w, float* y, float* rstd, pc::i64 T, pc::i64 H, float eps);
PC_API void pc_rms_norm_grad(const float* dy, const float* x, const float* w, const float* rstd, float* dx, float* dw,
                             pc::i64 T, pc::i64 H);
PC_API void pc_linear(const float* x, const void* weight, int kind, const float* bias, float* y, void* rounded, pc::i64 T,
                      pc::i64 I, pc::i64 O);
PC_API void pc_linear_grad_input(const float* dy, const void* weight, int kind, float* dx, void* rounded, pc::i64 T,
                                 pc::i64 I, pc::i64 O);
PC_API void pc_linear_grad_weight(const void* dy, int dy_kind, const void* x, int x_kind, void* dw, int dw_kind,
                                  pc::i64 T, pc::i64 I, pc::i64 O, int add);
PC_API void pc_sum_rows(const float* dy, void* sum, int kind, pc::i64 T, pc::i64 O, int add);
PC_API void pc_rotary(const float* x, const float* cos, const float* sin, float* y, pc::i64 S, pc::i64 B, pc::i64 N,
                      pc::i64 D, pc::i64 R, int per_batch, int interleaved, int inverse, pc::i64 period);
PC_API void pc_attention(const float* q, const float* k, const float* v, const int32_t* document_start, float* out,
                         float* lse, const pc::i64* shape, float scale, float rate, pc::u64 seed0, pc::u64 seed1);
PC_API void pc_attention_grad(const float* q, const float* k, const float* v, const int32_t* document_start,
                              const float* out, const float* dout, const float* lse, float* dq, float* dk, float* dv,
                              const pc::i64* shape, float scale, float rate, pc::u64 seed0, pc::u64 seed1);
PC_API void pc_cached_attention(const float* q, const float* k, const float* v, float* keys, float* values,
                                const int32_t* rows, const int32_t* firsts, float* out, const pc::i64* shape, float scale);
PC_API void pc_bias_dropout_add(const float* x, const float* bias, const float* residual, float* y, pc::i64 T, pc::i64 H,
                                float rate, pc::u64 seed0, pc::u64 seed1);
PC_API void pc_activation(const float* x, const float* bias, float* y, pc::i64 T, pc::i64 F, int kind);
PC_API void pc_activation_grad(const float* dy, const float* x, const float* bias, float* dx, pc::i64 T, pc::i64 F, int kind);
PC_API void pc_swiglu(const float* x, const float* bias, float* y, pc::i64 T, pc::i64 F);
PC_API void pc_swiglu_grad(const float* dy, const float* x, const float* bias, float* dx, pc::i64 T, pc::i64 F);
PC_API void pc_add(float* into, const float* values, pc::i64 n);
PC_API void pc_copy_rows(const float* from, pc::i64 from_stride, float* to, pc::i64 to_stride, pc::i64 width, pc::i64 rows);
