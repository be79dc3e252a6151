#include "replay.h"

namespace {

constexpr int max_arguments = 20;  // fairlead_cpu/recorder.py knows it too

struct Call {
  void (*invoke)(const uint64_t*);
  uint64_t words[max_arguments];
};

}  // namespace

// Makes the calls, in order.
FL_API void fl_replay(const void* calls, int64_t num_calls) {
  const Call* call = static_cast<const Call*>(calls);
  for (int64_t i = 0; i < num_calls; ++i) call[i].invoke(call[i].words);
}
