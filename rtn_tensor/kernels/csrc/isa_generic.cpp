#include "linear.h"
#include "generic.h"
#include "planes.h"

namespace rtn {
namespace {
bool available() { return true; }
int linear(const rtn_linear_args& a) { return Linear<Generic>(a)(); }
}  // namespace

extern const Isa generic = {"generic", available, linear, quantize, dequantize};
}  // namespace rtn
