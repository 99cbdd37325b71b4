// What it declares for kernels is built into NVRTC; host functions are left out by #ifndef __CUDACC_RTC__.
