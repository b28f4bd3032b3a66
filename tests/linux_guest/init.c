/*
 * The first and only process of a Linux guest that is being tested: tries each device, says what it found on the
 * console, and ends. What it does is on the kernel's command line:
 *
 *   kvmd.test.disk=TYPE        mount /dev/vda as that file system; say the SHA-256 of the file from-host; write the
 *                              file from-guest, mount again, and read it back
 *   kvmd.test.read=BYTES       read that much of /dev/vda from its start, past the page cache, and say how long it took
 *   kvmd.test.net=A.B.C.D/N    the address of the first network card
 *   kvmd.test.gateway=A.B.C.D  ping it
 *   kvmd.test.tcp=PORT         send a file there, and take one from there (peer.py)
 *   kvmd.test.entropy=1        read from /dev/hwrng
 *   kvmd.test.console=1        say back what is typed in
 *   kvmd.test.bytes=BYTES      how large files are (1048576)
 *   kvmd.test.checksums=0      make none, for speed, where files travel by TCP
 *   kvmd.test.end=WAY          poweroff (the default), reboot, halt, or panic
 *
 * Each line starts with "kvmd-test: " and a word; "failed" is one of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>

#include "tiny.h"

#define MICROSECONDS 1000L
#define SECONDS 1000000000UL
#define PATIENCE (20 * SECONDS)
#define PIECE 65536

static char command_line[4096];
static struct line line;
static u64 failures;
static u8 piece[PIECE] __attribute__((aligned(4096)));

static const char *option(const char *key)
{
	static char value[128];
	usize size = length_of(key);

	for (const char *at = command_line; *at; at++) {
		if ((at != command_line && at[-1] != ' ') || !starts_with(at, key) || at[size] != '=')
			continue;
		at += size + 1;
		usize used = 0;
		while (*at && *at != ' ' && *at != '\n' && used < sizeof(value) - 1)
			value[used++] = *at++;
		value[used] = 0;
		return value;
	}
	return 0;
}

static u64 number_option(const char *key, u64 otherwise)
{
	const char *value = option(key);

	return value ? number_of(value) : otherwise;
}

static u64 now(void)
{
	struct timespec time;

	CALL(clock_gettime, CLOCK_BOOTTIME, &time);
	return (u64)time.tv_sec * SECONDS + (u64)time.tv_nsec;
}

static void rest(void)
{
	struct timespec time = { 0, 500 * MICROSECONDS };

	CALL(nanosleep, &time, 0);
}

static void begin(const char *word)
{
	say(&line, "kvmd-test: ");
	say(&line, word);
	say(&line, " ");
}

/* Whether it went well; where not, what did not is told, with the kernel's number for it. */
static int went(long result, const char *what)
{
	if (result >= 0)
		return 1;
	failures++;
	begin("failed");
	say(&line, what);
	say(&line, ": errno ");
	say_number(&line, (u64)-result);
	end_line(&line);
	return 0;
}

static int holds(int condition, const char *what)
{
	return went(condition ? 0 : -1, what);
}

static long read_text(const char *path, char *text, usize size)
{
	long fd = CALL(open, path, O_RDONLY), got;

	if (fd < 0)
		return fd;
	got = CALL(read, fd, text, size - 1);
	CALL(close, fd);
	if (got < 0)
		return got;
	while (got && text[got - 1] == '\n')
		got--;
	text[got] = 0;
	return got;
}

static void load_modules(void)
{
	static char list[4096];

	if (read_text("/modules", list, sizeof(list)) < 0)
		return;
	for (char *at = list; *at;) {
		char *path = at;
		long fd, loaded;

		while (*at && *at != '\n')
			at++;
		if (*at)
			*at++ = 0;
		fd = CALL(open, path, O_RDONLY);
		if (!went(fd, path))
			continue;
		loaded = CALL(finit_module, fd, "", 0);
		if (loaded != -EEXIST)
			went(loaded, path);
		CALL(close, fd);
	}
}

static void count_processors(void)
{
	char text[64];
	u64 wanted[16], there[16] = { 0 }, ran = 0;
	u32 on;

	if (!went(read_text("/sys/devices/system/cpu/online", text, sizeof(text)), "processors online"))
		return;
	if (went(CALL(sched_getaffinity, 0, sizeof(there), there), "processors to run on"))
		for (u32 cpu = 0; cpu < 64 * 16; cpu++) {
			if (!(there[cpu / 64] >> cpu % 64 & 1))
				continue;
			memset(wanted, 0, sizeof(wanted));
			wanted[cpu / 64] = 1UL << cpu % 64;
			if (!CALL(sched_setaffinity, 0, sizeof(wanted), wanted) && !CALL(getcpu, &on, 0, 0) && on == cpu)
				ran++;
		}
	CALL(sched_setaffinity, 0, sizeof(there), there);
	begin("processors");
	say(&line, text);
	say(&line, " ran-on ");
	say_number(&line, ran);
	end_line(&line);
}

/* What files are made of: pieces that differ, in a way that the host can do again (pattern.py). */
static void fill_piece(void)
{
	u64 state = 88172645463325252UL;

	for (usize at = 0; at < PIECE; at += 8) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		memcpy(piece + at, &state, 8);
	}
}

static u64 number_piece(u64 done, u64 whole)
{
	u64 number = done / PIECE;

	memcpy(piece, &number, 8);
	return whole - done < PIECE ? whole - done : PIECE;
}

static long write_all(long fd, const void *data, usize size)
{
	for (usize done = 0; done < size;) {
		long written = CALL(write, fd, (const u8 *)data + done, size - done);

		if (written < 0)
			return written;
		done += (usize)written;
	}
	return 0;
}

static long read_digest(const char *path, u8 digest[32])
{
	static u8 buffer[PIECE];
	struct sha256 sha;
	long fd = CALL(open, path, O_RDONLY), got, size = 0;

	if (fd < 0)
		return fd;
	sha256_start(&sha);
	while ((got = CALL(read, fd, buffer, sizeof(buffer))) > 0) {
		sha256_add(&sha, buffer, (usize)got);
		size += got;
	}
	CALL(close, fd);
	sha256_end(&sha, digest);
	return got < 0 ? got : size;
}

static void tell_digest(const char *word, const u8 digest[32], u64 size)
{
	begin(word);
	say_hex(&line, digest, 32);
	say(&line, " bytes ");
	say_number(&line, size);
	end_line(&line);
}

static long open_disk(long flags)
{
	u64 start = now();
	long fd;

	while ((fd = CALL(open, "/dev/vda", flags)) < 0 && now() - start < PATIENCE)
		rest();
	return fd;
}

static void try_disk(const char *type, u64 size)
{
	char kind[32] = { 0 };
	u8 written[32], found[32];
	struct sha256 sha;
	long fd = open_disk(O_RDONLY), had;

	memcpy(kind, type, length_of(type) < sizeof(kind) ? length_of(type) : sizeof(kind) - 1);
	if (!went(fd, "/dev/vda"))
		return;
	CALL(close, fd);
	if (!went(CALL(mount, "/dev/vda", "/disk", kind, MS_NOATIME, 0), "mount the disk"))
		return;
	had = read_digest("/disk/from-host", found);
	if (went(had, "read from-host"))
		tell_digest("disk-from-host", found, (u64)had);
	fd = CALL(open, "/disk/from-guest", O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (!went(fd, "create from-guest"))
		return;
	sha256_start(&sha);
	for (u64 done = 0; done < size; done += PIECE) {
		u64 now_ = number_piece(done, size);

		sha256_add(&sha, piece, now_);
		if (!went(write_all(fd, piece, now_), "write from-guest"))
			return;
	}
	sha256_end(&sha, written);
	went(CALL(fsync, fd), "flush from-guest");
	CALL(close, fd);
	/* Unmounting forgets what the page cache holds: what is read now comes from the disk. */
	if (!went(CALL(umount2, "/disk", 0), "unmount the disk") ||
	    !went(CALL(mount, "/dev/vda", "/disk", kind, MS_NOATIME, 0), "mount the disk again"))
		return;
	had = read_digest("/disk/from-guest", found);
	if (went(had, "read from-guest") &&
	    holds((u64)had == size && !memcmp(written, found, 32), "from-guest reads as it was written"))
		tell_digest("disk-from-guest", found, size);
	went(CALL(umount2, "/disk", 0), "unmount the disk at the end");
}

static void tell_time(const char *word, u64 size, u64 start)
{
	u64 took = now() - start;

	begin(word);
	say(&line, "bytes ");
	say_number(&line, size);
	say(&line, " ns ");
	say_number(&line, took);
	end_line(&line);
}

/* How many frames the card sent and took so far; a frame of segmentation offload counts as one. */
struct frames {
	u64 sent, taken;
};

static struct frames frames_now(void)
{
	struct frames frames = { 0, 0 };
	char text[32];

	if (read_text("/sys/class/net/eth0/statistics/tx_packets", text, sizeof(text)) > 0)
		frames.sent = number_of(text);
	if (read_text("/sys/class/net/eth0/statistics/rx_packets", text, sizeof(text)) > 0)
		frames.taken = number_of(text);
	return frames;
}

static void tell_frames(const char *word, struct frames before)
{
	struct frames after = frames_now();

	begin(word);
	say(&line, "sent ");
	say_number(&line, after.sent - before.sent);
	say(&line, " taken ");
	say_number(&line, after.taken - before.taken);
	end_line(&line);
}

static void time_reading(u64 size)
{
	static u8 buffer[1 << 20] __attribute__((aligned(4096)));
	long fd = open_disk(O_RDONLY | O_DIRECT);
	u64 start = now(), done = 0;

	if (!went(fd, "open /dev/vda past the page cache"))
		return;
	while (done < size) {
		long got = CALL(read, fd, buffer, size - done < sizeof(buffer) ? size - done : sizeof(buffer));

		if (!went(got, "read /dev/vda") || !got)
			break;
		done += (u64)got;
	}
	tell_time("read", done, start);
	CALL(close, fd);
}

static u32 address_of(const char *text, u32 *bits)
{
	u32 address = 0;

	for (int octet = 0; octet < 4; octet++) {
		address |= (u32)number_of(text) << 8 * octet;
		while (*text >= '0' && *text <= '9')
			text++;
		text += *text == '.';
	}
	*bits = *text == '/' ? (u32)number_of(text + 1) : 32;
	return address;
}

static int set_up_card(const char *text)
{
	struct ifreq request;
	struct sockaddr_in address = { .sin_family = AF_INET };
	u64 start = now();
	u32 bits;
	long fd = CALL(socket, AF_INET, SOCK_STREAM, 0), found;

	if (!went(fd, "socket"))
		return 0;
	memset(&request, 0, sizeof(request));
	memcpy(request.ifr_name, "eth0", 5);
	while ((found = CALL(ioctl, fd, SIOCGIFINDEX, &request)) == -ENODEV && now() - start < PATIENCE)
		rest();
	if (!went(found, "eth0"))
		return 0;
	address.sin_addr.s_addr = address_of(text, &bits);
	memcpy(&request.ifr_addr, &address, sizeof(address));
	if (!went(CALL(ioctl, fd, SIOCSIFADDR, &request), "address of eth0"))
		return 0;
	address.sin_addr.s_addr = bits ? __builtin_bswap32(~0u << (32 - bits)) : 0;
	memcpy(&request.ifr_addr, &address, sizeof(address));
	if (!went(CALL(ioctl, fd, SIOCSIFNETMASK, &request), "netmask of eth0"))
		return 0;
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (!went(CALL(ioctl, fd, SIOCSIFFLAGS, &request), "eth0 up") ||
	    !went(CALL(ioctl, fd, SIOCGIFMTU, &request), "mtu of eth0"))
		return 0;
	begin("net");
	say(&line, "mtu ");
	say_number(&line, (u64)request.ifr_mtu);
	went(CALL(ioctl, fd, SIOCGIFHWADDR, &request), "mac of eth0");
	say(&line, " mac ");
	say_hex(&line, (const u8 *)request.ifr_hwaddr.sa_data, 6);
	end_line(&line);
	CALL(close, fd);
	return 1;
}

static unsigned short sum_of(const void *data, usize size)
{
	const u8 *bytes = data;
	u32 sum = 0;

	for (usize at = 0; at + 1 < size; at += 2)
		sum += (u32)(bytes[at] | bytes[at + 1] << 8);
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (unsigned short)~sum;
}

static void ping(u32 host)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = host };
	struct timeval patience = { 5, 0 };
	struct {
		struct icmphdr header;
		u8 data[56];
	} packet;
	static u8 answer[1500];
	long fd = CALL(socket, AF_INET, SOCK_RAW, IPPROTO_ICMP);
	u64 answered = 0;

	if (!went(fd, "raw socket"))
		return;
	CALL(setsockopt, fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	for (unsigned short number = 1; number <= 3; number++) {
		long got;

		memset(&packet, number, sizeof(packet));
		packet.header = (struct icmphdr){ .type = ICMP_ECHO };
		packet.header.un.echo.id = 0x6b76;
		packet.header.un.echo.sequence = number;
		packet.header.checksum = sum_of(&packet, sizeof(packet));
		if (!went(CALL(sendto, fd, &packet, sizeof(packet), 0, &to, sizeof(to)), "ping"))
			break;
		while ((got = CALL(recvfrom, fd, answer, sizeof(answer), 0, 0, 0)) > 0) {
			const struct icmphdr *header = (const void *)(answer + (answer[0] & 15) * 4);

			if (header->type == ICMP_ECHOREPLY && header->un.echo.sequence == number &&
			    !memcmp(header + 1, packet.data, sizeof(packet.data))) {
				answered++;
				break;
			}
		}
		if (!went(got, "answer to a ping"))
			break;
	}
	begin("ping");
	say_number(&line, answered);
	say(&line, " of 3");
	end_line(&line);
	CALL(close, fd);
}

static long connect_to(u32 host, u64 port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = host };
	long fd = CALL(socket, AF_INET, SOCK_STREAM, 0), connected;

	if (fd < 0)
		return fd;
	to.sin_port = __builtin_bswap16((unsigned short)port);
	connected = CALL(connect, fd, &to, sizeof(to));
	if (connected < 0)
		CALL(close, fd);
	return connected < 0 ? connected : fd;
}

static long read_whole(long fd, u8 *data, usize size)
{
	usize done = 0;

	while (done < size) {
		long got = CALL(read, fd, data + done, size - done);

		if (got <= 0)
			return got < 0 ? got : -5;
		done += (usize)got;
	}
	return (long)done;
}

/* "u" and the file; the other side says the SHA-256 of what came. */
static void send_file(u32 host, u64 port, u64 size, int with_checksum)
{
	struct sha256 sha;
	u8 own[32] = { 0 }, theirs[32];
	long fd = connect_to(host, port);
	struct frames before;
	u64 start;

	if (!went(fd, "connect to send"))
		return;
	sha256_start(&sha);
	before = frames_now();
	start = now();
	if (!went(write_all(fd, "u", 1), "say that a file comes"))
		return;
	for (u64 done = 0; done < size; done += PIECE) {
		u64 now_ = number_piece(done, size);

		if (with_checksum)
			sha256_add(&sha, piece, now_);
		if (!went(write_all(fd, piece, now_), "send"))
			return;
	}
	CALL(shutdown, fd, SHUT_WR);
	if (with_checksum)
		sha256_end(&sha, own);
	if (!went(read_whole(fd, theirs, sizeof(theirs)), "hear what was sent"))
		return;
	tell_time("tcp-send", size, start);
	tell_frames("tcp-send-frames", before);
	if (with_checksum && holds(!memcmp(own, theirs, 32), "what was sent is what came"))
		tell_digest("tcp-sent", own, size);
	CALL(close, fd);
}

/* "d"; the other side sends its file, then the SHA-256 of it, and closes. */
static void take_file(u32 host, u64 port, int with_checksum)
{
	static u8 buffer[PIECE + 32];
	struct sha256 sha;
	u8 own[32], theirs[32];
	long fd = connect_to(host, port), got;
	struct frames before;
	u64 start, size = 0;
	usize kept = 0;

	if (!went(fd, "connect to take"))
		return;
	sha256_start(&sha);
	before = frames_now();
	start = now();
	if (!went(write_all(fd, "d", 1), "ask for a file"))
		return;
	/* The last 32 bytes are no part of the file: that many are always kept back. */
	while ((got = CALL(read, fd, buffer + kept, PIECE)) > 0) {
		usize have = kept + (usize)got, use = have > 32 ? have - 32 : 0;

		if (with_checksum)
			sha256_add(&sha, buffer, use);
		size += use;
		kept = have - use;
		for (usize at = 0; at < kept; at++)
			buffer[at] = buffer[use + at];
	}
	if (!went(got, "take") || !holds(kept == 32, "a whole file came"))
		return;
	tell_time("tcp-take", size, start);
	tell_frames("tcp-take-frames", before);
	memcpy(theirs, buffer, 32);
	sha256_end(&sha, own);
	if (with_checksum && holds(!memcmp(own, theirs, 32), "what came is what was sent"))
		tell_digest("tcp-taken", own, size);
	CALL(close, fd);
}

static void try_network(u64 size)
{
	const char *given;
	int with_checksum = number_option("kvmd.test.checksums", 1) != 0;
	u64 port = number_option("kvmd.test.tcp", 0);
	u32 gateway, bits;

	/* What option() returns is gone at its next call. */
	given = option("kvmd.test.net");
	if (!given || !set_up_card(given))
		return;
	given = option("kvmd.test.gateway");
	if (!given)
		return;
	gateway = address_of(given, &bits);
	ping(gateway);
	if (port) {
		send_file(gateway, port, size, with_checksum);
		take_file(gateway, port, with_checksum);
	}
}

static void try_entropy(void)
{
	char name[64];
	u8 bytes[16];
	long fd;

	if (!went(read_text("/sys/class/misc/hw_random/rng_current", name, sizeof(name)), "name of the entropy device"))
		return;
	fd = CALL(open, "/dev/hwrng", O_RDONLY);
	if (!went(fd, "/dev/hwrng") || !went(read_whole(fd, bytes, sizeof(bytes)), "read /dev/hwrng"))
		return;
	begin("entropy");
	say(&line, name);
	say(&line, " ");
	say_hex(&line, bytes, sizeof(bytes));
	end_line(&line);
	CALL(close, fd);
}

static void try_console(void)
{
	char typed[128];
	long got;

	begin("console");
	say(&line, "listens");
	end_line(&line);
	got = CALL(read, 0, typed, sizeof(typed) - 1);
	if (!went(got, "read the console"))
		return;
	while (got && (typed[got - 1] == '\n' || typed[got - 1] == '\r'))
		got--;
	typed[got] = 0;
	begin("console-heard");
	say(&line, typed);
	end_line(&line);
}

static void end(void)
{
	const char *way = option("kvmd.test.end");
	u32 command = LINUX_REBOOT_CMD_POWER_OFF;

	begin("done");
	say_number(&line, failures);
	say(&line, " failures");
	end_line(&line);
	CALL(ioctl, 1, TCSBRK /* wait until the console has sent all */, 1);
	CALL(sync);
	if (way && starts_with(way, "panic"))
		CALL(exit_group, 1); /* the kernel panics when its first process ends */
	if (way && starts_with(way, "reboot"))
		command = LINUX_REBOOT_CMD_RESTART;
	if (way && starts_with(way, "halt"))
		command = LINUX_REBOOT_CMD_HALT;
	CALL(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, command, 0);
}

__attribute__((used, noreturn)) static void run(void)
{
	u64 size;
	char version[256];
	const char *type;

	begin("init");
	say(&line, "ns ");
	say_number(&line, now());
	end_line(&line);
	went(CALL(mount, "proc", "/proc", "proc", 0, 0), "mount /proc");
	went(CALL(mount, "sys", "/sys", "sysfs", 0, 0), "mount /sys");
	went(CALL(mount, "dev", "/dev", "devtmpfs", 0, 0), "mount /dev");
	went(read_text("/proc/cmdline", command_line, sizeof(command_line)), "/proc/cmdline");
	if (went(read_text("/proc/sys/kernel/osrelease", version, sizeof(version)), "the kernel's version")) {
		begin("linux");
		say(&line, version);
		end_line(&line);
	}
	size = number_option("kvmd.test.bytes", 1 << 20);
	fill_piece();
	load_modules();
	count_processors();
	type = option("kvmd.test.disk");
	if (type)
		try_disk(type, size);
	if (number_option("kvmd.test.read", 0))
		time_reading(number_option("kvmd.test.read", 0));
	try_network(size);
	if (number_option("kvmd.test.entropy", 0))
		try_entropy();
	if (number_option("kvmd.test.console", 0))
		try_console();
	end();
	for (;;)
		rest();
}

__asm__(".globl _start\n_start: xor %ebp, %ebp\n and $-16, %rsp\n call run\n ud2\n");
