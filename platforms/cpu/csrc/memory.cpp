// Memory for the kernels' large arrays.
#include "export.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Asks for huge pages behind [address, address + bytes), before its first use: a paged cache is read block by block,
// and with small pages each block waits for its addresses. Refused or unknown, it stays as it is.
FL_API void fl_use_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + kPage - 1) / kPage * kPage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}
