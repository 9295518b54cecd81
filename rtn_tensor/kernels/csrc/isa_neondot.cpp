#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "linear.h"
#include "neon.h"
#include "planes.h"

namespace rtn {
namespace {
bool available() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
int linear(const rtn_linear_args& a) { return a.int8_x ? Linear<NeonDot, Int8Product>(a)() : Linear<Generic, FloatProduct>(a)(); }
}  // namespace

extern const Isa neondot = {"neondot", available, linear, quantize, dequantize};
}  // namespace rtn
