// What the library has once per instruction set: a slot of each pass, and the scratch it needs.
#pragma once

#include "abi.h"

struct Functions {
  void (*forward)(const void* pass, int64_t slot, char* scratch);
  void (*backward)(const void* pass, int64_t slot, char* scratch);
  void (*clear)(const void* pass, int64_t slot, char* scratch);
  void (*draw)(const void* pass, int64_t slot, char* scratch);
  void (*joint)(const void* pass, int64_t task, char* scratch);
  void (*loss)(const void* pass, int64_t example, char* scratch);
  void (*factors)(const void* pass, int64_t slot, char* scratch);
  int64_t (*mixture_scratch)(const void* pass, bool forward);
  int64_t (*draw_scratch)(const void* pass);
  void (*map)(int64_t which, const float* x, float* y, int64_t n);  // exps and log, for tests
};

extern const Functions di4c_plain;
#if defined(__x86_64__)
extern const Functions di4c_avx2, di4c_avx512;
#endif
