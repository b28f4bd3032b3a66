/* pingpong: every vCPU walks pages of its own, each in its shared and then in its private view, so that each
 * touch of a page is one conversion. Argument 0: pages of each vCPU (16); argument 1: rounds (8).
 *
 * All pages start private and zero, so the first round makes two conversions a page like any other. No vCPU waits for
 * another, since one that spins takes a host CPU from those that still convert: the last to finish says so. */
#include "lib.h"

/* Two words a page, the first and the last, are written; these are looked at: they and two between. */
static const u64 places[] = {0, 8, 2048, PAGE_SIZE - 8};

#define MARK_PRIVATE 0x5A
#define MARK_SHARED 0xC3

static bool touch(u64 vcpu, u64 gpa, u64 view, const char *name, u64 pattern)
{
	for (unsigned i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		u64 found = load64(view + places[i]);

		if (found == 0)
			continue;
		print("pingpong: vCPU %u: gpa %x, %s view: %x after its conversion, 0x0 expected", vcpu,
		      gpa + places[i], name, found);
		return false;
	}
	store64(view, pattern);
	store64(view + PAGE_SIZE - 8, ~pattern);
	if (load64(view) == pattern && load64(view + PAGE_SIZE - 8) == ~pattern)
		return true;
	print("pingpong: vCPU %u: gpa %x, %s view: read back %x and %x, %x and %x expected", vcpu, gpa, name,
	      load64(view), load64(view + PAGE_SIZE - 8), pattern, ~pattern);
	return false;
}

static bool walk(u64 vcpu, u64 start, u64 pages, u64 rounds)
{
	for (u64 round = 0; round < rounds; round++) {
		for (u64 page = 0; page < pages; page++) {
			u64 gpa = start + page * PAGE_SIZE;
			u64 pattern = (vcpu & 0xff) << 48 | (page & 0xffffff) << 24 | (round & 0xffffff);

			if (!touch(vcpu, gpa, shared_view(gpa), "shared", pattern | (u64)MARK_SHARED << 56))
				return false;
			if (!touch(vcpu, gpa, private_view(gpa), "private", pattern | (u64)MARK_PRIVATE << 56))
				return false;
		}
	}
	return true;
}

int guest_main(u64 vcpu)
{
	u64 pages = argument(0, 16), rounds = argument(1, 8);
	u64 free_pages = (boot->memory_size - boot->first_free) / PAGE_SIZE;
	bool good;

	if (pages > free_pages / boot->vcpus) {
		if (vcpu == 0)
			print("pingpong: %u vCPUs with %u pages each do not fit into the %u free pages",
			      (u64)boot->vcpus, pages, free_pages);
		return STATUS_CANNOT;
	}
	good = walk(vcpu, boot->first_free + vcpu * pages * PAGE_SIZE, pages, rounds);
	if (last_to_finish())
		print("pingpong: %u vCPUs walked %u pages each, %u rounds", (u64)boot->vcpus, pages, rounds);
	return good ? STATUS_OK : STATUS_WRONG;
}
