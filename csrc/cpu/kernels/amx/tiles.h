// The tile registers of AMX: eight of 16 rows of 64 bytes. Products are of tiles of bfloat16: sums [16][16]
// += rows of 32 inputs [16][32] times pairs of weights [16 pairs][16 outputs][2].
//
// Registers are named by literal numbers. Every operation is a barrier to the compiler's memory accesses.

inline constexpr int64_t kTilePixels = 32;  // rows that are multiplied at once: two tiles
inline constexpr int64_t kTileDepth = 32;   // inputs of a tile

#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::: "memory")
#define TILE_LOAD(tile, from, stride_bytes)                                                           \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(static_cast<int64_t>(stride_bytes)) \
               : "memory")
#define TILE_STORE(tile, to, stride_bytes)                                                               \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride_bytes)) \
               : "memory")
#define TILE_MULTIPLY(sums, rows, pairs) \
  asm volatile("tdpbf16ps %%tmm" #pairs ", %%tmm" #rows ", %%tmm" #sums::: "memory")

// All eight registers of the calling thread, of full size, for the lifetime of this object. Others may have
// changed the thread's configuration before, and it costs less than a tile's product to set.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    static_assert(sizeof configuration == 64);
    asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

// Multiplies 32 pixels into `products` [32][32].
INLINE void multiply_pixels(const TiledBFloat16* in, int64_t in_stride, int64_t depth,
                            const TiledBFloat16* weight, float* products) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const TiledBFloat16* pairs = weight + k * 32;
    TILE_LOAD(4, in + k, in_stride * 2);
    TILE_LOAD(6, pairs, 128);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, pairs + 32, 128);
    TILE_MULTIPLY(1, 4, 7);
    TILE_LOAD(5, in + 16 * in_stride + k, in_stride * 2);
    TILE_MULTIPLY(2, 5, 6);
    TILE_MULTIPLY(3, 5, 7);
  }
  TILE_STORE(0, products, 128);
  TILE_STORE(1, products + 16, 128);
  TILE_STORE(2, products + 16 * 32, 128);
  TILE_STORE(3, products + 16 * 32 + 16, 128);
}
