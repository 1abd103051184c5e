"""Download Oxford Flowers 102 through torchvision, with progress and MD5 checks.

    python -m flowers.download                            # 345 MB, where scripts look for it
    python -m flowers.download --data_root ANY/FOLDER

A download that broke off goes on, when it is run again, at the first file that is not complete.
"""

import argparse
import contextlib
import os
import socket
import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from flowers import UserError, command
from flowers.files import user_path

# A file beside the data while it is fetched: a part of an archive may look like a complete folder.
UNFINISHED = ".downloading"
ARCHIVE = "102flowers.tgz"
# Seconds to wait for a server that sends nothing.
PATIENCE = 60


def default_root() -> str:
    """Where the dataset is looked for: $FLOWERS_DATA, else `data_folder("flowers-102")`."""
    return user_path(os.environ.get("FLOWERS_DATA", "")) or data_folder("flowers-102")


def data_folder(name: str) -> str:
    """`data/NAME` in the working directory if it is there, else beside the repository."""
    here = Path("data") / name
    repository = Path(__file__).resolve().parent.parent
    # A package that was installed without its repository has no place of its own.
    is_repository = (repository / "pyproject.toml").exists()
    try:
        is_here = here.exists()
    except PermissionError:
        is_here = False  # a folder that may not be looked into
    if is_here or not is_repository or repository == Path.cwd():
        return str(here)
    return str(repository / here)


def is_complete(root: Path) -> bool:
    """Whether `root` holds a finished download, or a dataset that was got in another way."""
    if (root / "images" / "jpg").is_dir():
        return True
    if (root / UNFINISHED).exists():
        return False
    # What torchvision unpacks. Whether the images are all there is seen when they are opened.
    needed = ("jpg", "imagelabels.mat", "setid.mat")
    if all((root / name).exists() for name in needed):
        return True
    # Nothing is downloaded into a folder of something else.
    if not root.is_dir() or any((root / name).exists() for name in (*needed, ARCHIVE)):
        return False
    return any(not path.name.startswith(".") for path in root.iterdir())


def download(data_root: str | Path) -> Path:
    """Fetch what is missing of the dataset into a folder, and return the folder.

    Raises UserError if the site can't be reached, or a checksum is wrong.
    """
    # Imported late: torchvision takes seconds, and who has the data needs no download.
    from torchvision.datasets import Flowers102

    root = Path(data_root)

    class AnyFolder(Flowers102):
        """torchvision's dataset in a folder of any name: it insists on `flowers-102`."""

        @property
        def _base_folder(self) -> Path:
            return root

        @_base_folder.setter
        def _base_folder(self, folder: Path) -> None:
            pass

    _unpack_safely()
    root.mkdir(parents=True, exist_ok=True)
    # The mark stays if anything fails, a kill included.
    (root / UNFINISHED).touch()
    try:
        # torchvision keeps the files whose checksum is right, and fetches the others.
        with patience():
            AnyFolder(str(root.parent), download=True)
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
        type=user_path,
        default=default_root(),
        help="the folder to put it in (default: %(default)s; $FLOWERS_DATA sets another)",
    )
    args = parser.parse_args()
    root = Path(args.data_root)
    # What is there is not fetched again.
    if not is_complete(root):
        download(root)
    print(root)


if __name__ == "__main__":
    main()
