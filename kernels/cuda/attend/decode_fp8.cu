// Attention of one query row per sequence where caches hold e4m3 bytes, packed tokens or not. A file per format, since a run
// loads one; what it does stands in decode.cuh.
#include "decode.cuh"

ATTEND_GROUPS(fp8, FP8)
