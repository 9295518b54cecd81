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

}  // namespace
}  // namespace rtn
