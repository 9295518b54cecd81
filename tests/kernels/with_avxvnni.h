// For a build of isa_avxvnni.cpp with AVX-512's form of its instructions: a processor that says it has them.
#pragma once
#include <cpuid.h>
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = 1u << 4, *(b) = *(c) = *(d) = 0, 1)
