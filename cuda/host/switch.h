// switch.h -- from one stack to another: the registers that a call must preserve, and nothing else. For simt.cpp alone.
#pragma once

// Saves the running stack's pointer to *save and goes on where `load` was saved.
extern "C" void rksc_emu_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl rksc_emu_switch
.hidden rksc_emu_switch
.type rksc_emu_switch, @function
rksc_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rksc_emu_switch, .-rksc_emu_switch
)");
// A stack from which rksc_emu_switch returns into `entry`, with a return address of 0 so that backtraces end there.
inline void* fresh_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl rksc_emu_switch
.hidden rksc_emu_switch
.type rksc_emu_switch, %function
rksc_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size rksc_emu_switch, .-rksc_emu_switch
)");
// As above, with a link register of 0 in the frame pointer's place.
inline void* fresh_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) sp[i] = nullptr;
  sp[11] = reinterpret_cast<void*>(entry);
  return sp;
}
#else
#error "the emulation switches stacks on x86-64 and aarch64 only"
#endif
