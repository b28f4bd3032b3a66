/* Memory in pieces: each is live in one view and a tripwire in the other. At first they are blocks of at most
 * 2 MiB, all private; a page that is converted is cut out of its block and stays a piece of its own. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static enum view other(enum view view)
{
	return view == PRIVATE ? SHARED : PRIVATE;
}

/* Give the piece its slots; they must be there. */
static void create_slots(struct machine *machine, struct piece *piece)
{
	piece->slot[piece->live] = take_slot(machine);
	create_live_slot(machine, piece->slot[piece->live], piece->gpa, piece->size, piece->live);
	piece->slot[other(piece->live)] = NO_SLOT;
	if (machine->options.hole)
		return;
	piece->slot[other(piece->live)] = take_slot(machine);
	create_tripwire(machine, piece->slot[other(piece->live)], piece->gpa, piece->size, other(piece->live));
}

static void delete_slots(struct machine *machine, struct piece *piece)
{
	for (int view = SHARED; view <= PRIVATE; view++) {
		if (piece->slot[view] == NO_SLOT)
			continue;
		delete_slot(machine, piece->slot[view], piece->gpa, view);
		give_slot(machine, piece->slot[view]);
	}
}

void build_memory(struct machine *machine)
{
	u64 size = machine->options.memory_size;
	struct piece pinned = {.gpa = 0, .size = machine->first_free, .live = PRIVATE};

	/* The most pieces that there are slots for, and the pinned one. */
	machine->pieces = calloc(machine->free_slot_count + 1, sizeof(struct piece));
	if (!machine->pieces)
		die("out of memory");
	if (size / BLOCK * 2 + 8 > machine->free_slot_count)
		die("%zu memslots are too few", machine->free_slot_count);
	create_slots(machine, &pinned);
	for (u64 gpa = machine->first_free; gpa < size;) {
		struct piece *piece = &machine->pieces[machine->piece_count++];
		u64 end = (gpa / BLOCK + 1) * BLOCK;

		*piece = (struct piece){.gpa = gpa, .size = (end < size ? end : size) - gpa, .live = PRIVATE};
		create_slots(machine, piece);
		gpa += piece->size;
	}
	machine->in_kvm = 0;
	machine->statistics = (struct statistics){0}; /* a machine's start is not what is measured */
}

/* Returns the index of the piece that holds gpa, which is free memory. */
static size_t find_piece(struct machine *machine, u64 gpa)
{
	size_t low = 0, high = machine->piece_count;

	while (high - low > 1) {
		size_t middle = (low + high) / 2;

		if (machine->pieces[middle].gpa <= gpa)
			low = middle;
		else
			high = middle;
	}
	return low;
}

/* Cut what is from `start` to `end` out of the piece at `index`, and make its other view live; false where there are
 * not enough slots. While the slots are away other vCPUs would see a hole, so they must be paused. */
static bool cut(struct machine *machine, size_t index, u64 start, u64 end)
{
	struct piece whole = machine->pieces[index];
	u64 edges[4] = {whole.gpa, start, end, whole.gpa + whole.size};
	struct piece parts[3];
	unsigned count = 0;

	for (unsigned i = 0; i < 3; i++)
		if (edges[i] < edges[i + 1])
			parts[count++] = (struct piece){.gpa = edges[i],
							.size = edges[i + 1] - edges[i],
							.live = edges[i] == start ? other(whole.live) : whole.live};
	if (machine->free_slot_count < (count - 1) * (machine->options.hole ? 1 : 2))
		return false;
	machine->statistics.cuts++;
	delete_slots(machine, &whole);
	for (unsigned i = 0; i < count; i++)
		create_slots(machine, &parts[i]);
	memmove(&machine->pieces[index + count], &machine->pieces[index + 1],
		(machine->piece_count - index - 1) * sizeof(struct piece));
	memcpy(&machine->pieces[index], parts, count * sizeof(struct piece));
	machine->piece_count += count - 1;
	return true;
}

/* Turn the piece round: in this order there is no moment at which both views are live. */
static void flip(struct machine *machine, struct piece *piece)
{
	enum view old = piece->live, new = other(old);

	if (machine->options.hole) {
		delete_slot(machine, piece->slot[old], piece->gpa, old);
		piece->slot[new] = piece->slot[old];
		piece->slot[old] = NO_SLOT;
	} else {
		delete_slot(machine, piece->slot[old], piece->gpa, old);
		create_tripwire(machine, piece->slot[old], piece->gpa, piece->size, old);
		delete_slot(machine, piece->slot[new], piece->gpa, new);
	}
	create_live_slot(machine, piece->slot[new], piece->gpa, piece->size, new);
	piece->live = new;
}

static void discard(struct machine *machine, u64 gpa, u64 size, enum view view)
{
	double start = now_us();

	if (fallocate(machine->side_fd[view], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, gpa, size))
		die("fallocate: %s", strerror(errno));
	machine->in_kvm += now_us() - start;
	machine->statistics.discards++;
}

void clear_up(struct machine *machine)
{
	struct statistics *statistics = &machine->statistics;

	if (!machine->left.any)
		return;
	discard(machine, machine->left.gpa, PAGE, machine->left.view);
	machine->left.any = false;
	if (machine->options.early && !machine->options.hole)
		fill_reserve(machine);
	if (statistics->conversions <= machine->options.skip)
		statistics->in_kvm_first += machine->in_kvm;
	else
		statistics->in_kvm += machine->in_kvm;
}

/* Convert one page; false where there are not enough slots to cut it out. */
static bool convert_page(struct machine *machine, u64 gpa)
{
	struct statistics *statistics = &machine->statistics;
	size_t index = find_piece(machine, gpa);
	bool whole = machine->pieces[index].size == PAGE, paused = !whole || machine->options.kick_always, done = true;
	enum view old = machine->pieces[index].live;

	if (statistics->conversions == 0)
		statistics->first = now_us();
	machine->in_kvm = 0;
	if (paused)
		pause_vcpus(machine);
	if (whole)
		flip(machine, &machine->pieces[index]);
	else
		done = cut(machine, index, gpa, gpa + PAGE);
	if (paused)
		resume_vcpus(machine);
	if (!done)
		return false;
	statistics->conversions++;
	machine->left = (struct left){.any = true, .gpa = gpa, .view = old};
	if (!machine->options.early)
		clear_up(machine);
	statistics->last = now_us();
	if (statistics->conversions <= machine->options.skip)
		statistics->skipped = statistics->last;
	return true;
}

const char *convert_for_access(struct machine *machine, struct access *access)
{
	enum view view = access->gpa & machine->c_bit ? PRIVATE : SHARED;
	u64 gpa = access->gpa & ~machine->c_bit;

	if (gpa >= machine->options.memory_size) {
		if (!access->mmio)
			return "memory fault outside memory";
		if (!access->is_write)
			memset(access->data, 0xff, access->size);
		return NULL;
	}
	if (gpa < machine->first_free && view == SHARED)
		return "access to the shared view of pinned memory";
	if (gpa >= machine->first_free) {
		if (machine->pieces[find_piece(machine, gpa)].live == view)
			machine->statistics.spurious++;
		else if (!convert_page(machine, gpa & ~(PAGE - 1)))
			return "out of memslots";
	}
	if (access->mmio) {
		machine->statistics.completed_mmio++;
		if (access->is_write)
			memcpy(machine->side[view] + gpa, access->data, access->size);
		else
			memcpy(access->data, machine->side[view] + gpa, access->size);
	}
	return NULL;
}

u64 convert_range(struct machine *machine, u64 gpa, u64 pages, u64 attributes)
{
	enum view view = attributes & 1 << 4 ? PRIVATE : SHARED;
	u64 size = machine->options.memory_size, end, result = 0;

	machine->statistics.explicit_requests++;
	if (attributes >> 5 || gpa % PAGE || pages == 0 || gpa < machine->first_free || gpa >= size ||
	    pages > (size - gpa) / PAGE)
		return EINVAL;
	end = gpa + pages * PAGE;
	pause_vcpus(machine);
	while (gpa < end) {
		size_t index = find_piece(machine, gpa);
		struct piece *piece = &machine->pieces[index];
		u64 piece_end = piece->gpa + piece->size, stop = piece_end < end ? piece_end : end;

		if (piece->live != view) {
			if (piece->gpa == gpa && piece_end == stop) {
				flip(machine, piece);
			} else if (!cut(machine, index, gpa, stop)) {
				result = EAGAIN;
				break;
			}
			discard(machine, gpa, stop - gpa, other(view));
		}
		gpa = stop;
	}
	resume_vcpus(machine);
	return result;
}
