// Launches: from a kernel's name and arguments to blocks, one after the other.
#include "api.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <csignal>
#include <list>
#include <map>

#include "block.h"

namespace emu {

const Kernel* kernel;
std::string finding;
bool checking = true;
uint32_t planted_site;
Plant planted = Plant::none;
uint64_t planted_times;
int64_t branches_left;
Dim3 block_index, block_size, grid_size;

namespace {

struct Loaded {
  const Kernel* kernel;
  std::vector<std::pair<uint32_t, std::string>> lines;
};
std::map<std::string, Loaded> loaded;
EmuLoader loader;
uint32_t asked_site;  // planted where this kernel runs, or any if it has no name
std::string asked_kernel;
struct Launch {
  std::string kernel;
  Counts counts;
};
std::list<Launch> launches;
std::map<std::string, int> options{
    {"check", 1},      {"multiprocessors", 4},  {"shared_limit", 163 * 1024}, {"capability", 80},
    {"late", 1},       {"strict_warpgroup", 1}, {"strict_fence", 1},          {"war_fence", 1},
    {"init_fence", 1}, {"cut_sums", 0}};

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string s = status == 0 ? text : name;
  free(text);
  const std::string noise[] = {"(anonymous namespace)::", "void "};
  for (const auto& n : noise)
    for (size_t i; (i = s.find(n)) != std::string::npos;) s.erase(i, n.size());
  return s.substr(0, s.find('('));
}

// A plain run meets the guard pages: the fault becomes a finding.
void on_fault(int signal, siginfo_t* info, void*) {
  if (!current) {
    ::signal(signal, SIG_DFL);
    return;
  }
  char text[64];
  snprintf(text, sizeof text, "access to unmapped address %p", info->si_addr);
  fail_at(text, current->site);
}

class FaultHandler {
 public:
  FaultHandler() {
    static char memory[64 * 1024];
    stack_t mine{};
    mine.ss_sp = memory, mine.ss_size = sizeof memory;
    sigaltstack(&mine, &stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  stack_t stack_;
  struct sigaction segv_, bus_;
};

void run_grid(const char* params, size_t shared_bytes) {
  const FaultHandler handler;
  global_start_launch();
  block.threads = block_size.x * block_size.y * block_size.z;
  block.fibers.resize(std::max<size_t>(block.fibers.size(), (block.threads + 31) / 32 * 32));
  block.warps.resize((block.threads + 31) / 32);
  for (size_t i = block.threads; i < block.fibers.size(); i++) block.fibers[i].done = true;
  for (unsigned z = 0; z < grid_size.z; z++)
    for (unsigned y = 0; y < grid_size.y; y++)
      for (unsigned x = 0; x < grid_size.x; x++) {
        block_index = {x, y, z};
        global_start_block();
        shared_start(shared_bytes);
        counts.blocks++;
        run_block(params);
        if (!finding.empty()) return;
      }
}

}  // namespace

std::string where(uint32_t site) {
  const auto found = loaded.find(kernel->name);
  std::string text = "PTX line " + std::to_string(site) + " of the kernel";
  if (found == loaded.end()) return text;
  for (const auto& [line, source] : found->second.lines) {
    if (line > site) break;
    text = source;
  }
  return text;
}

std::string block_name() {
  char b[80];
  snprintf(b, sizeof b, " in block %u,%u,%u", block_index.x, block_index.y, block_index.z);
  return demangled(kernel->name) + b;
}

void touch_by(Fiber& by, const void* p, int bytes, Access access, uint32_t site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail_at("misaligned access", site);
  if (in_arena(p, arena_span()))
    shared_access(static_cast<const char*>(p) - arena, bytes, access, actor(by), site);
  else if (static_cast<size_t>(static_cast<const char*>(p) - by.stack) < 256 * 1024)
    return;  // local memory
  else
    global_access(static_cast<const char*>(p), bytes, access, actor(by), site);
}

void touch(const void* p, int bytes, Access access, uint32_t site) { touch_by(*current, p, bytes, access, site); }

}  // namespace emu

using namespace emu;

void emu_loader(EmuLoader f) { loader = f; }

const char* emu_load(const char* path, const EmuLine* lines, int count) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return dlerror();
  const auto* k = static_cast<const Kernel*>(dlsym(library, "emu_kernel"));
  if (!k) return "no emu_kernel in the library";
  Loaded l{k, {}};
  for (int i = 0; i < count; i++) l.lines.emplace_back(lines[i].site, lines[i].text);
  for (const auto* c = k->constants; c && c->at; c++) emu_permanent(c->at, c->bytes, c->writable);
  loaded[k->name] = std::move(l);
  return nullptr;
}

int emu_known(const char* name) { return loaded.count(name) != 0; }

int emu_launch(const char* name, EmuDim3 grid, EmuDim3 threads, void** args, size_t dynamic) {
  finding.clear();
  if (!loaded.count(name) && (!loader || !loader(name) || !loaded.count(name))) return 3;
  kernel = loaded[name].kernel;
  if (kernel->capability > options["capability"]) return 4;
  const unsigned n = threads.x * threads.y * threads.z;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !n || n > 1024 || threads.z > 64 ||
      static_cast<int>(n) > kernel->max_threads || grid.x > 0x7fffffffu)
    return 1;
  alignas(128) char params[4096] = {};
  for (int i = 0; i < kernel->params; i++) memcpy(params + kernel->offset[i], args[i], kernel->size[i]);
  grid_size = {grid.x, grid.y, grid.z}, block_size = {threads.x, threads.y, threads.z};
  // Dynamic memory starts no better aligned than it is declared, if at 128 bytes: a kernel that needs more must align.
  const size_t align = std::max<size_t>(kernel->dynamic_align, 128);
  dynamic_at =
      dynamic ? static_cast<uint32_t>((kernel->static_shared + 2 * align - 1) / (2 * align) * 2 * align + align) : 0;
  counts = Counts{};
  planted_site = asked_kernel.empty() || asked_kernel == name ? asked_site : 0;
  run_grid(params, dynamic ? dynamic_at + dynamic : kernel->static_shared);
  launches.push_back({kernel->name, counts});
  return finding.empty() ? 0 : 2;
}

const char* emu_finding() { return finding.c_str(); }

int emu_set(const char* option, int value) {
  if (!options.count(option)) return 1;
  options[option] = value;
  if (!strcmp(option, "capability")) options["shared_limit"] = (value >= 90 ? 227 : 163) * 1024;
  cut_sums = options["cut_sums"] != 0;
  checking = options["check"] != 0, late = options["late"] != 0;
  strict = {options["strict_warpgroup"] != 0, options["strict_fence"] != 0, options["war_fence"] != 0,
            options["init_fence"] != 0};
  return 0;
}
int emu_get(const char* option) { return options.count(option) ? options[option] : -1; }

void emu_plant(uint32_t site, int what, const char* in) {
  asked_site = site, asked_kernel = in;
  planted = static_cast<Plant>(what);
  planted_times = 0;
}
uint64_t emu_planted() { return planted_times; }

int emu_launches() { return static_cast<int>(launches.size()); }
const char* emu_launch_kernel(int i) { return std::next(launches.begin(), i)->kernel.c_str(); }
const uint64_t* emu_launch_counts(int i) {
  return reinterpret_cast<const uint64_t*>(&std::next(launches.begin(), i)->counts);
}
void emu_clear_launches() { launches.clear(); }
