// quantize and dequantize, bit for bit as rtn_tensor/reference.py; plain loops that the compiler turns into vectors of whatever set this
// file is compiled for.
#pragma once
#include <math.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <type_traits>

#include "convert.h"
#include "rtn.h"

namespace rtn {
namespace {

constexpr uint32_t INF_BITS = 0x7F800000;
enum { ABSMAX, SIGNED, SEARCH, MINMAX };  // config.SCALE_METHODS

// The compiler's own vectors of eight: field i of the eight words of a chunk is eight neighbours.
typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t Uint8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

inline void load(const float* from, Float8& x) { memcpy(&x, from, sizeof(x)); }
#ifdef __AVX2__  // of which GCC makes one instruction of its own accord for float alone
inline void load(const bf16* from, Float8& x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void load(const fp16* from, Float8& x) { x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
#else
inline void load(const bf16* from, Float8& x) {
  Short8 bits;
  memcpy(&bits, from, sizeof(bits));
  x = Float8(__builtin_convertvector(bits, Uint8) << 16);
}
inline void load(const fp16* from, Float8& x) {
  for (int j = 0; j < 8; ++j) x[j] = to_float(from[j]);
}
#endif

template <class T>
struct Limits;  // the smallest normal number, the step between subnormals, the largest finite number
template <>
struct Limits<float> {
  static constexpr float tiny = 0x1p-126f, ulp = 0x1p-149f, max = 0x1.fffffep127f;
};
template <>
struct Limits<bf16> {
  static constexpr float tiny = 0x1p-126f, ulp = 0x1p-133f, max = 0x1.fep127f;
};
template <>
struct Limits<fp16> {
  static constexpr float tiny = 0x1p-14f, ulp = 0x1p-24f, max = 65504.0f;
};
template <>
struct Limits<scale8> {
  static constexpr float tiny = 0x1p-13f, ulp = 0x1p-16f, max = 3.5f;
};

// reference.round_scale
template <class S>
S round_scale(float exact) {
  S rounded = from_float<S>(exact);
  const float got = to_float(rounded), magnitude = fabsf(exact);
  if (isinf(got) && !isinf(exact)) return from_float<S>(copysignf(Limits<S>::max, exact));
  if (magnitude < Limits<S>::tiny && fabsf(got) < magnitude) return from_float<S>(got + copysignf(Limits<S>::ulp, exact));
  return rounded;
}

struct Division {
  float s;
  void operator()(Float8& r) const { r /= s; }  // by reference: without AVX, GCC warns of vectors that are passed
};

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define RTN_RECIPROCAL
// The same quotient, rounded once, at a quarter of the time: r / s = q + (r - q s) / s, and the remainder r - q s is exact. What is left
// of the reciprocal's error is 2^-23 of a last place, and so near the middle of two floats lies no quotient by an S of 16 bits or 8. Quotients
// below 1/2, which round to 0, may be off.
struct Reciprocal {
  float s, inverse;
  void operator()(Float8& r) const {
    const Float8 q = r * inverse;
    for (int j = 0; j < 8; ++j) r[j] = __builtin_fmaf(__builtin_fmaf(-q[j], s, r[j]), inverse, q[j]);
  }
};
#endif

// The zero point that is added to w / s.
struct NoZero {
  static constexpr int32_t value = 0;
};
struct Zero {
  int32_t value;
};

template <int BITS>
struct Chunk {
  static constexpr int K = 128 / BITS;

  // clamp(rint(w / s) + zero) of a whole chunk. Added to 1.5 * 2^23, a small number is rounded to the integer that its low bits then hold, and
  // a large one has bits that are larger, or negative: so they are clamped as integers, which takes one instruction.
  template <class Divide, class Shift, class T>
  static void quantize(const T* w, Divide divide, Shift zero, uint8_t* bytes) {
    constexpr int32_t MAGIC = 0x4B400000;
    const int32_t QMIN = MAGIC - (1 << (BITS - 1)) - zero.value, QMAX = MAGIC + (1 << (BITS - 1)) - 1 - zero.value;
    Uint8 words = {};
#pragma GCC unroll 4
    for (int i = 0; i < 16 / BITS; ++i) {
      Float8 r;
      load(w + 8 * i, r);
      divide(r);
      Int8 q = Int8(r + 0x1.8p23f);
      q = q < QMAX ? q : QMAX - Int8{};
      q = q > QMIN ? q : QMIN - Int8{};
      words |= (Uint8(q + zero.value) & ((1u << BITS) - 1)) << (BITS * i);
    }
    const Short8 packed = __builtin_convertvector(words, Short8);
    memcpy(bytes, &packed, sizeof(packed));
  }

  // Zeros the fields from `size` on.
  static void clear_padding(uint8_t* bytes, int64_t size) {
    uint16_t words[8];
    memcpy(words, bytes, sizeof(words));
    for (int64_t j = size; j < K; ++j) words[j % 8] &= uint16_t(~(((1u << BITS) - 1) << (BITS * (j / 8))));
    memcpy(bytes, words, sizeof(words));
  }

  static void unpack(const uint8_t* bytes, int8_t* q) {
    for (int half = 0; half < 2; ++half) {
      for (int t = 0; t < 8; ++t) {
        const uint8_t byte = bytes[2 * t + half];
        if constexpr (BITS == 8) {
          q[8 * half + t] = int8_t(byte);
        } else {
          q[16 * half + t] = int8_t(int8_t(byte << 4) >> 4);
          q[16 * half + 8 + t] = int8_t(int8_t(byte) >> 4);
        }
      }
    }
  }
};

// Floats as integers that compare alike, so that a maximum is one the compiler may reorder.
inline int32_t ordered(float x) {
  const int32_t bits = int32_t(as_bits(x));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// max |w|, by the bits without their sign, which compare as the numbers do; NaN above inf.
template <class T>
float max_magnitude(const T* w, int64_t size) {
  using Word = typename std::conditional<sizeof(T) == 2, uint16_t, uint32_t>::type;
  constexpr Word ABS = Word(~Word(0)) >> 1;
  Word most = 0;
  for (int64_t k = 0; k < size; ++k) {
    Word word;
    memcpy(&word, w + k, sizeof(word));
    word &= ABS;
    most = word > most ? word : most;
  }
  T largest;
  memcpy(&largest, &most, sizeof(most));
  return to_float(largest);
}

// reference._loss of every scale that scale_method "search" tries, in one pass: the least of them. `extreme / QMIN` is the first.
template <class T, class S, int BITS>
S searched_scale(const T* w, int64_t size, float extreme) {
  constexpr float QMIN = -(1 << (BITS - 1)), QMAX = (1 << (BITS - 1)) - 1;
  constexpr int TRIED = 6, TWENTIETHS[TRIED] = {20, 19, 18, 17, 16, 21};
  S scale[TRIED];
  float s[TRIED];
  int64_t loss[TRIED] = {};
  for (int i = 0; i < TRIED; ++i) {
    const float exact = extreme / QMIN * (TWENTIETHS[i] / 20.0f);
    scale[i] = round_scale<S>(exact == 0.0f ? Limits<float>::ulp : exact);
    s[i] = to_float(scale[i]);
  }
  for (int64_t k = 0; k < size; k += 8) {
    T some[8] = {};
    if (size - k < 8) memcpy(some, w + k, (size - k) * sizeof(T));
    Float8 x;
    load(size - k < 8 ? some : w + k, x);
    Float8 share = x / extreme;
    share = share < 0.0f ? -share : share;
    for (int i = 0; i < TRIED; ++i) {
      const Float8 level = x / s[i];
      Float8 q = level > QMIN ? level : QMIN - Float8{};
      q = q < QMAX ? q : QMAX - Float8{};
      q = (q + 0x1.8p23f) - 0x1.8p23f;
      const Float8 error = level - q;
      Float8 part = error * error * share * 65536.0f;
      part = part < 0x1p24f ? part : 0x1p24f - Float8{};
      const Int8 whole = __builtin_convertvector(part, Int8);
      int32_t sum = 0;  // of eight numbers up to 2^24
      for (int j = 0; j < 8; ++j) sum += whole[j];
      loss[i] += sum;
    }
  }
  int best = 0;
  for (int i = 1; i < TRIED; ++i) {
    if (loss[i] * TWENTIETHS[i] * TWENTIETHS[i] < loss[best] * TWENTIETHS[best] * TWENTIETHS[best]) best = i;
  }
  return scale[best];
}

// The least and the largest of a group and 0, without NaN.
template <class T>
void min_and_max(const T* w, int64_t size, float& low, float& high) {
  int32_t least = 0, most = 0;
  for (int64_t k = 0; k < size; ++k) {
    const int32_t key = ordered(to_float(w[k]));
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  // `ordered` undoes itself.
  low = as_float(uint32_t(least ^ ((least >> 31) & 0x7FFFFFFF)));
  high = as_float(uint32_t(most));
}

// The scale of a group and, with MINMAX, its zero point.
template <class T, class S, int BITS>
S group_scale(const T* w, int64_t size, int64_t scale_method, int8_t* zero) {
  constexpr float QMIN = -(1 << (BITS - 1)), QMAX = (1 << (BITS - 1)) - 1;
  const float largest = max_magnitude(w, size);
  const uint32_t magnitude = as_bits(largest);
  float exact = largest;
  if (magnitude >= INF_BITS) {
    exact = NAN;
  } else if (scale_method == MINMAX) {
    float low, high;
    min_and_max(w, size, low, high);
    exact = high / (QMAX - QMIN) - low / (QMAX - QMIN);
    if (exact == 0.0f) exact = magnitude == 0 ? 1.0f : Limits<float>::ulp;
    const S scale = round_scale<S>(exact);
    const float shift = QMIN - rintf(low / to_float(scale));
    *zero = int8_t(shift < QMIN ? QMIN : shift < QMAX ? shift : QMAX);
    return scale;
  } else if (magnitude == 0) {
    exact = 1.0f;
  } else if (scale_method != ABSMAX) {
    int32_t low = 0;
    for (int64_t k = 0; k < size; ++k) {
      const int32_t key = ordered(to_float(w[k]));
      low = key < low ? key : low;
    }
    // `ordered` undoes itself. Of a tie, the negative element.
    const float minimum = as_float(uint32_t(low ^ ((low >> 31) & 0x7FFFFFFF)));
    exact = -minimum == exact ? minimum : exact;
    if (scale_method == SEARCH) return searched_scale<T, S, BITS>(w, size, exact);
    exact /= QMIN;
  } else {
    exact /= QMAX + 0.5f;
  }
  if (exact == 0.0f) exact = Limits<float>::ulp;  // the reference's sign, too
  return round_scale<S>(exact);
}

template <int BITS, class Divide, class Shift, class T>
void quantize_group(const T* w, int64_t size, Divide divide, Shift zero, uint8_t* bytes) {
  constexpr int K = Chunk<BITS>::K;
  for (int64_t k = 0; k < size; k += K, bytes += 16) {
    if (size - k >= K) {
      Chunk<BITS>::quantize(w + k, divide, zero, bytes);
    } else {
      T some[K] = {};
      memcpy(some, w + k, (size - k) * sizeof(T));
      Chunk<BITS>::quantize(some, divide, zero, bytes);
      if (zero.value) Chunk<BITS>::clear_padding(bytes, size - k);
    }
  }
}

template <int BITS, bool SMALL, class Shift, class T>
void quantize_group_by(const T* w, int64_t size, float s, Shift zero, uint8_t* bytes) {
#ifdef RTN_RECIPROCAL
  if (SMALL && fabsf(s) > 0x1p-60f && fabsf(s) < 0x1p60f) {  // no step over- or underflows
    return quantize_group<BITS>(w, size, Reciprocal{s, 1.0f / s}, zero, bytes);
  }
#endif
  quantize_group<BITS>(w, size, Division{s}, zero, bytes);
}

template <class T, class S, int BITS>
void quantize_row(const rtn_planes_args& a, int64_t row) {
  const T* w = static_cast<const T*>(a.w) + row * a.w_stride;
  uint8_t* bytes = a.qdata + row * a.qdata_stride;
  S* scale = static_cast<S*>(a.scale) + row * a.scale_stride;
  int8_t* zero = a.zero ? a.zero + row * a.zero_stride : nullptr;
  const int64_t group = a.group_size == -1 ? a.k : a.group_size;
  if (a.k == 0 && a.group_size == -1) {
    *scale = from_float<S>(1.0f);
    if (zero) *zero = -(1 << (BITS - 1));
  }
  // The scales of a row first: a group's is a chain of slow steps, and several groups' run beside one another.
  for (int64_t begin = 0; begin < a.k; begin += group) {
    const int64_t size = begin + group < a.k ? group : a.k - begin;
    if (zero) zero[begin / group] = 0;  // where there is a NaN or inf
    scale[begin / group] = group_scale<T, S, BITS>(w + begin, size, a.scale_method, zero ? zero + begin / group : nullptr);
  }
  for (int64_t begin = 0; begin < a.k; begin += group) {
    const int64_t size = begin + group < a.k ? group : a.k - begin;
    const int64_t size_bytes = (size + Chunk<BITS>::K - 1) / Chunk<BITS>::K * 16;
    const float s = to_float(*scale++);
    if (s != s) memset(bytes, 0, size_bytes);
    else if (zero) quantize_group_by<BITS, sizeof(S) <= 2>(w + begin, size, s, Zero{zero[begin / group]}, bytes);
    else quantize_group_by<BITS, sizeof(S) <= 2>(w + begin, size, s, NoZero{}, bytes);
    bytes += size_bytes;
  }
}

template <class T, class S, int BITS, bool ZERO>
void dequantize_row(const rtn_planes_args& a, int64_t row) {
  constexpr int K = Chunk<BITS>::K;
  const int64_t from = a.indices ? a.indices[row] : row;
  const uint8_t* bytes = a.qdata + from * a.qdata_stride;
  const S* scale = static_cast<const S*>(a.scale) + from * a.scale_stride;
  const int8_t* zero = ZERO ? a.zero + from * a.zero_stride : nullptr;
  T* w = static_cast<T*>(a.w) + row * a.w_stride;
  const int64_t group = a.group_size == -1 ? a.k : a.group_size;
  for (int64_t begin = 0; begin < a.k; begin += group) {
    const int64_t end = begin + group < a.k ? begin + group : a.k;
    const float s = to_float(*scale++);
    const int shift = ZERO ? *zero++ : 0;
    for (int64_t k = begin; k < end; k += K, bytes += 16) {
      int8_t q[K];
      Chunk<BITS>::unpack(bytes, q);
      if (end - k >= K) for (int j = 0; j < K; ++j) w[k + j] = from_float<T>((q[j] - shift) * s);
      else for (int64_t j = 0; j < end - k; ++j) w[k + j] = from_float<T>((q[j] - shift) * s);
    }
  }
}

using RowFn = void (*)(const rtn_planes_args&, int64_t);

template <class T, class S, bool QUANTIZE>
RowFn pick_bits(const rtn_planes_args& a) {
  if constexpr (QUANTIZE) return a.bits == 4 ? quantize_row<T, S, 4> : quantize_row<T, S, 8>;
  else if (a.zero) return a.bits == 4 ? dequantize_row<T, S, 4, true> : dequantize_row<T, S, 8, true>;
  else return a.bits == 4 ? dequantize_row<T, S, 4, false> : dequantize_row<T, S, 8, false>;
}

template <class T, bool QUANTIZE>
RowFn pick_scale(const rtn_planes_args& a) {
  switch (a.scale_dtype) {
    case RTN_FLOAT32: return pick_bits<T, float, QUANTIZE>(a);
    case RTN_BFLOAT16: return pick_bits<T, bf16, QUANTIZE>(a);
    case RTN_SCALE8: return pick_bits<T, scale8, QUANTIZE>(a);
    default: return pick_bits<T, fp16, QUANTIZE>(a);
  }
}

template <bool QUANTIZE>
int planes(const rtn_planes_args& a) {
  struct Job {
    const rtn_planes_args& a;
    RowFn fn;
    int64_t rows_at_once;
  };
  RowFn fn;
  switch (a.dtype) {
    case RTN_FLOAT32: fn = pick_scale<float, QUANTIZE>(a); break;
    case RTN_BFLOAT16: fn = pick_scale<bf16, QUANTIZE>(a); break;
    default: fn = pick_scale<fp16, QUANTIZE>(a);
  }
  // About 64 KiB of floats a turn.
  const int64_t at_once = 1 + 16384 / (a.k + 1);
  Job job{a, fn, at_once};
  const auto run = [](void* pointer, int64_t i) {
    const Job& j = *static_cast<Job*>(pointer);
    const int64_t begin = i * j.rows_at_once, end = begin + j.rows_at_once < j.a.rows ? begin + j.rows_at_once : j.a.rows;
    for (int64_t row = begin; row < end; ++row) j.fn(j.a, row);
  };
  parallel_for(a.threads, (a.rows + at_once - 1) / at_once, run, &job);
  return RTN_OK;
}

int quantize(const rtn_planes_args& a) { return planes<true>(a); }
int dequantize(const rtn_planes_args& a) { return planes<false>(a); }

}  // namespace
}  // namespace rtn
