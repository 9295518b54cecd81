// Any processor, through the compiler's own vectors of four: SSE on x86, NEON on Arm, scalars where there is neither.
#pragma once
#include "convert.h"

namespace rtn {
namespace {

struct Generic {
  static constexpr int L = 4, V = 2, C = 4, MANY = 4, HALVES = 0;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t D __attribute__((vector_size(16)));
  struct W {
    F even, odd;
  };
  using X = FloatPairs;

  static F zero() { return F{}; }
  static F all(float x) { return F{} + x; }
  static F load(const float* p) {
    F x;
    memcpy(&x, p, 16);
    return x;
  }
  static void store(float* p, F x) { memcpy(p, &x, 16); }
  static F add(F a, F b) { return a + b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  template <class T>
  static X piece(const T* from) {
    return X(from);
  }

  static void transpose(const uint8_t* const* rows, int64_t offset, int dwords, D* out) {
    for (int j = 0; j < 4; ++j) {
      int32_t row[4] = {};
      if (dwords == 4) memcpy(row, rows[j] + offset, 16);
      else memcpy(row, rows[j] + offset, 4 * dwords);
      for (int d = 0; d < 4; ++d) out[d][j] = row[d];
    }
  }

  template <int BITS, int i, int half>
  static F widen(D dword) {
    constexpr int at = 16 * half + BITS * i;
    return __builtin_convertvector((dword << (32 - BITS - at)) >> (32 - BITS), F);
  }
  template <int BITS, int i>
  static W decode(D dword) {
    return {widen<BITS, i, 0>(dword), widen<BITS, i, 1>(dword)};
  }
  static F dot(F sum, W w, const X& x, int q) { return w.odd * x.odd[q] + (w.even * x.even[q] + sum); }
};

// int8 activations, a byte after the other.
struct GenericInt8 : Generic {
  static constexpr int V = 1;
  static constexpr bool TWO_BY_TWO = false;
  using N = D;
  using W = D;

  template <int BITS>
  static constexpr int offset() {
    return 0;
  }
  template <int BITS, int h>
  static W operand(D dword) {
    if constexpr (BITS == 8) return dword;
    const D low = (h ? dword >> 4 : dword) & 0x0F0F0F0F;
    const D sign = low & 0x08080808;
    return low | sign << 1 | sign << 2 | sign << 3 | sign << 4;
  }
  template <int BITS>
  static N dot(N sum, W w, int32_t x) {
    for (int at = 0; at < 32; at += 8) sum += ((w << (24 - at)) >> 24) * (int32_t(uint32_t(x) << (24 - at)) >> 24);
    return sum;
  }
  static N splat(int32_t x) { return D{} + x; }
  static F to_float(N sum) { return __builtin_convertvector(sum, F); }
};

}  // namespace
}  // namespace rtn
