"""Fetching Oxford Flowers 102 through torchvision, with checksums; run again, it goes on."""

import contextlib
import socket
import tarfile
from http.client import HTTPException
from pathlib import Path

from flowers import UserError

DEFAULT_ROOT = "data/flowers-102"
UNFINISHED = ".downloading"  # beside the files while they are fetched: a part of one may look like a whole one
PATIENCE = 60  # seconds, with a server that says nothing


def is_complete(root: Path) -> bool:
    """Whether a download has finished."""
    whole = (
        all((root / name).exists() for name in ("jpg", "imagelabels.mat", "setid.mat"))
        and not (root / UNFINISHED).exists()
    )
    return whole or (root / "images" / "jpg").is_dir()


@contextlib.contextmanager
def patience():
    """Wait for a silent server for PATIENCE seconds; torchvision and clip would for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def download(data_root: str | Path = DEFAULT_ROOT) -> Path:
    """Fetch the dataset through torchvision, with progress and MD5 checks; run again, it goes on at the first file that is not whole.

    Raises UserError when the site can't be reached or a checksum is wrong.
    """
    from torchvision.datasets import Flowers102

    root = Path(data_root)
    if root.name != "flowers-102":
        raise UserError(
            f"the download goes to a folder named flowers-102, not {root}: give --data_root PARENT/flowers-102"
        )
    # nothing is unpacked outside of the folder, were MD5 ever deceived; Python does so by itself from 3.14 on, and can since 3.11.4
    tarfile.TarFile.extraction_filter = staticmethod(
        getattr(tarfile, "data_filter", lambda member, path: member)
    )
    root.mkdir(parents=True, exist_ok=True)
    (root / UNFINISHED).touch()
    try:
        with patience():
            Flowers102(str(root.parent), download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        raise UserError(
            f"the download of Oxford Flowers 102 failed ({error}): run again to go on, or fetch 102flowers.tgz, imagelabels.mat and "
            f"setid.mat from {Flowers102._download_url_prefix} into {root}, or use --data_root sample"
        ) from None
    (root / UNFINISHED).unlink()
    return root
