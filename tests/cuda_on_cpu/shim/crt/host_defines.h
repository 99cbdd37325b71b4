// Stand-in for the toolkit's crt/host_defines.h, which the runtime's Python package lacks: the qualifiers mean nothing.
#pragma once
#define __host__
#define __device__
#define __global__
#define __constant__
#define __managed__
#define __shared__
#define __cluster_dims__(...)
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_CB
#define CUDART_DEVICE
