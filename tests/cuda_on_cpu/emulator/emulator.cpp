// All of the emulator as one file: compiled one by one, each of these would take half of its time for the same headers.
#include "barriers.cpp"
#include "launch.cpp"
#include "memory.cpp"
#include "runtime.cpp"
#include "scheduler.cpp"
#include "tma.cpp"
#include "wgmma.cpp"
