// All kernels of one instruction set, in the order in which they build on each other.
#include "vec.h"
//
#include "depthwise_row.h"
#include "rows.h"
//
#include "expand_depthwise.h"
#include "head.h"
#include "moments.h"
#include "project.h"
#include "squeeze_excite.h"
//
#include "table.h"
