// What a launch is counted to have done with memory, one request of a warp at a time.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emu::trace {

enum class Kind : std::uint8_t { kLoad, kStore, kAtomic, kMatrix, kAsync };
constexpr const char* kKindNames[] = {"load", "store", "atomic", "matrix", "async"};

// A lane's part of a request. kMatrix is a lane's row of ldmatrix; kAsync has both sides.
struct Access {
  std::uint64_t pc;
  std::uintptr_t address;  // kAsync: in global memory
  std::uint32_t path;      // of calls, see lanes.h
  std::uint32_t shared;    // offset in shared memory; kAsync and kShared
  std::uint16_t buffer;    // or kShared
  std::uint8_t bytes;
  Kind kind;
};
constexpr std::uint16_t kShared = 0xffff;

// ---- global memory

constexpr std::uintptr_t kSectorBytes = 32;

// What is known of a sector: a bit for each byte.
struct Sector {
  struct Seen {
    std::uint32_t launch = 0, block = 0;
  };
  Seen seen[2];                               // read, written
  std::uint32_t of_launch = 0, of_block = 0;  // which ones `seen` is about
};

// Reads of a buffer, or writes.
struct Traffic {
  std::uint64_t requests = 0, lane_bytes = 0, sectors = 0, ideal_sectors = 0;
  std::uint64_t launch_bytes = 0, launch_sectors = 0, block_bytes = 0, block_sectors = 0;
};

struct Buffer {
  std::string name;
  std::uintptr_t first, last;  // multiples of kSectorBytes; the last one is excluded and need not be
  std::vector<Sector> sectors;
  Traffic traffic[2];  // read, written

  bool contains(std::uintptr_t address) const { return address >= first && address < last; }
};

// The sectors of a request, in the order in which lanes name them.
class Touched {
 public:
  void add(std::uintptr_t offset, unsigned bytes) {
    for (; bytes > 0;) {
      const std::uintptr_t sector = offset / kSectorBytes, within = offset % kSectorBytes;
      const unsigned here = std::min<unsigned>(bytes, kSectorBytes - within);
      const auto mask = static_cast<std::uint32_t>(((std::uint64_t{1} << here) - 1) << within);
      add_mask(sector, mask);
      offset += here;
      bytes -= here;
    }
  }
  unsigned count() const { return count_; }
  std::uintptr_t sector(unsigned i) const { return sectors_[i]; }
  std::uint32_t mask(unsigned i) const { return masks_[i]; }

 private:
  void add_mask(std::uintptr_t sector, std::uint32_t mask) {
    for (unsigned i = count_; i > 0; --i) {
      if (sectors_[i - 1] != sector) continue;
      masks_[i - 1] |= mask;
      return;
    }
    sectors_[count_] = sector;
    masks_[count_++] = mask;
  }

  unsigned count_ = 0;
  std::uintptr_t sectors_[64];  // 32 lanes of at most 16 bytes each
  std::uint32_t masks_[64];
};

inline void count_global(Buffer& buffer, bool written, const Access* const* accesses, unsigned count,
                         std::uint32_t launch, std::uint32_t block) {
  Touched touched;
  for (unsigned i = 0; i < count; ++i) touched.add(accesses[i]->address - buffer.first, accesses[i]->bytes);
  Traffic& traffic = buffer.traffic[written];
  unsigned different = 0;
  for (unsigned i = 0; i < touched.count(); ++i) {
    Sector& sector = buffer.sectors[touched.sector(i)];
    if (sector.of_launch != launch) {
      sector = {};
      sector.of_launch = launch;
    }
    if (sector.of_block != block) {
      sector.of_block = block;
      sector.seen[0].block = sector.seen[1].block = 0;
    }
    const std::uint32_t mask = touched.mask(i);
    Sector::Seen& seen = sector.seen[written];
    different += std::popcount(mask);
    traffic.launch_sectors += seen.launch == 0;
    traffic.block_sectors += seen.block == 0;
    traffic.launch_bytes += std::popcount(mask & ~seen.launch);
    traffic.block_bytes += std::popcount(mask & ~seen.block);
    seen.launch |= mask;
    seen.block |= mask;
  }
  ++traffic.requests;
  traffic.lane_bytes += std::uint64_t{count} * accesses[0]->bytes;
  traffic.sectors += touched.count();
  traffic.ideal_sectors += (different + kSectorBytes - 1) / kSectorBytes;
}

// ---- shared memory

constexpr unsigned kBanks = 32;
constexpr unsigned kMostWays = 32;

// Of one source instruction.
struct Site {
  std::uint64_t requests = 0, lane_bytes = 0, wavefronts = 0, ideal_wavefronts = 0;
  std::array<std::uint64_t, kMostWays + 1> by_ways{};  // requests, by the worst of their phases
};

// Different words in the bank that has most of them; what lanes read together counts once.
class BankUse {
 public:
  void add(std::uint32_t word, bool same_word_counts) {
    const unsigned bank = word % kBanks;
    if (!same_word_counts) {
      for (unsigned i = 0; i < count_[bank]; ++i) {
        if (words_[bank][i] == word) return;
      }
    }
    if (count_[bank] < kMostWays) words_[bank][count_[bank]++] = word;
    ways_ = std::max<unsigned>(ways_, count_[bank]);
  }
  unsigned ways() const { return ways_; }

 private:
  unsigned ways_ = 0;
  std::uint8_t count_[kBanks] = {};
  std::uint32_t words_[kBanks][kMostWays];
};

// A request is done in phases: all lanes at once with up to 4 bytes each, half of them with 8, a quarter with
// 16, which for ldmatrix is a matrix. Conflicts are within a phase.
inline void count_shared(Site& site, const Access* const* accesses, const std::uint8_t* lanes,
                         unsigned count) {
  const unsigned bytes = accesses[0]->bytes, phases = std::max(1u, bytes / 4), lanes_each = 32 / phases;
  unsigned worst = 0;
  for (unsigned phase = 0, i = 0; phase < phases; ++phase) {  // lanes ascend
    BankUse use;
    for (; i < count && lanes[i] / lanes_each == phase; ++i) {
      const std::uint32_t first = accesses[i]->shared / 4, last = (accesses[i]->shared + bytes - 1) / 4;
      for (std::uint32_t word = first; word <= last; ++word) {
        use.add(word, accesses[i]->kind == Kind::kAtomic);
      }
    }
    if (use.ways() == 0) continue;
    site.wavefronts += use.ways();
    ++site.ideal_wavefronts;
    worst = std::max(worst, use.ways());
  }
  ++site.requests;
  site.lane_bytes += std::uint64_t{count} * bytes;
  ++site.by_ways[worst];
}

// ---- a launch

struct SiteKey {
  std::uint64_t pc;
  std::uint32_t path;
  std::uint8_t bytes;
  Kind kind;
  bool operator==(const SiteKey&) const = default;
};
struct SiteHash {
  std::size_t operator()(const SiteKey& key) const {
    return (key.pc * 0x9e3779b97f4a7c15ull) ^ (std::uint64_t{key.path} << 20) ^
           (std::uint64_t{key.bytes} << 8) ^ static_cast<std::uint64_t>(key.kind);
  }
};

struct Launch {
  std::string kernel;
  unsigned grid[3], block[3];
  std::size_t dynamic_bytes = 0, static_bytes = 0;
  std::uint64_t barriers = 0, warp_operations[4] = {};
  std::vector<std::pair<std::string, std::array<Traffic, 2>>> buffers;  // of those that were touched
  std::unordered_map<SiteKey, Site, SiteHash> shared;
  std::uint64_t elsewhere = 0;  // accesses to memory that has no name
  SiteKey first_elsewhere{};
};

}  // namespace emu::trace
