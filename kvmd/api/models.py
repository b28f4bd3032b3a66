"""What the API takes and gives, as pydantic models: the OpenAPI document is made of them.

What is taken is strict and refuses unknown fields. What is given may grow fields in later versions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvmd.fleet.base import MachineState
from kvmd.network.spec import ADDRESSES_LIMIT, MTU_LEAST, MTU_MOST, NETWORKS_LIMIT
from kvmd.spec.disks import DISKS_LIMIT
from kvmd.spec.limits import TASKS_LIMIT, VCPU_LIMIT
from kvmd.spec.machine import AGENT_LIMIT, ARGUMENT_LIMIT, BUILTIN_PREFIX, NAME_PATTERN

SIZE_PATTERN = "^[0-9]{1,15}[KMGT]?$"

Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
U64 = Annotated[int, Field(ge=0, lt=1 << 64)]
Size = (
    Annotated[int, Field(ge=0, lt=1 << 53, description="bytes")]
    | Annotated[str, Field(pattern=SIZE_PATTERN, description="with K, M, G or T, powers of 1024", examples=["64M"])]
)


class Request(BaseModel):
    """Base of what is taken."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Answer(BaseModel):
    """Base of what is given."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)


# -- machines ----------------------------------------------------------------------------------------------------------


class ConversionRequest(Request):
    """Bounds on conversions; see config/pingpong.toml."""

    chunk: Size | None = None
    no_progress_limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_ranges: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    implicit: Literal["allow", "keep-explicit", "deny"] | None = None
    rate: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


FileName = Annotated[str, Field(min_length=1, max_length=4096)]


class DiskRequest(Request):
    """A disk of a Linux guest; see config/linux-disk.toml."""

    path: FileName = Field(description="a raw image in a folder that is allowed for disks")
    read_only: bool | None = None
    direct: bool | None = None


class NetworkRequest(Request):
    """A network of a Linux guest; see config/linux-bridge.toml."""

    kind: Literal["bridge", "made-bridge", "namespace"] | None = None
    bridge: Annotated[str, Field(max_length=15)] | None = None
    tap: Annotated[str, Field(max_length=15)] | None = None
    mac: Annotated[str, Field(max_length=17)] | None = None
    mtu: Annotated[int, Field(ge=MTU_LEAST, le=MTU_MOST)] | None = None
    addresses: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=ADDRESSES_LIMIT)] | None = None
    isolated: bool | None = None


class LimitsRequest(Request):
    """What the machine's process may take of the host; see config/limits.toml."""

    memory: Size | None = Field(default=None, description="in total, guest memory included; at least 64M")
    cpus: Annotated[float, Field(gt=0, le=VCPU_LIMIT)] | None = Field(
        default=None, description="processors, such as 1.5"
    )
    tasks: Annotated[int, Field(ge=1, le=TASKS_LIMIT)] | None = Field(
        default=None, description="threads; at least 16 more than vCPUs"
    )


class MachineRequest(Request):
    """A machine to create: what the TOML file of `kvmd run` says."""

    image: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description=f"`{BUILTIN_PREFIX}` and the name of a built-in guest; a file in an allowed folder; or, where the "
        "request carries an open file, its name",
    )
    kernel: FileName | None = Field(
        default=None,
        description="for Linux, in place of `image`: a bzImage or an ELF vmlinux, in an allowed folder or passed "
        "likewise",
    )
    initrd: FileName | None = Field(default=None, description="of Linux, in an allowed folder")
    cmdline: Annotated[str, Field(max_length=65536)] | None = Field(default=None, description="of Linux")
    disks: Annotated[list[DiskRequest], Field(max_length=DISKS_LIMIT)] | None = None
    networks: Annotated[list[NetworkRequest], Field(max_length=NETWORKS_LIMIT)] | None = None
    entropy: bool | None = None
    balloon: bool | None = None
    balloon_target: Size | None = Field(default=None, description="what the guest is to do without from the start")
    agent: Annotated[str, Field(max_length=AGENT_LIMIT)] | None = Field(
        default=None,
        description="of Linux, the name of a port: a program in the guest opens `/dev/virtio-ports/NAME`",
        examples=["org.qemu.guest_agent.0"],
    )
    name: Name | None = Field(default=None, description="by default made of the image's")
    vcpus: Annotated[int, Field(ge=1, le=VCPU_LIMIT)] | None = None
    memory: Size | None = None
    accelerator: Literal["auto", "kvm", "software"] | None = None
    protection: Literal["emulated", "guest-memfd", "auto", "none"] | None = None
    tripwire: Literal["auto", "attribute", "guest_memfd", "hole"] | None = None
    initial: Literal["private", "shared"] | None = None
    cpl: Literal[0, 3] | None = None
    arguments: Annotated[list[U64], Field(max_length=ARGUMENT_LIMIT)] | None = None
    conversion: ConversionRequest | None = None
    limits: LimitsRequest | None = None

    def document(self) -> dict[str, object]:
        """Return it as ``kvmd.spec.machine.spec_of`` wants it."""
        return self.model_dump(exclude_none=True)


class ConversionBounds(Answer):
    """Bounds on conversions, as they are in force."""

    chunk: int
    no_progress_limit: int
    max_ranges: int
    implicit: str
    rate: int | None = Field(description="changes a second, null for no limit")


class Limits(Answer):
    """What the machine's process may take of the host; null for no limit."""

    memory: int | None = Field(description="bytes, guest memory included")
    cpus: float | None
    tasks: int | None


class Spec(Answer):
    """What a machine is made of; sizes in bytes."""

    image: str
    vcpus: int
    memory: int
    accelerator: str
    protection: str
    tripwire: str
    initial: str
    cpl: int
    arguments: list[int]
    conversion: ConversionBounds
    initrd: str | None
    cmdline: str
    disks: list[str]
    networks: list[str]
    entropy: bool
    balloon: bool
    balloon_target: int
    agent: str = Field(description="the name of the agent's port; empty where there is none")
    limits: Limits


class End(Answer):
    """How a machine ended."""

    reason: str = Field(examples=["guest-exit", "process-died", "out-of-memory"])
    message: str
    status: int = Field(description="exit status, 0 to 255")
    signal: int | None = Field(description="that ended the process")
    time: str


class Machine(Answer):
    """A machine as it is now."""

    name: str
    state: MachineState
    spec: Spec
    owner_uid: int = Field(description="who created it")
    created: str = Field(description="RFC 3339, UTC")
    started: str | None
    pid: int | None = Field(description="of its process; null once that has ended")
    facts: dict[str, Any] = Field(description="what its process said when it opened: protection, tripwire and so on")
    end: End | None


class Machines(Answer):
    """All machines, by name."""

    machines: list[Machine]


class Waited(Answer):
    """What a wait came to."""

    reached: bool = Field(description="false where the time was over first")
    machine: Machine


# -- a guest's devices -------------------------------------------------------------------------------------------------


class BalloonRequest(Request):
    """What a guest is asked to do without."""

    target: Size = Field(description="in whole pages, less than the machine's memory")


class Balloon(Answer):
    """Memory that a guest does without; bytes."""

    target: int = Field(description="what it is asked for")
    actual: int = Field(description="what it says that it does without")
    given_back: int = Field(
        description="what the host has taken back so far: of the balloon, and of pages that were reported as free"
    )
    held: int = Field(description="what the guest's memory takes up of the host's now")


# -- memory and conversions --------------------------------------------------------------------------------------------


class MemoryRange(Answer):
    """Memory in one state."""

    gpa: str = Field(description="start, hexadecimal", examples=["0x200000"])
    size: int = Field(description="bytes")
    state: Literal["private", "shared"]
    pinned: bool = Field(description="whether it never converts: image, page tables, stacks, boot information")


class MemoryMap(Answer):
    """The state of guest memory, as the fewest ranges of one kind, in order."""

    ranges: list[MemoryRange]
    next: str | None = Field(description="the `from` of the next part; null at the end of memory")


class Conversion(Answer):
    """One answered request for a conversion."""

    sequence: int
    time: str
    monotonic_ns: int
    machine: str
    vcpu: int
    cause: Literal["implicit", "explicit"]
    gpa: str
    size: int
    from_: str | None = Field(alias="from", description="null where the range was not all in one state")
    to: Literal["private", "shared"]
    outcome: Literal["converted", "spurious", "stale", "refused", "failed"]
    merged: int
    waiting_us: float
    applying_us: float
    discarding_us: float


class Conversions(Answer):
    """Recent conversions, oldest first."""

    conversions: list[Conversion]
    next: int = Field(description="the `since` of the next page; the same again where there is nothing new")
    more: bool = Field(description="whether there was more than was looked at")
    lost: int = Field(description="how many after `since` were forgotten already")


class Requests(Answer):
    """How many requests for conversions had this cause, direction and outcome."""

    cause: str
    to: str
    outcome: str
    count: int


class Latency(Answer):
    """Percentiles and the maximum, in microseconds."""

    p50: float
    p90: float
    p99: float
    max: float


class HotRange(Answer):
    """Memory that was converted often."""

    gpa: str
    size: int
    count: int = Field(description="conversions; at most `overcount` too high, never too low")
    overcount: int


class MachineCounters(Answer):
    """What a machine did so far."""

    requests: list[Requests]
    shared_bytes: int
    private_bytes: int
    waiting_us: Latency
    applying_us: Latency
    discarding_us: Latency
    held_back_us: int = Field(
        description="how long vCPUs were kept out of the guest by `conversion.rate`, all together, in microseconds"
    )
    lost: int = Field(description="records that were dropped before they were counted")
    hottest: list[HotRange] = Field(description="what was converted most, hottest first; a handful")


class NamedCounters(Answer):
    """A machine, and what it did so far."""

    name: str
    state: MachineState
    counters: MachineCounters | None = Field(description="null where it did not say so within a second")


class AllCounters(Answer):
    """What all machines did so far, by name."""

    machines: list[NamedCounters]


# -- host and problems -------------------------------------------------------------------------------------------------


class Usable(Answer):
    """Whether something works here, and why not."""

    usable: bool
    problem: str | None


class Capability(Answer):
    """One capability of KVM."""

    name: str
    vm_type: str | None
    value: int | None
    problem: str | None
    required: bool
    purpose: str
    without: str


class HostFacts(Answer):
    """What the host can do: `kvmd check --json`, asked when the daemon started."""

    usable: bool
    problem: str | None = Field(default=None, description="why nothing more is known")
    accelerators: dict[str, Usable] = {}
    accelerator: str | None = Field(default=None, description="that `auto` takes")
    fault_layout: str | None = None
    tripwires: list[str] = []
    protections: dict[str, Usable] = {}
    auto: str | None = None
    networks: dict[str, Usable] = Field(default={}, description="of Linux guests: `bridges`, `namespaces`")
    max_vcpus: int = 0
    recommended_vcpus: int = 0
    memslots: int = 0
    capabilities: list[Capability] = []


class Host(Answer):
    """The daemon and its host."""

    version: str = Field(description="of kvmd")
    host: HostFacts


class Mistake(Answer):
    """One mistake in a request."""

    where: str = Field(examples=["body.vcpus"])
    problem: str


class ProblemDocument(Answer):
    """Why a request was refused (RFC 9457)."""

    type: str = Field(description="stable; docs/api.md lists them", examples=["urn:kvmd:problem:unknown-machine"])
    title: str
    status: int
    detail: str
    needed: str | None = Field(default=None, description="of wrong-state: the states that the action works in")
    found: str | None = Field(default=None, description="of wrong-state: the state that the machine is in")
    gpa: str | None = Field(default=None, description="of private-memory: the first private page")
    errors: list[Mistake] | None = Field(default=None, description="of invalid-request: each mistake")
