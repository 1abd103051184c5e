"""The index: layouts, splits, names, and the messages about files that are missing or damaged."""

import functools
import gzip
import hashlib
import http.server
import json
import shutil
import tarfile
import threading

import numpy as np
import pytest
import scipy.io
from conftest import error_line, write_dataset
from torchvision.datasets import Flowers102

from flowers import UserError
from flowers.data import open_flowers
from flowers.layouts import read_captions

SPLIT_NAMES = ("trnid", "valid", "tstid")


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small dataset that a test may change."""
    return shutil.copytree(small, tmp_path / "copy")


def read_setid(root):
    """The ids of setid.mat by split, each an array (1, n)."""
    contents = scipy.io.loadmat(root / "setid.mat")
    return {name: contents[name] for name in SPLIT_NAMES}


def ids(flowers, split):
    """The image ids of a split, from the file names."""
    files = [flowers.files[i] for i in flowers.splits[split]]
    return [int(file.stem.removeprefix("image_")) for file in files]


# -----------------------------------------------------------------------------
# the index


def test_splits_of_both_conventions(small):
    raw = {name: array.ravel().tolist() for name, array in read_setid(small).items()}
    expected = {
        # (splits, holdout): train, val, test
        ("swapped", False): (raw["valid"] + raw["tstid"], [], raw["trnid"]),
        ("swapped", True): (raw["tstid"], raw["valid"], raw["trnid"]),
        ("official", False): (raw["trnid"] + raw["valid"], [], raw["tstid"]),
        ("official", True): (raw["trnid"], raw["valid"], raw["tstid"]),
    }
    for (splits, holdout), parts in expected.items():
        flowers = open_flowers(small, splits=splits, holdout=holdout)
        got = [ids(flowers, split) for split in ("train", "val", "test")]
        assert got == [sorted(part) for part in parts]


def test_a_label_belongs_to_the_number_in_the_file_name(copy):
    labels = scipy.io.loadmat(copy / "imagelabels.mat")["labels"].ravel()

    # Three images are left, and a file that is first in the sorted folder: counting files is wrong.
    (copy / "jpg" / "aaa.txt").write_text("sorts first")
    keep = np.array([5, 17, 40])
    scipy.io.savemat(copy / "setid.mat", {"trnid": keep[:1], "valid": keep[1:2], "tstid": keep[2:]})
    for image_id in range(1, 49):
        if image_id not in keep:
            (copy / "jpg" / f"image_{image_id:05d}.jpg").unlink()

    flowers = open_flowers(copy)
    names = [file.name for file in flowers.files]
    assert names == ["image_00005.jpg", "image_00017.jpg", "image_00040.jpg"]
    assert flowers.labels.tolist() == [labels[image_id - 1] - 1 for image_id in keep]
    assert len(flowers.class_names) == 6


@pytest.mark.parametrize("base", [0, 1])
def test_the_original_layout_gives_the_same_index(small, copy, base):
    """base: the original project's JSON files count images from 0 or from 1."""
    expected = open_flowers(small)

    (copy / "images").mkdir()
    (copy / "jpg").rename(copy / "images" / "jpg")
    labels = scipy.io.loadmat(copy / "imagelabels.mat")["labels"]
    np.savez(copy / "labels.npz", labels.reshape(2, -1))  # its shape does not matter
    split_ids = {
        name: (array.ravel() - 1 + base).tolist() for name, array in read_setid(copy).items()
    }
    (copy / "splits.json").write_text(json.dumps(split_ids))
    (copy / "imagelabels.mat").unlink()
    (copy / "setid.mat").unlink()

    got = open_flowers(copy, splits_path=copy / "splits.json")
    assert [file.name for file in got.files] == [file.name for file in expected.files]
    assert np.array_equal(got.labels, expected.labels)
    assert got.class_names == expected.class_names
    for split, index in expected.splits.items():
        assert np.array_equal(got.splits[split], index)


def test_names(small, copy):
    oxford = open_flowers(small).class_names
    openai = open_flowers(small, class_names="openai").class_names
    different = [(a, b) for a, b in zip(oxford, openai) if a != b]
    assert different == [("ball moss", "air plant"), ("globe-flower", "globe flower")]

    # Without a file of names, those of the package.
    (copy / "cat_to_name.json").unlink()
    assert len(open_flowers(copy).class_names) == 102


def test_nothing_of_the_index_can_be_changed(small):
    flowers = open_flowers(small)
    with pytest.raises(ValueError):
        flowers.labels[0] = 3
    with pytest.raises(AttributeError):
        flowers.root = "elsewhere"


def test_real_images(real, cli):
    code, out, _ = cli("flowers.data", "--data_root", real)
    assert code == 0
    assert "5,868 images of 102 classes" in out
    assert "train 5,150, val 0, test 718" in out

    flowers = open_flowers(real, holdout=True, class_names="openai")
    sizes = [len(flowers.splits[split]) for split in ("train", "val", "test")]
    assert sizes == [4427, 723, 718]
    oxford = open_flowers(real).class_names
    # Not four: copies that call class 78 "lotus lotus" are corrected.
    assert sum(a != b for a, b in zip(flowers.class_names, oxford)) == 3


# -----------------------------------------------------------------------------
# damage: each function harms a folder and returns what the message must name


def damage_missing_image(root):
    (root / "jpg" / "image_00007.jpg").unlink()
    return "image_00007.jpg"


def damage_id_without_label(root):
    split_ids = read_setid(root)
    split_ids["tstid"] = np.append(split_ids["tstid"], 49)
    scipy.io.savemat(root / "setid.mat", split_ids)
    return "49"


def damage_overlap(root):
    split_ids = read_setid(root)
    split_ids["tstid"] = np.append(split_ids["tstid"], split_ids["trnid"][0, 0])
    scipy.io.savemat(root / "setid.mat", split_ids)
    return "more than once"


def damage_labels(root):
    path = root / "imagelabels.mat"
    path.write_bytes(path.read_bytes()[:100])
    return "imagelabels.mat"


def damage_pickled_labels(root):
    (root / "imagelabels.mat").unlink()
    np.savez(root / "labels.npz", np.array([{"a": 1}] * 48, dtype=object))
    return "labels.npz"


def damage_names(root):
    (root / "cat_to_name.json").write_text('{"1": "rose"}')
    return "class 2"


def damage_splits(root):
    (root / "setid.mat").unlink()
    return "setid.mat"


def damage_folder(root):
    shutil.rmtree(root / "jpg")
    return "jpg"


def damage_everything(root):
    shutil.rmtree(root)
    return "--data_root"


DAMAGES = [
    damage_everything,
    damage_folder,
    damage_id_without_label,
    damage_labels,
    damage_missing_image,
    damage_names,
    damage_overlap,
    damage_pickled_labels,
    damage_splits,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_ends_with_one_line_that_names_it(copy, damage, cli):
    code, _, _ = cli("flowers.data", "--data_root", copy)
    assert code == 0
    word = damage(copy)
    assert word in error_line(cli("flowers.data", "--data_root", copy))


# -----------------------------------------------------------------------------
# the download


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; while `cut` is set, the archive breaks off half-way."""

    cut = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        if not self.path.endswith(".tgz") or not Server.cut:
            super().do_GET()
            return
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server here, from which torchvision downloads the small dataset into the working folder."""
    source = write_dataset(tmp_path / "site")
    with tarfile.open(source / "102flowers.tgz", "w:gz") as archive:
        archive.add(source / "jpg", "jpg")
    file_dict = {}
    for key, name in (
        ("image", "102flowers.tgz"),
        ("label", "imagelabels.mat"),
        ("setid", "setid.mat"),
    ):
        file_dict[key] = (name, hashlib.md5((source / name).read_bytes()).hexdigest())

    handler = functools.partial(Server, directory=source)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(Flowers102, "_file_dict", file_dict)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", address)
    monkeypatch.setattr(Server, "cut", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWERS_DATA", "data/flowers-102")
    yield server
    server.shutdown()
    server.server_close()


def test_download(site, tmp_path, monkeypatch, cli):
    """Through torchvision: broken off, run again, checked, and announced."""
    broken = cli("flowers.data")
    assert "run again" in error_line(broken)
    assert "downloading" in broken[1]

    monkeypatch.setattr(Server, "cut", False)
    code, out, _ = cli("flowers.data")
    assert code == 0
    assert "48 images" in out
    assert (tmp_path / "data" / "flowers-102" / "setid.mat").exists()

    # What is there is not fetched again: the server could not be reached.
    site.shutdown()
    site.server_close()
    code, out, _ = cli("flowers.data")
    assert code == 0
    assert "downloading" not in out

    shutil.rmtree(tmp_path / "data")
    assert "--data_root sample" in error_line(cli("flowers.data"))


def test_the_download_is_a_command_of_its_own(site, tmp_path, monkeypatch, cli):
    assert "run again" in error_line(cli("flowers.download"))

    monkeypatch.setattr(Server, "cut", False)
    code, out, _ = cli("flowers.download")
    assert code == 0
    assert out.strip().endswith("data/flowers-102")
    assert len(open_flowers(tmp_path / "data" / "flowers-102").files) == 48


# -----------------------------------------------------------------------------
# captions


def test_download_to_a_folder_of_any_name(tmp_path, site, monkeypatch, cli):
    """Broken off, refused by other scripts, and run again; nothing is left beside the folder."""
    folder = tmp_path / "my disk" / "pictures"
    broken = cli("flowers.download", "--data_root", folder)
    assert "run again" in error_line(broken)
    assert "broke off" in error_line(cli("flowers.data", "--data_root", folder))
    monkeypatch.setattr(Server, "cut", False)
    code, out, err = cli("flowers.download", "--data_root", folder)
    assert code == 0 and out.strip() == str(folder), err
    code, out, err = cli("flowers.data", "--data_root", folder)
    assert code == 0 and "48 images" in out, err
    assert [path.name for path in folder.parent.iterdir()] == ["pictures"]


def test_captions(small, tmp_path):
    files = open_flowers(small).files
    path = tmp_path / "captions.jsonl.gz"
    with gzip.open(path, "wt") as out:
        # In another order than that of the index.
        for file in reversed(files):
            row = {"file": file.name, "captions": [f"about {file.name}", "ünïcode"]}
            out.write(json.dumps(row) + "\n")
    assert read_captions(path, files)[5] == [f"about {files[5].name}", "ünïcode"]

    unknown = files[0].with_name("image_99999.jpg")
    with pytest.raises(UserError, match="no caption for image_99999"):
        read_captions(path, (*files, unknown))

    # The last of two lines would be taken without a word.
    plain = tmp_path / "captions.jsonl"
    lines = [json.dumps({"file": file.name, "captions": ["a"]}) for file in files]
    again = json.dumps({"file": files[3].name, "captions": ["b"]})
    plain.write_text("\n".join([*lines, lines[3]]) + "\n")
    assert read_captions(plain, files)[3] == ["a"]
    plain.write_text("\n".join([*lines, again]) + "\n")
    with pytest.raises(UserError, match=f"{files[3].name} is there twice"):
        read_captions(plain, files)

    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        read_captions(path, files)
