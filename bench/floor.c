/* floor: run a payload with conversions in C, and say what they cost. See floor.h for how to build it.
 *
 *   floor [--mode thread|service|early|placed] [--vcpus N] [--memory BYTES] [--tripwire guest_memfd|hole]
 *         [--kick cut|always] [--cpl 0|3] [--skip K] [--timeout SECONDS] [--arg N]... GUEST.elf
 *
 * A conversion is made by the faulting thread, or by one service thread for all (`service`). In mode `early` that one
 * answers as soon as the page is there, as kvmd's does: it discards the side left behind, and makes the guest_memfd of
 * the next tripwire, while the guest goes on; in mode `placed` besides from the boot CPU, where the kernel completes the
 * grace periods that a deleted memslot waits for, and a single vCPU's thread is there, too.
 *
 * The guest's console goes to standard error; standard output gets one line of JSON:
 *
 *   conversions        implicit conversions, all of them
 *   us_first_round     wall time of the first K (--skip K) of them, each, in microseconds; null without K
 *   us_per_conversion  wall time of the others, each: from the end of the Kth (or the start of the first) to the
 *                      end of the last, so the guest's own time is in it
 *   us_in_kvm          mean time of the others within slot and discard calls
 *   us_in_kvm_first    the same of the first K
 *   spurious           exits that found the page converted by another vCPU
 *   completed_mmio     accesses to memory that came as MMIO and were done here
 *   cuts               pieces cut out of blocks
 *   explicit           explicit requests
 *   discards           sides left behind that were given back: one for each conversion
 *   slot_calls         memslots deleted and created for all that, each a call; 4 for a page that is swapped
 *   guest_memfds       made for tripwires
 *   pauses             times that all vCPUs were kept out of KVM_RUN: one for each cut, as in kvmd; with --kick always
 *                      for each conversion
 *   taken_out          vCPUs that were inside then, and were made to leave
 *   status             the machine's exit status: the highest of its vCPUs', or 120 where it was stopped
 *   stopped            why, or null
 */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define STATUS_STOPPED 120

_Noreturn void die(const char *format, ...)
{
	va_list values;

	fputs("floor: ", stderr);
	va_start(values, format);
	vfprintf(stderr, format, values);
	va_end(values);
	fputc('\n', stderr);
	exit(STATUS_STOPPED);
}

double now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static u64 number(const char *text)
{
	char *end;
	u64 value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || *end)
		die("%s is not a number", text);
	return value;
}

static unsigned small_number(const char *text)
{
	u64 value = number(text);

	if (value > UINT_MAX)
		die("%s is too much", text);
	return value;
}

/* 0 or 1: which of the two words. */
static bool choose(const char *option, const char *text, const char *no, const char *yes)
{
	if (strcmp(text, no) != 0 && strcmp(text, yes) != 0)
		die("--%s is %s or %s", option, no, yes);
	return strcmp(text, yes) == 0;
}

static struct options parse_options(int argc, char **argv)
{
	static const struct option names[] = {
		{"mode", required_argument, NULL, 'm'},   {"vcpus", required_argument, NULL, 'v'},
		{"memory", required_argument, NULL, 's'}, {"tripwire", required_argument, NULL, 't'},
		{"kick", required_argument, NULL, 'k'},   {"cpl", required_argument, NULL, 'c'},
		{"skip", required_argument, NULL, 'n'},   {"timeout", required_argument, NULL, 'o'},
		{"arg", required_argument, NULL, 'a'},    {NULL, 0, NULL, 0},
	};
	struct options options = {.vcpus = 1, .cpl = 3, .timeout_seconds = 60, .memory_size = 64ull << 20};
	unsigned arguments = 0;
	int option;

	while ((option = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (option) {
		case 'm':
			options.placed = strcmp(optarg, "placed") == 0;
			options.early = options.placed || strcmp(optarg, "early") == 0;
			options.service = options.early || choose("mode", optarg, "thread", "service");
			break;
		case 'v':
			options.vcpus = small_number(optarg);
			break;
		case 's':
			options.memory_size = number(optarg);
			break;
		case 't':
			options.hole = choose("tripwire", optarg, "guest_memfd", "hole");
			break;
		case 'k':
			options.kick_always = choose("kick", optarg, "cut", "always");
			break;
		case 'c':
			options.cpl = choose("cpl", optarg, "0", "3") ? 3 : 0;
			break;
		case 'n':
			options.skip = number(optarg);
			break;
		case 'o':
			options.timeout_seconds = small_number(optarg);
			break;
		case 'a':
			if (arguments == 8)
				die("at most 8 arguments");
			options.arguments[arguments++] = number(optarg);
			break;
		default:
			exit(STATUS_STOPPED);
		}
	}
	if (optind != argc - 1)
		die("give one GUEST.elf");
	options.path = argv[optind];
	if (options.vcpus < 1 || options.vcpus > MAX_VCPUS)
		die("--vcpus is 1 to %d", MAX_VCPUS);
	if (options.memory_size % PAGE || options.memory_size < 2ull << 20)
		die("--memory is a multiple of 4096, at least 2 MiB");
	return options;
}

static void map_memory(struct machine *machine)
{
	u64 size = machine->options.memory_size;

	for (int view = SHARED; view <= PRIVATE; view++) {
		machine->side_fd[view] = memfd_create(view == PRIVATE ? "private" : "shared", MFD_CLOEXEC);
		if (machine->side_fd[view] < 0 || ftruncate(machine->side_fd[view], size))
			die("memfd: %s", strerror(errno));
		machine->side[view] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
					   machine->side_fd[view], 0);
		if (machine->side[view] == MAP_FAILED)
			die("mmap: %s", strerror(errno));
	}
	machine->nothing = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (machine->nothing == MAP_FAILED)
		die("mmap: %s", strerror(errno));
}

static void print_mean(const char *name, double microseconds, u64 count)
{
	if (count)
		printf("\"%s\": %.1f, ", name, microseconds / count);
	else
		printf("\"%s\": null, ", name);
}

static int report(const struct machine *machine)
{
	const struct options *options = &machine->options;
	const struct statistics *statistics = &machine->statistics;
	u64 skipped = options->skip < statistics->conversions ? options->skip : statistics->conversions;
	u64 rest = statistics->conversions - skipped;
	int status = 0;

	for (unsigned i = 0; i < options->vcpus; i++)
		if (machine->vcpus[i].status > status)
			status = machine->vcpus[i].status;
	if (machine->stopped)
		status = STATUS_STOPPED;
	printf("{\"mode\": \"%s\", \"tripwire\": \"%s\", \"kick\": \"%s\", \"vcpus\": %u, \"memory\": %llu, ",
	       options->placed ? "placed" : options->early ? "early" : options->service ? "service" : "thread",
	       options->hole ? "hole" : "guest_memfd",
	       options->kick_always ? "always" : "cut", options->vcpus, (unsigned long long)options->memory_size);
	printf("\"quirk_disabled\": %s, \"conversions\": %llu, ", machine->quirk_disabled ? "true" : "false",
	       (unsigned long long)statistics->conversions);
	print_mean("us_first_round", statistics->skipped - statistics->first, skipped);
	print_mean("us_per_conversion", statistics->last - (skipped ? statistics->skipped : statistics->first), rest);
	print_mean("us_in_kvm_first", statistics->in_kvm_first, skipped);
	print_mean("us_in_kvm", statistics->in_kvm, rest);
	printf("\"spurious\": %llu, \"completed_mmio\": %llu, \"cuts\": %llu, \"explicit\": %llu, "
	       "\"discards\": %llu, \"slot_calls\": %llu, \"guest_memfds\": %llu, \"pauses\": %llu, \"taken_out\": %llu, ",
	       (unsigned long long)statistics->spurious, (unsigned long long)statistics->completed_mmio,
	       (unsigned long long)statistics->cuts, (unsigned long long)statistics->explicit_requests,
	       (unsigned long long)statistics->discards, (unsigned long long)statistics->slot_calls,
	       (unsigned long long)statistics->guest_memfds, (unsigned long long)statistics->pauses,
	       (unsigned long long)statistics->taken_out);
	printf("\"status\": %d, \"stopped\": ", status);
	if (machine->stopped)
		printf("\"%s\"}\n", machine->stopped);
	else
		printf("null}\n");
	return status;
}

int main(int argc, char **argv)
{
	static struct machine machine = {
		.lock = PTHREAD_MUTEX_INITIALIZER,
		.gate = PTHREAD_MUTEX_INITIALIZER,
		.gate_changed = PTHREAD_COND_INITIALIZER,
		.console = PTHREAD_MUTEX_INITIALIZER,
	};

	machine.options = parse_options(argc, argv);
	open_machine(&machine);
	map_memory(&machine);
	load_payload(&machine);
	build_memory(&machine);
	for (unsigned i = 0; i < machine.options.vcpus; i++) {
		machine.vcpus[i] = (struct vcpu){.index = i, .status = -1};
		open_vcpu(&machine, &machine.vcpus[i]);
	}
	run_machine(&machine);
	return report(&machine);
}
