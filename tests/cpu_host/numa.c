/* libnuma for a machine that has none installed: it says that there is no NUMA here.
   vLLM's CPU build is linked with libnuma; after numa_available() says -1 it calls nothing else. */
#include <stdlib.h>

int numa_available(void) { return -1; }

static void unreachable(void) { abort(); }

#define STANDS_IN(name) void name(void) { unreachable(); }
STANDS_IN(numa_bitmask_free)
STANDS_IN(numa_get_mems_allowed)
STANDS_IN(numa_migrate_pages)
STANDS_IN(numa_parse_nodestring)
STANDS_IN(numa_set_interleave_mask)
STANDS_IN(numa_set_membind)
STANDS_IN(numa_set_strict)
