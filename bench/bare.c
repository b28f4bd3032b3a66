/* What a large explicit conversion costs at least: the ioctls and hole punches that kvmd makes for it, in a C loop, on a
 * KVM_X86_SW_PROTECTED_VM without any vCPU.
 *
 *   bare MIB ROUNDS [CHUNK_MIB]     prints one JSON line: microseconds for each direction, mean over the rounds
 *
 * Build: cc -O2 -Wall -Wextra -o bare bare.c */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef uint32_t u32;
typedef uint64_t u64;

/* Newer than many systems' headers: the layout of Linux 6.8's include/uapi/linux/kvm.h. */
struct memory_region2 {
	u32 slot, flags;
	u64 guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	u32 guest_memfd, pad1;
	u64 pad2[14];
};

struct create_guest_memfd {
	u64 size, flags, reserved[6];
};

struct memory_attributes {
	u64 address, size, attributes, flags;
};

#define SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct memory_region2)
#define SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct memory_attributes)
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct create_guest_memfd)
#define MEM_GUEST_MEMFD (1u << 2)
#define ATTRIBUTE_PRIVATE (1ull << 3)
#define SW_PROTECTED_VM 1

static void need(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now_us(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void punch(int fd, u64 offset, u64 size)
{
	need(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size), "punching a hole");
}

static double convert(int vm, int left_behind, u64 size, u64 chunk, u64 attributes)
{
	double start = now_us();

	for (u64 gpa = 0; gpa < size; gpa += chunk) {
		struct memory_attributes change = {.address = gpa, .size = chunk, .attributes = attributes};

		need(!ioctl(vm, SET_MEMORY_ATTRIBUTES, &change), "KVM_SET_MEMORY_ATTRIBUTES");
		punch(left_behind, gpa, chunk);
	}
	return now_us() - start;
}

int main(int argc, char **argv)
{
	u64 size = (argc > 1 ? strtoull(argv[1], NULL, 0) : 1024) << 20;
	int rounds = argc > 2 ? atoi(argv[2]) : 1;
	u64 chunk = (argc > 3 ? strtoull(argv[3], NULL, 0) : 2) << 20;
	struct create_guest_memfd create = {.size = size};
	double to_shared = 0, to_private = 0;
	int kvm, vm, memfd, shared;
	void *address;

	if (size == 0 || chunk == 0 || size % chunk || rounds < 1) {
		fprintf(stderr, "usage: bare MIB ROUNDS [CHUNK_MIB], the first a multiple of the last\n");
		return 2;
	}
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need(kvm >= 0, "/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, SW_PROTECTED_VM);
	need(vm >= 0, "KVM_CREATE_VM of KVM_X86_SW_PROTECTED_VM");
	memfd = ioctl(vm, CREATE_GUEST_MEMFD, &create);
	need(memfd >= 0, "KVM_CREATE_GUEST_MEMFD");
	shared = memfd_create("bare", MFD_CLOEXEC);
	need(shared >= 0 && !ftruncate(shared, size), "memfd_create");
	address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, shared, 0);
	need(address != MAP_FAILED, "mmap");
	struct memory_region2 region = {
		.flags = MEM_GUEST_MEMFD,
		.memory_size = size,
		.userspace_addr = (u64)address,
		.guest_memfd = memfd,
	};
	need(!ioctl(vm, SET_USER_MEMORY_REGION2, &region), "KVM_SET_USER_MEMORY_REGION2");

	convert(vm, shared, size, chunk, ATTRIBUTE_PRIVATE);
	for (int round = 0; round < rounds; round++) {
		to_shared += convert(vm, memfd, size, chunk, 0);
		to_private += convert(vm, shared, size, chunk, ATTRIBUTE_PRIVATE);
	}
	printf("{\"us_to_shared\": %.1f, \"us_to_private\": %.1f}\n", to_shared / rounds, to_private / rounds);
	return 0;
}
