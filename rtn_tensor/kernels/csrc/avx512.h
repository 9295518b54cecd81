// AVX-512: 16 rows of the weight a vector. `Avx512` multiplies in fp32, `Avx512Bf16` takes bf16 activations in pairs, and `Avx512Vnni` bytes.
#pragma once
#include <immintrin.h>

#include "convert.h"

namespace rtn {
namespace {

struct Avx512Base {
  static constexpr int L = 16;
  using F = __m512;
  using D = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F all(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static void transpose(const uint8_t* const* rows, int64_t offset, int dwords, D* out) {
    const __mmask16 mask = __mmask16((1u << dwords) - 1);
    D r[16], t[16];
    RTN_UNROLL for (int j = 0; j < 16; ++j) {
      r[j] = dwords == 16 ? _mm512_loadu_si512(rows[j] + offset) : _mm512_maskz_loadu_epi32(mask, rows[j] + offset);
    }
    RTN_UNROLL for (int j = 0; j < 16; j += 2) {
      t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
      t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
    }
    RTN_UNROLL for (int j = 0; j < 16; j += 4) {
      r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
      r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
      r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
      r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    RTN_UNROLL for (int j = 0; j < 4; ++j) {
      const D a = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88), b = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xDD);
      const D c = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88), d = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xDD);
      out[j] = _mm512_shuffle_i32x4(a, c, 0x88);
      out[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
      out[j + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
      out[j + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
  }

  // The field `i` of the dword's word `half`, as fp32.
  template <int BITS, int i, int half>
  static F widen(D dword) {
    constexpr int at = 16 * half + BITS * i;
    if constexpr (BITS == 4) {  // vpermps looks at four bits of the index
      const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      return _mm512_permutexvar_ps(at == 0 ? dword : _mm512_srli_epi32(dword, at), table);
    }
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(dword, 32 - BITS - at), 32 - BITS));
  }
};

struct Avx512 : Avx512Base {
  static constexpr int V = 2, C = 12, MANY = 7, HALVES = 0;
  struct W {
    F even, odd;
  };
  using X = FloatPairs;

  template <class T>
  static X piece(const T* from) {
    return X(from);
  }
  template <int BITS, int i>
  static W decode(D dword) {
    return {widen<BITS, i, 0>(dword), widen<BITS, i, 1>(dword)};
  }
  static F dot(F sum, W w, const X& x, int q) {
    return fma(w.odd, _mm512_set1_ps(x.odd[q]), fma(w.even, _mm512_set1_ps(x.even[q]), sum));
  }
};

#ifdef __AVX512BF16__
struct Avx512Bf16 : Avx512Base {
  static constexpr int V = 2, C = 12, MANY = 7, HALVES = 2;
  using W = __m512i;
  using X = Bf16Pairs;

  static X piece(const bf16* from) { return X(from); }
  template <class T>
  static X piece(const T*) {
    __builtin_unreachable();  // other activations have more digits than bf16, and go to Avx512
  }
  template <int BITS, int i>
  static W decode(D dword) {
    if constexpr (BITS == 4) {
      // bf16 of the integers 0..7, -8..-1; vpermw looks at five bits of the index, so the table stands twice.
      const __m512i table = _mm512_set_epi32(
          0xBF80C000, 0xC040C080, 0xC0A0C0C0, 0xC0E0C100, 0x40E040C0, 0x40A04080, 0x40404000, 0x3F800000,
          0xBF80C000, 0xC040C080, 0xC0A0C0C0, 0xC0E0C100, 0x40E040C0, 0x40A04080, 0x40404000, 0x3F800000);
      return _mm512_permutexvar_epi16(i == 0 ? dword : _mm512_srli_epi32(dword, 4 * i), table);
    } else {
      // An int8 has no more digits than a bf16: the upper half of its fp32 form is exact.
      const __m512i even = _mm512_castps_si512(widen<8, i, 0>(dword)), odd = _mm512_castps_si512(widen<8, i, 1>(dword));
      return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
    }
  }
  // int8 as two integers: that of its low four bits with their sign, and the rest, looked up by the other four and the bit below, which
  // carries. 11 instructions for four products where `decode` makes it 18 for two: 20 % faster with one token, 5 to 20 with two.
  template <int i>
  static W low_half(D dword) {
    return decode<4, 2 * i>(dword);
  }
  template <int i>
  static W high_half(D dword) {
    // bf16 of 0, 16, 16, 32, ..., 112, 112, 128, -128, -112, -112, ..., -16, -16, 0; vpermw looks at five bits of the index.
    const __m512i table = _mm512_set_epi32(
        0x0000C180, 0xC180C200, 0xC200C240, 0xC240C280, 0xC280C2A0, 0xC2A0C2C0, 0xC2C0C2E0, 0xC2E0C300,
        0x430042E0, 0x42E042C0, 0x42C042A0, 0x42A04280, 0x42804240, 0x42404200, 0x42004180, 0x41800000);
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(dword, 8 * i + 3), table);
  }
  static F dot(F sum, W w, const X& x, int q) { return _mm512_dpbf16_ps(sum, __m512bh(w), __m512bh(_mm512_set1_epi32(int(x.pair[q])))); }
};

// For 13 to 24 tokens: one vector of rows, so that all of them are one tile.
struct Avx512Bf16Tall : Avx512Bf16 {
  static constexpr int V = 1, C = 24, MANY = 14;
};
#endif

#ifdef __AVX512VNNI__
// int8 activations. Sums of the pieces and of the groups lie in registers, 7 times 2 of each.
struct Avx512Vnni : Avx512Base {
  static constexpr int V = 2, C = 7, MANY = 7;
  static constexpr bool TWO_BY_TWO = false;
  using N = __m512i;
  using W = __m512i;

  template <int BITS>
  static constexpr int offset() {
    return BITS == 4 ? 8 : 128;
  }
  template <int BITS, int h>
  static W operand(D dword) {
    if constexpr (BITS == 8) return _mm512_xor_si512(dword, _mm512_set1_epi8(-128));
    // (dword ^ 0x88...) & 0x0F...
    return _mm512_ternarylogic_epi32(h ? _mm512_srli_epi32(dword, 4) : dword, _mm512_set1_epi8(-120), _mm512_set1_epi8(15), 0x28);
  }
  template <int BITS>
  static N dot(N sum, W w, const int32_t& x) {
    // vpdpbusd with x from memory: GCC 12 takes a register for it, and then has too few for the sums.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(x));
    return sum;
  }
  static N splat(int32_t x) { return _mm512_set1_epi32(x); }
  static F to_float(N sum) { return _mm512_cvtepi32_ps(sum); }
};

// For so few tokens that they are one tile. With one vector of rows to a block there are registers for ten of them; 6 or 7 are 10 % faster so,
// and 8 to 10 than as two tiles, whose weights are decoded first.
struct Avx512VnniFew : Avx512Vnni {
  static constexpr int V = 1, C = 10, MANY = 10;
};

int int8_linear(const rtn_linear_args& a) {
  if (a.m <= Avx512VnniFew::C * (a.offs ? a.experts : 1)) return Linear<Avx512VnniFew, Int8Product>(a)();
  return Linear<Avx512Vnni, Int8Product>(a)();
}
#endif

}  // namespace
}  // namespace rtn
