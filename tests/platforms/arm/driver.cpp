// Replays recorded calls of the native kernels on another processor: driver LIBRARY ISA RECORD. The record is written by
// recording.py, beside this file. Every buffer of a call ends at a page that must not be touched.
//
// Ends with 0 if each call gave what was recorded, within its tolerance; prints the calls and largest error by function.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

enum Check : uint32_t { kNone = 0, kBytes = 1, kNorm = 2, kElements = 3 };  // the same in recording.py

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

struct Reader {
  std::FILE* file;
  bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, file) == bytes; }
  template <class T>
  T get() {
    T value;
    if (!read(&value, sizeof value)) fail("the record ends in the middle of a call");
    return value;
  }
  std::vector<char> bytes(size_t count) {
    std::vector<char> data(count);
    if (count && !read(data.data(), count)) fail("the record ends in the middle of a buffer");
    return data;
  }
};

// Memory whose last byte is, but for its alignment to 8, the last one before a page without access.
struct Memory {
  char* base;
  size_t size;
  char* data;
  explicit Memory(const std::vector<char>& bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), taken = (bytes.size() + 7) / 8 * 8;
    size = (taken + page - 1) / page * page + page;
    base = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + size - page, page, PROT_NONE) != 0) fail("no memory");
    data = base + size - page - taken;
    if (!bytes.empty()) std::memcpy(data, bytes.data(), bytes.size());
  }
  ~Memory() { munmap(base, size); }
  Memory(const Memory&) = delete;
};

struct Expected {
  Check check;
  bool is_bf16;
  double tolerance;
  int64_t rows, columns, stride;
  std::vector<char> bytes;
  std::vector<std::pair<size_t, uint32_t>> pointers;  // offset, buffer
};

double value(const char* data, int64_t i, bool is_bf16) {
  uint32_t bits = 0;
  if (is_bf16) {
    uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
    bits = uint32_t{half} << 16;
  } else {
    std::memcpy(&bits, data + 4 * i, 4);
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The error by which the tolerance is exceeded at 1; infinity where one is a number and the other is none.
double error(const Expected& e, const char* found) {
  if (e.check == kBytes) return std::memcmp(found, e.bytes.data(), e.bytes.size()) == 0 ? 0.0 : INFINITY;
  double difference = 0, norm = 0, worst = 0;
  for (int64_t row = 0; row < e.rows; row++)
    for (int64_t i = row * e.stride; i < row * e.stride + e.columns; i++) {
      const double x = value(found, i, e.is_bf16), y = value(e.bytes.data(), i, e.is_bf16);
      if (std::isfinite(x) != std::isfinite(y)) return INFINITY;
      if (!std::isfinite(y)) continue;
      difference += (x - y) * (x - y);
      norm += y * y;
      worst = std::max(worst, std::fabs(x - y) / (e.tolerance + e.tolerance * std::fabs(y)));
    }
  if (e.check == kElements) return worst;
  return norm > 0 ? std::sqrt(difference / norm) / e.tolerance : difference > 0 ? INFINITY : 0.0;
}

struct Summary {
  int64_t calls = 0;
  double worst = 0;
};

using Invoke = void (*)(const uint64_t*);
using Plan = int64_t (*)(const void*, int64_t, const void*, const void*, const void*, int64_t, const void*, int64_t, void*,
                         int64_t);

void* find(void* library, const std::string& name) {
  void* function = dlsym(library, name.c_str());
  if (!function) fail("the library has no " + name);
  return function;
}

// Whether there was one more call.
bool replay_one(Reader& reader, void* library, std::map<std::string, Summary>& summaries, int64_t index) {
  uint32_t length;
  if (!reader.read(&length, sizeof length)) return false;
  const std::vector<char> letters = reader.bytes(length);
  const std::string name(letters.begin(), letters.end());
  std::vector<uint64_t> words(reader.get<uint32_t>());
  std::vector<uint32_t> kinds(words.size());
  for (size_t i = 0; i < words.size(); i++) {
    kinds[i] = reader.get<uint32_t>();
    words[i] = reader.get<uint64_t>();
  }
  std::vector<Expected> expected(reader.get<uint32_t>());
  std::vector<Memory*> buffers;
  for (Expected& e : expected) {
    const uint64_t size = reader.get<uint64_t>();
    for (uint32_t left = reader.get<uint32_t>(); left; left--) {
      const uint64_t offset = reader.get<uint64_t>();
      e.pointers.emplace_back(offset, reader.get<uint32_t>());
    }
    e.check = static_cast<Check>(reader.get<uint32_t>());
    e.is_bf16 = reader.get<uint32_t>() != 0;
    e.tolerance = reader.get<double>();
    e.rows = reader.get<int64_t>();
    e.columns = reader.get<int64_t>();
    e.stride = reader.get<int64_t>();
    buffers.push_back(new Memory(reader.bytes(size)));
    if (e.check != kNone) e.bytes = reader.bytes(size);
  }
  auto point = [&](const Expected& e, char* at) {
    for (const auto& [offset, buffer] : e.pointers) std::memcpy(at + offset, &buffers[buffer]->data, sizeof(char*));
  };
  for (size_t i = 0; i < buffers.size(); i++) point(expected[i], buffers[i]->data);
  for (size_t i = 0; i < words.size(); i++)
    if (kinds[i]) words[i] = reinterpret_cast<uintptr_t>(buffers[words[i]]->data);
  auto pointer = [&](size_t i) { return reinterpret_cast<void*>(static_cast<uintptr_t>(words[i])); };
  auto number = [&](size_t i) { return static_cast<int64_t>(words[i]); };
  if (name == "fl_attention_plan") {
    const int64_t needed = reinterpret_cast<Plan>(find(library, name))(pointer(0), number(1), pointer(2), pointer(3),
        pointer(4), number(5), pointer(6), number(7), pointer(8), number(9));
    if (needed > number(9)) fail("call " + std::to_string(index) + ": the plan takes more than was recorded");
  } else {
    reinterpret_cast<Invoke>(find(library, name + "_invoke"))(words.data());
  }
  Summary& summary = summaries[name];
  summary.calls++;
  for (size_t i = 0; i < buffers.size(); i++) {
    if (expected[i].check == kNone) continue;
    if (expected[i].check == kBytes) point(expected[i], expected[i].bytes.data());
    const double found = error(expected[i], buffers[i]->data);
    summary.worst = std::max(summary.worst, found);
    if (!(found <= 1)) {
      std::string numbers;
      for (size_t at = 0; at < words.size(); at++) numbers += kinds[at] ? " *" : " " + std::to_string(number(at));
      fail(name + ", call " + std::to_string(index) + ", buffer " + std::to_string(i) + ": error " +
           std::to_string(found) + " of the tolerance; arguments" + numbers);
    }
  }
  for (Memory* buffer : buffers) delete buffer;
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) fail("usage: driver LIBRARY ISA RECORD");
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) fail(dlerror());
  const std::string isa = reinterpret_cast<const char* (*)()>(find(library, "fl_isa"))();
  if (isa != arguments[2]) fail("the library is for " + isa + ", not " + arguments[2]);
  if (!reinterpret_cast<int (*)()>(find(library, "fl_enable"))()) fail("the system does not let this process use it");
  reinterpret_cast<void (*)(int32_t, const int32_t*)>(find(library, "fl_pool_init"))(2, nullptr);
  Reader reader{std::fopen(arguments[3], "rb")};
  if (!reader.file) fail(std::string("cannot read ") + arguments[3]);
  std::map<std::string, Summary> summaries;
  int64_t index = 0;
  while (replay_one(reader, library, summaries, index)) index++;
  for (const auto& [name, summary] : summaries)
    std::printf("%s %s: %lld calls, %.3f of the tolerance\n", isa.c_str(), name.c_str(),
                static_cast<long long>(summary.calls), summary.worst);
  reinterpret_cast<void (*)()>(find(library, "fl_pool_shutdown"))();
  return index ? 0 : 1;
}
