# PVH entry (Xen ABI, "direct boot", note type 18) to ring 3 in long mode.
#
# On a host where guest ring 0 is emulated each instruction here costs about a microsecond and many
# are refused, so ring 0 does as little as possible with the plainest instructions: no loop, no table
# is built at run time, and everything after the iretq runs in ring 3.
#
# Selectors: 0x08 ring-0 code, 0x10 ring-0 data, 0x1b ring-3 data, 0x23 ring-3 code, 0x28 TSS.

 .set IMAGE_BASE, 0x100000
 .set CR4_BITS, 0x6b0           # PSE PAE PGE OSFXSR OSXMMEXCPT
 .set EFER_BITS, 0x900          # NXE LME
 .set CR0_BITS, 0x80010033      # PG WP NE ET MP PE
 .set MSR_EFER, 0xc0000080
 .set RFLAGS_RING3, 0x3002      # IOPL 3: hosts that honour it spare the port I/O thunk; IF clear

 .section .note.pvh, "a", @note
 .long 4, 4, 18                 # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
 .asciz "Xen"
 .long pvh_entry

# The heartbeat record (heartbeat.rs) alone on the image's first page.
 .section .heartbeat, "aw", @progbits
 .balign 4096
 .globl heartbeat_page
heartbeat_page:
 .fill 4096, 1, 0

 .section .traps, "awx", @progbits
 .balign 4096
idt:
 .set vector, 0
 .rept 256
 .word trap_stubs - IMAGE_BASE + 16 * vector
 .word 0x08
 .byte 0, 0x8e                  # interrupt gate, present, no IST
 .word IMAGE_BASE >> 16
 .quad 0
 .set vector, vector + 1
 .endr
 .globl idt

 .balign 16
 .globl gdt
gdt:
 .quad 0
 .quad 0x00af9b000000ffff
 .quad 0x00cf93000000ffff
 .quad 0x00cff3000000ffff
 .quad 0x00affb000000ffff
gdt_tss:
 .word 103, tss - IMAGE_BASE    # limit, base 15:0
 .byte IMAGE_BASE >> 16, 0x89, 0, 0
 .quad 0
gdt_end:
 .balign 8
tss:
 .long 0
 .quad ring0_stack_top          # RSP0
 .fill 90, 1, 0
 .word 104                      # I/O map base past the limit: no port is granted
 .balign 8
gdt_pointer:
 .word gdt_end - gdt - 1
 .quad gdt
 .balign 8
 .globl idt_pointer
idt_pointer:
 .word 4095
 .quad idt

 .balign 16
 .code32
 .globl pvh_entry
pvh_entry:
 lgdtl gdt_pointer
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
 ljmpl $0x08, $long_mode

 .code64
long_mode:
 movl $0x10, %eax
 movl %eax, %ss
 movl $ring0_stack_top, %esp
 lidt idt_pointer
 movl $0x28, %eax
 ltr %ax
 movl %ebx, %edi                # start_info, guest_main's argument
 pushq $0x1b
 pushq $ring3_stack_top
 pushq $RFLAGS_RING3
 pushq $0x23
 pushq $ring3_entry
 iretq

 .balign 16
ring3_entry:
 cld
 fninit
 xorl %ebp, %ebp
 movw $0x1b, %ax
 movw %ax, %ds
 movw %ax, %es
 call guest_main
 ud2

# Identity map, every page user-accessible: 2 MiB pages for the first 4 GiB. Ring 3 maps
# more at need (paging.rs): the tables are ordinary guest memory.
 .section .data.page_tables, "aw", @progbits
 .balign 4096
 .globl page_tables
page_tables:
 .quad page_directory_pointers + 7
 .fill 511, 8, 0
 .globl page_directory_pointers
page_directory_pointers:
 .quad page_directories + 0x0007, page_directories + 0x1007
 .quad page_directories + 0x2007, page_directories + 0x3007
 .fill 508, 8, 0
page_directories:
 .set page, 0
 .rept 2048
 .quad (page << 21) + 0x87      # present, writable, user, 2 MiB
 .set page, page + 1
 .endr

 .section .bss.stacks, "aw", @nobits
 .balign 4096
 .fill 8192, 1, 0
ring0_stack_top:
 .globl ring3_stack_bottom
ring3_stack_bottom:
 .fill 262144, 1, 0
ring3_stack_top:
 .fill 16384, 1, 0
 .globl exception_stack_top
exception_stack_top:
