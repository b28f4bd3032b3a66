#include "lib.h"

#include <stdarg.h>

const struct boot_information *boot = NULL;

u64 argument(unsigned index, u64 otherwise)
{
	if (!(boot->flags & 1) || boot->arguments[index] == 0)
		return otherwise;
	return boot->arguments[index];
}

void lock(struct spinlock *spinlock)
{
	while (__atomic_exchange_n(&spinlock->taken, 1, __ATOMIC_ACQUIRE))
		while (spinlock->taken)
			relax();
}

void unlock(struct spinlock *spinlock)
{
	__atomic_store_n(&spinlock->taken, 0, __ATOMIC_RELEASE);
}

void barrier(void)
{
	static volatile u32 arrived, generation;
	u32 mine = generation;

	/* The generation is read before arriving: the last one to arrive moves it only after that. */
	if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == boot->vcpus) {
		arrived = 0;
		__atomic_store_n(&generation, mine + 1, __ATOMIC_RELEASE);
		return;
	}
	while (__atomic_load_n(&generation, __ATOMIC_ACQUIRE) == mine)
		relax();
}

bool last_to_finish(void)
{
	static u32 finished;

	return __atomic_add_fetch(&finished, 1, __ATOMIC_ACQ_REL) == boot->vcpus;
}

struct line {
	char text[256];
	unsigned length;
};

static void put(struct line *line, char character)
{
	if (line->length < sizeof(line->text) - 1) /* one is kept for the line feed */
		line->text[line->length++] = character;
}

static void put_number(struct line *line, u64 value, unsigned base)
{
	char digits[20];
	unsigned count = 0;

	do {
		digits[count++] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	while (count)
		put(line, digits[--count]);
}

void print(const char *format, ...)
{
	static struct spinlock console;
	struct line line;
	va_list values;

	line.length = 0;
	va_start(values, format);
	for (; *format; format++) {
		if (*format != '%') {
			put(&line, *format);
			continue;
		}
		switch (*++format) {
		case 's':
			for (const char *text = va_arg(values, const char *); *text; text++)
				put(&line, *text);
			break;
		case 'x':
			put(&line, '0');
			put(&line, 'x');
			put_number(&line, va_arg(values, u64), 16);
			break;
		default:
			put_number(&line, va_arg(values, u64), 10);
			break;
		}
	}
	va_end(values);
	line.text[line.length++] = '\n';

	lock(&console);
	for (unsigned i = 0; i < line.length; i++) {
		while (!(inb(PORT_CONSOLE_LSR) & LSR_TRANSMITTER_EMPTY))
			relax();
		outb(PORT_CONSOLE, line.text[i]);
	}
	unlock(&console);
}

_Noreturn void leave(u8 status)
{
	outb(PORT_EXIT, status);
	__builtin_trap();
}

u64 convert_once(u64 gpa, u64 pages, u64 attributes)
{
	u64 result = HC_MAP_GPA_RANGE;

	__asm__ volatile("outb %%al, %[port]"
			 : "+a"(result)
			 : [port] "i"(PORT_HYPERCALL), "b"(gpa), "c"(pages), "d"(attributes)
			 : "memory");
	return result;
}

u64 convert(u64 gpa, u64 pages, u64 attributes)
{
	u64 result;

	for (int attempt = 0; attempt < 1000; attempt++) {
		result = convert_once(gpa, pages, attributes);
		if (result != E_AGAIN)
			break;
		relax();
	}
	return result;
}

static void convert_page(u64 gpa, u64 attributes)
{
	u64 result = convert(gpa & ~(PAGE_SIZE - 1), 1, attributes);

	if (result == 0)
		return;
	print("converting page %x to %s failed with %u", gpa, attributes ? "private" : "shared", result);
	leave(STATUS_WRONG);
}

u64 private_view(u64 gpa)
{
	if (!has_two_views())
		convert_page(gpa, MAP_PRIVATE);
	return gpa;
}

u64 shared_view(u64 gpa)
{
	if (!has_two_views())
		convert_page(gpa, MAP_SHARED);
	return gpa + boot->shared_offset;
}
