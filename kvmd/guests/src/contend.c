/* contend: all vCPUs fight over the same pages, each in an order and a direction of its own. Argument 0: pages
 * (4); argument 1: rounds of each vCPU (64).
 *
 * What a vCPU stores through a view carries that view's mark in its top byte. Whoever reads a view, at whatever
 * moment, must find zero or that view's mark: anything else is content that crossed from one side to the other.
 *
 * On a machine with one view an access in the wrong state is simply made in the present one, so marks prove nothing
 * there. What must not happen is that content comes back that a conversion has done away with. So each visit converts
 * the page twice, to the other state and to its own, while the others do the same: whatever the page held is gone, and
 * all that can be found was stored since. Values carry a number that each vCPU counts up and publishes before it
 * stores: one below what was published before the visit is content from the dead.
 *
 * They start together, so that they do fight; the last to finish says so. */
#include "lib.h"

#define MARK_PRIVATE 0x5Aull
#define MARK_SHARED 0xC3ull
#define MARK_ONE_VIEW 0x1Eull
#define WORDS (PAGE_SIZE / 8)

#define MOST_VCPUS 1024

/* On a machine with one view: the number that each vCPU stores now, or stored last. */
static volatile u32 published[MOST_VCPUS];

/* xorshift64: a fixed sequence for each vCPU. */
static u64 next_random(u64 *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static bool check(u64 vcpu, u64 gpa, u64 address, u64 mark)
{
	u64 found = load64(address);

	if (found == 0 || found >> 56 == mark)
		return true;
	print("contend: vCPU %u: gpa %x: %x in the %s view, which is the other side's", vcpu, gpa, found,
	      mark == MARK_SHARED ? "shared" : "private");
	return false;
}

/* One visit: look at a few words, store into them, look again; another vCPU may convert at any point between. */
static bool visit(u64 vcpu, u64 gpa, u64 mark, u64 random)
{
	u64 view = mark == MARK_SHARED ? shared_view(gpa) : private_view(gpa);
	u64 value = mark << 56 | vcpu << 48 | (random >> 16 & 0xffffffff);

	for (unsigned i = 0; i < 4; i++) {
		u64 offset = (random >> (9 * i) & (WORDS - 1)) * 8;

		if (!check(vcpu, gpa + offset, view + offset, mark))
			return false;
		store64(view + offset, value + i);
		if (!check(vcpu, gpa + offset, view + offset, mark))
			return false;
	}
	return check(vcpu, gpa, view, mark);
}

static bool check_alive(u64 vcpu, u64 address, const u32 *before)
{
	u64 found = load64(address), writer = found >> 32 & (MOST_VCPUS - 1);
	u32 number = (u32)found;

	if (found == 0)
		return true;
	/* What another vCPU published before the visit it may be about to store; what this one did, it has stored. */
	if (found >> 56 == MARK_ONE_VIEW && writer < boot->vcpus && number >= before[writer] + (writer == vcpu))
		return true;
	print("contend: vCPU %u: gpa %x: %x, which was there before two conversions", vcpu, address, found);
	return false;
}

/* The same on a machine with one view. */
static bool visit_one_view(u64 vcpu, u64 gpa, u64 mark, u64 random)
{
	u32 before[MOST_VCPUS];
	bool good = true;

	for (u64 i = 0; i < boot->vcpus; i++)
		before[i] = published[i];
	if (mark == MARK_SHARED) {
		private_view(gpa);
		shared_view(gpa);
	} else {
		shared_view(gpa);
		private_view(gpa);
	}
	for (unsigned i = 0; i < 4; i++) {
		u64 offset = (random >> (9 * i) & (WORDS - 1)) * 8;
		u32 number = published[vcpu] + 1;

		good &= check_alive(vcpu, gpa + offset, before);
		published[vcpu] = number; /* x86 stores in order: it is seen no later than the value */
		store64(gpa + offset, MARK_ONE_VIEW << 56 | vcpu << 32 | number);
	}
	return good;
}

static bool fight(u64 vcpu, u64 pages, u64 rounds)
{
	u64 random = 0x9e3779b97f4a7c15ull * (vcpu + 1);

	for (u64 round = 0; round < rounds; round++) {
		for (u64 i = 0; i < pages; i++) {
			u64 gpa = boot->first_free + (next_random(&random) >> 20) % pages * PAGE_SIZE;
			u64 mark = (random >> 63) ? MARK_SHARED : MARK_PRIVATE;
			bool good;

			good = has_two_views() ? visit(vcpu, gpa, mark, random) :
						 visit_one_view(vcpu, gpa, mark, random);
			if (!good)
				return false;
		}
	}
	return true;
}

int guest_main(u64 vcpu)
{
	u64 pages = argument(0, 4), rounds = argument(1, 64);
	u64 free_pages = (boot->memory_size - boot->first_free) / PAGE_SIZE;
	bool good;

	if (pages > free_pages) {
		if (vcpu == 0)
			print("contend: %u pages do not fit into the %u free pages", pages, free_pages);
		return STATUS_CANNOT;
	}
	if (!has_two_views() && boot->vcpus > MOST_VCPUS) {
		if (vcpu == 0)
			print("contend: on a machine with one view at most %u vCPUs", (u64)MOST_VCPUS);
		return STATUS_CANNOT;
	}
	barrier();
	good = fight(vcpu, pages, rounds);
	if (last_to_finish())
		print("contend: %u vCPUs fought over %u pages, %u rounds", (u64)boot->vcpus, pages, rounds);
	return good ? STATUS_OK : STATUS_WRONG;
}
