// The C interface: raw pointers, sizes in elements unless a name says bytes. One shared library per instruction set.
#pragma once
#include <cstdint>

#define FL_API extern "C" __attribute__((visibility("default")))
