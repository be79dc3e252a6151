// What this library was compiled for, and whether the operating system lets the process use it.
#include "simd.h"

#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

FL_API const char* fl_isa() { return FL_ISA; }

// Whether kernels of this library may be called. AMX's tiles are state that Linux saves only for processes that asked:
// the request is made here, once, before any thread of the pool starts.
FL_API int fl_enable() {
#if defined(__AMX_TILE__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h; XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 1;
#endif
}
