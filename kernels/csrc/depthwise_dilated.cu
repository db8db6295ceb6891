// Sum over branches of GELU(depthwise 3 x 3 convolution + bias), forward and backward; see ../depthwise_dilated.py.
//
// Macros: SCALAR; RATES and DILATIONS ("1,3"), the branches; WIDEST, the largest of them; ACTIVATED (0 or 1);
// CHANNELS x TILE_Y x TILE_X, what a block of THREADS computes; ALONG_X (0 or 1), the direction of a thread's strip.
// Neighbouring threads take neighbouring channels, and with CHANNELS = 1 neighbouring columns: either layout is read
// along its contiguous axis. Offsets inside one image fit into 32 bits (the caller sees to it), images do not.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int THREADS = 256;
constexpr int STRIP = CHANNELS * TILE_Y * TILE_X / THREADS;  // outputs of a thread, side by side: they share loads

struct Strides {
    long long batch;
    int y, x, channel;
};

struct Place {
    long long batch;
    int y, x, channel;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half_rn(value); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

// Loads from a clamped address and then selects: no branch, so that equal loads of a strip become one.
__device__ __forceinline__ float at(
    const SCALAR* __restrict__ image, const Strides& strides, int y, int x, int height, int width
) {
    const int row = min(max(y, 0), height - 1), column = min(max(x, 0), width - 1);
    const float value = to_float(image[row * strides.y + column * strides.x]);
    return row == y && column == x ? value : 0.f;
}

__device__ __forceinline__ float gelu(float u) {
    return ACTIVATED ? 0.5f * u * (1.f + erff(u * 0.70710678f)) : u;
}

__device__ __forceinline__ float gelu_slope(float u) {
    return ACTIVATED ? 0.5f * (1.f + erff(u * 0.70710678f)) + u * 0.39894228f * expf(-0.5f * u * u) : 1.f;
}

// Where a thread's first output lies in tile number `tile` of all images.
__device__ __forceinline__ Place place(long long tile, int block_of_channels, int height, int width) {
    constexpr int COLUMNS = ALONG_X ? TILE_X / STRIP : TILE_X;
    const int across = (width + TILE_X - 1) / TILE_X, down = (height + TILE_Y - 1) / TILE_Y;
    const int within = tile % ((long long)across * down), thread = threadIdx.x / CHANNELS;
    return {
        tile / ((long long)across * down),
        within / across * TILE_Y + thread / COLUMNS * (ALONG_X ? 1 : STRIP),
        within % across * TILE_X + thread % COLUMNS * (ALONG_X ? STRIP : 1),
        block_of_channels * CHANNELS + (int)(threadIdx.x % CHANNELS),
    };
}

extern "C" __global__ void __launch_bounds__(THREADS) forward(
    const SCALAR* __restrict__ input, const SCALAR* __restrict__ weight, const SCALAR* __restrict__ bias,
    SCALAR* __restrict__ output, long long height, long long width, long long channels,
    long long input_b, long long input_y, long long input_x, long long input_c,
    long long output_b, long long output_y, long long output_x, long long output_c
) {
    constexpr int dilations[RATES] = {DILATIONS};
    const int blocks = (channels + CHANNELS - 1) / CHANNELS;
    const Place p = place(blockIdx.x / blocks, blockIdx.x % blocks, height, width);
    if (p.channel >= channels) return;
    const Strides strides = {input_b, (int)input_y, (int)input_x, (int)input_c};
    const SCALAR* __restrict__ image = input + p.batch * input_b + p.channel * input_c;
    float total[STRIP] = {};
#pragma unroll
    for (int r = 0; r < RATES; ++r) {
        float u[STRIP];
#pragma unroll
        for (int j = 0; j < STRIP; ++j) u[j] = to_float(bias[r * channels + p.channel]);
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
            const float w = to_float(weight[(r * channels + p.channel) * 9 + tap]);
            const int y = p.y + dilations[r] * (tap / 3 - 1), x = p.x + dilations[r] * (tap % 3 - 1);
#pragma unroll
            for (int j = 0; j < STRIP; ++j)
                u[j] += w * at(image, strides, y + (ALONG_X ? 0 : j), x + (ALONG_X ? j : 0), height, width);
        }
#pragma unroll
        for (int j = 0; j < STRIP; ++j) total[j] += gelu(u[j]);
    }
    SCALAR* __restrict__ result = output + p.batch * output_b + p.channel * output_c;
#pragma unroll
    for (int j = 0; j < STRIP; ++j) {
        const int y = p.y + (ALONG_X ? 0 : j), x = p.x + (ALONG_X ? j : 0);
        if (y < height && x < width) assign(result[y * (int)output_y + x * (int)output_x], total[j]);
    }
}

// A block walks over tiles. For each branch it recomputes the gradient at the branch's convolution, on the tile and a
// margin of its dilation, in shared memory; the input's gradient gathers from there. Sums for weights and biases stay
// in registers until the end: partial is (blocks / blocks of channels, RATES, 10, channels), the tenth row the bias's.
extern "C" __global__ void __launch_bounds__(THREADS) backward(
    const SCALAR* __restrict__ input, const SCALAR* __restrict__ weight, const SCALAR* __restrict__ bias,
    const SCALAR* __restrict__ grad, SCALAR* __restrict__ grad_input, float* __restrict__ partial,
    long long tiles, long long height, long long width, long long channels,
    long long input_b, long long input_y, long long input_x, long long input_c,
    long long grad_b, long long grad_y, long long grad_x, long long grad_c,
    long long output_b, long long output_y, long long output_x, long long output_c
) {
    constexpr int dilations[RATES] = {DILATIONS};
    __shared__ float delta[(TILE_Y + 2 * WIDEST) * (TILE_X + 2 * WIDEST) * CHANNELS];
    __shared__ float sums[THREADS];
    const int blocks = (channels + CHANNELS - 1) / CHANNELS, splits = gridDim.x / blocks;
    const int block = blockIdx.x % blocks, split = blockIdx.x / blocks;
    const int lane = threadIdx.x % CHANNELS, across = (width + TILE_X - 1) / TILE_X;
    const int per_image = across * (((int)height + TILE_Y - 1) / TILE_Y);
    const Strides strides = {input_b, (int)input_y, (int)input_x, (int)input_c};
    const Strides grad_strides = {grad_b, (int)grad_y, (int)grad_x, (int)grad_c};
    float gathered[RATES][10] = {};
    for (long long tile = split; tile < tiles; tile += splits) {
        const Place p = place(tile, block, height, width);
        const bool inside = p.channel < channels;
        const int channel = inside ? p.channel : 0;
        const int top = tile % per_image / across * TILE_Y, left = tile % per_image % across * TILE_X;
        const SCALAR* __restrict__ image = input + p.batch * input_b + channel * input_c;
        const SCALAR* __restrict__ slopes = grad + p.batch * grad_b + channel * grad_c;
        float total[STRIP] = {};
#pragma unroll
        for (int r = 0; r < RATES; ++r) {
            const int d = dilations[r], columns = TILE_X + 2 * d, rows = TILE_Y + 2 * d;
            float w[9];
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) w[tap] = to_float(weight[(r * channels + channel) * 9 + tap]);
            const float offset = to_float(bias[r * channels + channel]);
            __syncthreads();  // the last branch's readers are done
            for (int i = threadIdx.x / CHANNELS; i < rows * columns; i += THREADS / CHANNELS) {
                const int y = top - d + i / columns, x = left - d + i % columns;
                const float slope = inside ? at(slopes, grad_strides, y, x, height, width) : 0.f;
                float u = offset;
#pragma unroll
                for (int tap = 0; tap < 9; ++tap)
                    u += w[tap] * at(image, strides, y + d * (tap / 3 - 1), x + d * (tap % 3 - 1), height, width);
                delta[i * CHANNELS + lane] = slope * gelu_slope(u);  // zero outside of the image, where slope is
            }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < STRIP; ++j) {
                const int y = p.y + (ALONG_X ? 0 : j), x = p.x + (ALONG_X ? j : 0);
                const float* here = delta + ((y - top + d) * columns + x - left + d) * CHANNELS + lane;
#pragma unroll
                for (int tap = 0; tap < 9; ++tap) {
                    const int down = d * (tap / 3 - 1), right = d * (tap % 3 - 1);
                    total[j] += w[tap] * here[-(down * columns + right) * CHANNELS];
                    gathered[r][tap] += here[0] * at(image, strides, y + down, x + right, height, width);
                }
                gathered[r][9] += here[0];
            }
        }
        SCALAR* __restrict__ result = grad_input + p.batch * output_b + channel * output_c;
#pragma unroll
        for (int j = 0; j < STRIP; ++j) {
            const int y = p.y + (ALONG_X ? 0 : j), x = p.x + (ALONG_X ? j : 0);
            if (inside && y < height && x < width) assign(result[y * (int)output_y + x * (int)output_x], total[j]);
        }
    }
#pragma unroll
    for (int r = 0; r < RATES; ++r) {
#pragma unroll
        for (int k = 0; k < 10; ++k) {
            __syncthreads();
            sums[threadIdx.x] = gathered[r][k];
            __syncthreads();
            const int channel = block * CHANNELS + lane;
            if (threadIdx.x < CHANNELS && channel < channels) {
                float sum = 0.f;
                for (int i = lane; i < THREADS; i += CHANNELS) sum += sums[i];
                partial[(((long long)split * RATES + r) * 10 + k) * channels + channel] = sum;
            }
        }
    }
}
