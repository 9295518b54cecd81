// Scalar conversions between the three float types, and compile-time index lists. Everything is in an anonymous namespace: each file of
// the library is compiled for another instruction set, and the linker must not share code between them.
#pragma once
#include <stdint.h>
#include <string.h>

#define RTN_UNROLL _Pragma("GCC unroll 32")

namespace rtn {
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// A scale of 8 bits: 2^-7 times what they are as float8_e4m3fn (formats.SCALE8_UNIT).
struct scale8 {
  uint8_t bits;
};

#if defined(__aarch64__)
#define RTN_HALF __fp16  // GCC 12 defines __FLT16_MAX__ here, yet has no _Float16 in C++
#elif defined(__FLT16_MAX__)
#define RTN_HALF _Float16
#endif

inline float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
#ifdef RTN_HALF
  RTN_HALF h;
  memcpy(&h, &x, 2);
  return float(h);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return as_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // Exact for normals and subnormals alike: the exponent is rebased by a multiplication.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
#endif
}

inline float to_float(scale8 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24, rest = x.bits & 0x7F;
  // By an integer where it is subnormal, as a process may have the hardware take subnormal floats for zero.
  const float magnitude = rest < 8 ? float(int32_t(rest)) * 0x1p-16f : as_float((rest << 20) + (113u << 23));
  return rest == 0x7F ? as_float(0x7FC00000) : as_float(sign | as_bits(magnitude));
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return {uint16_t((bits >> 16) | 0x40)};  // a quiet NaN
  return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
#ifdef RTN_HALF
  const RTN_HALF h = RTN_HALF(x);
  fp16 out;
  memcpy(&out, &h, 2);
  return out;
#else
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return {uint16_t(sign | 0x7E00)};
  if (rest >= 0x477FF000) return {uint16_t(sign | 0x7C00)};
  if (rest < 0x38800000) {  // subnormal: adding 0.5 lets the hardware round to units of 2^-24
    return {uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - 0x3F000000))};
  }
  return {uint16_t(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13)};
#endif
}

// To the largest where there is none as large, as torch's conversion.
template <>
inline scale8 from_float<scale8>(float x) {
  const uint32_t sign = as_bits(x) >> 24 & 0x80, rest = as_bits(x) & 0x7FFFFFFF;
  if (rest > 0x7F800000) return {uint8_t(sign | 0x7F)};
  const float magnitude = as_float(rest);
  if (magnitude < 0x1p-13f) {  // subnormal: added to 1.5 * 2^23, a number is rounded to the integer that the low bits then hold
    return {uint8_t(sign | ((as_bits(magnitude * 0x1p16f + 0x1.8p23f) - 0x4B400000) & 0xFF))};
  }
  if (magnitude >= 3.5f) return {uint8_t(sign | 0x7E)};
  return {uint8_t(sign | (((rest + 0x7FFFF + (rest >> 20 & 1)) >> 20) - (113u << 3)))};
}

// Eight activations as four pairs of neighbours, in the two forms that instruction sets multiply.
struct FloatPairs {
  static constexpr int COLUMNS = 8;
  float even[4], odd[4];

  template <class T>
  explicit FloatPairs(const T* from) {
    for (int q = 0; q < 4; ++q) even[q] = to_float(from[2 * q]), odd[q] = to_float(from[2 * q + 1]);
  }
};

struct Bf16Pairs {
  static constexpr int COLUMNS = 8;
  uint32_t pair[4];

  explicit Bf16Pairs(const bf16* from) { memcpy(pair, from, sizeof(pair)); }
};

template <int... i>
struct ints {};
template <int n, int... i>
struct ints_up_to : ints_up_to<n - 1, n - 1, i...> {};
template <int... i>
struct ints_up_to<0, i...> {
  using type = ints<i...>;
};
template <int n>
constexpr typename ints_up_to<n>::type make_ints() {
  return {};
}

}  // namespace
}  // namespace rtn
