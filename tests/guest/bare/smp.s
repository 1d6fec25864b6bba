# How a secondary CPU gets from SIPI to ring 3.

 .set CR4_BITS, 0x6b0
 .set EFER_BITS, 0x900
 .set CR0_BITS, 0x80010033
 .set MSR_EFER, 0xc0000080
# Offsets in smp.rs's Cpu.
 .set CPU_TSS_RSP0, 56 + 4
 .set CPU_RING3_STACK, 56 + 104

# Copied to a page below 1 MiB; CS is that page's segment. Straight from real mode to long mode.
 .section .traps, "awx", @progbits
 .balign 16
 .code16
 .globl ap_trampoline, ap_trampoline_end
ap_trampoline:
 movw %cs, %ax
 movw %ax, %ds
 lgdtl ap_gdt_pointer - ap_trampoline
 movl $CR4_BITS, %eax
 movl %eax, %cr4
 movl $page_tables, %eax
 movl %eax, %cr3
 movl $MSR_EFER, %ecx
 movl $EFER_BITS, %eax
 xorl %edx, %edx
 wrmsr
 movl $CR0_BITS, %eax
 movl %eax, %cr0
 ljmpl $0x08, $ap_long_mode
ap_gdt_pointer:
 .word 0
 .quad 0
ap_trampoline_end:

 .code64
 .balign 16
ap_long_mode:
 movl $0x10, %eax
 movl %eax, %ss
 movq ap_cpu, %rdi
 movq CPU_TSS_RSP0(%rdi), %rsp
 lidt idt_pointer
 movl $0x28, %eax
 ltr %ax
 pushq $0x1b
 pushq CPU_RING3_STACK(%rdi)
 pushq $0x3002
 pushq $0x23
 pushq $ap_ring3
 iretq
ap_ring3:
 cld
 fninit
 xorl %ebp, %ebp
 movw $0x1b, %ax
 movw %ax, %ds
 movw %ax, %es
 call ap_main
 ud2

 .balign 8
 .globl ap_cpu
ap_cpu:
 .quad 0
