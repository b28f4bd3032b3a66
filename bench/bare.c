/* What a large explicit conversion costs at least: the calls that kvmd makes for it, in a C loop, without any vCPU.
 *
 *   bare attributes MIB ROUNDS CHUNK_MIB    on a KVM_X86_SW_PROTECTED_VM: attributes, and hole punches
 *   bare slots MIB ROUNDS CHUNK_MIB         on any VM: two views in memslots, tripwires of closed guest_memfds
 *
 * Prints one JSON line: microseconds for each direction, mean over the rounds. One before them warms up, as kvmd's
 * first large conversion, which is not counted either.
 *
 * Build: cc -O2 -Wall -Wextra -o bare bare.c */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef uint8_t u8;
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
#define GUEST_MEMFD_MMAP_AND_INIT_SHARED 3
#define CAP_DISABLE_QUIRKS2 213
#define QUIRK_SLOT_ZAP_ALL (1u << 7)

#define BLOCK (2ull << 20) /* what emulated protection's memory consists of at first */

enum view { SHARED = 0, PRIVATE = 1 };

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

static double convert_attributes(int vm, int left_behind, u64 size, u64 chunk, u64 attributes)
{
	double start = now_us();

	for (u64 gpa = 0; gpa < size; gpa += chunk) {
		struct memory_attributes change = {.address = gpa, .size = chunk, .attributes = attributes};

		need(!ioctl(vm, SET_MEMORY_ATTRIBUTES, &change), "KVM_SET_MEMORY_ATTRIBUTES");
		punch(left_behind, gpa, chunk);
	}
	return now_us() - start;
}

/* Two views of memory, one above the C-bit: of each block one is live, and a tripwire stands in the other. */
struct views {
	int vm, fd[2];
	u8 *side[2], *nothing;
	u64 c_bit;
};

static u64 c_bit_of(int kvm)
{
	enum { ENTRIES = 256 };
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + ENTRIES * sizeof(cpuid->entries[0]));
	u64 bit = 1ull << 35;

	need(cpuid != NULL, "memory");
	cpuid->nent = ENTRIES;
	need(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	for (u32 i = 0; i < cpuid->nent; i++)
		if (cpuid->entries[i].function == 0x80000008)
			bit = 1ull << ((cpuid->entries[i].eax & 0xff) - 1);
	free(cpuid);
	return bit;
}

static void set_region(const struct views *views, struct memory_region2 region)
{
	need(!ioctl(views->vm, SET_USER_MEMORY_REGION2, &region), "KVM_SET_USER_MEMORY_REGION2");
}

/* Each block has a memslot for each view: its number never changes. */
static struct memory_region2 region_of(const struct views *views, u64 gpa, enum view view)
{
	return (struct memory_region2){
		.slot = gpa / BLOCK * 2 + view,
		.guest_phys_addr = view == PRIVATE ? gpa | views->c_bit : gpa,
	};
}

static void delete_slot(const struct views *views, u64 gpa, enum view view)
{
	set_region(views, region_of(views, gpa, view));
}

static void create_live(const struct views *views, u64 gpa, enum view view)
{
	struct memory_region2 region = region_of(views, gpa, view);

	region.memory_size = BLOCK;
	region.userspace_addr = (u64)(views->side[view] + gpa);
	set_region(views, region);
}

static void create_tripwire(const struct views *views, u64 gpa, enum view view)
{
	struct create_guest_memfd create = {.size = BLOCK, .flags = GUEST_MEMFD_MMAP_AND_INIT_SHARED};
	struct memory_region2 region = region_of(views, gpa, view);
	int memfd = ioctl(views->vm, CREATE_GUEST_MEMFD, &create);

	need(memfd >= 0, "KVM_CREATE_GUEST_MEMFD");
	region.flags = MEM_GUEST_MEMFD;
	region.memory_size = BLOCK;
	region.userspace_addr = (u64)views->nothing;
	region.guest_memfd = memfd;
	set_region(views, region);
	close(memfd);
}

static double convert_slots(const struct views *views, u64 size, u64 chunk, enum view to)
{
	enum view from = to == SHARED ? PRIVATE : SHARED;
	double start = now_us();

	for (u64 gpa = 0; gpa < size; gpa += chunk) {
		for (u64 block = gpa; block < gpa + chunk; block += BLOCK) {
			delete_slot(views, block, from);
			create_tripwire(views, block, from);
			delete_slot(views, block, to);
			create_live(views, block, to);
		}
		punch(views->fd[from], gpa, chunk);
	}
	return now_us() - start;
}

static u8 *map(u64 size, int protection, int fd)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *address = mmap(NULL, size, protection, flags | MAP_NORESERVE, fd, 0);

	need(address != MAP_FAILED, "mmap");
	return address;
}

static int backing(u64 size)
{
	int fd = memfd_create("bare", MFD_CLOEXEC);

	need(fd >= 0 && !ftruncate(fd, size), "memfd_create");
	return fd;
}

static void run_slots(int kvm, u64 size, int rounds, u64 chunk, double microseconds[2])
{
	struct kvm_enable_cap cap = {.cap = CAP_DISABLE_QUIRKS2, .args = {QUIRK_SLOT_ZAP_ALL}};
	struct views views = {.vm = ioctl(kvm, KVM_CREATE_VM, 0), .c_bit = c_bit_of(kvm)};

	need(views.vm >= 0, "KVM_CREATE_VM");
	ioctl(views.vm, KVM_ENABLE_CAP, &cap); /* where it can be */
	for (int view = SHARED; view <= PRIVATE; view++) {
		views.fd[view] = backing(size);
		views.side[view] = map(size, PROT_READ | PROT_WRITE, views.fd[view]);
	}
	views.nothing = map(BLOCK, PROT_NONE, -1);
	for (u64 gpa = 0; gpa < size; gpa += BLOCK) {
		create_live(&views, gpa, PRIVATE);
		create_tripwire(&views, gpa, SHARED);
	}
	for (int round = 0; round <= rounds; round++) {
		if (round == 1)
			microseconds[SHARED] = microseconds[PRIVATE] = 0;
		microseconds[SHARED] += convert_slots(&views, size, chunk, SHARED);
		microseconds[PRIVATE] += convert_slots(&views, size, chunk, PRIVATE);
	}
}

static void run_attributes(int kvm, u64 size, int rounds, u64 chunk, double microseconds[2])
{
	struct create_guest_memfd create = {.size = size};
	int vm = ioctl(kvm, KVM_CREATE_VM, SW_PROTECTED_VM), memfd, shared;

	need(vm >= 0, "KVM_CREATE_VM of KVM_X86_SW_PROTECTED_VM");
	memfd = ioctl(vm, CREATE_GUEST_MEMFD, &create);
	need(memfd >= 0, "KVM_CREATE_GUEST_MEMFD");
	shared = backing(size);
	struct memory_region2 region = {
		.flags = MEM_GUEST_MEMFD,
		.memory_size = size,
		.userspace_addr = (u64)map(size, PROT_READ | PROT_WRITE, shared),
		.guest_memfd = memfd,
	};
	need(!ioctl(vm, SET_USER_MEMORY_REGION2, &region), "KVM_SET_USER_MEMORY_REGION2");

	convert_attributes(vm, shared, size, chunk, ATTRIBUTE_PRIVATE);
	for (int round = 0; round <= rounds; round++) {
		if (round == 1)
			microseconds[SHARED] = microseconds[PRIVATE] = 0;
		microseconds[SHARED] += convert_attributes(vm, memfd, size, chunk, 0);
		microseconds[PRIVATE] += convert_attributes(vm, shared, size, chunk, ATTRIBUTE_PRIVATE);
	}
}

int main(int argc, char **argv)
{
	u64 size = argc == 5 ? strtoull(argv[2], NULL, 0) << 20 : 0, chunk = argc == 5 ? strtoull(argv[4], NULL, 0) << 20 : 0;
	bool slots = argc == 5 && !strcmp(argv[1], "slots");
	int rounds = argc == 5 ? atoi(argv[3]) : 0, kvm;
	double microseconds[2] = {0, 0};

	if (!chunk || !size || size % chunk || rounds < 1 || chunk % BLOCK || (!slots && strcmp(argv[1], "attributes"))) {
		fprintf(stderr, "usage: bare attributes|slots MIB ROUNDS CHUNK_MIB, MIB a multiple of CHUNK_MIB, which is even\n");
		return 2;
	}
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need(kvm >= 0, "/dev/kvm");
	(slots ? run_slots : run_attributes)(kvm, size, rounds, chunk, microseconds);
	printf("{\"us_to_shared\": %.1f, \"us_to_private\": %.1f}\n", microseconds[SHARED] / rounds,
	       microseconds[PRIVATE] / rounds);
	return 0;
}
