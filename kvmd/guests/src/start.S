/* Entry of every vCPU (docs/payload-abi.md): RDI = its index, RSI = the boot information, RSP = its stack.
 *
 * The call leaves RSP + 8 a multiple of 16, as the System V ABI wants it at the start of a C function.
 */
        .section .text.start, "ax", @progbits
        .globl  _start
        .type   _start, @function
_start:
        xorl    %ebp, %ebp
        movq    %rsi, boot(%rip)        /* all vCPUs store the same value */
        call    guest_main
        outb    %al, $0xF4              /* the exit status; does not return */
        ud2
        .size   _start, . - _start

        .section .note.GNU-stack, "", @progbits
