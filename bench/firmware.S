/* A guest for QEMU's microvm: 64 KiB of firmware that prints one line from the reset vector and ends. */
	.code16
	.org 0
start:	movw $0x3f8, %dx
	movw $text, %si
1:	lodsb %cs:(%si), %al
	testb %al, %al
	jz 2f
	outb %al, %dx
	jmp 1b
2:	movw $0xf4, %dx		/* isa-debug-exit: QEMU ends with 1 */
	xorl %eax, %eax
	outl %eax, %dx
3:	hlt
	jmp 3b
text:	.asciz "hello\n"
	.org 0xfff0
	jmp start
	.org 0x10000
