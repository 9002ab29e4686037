// planted_faults.cu -- one fault for each tool of compute-sanitizer, so that a visit to a GPU shows the tools at work before it believes
// them: `planted_faults memcheck|racecheck|synccheck|initcheck`. Built by `gpu-visit build`, part of nothing else.
//
// Exit status: 0 when the program came through, which says nothing; 2 on a wrong argument; 3 where there is no GPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

// memcheck: the last thread writes behind the buffer.
__global__ void write_behind(float* x, int len) {
  x[threadIdx.x + (threadIdx.x == blockDim.x - 1 ? len : 0)] = 1.0f;
}

// racecheck: neighbours in another warp are read without a barrier.
__global__ void read_early(float* x) {
  __shared__ float shared[64];
  shared[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = shared[63 - threadIdx.x];
}

// synccheck: half of a warp waits for the whole block.
__global__ void wait_apart(float* x) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  x[threadIdx.x] = 1.0f;
}

// initcheck: memory that nobody wrote.
__global__ void read_unwritten(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  const char* tool = argc == 2 ? argv[1] : "";
  constexpr int kLen = 64;
  float *x = nullptr, *y = nullptr;
  if (cudaMalloc(&x, kLen * sizeof(float)) != cudaSuccess || cudaMalloc(&y, kLen * sizeof(float)) != cudaSuccess) {
    std::fprintf(stderr, "planted_faults: no GPU that can be used\n");
    return 3;
  }
  if (std::strcmp(tool, "initcheck") == 0) {
    read_unwritten<<<1, kLen>>>(x, y);
  } else {
    cudaMemset(x, 0, kLen * sizeof(float));
    if (std::strcmp(tool, "memcheck") == 0) {
      write_behind<<<1, kLen>>>(x, kLen);
    } else if (std::strcmp(tool, "racecheck") == 0) {
      read_early<<<1, kLen>>>(x);
    } else if (std::strcmp(tool, "synccheck") == 0) {
      wait_apart<<<1, kLen>>>(x);
    } else {
      std::fprintf(stderr, "usage: planted_faults memcheck|racecheck|synccheck|initcheck\n");
      return 2;
    }
  }
  cudaDeviceSynchronize();
  return 0;
}
