/* echo: print what is typed. Some bytes do more:
 *
 *   q  end with status 0
 *   f  end with status 3
 *   s  touch the shared view of the next page, from the first free one on
 *   p  touch the private view of the same page again
 *   c  convert one page there and back until something else is typed
 *   x  execute ud2
 *
 * vCPU 0 listens; the others end at once. */
#include "lib.h"

#define LSR_DATA_READY 0x01
#define STATUS_FAILED 3

static bool is_typed(void)
{
	return inb(PORT_CONSOLE_LSR) & LSR_DATA_READY;
}

static u8 typed(void)
{
	while (!is_typed())
		relax();
	return inb(PORT_CONSOLE);
}

static void echo(u8 byte)
{
	while (!(inb(PORT_CONSOLE_LSR) & LSR_TRANSMITTER_EMPTY))
		;
	outb(PORT_CONSOLE, byte);
}

static void touch(u64 view)
{
	store64(view, load64(view) + 1);
}

int guest_main(u64 vcpu)
{
	u64 next = boot->first_free, page = next;

	if (vcpu != 0)
		return STATUS_OK;
	print("echo: type");
	for (;;) {
		u8 byte = typed();

		echo(byte);
		switch (byte) {
		case 'q':
			return STATUS_OK;
		case 'f':
			return STATUS_FAILED;
		case 's':
			if (next >= boot->memory_size)
				return STATUS_CANNOT;
			page = next;
			next += PAGE_SIZE;
			touch(shared_view(page));
			break;
		case 'p':
			touch(private_view(page));
			break;
		case 'c':
			while (!is_typed()) {
				touch(shared_view(page));
				touch(private_view(page));
			}
			break;
		case 'x':
			__asm__ volatile("ud2");
			break;
		default:
			break;
		}
	}
}
