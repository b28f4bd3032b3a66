/* Loads the image and builds what a payload finds: page tables, boot information, stacks (docs/payload-abi.md).
 * kvmd checks images; this program is given good ones and refuses the rest without much explanation. */
#include "floor.h"

#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIB (1ull << 30)
#define ENTRIES 512ull
#define ENTRY_BITS 0x7ull  /* present, writable, user */
#define LARGE_PAGE 0x80ull /* PS */

struct boot_information {
	u64 magic;
	u32 version, vcpus;
	u64 memory_size, shared_offset, first_free;
	u32 c_bit, flags;
	u64 arguments[8];
};

static u64 round_up(u64 value, u64 step)
{
	return (value + step - 1) / step * step;
}

static u8 *read_file(const char *path, size_t *size)
{
	FILE *file = fopen(path, "rb");
	size_t limit = 64 << 20;
	u8 *bytes = malloc(limit);

	if (!file)
		die("%s: %s", path, strerror(errno));
	if (!bytes)
		die("out of memory");
	*size = fread(bytes, 1, limit, file);
	fclose(file);
	return bytes;
}

/* Copy the segments into the private side; returns the end of the image. */
static u64 load_image(struct machine *machine)
{
	const char *path = machine->options.path;
	u64 end = 0;
	size_t size;
	u8 *file = read_file(path, &size);
	const Elf64_Ehdr *header = (const Elf64_Ehdr *)file;

	if (size < sizeof(*header) || memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_type != ET_EXEC ||
	    header->e_machine != EM_X86_64 || header->e_phentsize != sizeof(Elf64_Phdr) ||
	    header->e_phoff > size || header->e_phnum * sizeof(Elf64_Phdr) > size - header->e_phoff)
		die("%s is not an ET_EXEC for x86-64", path);
	for (unsigned i = 0; i < header->e_phnum; i++) {
		const Elf64_Phdr *segment = (const Elf64_Phdr *)(file + header->e_phoff) + i;

		if (segment->p_type != PT_LOAD)
			continue;
		if (segment->p_offset > size || segment->p_filesz > size - segment->p_offset ||
		    segment->p_filesz > segment->p_memsz || segment->p_paddr < (1ull << 20) - PAGE ||
		    segment->p_paddr > machine->options.memory_size ||
		    segment->p_memsz > machine->options.memory_size - segment->p_paddr)
			die("%s: segment %u does not fit", path, i);
		memcpy(machine->side[PRIVATE] + segment->p_paddr, file + segment->p_offset, segment->p_filesz);
		if (segment->p_paddr + segment->p_memsz > end)
			end = segment->p_paddr + segment->p_memsz;
	}
	machine->entry = header->e_entry;
	free(file);
	return round_up(end, PAGE);
}

/* Build the page tables at gpa; returns their end. Tables are private memory: links carry the C-bit. */
static u64 build_tables(struct machine *machine, u64 gpa)
{
	u64 gigabytes = machine->options.memory_size / GIB + 1;
	u8 *memory = machine->side[PRIVATE];
	u64 *top = (u64 *)(memory + gpa), next = gpa + PAGE;

	if (gigabytes < 4)
		gigabytes = 4;
	machine->cr3 = gpa | machine->c_bit;
	for (int view = PRIVATE; view >= SHARED; view--) {
		u64 leaf = (view == PRIVATE ? machine->c_bit : 0) | ENTRY_BITS | LARGE_PAGE;
		u64 pointers = next;

		next += round_up(gigabytes, ENTRIES) / ENTRIES * PAGE;
		for (u64 table = pointers; table < next; table += PAGE)
			top[(view == PRIVATE ? 0 : SHARED_OFFSET / GIB / ENTRIES) + (table - pointers) / PAGE] =
				table | machine->c_bit | ENTRY_BITS;
		for (u64 i = 0; i < gigabytes; i++) {
			u64 *entry = (u64 *)(memory + pointers) + i;

			if (machine->gigabyte_pages) {
				*entry = i * GIB | leaf;
				continue;
			}
			*entry = next | machine->c_bit | ENTRY_BITS;
			for (u64 j = 0; j < ENTRIES; j++)
				((u64 *)(memory + next))[j] = i * GIB | j << 21 | leaf;
			next += PAGE;
		}
	}
	return next;
}

void load_payload(struct machine *machine)
{
	u64 memory_size = machine->options.memory_size, image_end = load_image(machine), end;
	struct boot_information *information;

	/* At most: both views with 2 MiB pages, boot information, stacks. */
	if (image_end + (16 + 4 * (memory_size / GIB + 4)) * PAGE + machine->options.vcpus * (16ull << 10) > memory_size)
		die("%llu bytes of memory are too few", (unsigned long long)memory_size);
	machine->boot_information = build_tables(machine, image_end);
	machine->stacks = machine->boot_information + PAGE;
	end = machine->stacks + machine->options.vcpus * (16ull << 10);
	if (memory_size >= 16ull << 20)
		end = round_up(end, BLOCK);
	machine->first_free = end;

	information = (struct boot_information *)(machine->side[PRIVATE] + machine->boot_information);
	*information = (struct boot_information){
		.magic = 0x31304f464e49564bull,
		.version = 1,
		.vcpus = machine->options.vcpus,
		.memory_size = memory_size,
		.shared_offset = SHARED_OFFSET,
		.first_free = machine->first_free,
		.c_bit = machine->c_bit_position,
		.flags = 1,
	};
	memcpy(information->arguments, machine->options.arguments, sizeof(information->arguments));
}
