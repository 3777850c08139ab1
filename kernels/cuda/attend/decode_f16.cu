// Attention of one query row per sequence where caches hold binary16, packed tokens or not. A file per format, since a run
// loads one; what it does stands in decode.cuh.
#include "decode.cuh"

ATTEND_GROUPS(f16, F16)
