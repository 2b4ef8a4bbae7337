// Names of memory, what kernels do with it while they are traced, and what is written about that.
#pragma once

#include <link.h>

#include <memory>
#include <sstream>

#include "counts.h"
#include "emulation/trace.h"
#include "lanes.h"

namespace emu::trace {

struct Range {
  std::uintptr_t first = 0, last = 0;

  Range() = default;
  Range(const void* start, std::size_t bytes)
      : first(reinterpret_cast<std::uintptr_t>(start)), last(first + bytes) {}
  bool contains(std::uintptr_t address) const { return address >= first && address < last; }
};

// The loaded module or program that this is a part of.
struct Module {
  std::uintptr_t base = 0;  // which addr2line does not know of
  Range memory;             // its variables and constants

  Module() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* self) {
          Range all;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const Range part(reinterpret_cast<const void*>(info->dlpi_addr + header.p_vaddr), header.p_memsz);
            all.first = all.last == 0 ? part.first : std::min(all.first, part.first);
            all.last = std::max(all.last, part.last);
          }
          if (!all.contains(reinterpret_cast<std::uintptr_t>(&kKindNames))) return 0;
          *static_cast<Module*>(self) = Module(info->dlpi_addr, all);
          return 1;
        },
        this);
  }
  Module(std::uintptr_t base, const Range& memory) : base(base), memory(memory) {}
};

class Tracer {
 public:
  void start() {
    launches_.clear();
    buffers_.clear();
    active_ = true;
  }
  bool name(const char* name, const void* start, std::size_t bytes) {
    const Range range(start, bytes);
    if (range.first % kSectorBytes != 0 || bytes == 0) return false;
    for (const Buffer& buffer : buffers_) {
      if (range.first < buffer.last && buffer.first < range.last) return false;
    }
    buffers_.push_back(
        {name, range.first, range.last, std::vector<Sector>((bytes + kSectorBytes - 1) / kSectorBytes), {}});
    return true;
  }
  std::string stop() {
    active_ = false;
    std::ostringstream json;
    json << '[';
    for (std::size_t i = 0; i < launches_.size(); ++i) {
      if (i) json << ',';
      write(json, launches_[i]);
    }
    json << ']';
    return json.str();
  }

  // ---- what happens

  void begin_launch(const char* kernel, const dim3& grid, const dim3& block, std::size_t dynamic_bytes,
                    const Range& arguments) {
    if (!active_) return;
    launch_ = std::make_unique<Launch>();
    launch_->kernel = kernel;
    const unsigned sizes[2][3] = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
    std::copy_n(sizes[0], 3, launch_->grid);
    std::copy_n(sizes[1], 3, launch_->block);
    launch_->dynamic_bytes = dynamic_bytes;
    arguments_ = arguments;
    ++launch_number_;
    for (Buffer& buffer : buffers_) buffer.traffic[0] = buffer.traffic[1] = {};
  }
  void end_launch() {
    if (!launch_) return;
    for (const Buffer& buffer : buffers_) {
      const Traffic& read = buffer.traffic[0];
      const Traffic& written = buffer.traffic[1];
      if (read.requests + written.requests > 0) launch_->buffers.push_back({buffer.name, {read, written}});
    }
    launches_.push_back(std::move(*launch_));
    launch_.reset();
  }
  void begin_block(unsigned threads, const Range& shared, const Range& states) {
    if (!launch_) return;
    ++block_number_;
    threads_ = threads;
    shared_ = shared;
    states_ = states;
    if (lanes_.size() < threads) lanes_.resize(threads);
    for (Lane& lane : lanes_) {
      lane.path = 0;
      lane.outer_paths.clear();
      lane.paused = 0;
    }
  }
  void end_block(std::size_t static_bytes) {
    if (!launch_) return;
    group_all();
    launch_->static_bytes = static_bytes;
  }
  void enter(unsigned thread, const Range& stack) {
    if (!launch_) return;
    running_ = &lanes_[thread];
    stack_ = stack;
  }
  void leave() { running_ = nullptr; }
  void pause() {
    if (running_) ++running_->paused;
  }
  void unpause() {
    if (running_) --running_->paused;
  }
  void barrier() {
    if (!launch_) return;
    ++launch_->barriers;
    group_all();
  }
  void warp_operation(WarpOperation operation, unsigned warp, unsigned mask) {
    if (!launch_) return;
    ++launch_->warp_operations[static_cast<int>(operation)];
    if (mask == ~0u) group(warp);
  }
  void call(void* pc) {
    if (running_) running_->call(paths_, reinterpret_cast<std::uint64_t>(pc));
  }
  void end_call() {
    if (running_) running_->end_call();
  }

  void access(const void* pointer, std::size_t bytes, Kind kind, const void* pc) {
    if (!running_ || running_->paused > 0) return;
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    for (std::size_t done = 0; done < bytes; done += 16) {  // no instruction accesses more
      access_once(address + done, static_cast<unsigned>(std::min<std::size_t>(16, bytes - done)), kind, pc);
    }
  }
  void async_copy(const void* shared, const void* global, const void* pc) {
    if (!running_ || running_->paused > 0) return;
    const auto to = reinterpret_cast<std::uintptr_t>(shared), from = reinterpret_cast<std::uintptr_t>(global);
    const int buffer = find(from);
    if (buffer < 0 || !shared_.contains(to)) return note_elsewhere(pc);
    keep({reinterpret_cast<std::uint64_t>(pc), from, running_->path, offset(to),
          static_cast<std::uint16_t>(buffer), 16, Kind::kAsync});
  }

 private:
  std::uint32_t offset(std::uintptr_t address) const {
    return static_cast<std::uint32_t>(address - shared_.first);
  }
  void keep(const Access& access) { running_->accesses.push_back(access); }

  void access_once(std::uintptr_t address, unsigned bytes, Kind kind, const void* pc) {
    const auto place = reinterpret_cast<std::uint64_t>(pc);
    if (shared_.contains(address)) {
      keep(
          {place, address, running_->path, offset(address), kShared, static_cast<std::uint8_t>(bytes), kind});
      return;
    }
    if (stack_.contains(address) || states_.contains(address)) return;
    const int buffer = find(address);
    if (buffer >= 0 && address + bytes <= buffers_[buffer].last) {
      keep({place, address, running_->path, 0, static_cast<std::uint16_t>(buffer),
            static_cast<std::uint8_t>(bytes), kind});
      return;
    }
    if (!arguments_.contains(address) && !module_.memory.contains(address)) note_elsewhere(pc);
  }
  void note_elsewhere(const void* pc) {
    if (launch_->elsewhere++ == 0) {
      launch_->first_elsewhere = {reinterpret_cast<std::uint64_t>(pc), running_->path, 0, Kind::kLoad};
    }
  }

  int find(std::uintptr_t address) {
    if (last_found_ < buffers_.size() && buffers_[last_found_].contains(address)) {
      return static_cast<int>(last_found_);
    }
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].contains(address)) return static_cast<int>(last_found_ = i);
    }
    return -1;
  }

  void group_all() {
    for (unsigned warp = 0; warp * 32 < threads_; ++warp) group(warp);
  }
  void group(unsigned warp) {
    group_lanes(&lanes_[warp * 32], std::min(32u, threads_ - warp * 32), paths_,
                [this](const Access* const* accesses, const std::uint8_t* lanes, unsigned count) {
                  request(accesses, lanes, count);
                });
  }
  void request(const Access* const* accesses, const std::uint8_t* lanes, unsigned count) {
    const Access& first = *accesses[0];
    if (first.buffer != kShared) {
      Buffer& buffer = buffers_[first.buffer];
      if (first.kind != Kind::kStore)
        count_global(buffer, false, accesses, count, launch_number_, block_number_);
      if (first.kind == Kind::kStore || first.kind == Kind::kAtomic) {
        count_global(buffer, true, accesses, count, launch_number_, block_number_);
      }
    }
    if (first.buffer == kShared || first.kind == Kind::kAsync) {
      Site& site = launch_->shared[{first.pc, first.path, first.bytes, first.kind}];
      count_shared(site, accesses, lanes, count);
    }
  }

  // ---- what is written about it

  static void write(std::ostream& json, const Traffic& t) {
    json << "{\"requests\":" << t.requests << ",\"lane_bytes\":" << t.lane_bytes
         << ",\"sectors\":" << t.sectors << ",\"ideal_sectors\":" << t.ideal_sectors
         << ",\"launch_bytes\":" << t.launch_bytes << ",\"launch_sectors\":" << t.launch_sectors
         << ",\"block_bytes\":" << t.block_bytes << ",\"block_sectors\":" << t.block_sectors << '}';
  }
  // The instruction and the calls that led there, the innermost one first; addresses are those of addr2line.
  void write_place(std::ostream& json, std::uint64_t pc, std::uint32_t path) const {
    json << "\"pcs\":[" << pc - 1 - module_.base;
    const std::vector<std::uint64_t>& calls = paths_.calls(path);
    for (auto call = calls.rbegin(); call != calls.rend(); ++call) json << ',' << *call - 1 - module_.base;
    json << ']';
  }
  void write(std::ostream& json, const Launch& l) const {
    const auto three = [&](const char* name, const unsigned (&sizes)[3]) {
      json << '"' << name << "\":[" << sizes[0] << ',' << sizes[1] << ',' << sizes[2] << "],";
    };
    json << "{\"kernel\":\"" << l.kernel << "\",";
    three("grid", l.grid);
    three("block", l.block);
    json << "\"dynamic_shared_bytes\":" << l.dynamic_bytes << ",\"static_shared_bytes\":" << l.static_bytes
         << ",\"barriers\":" << l.barriers << ",\"warp\":{\"barriers\":" << l.warp_operations[0]
         << ",\"shuffles\":" << l.warp_operations[1] << ",\"matrix_products\":" << l.warp_operations[2]
         << ",\"matrix_loads\":" << l.warp_operations[3] << "},\"elsewhere\":{\"accesses\":" << l.elsewhere
         << ',';
    write_place(json, l.first_elsewhere.pc, l.first_elsewhere.path);
    json << "},\"buffers\":{";
    const char* separator = "";
    for (const auto& [name, traffic] : l.buffers) {
      json << separator << '"' << name << "\":{\"read\":";
      write(json, traffic[0]);
      json << ",\"written\":";
      write(json, traffic[1]);
      json << '}';
      separator = ",";
    }
    json << "},\"shared\":[";
    separator = "";
    for (const auto& [key, site] : l.shared) {
      json << separator << "{\"kind\":\"" << kKindNames[static_cast<int>(key.kind)]
           << "\",\"bytes\":" << int{key.bytes} << ',';
      write_place(json, key.pc, key.path);
      json << ",\"requests\":" << site.requests << ",\"lane_bytes\":" << site.lane_bytes
           << ",\"wavefronts\":" << site.wavefronts << ",\"ideal_wavefronts\":" << site.ideal_wavefronts
           << ",\"by_ways\":[";
      for (unsigned ways = 0; ways <= kMostWays; ++ways) json << (ways ? "," : "") << site.by_ways[ways];
      json << "]}";
      separator = ",";
    }
    json << "]}";
  }

  Module module_;
  bool active_ = false;
  std::vector<Buffer> buffers_;
  std::size_t last_found_ = 0;
  std::vector<Launch> launches_;
  CallPaths paths_;

  std::unique_ptr<Launch> launch_;  // that goes on
  std::uint32_t launch_number_ = 0, block_number_ = 0;
  Range arguments_, shared_, states_, stack_;
  unsigned threads_ = 0;
  std::vector<Lane> lanes_;
  Lane* running_ = nullptr;
};

}  // namespace emu::trace
