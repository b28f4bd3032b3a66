/*
 * The first and only process of a Linux guest: an agent that answers a line on the port kvmd.agent, and that powers off
 * when somebody presses the power button.
 *
 *   hello        hello from the guest
 *   use N        touch N MiB, give them back to the kernel, and say "used"
 *   free         free memory in MiB
 */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/sysinfo.h>
#include <unistd.h>

static int find_port(void)
{
	char path[64], name[64];

	for (int device = 0; device < 32; device++) {
		snprintf(path, sizeof(path), "/sys/class/virtio-ports/vport%dp1/name", device);
		FILE *file = fopen(path, "r");
		int found = file && fgets(name, sizeof(name), file) && !strcmp(name, "kvmd.agent\n");
		if (file)
			fclose(file);
		if (!found)
			continue;
		snprintf(path, sizeof(path), "/dev/vport%dp1", device);
		return open(path, O_RDWR);
	}
	return -1;
}

/* How often the event device has told of the button: its interrupts, on all processors. */
static long presses(void)
{
	char line[512];
	long sum = 0;
	FILE *file = fopen("/proc/interrupts", "r");

	while (file && fgets(line, sizeof(line), file)) {
		char *at = strchr(line, ':');
		if (!at || !strstr(line, "ACPI:Ged"))
			continue;
		for (long count; sscanf(at + 1, " %ld", &count) == 1; at += strspn(at + 1, " ") + strcspn(at + 1 + strspn(at + 1, " "), " "))
			sum += count;
	}
	if (file)
		fclose(file);
	return sum;
}

static void answer(int port, char *asked)
{
	char text[128] = "what?\n";
	struct sysinfo info;

	if (!strncmp(asked, "hello", 5)) {
		strcpy(text, "hello from the guest\n");
	} else if (!strncmp(asked, "use ", 4)) {
		size_t size = strtoul(asked + 4, 0, 10) << 20;
		char *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		memset(memory, 1, size);
		munmap(memory, size);
		strcpy(text, "used\n");
	} else if (!strncmp(asked, "free", 4)) {
		sysinfo(&info);
		snprintf(text, sizeof(text), "%lu\n", (unsigned long)(info.freeram * info.mem_unit >> 20));
	}
	if (write(port, text, strlen(text)) < 0)
		perror("write");
}

int main(void)
{
	char line[256];

	mount("proc", "/proc", "proc", 0, 0);
	mount("sysfs", "/sys", "sysfs", 0, 0);
	mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
	/* The device tells of its port by messages, which may come after we do. */
	int port = find_port();
	for (int tries = 0; port < 0 && tries < 600; tries++) {
		poll(0, 0, 100);
		port = find_port();
	}
	printf("agent: port %s, button %s\n", port < 0 ? "missing" : "there",
	       access("/sys/bus/acpi/devices/PNP0C0C:00", F_OK) ? "missing" : "there");
	fflush(stdout);
	for (long before = presses();;) {
		struct pollfd look = { port, POLLIN, 0 };
		if (poll(&look, 1, 200) > 0 && look.revents & POLLIN) {
			ssize_t size = read(port, line, sizeof(line) - 1);
			if (size > 0) {
				line[size] = 0;
				answer(port, line);
			} else {
				/* Nobody is connected: poll() says at once, and for ever, that there is an end to be read. */
				poll(0, 0, 200);
			}
		} else if (look.revents & POLLHUP) {
			poll(0, 0, 200);
		}
		if (presses() != before) {
			printf("agent: the power button was pressed\n");
			fflush(stdout);
			reboot(RB_POWER_OFF);
		}
	}
}
