/* hello: say how large the machine is. */
#include "lib.h"

int guest_main(u64 vcpu)
{
	if (vcpu != 0)
		return STATUS_OK;
	if (boot->magic != BOOT_MAGIC || boot->version != 1) {
		print("hello: the boot information is not of version 1");
		return STATUS_WRONG;
	}
	print("hello from a machine of %u vCPUs and %u MiB", (u64)boot->vcpus, boot->memory_size >> 20);
	return STATUS_OK;
}
