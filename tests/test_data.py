"""The index: layouts, splits, names, and what is said of files that are missing or damaged."""

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


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy")


def ids(flowers, split):
    return [int(flowers.files[i].stem[6:]) for i in flowers.splits[split]]


def test_splits_of_both_conventions(small):
    raw = {
        k: v.ravel().tolist()
        for k, v in scipy.io.loadmat(small / "setid.mat").items()
        if not k.startswith("_")
    }
    expected = {
        ("swapped", False): (raw["valid"] + raw["tstid"], [], raw["trnid"]),
        ("swapped", True): (raw["tstid"], raw["valid"], raw["trnid"]),
        ("official", False): (raw["trnid"] + raw["valid"], [], raw["tstid"]),
        ("official", True): (raw["trnid"], raw["valid"], raw["tstid"]),
    }
    for (splits, holdout), parts in expected.items():
        flowers = open_flowers(small, splits=splits, holdout=holdout)
        assert [ids(flowers, s) for s in ("train", "val", "test")] == [sorted(p) for p in parts]


def test_a_label_belongs_to_the_number_in_the_file_name(copy):
    labels = scipy.io.loadmat(copy / "imagelabels.mat")["labels"].ravel()
    (copy / "jpg" / "aaa.txt").write_text("sorts first")
    keep = np.array([5, 17, 40])
    scipy.io.savemat(copy / "setid.mat", {"trnid": keep[:1], "valid": keep[1:2], "tstid": keep[2:]})
    for i in set(range(1, 49)) - set(keep.tolist()):
        (copy / "jpg" / f"image_{i:05d}.jpg").unlink()
    flowers = open_flowers(copy)
    assert [f.name for f in flowers.files] == [
        "image_00005.jpg",
        "image_00017.jpg",
        "image_00040.jpg",
    ]
    assert flowers.labels.tolist() == [labels[i - 1] - 1 for i in keep]
    assert len(flowers.class_names) == 6


@pytest.mark.parametrize("base", [0, 1])
def test_the_original_layout_gives_the_same_index(small, copy, base):
    expected = open_flowers(small)
    (copy / "images").mkdir()
    (copy / "jpg").rename(copy / "images" / "jpg")
    np.savez(
        copy / "labels.npz", scipy.io.loadmat(copy / "imagelabels.mat")["labels"].reshape(2, -1)
    )
    raw = scipy.io.loadmat(copy / "setid.mat")
    (copy / "splits.json").write_text(
        json.dumps({k: (raw[k].ravel() - 1 + base).tolist() for k in ("trnid", "valid", "tstid")})
    )
    for name in ("imagelabels.mat", "setid.mat"):
        (copy / name).unlink()
    got = open_flowers(copy, splits_path=copy / "splits.json")
    assert [f.name for f in got.files] == [f.name for f in expected.files]
    assert np.array_equal(got.labels, expected.labels) and got.class_names == expected.class_names
    assert all(np.array_equal(got.splits[k], expected.splits[k]) for k in expected.splits)


def test_names(small, copy):
    oxford, openai = (
        open_flowers(small).class_names,
        open_flowers(small, class_names="openai").class_names,
    )
    assert [(a, b) for a, b in zip(oxford, openai) if a != b] == [
        ("ball moss", "air plant"),
        ("globe-flower", "globe flower"),
    ]
    (copy / "cat_to_name.json").unlink()
    assert len(open_flowers(copy).class_names) == 102  # those of the package


def test_nothing_of_the_index_can_be_changed(small):
    flowers = open_flowers(small)
    with pytest.raises(ValueError):
        flowers.labels[0] = 3
    with pytest.raises(AttributeError):
        flowers.root = "elsewhere"


def damage_missing_image(root):
    (root / "jpg" / "image_00007.jpg").unlink()
    return "image_00007.jpg"


def damage_id_without_label(root):
    raw = scipy.io.loadmat(root / "setid.mat")
    scipy.io.savemat(
        root / "setid.mat",
        {"trnid": raw["trnid"], "valid": raw["valid"], "tstid": np.append(raw["tstid"], 49)},
    )
    return "49"


def damage_overlap(root):
    raw = scipy.io.loadmat(root / "setid.mat")
    scipy.io.savemat(
        root / "setid.mat",
        {
            "trnid": raw["trnid"],
            "valid": raw["valid"],
            "tstid": np.append(raw["tstid"], raw["trnid"][0, 0]),
        },
    )
    return "more than once"


def damage_labels(root):
    (root / "imagelabels.mat").write_bytes((root / "imagelabels.mat").read_bytes()[:100])
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


@pytest.mark.parametrize(
    "damage", [f for name, f in sorted(globals().items()) if name.startswith("damage_")]
)
def test_damage_ends_with_one_line_that_names_it(copy, damage, cli):
    assert cli("flowers.data", "--data_root", copy)[0] == 0
    word = damage(copy)
    assert word in error_line(cli("flowers.data", "--data_root", copy))


def test_real_images(real, cli):
    code, out, _ = cli("flowers.data", "--data_root", real)
    assert (
        code == 0 and "5,868 images of 102 classes" in out and "train 5,150, val 0, test 718" in out
    )
    flowers = open_flowers(real, holdout=True, class_names="openai")
    assert [len(flowers.splits[s]) for s in ("train", "val", "test")] == [4427, 723, 718]
    oxford_names = open_flowers(real).class_names
    assert sum(a != b for a, b in zip(flowers.class_names, oxford_names)) == 3


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; while `cut` is set, the archive breaks off half-way."""

    cut = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.endswith(".tgz") and Server.cut:
            data = open(self.translate_path(self.path), "rb").read()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()


def test_download(tmp_path, monkeypatch, cli):
    """Through torchvision, from a server of ours: broken off, run again, checked, and said so before."""
    source = write_dataset(tmp_path / "site")
    with tarfile.open(source / "102flowers.tgz", "w:gz") as archive:
        archive.add(source / "jpg", "jpg")
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    monkeypatch.setattr(
        Flowers102,
        "_file_dict",
        {
            k: (name, hashlib.md5((source / name).read_bytes()).hexdigest())
            for k, name in names.items()
        },
    )
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Server, directory=source)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        Flowers102, "_download_url_prefix", f"http://127.0.0.1:{server.server_port}/"
    )
    monkeypatch.chdir(tmp_path)
    broken = cli("flowers.data")
    assert "run again" in error_line(broken) and "downloading" in broken[1]
    monkeypatch.setattr(Server, "cut", False)
    code, out, _ = cli("flowers.data")
    assert (
        code == 0
        and "48 images" in out
        and (tmp_path / "data" / "flowers-102" / "setid.mat").exists()
    )
    server.shutdown()
    server.server_close()
    code, out, _ = cli("flowers.data")
    assert code == 0 and "downloading" not in out  # what is there is not fetched again
    shutil.rmtree(tmp_path / "data")
    assert "--data_root sample" in error_line(cli("flowers.data"))  # no server


def test_captions(small, tmp_path):
    files = open_flowers(small).files
    path = tmp_path / "captions.jsonl.gz"
    with gzip.open(path, "wt") as out:
        for file in reversed(files):
            out.write(
                json.dumps({"file": file.name, "captions": [f"about {file.name}", "ünïcode"]})
                + "\n"
            )
    assert read_captions(path, files)[5] == [f"about {files[5].name}", "ünïcode"]
    with pytest.raises(UserError, match="no caption for image_99999"):
        read_captions(path, (*files, files[0].with_name("image_99999.jpg")))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        read_captions(path, files)
