# shellcheck shell=bash
# For the scripts of this folder: where things are, and how they end. Sourced, not run.
#
# Exit statuses of the lab's own, sysexits(3): 64 wrong use, 66 a named file is not there, 69 something is missing and
# the message says how to get it, 70 the lab broke down under the command; 124 for a time limit, as in timeout(1).

lab=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
repository=$(dirname -- "$lab")
# What the lab makes: the kernel, its sources, virtme-ng.
build=$(realpath -m -- "${LAB_BUILD:-$repository/build/lab}")

# shellcheck disable=SC2034  # the scripts use them
readonly EX_USAGE=64 EX_NOINPUT=66 EX_UNAVAILABLE=69 EX_SOFTWARE=70 EX_STANDSTILL=124
# shellcheck disable=SC2034
readonly QEMU_NEEDED=10

say() { printf '%s: %s\n' "lab/${0##*/}" "$*" >&2; }

# die STATUS MESSAGE...
die() {
  local status=$1
  shift
  say "$@"
  exit "$status"
}

# The kernel to boot, or the end: with 66 where the one that was asked for is not there, which must not pass for none.
find_kernel() {
  local kernel
  if [[ -n ${KVMD_LAB_KERNEL:-} ]]; then
    [[ -r $KVMD_LAB_KERNEL ]] || die "$EX_NOINPUT" "KVMD_LAB_KERNEL=$KVMD_LAB_KERNEL: no such file"
    realpath -- "$KVMD_LAB_KERNEL"
    return
  fi
  for kernel in "$repository/../shared/lab/bzImage" "$build/bzImage"; do
    if [[ -r $kernel ]]; then
      realpath -- "$kernel"
      return
    fi
  done
  die "$EX_UNAVAILABLE" "no kernel: build one with lab/build-kernel, or name one in KVMD_LAB_KERNEL"
}

# What virtme-ng of lab/setup brings comes before any other.
use_own_tools() { PATH=$build/venv/bin:$PATH; }

# The major version of QEMU; nothing where there is none, or where it does not even start.
qemu_major() { { qemu-system-x86_64 --version 2>/dev/null || true; } | sed -n '1s/.*version \([0-9]*\).*/\1/p'; }

# Run as root, for packages.
as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  else
    sudo -- "$@"
  fi
}

apt_install() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

# Where apt gets this release from: whatever mirror its own sources name.
debian_uri() {
  local codename=$1
  # shellcheck disable=SC2016  # apt fills these in
  apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' |
    awk -v codename="$codename" '$2 == codename { print $1; exit }'
}
