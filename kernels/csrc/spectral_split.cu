// Low and high frequencies of a grid by products with the few kept waves, and the adjoint; see ../spectral_split.py.
//
// Macros: SCALAR; ADJOINT (0: first -> low and high; 1: low = second + L (first - second)); ROWS and COLUMNS, the
// numbers of waves m and n; COUPLED (0 or 1), whether the square's corners couple the last cosines and sines;
// CHANNELS, those of a block. A block takes one grid; neighbouring threads take neighbouring channels, and each group of
// CHANNELS threads one row of the grid at a time. Offsets inside one image fit into 32 bits (the caller sees to it).
//
// The coefficients are summed up in registers, so the grid is read once for them; it is read again, from the L2 cache,
// where the outputs are written. Waves along x lie in shared memory in fours: one load serves four multiplications.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int THREADS = 256;
constexpr int GROUPS = THREADS / CHANNELS;
constexpr int OWN = (ROWS + GROUPS - 1) / GROUPS;  // rows of coefficients that a group sums up
constexpr int PADDED = (COLUMNS + 3) / 4 * 4;

struct Strides {
    int y, x;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half_rn(value); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

__device__ __forceinline__ float at(const SCALAR* __restrict__ image, const Strides& strides, int y, int x) {
    return to_float(image[y * strides.y + x * strides.x]);
}

extern "C" __global__ void __launch_bounds__(THREADS) split(
    const SCALAR* __restrict__ first, const SCALAR* __restrict__ second, SCALAR* __restrict__ low,
    SCALAR* __restrict__ high, const float* __restrict__ rows, const float* __restrict__ columns,
    const float* __restrict__ weights, long long height, long long width, long long channels, long long first_b,
    long long first_y, long long first_x, long long first_c, long long second_b, long long second_y,
    long long second_x, long long second_c
) {
    extern __shared__ float4 memory[];
    float4* along_x = memory;  // (width, PADDED)
    float* shared = reinterpret_cast<float*>(memory) + width * PADDED;  // (rows, COLUMNS, CHANNELS)
    const int lane = threadIdx.x % CHANNELS, group = threadIdx.x / CHANNELS;
    const int blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int channel = blockIdx.x % blocks * CHANNELS + lane;
    const bool known = channel < channels;
    const long long image = blockIdx.x / blocks;
    const Strides first_strides = {(int)first_y, (int)first_x}, second_strides = {(int)second_y, (int)second_x};
    if (known) {
        first += image * first_b + channel * first_c;
        second += image * second_b + channel * second_c;
    }

    for (int k = threadIdx.x; k < width * PADDED; k += THREADS) {
        const int x = k / PADDED, j = k % PADDED;
        reinterpret_cast<float*>(along_x)[k] = j < COLUMNS ? columns[j * width + x] : 0.f;
    }
    __syncthreads();

    float own[OWN][COLUMNS] = {};
    for (int top = 0; top < height; top += GROUPS) {
        const int y = top + group;
        float half[PADDED] = {};
        if (known && y < height) {
#pragma unroll 4
            for (int x = 0; x < width; ++x) {
                float value = at(first, first_strides, y, x);
                if (ADJOINT) value -= at(second, second_strides, y, x);
#pragma unroll
                for (int j = 0; j < PADDED / 4; ++j) {
                    const float4 wave = along_x[x * (PADDED / 4) + j];
                    half[4 * j] += wave.x * value;
                    half[4 * j + 1] += wave.y * value;
                    half[4 * j + 2] += wave.z * value;
                    half[4 * j + 3] += wave.w * value;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) shared[(group * COLUMNS + j) * CHANNELS + lane] = half[j];
        __syncthreads();
        const int count = min((long long)GROUPS, height - top);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const int i = k * GROUPS + group;
            if (i >= ROWS) continue;
            for (int g = 0; g < count; ++g) {
                const float wave = rows[i * height + top + g];
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) own[k][j] += wave * shared[(g * COLUMNS + j) * CHANNELS + lane];
            }
        }
        __syncthreads();
    }

    // Y in shared memory, for the corners' partners; then Z in its place
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const int i = k * GROUPS + group;
        if (i >= ROWS) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) shared[(i * COLUMNS + j) * CHANNELS + lane] = own[k][j];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const int i = k * GROUPS + group;
        if (i >= ROWS) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            own[k][j] *= weights[i * COLUMNS + j];
            if (COUPLED && i >= ROWS - 2 && j >= COLUMNS - 2) {
                const float partner = shared[((2 * ROWS - 3 - i) * COLUMNS + 2 * COLUMNS - 3 - j) * CHANNELS + lane];
                own[k][j] += (i - ROWS == j - COLUMNS ? -0.25f : 0.25f) * partner;
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const int i = k * GROUPS + group;
        if (i >= ROWS) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) shared[(i * COLUMNS + j) * CHANNELS + lane] = own[k][j];
    }
    __syncthreads();

    if (!known) return;
    for (int y = group; y < height; y += GROUPS) {
        float half[PADDED] = {};
        for (int i = 0; i < ROWS; ++i) {
            const float wave = rows[i * height + y];
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) half[j] += wave * shared[(i * COLUMNS + j) * CHANNELS + lane];
        }
        const long long to = ((image * height + y) * width) * channels + channel;
#pragma unroll 4
        for (int x = 0; x < width; ++x) {
            float kept = 0.f;
#pragma unroll
            for (int j = 0; j < PADDED / 4; ++j) {
                const float4 wave = along_x[x * (PADDED / 4) + j];
                kept += wave.x * half[4 * j] + wave.y * half[4 * j + 1] + wave.z * half[4 * j + 2] +
                        wave.w * half[4 * j + 3];
            }
            if (ADJOINT) {
                kept += at(second, second_strides, y, x);
            } else {
                assign(high[to + x * channels], at(first, first_strides, y, x) - kept);
            }
            assign(low[to + x * channels], kept);
        }
    }
}
