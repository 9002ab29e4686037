/* control.h -- the emulation as its host sees it: which memory kernels may touch, in which order warps run, what went wrong.
 *
 * Memory is registered by whoever allocates it; a kernel that touches anything else is reported. Registration is shared by all
 * host threads; order and last fault belong to the calling thread.
 */
#ifndef RKSC_EMU_CONTROL_H
#define RKSC_EMU_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a launch returns when the emulation reports a fault. Every other non-zero code is a cudaError_t. */
#define RKSC_EMU_FAULT 999

/* The version of this interface: 1. */
uint32_t rksc_emu_version(void);

/* Makes [p, p + bytes) accessible to kernels. Returns 0; 1 where it is empty, null, or overlaps a registered range. */
int32_t rksc_emu_register(const void* p, size_t bytes, int32_t read_only);
/* Takes back a range by its first address. Returns 0; 1 where none starts there. No launch may be using it. */
int32_t rksc_emu_unregister(const void* p);

/* The order in which CTAs, and the warps and lanes within them, are run on this thread. */
enum rksc_emu_order { RKSC_EMU_FORWARD = 0, RKSC_EMU_BACKWARD = 1, RKSC_EMU_SEEDED = 2 };
/* Returns 0, or 1 for an unknown order. The seed counts for RKSC_EMU_SEEDED alone. */
int32_t rksc_emu_set_order(int32_t order, uint64_t seed);

/* Why the last launch on this thread was stopped or refused; empty if it was not. Valid until the next launch on this thread. */
const char* rksc_emu_last_fault(void);
/* Forgets it. */
void rksc_emu_clear_fault(void);

/* Patterns of the kernels, clean (n = 0) and with one fault planted (n = 1, 2, ...; faults.cu says which), for the tests of the
 * emulation itself. They return what the launch returned, 1 where a clean pattern computed something wrong, -1 where there is no
 * such n. */
int32_t rksc_emu_fault_rows(int32_t n);      /* 1..4: bounds, alignment, read-only */
int32_t rksc_emu_fault_row_sum(int32_t n);   /* 1..5: barriers, unwritten memory, bounds of a static array */
int32_t rksc_emu_fault_reverse(int32_t n);   /* 1..3: __syncwarp, bounds of dynamic memory */
int32_t rksc_emu_fault_rounds(int32_t n);    /* 1..6: divergence */
int32_t rksc_emu_fault_pipeline(int32_t n);  /* 1..4: cp.async */
int32_t rksc_emu_fault_split_sum(int32_t n); /* 1..5: fences of a last arriver */
int32_t rksc_emu_fault_product(int32_t n);   /* 1..3: ldmatrix */

#ifdef __cplusplus
}
#endif
#endif
