// NEON: bf16 activations in pairs, and int8 ones by four, or by eight of two tokens.
#pragma once
#include <arm_neon.h>

#include "convert.h"
#include "generic.h"

namespace rtn {
namespace {

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
struct NeonBf16 : Generic {
  static constexpr int V = 2, C = 8, MANY = 6;
  using W = bfloat16x8_t;
  using X = Bf16Pairs;

  static X piece(const bf16* from) { return X(from); }
  template <class T>
  static X piece(const T*) {
    __builtin_unreachable();  // other activations have more digits than bf16, and go to Generic
  }

  template <int BITS, int i>
  static W decode(D dword) {
    if constexpr (BITS == 4) {
      // bf16 of the integers 0..7, -8..-1: first their low bytes, then their high ones.
      static const uint8_t table[32] = {0x00, 0x80, 0x00, 0x40, 0x80, 0xA0, 0xC0, 0xE0, 0x00, 0xE0, 0xC0, 0xA0, 0x80, 0x40, 0x00, 0x80,
                                        0x00, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, 0xC1, 0xC0, 0xC0, 0xC0, 0xC0, 0xC0, 0xC0, 0xBF};
      uint16x8_t field = vreinterpretq_u16_s32(dword);
      if constexpr (i != 0) field = vshrq_n_u16(field, 4 * i);
      field = vandq_u16(field, vdupq_n_u16(15));
      const uint16x8_t index = vmlaq_n_u16(vdupq_n_u16(0x1000), field, 0x0101);  // the field, and 16 + the field above it
      return vreinterpretq_bf16_u8(vqtbl2q_u8(vld1q_u8_x2(table), vreinterpretq_u8_u16(index)));
    } else {
      // An int8 has no more digits than a bf16: the upper half of its fp32 form is exact.
      const uint32x4_t even = vreinterpretq_u32_f32(widen<8, i, 0>(dword)), odd = vreinterpretq_u32_f32(widen<8, i, 1>(dword));
      return vreinterpretq_bf16_u32(vsriq_n_u32(odd, even, 16));
    }
  }
  static F dot(F sum, W w, const X& x, int q) { return vbfdotq_f32(sum, w, vreinterpretq_bf16_u32(vdupq_n_u32(x.pair[q]))); }
};

#endif

struct NeonDot : GenericInt8 {
  static constexpr int V = 2, C = 6, MANY = 6;
  using N = int32x4_t;
  using W = int8x16_t;

  template <int BITS, int h>
  static W operand(D dword) {
    const int8x16_t bytes = vreinterpretq_s8_s32(dword);
    if constexpr (BITS == 8) return bytes;
    return vshrq_n_s8(h ? bytes : vshlq_n_s8(bytes, 4), 4);
  }
  template <int BITS>
  static N dot(N sum, W w, int32_t x) {
    return vdotq_s32(sum, w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
  }
  static N splat(int32_t x) { return vdupq_n_s32(x); }
  static F to_float(N sum) { return vcvtq_f32_s32(sum); }
};

#ifdef __ARM_FEATURE_MATMUL_INT8
struct NeonI8mm : NeonDot {
  static constexpr bool TWO_BY_TWO = true;

  static W zip(W a, W b, int half) {
    const int32x4_t x = vreinterpretq_s32_s8(a), y = vreinterpretq_s32_s8(b);
    return vreinterpretq_s8_s32(half ? vzip2q_s32(x, y) : vzip1q_s32(x, y));
  }
  using NeonDot::dot;
  static N dot(N sum, W zipped, const int32_t* x, const int32_t* y) {
    return vmmlaq_s32(sum, zipped, vreinterpretq_s8_s32(vcombine_s32(vld1_s32(x), vld1_s32(y))));
  }
  static N unzip(N s, N u, int t) { return t ? vuzp2q_s32(s, u) : vuzp1q_s32(s, u); }
};
#endif

}  // namespace
}  // namespace rtn
