/* explicit: explicit conversions of good and bad ranges, and what each must answer. Argument 0 chooses how to ask:
 * 0 port 0xC2, 1 VMCALL (Intel, CPL 0), 2 VMMCALL (AMD, CPL 0).
 *
 * Each vCPU works in a slice of its own of the free memory; the last one to finish then converts all of it. Pages are
 * looked at only in the view that a conversion made live, so nothing here converts implicitly. */
#include "lib.h"

#define SLICE_PAGES 16 /* of each vCPU */
#define FAR_GPA (1ull << 50)

static u64 ask_once(u64 gpa, u64 pages, u64 attributes)
{
	u64 result = HC_MAP_GPA_RANGE;

	switch (argument(0, 0)) {
	case 1:
		__asm__ volatile("vmcall" : "+a"(result) : "b"(gpa), "c"(pages), "d"(attributes) : "memory");
		return result;
	case 2:
		__asm__ volatile("vmmcall" : "+a"(result) : "b"(gpa), "c"(pages), "d"(attributes) : "memory");
		return result;
	default:
		return convert_once(gpa, pages, attributes);
	}
}

static u64 ask(u64 gpa, u64 pages, u64 attributes)
{
	u64 result;

	for (int attempt = 0; attempt < 1000; attempt++) {
		result = ask_once(gpa, pages, attributes);
		if (result != E_AGAIN)
			break;
		relax();
	}
	return result;
}

static bool accepted(u64 vcpu, const char *what, u64 gpa, u64 pages, u64 attributes)
{
	u64 result = ask(gpa, pages, attributes);

	if (result == 0)
		return true;
	print("explicit: vCPU %u: %s: gpa %x, %u pages, attributes %x: answer %u, 0 expected", vcpu, what, gpa, pages,
	      attributes, result);
	return false;
}

static bool refused(u64 vcpu, const char *what, u64 gpa, u64 pages, u64 attributes)
{
	u64 result = ask(gpa, pages, attributes);

	if (result == E_INVALID || result == (u64)-E_INVALID)
		return true;
	print("explicit: vCPU %u: %s: gpa %x, %u pages, attributes %x: answer %u, 22 expected", vcpu, what, gpa, pages,
	      attributes, result);
	return false;
}

static u64 view_of(u64 gpa, u64 attributes)
{
	return attributes & MAP_PRIVATE ? gpa : gpa + boot->shared_offset;
}

/* The first and last word of each page hold `expected` plus the page's number, or zero if `expected` is zero. */
static bool holds(u64 vcpu, const char *what, u64 gpa, u64 pages, u64 attributes, u64 expected)
{
	for (u64 page = 0; page < pages; page++) {
		u64 view = view_of(gpa + page * PAGE_SIZE, attributes);
		u64 wanted = expected ? expected + page : 0;

		if (load64(view) == wanted && load64(view + PAGE_SIZE - 8) == wanted)
			continue;
		print("explicit: vCPU %u: %s: gpa %x: %x and %x, %x expected", vcpu, what, gpa + page * PAGE_SIZE,
		      load64(view), load64(view + PAGE_SIZE - 8), wanted);
		return false;
	}
	return true;
}

static void fill(u64 gpa, u64 pages, u64 attributes, u64 value)
{
	for (u64 page = 0; page < pages; page++) {
		u64 view = view_of(gpa + page * PAGE_SIZE, attributes);

		store64(view, value + page);
		store64(view + PAGE_SIZE - 8, value + page);
	}
}

/* All sizes and places within the slice: converted memory reads as zeros, a repeated request keeps what is there. */
static bool good_requests(u64 vcpu, u64 slice)
{
	static const struct {
		u8 first, pages;
	} ranges[] = {{0, 1}, {15, 1}, {3, 5}, {0, 8}, {7, 9}, {0, 16}};

	for (unsigned i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
		u64 gpa = slice + ranges[i].first * PAGE_SIZE, pages = ranges[i].pages;

		/* What was in the slice before is of no matter: the page next to a range may be on either side. */
		if (!accepted(vcpu, "start private", gpa, pages, MAP_PRIVATE))
			return false;
		fill(gpa, pages, MAP_PRIVATE, 0x5A00);
		if (!accepted(vcpu, "private again", gpa, pages, MAP_PRIVATE) ||
		    !holds(vcpu, "private again keeps what is there", gpa, pages, MAP_PRIVATE, 0x5A00))
			return false;
		if (!accepted(vcpu, "to shared", gpa, pages, MAP_SHARED) ||
		    !holds(vcpu, "shared starts as zeros", gpa, pages, MAP_SHARED, 0))
			return false;
		fill(gpa, pages, MAP_SHARED, 0xC300);
		if (!accepted(vcpu, "shared again", gpa, pages, MAP_SHARED) ||
		    !holds(vcpu, "shared again keeps what is there", gpa, pages, MAP_SHARED, 0xC300))
			return false;
		if (!accepted(vcpu, "to private", gpa, pages, MAP_PRIVATE) ||
		    !holds(vcpu, "private starts as zeros", gpa, pages, MAP_PRIVATE, 0))
			return false;
	}
	return true;
}

/* A range that is partly in the asked state: that part keeps its content, the rest reads as zeros. */
static bool mixed_range(u64 vcpu, u64 slice)
{
	u64 middle = slice + 4 * PAGE_SIZE;

	if (!accepted(vcpu, "mixed: all private", slice, SLICE_PAGES, MAP_PRIVATE) ||
	    !accepted(vcpu, "mixed: middle shared", middle, 3, MAP_SHARED))
		return false;
	fill(middle, 3, MAP_SHARED, 0xC300);
	return accepted(vcpu, "mixed: all shared", slice, SLICE_PAGES, MAP_SHARED) &&
	       holds(vcpu, "mixed: before", slice, 4, MAP_SHARED, 0) &&
	       holds(vcpu, "mixed: middle", middle, 3, MAP_SHARED, 0xC300) &&
	       holds(vcpu, "mixed: after", slice + 7 * PAGE_SIZE, SLICE_PAGES - 7, MAP_SHARED, 0) &&
	       accepted(vcpu, "mixed: all private again", slice, SLICE_PAGES, MAP_PRIVATE);
}

/* Bits 3:0 of the attributes say which page size the guest maps the range with: only a hint. */
static bool hints(u64 vcpu, u64 slice)
{
	for (u64 hint = 0; hint < 16; hint++) {
		if (!accepted(vcpu, "hint, shared", slice, 2, MAP_SHARED | hint) ||
		    !accepted(vcpu, "hint, private", slice, 2, MAP_PRIVATE | hint))
			return false;
	}
	return true;
}

/* Refused requests leave all as it was. */
static bool bad_requests(u64 vcpu, u64 slice)
{
	u64 end = boot->memory_size, pinned_end = boot->first_free;
	bool good;

	if (!accepted(vcpu, "before the bad ones", slice, SLICE_PAGES, MAP_PRIVATE))
		return false;
	fill(slice, SLICE_PAGES, MAP_PRIVATE, 0x5A00);
	good = refused(vcpu, "no page", slice, 0, MAP_SHARED);
	good &= refused(vcpu, "unaligned by 1", slice + 1, 1, MAP_SHARED);
	good &= refused(vcpu, "unaligned by 2048", slice + 2048, 1, MAP_SHARED);
	good &= refused(vcpu, "gpa + size wraps", slice, ~0ull, MAP_SHARED);
	good &= refused(vcpu, "size wraps to one page", slice, (1ull << 52) + 1, MAP_SHARED);
	good &= refused(vcpu, "2^52 pages, which wrap to none", slice, 1ull << 52, MAP_SHARED);
	good &= refused(vcpu, "2^40 pages", slice, 1ull << 40, MAP_SHARED);
	good &= refused(vcpu, "last page of the address space", ~(PAGE_SIZE - 1), 1, MAP_SHARED);
	good &= refused(vcpu, "last two pages wrap", ~(PAGE_SIZE - 1), 2, MAP_SHARED);
	good &= refused(vcpu, "just outside memory", end, 1, MAP_SHARED);
	good &= refused(vcpu, "far outside memory", FAR_GPA, 1, MAP_PRIVATE);
	good &= refused(vcpu, "over the end of memory", end - PAGE_SIZE, 2, MAP_SHARED);
	good &= refused(vcpu, "page 0", 0, 1, MAP_SHARED);
	good &= refused(vcpu, "last pinned page", pinned_end - PAGE_SIZE, 1, MAP_SHARED);
	good &= refused(vcpu, "from pinned into free memory", pinned_end - PAGE_SIZE, 2, MAP_SHARED);
	good &= refused(vcpu, "all of memory", 0, end / PAGE_SIZE, MAP_SHARED);
	for (unsigned bit = 5; bit < 64; bit++)
		good &= refused(vcpu, "unknown attribute", slice, 1, MAP_SHARED | 1ull << bit);
	if (has_two_views()) {
		good &= refused(vcpu, "gpa with the C-bit", slice | 1ull << boot->c_bit, 1, MAP_SHARED);
		good &= refused(vcpu, "address of the shared view", slice + boot->shared_offset, 1, MAP_SHARED);
	}
	return good && holds(vcpu, "after the bad ones", slice, SLICE_PAGES, MAP_PRIVATE, 0x5A00);
}

/* From the first free byte to the end, in one request; a look at the ends and at some pages between. */
static bool everything(u64 vcpu)
{
	u64 start = boot->first_free, pages = (boot->memory_size - start) / PAGE_SIZE;
	u64 step = pages / 16 + 1;

	for (unsigned i = 0; i < 4; i++) {
		u64 attributes = i % 2 ? MAP_PRIVATE : MAP_SHARED;

		if (!accepted(vcpu, "everything", start, pages, attributes))
			return false;
		for (u64 page = 0; page < pages; page += step) {
			if (!holds(vcpu, "everything", start + page * PAGE_SIZE, 1, attributes, 0))
				return false;
			fill(start + page * PAGE_SIZE, 1, attributes, 0xE00);
		}
		if (!holds(vcpu, "the last page", boot->memory_size - PAGE_SIZE, 1, attributes,
			   (pages - 1) % step ? 0 : 0xE00))
			return false;
	}
	return true;
}

int guest_main(u64 vcpu)
{
	u64 slice = boot->first_free + vcpu * SLICE_PAGES * PAGE_SIZE;
	static volatile u32 failed;

	if ((boot->memory_size - boot->first_free) / PAGE_SIZE / SLICE_PAGES < boot->vcpus) {
		if (vcpu == 0)
			print("explicit: needs %u free pages for each vCPU", (u64)SLICE_PAGES);
		return STATUS_CANNOT;
	}
	if (!good_requests(vcpu, slice) || !mixed_range(vcpu, slice) || !hints(vcpu, slice) ||
	    !bad_requests(vcpu, slice))
		failed = 1;
	if (!last_to_finish())
		return failed ? STATUS_WRONG : STATUS_OK;
	if (failed || !everything(vcpu))
		return STATUS_WRONG;
	print("explicit: %u vCPUs: all answers as they should be", (u64)boot->vcpus);
	return STATUS_OK;
}
