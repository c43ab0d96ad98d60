"""The options of the commands, in functions that add them to an argparse parser."""

from __future__ import annotations

import argparse

FORMATS = ("webdataset", "lmdb", "npz")  # in which trajectories are exchanged
SCALES = ("vp", "edm", "flow")
DTYPES = ("float16", "float32")


def launching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launcher", choices=("auto", "local", "slurm"), default="auto", help="where to run (default: auto)"
    )
    _nodes(parser)
    parser.add_argument(
        "--wait",
        action="store_true",
        help="follow a job to its end, exit with its status (on this machine always)",
    )
    dry_run(parser)


def on_this_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launcher", choices=("local",), default="local", help="always this machine")


def dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")


def actors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--actors",
        type=_positive,
        metavar="N",
        help="Ray actors (default: one a GPU, or cores / threads)",
    )
    parser.add_argument(
        "--gpus-per-actor",
        type=_share,
        metavar="F",
        help="what an actor takes of the GPUs: 0.25 lets four share one, for small networks (default: 1, on Slurm the profile's)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="a Ray cluster to use, such as 10.0.0.1:6379 or auto (default: RAY_ADDRESS, or a Ray of our own here)",
    )


def array(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--array",
        type=_positive,
        default=1,
        metavar="N",
        help="on Slurm: N jobs of one node each, which share the work and begin whenever there is room for one",
    )


def tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks-per-node",
        type=_positive,
        metavar="N",
        help="training processes per node (default: 1 here, on Slurm the profile's)",
    )


def json_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else there"
    )


def all_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every run, not only the newest ones")


def log_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="continue until the run ends")
    parser.add_argument(
        "--rank", type=_natural, default=0, metavar="K", help="show the log of task K (default: 0)"
    )
    parser.add_argument(
        "--attempt",
        type=_natural,
        metavar="N",
        help="show the log of attempt N, from 0 (default: the newest)",
    )


def student(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--student",
        metavar="PATH",
        help="folder of a student: its training folder (the newest step is used), one step, or an imported model (default: the "
        "config's)",
    )


def evaluated(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples",
        metavar="ADDRESS",
        help="measure existing images instead of a student's: sample shards, a folder of pictures, .tar shards, an .npz batch",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="evaluate each checkpoint of a training as it appears, once, and keep track of the best",
    )


def sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num", type=_positive, default=64, metavar="N", help="how many images (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise and labels (default: 1)")
    parser.add_argument(
        "--label",
        type=_natural,
        metavar="K",
        help="class of all images (default: random classes, by the seed)",
    )
    parser.add_argument("--out", metavar="FILE", help=".png (a grid) or .npz (default: samples.png)")
    parser.add_argument(
        "--shards",
        metavar="URL",
        help="in place of a file: a folder or s3:// address for shards of --batch-size images, drawn by Ray actors",
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="images at a time (default: 64)"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the student's network (default: float32)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the student: slow to begin, then faster"
    )
    parser.add_argument(
        "--refine",
        type=_positive,
        metavar="K",
        help="start from a state of the student and finish with K steps of its teacher",
    )
    parser.add_argument(
        "--refine-from",
        type=float,
        metavar="T",
        help="start the refinement at time T (default: the student's time point nearest to 0.25)",
    )
    parser.add_argument(
        "--teacher", metavar="PATH", help="the teacher to refine with (default: the student's)"
    )
    parser.add_argument(
        "--decoder",
        metavar="PATH",
        help="folder of the AutoencoderKL that turns a student's latents into images (default: its config's)",
    )
    parser.add_argument(
        "--states",
        action="store_true",
        help="write states as they are, not decoded: in an .npz as float32",
    )


def planning(parser: argparse.ArgumentParser) -> None:
    _nodes(parser)
    parser.add_argument(
        "--measure", action="store_true", help="time the teacher here and measure the solver's error"
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="E",
        help="find the cheapest solver and steps whose relative error is below E at every time point",
    )
    parser.add_argument("--probes", type=_positive, metavar="N", help="samples to measure on (default: 32)")
    json_output(parser)


def inspecting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", type=_positive, default=8, metavar="N", help="how many shards to read (default: 8)"
    )
    parser.add_argument("--out", metavar="FILE", help="a picture of a few trajectories to write, .png")
    json_output(parser)
    endpoint(parser)


def reporting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="FILE", help="the file to write (default: report-NAME.html in the run's folder)"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write it again while the run is at work, until it is evaluated; the page, open in a browser, shows each version",
    )


def fetching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of a repository on the hub (default: its main branch)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to make (default: one below teachers/, named after the teacher)"
    )


def importing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="the published model's config")
    parser.add_argument("--out", required=True, metavar="DIR", help="the model folder to write")
    endpoint(parser)


def exporting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="webdataset: tars for NVlabs/FastGen; lmdb: for CausVid and Self-Forcing; npz: numpy arrays",
    )
    parser.add_argument("--out", required=True, metavar="URL", help="the folder or s3:// address to write to")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="vp",
        help="scale of the states: vp: cos(t) x0 + sin(t) eps; edm: x0 + sigma eps; flow: (1 - t) x0 + t eps (default: vp)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of states and noise (default: float32; lmdb: float16)"
    )
    parser.add_argument(
        "--samples-per-part",
        type=_positive,
        metavar="N",
        help="samples in a file (default: those of a shard)",
    )
    endpoint(parser)


def importing_trajectories(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        required=True,
        metavar="ROOT",
        help="storage.root of your config: shards go below trajectories/",
    )
    parser.add_argument("--format", choices=FORMATS, help="format of the parts (default: found)")
    parser.add_argument("--scale", choices=SCALES, help="scale of the states (default: that of index.json)")
    parser.add_argument(
        "--timesteps",
        type=_numbers,
        metavar="T,T,...",
        help="times of a path's states in that scale, the noise's first (default: path_timesteps of index.json)",
    )
    parser.add_argument(
        "--noise-scale",
        type=_above_0,
        metavar="X",
        help="what unit noise was multiplied with (default: edm: the first time; others: 1)",
    )
    parser.add_argument(
        "--classes", type=_positive, metavar="N", help="number of classes, if the parts do not say it"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the stored states (default: that of the parts)"
    )
    parser.add_argument(
        "--samples-per-shard", type=_positive, metavar="N", help="trajectories in each file (default: 500)"
    )
    endpoint(parser)


def endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 endpoint")


def _nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=_positive, metavar="N", help="nodes (default: the profile's in jobs/)"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _share(text: str) -> float:
    from dsno_cluster.config.profile import is_share

    value = _number(text)
    if not is_share(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a part of a GPU, such as 0.25, nor a whole number of them"
        )
    return value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from None


def _above_0(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _number(text: str) -> float:
    """The number in a text; 0 if it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _tolerance(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1, such as 1e-3")
    return value
