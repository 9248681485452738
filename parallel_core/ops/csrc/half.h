// Numbers of 16 bits: read as float32, which is exact, and written to the nearest, ties to even.
#pragma once

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include <vector>

#include "common.h"

namespace pc {

// Returns the memory of `room`, which the caller keeps, for n numbers.
template <class T>
inline T* room_for(i64 n, std::vector<T>& room) {
  if (static_cast<i64>(room.size()) < n) room.resize(static_cast<size_t>(n));
  return room.data();
}

enum Kind : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // as `library.KINDS` numbers them

inline i64 bytes_of(int kind) { return kind == kFloat32 ? 4 : 2; }

inline const void* at(const void* data, int kind, i64 i) { return static_cast<const char*>(data) + i * bytes_of(kind); }
inline void* at(void* data, int kind, i64 i) { return static_cast<char*>(data) + i * bytes_of(kind); }

inline uint16_t to_bfloat16(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  const u32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const u32 quiet_nan = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline float from_bfloat16(uint16_t x) {
  const u32 bits = static_cast<u32>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t to_float16(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  const u32 sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded number of 2^-24 in the low bits
    float y;
    std::memcpy(&y, &magnitude, 4);
    y += 0.5f;
    u32 low;
    std::memcpy(&low, &y, 4);
    return static_cast<uint16_t>(sign | (low - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

inline float from_float16(uint16_t x) {
  const u32 sign = static_cast<u32>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  u32 bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    const float y = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &y, 4);
  }
  bits |= sign;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void widen(const void* from, int kind, float* to, i64 n) {
  if (kind == kFloat32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(from);
  i64 i = 0;
  if (kind == kBfloat16) {
#pragma omp simd
    for (i = 0; i < n; ++i) to[i] = from_bfloat16(x[i]);
    return;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; ++i) to[i] = from_float16(x[i]);
}

inline void narrow(const float* from, void* to, int kind, i64 n) {
  if (kind == kFloat32) {
    std::memmove(to, from, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(to);
  i64 i = 0;
  if (kind == kBfloat16) {
#pragma omp simd
    for (i = 0; i < n; ++i) y[i] = to_bfloat16(from[i]);
    return;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) y[i] = to_float16(from[i]);
}

// The bits of bfloat16 numbers, in the upper half of each.
inline WordVec rounded_bits(Vec x) {
  const WordVec bits = (WordVec)x;
  return (x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u) & 0xffff0000u;
}

// to = from, or to += from, each element rounded once
inline void put(const float* from, void* to, int kind, i64 n, bool add) {
  if (!add) return narrow(from, to, kind, n);
  constexpr i64 kBlock = 1024;
  float sums[kBlock];
  for (i64 first = 0; first < n; first += kBlock) {
    const i64 length = n - first < kBlock ? n - first : kBlock;
    widen(at(to, kind, first), kind, sums, length);
#pragma omp simd
    for (i64 i = 0; i < length; ++i) sums[i] += from[first + i];
    narrow(sums, at(to, kind, first), kind, length);
  }
}

// Calls body(first, n, block) for every block of a flat range, with room for its elements in float32, on all threads.
template <class Body>
void each_block(i64 n, Body body) {
  parallel(n, [&](int part, int parts) {
    constexpr i64 kBlock = 2048;
    float block[kBlock];
    const Range r = share(n, part, parts);
    for (i64 i = r.begin; i < r.end; i += kBlock) body(i, r.end - i < kBlock ? r.end - i : kBlock, block);
  }, kPieces);
}

// Returns n numbers as float32: themselves, or widened into `room`, which the caller keeps.
inline const float* widened(const void* data, int kind, i64 n, std::vector<float>& room) {
  if (kind == kFloat32) return static_cast<const float*>(data);
  float* to = room_for(n, room);
  parallel(n, [&](int part, int parts) {
    const Range r = share(n, part, parts);
    widen(at(data, kind, r.begin), kind, to + r.begin, r.end - r.begin);
  });
  return to;
}

// Returns n numbers as bfloat16: themselves, or rounded into `room`, which the caller keeps.
inline const uint16_t* as_bf16(const void* data, int kind, i64 n, std::vector<uint16_t>& room) {
  if (kind == kBfloat16) return static_cast<const uint16_t*>(data);
  uint16_t* to = room_for(n, room);
  each_block(n, [&](i64 first, i64 length, float* block) {
    const float* from = static_cast<const float*>(at(data, kind, first));
    if (kind != kFloat32) {
      widen(from, kind, block, length);
      from = block;
    }
    narrow(from, to + first, kBfloat16, length);
  });
  return to;
}

}  // namespace pc
