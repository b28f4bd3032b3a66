/* conformance: conversions of every size and place that the kernel's own private_mem_conversions_test makes, checked
 * byte by byte. Argument 0: 1 where a program on the host answers (0: alone); argument 1: rounds (1).
 *
 * Each vCPU has a mailbox page, which is shared, and after all mailboxes 4 MiB of its own, from a multiple of 2 MiB on.
 * The part that is tested is 2 MiB and a page long. To have something done on the host's side, a vCPU writes what into
 * its mailbox, moves the request number, rings at a port with its own number, and waits for the answer number to
 * follow. */
#include "lib.h"

#define MIB (1ull << 20)
#define DATA_SIZE (2 * MIB + PAGE_SIZE)
#define REGION_SIZE (4 * MIB)
#define PORT_BELL 0x0B

/* What can be asked of the host, for [gpa, gpa + size). A byte pattern fills every byte. */
#define ASK_SHARED 1    /* find `expected` everywhere, then write `replacement` */
#define ASK_PRIVATE 2   /* be refused each page */
#define ASK_ALTERNATE 3 /* odd pages as in ASK_SHARED, even ones as in ASK_PRIVATE */
#define ASK_PUNCH 4     /* punch a hole into the private side, and convert nothing */

struct mailbox {
	volatile u64 request, answer, status; /* status 0: it was as it should be */
	volatile u64 what, gpa, size, expected, replacement;
};

static const struct {
	u64 offset, size;
} ranges[] = {
	{0, PAGE_SIZE},
	{0, 2 * MIB},
	{PAGE_SIZE, PAGE_SIZE},
	{PAGE_SIZE, 2 * MIB}, /* both ends misaligned */
	{2 * MIB, PAGE_SIZE},
};

#define RANGES (sizeof(ranges) / sizeof(ranges[0]))

#define PATTERN_INITIAL 0xCC
#define PATTERN_SHARED 0x11
#define PATTERN_PRIVATE 0x22
#define PATTERN_HOST 0x33
#define PATTERN_LATER 0x44

static u64 address_of(u64 gpa, u64 attributes)
{
	return attributes & MAP_PRIVATE ? gpa : gpa + boot->shared_offset;
}

static u64 word_of(u8 pattern)
{
	return 0x0101010101010101ull * pattern;
}

static void fill(u64 gpa, u64 size, u64 attributes, u8 pattern)
{
	u64 address = address_of(gpa, attributes);

	for (u64 offset = 0; offset < size; offset += 8)
		store64(address + offset, word_of(pattern));
}

static bool holds(const char *what, u64 gpa, u64 size, u64 attributes, u8 pattern)
{
	u64 address = address_of(gpa, attributes);

	for (u64 offset = 0; offset < size; offset += 8) {
		u64 found = load64(address + offset);

		if (found == word_of(pattern))
			continue;
		print("conformance: %s: gpa %x: %x, %x expected", what, gpa + offset, found, word_of(pattern));
		return false;
	}
	return true;
}

static bool to(u64 gpa, u64 size, u64 attributes)
{
	u64 result = convert(gpa, size / PAGE_SIZE, attributes);

	if (result == 0)
		return true;
	print("conformance: converting %x bytes at %x with attributes %x: answer %u", size, gpa, attributes, result);
	return false;
}

static struct mailbox *mailbox_of(u64 vcpu)
{
	return (struct mailbox *)address_of(boot->first_free + vcpu * PAGE_SIZE, MAP_SHARED);
}

static bool ask_host(u64 vcpu, u64 what, u64 gpa, u64 size, u8 expected, u8 replacement)
{
	struct mailbox *box = mailbox_of(vcpu);

	if (!argument(0, 0)) {
		/* Nobody is there: do what the host would have done. */
		for (u64 page = gpa; page < gpa + size && what != ASK_PRIVATE && what != ASK_PUNCH; page += PAGE_SIZE)
			if (what == ASK_SHARED || (page - gpa) & PAGE_SIZE)
				fill(page, PAGE_SIZE, MAP_SHARED, replacement);
		return true;
	}
	box->what = what;
	box->gpa = gpa;
	box->size = size;
	box->expected = expected;
	box->replacement = replacement;
	box->request++;
	outb(PORT_BELL, vcpu);
	while (box->answer != box->request)
		relax();
	if (box->status == 0)
		return true;
	print("conformance: vCPU %u: the host found something else for request %u at %x: %u", vcpu, what, gpa,
	      box->status);
	return false;
}

/* One range there and back: what the guest and the host find in it, and that its neighbours stay as they are. */
static bool convert_range(u64 vcpu, u64 base, u64 offset, u64 size)
{
	u64 gpa = base + offset, end = gpa + size, data_end = base + DATA_SIZE;

	fill(gpa, size, MAP_SHARED, PATTERN_SHARED);
	if (!to(gpa, size, MAP_PRIVATE) || !holds("fresh private memory", gpa, size, MAP_PRIVATE, 0))
		return false;
	fill(gpa, size, MAP_PRIVATE, PATTERN_PRIVATE);
	if (!ask_host(vcpu, ASK_PRIVATE, gpa, size, 0, 0) ||
	    !holds("private memory", gpa, size, MAP_PRIVATE, PATTERN_PRIVATE) ||
	    !holds("before it", base, offset, MAP_SHARED, PATTERN_INITIAL) ||
	    !holds("after it", end, data_end - end, MAP_SHARED, PATTERN_INITIAL))
		return false;

	/* Every other page back to shared: holes in the private range. */
	for (u64 page = gpa + PAGE_SIZE; page < end; page += 2 * PAGE_SIZE) {
		if (!to(page, PAGE_SIZE, MAP_SHARED) || !holds("fresh odd page", page, PAGE_SIZE, MAP_SHARED, 0))
			return false;
		fill(page, PAGE_SIZE, MAP_SHARED, PATTERN_SHARED);
	}
	if (!ask_host(vcpu, ASK_ALTERNATE, gpa, size, PATTERN_SHARED, PATTERN_HOST))
		return false;
	for (u64 page = gpa; page < end; page += PAGE_SIZE) {
		bool odd = (page - gpa) & PAGE_SIZE;

		if (!holds(odd ? "odd page" : "even page", page, PAGE_SIZE, odd ? MAP_SHARED : MAP_PRIVATE,
			   odd ? PATTERN_HOST : PATTERN_PRIVATE))
			return false;
	}

	/* All of it back: what was shared already keeps its content, the rest reads as zeros. */
	if (!to(gpa, size, MAP_SHARED))
		return false;
	for (u64 page = gpa; page < end; page += PAGE_SIZE)
		if (!holds("all shared again", page, PAGE_SIZE, MAP_SHARED, (page - gpa) & PAGE_SIZE ? PATTERN_HOST : 0))
			return false;
	fill(gpa, size, MAP_SHARED, PATTERN_HOST);
	if (!ask_host(vcpu, ASK_SHARED, gpa, size, PATTERN_HOST, PATTERN_LATER) ||
	    !holds("what the host wrote", gpa, size, MAP_SHARED, PATTERN_LATER))
		return false;
	fill(gpa, size, MAP_SHARED, PATTERN_INITIAL);
	return true;
}

static bool conversions(u64 vcpu, u64 base)
{
	if (!to(base, DATA_SIZE, MAP_SHARED))
		return false;
	fill(base, DATA_SIZE, MAP_SHARED, PATTERN_SHARED);
	if (!ask_host(vcpu, ASK_SHARED, base, DATA_SIZE, PATTERN_SHARED, PATTERN_INITIAL) ||
	    !holds("the host's first pattern", base, DATA_SIZE, MAP_SHARED, PATTERN_INITIAL))
		return false;
	for (unsigned i = 0; i < RANGES; i++)
		if (!convert_range(vcpu, base, ranges[i].offset, ranges[i].size))
			return false;
	return true;
}

/* A hole in private memory reads as zeros, and no conversion is needed for that. */
static bool holes(u64 vcpu, u64 base, bool precise)
{
	if (!to(base, DATA_SIZE, MAP_PRIVATE))
		return false;
	for (unsigned i = 0; i < RANGES; i++) {
		u64 gpa = base + ranges[i].offset, size = ranges[i].size;
		u64 start = precise ? gpa : base, length = precise ? size : DATA_SIZE;

		if (!ask_host(vcpu, ASK_PUNCH, base, DATA_SIZE, 0, 0))
			return false;
		fill(start, length, MAP_PRIVATE, PATTERN_PRIVATE);
		if (!holds("before the hole", start, length, MAP_PRIVATE, PATTERN_PRIVATE) ||
		    !ask_host(vcpu, ASK_PUNCH, gpa, size, 0, 0) || !holds("hole", gpa, size, MAP_PRIVATE, 0))
			return false;
		if (!precise && !(holds("before the hole", base, gpa - base, MAP_PRIVATE, PATTERN_PRIVATE) &&
				  holds("after the hole", gpa + size, base + DATA_SIZE - gpa - size, MAP_PRIVATE,
					PATTERN_PRIVATE)))
			return false;
	}
	return true;
}

int guest_main(u64 vcpu)
{
	u64 mailboxes = boot->vcpus * PAGE_SIZE, rounds = argument(1, 1);
	u64 first = (boot->first_free + mailboxes + 2 * MIB - 1) & ~(2 * MIB - 1);
	u64 base = first + vcpu * REGION_SIZE;
	static volatile u32 failed;
	bool good = true;

	if (first + boot->vcpus * REGION_SIZE > boot->memory_size) {
		if (vcpu == 0)
			print("conformance: needs %u MiB of free memory", (2 * MIB + boot->vcpus * REGION_SIZE) / MIB);
		return STATUS_CANNOT;
	}
	good = to(boot->first_free + vcpu * PAGE_SIZE, PAGE_SIZE, MAP_SHARED);
	for (u64 round = 0; good && round < rounds; round++)
		good = conversions(vcpu, base) &&
		       (!argument(0, 0) || (holes(vcpu, base, false) && holes(vcpu, base, true)));
	if (!good)
		failed = 1;
	if (last_to_finish() && !failed)
		print("conformance: %u vCPUs: every byte as it should be", (u64)boot->vcpus);
	return good ? STATUS_OK : STATUS_WRONG;
}
