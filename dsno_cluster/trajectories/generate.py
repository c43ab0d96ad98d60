"""gen-trajectories: Ray actors solve the teacher's ODE, the driver keeps them busy and commits the manifest.

A shard is a pure function of (spec, index), so any actor may make any shard, more than once if necessary.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from dsno_cluster import console, liveness
from dsno_cluster.cluster.crew import ANY_CREW, Crew, actor_count
from dsno_cluster.cluster.ray_pool import (
    CONCURRENCY,
    RayCluster,
    import_ray,
    open_ray,
    run_pool,
)
from dsno_cluster.config import Config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import shown_path
from dsno_cluster.provenance import Environment, environment
from dsno_cluster.storage import MissingObject, Stat, Storage, open_storage
from dsno_cluster.trajectories.plan import Plan
from dsno_cluster.trajectories.shards import (
    MADE_SHARDS,
    MadeShards,
    Manifest,
    Shard,
    commit_manifest,
    contradiction,
    keep_vanishing,
    make_manifest,
    read_made_shards,
    read_manifest,
    shard_key,
    shard_tensors,
    vouches_for_itself,
    write_made_shards,
)
from dsno_cluster.trajectories.sharing import (
    Share,
    delete_notes,
    environments_noted,
    read_all_notes,
    together,
)
from dsno_cluster.trajectories.solve_actor import SolveActor
from dsno_cluster.trajectories.spec import TrajectorySpec

ROUNDS = 3  # in which shards are made again that vanish before the manifest names them
NOTE_SECONDS = 10.0  # how often the driver notes which shards are finished
NOTES_SECONDS = 2.0  # how often the notes of others are looked for when all shards are there


def describe_plan(config: Config, plan: Plan, crew: Crew) -> str:
    """The work that a plan means, in one line."""
    settings, size = config.trajectories, plan.size
    return (
        f"{size.num_samples} trajectories of {settings.num_points} time points in {size.num_shards} shards "
        f"({size.bytes / 1e6:.1f} MB) below {shown_path(config.storage.root)}/{plan.folder}: "
        f"{settings.solver}, {size.evaluations_per_sample} network evaluations each, "
        f"{actor_count(crew, settings.threads)}"
    )


def generate(config: Config, plan: Plan, crew: Crew = ANY_CREW, share: Share | None = None) -> str:
    """Make the missing shards of a `plan`, then commit the manifest; returns the data set's address.

    The work is done by the Ray actors of `crew`. With a `share`, other tasks do the rest of it: see `sharing.py`. Raises
    UserError for a teacher that does not fit the config and for devices or library versions that must not be mixed,
    WorkError if shards cannot be made.
    """
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    address = f"{config.storage.root.rstrip('/')}/{plan.folder.rstrip('/')}"
    current = read_manifest(storage, plan.folder)
    named = {shard.key: shard for shard in current[0].shards} if current else {}
    found = _shards_there(storage, plan)
    console.say(describe_plan(config, plan, crew))  # now that the storage has answered
    if plan.note:
        console.say(f"note: {plan.note}")
    done = {key: shard for key, shard in named.items() if _is_there(shard, found)}
    if len(named) >= plan.size.num_shards and len(done) == len(named):
        console.say(f"all {plan.size.num_shards} shards exist already: {shown_path(address)}")
        return address
    made_by = [current[0].environment] if current else []
    notes = read_all_notes(storage, plan.folder)
    # with a share, others may be at work: what they have not noted yet need not be read now
    made = _surviving(storage, plan, _unnamed(found, named), notes, read=share is None or not notes)
    if made.shards and made.environment is None:
        made = _proven(config, plan, storage, made, made_by, crew)
    made_by += [made.environment] if made.environment and made.shards else []
    shards, here = _complete(config, plan, storage, named, found, made, made_by, crew, share)
    commit_manifest(storage, plan.folder, make_manifest(plan.spec, shards, here))
    delete_notes(storage, plan.folder)
    with contextlib.suppress(WorkError):  # housekeeping that some servers do not offer
        storage.tidy(plan.folder)
    console.say(f"done: {shown_path(address)}")
    return address


def kernels_folder(config: Config) -> str:
    """The folder of compiled kernels, which later runs and other nodes find."""
    return str(config.run_dir.absolute() / "kernels")


def say_compiling(config: Config, spec: TrajectorySpec) -> None:
    """Say what the first batch waits for, if the teacher's network is compiled."""
    if spec.compiled:
        console.say(
            f"the first batch of each actor waits while it compiles the teacher's network ({spec.inference_precision}), or finds "
            f"its kernels in {kernels_folder(config)}"
        )


def _complete(
    config: Config,
    plan: Plan,
    storage: Storage,
    named: Mapping[str, Shard],
    found: Mapping[str, Stat],
    made: MadeShards,
    made_by: list[Environment],
    crew: Crew,
    share: Share | None,
) -> tuple[tuple[Shard, ...], Environment]:
    """All shards of the data set, and the environment that made the last of them.

    Some are `named` by the manifest and some were `made` before, in the environments `made_by`, and those that
    are not `found` are made, until all are there: with a `share` also by others. Raises WorkError if they keep
    vanishing.
    """
    num_shards = max(plan.size.num_shards, len(named))
    for number in range(ROUNDS + 1):
        known = {**named, **{key: shard for key, (shard, _) in made.by_key.items()}}
        done = {key: shard for key, shard in known.items() if _is_there(shard, found)}
        todo = [index for index in range(num_shards) if shard_key(index) not in done]
        if not todo:
            break
        if share is not None:
            if number == 0:  # what another task has just made is looked at when all are there
                todo = [i for i in todo if shard_key(i) not in found or shard_key(i) in named]
            todo = share.in_order(todo)
        if number == ROUNDS:
            raise keep_vanishing(f"{storage.url}/{plan.folder}{shard_key(todo[0])}", ROUNDS)
        if number:
            console.say(f"{len(todo)} shards have vanished since they were made; they are made again")
        elif len(todo) < num_shards:
            console.say(f"{num_shards - len(todo)} of {num_shards} shards are done, {len(todo)} to make")
        bad = {index: found[shard_key(index)].etag for index in todo if shard_key(index) in found}
        try:
            if todo:
                made = _make_shards(config, plan, storage, todo, bad, made, made_by, crew, share)
        except KeyboardInterrupt:
            console.say("interrupted: finished shards are kept, the same command makes the others")
            raise
        found = _shards_there(storage, plan)  # what the manifest names must be there
        if share is not None:
            _check_named(storage, plan, named, made, found)  # if others commit, nothing else compares them
            if (committed := _wait_for_notes(storage, plan, found)) is not None:
                return committed.shards, committed.environment
            notes = read_all_notes(storage, plan.folder)
            made = _surviving(storage, plan, _unnamed(found, named), notes, read=True, quiet=True)
        made_by += [made.environment] if made.environment else []
    return tuple(done[shard_key(index)] for index in range(num_shards)), (
        made_by[-1] if made_by else environment()
    )


def _shards_there(storage: Storage, plan: Plan) -> dict[str, Stat]:
    """The objects of the data set that are named like shards, by key."""
    return {s.key.removeprefix(plan.folder): s for s in storage.list(plan.folder + "shard-")}


def _unnamed(found: Mapping[str, Stat], named: Mapping[str, Shard]) -> dict[str, Stat]:
    return {key: stat for key, stat in found.items() if key not in named}


def _check_named(
    storage: Storage,
    plan: Plan,
    named: Mapping[str, Shard],
    made: MadeShards,
    found: Mapping[str, Stat],
) -> None:
    """Raises WorkError if a shard that was `made` again, and is there, has other bytes than the manifest names."""
    for key, (shard, etag) in made.by_key.items():
        if key in named and named[key] != shard and key in found and found[key].etag == etag:
            raise contradiction(f"{storage.url}/{plan.folder}", key)


def _wait_for_notes(storage: Storage, plan: Plan, found: Mapping[str, Stat]) -> Manifest | None:
    """Wait until other tasks have noted the shards that they have just finished, but not for long.

    Returns the manifest if one of them has committed it meanwhile.
    """
    for _ in range(int(2 * NOTE_SECONDS / NOTES_SECONDS)):
        current = read_manifest(storage, plan.folder)
        if current is not None and len(current[0].shards) >= plan.size.num_shards:
            return current[0]
        known = {shard.key for shard in current[0].shards} if current else set()
        known |= together(read_all_notes(storage, plan.folder)).by_key.keys()
        if found.keys() <= known:
            break
        liveness.moved()
        time.sleep(NOTES_SECONDS)
    return None


def _is_there(shard: Shard, found: Mapping[str, Stat]) -> bool:
    return shard.key in found and found[shard.key].size == shard.size


def check_same_environment(ours: Environment, theirs: Sequence[Environment], where: str) -> None:
    """Raises UserError if `ours` is another device model than `theirs`, whose bytes may differ.

    Different library versions are refused only among the actors of one run; a data set may outlive an
    upgrade, and its manifest then names the last versions.
    """
    for other in theirs:
        if other.device != ours.device:
            raise UserError(
                f"{where}: was made on {other.device}, this is {ours.device}, whose bits may differ; "
                f"continue on {other.device}, or change the seed to make another data set"
            )


def check_alike(environment: Environment, first: Environment, what: str = "a data set") -> None:
    """Raises UserError if two actors that make `what` differ in device or versions."""
    for part in ("device", "versions"):
        one, other = getattr(environment, part), getattr(first, part)
        if one != other:
            raise UserError(
                f"the actors' {part} differ: {one} and {other}; {what} needs one device model and one "
                "set of versions, so give it nodes that are alike"
            )


def _surviving(
    storage: Storage,
    plan: Plan,
    found: Mapping[str, Stat],
    notes: Sequence[MadeShards],
    *,
    read: bool,
    quiet: bool = False,
) -> MadeShards:
    """The complete shards that no manifest names, as in the `notes` of interrupted runs, or, if asked for, read again.

    If there is no note of what made them, because the manifest was lost, their environment is None. `quiet` leaves the
    progress of the work as it is.
    """
    noted = together(notes)
    wanted = {shard_key(index): index for index in range(plan.size.num_shards)}
    per_shard, expected = plan.spec.samples_per_shard, shard_tensors(plan.spec)
    kept = {
        key: (shard, etag)
        for key, (shard, etag) in noted.by_key.items()
        if key in wanted and key in found and found[key].etag == etag and found[key].size == shard.size
    }

    def hashed(key: str) -> tuple[Shard, str] | None:
        try:
            data, start = storage.read(plan.folder + key), wanted[key] * per_shard
        except MissingObject:  # gone meanwhile
            return None
        if not vouches_for_itself(data, start, expected):
            return None
        sha256 = hashlib.sha256(data).hexdigest()
        shard = Shard(key=key, start=start, stop=start + per_shard, size=len(data), sha256=sha256)
        return shard, found[key].etag

    unknown = [key for key in found if key in wanted and key not in kept] if read else []
    if quiet and unknown:
        console.say(f"reading {len(unknown)} shards that their task did not note")
    with (
        ThreadPoolExecutor(4) as threads,
        console.progress("reading shards", len(unknown), "shards", quiet=quiet or not unknown) as advance,
    ):
        for key, line in zip(unknown, threads.map(hashed, unknown), strict=True):
            kept |= {} if line is None else {key: line}
            advance(1)
    return MadeShards(environment=noted.environment, shards=tuple(kept.values()))


def _proven(
    config: Config,
    plan: Plan,
    storage: Storage,
    found: MadeShards,
    made_by: Sequence[Environment],
    crew: Crew,
) -> MadeShards:
    """Whole shards of unknown origin, with the environment of the actors here, which make one again with the same bytes.

    Raises WorkError if its bytes are others, and UserError for a device other than those of `made_by`.
    """
    first = min(found.by_key)
    console.say(
        f"{len(found.shards)} whole shards are named by no manifest: they are kept if {first}, made again, has the same bytes"
    )
    present: list[Environment] = []

    def welcome(environment: Environment) -> None:
        check_same_environment(environment, made_by, f"{storage.url}/{plan.folder}")
        present.append(environment)

    index = found.by_key[first][0].start // plan.spec.samples_per_shard
    with open_ray(replace(crew, actors=1), config.trajectories.threads) as cluster:
        for _ in _solving(config, plan, cluster, [index], {}, welcome):
            pass
    proven = found.model_copy(update={"environment": present[0]})
    write_made_shards(storage, plan.folder, proven)
    return proven


def _solving(
    config: Config,
    plan: Plan,
    cluster: RayCluster,
    todo: Sequence[int],
    bad: Mapping[int, str],
    welcome: Callable[[Environment], None],
    elsewhere: Callable[[], set[int]] | None = None,
) -> Generator[tuple[int, tuple[Shard, str]]]:
    """The shards `todo` with their etags, made by actors on the cluster; see `_make_shards`."""
    remote = import_ray().remote(max_concurrency=CONCURRENCY, **cluster.actor_options())(SolveActor)
    return run_pool(
        lambda: remote.remote(
            plan.spec,
            config.teacher,
            config.storage,
            plan.folder,
            kernels_folder(config),
            auto_grid=config.trajectories.grid == "auto",
        ),
        lambda actor, index: actor.make_shard.remote(index, bad.get(index)),
        todo,
        cluster.capacity,
        in_flight=2,  # while one shard is encoded and uploaded, the next is solved
        in_order=elsewhere is not None,
        elsewhere=elsewhere,
        greet=lambda actor: actor.environment.remote(),
        welcome=welcome,
    )


def _make_shards(
    config: Config,
    plan: Plan,
    storage: Storage,
    todo: list[int],
    bad: dict[int, str],
    before: MadeShards,
    made_by: Sequence[Environment],
    crew: Crew,
    share: Share | None,
) -> MadeShards:
    """Make the shards `todo`; `bad` has the etags of those that exist but are wrong, which are replaced.

    The environment in the result also has the `seconds` that this took, including those of the runs in
    `made_by`. With a `share`, shards that others finish meanwhile are left out.
    """
    settings = config.trajectories
    total = max(plan.size.num_samples, len(todo) * settings.samples_per_shard)
    shards = total // settings.samples_per_shard
    notes_file, where = MADE_SHARDS, f"{storage.url}/{plan.folder}"
    spent = (made_by[-1].seconds or 0.0) if made_by else 0.0
    if share is not None:
        notes_file = share.notes
        before = read_made_shards(storage, plan.folder, notes_file)
        spent = (before.environment.seconds or 0.0) if before.environment else 0.0
    lines = before.by_key
    present: list[Environment] = []

    def welcome(environment: Environment) -> None:
        check_same_environment(environment, made_by, where)
        if not present:
            present.append(environment)
            note()  # before the first shard, so that it is known what made each existing shard
            if share is not None:  # of two tasks that begin together, one at least sees the other's
                try:
                    check_same_environment(environment, environments_noted(storage, plan.folder), where)
                except UserError:  # the others must not be refused for what this task has not made
                    present.clear()
                    with contextlib.suppress(WorkError):  # report the refusal
                        unnote()
                    raise
        check_alike(environment, present[0])

    say_compiling(config, plan.spec)
    started = time.monotonic()

    def made() -> MadeShards:
        seconds = round(spent + time.monotonic() - started, 1)
        here = present[0].model_copy(update={"seconds": seconds})
        return MadeShards(environment=here, shards=tuple(lines.values()))

    def note() -> None:
        if present:
            write_made_shards(storage, plan.folder, made(), notes_file)

    def unnote() -> None:
        if before.shards:
            write_made_shards(storage, plan.folder, before, notes_file)
        else:
            storage.delete(plan.folder + notes_file)

    with open_ray(crew, settings.threads) as cluster:
        began, finished = time.monotonic(), 0
        ready: set[str] = set()  # here or elsewhere
        with console.progress(
            "solving", total, "trajectories", done=total - len(todo) * settings.samples_per_shard
        ) as advance:

            def elsewhere() -> set[int]:
                there = _shards_there(storage, plan)
                found = {i: there[shard_key(i)] for i in todo if shard_key(i) in there}
                others = {i for i, stat in found.items() if stat.etag != bad.get(i)}
                new = {shard_key(i) for i in others} - ready
                ready.update(new)
                advance(len(new) * settings.samples_per_shard)
                return others

            def finish_one(key: str) -> None:
                nonlocal finished
                finished += 1
                new = key not in ready
                ready.add(key)
                rate = finished * settings.samples_per_shard / (time.monotonic() - began)
                evaluations = rate * plan.size.evaluations_per_sample
                recorded = {
                    "shards": shards - len(todo) + len(ready),
                    "shards_planned": shards,
                    "trajectories_per_second": rate,
                }
                shown = {"trajectories/s": rate, "evaluations/s": evaluations}
                advance(new * settings.samples_per_shard, recorded, **shown)

            pool = _solving(config, plan, cluster, todo, bad, welcome, elsewhere if share else None)
            collect_shards(pool, lines, note, finish_one)
            if share is not None:
                note()
    return made() if present else before  # all were finished elsewhere before an actor was ready


def collect_shards(
    pool: Generator[tuple[Any, tuple[Shard, str]]],
    lines: dict[str, tuple[Shard, str]],
    note: Callable[[], None],
    finish_one: Callable[[str], None],
) -> None:
    """Add a pool's shards to `lines` by key, calling `note` now and then and if the run is stopped."""
    noted = time.monotonic()
    try:
        for _, (shard, etag) in pool:
            lines[shard.key] = (shard, etag)
            finish_one(shard.key)
            if time.monotonic() - noted > NOTE_SECONDS:
                note()
                noted = time.monotonic()
    except BaseException:
        pool.close()
        with contextlib.suppress(WorkError):  # report what stopped the run
            note()
        raise
