// What loops.sass was made of: nvcc -arch=sm_90 -cubin, nvdisasm -c (CUDA 13).
extern "C" __global__ void loops(const float* x, float* y, int rows, int columns, int kind) {
  __shared__ float shared[256];
#pragma unroll 1
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0.f;
#pragma unroll 1
    for (int column = threadIdx.x; column < columns; column += 256)
      sum = fmaf(x[row * columns + column], sum, 1.f);
    if (kind == 1) {
      sum = __expf(sum);
    } else {
      sum = sum * sum + 2.f;
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) y[row] = shared[(int)sum & 255];
    __syncthreads();
  }
}
