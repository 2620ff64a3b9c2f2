// Preloaded into a program (as_processor.py), answers its questions to the processor as another one would.
//
// The instruction `cpuid` faults where Linux is asked for it (arch_prctl(2), ARCH_SET_CPUID). The handler asks the
// processor itself, changes the answer and goes on behind the instruction. Programs that were started from this one have
// the library too, by LD_PRELOAD, such as compilers for "the native processor".
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

using Word = std::uint32_t;
struct Answer {
  Word a, b, c, d;
};

bool amd, avx512;
struct sigaction theirs;  // what the program does with a fault of its own
bool handled = false;

void let_fault(bool faults) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, faults ? 0 : 1); }

Word bits(std::initializer_list<int> places) {
  Word all = 0;
  for (int place : places) all |= Word{1} << place;
  return all;
}

// Intel's manual, volume 2A, CPUID: features of leaf 7, and the parts of a state that XSAVE keeps.
void without_avx512(Word leaf, Word sub, Answer& x) {
  if (leaf == 7 && sub == 0) {
    x.b &= ~bits({16, 17, 21, 26, 27, 28, 30, 31});
    x.c &= ~bits({1, 6, 8, 11, 12, 14});
    x.d &= ~bits({2, 3, 8, 14, 22, 23, 24, 25});  // with AMX
  }
  if (leaf == 7 && sub == 1) x = {};  // AVX-VNNI and bfloat16, which Zen 3 has not either
  if (leaf == 0xD && sub == 0) x.a &= 7;
}

// AMD's manual, volume 3, appendix E: the vendor, Zen 3 or Zen 5, and a core's caches.
void of_amd(Word leaf, Word sub, Answer& x) {
  Word signature = avx512 ? 0x00B00F21 : 0x00A00F11;
  auto named = [&x](Word leaves) {
    x.a = leaves;
    std::memcpy(&x.b, "Auth", 4), std::memcpy(&x.d, "enti", 4), std::memcpy(&x.c, "cAMD", 4);
  };
  if (leaf == 0) named(0x10);
  if (leaf == 0x80000000) named(0x8000001F);
  if (leaf == 1) x.a = signature;
  if (leaf == 0x80000001) x.a = signature, x.c |= bits({22});
  if (leaf == 2 || leaf == 4 || leaf == 0x8000001E) x = {};
  if (leaf == 0x80000005) x = {0xFF48FF40, 0xFF48FF40, avx512 ? 0x300C0140u : 0x20080140u, 0x20080140};
  if (leaf == 0x80000006) x = {0, 0, (avx512 ? 1024u : 512u) << 16 | 0x6140, 64u << 18 | 0x9140};
  if (leaf == 0x80000008) x.c = 0x1001;
  if (leaf == 0x8000001D) {
    struct {
      Word type, level, kilobytes, ways;
    } caches[] = {{1, 1, avx512 ? 48u : 32u, avx512 ? 12u : 8u},
                  {2, 1, 32, 8},
                  {3, 2, avx512 ? 1024u : 512u, avx512 ? 16u : 8u},
                  {3, 3, 32768, 16}};
    x = {};
    if (sub >= 4) return;
    auto& cache = caches[sub];
    x = {cache.type | cache.level << 5 | 1 << 8, (cache.ways - 1) << 22 | 63, cache.kilobytes * 16 / cache.ways - 1, 0};
  }
}

void on_fault(int signal_number, siginfo_t* info, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  auto* instruction = reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]);
  if (info->si_code == SI_KERNEL && instruction && instruction[0] == 0x0F && instruction[1] == 0xA2) {
    Word leaf = registers[REG_RAX], sub = registers[REG_RCX];
    Answer x{};
    let_fault(false);
    __cpuid_count(leaf, sub, x.a, x.b, x.c, x.d);
    let_fault(true);
    if (!avx512) without_avx512(leaf, sub, x);
    if (amd) of_amd(leaf, sub, x);
    registers[REG_RAX] = x.a, registers[REG_RBX] = x.b, registers[REG_RCX] = x.c, registers[REG_RDX] = x.d;
    registers[REG_RIP] += 2;
    return;
  }
  if (handled && theirs.sa_flags & SA_SIGINFO) return theirs.sa_sigaction(signal_number, info, context);
  if (handled && theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) return theirs.sa_handler(signal_number);
  _exit(128 + signal_number);
}

}  // namespace

// Others' handlers of faults come behind the one above.
extern "C" int sigaction(int number, const struct sigaction* wanted, struct sigaction* before) noexcept {
  static auto real = reinterpret_cast<int (*)(int, const struct sigaction*, struct sigaction*)>(dlsym(RTLD_NEXT, "sigaction"));
  if (number != SIGSEGV || (wanted && wanted->sa_sigaction == on_fault)) return real(number, wanted, before);
  if (before) *before = theirs;
  if (wanted) theirs = *wanted, handled = true;
  return 0;
}

extern "C" sighandler_t signal(int number, sighandler_t handler) noexcept {
  struct sigaction wanted = {}, before = {};
  wanted.sa_handler = handler;
  wanted.sa_flags = SA_RESTART;
  return sigaction(number, &wanted, &before) ? SIG_ERR : before.sa_handler;
}

__attribute__((constructor)) static void begin() {
  const char* like = std::getenv("AS_PROCESSOR");
  if (!like) return;
  amd = std::strncmp(like, "amd", 3) == 0, avx512 = std::strstr(like, "avx512") != nullptr;
  struct sigaction wanted = {};
  wanted.sa_sigaction = on_fault;
  wanted.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &wanted, nullptr);
  let_fault(true);
}
