/* vCPU threads, the gate that keeps them out of the guest, and the service thread of modes `service` and `early`. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#define EXIT_MEMORY_FAULT 39
#define KICK SIGUSR1

#define PORT_CONSOLE 0x3F8
#define PORT_LSR 0x3FD
#define PORT_HYPERCALL 0xC2
#define PORT_EXIT 0xF4

/* One conversion asked of the service thread. */
struct request {
	struct request *next;
	struct access *access; /* NULL: an explicit conversion of these */
	u64 gpa, pages, attributes, result;
	const char *stop;
	bool done;
	pthread_cond_t answered;
};

static struct {
	pthread_mutex_t lock;
	pthread_cond_t asked;
	struct request *first, **last;
	bool closing;
} service = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.asked = PTHREAD_COND_INITIALIZER,
	.last = &service.first,
};

/* On the CPU that boots Linux, which is number 0 on x86; where the thread may not be there, it stays where it is. */
static void go_to_boot_cpu(pthread_t thread)
{
	cpu_set_t there;

	CPU_ZERO(&there);
	CPU_SET(0, &there);
	pthread_setaffinity_np(thread, sizeof(there), &there);
}

static void carry_out(struct machine *machine, struct request *request)
{
	pthread_mutex_lock(&machine->lock);
	if (request->access)
		request->stop = convert_for_access(machine, request->access);
	else
		request->result = convert_range(machine, request->gpa, request->pages, request->attributes);
	pthread_mutex_unlock(&machine->lock);
}

static void *serve(void *argument)
{
	struct machine *machine = argument;

	pthread_mutex_lock(&service.lock);
	for (;;) {
		struct request *request = service.first;

		if (!request) {
			if (service.closing)
				break;
			pthread_cond_wait(&service.asked, &service.lock);
			continue;
		}
		service.first = request->next;
		if (!service.first)
			service.last = &service.first;
		pthread_mutex_unlock(&service.lock);
		carry_out(machine, request);
		pthread_mutex_lock(&service.lock);
		request->done = true;
		pthread_cond_signal(&request->answered);
		if (machine->options.early) {
			pthread_mutex_unlock(&service.lock);
			pthread_mutex_lock(&machine->lock);
			clear_up(machine);
			pthread_mutex_unlock(&machine->lock);
			pthread_mutex_lock(&service.lock);
		}
	}
	pthread_mutex_unlock(&service.lock);
	return NULL;
}

static void ask(struct machine *machine, struct request *request)
{
	if (!machine->options.service) {
		carry_out(machine, request);
		return;
	}
	pthread_cond_init(&request->answered, NULL);
	pthread_mutex_lock(&service.lock);
	*service.last = request;
	service.last = &request->next;
	pthread_cond_signal(&service.asked);
	while (!request->done)
		pthread_cond_wait(&request->answered, &service.lock);
	pthread_mutex_unlock(&service.lock);
	pthread_cond_destroy(&request->answered);
}

/* The order matters: immediate_exit is what stops a vCPU that has not entered the guest yet, the signal is what
 * gets one out that has. The signal is blocked but for the time within KVM_RUN, so it cannot be lost between. */
static unsigned kick_all(struct machine *machine)
{
	unsigned kicked = 0;

	for (unsigned i = 0; i < machine->options.vcpus; i++) {
		struct vcpu *vcpu = &machine->vcpus[i];

		if (!vcpu->inside || vcpu->kicked)
			continue;
		vcpu->kicked = true;
		__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		pthread_kill(vcpu->thread, KICK);
		kicked++;
	}
	return kicked;
}

static bool any_inside(struct machine *machine)
{
	for (unsigned i = 0; i < machine->options.vcpus; i++)
		if (machine->vcpus[i].inside)
			return true;
	return false;
}

/* Called under machine.lock, by a thread that is not inside. */
void pause_vcpus(struct machine *machine)
{
	pthread_mutex_lock(&machine->gate);
	machine->paused = true;
	machine->statistics.pauses++;
	machine->statistics.taken_out += kick_all(machine);
	while (any_inside(machine))
		pthread_cond_wait(&machine->gate_changed, &machine->gate);
	pthread_mutex_unlock(&machine->gate);
}

void resume_vcpus(struct machine *machine)
{
	pthread_mutex_lock(&machine->gate);
	machine->paused = false;
	pthread_cond_broadcast(&machine->gate_changed);
	pthread_mutex_unlock(&machine->gate);
}

static void stop_machine(struct machine *machine, const char *reason)
{
	pthread_mutex_lock(&machine->gate);
	if (!machine->stopped)
		machine->stopped = reason;
	kick_all(machine);
	pthread_cond_broadcast(&machine->gate_changed);
	pthread_mutex_unlock(&machine->gate);
}

/* False where the machine has been stopped. */
static bool enter_gate(struct machine *machine, struct vcpu *vcpu)
{
	bool go;

	pthread_mutex_lock(&machine->gate);
	while (machine->paused && !machine->stopped)
		pthread_cond_wait(&machine->gate_changed, &machine->gate);
	go = !machine->stopped;
	vcpu->inside = go;
	pthread_mutex_unlock(&machine->gate);
	return go;
}

static void leave_gate(struct machine *machine, struct vcpu *vcpu)
{
	pthread_mutex_lock(&machine->gate);
	vcpu->inside = false;
	if (vcpu->kicked) { /* the signal was sent under this lock, so it is pending */
		const struct timespec at_once = {0};
		sigset_t kick;

		sigemptyset(&kick);
		sigaddset(&kick, KICK);
		sigtimedwait(&kick, NULL, &at_once);
		vcpu->kicked = false;
		vcpu->run->immediate_exit = 0;
	}
	if (machine->paused)
		pthread_cond_broadcast(&machine->gate_changed);
	pthread_mutex_unlock(&machine->gate);
}

static const char *access_memory(struct machine *machine, u64 gpa, bool mmio, bool is_write, u8 *data, u32 size)
{
	struct access access = {.gpa = gpa, .mmio = mmio, .is_write = is_write, .data = data, .size = size};
	struct request request = {.access = &access};

	ask(machine, &request);
	return request.stop;
}

static void explicit_conversion(struct machine *machine, struct vcpu *vcpu)
{
	struct request request = {0};
	struct kvm_regs regs;

	if (ioctl(vcpu->fd, KVM_GET_REGS, &regs))
		die("KVM_GET_REGS: %s", strerror(errno));
	if ((regs.rax & 0xff) != 12)
		return;
	request.gpa = regs.rbx;
	request.pages = regs.rcx;
	request.attributes = regs.rdx;
	ask(machine, &request);
	regs.rax = request.result;
	if (ioctl(vcpu->fd, KVM_SET_REGS, &regs))
		die("KVM_SET_REGS: %s", strerror(errno));
}

/* True where the vCPU has ended. */
static bool handle_port(struct machine *machine, struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	u8 *data = (u8 *)run + run->io.data_offset;
	size_t size = (size_t)run->io.size * run->io.count;

	if (run->io.direction == KVM_EXIT_IO_IN) {
		memset(data, run->io.port == PORT_LSR && run->io.size == 1 ? 0x60 : 0xff, size);
		return false;
	}
	switch (run->io.port) {
	case PORT_CONSOLE:
		pthread_mutex_lock(&machine->console);
		fwrite(data, 1, size, stderr);
		pthread_mutex_unlock(&machine->console);
		return false;
	case PORT_HYPERCALL:
		explicit_conversion(machine, vcpu);
		return false;
	case PORT_EXIT:
		vcpu->status = data[0];
		return true;
	default:
		return false;
	}
}

/* What KVM_EXIT_MEMORY_FAULT says, which older headers do not have. */
static u64 fault_gpa(const struct kvm_run *run)
{
	struct {
		u64 flags, gpa, size;
	} fault;

	memcpy(&fault, &run->hw, sizeof(fault)); /* any member gives the union's address */
	return fault.gpa;
}

/* True where the vCPU has ended. */
static bool handle_exit(struct machine *machine, struct vcpu *vcpu, int result, int error)
{
	struct kvm_run *run = vcpu->run;
	const char *stop = NULL;

	if (result < 0) {
		if (error == EINTR || error == EAGAIN)
			return false;
		if (error == EFAULT && run->exit_reason == EXIT_MEMORY_FAULT)
			stop = access_memory(machine, fault_gpa(run), false, false, NULL, 0);
		else
			stop = strerrorname_np(error);
	} else {
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			return handle_port(machine, vcpu);
		case KVM_EXIT_MMIO:
			stop = access_memory(machine, run->mmio.phys_addr, true, run->mmio.is_write, run->mmio.data,
					     run->mmio.len);
			break;
		case KVM_EXIT_HLT:
			stop = "halted";
			break;
		case KVM_EXIT_SHUTDOWN:
			stop = "triple fault";
			break;
		case KVM_EXIT_INTERNAL_ERROR:
			stop = run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? "emulation failure"
										      : "internal error of KVM";
			break;
		default:
			fprintf(stderr, "floor: exit reason %u\n", run->exit_reason);
			stop = "unknown exit";
			break;
		}
	}
	if (stop)
		stop_machine(machine, stop);
	return stop != NULL;
}

struct start {
	struct machine *machine;
	struct vcpu *vcpu;
};

static void *run_vcpu(void *argument)
{
	struct start *start = argument;
	struct machine *machine = start->machine;
	struct vcpu *vcpu = start->vcpu;

	while (enter_gate(machine, vcpu)) {
		int result, error;

		vcpu->run->exit_reason = 0; /* stale after most errors */
		result = ioctl(vcpu->fd, KVM_RUN, 0);
		error = errno;
		leave_gate(machine, vcpu);
		if (handle_exit(machine, vcpu, result, error))
			break;
	}
	return NULL;
}

/* Where each vCPU was when the machine was stopped, for whoever wants to know why. */
static void print_registers(const struct machine *machine)
{
	struct kvm_regs regs;

	for (unsigned i = 0; i < machine->options.vcpus; i++) {
		const struct vcpu *vcpu = &machine->vcpus[i];

		if (vcpu->status < 0 && ioctl(vcpu->fd, KVM_GET_REGS, &regs) == 0)
			fprintf(stderr, "floor: vCPU %u: rip %#llx rax %#llx rcx %#llx rsi %#llx rdi %#llx\n", i, regs.rip,
				regs.rax, regs.rcx, regs.rsi, regs.rdi);
	}
}

void run_machine(struct machine *machine)
{
	struct start starts[MAX_VCPUS];
	struct timespec deadline;
	pthread_t server;
	sigset_t kick;

	sigemptyset(&kick);
	sigaddset(&kick, KICK);
	pthread_sigmask(SIG_BLOCK, &kick, NULL); /* the threads inherit it */
	if (machine->options.service)
		pthread_create(&server, NULL, serve, machine);
	pthread_mutex_lock(&machine->gate); /* no vCPU enters before each has its thread's name */
	for (unsigned i = 0; i < machine->options.vcpus; i++) {
		starts[i] = (struct start){machine, &machine->vcpus[i]};
		if (pthread_create(&machine->vcpus[i].thread, NULL, run_vcpu, &starts[i]))
			die("cannot start a thread");
	}
	if (machine->options.placed) {
		go_to_boot_cpu(server);
		if (machine->options.vcpus == 1)
			go_to_boot_cpu(machine->vcpus[0].thread);
	}
	pthread_mutex_unlock(&machine->gate);
	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += machine->options.timeout_seconds;
	for (unsigned i = 0; i < machine->options.vcpus; i++) {
		if (pthread_clockjoin_np(machine->vcpus[i].thread, NULL, CLOCK_MONOTONIC, &deadline) == 0)
			continue;
		stop_machine(machine, "timed out");
		pthread_join(machine->vcpus[i].thread, NULL);
	}
	if (machine->stopped)
		print_registers(machine);
	if (machine->options.service) {
		pthread_mutex_lock(&service.lock);
		service.closing = true;
		pthread_cond_signal(&service.asked);
		pthread_mutex_unlock(&service.lock);
		pthread_join(server, NULL);
	}
}
