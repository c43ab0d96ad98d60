"""How a job's tasks find each other: addresses, interfaces, free ports, notes on the shared disk."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from dsno_cluster.cluster.records import AnyNote, Failure, Note, read_note, write_note
from dsno_cluster.errors import LOST_RANK, UserError, WorkError

MEET_SECONDS, LOOK_SECONDS = (
    300.0,
    0.5,
)  # a node may start slowly, and a network file system may be slow to show a new file


def address_towards(host: str) -> str | None:
    """This host's own IPv4 address on the route to `host`; None if there is no route. Nothing is sent.

    A host's own name often resolves to a loopback address there, so each host looks for its route to another
    one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address, such as eth0."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None


def address_of(interface: str) -> str:
    """The IPv4 address of an interface. Raises UserError, naming those that exist, if it has none."""
    import psutil

    found = psutil.net_if_addrs()
    for address in found.get(interface, ()):
        if address.family == socket.AF_INET:
            return str(address.address)
    raise UserError(
        f"interface {interface}: {socket.gethostname()} has no such interface with an IPv4 address; it has {', '.join(found)}"
    )


def own_address(hosts: Sequence[str], node: int, interface: str | None) -> str:
    """This node's IPv4 address as the others reach it. `hosts` are all nodes' names, `node` this one's index.

    It is the address of the interface named, or else of the one that leads to the first node (on the first
    node: to the second). Raises WorkError if none does.
    """
    if interface is not None:
        return address_of(interface)
    peer = hosts[0] if node else hosts[min(1, len(hosts) - 1)]
    if address := address_towards(peer):
        return address
    if len(hosts) > 1:
        raise WorkError(
            f"{socket.gethostname()} finds no IPv4 route to {peer}; name the network between the nodes as `interface`"
        )
    return "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Distinct free TCP ports of this host. Use them at once: nothing reserves them.

    Raises WorkError if there are too few.
    """
    with contextlib.ExitStack() as held:  # all bound together, so that none is returned twice
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        try:
            for s in sockets:
                s.bind(("", 0))
        except OSError as error:
            raise WorkError(
                f"{socket.gethostname()} has no {count} free TCP ports ({error.strerror}); "
                "`ss -tan` on it lists those in use, net.ipv4.ip_local_port_range is their range"
            ) from error
        return [s.getsockname()[1] for s in sockets]


def tell(attempt: Path, note: Note) -> None:
    """Leave a note in the attempt's folder for its other tasks."""
    write_note(note, attempt)


def hear(attempt: Path, what: type[AnyNote]) -> AnyNote:
    """Wait for the first task's note. Raises WorkError if it has failed, or leaves none in time."""
    for _ in range(round(MEET_SECONDS / LOOK_SECONDS)):  # a clock would also count the time of a suspension
        if (note := read_note(what, attempt)) is not None:
            return note
        if (attempt / Failure.FILE.replace("*", "0")).is_file():
            raise WorkError(f"{LOST_RANK} (the first task failed while this one waited for it)")
        time.sleep(LOOK_SECONDS)
        with contextlib.suppress(OSError):
            os.listdir(attempt)  # makes NFS look again
    raise WorkError(
        f"{attempt / what.FILE}: the first task did not write it within {MEET_SECONDS:g} s; it did not start, or run.dir "
        "is not a folder that all nodes share"
    )
