/* The C floor: what the conversions of kvmd cost at least, with the same KVM calls and no Python.
 *
 * floor.c          the command line and the report
 * floor_kvm.c      the machine's file descriptors and memslots
 * floor_payload.c  the image and what a payload finds (docs/payload-abi.md)
 * floor_memory.c   pieces of memory and their conversion
 * floor_vcpu.c     vCPU threads, their exits, the service thread
 *
 * Build: cc -O2 -Wall -Wextra -pthread -o floor floor*.c
 *
 * A call that must not fail ends the program with a message: this is a measuring instrument, not a daemon. */
#ifndef KVMD_FLOOR_H
#define KVMD_FLOOR_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/kvm.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE 4096ull
#define BLOCK (2ull << 20) /* largest slot in memory that converts */
#define SHARED_OFFSET (1ull << 46)
#define MAX_VCPUS 64
#define NO_SLOT (~0u)

enum view { SHARED = 0, PRIVATE = 1 };

struct options {
	bool service;     /* conversions by one thread for all vCPUs, not by the faulting one */
	bool early;       /* that thread answers first, and then discards and makes the next tripwire's guest_memfd */
	bool placed;      /* and is on the boot CPU, and the vCPU's thread, too, where there is one alone */
	bool hole;        /* tripwires are absent slots, not closed guest_memfds */
	bool kick_always; /* take the other vCPUs out of KVM_RUN for each conversion, not only to cut a block */
	unsigned vcpus, cpl, timeout_seconds;
	u64 memory_size;
	u64 arguments[8];
	u64 skip; /* conversions that are reported apart */
	const char *path;
};

/* A run of pages in one state: a live slot in one view, a tripwire (or nothing) in the other. */
struct piece {
	u64 gpa, size;
	u32 slot[2];
	enum view live;
};

/* The page that a conversion left behind in a view, until it is given back. */
struct left {
	bool any;
	u64 gpa;
	enum view view;
};

struct statistics {
	u64 conversions, spurious, completed_mmio, explicit_requests, cuts, discards;
	u64 slot_calls, guest_memfds; /* memslots created and deleted; guest_memfds made */
	u64 pauses, taken_out; /* times that all vCPUs were kept out of KVM_RUN; those that had to leave it for that */
	double first, skipped, last; /* microseconds, CLOCK_MONOTONIC */
	double in_kvm, in_kvm_first; /* microseconds within slot and discard calls; of the first `skip` conversions */
};

struct vcpu {
	unsigned index;
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	bool inside, kicked; /* under machine.gate */
	int status;          /* exit status, or -1 */
};

struct machine {
	struct options options;
	int kvm, vm;
	bool quirk_disabled;
	u64 c_bit; /* mask */
	unsigned c_bit_position;
	bool gigabyte_pages;
	u64 first_free, cr3, entry, boot_information, stacks;

	/* Memory: `lock` guards all of it, and the statistics. */
	pthread_mutex_t lock;
	int side_fd[2];
	u8 *side[2], *nothing;
	u32 *free_slots;
	size_t free_slot_count;
	struct piece *pieces;
	size_t piece_count;
	double in_kvm; /* microseconds of the conversion at hand */
	struct left left;
	int reserve; /* a guest_memfd of one page for the next tripwire, or -1 */
	struct statistics statistics;

	/* The gate that keeps vCPUs out of KVM_RUN: `gate` guards `paused`, `stopped`, `inside` of vCPUs. It is
	 * taken after `lock`, never before. */
	pthread_mutex_t gate;
	pthread_cond_t gate_changed;
	bool paused;
	const char *stopped; /* why, or NULL */

	pthread_mutex_t console;
	struct vcpu vcpus[MAX_VCPUS];
};

_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
double now_us(void);

/* floor_kvm.c */
void open_machine(struct machine *machine);
void open_vcpu(struct machine *machine, struct vcpu *vcpu);
u32 take_slot(struct machine *machine);
void give_slot(struct machine *machine, u32 slot);
void create_live_slot(struct machine *machine, u32 slot, u64 gpa, u64 size, enum view view);
void create_tripwire(struct machine *machine, u32 slot, u64 gpa, u64 size, enum view view);
void fill_reserve(struct machine *machine);
void delete_slot(struct machine *machine, u32 slot, u64 gpa, enum view view);

/* floor_payload.c */
void load_payload(struct machine *machine);

/* floor_memory.c */
void build_memory(struct machine *machine);
struct access { /* one that an exit reports */
	u64 gpa; /* C-bit included */
	bool mmio, is_write;
	u8 *data;
	u32 size;
};
/* Make the accessed view live and, for an MMIO exit, do the access; NULL, or why the machine must stop. */
const char *convert_for_access(struct machine *machine, struct access *access);
/* Give back what the last conversion left behind, unless that is done: as a rule it is, before the answer. */
void clear_up(struct machine *machine);
/* Returns 0, 22 or 11. */
u64 convert_range(struct machine *machine, u64 gpa, u64 pages, u64 attributes);

/* floor_vcpu.c */
void run_machine(struct machine *machine);
void pause_vcpus(struct machine *machine);
void resume_vcpus(struct machine *machine);

#endif
