// Conversions between float32 and numbers of 16 bits, and sums in them.
#include "half.h"

namespace {
using namespace pc;
}

// to = from
PC_API void pc_convert(const void* from, int from_kind, void* to, int to_kind, i64 n) {
  if (from_kind == kFloat32 || to_kind == kFloat32) {
    parallel(n, [&](int part, int parts) {
      const Range r = share(n, part, parts);
      if (to_kind == kFloat32)
        widen(at(from, from_kind, r.begin), from_kind, static_cast<float*>(to) + r.begin, r.end - r.begin);
      else
        narrow(static_cast<const float*>(from) + r.begin, at(to, to_kind, r.begin), to_kind, r.end - r.begin);
    }, kPieces);
    return;
  }
  each_block(n, [&](i64 first, i64 length, float* block) {
    widen(at(from, from_kind, first), from_kind, block, length);
    narrow(block, at(to, to_kind, first), to_kind, length);
  });
}

// Each of `count` arrays as float32, one behind another in `to`. arrays: their addresses, kinds and numbers of elements.
PC_API void pc_widen_each(const i64* arrays, i64 count, float* to) {
  for (i64 i = 0; i < count; ++i) {
    const i64 n = arrays[3 * i + 2];
    widen(reinterpret_cast<const void*>(arrays[3 * i]), static_cast<int>(arrays[3 * i + 1]), to, n);
    to += n;
  }
}

// into += from, each element rounded once
PC_API void pc_add_halves(void* into, int into_kind, const void* from, int from_kind, i64 n) {
  each_block(n, [&](i64 first, i64 length, float* block) {
    widen(at(from, from_kind, first), from_kind, block, length);
    put(block, at(into, into_kind, first), into_kind, length, true);
  });
}

// into *= factor
PC_API void pc_scale(void* into, int kind, float factor, i64 n) {
  each_block(n, [&](i64 first, i64 length, float* block) {
    void* here = at(into, kind, first);
    widen(here, kind, block, length);
#pragma omp simd
    for (i64 i = 0; i < length; ++i) block[i] *= factor;
    narrow(block, here, kind, length);
  });
}
