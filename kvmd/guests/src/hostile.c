/* hostile: one misbehaviour of a guest, chosen by argument 0, for tests of the machine. What argument 1 means
 * depends on it. Only vCPU 0 misbehaves, but for those that say otherwise; the other vCPUs end with 0. */
#include "lib.h"

#define UNMAPPED 0x7ffffffff000ull /* the last page of the lower half: no machine is large enough to map it */
#define UNKNOWN_PORT 0x1234

static int need_two_views(void)
{
	if (has_two_views())
		return STATUS_OK;
	print("hostile: this needs a machine with two views");
	return STATUS_CANNOT;
}

static int wrong(const char *what, u64 found, u64 expected)
{
	if (found == expected)
		return STATUS_OK;
	print("hostile: %s: %x, %x expected", what, found, expected);
	return STATUS_WRONG;
}

/* 1: an exception that nothing handles: a triple fault. */
static int execute_ud2(void)
{
	__asm__ volatile("ud2");
	return STATUS_WRONG;
}

/* 2: a fetch from where there is no memory; the page tables do map it. */
static int jump_outside_memory(void)
{
	((void (*)(void))(boot->memory_size))();
	return STATUS_WRONG;
}

/* 3: a page fault that nothing handles: a triple fault. */
static int read_unmapped(void)
{
	load64(UNMAPPED);
	return STATUS_WRONG;
}

/* 4: loads outside memory read all ones, stores are ignored; the same for ports that nobody has. */
static int touch_outside_memory(void)
{
	const u64 places[] = {boot->memory_size, boot->memory_size + 0x1ff8, boot->memory_size + boot->shared_offset};
	int status = STATUS_OK;
	u32 value;

	for (unsigned i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		u64 address = places[i];

		for (unsigned pass = 0; pass < 2; pass++) {
			status |= wrong("1 byte outside", *(volatile u8 *)address, 0xff);
			status |= wrong("2 bytes outside", *(volatile u16 *)address, 0xffff);
			status |= wrong("4 bytes outside", *(volatile u32 *)address, 0xffffffff);
			status |= wrong("8 bytes outside", load64(address), ~0ull);
			*(volatile u8 *)address = 0;
			*(volatile u16 *)address = 0;
			*(volatile u32 *)address = 0;
			store64(address, 0);
		}
	}
	for (unsigned pass = 0; pass < 2; pass++) {
		__asm__ volatile("inb %w1, %b0" : "=a"(value) : "d"(UNKNOWN_PORT), "a"(0));
		status |= wrong("byte of an unknown port", value & 0xff, 0xff);
		__asm__ volatile("inw %w1, %w0" : "=a"(value) : "d"(UNKNOWN_PORT), "a"(0));
		status |= wrong("word of an unknown port", value & 0xffff, 0xffff);
		__asm__ volatile("inl %w1, %0" : "=a"(value) : "d"(UNKNOWN_PORT), "a"(0));
		status |= wrong("long of an unknown port", value, 0xffffffff);
		__asm__ volatile("outb %b0, %w1" ::"a"(0), "d"(UNKNOWN_PORT));
		__asm__ volatile("outw %w0, %w1" ::"a"(0), "d"(UNKNOWN_PORT));
		__asm__ volatile("outl %0, %w1" ::"a"(0), "d"(UNKNOWN_PORT));
	}
	return status;
}

/* 5, every vCPU: no exit at all, so only a kick ends it. */
static _Noreturn int spin(void)
{
	for (;;)
		relax();
}

/* 6: each step of the copy needs both views of one page live at once: it can be converted to and fro for ever. */
static int copy_between_views(void)
{
	u64 from = boot->first_free + boot->shared_offset, to = boot->first_free, count = PAGE_SIZE / 8;
	int status = need_two_views();

	if (status == STATUS_OK)
		__asm__ volatile("rep movsq" : "+S"(from), "+D"(to), "+c"(count)::"memory");
	return status;
}

/* 7: a status that is kvmd's own. */
static int reserved_status(void)
{
	return 121;
}

/* 8: an implicit conversion of memory below the first free byte. */
static int touch_pinned(void)
{
	int status = need_two_views();

	if (status == STATUS_OK)
		load64((u64)boot + boot->shared_offset);
	return status;
}

static void insert_string(u64 to, u64 count)
{
	__asm__ volatile("rep insb" : "+D"(to), "+c"(count) : "d"(PORT_CONSOLE_LSR) : "memory");
}

/* 9: KVM emulates `rep ins` and stores the bytes itself; into a view that is not live this is a conversion too. But
 * tripwires by attribute do not see it: there, with argument 1, the bytes are lost, and must not show up later. */
static int string_input(void)
{
	u64 view = shared_view(boot->first_free);
	u8 expected = argument(1, 0) ? 0 : inb(PORT_CONSOLE_LSR);
	int status = STATUS_OK;

	insert_string(view, 16);
	for (unsigned i = 0; i < 16; i++)
		status |= wrong("byte of rep insb", *(volatile u8 *)(view + i), expected);
	status |= wrong("byte after rep insb", *(volatile u8 *)(view + 16), 0);
	insert_string(view, 16); /* live by now */
	return status | wrong("byte of rep insb into a live view", *(volatile u8 *)view, inb(PORT_CONSOLE_LSR));
}

/* 10: at CPL 3 a general protection fault and so a triple fault; at CPL 0 the vCPU halts. */
static int halt(void)
{
	__asm__ volatile("hlt");
	return STATUS_WRONG;
}

/* 11: bytes to the console as fast as they go. */
static int flood_console(void)
{
	u64 bytes = argument(1, 65536);

	for (u64 i = 0; i < bytes; i++)
		outb(PORT_CONSOLE, i % 64 == 63 ? '\n' : 'x');
	return STATUS_OK;
}

/* 12: shared memory can be executed. With argument 1 also fetch from the private view when that is not live: it is
 * converted and holds zeros, each pair of which is `add %al, (%rax)`; these run to the page's end and into the
 * next page, where a `ret` is. A tripwire of the kind `hole` cannot do that. */
static int execute_shared(void)
{
	u64 gpa = boot->first_free, next = private_view(gpa + PAGE_SIZE), view = shared_view(gpa);
	volatile u64 sink = 0;
	u64 rax = (u64)&sink;

	*(volatile u8 *)next = 0xc3;
	*(volatile u8 *)view = 0xc3;
	((void (*)(void))view)();
	if (!argument(1, 0))
		return STATUS_OK;
	view = private_view(gpa);
	__asm__ volatile("call *%1" : "+a"(rax) : "r"(view) : "memory", "cc");
	return wrong("first word of the executed page", load64(view), 0);
}

static u64 alternate_pages(bool implicitly)
{
	u64 gpa, count = 0, result;

	for (gpa = boot->first_free; gpa < boot->memory_size; gpa += 2 * PAGE_SIZE, count++) {
		if (implicitly) {
			load64(shared_view(gpa));
			continue;
		}
		result = convert_once(gpa, 1, MAP_SHARED);
		if (result == E_AGAIN)
			break;
		if (result != 0) {
			print("hostile: converting page %x: answer %u", gpa, result);
			leave(STATUS_WRONG);
		}
	}
	return count;
}

/* 13: the most fragments that memory can be in: uses up all memslots if there are enough pages. */
static int alternate_implicitly(void)
{
	print("hostile: made %u pages shared, every other one", alternate_pages(true));
	return STATUS_OK;
}

/* 14: the same by explicit requests, which are answered with EAGAIN when there are no memslots left. */
static int alternate_explicitly(void)
{
	print("hostile: made %u pages shared, every other one", alternate_pages(false));
	return STATUS_OK;
}

/* 15: one access, two pages: the first is live, the second is not. Both parts must arrive, in both directions. */
static int straddle(void)
{
	u64 gpa = boot->first_free, edge = PAGE_SIZE - 4, view;
	const u64 value = 0x8877665544332211ull;
	int status;

	if (!has_two_views()) { /* nothing is converted by the access itself there */
		shared_view(gpa);
		shared_view(gpa + PAGE_SIZE);
		store64(gpa + edge, value);
		return wrong("straddling load", load64(gpa + edge), value);
	}
	view = gpa + boot->shared_offset;
	store64(view, 1); /* the first page is live in the shared view, the second in the private one */
	store64(view + edge, value);
	status = wrong("straddling store", load64(view + edge), value);
	status |= wrong("its first half", *(volatile u32 *)(view + edge), value & 0xffffffff);
	status |= wrong("its second half", *(volatile u32 *)(view + PAGE_SIZE), value >> 32);
	status |= wrong("the word that was there", load64(view), 1);
	store64(gpa, 2); /* and the other way round: the first page live in the private view */
	status |= wrong("straddling load", load64(gpa + edge), 0);
	return status | wrong("the private word that was there", load64(gpa), 2);
}

/* 16, every vCPU: atomic additions in one shared page while it is converted for the first time. None is lost. */
static int count_together(u64 vcpu)
{
	u64 rounds = argument(1, 10000), view;

	if (!has_two_views() && vcpu == 0)
		shared_view(boot->first_free);
	barrier();
	view = boot->first_free + boot->shared_offset;
	for (u64 i = 0; i < rounds; i++)
		__asm__ volatile("lock incq %0" : "+m"(*(volatile u64 *)view)::"memory", "cc");
	return last_to_finish() ? wrong("counter", load64(view), rounds * boot->vcpus) : STATUS_OK;
}

int guest_main(u64 vcpu)
{
	u64 which = argument(0, 0);

	if (boot->memory_size - boot->first_free < 2 * PAGE_SIZE) {
		if (vcpu == 0)
			print("hostile: needs two free pages");
		return STATUS_CANNOT;
	}
	if (which == 5)
		return spin();
	if (which == 16)
		return count_together(vcpu);
	if (vcpu != 0)
		return STATUS_OK;
	switch (which) {
	case 1:
		return execute_ud2();
	case 2:
		return jump_outside_memory();
	case 3:
		return read_unmapped();
	case 4:
		return touch_outside_memory();
	case 6:
		return copy_between_views();
	case 7:
		return reserved_status();
	case 8:
		return touch_pinned();
	case 9:
		return string_input();
	case 10:
		return halt();
	case 11:
		return flood_console();
	case 12:
		return execute_shared();
	case 13:
		return alternate_implicitly();
	case 14:
		return alternate_explicitly();
	case 15:
		return straddle();
	}
	print("hostile: argument 0 is %u: give 1 to 16", which);
	return STATUS_CANNOT;
}
