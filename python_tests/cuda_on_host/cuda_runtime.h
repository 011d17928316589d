// Replaces the CUDA runtime, for tests only: g++ compiles the .cu files with this header, and a
// launch executes every thread of every block on the CPU. A thread is a fiber that runs until a
// barrier; then the next one runs. So a missing barrier, an out-of-bounds access, a wrong index or
// a dependence on the order of threads shows as a wrong result, without a GPU. Speed is not
// simulated.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ \
  static  // blocks run one after the other; a block starts with the values of the last one
#define __grid_constant__
#define __noinline__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMaxGridDimX,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize
};
struct CUstream_st;
typedef CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// Settings and counters of a test.
struct HostDevice {
  int processors = 1;
  int max_grid = 0x7fffffff;
  int l2_bytes = 0;
  cudaStream_t stream = nullptr;  // the stream that every launch must use
  int launches = 0;
  int failing_launch = -1;  // the number of the launch that returns an error
  // Bytes that store() may write, how often each was written, and stores that missed them.
  char* watched = nullptr;
  int64_t watched_bytes = 0;
  uint8_t* writes = nullptr;
  int64_t outside = 0;
  int64_t evict_first = 0;  // stores that leave L2 first
};
inline HostDevice host_device;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  if (stream != host_device.stream) return cudaErrorInvalidConfiguration;
  std::memset(data, value, bytes);
  return cudaSuccess;
}

// ---- fibers -------------------------------------------------------------------------------------

// Created once; a fiber runs one thread of each block. setjmp switches between them, because
// swapcontext makes a system call each time.
struct Fibers {
  static constexpr size_t kStack = 128 * 1024;
  struct Fiber {
    jmp_buf here;
    bool started = false, done = true;
    std::unique_ptr<char[]> stack{new char[kStack]};
  };
  std::vector<Fiber> all{1024};
  jmp_buf scheduler;
  size_t current = 0;
  size_t round = 2;      // between two barriers
  size_t voted[2] = {};  // the last round, of the even and of the odd ones, in which a thread did
  struct Ballot {
    size_t round;  // in which its warp voted last
    unsigned votes;
  };
  Ballot ballots[2][32] = {};  // of the warps, in the even rounds and in the odd ones
  void (*body)(void*) = nullptr;
  void* data = nullptr;

  static void forever();
  void yield() {
    if (_setjmp(all[current].here) == 0) _longjmp(scheduler, 1);
  }
  void resume(size_t thread) {
    current = thread;
    threadIdx = dim3(static_cast<unsigned>(thread));
    Fiber& fiber = all[thread];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, &Fibers::forever, 0);
    setcontext(&context);
  }
  // Runs one block. Every other round goes backwards: no kernel may depend on the order of threads.
  void run(size_t threads) {
    for (size_t i = 0; i < threads; ++i) all[i].done = false;
    for (size_t done = 0; done < threads; ++round) {
      for (size_t i = 0; i < threads; ++i) {
        const size_t thread = round % 2 ? threads - 1 - i : i;
        resume(thread);
        done += all[thread].done;
      }
      // Either all threads wait at a barrier or all are done.
      if (done != 0 && done != threads) {
        fprintf(stderr, "%zu of %zu threads left while others wait at a barrier\n", done, threads);
        abort();
      }
    }
  }
};
inline Fibers host_fibers;
inline void Fibers::forever() {
  for (;;) {
    host_fibers.body(host_fibers.data);
    host_fibers.all[host_fibers.current].done = true;
    host_fibers.yield();
  }
}

inline void __syncthreads() { host_fibers.yield(); }
// A barrier of the whole block here: every warp of a kernel must call it equally often.
inline void __syncwarp() { host_fibers.yield(); }
inline int __syncthreads_or(int vote) {
  const size_t round = host_fibers.round;
  if (vote) host_fibers.voted[round % 2] = round;
  host_fibers.yield();
  return host_fibers.voted[round % 2] == round;
}
// As __syncwarp.
inline unsigned __ballot_sync(unsigned, int vote) {
  const size_t round = host_fibers.round, thread = host_fibers.current;
  Fibers::Ballot& ballot = host_fibers.ballots[round % 2][thread / 32];
  if (ballot.round != round) ballot = {round, 0};
  if (vote) ballot.votes |= 1u << thread % 32;
  host_fibers.yield();
  return ballot.votes;
}

// ---- the runtime --------------------------------------------------------------------------------

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "unspecified launch failure"
                                         : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxGridDimX:
      *value = host_device.max_grid;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = host_device.processors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = host_device.l2_bytes;
      break;
  }
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "the parameters of a kernel hold 4 KB");
  if (host_device.launches++ == host_device.failing_launch) return cudaErrorLaunchFailure;
  if (config->gridDim.x < 1 || config->gridDim.x > static_cast<unsigned>(host_device.max_grid) ||
      config->blockDim.x < 1 || config->blockDim.x > 1024 || config->stream != host_device.stream)
    return cudaErrorInvalidConfiguration;
  auto call = [&] { kernel(arguments...); };
  host_fibers.body = [](void* data) { (*static_cast<decltype(call)*>(data))(); };
  host_fibers.data = &call;
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(gridDim.x - 1 - block);  // no kernel may depend on their order
    host_fibers.run(blockDim.x);
  }
  return cudaSuccess;
}

// ---- device functions ---------------------------------------------------------------------------

template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = min(old, value);
  return old;
}
template <class T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = max(old, value);
  return old;
}
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at |= value;
  return old;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(value); }

template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) abort();  // a GPU would stop here
  T value;
  memcpy(&value, from, sizeof(value));
  return value;
}

// The kernels write every element of an output with one of these two.
template <class T>
void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) abort();  // a GPU would stop here
  char* begin = reinterpret_cast<char*>(to);
  if (host_device.watched) {
    const int64_t at = begin - host_device.watched;
    if (at < 0 || at + static_cast<int64_t>(sizeof(T)) > host_device.watched_bytes) {
      ++host_device.outside;
    } else {
      for (size_t i = 0; i < sizeof(T); ++i) ++host_device.writes[at + static_cast<int64_t>(i)];
    }
  }
  memcpy(begin, &value, sizeof(value));
}
template <class T>
void __stcs(T* to, T value) {
  ++host_device.evict_first;
  __stwb(to, value);
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __half2float(__half value) {
  _Float16 half;
  memcpy(&half, &value, sizeof(half));
  return half;
}
inline __half __float2half_rn(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  __half bits;
  memcpy(&bits, &half, sizeof(bits));
  return bits;
}
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (isnan(value)) return {0x7fff};
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
