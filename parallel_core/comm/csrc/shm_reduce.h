// Reductions in rank order over every dtype that travels.
#pragma once

#include "shm.h"

namespace pcs {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

inline float widen(Half h) {
  _Float16 f;
  std::memcpy(&f, &h, 2);
  return static_cast<float>(f);
}
inline float widen(Brain b) {
  const u32 bits = static_cast<u32>(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <class T>
inline T widen(T x) {
  return x;
}
inline void narrow(float f, Half* out) {
  const _Float16 h = static_cast<_Float16>(f);
  std::memcpy(out, &h, 2);
}
inline void narrow(float f, Brain* out) {
  u32 bits;
  std::memcpy(&bits, &f, 4);
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(f != f ? 0x7fc0 : rounded);
}
template <class T>
inline void narrow(T x, T* out) {
  *out = x;
}

struct Sum {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Max {  // NaN wins
  template <class T>
  static T apply(T a, T b) {
    return a != a ? a : (b > a || b != b ? b : a);
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return a != a ? a : (b < a || b != b ? b : a);
  }
};

// out[i] = from[0][i] op from[1][i] op ..., 16-bit types accumulated in float32; `out` may be one of `from`.
template <class T, class Op>
void reduce_typed(char* out_bytes, const char* const* from, int count, i64 bytes) {
  using Wide = decltype(widen(T()));
  const i64 n = bytes / static_cast<i64>(sizeof(T));
  T* out = reinterpret_cast<T*>(out_bytes);
  if (count == 2) {
    const T *a = reinterpret_cast<const T*>(from[0]), *b = reinterpret_cast<const T*>(from[1]);
#pragma omp simd
    for (i64 i = 0; i < n; ++i) narrow(Op::apply(widen(a[i]), widen(b[i])), &out[i]);
    return;
  }
  constexpr i64 kBlock = 512;
  Wide total[kBlock];
  for (i64 start = 0; start < n; start += kBlock) {
    const i64 m = std::min(kBlock, n - start);
    for (int r = 0; r < count; ++r) {
      const T* a = reinterpret_cast<const T*>(from[r]) + start;
      if (r == 0)
        for (i64 i = 0; i < m; ++i) total[i] = widen(a[i]);
      else
        for (i64 i = 0; i < m; ++i) total[i] = Op::apply(total[i], widen(a[i]));
    }
    for (i64 i = 0; i < m; ++i) narrow(total[i], &out[start + i]);
  }
}

template <class Op>
void reduce_op(int dtype, char* out, const char* const* from, int count, i64 bytes) {
  switch (dtype) {
    case 0: return reduce_typed<float, Op>(out, from, count, bytes);
    case 1: return reduce_typed<Half, Op>(out, from, count, bytes);
    case 2: return reduce_typed<Brain, Op>(out, from, count, bytes);
    case 3: return reduce_typed<int32_t, Op>(out, from, count, bytes);
    case 4: return reduce_typed<int64_t, Op>(out, from, count, bytes);
    case 5: return reduce_typed<uint8_t, Op>(out, from, count, bytes);
    default: return reduce_typed<double, Op>(out, from, count, bytes);
  }
}

inline void reduce(int op, int dtype, char* out, const char* const* from, int count, i64 bytes) {
  if (op == 0) return reduce_op<Sum>(dtype, out, from, count, bytes);
  if (op == 1) return reduce_op<Max>(dtype, out, from, count, bytes);
  reduce_op<Min>(dtype, out, from, count, bytes);
}

}  // namespace pcs
