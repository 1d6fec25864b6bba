# Interrupts, exceptions and the ring-0 services of the guest.
#
# Ring 3 executes privileged instructions as if it were allowed to; each raises #GP and gp_entry
# performs it in ring 0: in/out in 8, 16 and 32 bits through DX, rep outsb, hlt, cli, sti, rdmsr, wrmsr.

 .section .traps, "awx", @progbits
 .balign 16
 .globl trap_stubs
trap_stubs:
 .set vector, 0
 .rept 256
 .balign 16
 .if vector == 13
 jmp gp_entry
 .elseif vector == 255
 iretq                          # the LAPIC's spurious vector wants no EOI
 .elseif vector >= 32
 pushq %rax
 movl $vector, %eax
 jmp irq_entry
 .else
 .if !((vector == 8) || (vector == 10) || (vector == 11) || (vector == 12) || (vector == 14) || (vector == 17) || (vector == 21))
 pushq $0                       # the CPU pushed no error code
 .endif
 pushq $vector
 jmp exception_entry
 .endif
 .set vector, vector + 1
 .endr

# Stack: rax rip cs rflags rsp ss. Counts the vector and signals EOI.
 .balign 16
irq_entry:
 lock incq IRQ_COUNTS(, %rax, 8)
 cmpb $0, LAPIC_IS_X2APIC
 jne 1f
 movq LAPIC_EOI, %rax
 movl $0, (%rax)
 popq %rax
 iretq
1:
 pushq %rcx
 pushq %rdx
 movl $0x80b, %ecx              # IA32_X2APIC_EOI
 xorl %eax, %eax
 xorl %edx, %edx
 wrmsr
 popq %rdx
 popq %rcx
 popq %rax
 iretq

# Return to ring 3 behind an instruction of \length bytes. Stack: rbx error rip ...
 .macro RESUME length
 addq $\length, 16(%rsp)
 popq %rbx
 addq $8, %rsp
 iretq
 .endm

# Stack: error rip cs rflags rsp ss.
 .balign 16
gp_entry:
 testb $3, 16(%rsp)
 jz gp_in_ring0
 pushq %rbx
 movq 16(%rsp), %rbx
 movzbl (%rbx), %ebx
 jmp *gp_table(, %rbx, 8)

gp_out8:
 outb %al, %dx
 RESUME 1
gp_out32:
 outl %eax, %dx
 RESUME 1
gp_in8:
 inb %dx, %al
 RESUME 1
gp_in32:
 inl %dx, %eax
 RESUME 1
gp_cli:
 andl $0xfffffdff, 32(%rsp)
 RESUME 1
gp_sti:
 orl $0x200, 32(%rsp)
 RESUME 1
gp_hlt:
 sti
 hlt
 cli
 RESUME 1
gp_prefix_66:
 movq 16(%rsp), %rbx
 cmpb $0xef, 1(%rbx)
 je 1f
 cmpb $0xed, 1(%rbx)
 jne gp_refused
 inw %dx, %ax
 RESUME 2
1:
 outw %ax, %dx
 RESUME 2
gp_prefix_f3:
 movq 16(%rsp), %rbx
 cmpb $0x6e, 1(%rbx)
 jne gp_refused
 rep outsb
 RESUME 2
gp_prefix_0f:
 movq 16(%rsp), %rbx
 cmpb $0x32, 1(%rbx)
 je 1f
 cmpb $0x30, 1(%rbx)
 jne gp_refused
gp_wrmsr:
 wrmsr
 RESUME 2
1:
gp_rdmsr:
 rdmsr
 RESUME 2
gp_refused:
 popq %rbx
 pushq $13
 jmp exception_entry

# A #GP in ring 0 can only come from the two MSR services: the CPU lacks the register. Ring 3 hears of
# it through R10. The CPU aligned the stack before it pushed this frame, so RSP comes from the frame.
gp_in_ring0:
 cmpq $gp_rdmsr, 8(%rsp)
 je 1f
 cmpq $gp_wrmsr, 8(%rsp)
 je 1f
 pushq $13
 jmp exception_entry
1:
 movq 32(%rsp), %rsp
 movl $1, %r10d
 RESUME 2

# Stack: vector error rip cs rflags rsp ss. Hands the facts to exception_report in ring 3.
exception_entry:
 pushq %rax
 movq 8(%rsp), %rax
 movq %rax, EXCEPTION_RECORD
 movq 16(%rsp), %rax
 movq %rax, EXCEPTION_RECORD + 8
 movq 24(%rsp), %rax
 movq %rax, EXCEPTION_RECORD + 16
 movq 32(%rsp), %rax
 movq %rax, EXCEPTION_RECORD + 24
 movq 48(%rsp), %rax
 movq %rax, EXCEPTION_RECORD + 32
 movq %cr2, %rax
 movq %rax, EXCEPTION_RECORD + 40
 pushq $0x1b
 pushq $exception_stack_top - 8 # as if called: the ABI wants RSP + 8 aligned to 16
 pushq $0x3002
 pushq $0x23
 pushq $exception_report
 iretq

 .balign 8
gp_table:
 .set opcode, 0
 .rept 256
 .if opcode == 0x0f
 .quad gp_prefix_0f
 .elseif opcode == 0x66
 .quad gp_prefix_66
 .elseif opcode == 0xec
 .quad gp_in8
 .elseif opcode == 0xed
 .quad gp_in32
 .elseif opcode == 0xee
 .quad gp_out8
 .elseif opcode == 0xef
 .quad gp_out32
 .elseif opcode == 0xf3
 .quad gp_prefix_f3
 .elseif opcode == 0xf4
 .quad gp_hlt
 .elseif opcode == 0xfa
 .quad gp_cli
 .elseif opcode == 0xfb
 .quad gp_sti
 .else
 .quad gp_refused
 .endif
 .set opcode, opcode + 1
 .endr
