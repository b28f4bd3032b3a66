"""What the lab's scripts decide, without a lab: a copy of them among stand-ins for all that they would start.

The stand-in of vng runs the command on this host, which is as much of a lab as the scripts can tell.
"""

from __future__ import annotations

import os
import platform
import select
import shutil
import signal
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gate import Facility, require_whole

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = ("run", "test", "setup", "build-kernel", "kernel")
UTILITIES = (
    *("awk", "bash", "cat", "cmp", "cp", "dirname", "env", "flock", "grep", "head", "id", "mkdir", "mktemp", "mv"),
    *("nproc", "printf", "realpath", "rm", "sed", "seq", "shuf", "sleep", "sort", "tail", "tar", "taskset", "tee"),
    *("timeout", "true"),
)
"""What the scripts may use of this host; anything else on their PATH is a stand-in."""

QEMU_10 = "echo 'QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)'"
QEMU_7 = "echo 'QEMU emulator version 7.2.17 (Debian 1:7.2+dfsg-7)'"
VNG = """
printf '%s\\n' "$@" >"$SEEN"
while [ "$1" != --exec ]; do shift; done
bash -c "$2"
"""
RECORD = """echo "${0##*/} $*" >>"$SEEN\""""

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
EX_USAGE, EX_NOINPUT, EX_UNAVAILABLE, EX_SOFTWARE, EX_STANDSTILL = 64, 66, 69, 70, 124


@dataclass(frozen=True)
class Bench:
    """A repository with the lab's scripts alone, and a host that has only what a test puts there."""

    root: Path

    @property
    def repository(self) -> Path:
        return self.root / "repository"

    @property
    def build(self) -> Path:
        return self.repository / "build" / "lab"

    @property
    def seen(self) -> str:
        """What the stand-ins wrote down."""
        path = self.root / "seen"
        return path.read_text() if path.exists() else ""

    def stand_in(self, name: str, body: str, folder: Path | None = None) -> None:
        """Put a command of that name, a shell script, where the scripts find it."""
        path = (folder or self.root / "bin") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def without(self, name: str) -> None:
        (self.root / "bin" / name).unlink()

    def kernel(self, path: Path) -> str:
        """Put a kernel there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a kernel\n")
        return str(path)

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        return {"PATH": str(self.root / "bin"), "SEEN": str(self.root / "seen"), **variables}

    def call(self, script: str, *arguments: str, cwd: Path | None = None, **variables: str) -> Ended:
        ended = subprocess.run(  # noqa: S603  the scripts under test
            [self.repository / "lab" / script, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=cwd or self.repository,
            env=self.environment(variables),
            timeout=60,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)


@dataclass(frozen=True)
class Ended:
    """How a script ended, and what it said."""

    status: int
    out: str
    err: str


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Return a bench with all that the lab needs but a kernel."""
    bench = Bench(tmp_path)
    shutil.copytree(REPOSITORY / "lab", bench.repository / "lab")
    (bench.repository / "requirements").mkdir()
    shutil.copy(REPOSITORY / "requirements" / "lab.txt", bench.repository / "requirements")
    (tmp_path / "bin").mkdir()
    for name in UTILITIES:
        real = shutil.which(name)
        if real is None:
            pytest.skip(f"there is no {name}")
        (tmp_path / "bin" / name).symlink_to(real)
    bench.stand_in("qemu-system-x86_64", QEMU_10)
    bench.stand_in("udevadm", "")
    bench.stand_in("vng", VNG)
    return bench


@pytest.fixture
def lab(bench: Bench) -> Bench:
    """Return a bench with all that the lab needs."""
    bench.kernel(bench.build / "bzImage")
    return bench


# The kernel


def test_the_kernel_that_is_named_comes_first_then_the_shared_one_then_the_built_one(bench: Bench) -> None:
    named = bench.kernel(bench.root / "elsewhere" / "vmlinuz")
    shared = bench.root / "shared" / "lab" / "bzImage"
    bench.kernel(shared)
    built = bench.kernel(bench.build / "bzImage")
    assert bench.call("kernel", KVMD_LAB_KERNEL=named) == Ended(0, f"{named}\n", "")
    assert bench.call("kernel", KVMD_LAB_KERNEL="") == Ended(0, f"{shared}\n", "")
    shared.unlink()
    assert bench.call("kernel") == Ended(0, f"{built}\n", "")


@pytest.mark.parametrize("script", [("kernel",), ("run", "true"), ("test",)])
def test_without_a_kernel_one_line_says_how_to_get_one(bench: Bench, script: tuple[str, ...]) -> None:
    bench.stand_in("python", "", bench.repository / ".venv" / "bin")
    ended = bench.call(*script)
    assert ended.status == EX_UNAVAILABLE
    assert ended.out == ""
    assert ended.err.endswith("no kernel: build one with lab/build-kernel, or name one in KVMD_LAB_KERNEL\n")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("script", [("kernel",), ("run", "true")])
def test_a_named_kernel_that_is_not_there_does_not_pass_for_none(lab: Bench, script: tuple[str, ...]) -> None:
    ended = lab.call(*script, KVMD_LAB_KERNEL="/no/such")
    assert ended == Ended(EX_NOINPUT, "", f"lab/{script[0]}: KVMD_LAB_KERNEL=/no/such: no such file\n")


# lab/run: what must be there


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("qemu-system-x86_64", "qemu-system-x86_64 is missing: run lab/setup"),
        ("vng", "vng (virtme-ng) is missing: run lab/setup"),
        ("udevadm", "udevadm (udev) is missing: run lab/setup"),
    ],
)
def test_a_missing_tool_is_named_with_its_remedy(lab: Bench, missing: str, message: str) -> None:
    lab.without(missing)
    assert lab.call("run", "true") == Ended(EX_UNAVAILABLE, "", f"lab/run: {message}\n")
    assert not lab.seen


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (QEMU_7, "QEMU 7 is too old, 10 or later is needed: run lab/setup"),
        ("exit 1", "qemu-system-x86_64 does not tell its version: run lab/setup"),
    ],
)
def test_a_qemu_that_would_break_guests_is_refused(lab: Bench, version: str, message: str) -> None:
    lab.stand_in("qemu-system-x86_64", version)
    assert lab.call("run", "true") == Ended(EX_UNAVAILABLE, "", f"lab/run: {message}\n")
    assert not lab.seen


def test_no_command_is_wrong_use(lab: Bench) -> None:
    assert lab.call("run").status == EX_USAGE


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("missing", EX_NOINPUT, "no such folder"),
        ("with blank", EX_USAGE, "characters that a mount in the lab cannot have"),
    ],
)
def test_a_folder_that_cannot_be_mounted_is_refused(lab: Bench, name: str, status: int, message: str) -> None:
    (lab.root / "with blank").mkdir()
    ended = lab.call("run", "true", LAB_RW=str(lab.root / name))
    assert ended.status == status
    assert message in ended.err
    assert not lab.seen


# lab/run: the command


def test_arguments_come_through_as_they_are(lab: Bench) -> None:
    hard = ["two words", "$HOME", "it's", "", "a\nb", "*"]
    ended = lab.call("run", "printf", "%s|", *hard)
    assert ended == Ended(0, "|".join(hard) + "|", "")


def test_one_argument_is_a_line_of_shell(lab: Bench) -> None:
    assert lab.call("run", "echo out; echo err >&2; exit 7") == Ended(7, "out\n", "err\n")


@pytest.mark.parametrize("status", [0, 1, 124, 137, 255])
def test_the_status_is_the_commands(lab: Bench, status: int) -> None:
    assert lab.call("run", f"exit {status}").status == status


def test_the_command_starts_in_the_current_folder(lab: Bench) -> None:
    folder = lab.root / "it's a folder"
    folder.mkdir()
    assert lab.call("run", 'echo "$PWD"', cwd=folder) == Ended(0, f"{folder}\n", "")


def test_the_environment_that_matters_comes_along(lab: Bench) -> None:
    lab.stand_in("vng", f"unset KVMD_A OTHER{VNG}")
    ended = lab.call("run", 'echo "$HOME,$KVMD_A,$OTHER"', KVMD_A="a 'b' $c", OTHER="o")
    assert ended == Ended(0, "/tmp,a 'b' $c,\n", "")  # noqa: S108  the lab's, which goes with it


def test_the_virtme_ng_of_setup_comes_before_another(lab: Bench) -> None:
    lab.stand_in("vng", "exit 1")
    lab.stand_in("vng", VNG, lab.build / "venv" / "bin")
    assert lab.call("run", "true").status == 0


def test_virtme_ng_is_told_the_machine_and_the_folders(lab: Bench) -> None:
    results = lab.root / "results"
    results.mkdir()
    lab.call("run", "true", LAB_CPUS="3", LAB_MEMORY="5G", LAB_RW=str(results), LAB_QEMU_OPTS="-s", LAB_VERBOSE="1")
    arguments = lab.seen.splitlines()
    for option, value in (
        ("--run", str(lab.build / "bzImage")),
        ("--cpus", "3"),
        ("--memory", "5G"),
    ):
        assert arguments[arguments.index(option) + 1] == value
    assert str(results) in arguments
    assert "--disable-kvm" in arguments
    assert "--qemu-opts=-cpu max,+svm,-la57 -accel tcg,thread=single -s" in arguments
    assert "--verbose" in arguments


@pytest.mark.parametrize("status", [0, 255])
def test_a_lab_that_ends_without_the_commands_status_is_a_failure(lab: Bench, status: int) -> None:
    lab.stand_in("vng", f"exit {status}")
    ended = lab.call("run", "true")
    assert ended.status == EX_SOFTWARE
    assert f"the lab ended without a status of the command (vng: {status})" in ended.err


def test_a_lab_is_bound_to_one_processor_that_no_other_lab_has(lab: Bench) -> None:
    held: list[set[int]] = []
    allowed = sorted(os.sched_getaffinity(0))[:3]
    some = ["taskset", "--cpu-list", ",".join(map(str, allowed))]
    with ExitStack() as stack:
        for _ in range(len(allowed) + 1):
            running = stack.enter_context(
                subprocess.Popen(  # noqa: S603  the script under test
                    [*some, lab.repository / "lab" / "run", "echo $$; exec sleep 60"],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=lab.environment({"TMPDIR": str(lab.root)}),
                )
            )
            stack.callback(running.terminate)
            assert running.stdout is not None
            held.append(os.sched_getaffinity(int(running.stdout.readline())))
    *first, last = held
    assert sorted(first, key=min) == [{processor} for processor in allowed]
    # One more than there are processors has to share.
    assert last in first


def test_a_time_limit_ends_the_lab(lab: Bench) -> None:
    lab.stand_in("vng", "echo started; exec sleep 60")
    ended = lab.call("run", "true", LAB_TIMEOUT="2.5")
    assert ended == Ended(124, "started\n", "lab/run: stopped after 2.5 seconds\n")


def test_what_stops_the_script_stops_the_lab_and_leaves_nothing(lab: Bench) -> None:
    lab.stand_in("vng", 'printf "%s\\n" "$@" >"$SEEN"; sleep 60 & echo $!; wait')
    with subprocess.Popen(  # noqa: S603  the script under test
        [lab.repository / "lab" / "run", "true"], stdout=subprocess.PIPE, text=True, env=lab.environment({})
    ) as running:
        assert running.stdout is not None
        sleeper = os.pidfd_open(int(running.stdout.readline()))
        arguments = lab.seen.splitlines()
        session = Path(arguments[arguments.index("--rwdir") + 1])
        assert session.is_dir()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 128 + signal.SIGTERM
    assert not session.exists()
    assert ends(sleeper)
    os.close(sleeper)


def ends(pidfd: int, patience_s: float = 10) -> bool:
    """Wait until the process has ended, whoever is to collect it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(patience_s * 1000))


# lab/test


def pretend_pytest(lab: Bench, output: str, status: int) -> None:
    lab.stand_in("python", f"cat <<'END'\n{output}\nEND\nexit {status}", lab.repository / ".venv" / "bin")


PASSED = "collected 3 items\n\n============= 2 passed, 1 skipped in 110.35s (0:01:50) ============="


def test_a_run_that_passed_is_a_success_and_ends_with_its_closing_line(lab: Bench) -> None:
    pretend_pytest(lab, PASSED, 0)
    assert lab.call("test") == Ended(0, f"{PASSED}\n", "")
    assert (lab.build / "test.log").read_text() == f"{PASSED}\n"


@pytest.mark.parametrize("status", [1, 2, 3, 4, 5])
def test_a_failure_of_pytest_comes_through(lab: Bench, status: int) -> None:
    pretend_pytest(lab, "=== 1 failed, 436 passed in 9.00s ===", status)
    assert lab.call("test").status == status


@pytest.mark.parametrize(
    "closing", ["", "Hello", "=== no tests ran in 0.01s ===", "=== 5 skipped in 0.10s ===", f"{PASSED}\nthen more"]
)
def test_a_success_without_a_test_that_passed_is_a_failure(lab: Bench, closing: str) -> None:
    pretend_pytest(lab, closing, 0)
    ended = lab.call("test")
    assert ended.status == EX_SOFTWARE
    assert "no test passed" in ended.err


def test_a_lab_that_dies_under_the_tests_is_a_failure_whatever_they_said(lab: Bench) -> None:
    lab.stand_in("vng", f"echo '{PASSED}'")
    pretend_pytest(lab, PASSED, 0)
    assert lab.call("test").status == EX_SOFTWARE


def stand_still(lab: Bench, times: int) -> None:
    """Have timeout(1) end the lab at once that often, and run it from then on."""
    count = 'labs=0; while read -r _; do labs=$((labs + 1)); done <"$SEEN.labs"'
    over = f"[ $labs -gt {times} ] || exit {EX_STANDSTILL}"
    lab.stand_in("timeout", f'echo "a lab" >>"$SEEN.labs"\n{count}\n{over}\nshift 3\nexec "$@"')


def labs_of(lab: Bench) -> int:
    return (lab.root / "seen.labs").read_text().count("a lab")


def test_a_lab_that_stands_still_is_tried_once_more_where_that_is_asked_for(lab: Bench) -> None:
    stand_still(lab, 1)
    pretend_pytest(lab, PASSED, 0)
    ended = lab.call("test", LAB_TRIES="2")
    assert (ended.status, ended.out) == (0, f"{PASSED}\n")
    assert "it stood still: once more" in ended.err
    assert labs_of(lab) == 2


@pytest.mark.parametrize(("variables", "labs"), [({}, 1), ({"LAB_TRIES": "2"}, 2)])
def test_a_lab_that_goes_on_standing_still_is_a_failure(lab: Bench, variables: dict[str, str], labs: int) -> None:
    stand_still(lab, 9)
    pretend_pytest(lab, PASSED, 0)
    assert lab.call("test", cwd=None, **variables).status == EX_STANDSTILL
    assert labs_of(lab) == labs


def test_a_failure_is_not_tried_again(lab: Bench) -> None:
    stand_still(lab, 0)
    pretend_pytest(lab, PASSED, 1)
    assert lab.call("test", LAB_TRIES="2").status == 1
    assert labs_of(lab) == 1


def test_tests_that_could_not_run_are_a_failure(lab: Bench) -> None:
    pretend_pytest(lab, PASSED, 0)
    lab.without("qemu-system-x86_64")
    assert lab.call("test").status == EX_UNAVAILABLE


def test_tests_without_the_virtual_environment_are_a_failure(lab: Bench) -> None:
    ended = lab.call("test")
    assert ended == Ended(EX_UNAVAILABLE, "", "lab/test: .venv/bin/python is missing: make lab-test sets it up\n")


def test_the_tests_insist_on_what_the_lab_has_and_keep_nothing(lab: Bench) -> None:
    lab.stand_in(
        "python",
        f"""
        echo "$KVMD_TEST_KVM $KVMD_TEST_PRIVATE_MEMORY $KVMD_TEST_NETWORK $HOME $PYTHONDONTWRITEBYTECODE" >"$SEEN"
        echo "$HYPOTHESIS_STORAGE_DIRECTORY" "$@" >>"$SEEN"
        echo '{PASSED}'
        """,
        lab.repository / ".venv" / "bin",
    )
    assert lab.call("test", KVMD_TEST_KVM="off").status == 0
    environment, command = lab.seen.splitlines()
    assert environment == "required required required /tmp 1"
    assert command == (
        "/run/hypothesis -m pytest -p no:cacheprovider --color=no tests/lab tests/kvm tests/hv tests/protection "
        "-m (kvm or private_memory) and not linux_guest"
    )
    lab.call("test", "tests/some", "-k", "this or that")
    assert lab.seen.splitlines()[1].endswith("--color=no tests/some -k this or that")


def test_the_tests_of_the_lab_are_there() -> None:
    text = (REPOSITORY / "lab" / "test").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("readonly TESTS=(")]
    paths, marks = line.removeprefix("readonly TESTS=(").removesuffix(")").split(" -m ")
    assert marks == '"(kvm or private_memory) and not linux_guest"'
    for path in paths.split():
        place = REPOSITORY / path
        assert place.is_file() or any(place.glob("test_*.py")), f"{path}: there is no test"


# .ci/run


@pytest.fixture
def ci(bench: Bench) -> Bench:
    """Return a bench with CI's script and the tools of the tests, whose make and apt write down what they are asked."""
    shutil.copytree(REPOSITORY / ".ci", bench.repository / ".ci")
    for name in ("make", "apt-get"):
        bench.stand_in(name, RECORD)
    for name in ("iasl", "shellcheck"):
        bench.stand_in(name, "")
    return bench


USUAL = ["make check", "make demo", "make test"]


def test_ci_runs_the_labs_tests_where_a_kernel_is_at_hand(ci: Bench) -> None:
    ci.kernel(ci.build / "bzImage")
    assert ci.call("../.ci/run").status == 0
    assert ci.seen.splitlines() == [*USUAL, "make lab-test"]


def test_ci_fails_where_a_kernel_is_at_hand_and_the_labs_tests_did_not_run(ci: Bench) -> None:
    ci.kernel(ci.build / "bzImage")
    ci.stand_in("make", f'{RECORD}\n[ "$1" != lab-test ]')
    assert ci.call("../.ci/run").status == 1
    assert ci.seen.splitlines() == [*USUAL, "make lab-test"]


def test_ci_does_without_the_lab_where_there_is_no_kernel_and_says_so(ci: Bench) -> None:
    ended = ci.call("../.ci/run")
    assert ended.status == 0
    assert "no kernel: build one" in ended.err
    assert ci.seen.splitlines() == USUAL


def test_ci_installs_what_the_tests_need_and_only_that(ci: Bench) -> None:
    ci.without("iasl")
    assert ci.call("../.ci/run").status == 0
    assert ci.seen.splitlines() == [
        "apt-get update -qq",
        "apt-get install -qq -y --no-install-recommends acpica-tools",
        *USUAL,
    ]


def test_ci_fails_over_a_kernel_that_is_named_and_not_there(ci: Bench) -> None:
    assert ci.call("../.ci/run", KVMD_LAB_KERNEL="/no/such").status == EX_NOINPUT
    assert ci.seen.splitlines() == USUAL


# lab/setup


def installed(bench: Bench) -> None:
    """Have virtme-ng there as the lock says."""
    shutil.copy(bench.repository / "requirements" / "lab.txt", bench.build / "venv" / "lab.txt")
    bench.stand_in("vng", "echo virtme-ng 1.42", bench.build / "venv" / "bin")


@pytest.fixture
def host(bench: Bench) -> Bench:
    """Return a bench whose apt and python3 write down what they are asked."""
    (bench.build / "venv").mkdir(parents=True)
    for name in ("apt-get", "apt-cache", "python3", "sudo"):
        bench.stand_in(name, RECORD)
    return bench


def test_setup_leaves_alone_what_is_there(host: Bench) -> None:
    installed(host)
    ended = host.call("setup")
    assert (ended.status, host.seen) == (0, "")
    assert ended.err == "lab/setup: QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2); virtme-ng 1.42\n"


def test_setup_installs_virtme_ng_again_when_its_lock_changed(host: Bench) -> None:
    installed(host)
    host.stand_in("pip", RECORD, host.build / "venv" / "bin")
    lock = host.repository / "requirements" / "lab.txt"
    lock.write_text("virtme-ng==2 --hash=sha256:00\n")
    assert host.call("setup").status == 0
    asked, made, filled = host.seen.splitlines()
    assert asked == "python3 -c import ensurepip"
    assert made == f"python3 -m venv --clear {host.build}/venv"
    assert filled.startswith("pip install ")
    assert filled.endswith(f"--require-hashes -r {lock}")
    assert (host.build / "venv" / "lab.txt").read_text() == lock.read_text()


def test_setup_installs_what_virtual_environments_need(host: Bench) -> None:
    installed(host)
    host.stand_in("pip", RECORD, host.build / "venv" / "bin")
    host.stand_in("id", "echo 0")
    host.stand_in("python3", f'{RECORD}\n[ "$1" != -c ]')
    (host.build / "venv" / "lab.txt").unlink()
    assert host.call("setup").status == 0
    assert host.seen.splitlines()[1:4] == [
        "apt-get update -qq",
        "apt-get install -qq -y --no-install-recommends python3-venv",
        f"python3 -m venv --clear {host.build}/venv",
    ]


APT = """
case "$*" in
  *indextargets*) [ -n "$CODENAME" ] && echo "http://mirror.invalid/debian/ $CODENAME" ;;
  *install*qemu*) printf '#!/bin/sh\\n%s\\n' "$QEMU_10" >"${0%/*}/qemu-system-x86_64" ;;
esac
exit 0
"""


@pytest.fixture
def old_host(host: Bench) -> Bench:
    """Return one that has QEMU 7 and an apt that can install 10."""
    installed(host)
    host.stand_in("qemu-system-x86_64", QEMU_7)
    host.stand_in("id", "echo 0")
    host.stand_in("apt-get", f"{RECORD}\n{APT}")
    host.stand_in("tee", f'{RECORD}\ncat >>"$SEEN"')
    return host


def candidate(bench: Bench, version: str) -> None:
    bench.stand_in("apt-cache", f"printf 'qemu-system-x86:\\n  Installed: (none)\\n  Candidate: {version}\\n'")


def test_setup_takes_qemu_from_the_release_where_that_is_new_enough(old_host: Bench) -> None:
    candidate(old_host, "1:10.0.2+ds-2+deb13u1")
    assert old_host.call("setup", QEMU_10=QEMU_10).status == 0
    assert old_host.seen.splitlines() == [
        "apt-get update -qq",
        "apt-get install -qq -y --no-install-recommends qemu-system-x86",
    ]


def test_setup_takes_qemu_from_the_backports_of_apts_own_mirror(old_host: Bench) -> None:
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME")
    if codename is None:
        pytest.skip("this system's release has no codename")
    candidate(old_host, "1:7.2+dfsg-7+deb12u13")
    assert old_host.call("setup", QEMU_10=QEMU_10, CODENAME=codename).status == 0
    asked = [line for line in old_host.seen.splitlines() if "indextargets" not in line]
    assert asked == [
        "apt-get update -qq",
        "tee /etc/apt/sources.list.d/kvmd-lab.list",
        f"deb [signed-by={KEYRING}] http://mirror.invalid/debian/ {codename}-backports main",
        "apt-get update -qq",
        f"apt-get install -qq -y --no-install-recommends -t {codename}-backports qemu-system-x86",
    ]


def test_setup_says_so_where_apt_has_no_qemu_that_is_new_enough(old_host: Bench) -> None:
    candidate(old_host, "(none)")
    ended = old_host.call("setup", CODENAME="")
    assert ended.status == EX_UNAVAILABLE
    assert ended.err.endswith("apt has no QEMU >= 10 for this system: install one by hand\n")


# lab/build-kernel


@pytest.fixture
def builder(host: Bench) -> Bench:
    """Return a bench with compilers that do nothing."""
    for name in ("gcc", "bc", "bison", "flex", "xz"):
        host.stand_in(name, "")
    host.stand_in("id", "echo 0")
    return host


def source(bench: Bench, drop: str = "nothing") -> str:
    """Make a kernel's source that takes every option but one, and return its folder."""
    tree = bench.root / "linux"
    bench.stand_in("merge_config.sh", 'cat "$3" >>.config', tree / "scripts" / "kconfig")
    (tree / "arch" / "x86" / "boot").mkdir(parents=True)
    bench.stand_in(
        "make",
        f"""
        case "$*" in
          *tinyconfig*) : >.config ;;
          *olddefconfig*) grep -v '=n$' .config | grep -v '^{drop}=' >.new; mv .new .config ;;
          *kernelrelease*) echo 7.0 ;;
          *bzImage*) echo "built with $*" >arch/x86/boot/bzImage ;;
        esac
        """,
    )
    return str(tree)


def test_a_kernel_is_built_from_the_source_that_is_named(builder: Bench) -> None:
    ended = builder.call("build-kernel", LAB_SOURCE=source(builder))
    assert ended.status == 0, ended.err
    assert (builder.build / "bzImage").read_text().startswith("built with -s -j")
    assert builder.call("kernel").out == f"{builder.build}/bzImage\n"


def test_an_option_that_the_kernel_does_not_take_is_named(builder: Bench) -> None:
    ended = builder.call("build-kernel", LAB_SOURCE=source(builder, drop="CONFIG_KVM_SW_PROTECTED_VM"))
    assert ended.status == EX_SOFTWARE
    assert ended.err.endswith("lab/build-kernel: this kernel does not take CONFIG_KVM_SW_PROTECTED_VM=y\n")
    assert not (builder.build / "bzImage").exists()


def test_a_source_that_is_not_there_is_named(builder: Bench) -> None:
    ended = builder.call("build-kernel", LAB_SOURCE="/no/such")
    assert ended.status == EX_NOINPUT
    assert ended.err.endswith("LAB_SOURCE=/no/such: no such file or folder\n")


@pytest.mark.parametrize("offer", ["", "linux-source-6.1 - Linux\nlinux-source-6.12 - Linux"])
def test_a_release_without_a_kernel_new_enough_is_told_with_the_remedy(builder: Bench, offer: str) -> None:
    builder.stand_in("make", "")
    builder.stand_in("apt-cache", f"cat <<'END'\n{offer}\nEND")
    ended = builder.call("build-kernel")
    assert ended.status == EX_UNAVAILABLE
    assert ended.err.splitlines()[-1] == (
        "lab/build-kernel: apt offers no linux-source >= 6.18 here: name a kernel's source in LAB_SOURCE"
    )


# All of them


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_run_and_has_no_fault_that_shellcheck_knows(script: str) -> None:
    path = REPOSITORY / "lab" / script
    assert os.access(path, os.X_OK)
    require_whole(Facility.SHELLCHECK)
    shellcheck = shutil.which("shellcheck")
    assert shellcheck is not None
    found = subprocess.run(  # noqa: S603  shellcheck, on a file of ours
        [shellcheck, "-x", path], check=False, capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (found.returncode, found.stdout) == (0, "")
