// A thread pool of our own: persistent workers that spin a little, then sleep. See pool.cpp.
#pragma once
#include "export.h"

// Runs fn over [0, n) on the pool and the calling thread; returns when all of it is done. fn is called with disjoint
// ranges that cover [0, n) once, in no fixed order, so results must not depend on how the range is cut.
// Inside a running job, and while another thread's job runs, the work is done by the calling thread alone.
FL_API void fl_parallel_for(int64_t n, void (*fn)(void* ctx, int64_t begin, int64_t end), void* ctx);

// (Re)starts the pool with num_threads threads, the caller among them; worker i (from 1) is bound to cpus[i] unless cpus
// is null or cpus[i] is negative. The caller is never bound: threads it starts later would inherit that.
FL_API void fl_pool_init(int32_t num_threads, const int32_t* cpus);
FL_API int32_t fl_pool_num_threads();
// Ends the workers; later jobs run on the calling thread alone, until the next init.
FL_API void fl_pool_shutdown();

// parallel_for(n, f): the same for a callable f(begin, end).
template <class F>
inline void parallel_for(int64_t n, const F& f) {
  fl_parallel_for(
      n, [](void* ctx, int64_t begin, int64_t end) { (*static_cast<const F*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}
