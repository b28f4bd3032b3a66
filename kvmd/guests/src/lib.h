/* What every guest of kvmd shares: the ABI of docs/payload-abi.md, a console, conversions and a barrier. */
#ifndef KVMD_GUEST_LIB_H
#define KVMD_GUEST_LIB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE_SIZE 4096ull

#define PORT_CONSOLE 0x3F8
#define PORT_CONSOLE_LSR 0x3FD
#define LSR_TRANSMITTER_EMPTY 0x20
#define PORT_HYPERCALL 0xC2
#define PORT_EXIT 0xF4

#define HC_MAP_GPA_RANGE 12
#define MAP_PRIVATE (1ull << 4)
#define MAP_SHARED 0ull

/* Positive error numbers of a conversion; through VMCALL KVM itself may answer with their negatives. */
#define E_AGAIN 11
#define E_INVALID 22

/* Exit statuses of these guests. */
#define STATUS_OK 0
#define STATUS_WRONG 1  /* the machine did not do what the ABI says */
#define STATUS_CANNOT 2 /* this machine is too small, or lacks a view */

#define BOOT_MAGIC 0x31304f464e49564bull /* "KVINFO01" */

struct boot_information {
	u64 magic;
	u32 version;
	u32 vcpus;
	u64 memory_size;   /* bytes */
	u64 shared_offset; /* bytes from a page's private view to its shared one; 0: the machine has one view */
	u64 first_free;    /* gpa; below it memory is pinned private */
	u32 c_bit;
	u32 flags; /* bit 0: arguments follow */
	u64 arguments[8];
};

_Static_assert(offsetof(struct boot_information, arguments) == 48, "boot information");
_Static_assert(sizeof(struct boot_information) == 112, "boot information");

/* Set by _start before guest_main, to the same value by every vCPU. */
extern const struct boot_information *boot;

/* A guest defines this; what it returns is its vCPU's exit status. */
int guest_main(u64 vcpu);

/* Argument `index`, or `otherwise` where it is zero or not given. */
u64 argument(unsigned index, u64 otherwise);

/* Print one whole line; knows %s, %u (decimal) and %x (hexadecimal with 0x), the last two of 64 bits. Lines of
 * several vCPUs never mix; a line longer than 255 bytes is cut. */
void print(const char *format, ...);

static inline void relax(void)
{
	__asm__ volatile("pause" ::: "memory");
}

static inline void outb(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline u8 inb(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u64 load64(u64 address)
{
	return *(volatile const u64 *)address;
}

static inline void store64(u64 address, u64 value)
{
	*(volatile u64 *)address = value;
}

struct spinlock {
	volatile u32 taken;
};

void lock(struct spinlock *spinlock);
void unlock(struct spinlock *spinlock);

/* Wait until all vCPUs of the machine have come here. Who waits spins, and takes host CPUs from whoever still has
 * conversions to be made: for a start, not for an end. */
void barrier(void);

/* Each vCPU calls it once, when it is done; true for the last of them, which sees all that the others stored. */
bool last_to_finish(void);

/* Ask for a conversion once; 0, E_INVALID or E_AGAIN, or whatever else RAX holds. */
u64 convert_once(u64 gpa, u64 pages, u64 attributes);

/* The same, but ask again, for a bounded number of times, while the answer is E_AGAIN. */
u64 convert(u64 gpa, u64 pages, u64 attributes);

static inline bool has_two_views(void)
{
	return boot->shared_offset != 0;
}

/* The address of the page's private or shared view. On a machine with one view the page is converted explicitly
 * first; a refusal there ends this vCPU with STATUS_WRONG. */
u64 private_view(u64 gpa);
u64 shared_view(u64 gpa);

/* End this vCPU. */
_Noreturn void leave(u8 status);

#endif
