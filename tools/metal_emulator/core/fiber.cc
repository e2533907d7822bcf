// The context switch between fibers.
#include "state.h"

namespace msl {

#if defined(__x86_64__)
// ucontext makes two system calls at every switch; these ten instructions make none.
extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.local msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");
void context_switch(Context& from, Context& to) { msl_switch(&from, to); }
void context_make(Context& made, char* stack, size_t size, void (*entry)()) {
  void** top = (void**)(stack + size - 64);
  *--top = nullptr;  // the return address of entry, which never returns
  *--top = (void*)entry;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  made = top;
}
#else
void context_switch(Context& from, Context& to) { swapcontext(&from, &to); }
void context_make(Context& made, char* stack, size_t size, void (*entry)()) {
  getcontext(&made);
  made.uc_stack.ss_sp = stack;
  made.uc_stack.ss_size = size;
  made.uc_link = nullptr;
  makecontext(&made, entry, 0);
}
#endif

}  // namespace msl
