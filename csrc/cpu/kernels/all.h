// All kernels of one instruction set, in the order in which they build on each other.
#include "vec.h"
//
#include "depthwise_row.h"
#include "rows.h"
//
#include "multiply_panel.h"
//
#ifdef GREEDYNAS_AMX
#include "amx/tiles.h"
//
#include "amx/halves.h"
#include "amx/transpose.h"
//
#include "amx/multiply_panel.h"
#include "amx/normalise_halves.h"
#else
struct Tiles {};  // nothing to prepare
#endif
//
#include "expand_depthwise.h"
#include "head.h"
#include "moments.h"
#include "pool.h"
#include "project.h"
#include "squeeze_excite.h"
//
#ifdef GREEDYNAS_AMX
#include "amx/half_sums.h"
//
#include "amx/depthwise_rows.h"
//
#include "amx/expand_depthwise.h"
#include "amx/head.h"
#include "amx/moments.h"
#include "amx/pack.h"
#include "amx/patches.h"
#include "amx/project.h"
#include "amx/squeeze.h"
#endif
//
#include "table.h"
