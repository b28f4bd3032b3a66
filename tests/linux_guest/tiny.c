#include "tiny.h"

void *memcpy(void *to, const void *from, usize size)
{
	void *start = to;

	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
	return start;
}

void *memset(void *to, int value, usize size)
{
	void *start = to;

	__asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
	return start;
}

int memcmp(const void *one, const void *other, usize size)
{
	const u8 *a = one, *b = other;

	for (; size && *a == *b; size--, a++, b++)
		;
	return size ? *a - *b : 0;
}

usize length_of(const char *text)
{
	usize length = 0;

	while (text[length])
		length++;
	return length;
}

int starts_with(const char *text, const char *start)
{
	while (*start)
		if (*text++ != *start++)
			return 0;
	return 1;
}

u64 number_of(const char *text)
{
	u64 number = 0;

	while (*text >= '0' && *text <= '9')
		number = number * 10 + (u64)(*text++ - '0');
	return number;
}

void say(struct line *line, const char *text)
{
	while (*text && line->size < sizeof(line->text) - 1)
		line->text[line->size++] = *text++;
}

void say_number(struct line *line, u64 number)
{
	char digits[21];
	usize at = sizeof(digits) - 1;

	digits[at] = 0;
	do
		digits[--at] = (char)('0' + number % 10);
	while (number /= 10);
	say(line, digits + at);
}

void say_hex(struct line *line, const u8 *bytes, usize size)
{
	char pair[3] = { 0, 0, 0 };

	for (; size; size--, bytes++) {
		pair[0] = "0123456789abcdef"[*bytes >> 4];
		pair[1] = "0123456789abcdef"[*bytes & 15];
		say(line, pair);
	}
}

void end_line(struct line *line)
{
	line->text[line->size++] = '\n';
	for (usize at = 0; at < line->size;) {
		long written = CALL(write, 1, line->text + at, line->size - at);

		if (written <= 0)
			break;
		at += (usize)written;
	}
	line->size = 0;
}

/* FIPS 180-4. */
static const u32 constants[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static u32 rotated(u32 value, int by)
{
	return value >> by | value << (32 - by);
}

static void add_block(u32 state[8], const u8 *block)
{
	u32 w[64], s[8];

	for (int i = 0; i < 16; i++)
		w[i] = (u32)block[4 * i] << 24 | (u32)block[4 * i + 1] << 16 | (u32)block[4 * i + 2] << 8 |
		       block[4 * i + 3];
	for (int i = 16; i < 64; i++)
		w[i] = w[i - 16] + w[i - 7] +
		       (rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3) +
		       (rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10);
	memcpy(s, state, sizeof(s));
	for (int i = 0; i < 64; i++) {
		u32 one = s[7] + (rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25)) +
			  ((s[4] & s[5]) ^ (~s[4] & s[6])) + constants[i] + w[i];
		u32 two = (rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22)) +
			  ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));

		s[7] = s[6], s[6] = s[5], s[5] = s[4], s[4] = s[3] + one;
		s[3] = s[2], s[2] = s[1], s[1] = s[0], s[0] = one + two;
	}
	for (int i = 0; i < 8; i++)
		state[i] += s[i];
}

void sha256_start(struct sha256 *sha)
{
	static const u32 start[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
				      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };

	memcpy(sha->state, start, sizeof(start));
	sha->size = 0;
}

void sha256_add(struct sha256 *sha, const void *data, usize size)
{
	const u8 *from = data;
	usize filled = sha->size % 64;

	sha->size += size;
	if (filled) {
		usize more = 64 - filled < size ? 64 - filled : size;

		memcpy(sha->block + filled, from, more);
		from += more, size -= more;
		if (filled + more < 64)
			return;
		add_block(sha->state, sha->block);
	}
	for (; size >= 64; from += 64, size -= 64)
		add_block(sha->state, from);
	memcpy(sha->block, from, size);
}

void sha256_end(struct sha256 *sha, u8 digest[32])
{
	u64 bits = sha->size * 8;
	u8 zero = 0, first = 0x80, length[8];

	sha256_add(sha, &first, 1);
	while (sha->size % 64 != 56)
		sha256_add(sha, &zero, 1);
	for (int i = 0; i < 8; i++)
		length[i] = (u8)(bits >> (56 - 8 * i));
	sha256_add(sha, length, 8);
	for (int i = 0; i < 32; i++)
		digest[i] = (u8)(sha->state[i / 4] >> (24 - 8 * (i % 4)));
}
