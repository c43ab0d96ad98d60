"""Stand-ins for Apptainer and Pyxis, which Debian does not have: they run the command in a root file system of its own.

An image is a text file: the paths of this machine that the container has. It sees nothing else but what is mounted, under
the names that the options give, so a mount that is missing is missed.
"""

from __future__ import annotations

import sys
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")

APPTAINER = """#!/bin/bash
set -e
[ "$1" = exec ] && shift
while [[ $1 == -* ]]; do
  case $1 in
    --bind) binds=$2; shift 2;;
    --pwd) folder=$2; shift 2;;
    *) echo "unknown flag: $1" >&2; exit 255;;
  esac
done
image=$1; shift
[ -f "$image" ] || { echo "FATAL: could not open image $image" >&2; exit 255; }
[ -n "$INSIDE" ] || INSIDE=1 exec unshare --mount --propagation private "$0" exec --bind "$binds" --pwd "$folder" "$image" "$@"
unset INSIDE
root=$(mktemp -d)
mount -t tmpfs tmpfs "$root"
mkdir "$root/tmp"
show() {
  if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; touch "$root$2"; fi
  mount --rbind "$1" "$root$2"
}
while read -r path; do show "$path" "$path"; done <"$image"
IFS=, read -ra mounts <<<"$binds"
for mount in "${mounts[@]}"; do
  IFS=: read -r outside inside flags <<<"$mount"
  show "$outside" "${inside:-$outside}"
done
exec chroot "$root" /usr/bin/env -C "$folder" "$@"
"""

SRUN = """#!/bin/bash
for word in "$@"; do
  case $word in
    --container-image=*) image=${word#*=};;
    --container-mounts=*) mounts=${word#*=};;
    --container-workdir=*) folder=${word#*=};;
    -*) [ -z "$command" ] && options+=("$word") || command+=("$word");;
    *) command+=("$word");;
  esac
done
exec /usr/bin/srun "${options[@]}" apptainer exec --bind "$mounts" --pwd "$folder" "$image" "${command[@]}"
"""


def install(folder: Path, runtime: str) -> Path:
    """Put the stand-in of a runtime into `folder`/bin, and an image with this Python beside it; returns the image."""
    tools = folder / "bin"
    tools.mkdir()
    for name, text in (("apptainer", APPTAINER), *([("srun", SRUN)] if runtime == "pyxis" else [])):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    image = folder / "image.sif"
    paths = [path for path in SYSTEM if Path(path).exists()]
    image.write_text("\n".join([*paths, sys.base_prefix, sys.prefix]) + "\n")
    return image
