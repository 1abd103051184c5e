"""Download Oxford Flowers 102 through torchvision, with progress and MD5 checks.

    python -m flowers.download      # 345 MB to data/flowers-102

A download that broke off goes on, when it is run again, at the first file that is not complete.
"""

import argparse
import contextlib
import socket
import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from flowers import UserError, command

DEFAULT_ROOT = "data/flowers-102"
# A file beside the data while it is fetched: a part of an archive may look like a complete folder.
UNFINISHED = ".downloading"
# Seconds to wait for a server that sends nothing.
PATIENCE = 60


def is_complete(root: Path) -> bool:
    """Whether `root` holds a finished download, or the images of the original project."""
    # Whoever has the folder of the original project got it in another way.
    if (root / "images" / "jpg").is_dir():
        return True
    if (root / UNFINISHED).exists():
        return False
    return all((root / name).exists() for name in ("jpg", "imagelabels.mat", "setid.mat"))


def download(data_root: str | Path = DEFAULT_ROOT) -> Path:
    """Fetch what is missing of the dataset, and return its folder.

    Raises UserError if the folder is not named flowers-102, the site can't be reached, or a
    checksum is wrong.
    """
    # Imported late: torchvision takes seconds, and who has the data needs no download.
    from torchvision.datasets import Flowers102

    # torchvision chooses the name of the folder itself.
    root = Path(data_root)
    if root.name != "flowers-102":
        raise UserError(
            f"the download goes to a folder named flowers-102, not {root}: "
            "give --data_root PARENT/flowers-102"
        )

    _unpack_safely()
    root.mkdir(parents=True, exist_ok=True)
    # The mark stays if anything fails, a kill included.
    (root / UNFINISHED).touch()
    try:
        # torchvision keeps the files whose checksum is right, and fetches the others.
        with patience():
            Flowers102(str(root.parent), download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        raise UserError(
            f"the download of Oxford Flowers 102 failed ({error}): run again to go on, "
            "or fetch 102flowers.tgz, imagelabels.mat and setid.mat "
            f"from {Flowers102._download_url_prefix} into {root}, or use --data_root sample"
        ) from None
    (root / UNFINISHED).unlink()
    return root


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Give up on a silent server after PATIENCE seconds.

    For torchvision's downloads and clip's, which would wait for ever.
    """
    # Neither takes a timeout as an argument.
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def _unpack_safely() -> None:
    """Have tarfile refuse members that would land outside of the folder, were MD5 ever deceived."""
    # Python's default from 3.14 on. Releases before 3.11.4 have no such filter.
    if hasattr(tarfile, "data_filter"):
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_root",
        type=Path,
        default=DEFAULT_ROOT,
        help="where to put it; the last folder must be named flowers-102 (default: %(default)s)",
    )
    args = parser.parse_args()
    # What is there is not fetched again.
    if not is_complete(args.data_root):
        download(args.data_root)
    print(args.data_root)


if __name__ == "__main__":
    main()
