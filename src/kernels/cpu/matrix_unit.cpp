#include <gdn/kernels/cpu/matrix_unit.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gdn::kernels::cpu {
namespace {

bool allowed = true;

#if defined(__x86_64__) && defined(__linux__)
bool has_matrix_unit() {
  constexpr unsigned kBf16 = 1U << 22, kTile = 1U << 24, kOsXsave = 1U << 27;
  constexpr unsigned kTileState = 3U << 17;  // configuration and data
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsXsave) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  // The tiles' state is large: Linux saves it only for processes that ask.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_matrix_unit() { return false; }
#endif

}  // namespace

bool uses_matrix_unit() {
  static const bool has = has_matrix_unit();
  return has && allowed;
}

void allow_matrix_unit(bool value) { allowed = value; }

}  // namespace gdn::kernels::cpu
