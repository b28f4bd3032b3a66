/* File descriptors, capabilities and memslots. Structures newer than the system's headers are written out here;
 * their layout is that of Linux 6.18's include/uapi/linux/kvm.h. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

struct memory_region2 {
	u32 slot, flags;
	u64 guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	u32 guest_memfd, pad1;
	u64 pad2[14];
};

struct create_guest_memfd {
	u64 size, flags, reserved[6];
};

#define SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct memory_region2)
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct create_guest_memfd)
#define MEM_GUEST_MEMFD (1u << 2)
#define GUEST_MEMFD_MMAP_AND_INIT_SHARED 3
#define CAP_DISABLE_QUIRKS2 213
#define QUIRK_SLOT_ZAP_ALL (1u << 7)

#define MAX_CPUID_ENTRIES 256

static struct kvm_cpuid2 *supported_cpuid(struct machine *machine)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + MAX_CPUID_ENTRIES * sizeof(cpuid->entries[0]));

	if (!cpuid)
		die("out of memory");
	cpuid->nent = MAX_CPUID_ENTRIES;
	if (ioctl(machine->kvm, KVM_GET_SUPPORTED_CPUID, cpuid))
		die("KVM_GET_SUPPORTED_CPUID: %s", strerror(errno));
	return cpuid;
}

void open_machine(struct machine *machine)
{
	struct kvm_cpuid2 *cpuid;
	int quirks, slots;

	machine->reserve = -1;
	machine->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (machine->kvm < 0)
		die("/dev/kvm: %s", strerror(errno));
	machine->vm = ioctl(machine->kvm, KVM_CREATE_VM, 0);
	if (machine->vm < 0)
		die("KVM_CREATE_VM: %s", strerror(errno));

	/* Without this quirk deleting a slot zaps only its own mappings, not those of the whole machine. */
	quirks = ioctl(machine->vm, KVM_CHECK_EXTENSION, CAP_DISABLE_QUIRKS2);
	if (quirks > 0 && quirks & QUIRK_SLOT_ZAP_ALL) {
		struct kvm_enable_cap cap = {.cap = CAP_DISABLE_QUIRKS2, .args = {QUIRK_SLOT_ZAP_ALL}};

		machine->quirk_disabled = ioctl(machine->vm, KVM_ENABLE_CAP, &cap) == 0;
	}

	cpuid = supported_cpuid(machine);
	machine->c_bit_position = 35;
	for (u32 i = 0; i < cpuid->nent; i++) {
		if (cpuid->entries[i].function == 0x80000008)
			machine->c_bit_position = (cpuid->entries[i].eax & 0xff) - 1;
		if (cpuid->entries[i].function == 0x80000001)
			machine->gigabyte_pages = cpuid->entries[i].edx >> 26 & 1;
	}
	machine->c_bit = 1ull << machine->c_bit_position;
	free(cpuid);

	slots = ioctl(machine->vm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);
	if (slots < 8)
		die("KVM_CAP_NR_MEMSLOTS is %d", slots);
	machine->free_slots = calloc(slots, sizeof(u32));
	if (!machine->free_slots)
		die("out of memory");
	while (slots > 0)
		machine->free_slots[machine->free_slot_count++] = --slots;
}

static struct kvm_segment flat_segment(u8 type, unsigned cpl)
{
	bool code = type & 8;

	return (struct kvm_segment){
		.limit = 0xffffffff,
		.selector = (code ? (cpl ? 0x30 : 0x10) : (cpl ? 0x28 : 0x18)) | cpl,
		.type = type,
		.present = 1,
		.dpl = cpl,
		.db = !code,
		.s = 1,
		.l = code,
		.g = 1,
	};
}

void open_vcpu(struct machine *machine, struct vcpu *vcpu)
{
	struct kvm_cpuid2 *cpuid = supported_cpuid(machine);
	struct kvm_sregs sregs;
	struct kvm_regs regs = {
		.rip = machine->entry,
		.rflags = 0x3002, /* IOPL 3 */
		.rdi = vcpu->index,
		.rsi = machine->boot_information,
		.rsp = machine->stacks + (vcpu->index + 1) * (16ull << 10),
	};
	struct {
		u32 length;
		u8 mask[8];
	} __attribute__((packed)) signals = {.length = 8}; /* none is blocked within KVM_RUN */
	unsigned cpl = machine->options.cpl;
	int size;

	vcpu->fd = ioctl(machine->vm, KVM_CREATE_VCPU, vcpu->index);
	if (vcpu->fd < 0)
		die("KVM_CREATE_VCPU: %s", strerror(errno));
	if (ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid))
		die("KVM_SET_CPUID2: %s", strerror(errno));
	free(cpuid);
	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
		die("KVM_GET_SREGS: %s", strerror(errno));
	sregs.cs = flat_segment(11, cpl);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat_segment(3, cpl);
	sregs.cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
	sregs.cr3 = machine->cr3;
	sregs.cr4 = 0x620;  /* OSXMMEXCPT OSFXSR PAE */
	sregs.efer = 0xd01; /* NXE LMA LME SCE */
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs))
		die("KVM_SET_SREGS: %s", strerror(errno));
	if (ioctl(vcpu->fd, KVM_SET_REGS, &regs))
		die("KVM_SET_REGS: %s", strerror(errno));
	if (ioctl(vcpu->fd, KVM_SET_SIGNAL_MASK, &signals))
		die("KVM_SET_SIGNAL_MASK: %s", strerror(errno));
	size = ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vcpu->run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		die("mmap of a vCPU: %s", strerror(errno));
}

u32 take_slot(struct machine *machine)
{
	return machine->free_slot_count ? machine->free_slots[--machine->free_slot_count] : NO_SLOT;
}

void give_slot(struct machine *machine, u32 slot)
{
	machine->free_slots[machine->free_slot_count++] = slot;
}

static u64 address(struct machine *machine, u64 gpa, enum view view)
{
	return view == PRIVATE ? gpa | machine->c_bit : gpa;
}

static void set_region(struct machine *machine, const struct memory_region2 *region)
{
	double start = now_us();

	if (ioctl(machine->vm, SET_USER_MEMORY_REGION2, region))
		die("slot %u, %#llx bytes at %#llx: %s", region->slot, (unsigned long long)region->memory_size,
		    (unsigned long long)region->guest_phys_addr, strerror(errno));
	machine->in_kvm += now_us() - start;
	machine->statistics.slot_calls++;
}

void create_live_slot(struct machine *machine, u32 slot, u64 gpa, u64 size, enum view view)
{
	struct memory_region2 region = {
		.slot = slot,
		.guest_phys_addr = address(machine, gpa, view),
		.memory_size = size,
		.userspace_addr = (uintptr_t)(machine->side[view] + gpa),
	};

	set_region(machine, &region);
}

static int create_guest_memfd(struct machine *machine, u64 size)
{
	struct create_guest_memfd create = {.size = size, .flags = GUEST_MEMFD_MMAP_AND_INIT_SHARED};
	double start = now_us();
	int fd = ioctl(machine->vm, CREATE_GUEST_MEMFD, &create);

	if (fd < 0)
		die("KVM_CREATE_GUEST_MEMFD: %s", strerror(errno));
	machine->in_kvm += now_us() - start;
	machine->statistics.guest_memfds++;
	return fd;
}

/* Make what the next tripwire of a page needs. */
void fill_reserve(struct machine *machine)
{
	if (machine->reserve < 0)
		machine->reserve = create_guest_memfd(machine, PAGE);
}

static int take_guest_memfd(struct machine *machine, u64 size)
{
	int fd = machine->reserve;

	if (size != PAGE || fd < 0)
		return create_guest_memfd(machine, size);
	machine->reserve = -1;
	return fd;
}

/* A slot whose guest_memfd has no file descriptor any more: each access faults with the page's gpa. An access that
 * KVM emulates goes through userspace_addr, which is PROT_NONE, so that too comes out as an exit. */
void create_tripwire(struct machine *machine, u32 slot, u64 gpa, u64 size, enum view view)
{
	struct memory_region2 region = {
		.slot = slot,
		.flags = MEM_GUEST_MEMFD,
		.guest_phys_addr = address(machine, gpa, view),
		.memory_size = size,
		.userspace_addr = (uintptr_t)(machine->nothing + gpa),
	};
	int fd = take_guest_memfd(machine, size);
	double start;

	region.guest_memfd = fd;
	set_region(machine, &region);
	start = now_us();
	close(fd);
	machine->in_kvm += now_us() - start;
}

void delete_slot(struct machine *machine, u32 slot, u64 gpa, enum view view)
{
	struct memory_region2 region = {.slot = slot, .guest_phys_addr = address(machine, gpa, view)};

	set_region(machine, &region);
}
