// Stands in for libcuda.so.1: answers Triton's driver and launcher as a GPU would, runs nothing, keeps what arrives.
// stand_in_gpu.py sets `gpu` and reads `launches`.
#include "cuda.h"
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { KERNELS = 128, LAUNCHES = 512, PARAMETERS = 64, USUAL_SHARED = 48 << 10, THREADS = 1024 };

struct gpu { int major, minor, processors, shared, registers; } gpu;

struct kernel {
  char name[64];
  int parameters, sizes[PARAMETERS]; // from the compiled kernel's own table
  int most_shared; // bytes that a launch may ask for
} kernels[KERNELS];
int kernel_count;

struct launch {
  int kernel, result; // an index, and what was answered
  int grid[3], block[3], cluster[3], shared;
  int cooperative, attributes; // attributes: how many, whatever they are
  uint64_t stream, values[PARAMETERS];
} launches[LAUNCHES];
int launch_count;

// A record of the section .nv.info.NAME in a kernel's ELF file, from which the driver learns its parameters. In format 4
// `length` bytes follow the first four; attribute 0x17 is a parameter, with its size << 18.
struct __attribute__((packed)) record {
  uint8_t format, attribute;
  uint16_t length;
  uint32_t index;
  uint16_t position, offset;
  uint32_t size;
};

static void read_parameters(struct kernel *kernel, const char *elf) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)elf;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(elf + header->e_shoff);
  char wanted[80];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", kernel->name);
  for (const Elf64_Shdr *section = sections; section < sections + header->e_shnum; section++) {
    if (strcmp(elf + sections[header->e_shstrndx].sh_offset + section->sh_name, wanted)) continue;
    const char *at = elf + section->sh_offset, *end = at + section->sh_size;
    for (const struct record *record; at < end; at += 4 + (record->format == 4 ? record->length : 0)) {
      record = (const struct record *)at;
      if (record->format == 4 && record->attribute == 0x17 && record->position < PARAMETERS) {
        kernel->sizes[record->position] = record->size >> 18;
        kernel->parameters++;
      }
    }
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)image, CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (kernel_count == KERNELS) return CUDA_ERROR_OUT_OF_MEMORY;
  struct kernel *kernel = &kernels[kernel_count++];
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->most_shared = USUAL_SHARED;
  read_parameters(kernel, (const char *)module);
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > gpu.shared)
    return CUDA_ERROR_INVALID_VALUE;
  ((struct kernel *)function)->most_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (launch_count == LAUNCHES) return CUDA_ERROR_OUT_OF_MEMORY;
  const struct kernel *kernel = (const struct kernel *)function;
  struct launch *launch = &launches[launch_count++];
  *launch = (struct launch){
    .kernel = kernel - kernels, .attributes = config->numAttrs, .stream = (uint64_t)config->hStream,
    .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
    .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
    .cluster = {1, 1, 1}, .shared = config->sharedMemBytes,
  };
  for (const CUlaunchAttribute *set = config->attrs; set < config->attrs + config->numAttrs; set++) {
    if (set->id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) launch->cooperative = set->value.cooperative;
    if (set->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      memcpy(launch->cluster, &set->value.clusterDim, sizeof launch->cluster);
  }
  for (int i = 0; i < kernel->parameters; i++)
    memcpy(&launch->values[i], parameters[i], kernel->sizes[i]);
  long programs = (long)launch->grid[0] * launch->grid[1] * launch->grid[2];
  if (launch->shared > kernel->most_shared || launch->block[0] > THREADS)
    launch->result = CUDA_ERROR_INVALID_VALUE;
  else if (launch->cooperative && programs > gpu.processors) // one on each
    launch->result = CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
  return launch->result;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = gpu.major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = gpu.minor; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = gpu.processors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = gpu.shared; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = gpu.registers; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1; // clock rates and the like
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE ? "too many blocks in cooperative launch" : "invalid argument";
  return CUDA_SUCCESS;
}

// Any address is a GPU's: the tensors are the CPU's.
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
  return *(CUdeviceptr *)data = address, CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// Triton's driver is linked with these, but nothing calls them here.
#define UNUSED(name, ...) CUresult name(__VA_ARGS__) { return CUDA_ERROR_NOT_SUPPORTED; }
UNUSED(cuCtxGetDevice, CUdevice *device)
UNUSED(cuCtxGetLimit, size_t *value, CUlimit limit)
UNUSED(cuCtxSetCurrent, CUcontext context)
UNUSED(cuCtxSetLimit, CUlimit limit, size_t value)
UNUSED(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
UNUSED(cuDriverGetVersion, int *version)
UNUSED(cuModuleUnload, CUmodule module)
UNUSED(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status)
