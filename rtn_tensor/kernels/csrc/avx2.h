// AVX2 and FMA: 8 rows of the weight a vector.
#pragma once
#include <immintrin.h>

#include "convert.h"

namespace rtn {
namespace {

struct Avx2 {
  static constexpr int L = 8, V = 1, C = 6, MANY = 6, HALVES = 0;
  using F = __m256;
  using D = __m256i;
  struct W {
    F even, odd;
  };
  using X = FloatPairs;

  static F zero() { return _mm256_setzero_ps(); }
  static F all(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  template <class T>
  static X piece(const T* from) {
    return X(from);
  }

  static void transpose(const uint8_t* const* rows, int64_t offset, int dwords, D* out) {
    const D mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(dwords), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    D r[8], t[8];
    RTN_UNROLL for (int j = 0; j < 8; ++j) {
      const uint8_t* p = rows[j] + offset;
      r[j] = dwords == 8 ? _mm256_loadu_si256(reinterpret_cast<const D*>(p)) : _mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask);
    }
    RTN_UNROLL for (int j = 0; j < 8; j += 2) {
      t[j] = _mm256_unpacklo_epi32(r[j], r[j + 1]);
      t[j + 1] = _mm256_unpackhi_epi32(r[j], r[j + 1]);
    }
    RTN_UNROLL for (int j = 0; j < 8; j += 4) {
      r[j] = _mm256_unpacklo_epi64(t[j], t[j + 2]);
      r[j + 1] = _mm256_unpackhi_epi64(t[j], t[j + 2]);
      r[j + 2] = _mm256_unpacklo_epi64(t[j + 1], t[j + 3]);
      r[j + 3] = _mm256_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    RTN_UNROLL for (int j = 0; j < 4; ++j) {
      out[j] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x20);
      out[j + 4] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x31);
    }
  }

  template <int BITS, int i, int half>
  static F widen(D dword) {
    constexpr int at = 16 * half + BITS * i;
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(dword, 32 - BITS - at), 32 - BITS));
  }
  template <int BITS, int i>
  static W decode(D dword) {
    return {widen<BITS, i, 0>(dword), widen<BITS, i, 1>(dword)};
  }
  static F dot(F sum, W w, const X& x, int q) {
    return fma(w.odd, _mm256_set1_ps(x.odd[q]), fma(w.even, _mm256_set1_ps(x.even[q]), sum));
  }
};

// int8 activations.
struct Avx2Int8 : Avx2 {
  static constexpr bool TWO_BY_TWO = false;
  using N = __m256i;
  using W = __m256i;

  // Its instruction takes unsigned bytes by signed ones, and adds two products in 16 bits. Of int4 with 8 added to them, at most 2 * 15 * 127
  // come to that; of int8 the sign goes over to the activation, and 2 * 128 * 127 do.
  template <int BITS>
  static constexpr int offset() {
    return BITS == 4 ? 8 : 0;
  }
  template <int BITS, int h>
  static W operand(D dword) {
    if constexpr (BITS == 8) return dword;
    const D half = h ? _mm256_srli_epi32(dword, 4) : dword;
    return _mm256_and_si256(_mm256_xor_si256(half, _mm256_set1_epi8(-120)), _mm256_set1_epi8(15));
  }
  template <int BITS>
  static N dot(N sum, W w, int32_t x) {
    const __m256i bytes = _mm256_set1_epi32(x);
    const __m256i pairs = BITS == 4 ? _mm256_maddubs_epi16(w, bytes) : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(bytes, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static N splat(int32_t x) { return _mm256_set1_epi32(x); }
  static F to_float(N sum) { return _mm256_cvtepi32_ps(sum); }
};

#ifdef __AVXVNNI__
struct AvxVnni : Avx2Int8 {
  template <int BITS>
  static constexpr int offset() {
    return BITS == 4 ? 8 : 128;
  }
  template <int BITS, int h>
  static W operand(D dword) {
    if constexpr (BITS == 8) return _mm256_xor_si256(dword, _mm256_set1_epi8(-128));
    return Avx2Int8::operand<BITS, h>(dword);
  }
  template <int BITS>
  static N dot(N sum, W w, int32_t x) {
    return _mm256_dpbusd_epi32(sum, w, _mm256_set1_epi32(x));
  }
};
#endif

}  // namespace
}  // namespace rtn
