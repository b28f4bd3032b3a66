/* What init needs of a C library: system calls, text, SHA-256. */
#ifndef TINY_H
#define TINY_H

#include <asm/unistd.h>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef unsigned long usize;

static inline long system_call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

/* Up to six arguments, of any type that fits a register; the result is what the kernel gives, -errno included. */
#define CALL_(number, a, b, c, d, e, f, ...) \
	system_call(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define CALL(name, ...) CALL_(__NR_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

void *memcpy(void *to, const void *from, usize size);
void *memset(void *to, int value, usize size);
int memcmp(const void *one, const void *other, usize size);
usize length_of(const char *text);
int starts_with(const char *text, const char *start);
u64 number_of(const char *text);

/* A line that is put together and then written at once, so that it is not torn by the kernel's. */
struct line {
	char text[512];
	usize size;
};

void say(struct line *line, const char *text);
void say_number(struct line *line, u64 number);
void say_hex(struct line *line, const u8 *bytes, usize size);
void end_line(struct line *line);

struct sha256 {
	u32 state[8];
	u8 block[64];
	u64 size;
};

void sha256_start(struct sha256 *sha);
void sha256_add(struct sha256 *sha, const void *data, usize size);
void sha256_end(struct sha256 *sha, u8 digest[32]);

#endif
