#include "linear.h"
#include "avx512.h"
#include "planes.h"

namespace rtn {
extern const Isa avx512;

namespace {
bool available() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && avx512.available(); }

int linear(const rtn_linear_args& a) {
  if (a.int8_x) return int8_linear(a);
  // fp16 and fp32 activations have more digits than bf16.
  if (a.dtype != RTN_BFLOAT16) return Linear<Avx512, FloatProduct>(a)();
  if (!a.offs && a.m > Avx512Bf16::C && a.m <= Avx512Bf16Tall::C) return Linear<Avx512Bf16Tall, FloatProduct>(a)();
  return Linear<Avx512Bf16, FloatProduct>(a)();
}
}  // namespace

extern const Isa avx512bf16 = {"avx512bf16", available, linear, quantize, dequantize};
}  // namespace rtn
