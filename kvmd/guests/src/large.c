/* large: vCPU 0 asks for one large range to be shared and private again, over and over; every other vCPU meanwhile asks
 * for one page of its own. What each request cost, and how long the small ones had to wait, is in kvmd's records.
 * Argument 0: MiB of the large range (32); argument 1: rounds of it (4). */
#include "lib.h"

#define MIB (1ull << 20)

static volatile u32 done;

static int convert_large(u64 start, u64 size, u64 rounds)
{
	for (u64 round = 0; round < rounds; round++) {
		u64 shared = convert(start, size / PAGE_SIZE, MAP_SHARED);
		u64 private = convert(start, size / PAGE_SIZE, MAP_PRIVATE);

		if (shared || private) {
			print("large: round %u: %u and %u, 0 expected", round, shared, private);
			return STATUS_WRONG;
		}
	}
	return STATUS_OK;
}

static int convert_small(u64 gpa)
{
	while (!done) {
		if (convert(gpa, 1, MAP_SHARED) || convert(gpa, 1, MAP_PRIVATE)) {
			print("large: gpa %x: one page was refused", gpa);
			return STATUS_WRONG;
		}
	}
	return STATUS_OK;
}

int guest_main(u64 vcpu)
{
	u64 size = argument(0, 32) * MIB, rounds = argument(1, 4);
	u64 start = (boot->first_free + boot->vcpus * PAGE_SIZE + 2 * MIB - 1) & ~(2 * MIB - 1);
	int status;

	if (start > boot->memory_size || size > boot->memory_size - start) {
		if (vcpu == 0)
			print("large: %u bytes from %x do not fit into memory", size, start);
		return STATUS_CANNOT;
	}
	barrier();
	if (vcpu)
		return convert_small(boot->first_free + vcpu * PAGE_SIZE);
	status = convert_large(start, size, rounds);
	done = 1;
	if (status == STATUS_OK)
		print("large: %u MiB there and back, %u rounds", size / MIB, rounds);
	return status;
}
