"""Copies of the dataset as people have them, against torchvision's readers and plain loops."""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import ROOT, error_line, write_dataset
from PIL import Image
from torchvision.datasets import Flowers102, ImageFolder

import flowers
from flowers import UserError
from flowers.data import image_ids, open_flowers
from flowers.download import data_folder, default_root
from flowers.files import user_path
from flowers.layouts import official_labels, read_captions
from flowers.pixels import read_jpeg
from flowers.splits import RANDOM_FILE

PARTS = ("train", "val", "test")
# Sorted as text, 10 and 100 come before 2.
CLASSES = (1, 2, 3, 10, 11, 78, 100)
PER_CLASS = {"train": 3, "valid": 1, "test": 2}
OXFORD_NAMES = json.loads((Path(flowers.__file__).parent / "cat_to_name.json").read_text())


def write_picture(path: Path, seed: int, form: str = "JPEG") -> None:
    """A picture of 12 x 10 pixels; each seed has another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
    image.save(path, form)


def write_oxford_classes(root: Path, folder_of=str) -> dict[int, Path]:
    """Class folders as Udacity's copy has them, of a few of Oxford's images; number -> path.

    folder_of: the name of a class's folder, from its label.
    """
    labels = official_labels()
    path_of = {}
    for label in CLASSES:
        numbers = iter((np.flatnonzero(labels == label) + 1).tolist())
        for part, n_images in PER_CLASS.items():
            for _ in range(n_images):
                number = next(numbers)
                path = root / part / folder_of(label) / f"image_{number:05d}.jpg"
                write_picture(path, number)
                path_of[number] = path
    return path_of


def write_own_classes(root: Path, names=("red_rose", "tulip", "Aster"), per_class=10) -> Path:
    """Class folders without splits, in which file names occur again in each folder."""
    for k, name in enumerate(names):
        for i in range(per_class):
            write_picture(root / name / f"{i}.jpg", 100 * k + i)
    return root


def write_json(path: Path, value: dict) -> Path:
    path.write_text(json.dumps(value))
    return path


def triples(data, part: str) -> set[tuple]:
    """File, label and class name of each image of a part, as we read them."""
    rows = set()
    for i in data.splits[part]:
        rows.add((data.files[i], data.labels[i], data.class_names[data.labels[i]]))
    return rows


# -----------------------------------------------------------------------------
# torchvision's folder


def test_torchvision_s_own_reader_gives_the_same(tmp_path, monkeypatch):
    root = write_dataset(tmp_path / "flowers-102")
    names = {"label": "imagelabels.mat", "setid": "setid.mat"}
    checksums = {"image": ("102flowers.tgz", "")}
    for key, name in names.items():
        checksums[key] = (name, hashlib.md5((root / name).read_bytes()).hexdigest())
    monkeypatch.setattr(Flowers102, "_file_dict", checksums)
    data = open_flowers(root, splits="official", holdout=True)
    for part in PARTS:
        theirs = Flowers102(str(tmp_path), split=part)
        expected = set(zip(theirs._image_files, theirs._labels))
        ours = {(file, label) for file, label, _ in triples(data, part)}
        assert ours == expected and len(ours) == len(data.splits[part])


def test_the_folder_above_gives_the_same(tmp_path):
    inner = write_dataset(tmp_path / "downloads" / "flowers-102")
    (tmp_path / "downloads" / "mnist").mkdir()
    outer = open_flowers(tmp_path / "downloads")
    assert outer.files == open_flowers(inner).files and outer.root == inner
    # As archives are unpacked, into a folder of any name.
    inner.rename(tmp_path / "flower_data")
    shutil.rmtree(tmp_path / "downloads")
    assert open_flowers(tmp_path).root == tmp_path / "flower_data"


def test_endings_and_hidden_files(small, tmp_path):
    expected = open_flowers(small)
    root = shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    jpg = root / "jpg"
    for number, ending in enumerate(["JPG", "jpeg", "JPEG", "Jpg"], start=1):
        (jpg / f"image_{number:05d}.jpg").rename(jpg / f"image_{number:05d}.{ending}")
    for number, ending in ((5, ".png"), (6, ".WebP")):
        with Image.open(jpg / f"image_{number:05d}.jpg") as image:
            image.save(jpg / f"image_{number:05d}{ending}")
        (jpg / f"image_{number:05d}.jpg").unlink()
    for name in (".DS_Store", "._image_00009.jpg", "Thumbs.db"):
        (jpg / name).write_bytes(b"no picture")
    data = open_flowers(root)
    assert [file.stem for file in data.files] == [file.stem for file in expected.files]
    assert np.array_equal(data.labels, expected.labels)
    for file in data.files[:6]:
        assert read_jpeg(file).shape[0] == 3

    shutil.copy(jpg / "image_00007.jpg", jpg / "image_00007.png")
    with pytest.raises(UserError, match="same number"):
        open_flowers(root)


# -----------------------------------------------------------------------------
# Oxford's images in class folders


def test_class_folders_of_oxford_against_image_folder(tmp_path):
    """Udacity's copy: its own split, Oxford's labels as numbers, names of cat_to_name.json."""
    write_oxford_classes(tmp_path)
    (tmp_path / "train" / "10" / "._image_07100.jpg").write_bytes(b"macOS")
    data = open_flowers(tmp_path, holdout=True)
    for part, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        theirs = ImageFolder(tmp_path / folder, is_valid_file=lambda p: "._" not in p)
        expected = set()
        for path, index in theirs.samples:
            expected.add((Path(path), OXFORD_NAMES[theirs.classes[index]]))
        ours = {(file, name) for file, _, name in triples(data, part)}
        assert ours == expected and len(ours) == len(CLASSES) * PER_CLASS[folder]
    assert data.class_names == tuple(OXFORD_NAMES[str(label)] for label in CLASSES)
    assert (data.name, data.protocol) == ("Oxford Flowers 102", "the folder's own")
    assert data.convention == "folder"
    # Without a holdout, valid is trained on.
    assert len(open_flowers(tmp_path).splits["train"]) == 4 * len(CLASSES)


def test_class_folders_called_by_oxford_s_names(tmp_path):
    path_of = write_oxford_classes(tmp_path, lambda label: OXFORD_NAMES[str(label)].title())
    data = open_flowers(tmp_path)
    assert data.name == "Oxford Flowers 102"
    labels = official_labels()
    for file, label, name in triples(data, "test"):
        number = int(file.stem[6:])
        assert file == path_of[number] and name == OXFORD_NAMES[str(labels[number - 1])]
        assert CLASSES[label] == labels[number - 1]


def test_the_names_beside_a_nested_folder(tmp_path):
    write_oxford_classes(tmp_path / "dataset")
    names = {number: f"kind {number}" for number in OXFORD_NAMES}
    write_json(tmp_path / "cat_to_name.json", names)
    assert open_flowers(tmp_path).class_names[3] == "kind 10"


TEXT_ORDER = sorted(range(1, 103), key=str)


@pytest.mark.parametrize(
    "folder_of",
    [
        lambda label: str(TEXT_ORDER.index(label) + 1),
        lambda label: str(TEXT_ORDER.index(label)),
        lambda label: str(label - 1),
        lambda label: OXFORD_NAMES[str(TEXT_ORDER.index(label) + 1)],
    ],
    ids=["sorted as text", "sorted as text from 0", "from 0", "names of a text sort"],
)
def test_folders_that_are_not_oxford_s_labels_are_refused(tmp_path, folder_of, cli):
    write_oxford_classes(tmp_path, folder_of)
    assert "text sort" in error_line(cli("flowers.data", "--data_root", tmp_path))


def test_a_misplaced_image_is_named(tmp_path):
    path = write_oxford_classes(tmp_path)[official_labels().tolist().index(10) + 1]
    path.rename(tmp_path / "train" / "11" / path.name)
    with pytest.raises(UserError, match=f"11/{path.name} is an image of Oxford's class 10"):
        open_flowers(tmp_path)


def test_an_image_of_training_and_test_is_refused(tmp_path):
    path = next(iter(write_oxford_classes(tmp_path).values()))
    shutil.copy(path, tmp_path / "test" / "1" / path.name)
    with pytest.raises(UserError, match="twice"):
        open_flowers(tmp_path)


def test_labels_in_the_order_of_a_text_sort_are_refused(tmp_path, small):
    root = shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    (root / "cat_to_name.json").unlink()
    labels = np.array([TEXT_ORDER.index(label) + 1 for label in official_labels()])
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels[None]})
    with pytest.raises(UserError, match="text sort"):
        open_flowers(root)


def test_a_flat_test_folder_is_refused(tmp_path):
    """A copy on Kaggle has its test images in one folder, without labels."""
    write_oxford_classes(tmp_path)
    shutil.rmtree(tmp_path / "test")
    write_picture(tmp_path / "test" / "image_00005.jpg", 5)
    with pytest.raises(UserError, match="no class folder"):
        open_flowers(tmp_path)


def test_oxford_s_split_of_class_folders(tmp_path):
    path_of = write_oxford_classes(tmp_path / "data")
    numbers = sorted(path_of)
    split = {"trnid": numbers[::3], "valid": numbers[1::3], "tstid": numbers[2::3]}
    scipy.io.savemat(tmp_path / "setid.mat", split)
    data = open_flowers(tmp_path / "data", tmp_path / "setid.mat", holdout=True)
    assert data.protocol == data.convention == "swapped"
    for part, name in (("train", "tstid"), ("val", "valid"), ("test", "trnid")):
        files = {data.files[i] for i in data.splits[part]}
        assert files == {path_of[number] for number in split[name]}


def test_the_official_labels(real):
    labels = scipy.io.loadmat(real / "imagelabels.mat")["labels"].ravel().astype(np.int64)
    assert np.array_equal(official_labels(), labels)


def test_the_digest_of_the_official_labels():
    digest = hashlib.sha256(official_labels().astype("<i8").tobytes()).hexdigest()
    assert digest == "367c2926e99279fb7cd239e235dd8f67d76d48e7c16575c638509c9dec48293c"


# -----------------------------------------------------------------------------
# any dataset of one folder a class


@pytest.mark.parametrize("parts", [(), ("train", "test"), ("Train", "Validation", "TEST")])
def test_own_classes_against_image_folder(tmp_path, parts):
    for part in parts or ("",):
        write_own_classes(tmp_path / part)
    data = open_flowers(tmp_path, holdout=True, needs_split=bool(parts))
    assert data.class_names == ("Aster", "red rose", "tulip")
    for part in parts or ("",):
        theirs = ImageFolder(tmp_path / part)
        expected = {(Path(path), label) for path, label in theirs.samples}
        key = {"": "", "Validation": "val"}.get(part, part.lower())
        index = data.splits[key] if key else range(len(data.files))
        assert {(data.files[i], data.labels[i]) for i in index} == expected
    assert (data.name, data.is_numbered) == (tmp_path.name, False)
    assert len(set(data.file_names)) == len(data.files)


def test_numbers_as_folders_need_names(tmp_path):
    write_own_classes(tmp_path, ("10", "2", "1"))
    with pytest.raises(UserError, match="numbers: say their names"):
        open_flowers(tmp_path, needs_split=False)
    names = {"1": "rose", "2": "tulip", "10": "aster"}
    write_json(tmp_path / "cat_to_name.json", names)
    data = open_flowers(tmp_path, needs_split=False)
    assert data.class_names == ("rose", "tulip", "aster")
    assert data.files[-1].parent.name == "10"
    write_json(tmp_path / "cat_to_name.json", names | {"2": "Rose"})
    with pytest.raises(UserError, match="same name"):
        open_flowers(tmp_path, needs_split=False)


def test_what_is_wrong_with_class_folders(tmp_path, capsys):
    def error(root, **arguments) -> str:
        with pytest.raises(UserError) as caught:
            open_flowers(root, **arguments)
        return str(caught.value)

    assert "one class only" in error(write_own_classes(tmp_path / "one", ("rose",)))
    empty = write_own_classes(tmp_path / "empty")
    (empty / "lily").mkdir()
    assert "lily holds no picture" in error(empty)
    deep = write_own_classes(tmp_path / "deep")
    write_picture(deep / "tulip" / "more" / "1.jpg", 1)
    assert "pictures and folders" in error(deep)
    no_split = write_own_classes(tmp_path / "no_split")
    assert "--splits random" in error(no_split)
    assert "needs 3" in error(write_own_classes(tmp_path / "few", per_class=2), splits="random")
    no_test = tmp_path / "no_test"
    for part in ("train", "val"):
        write_own_classes(no_test / part)
    assert "no test/" in error(no_test)
    (no_test / "valid").mkdir()
    assert "two folders for val" in error(no_test)
    (tmp_path / "nothing").mkdir()
    assert "jpg/" in error(tmp_path / "nothing")

    (no_split / "tulip" / "a.HEIC").write_bytes(b"a picture of a telephone")
    open_flowers(no_split, splits="random")
    assert "1 pictures" in capsys.readouterr().err


def test_captions_of_names_that_occur_twice_are_refused(tmp_path):
    data = open_flowers(write_own_classes(tmp_path / "data"), needs_split=False)
    lines = [json.dumps({"file": f"{i}.jpg", "captions": ["red"]}) for i in range(10)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="have the same"):
        read_captions(tmp_path / "captions.jsonl", data.files)


# -----------------------------------------------------------------------------
# random splits


def test_a_random_split_is_stratified_and_shared(tmp_path, capsys):
    root = write_own_classes(tmp_path / "data")
    data = open_flowers(root, splits="random", holdout=True)
    assert str(root / RANDOM_FILE) in capsys.readouterr().err
    assert (data.convention, data.protocol) == ("random", "random 60/20/20 (seed 0)")
    for part, n_images in (("train", 6), ("val", 2), ("test", 2)):
        assert Counter(data.labels[data.splits[part]].tolist()) == dict.fromkeys(range(3), n_images)
    listed = np.concatenate(list(data.splits.values()))
    assert sorted(listed) == list(range(30))

    # The file is read, not made again; made again, it is the same.
    again = open_flowers(root, splits="random", holdout=True)
    first = (root / RANDOM_FILE).read_bytes()
    (root / RANDOM_FILE).unlink()
    anew = open_flowers(root, splits="random", holdout=True)
    assert (root / RANDOM_FILE).read_bytes() == first
    for part in PARTS:
        assert np.array_equal(data.splits[part], again.splits[part])
        assert np.array_equal(data.splits[part], anew.splits[part])
    # valid is trained on, as everywhere, unless it is held out.
    assert len(open_flowers(root, splits="random").splits["train"]) == 24

    write_picture(root / "tulip" / "new.jpg", 1000)
    with pytest.raises(UserError, match="delete it"):
        open_flowers(root, splits="random")
    (root / "tulip" / "new.jpg").unlink()
    (root / "tulip" / "3.jpg").unlink()
    with pytest.raises(UserError, match="missing image tulip/3.jpg"):
        open_flowers(root, splits="random")


def test_a_random_split_of_a_read_only_dataset(tmp_path, monkeypatch):
    root = write_own_classes(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root.chmod(0o555)
    try:
        open_flowers(root, splits="random")
        assert not (root / RANDOM_FILE).exists()
        assert len(list((tmp_path / "cache").rglob(RANDOM_FILE))) == 1
        open_flowers(root, splits="random")
    finally:
        root.chmod(0o755)


# -----------------------------------------------------------------------------
# CoOp's split


def coop_rows(small: Path, numbers: list[int]) -> list[list]:
    """[file, 0-based label, name] of each image, as CoOp's file has them."""
    labels = scipy.io.loadmat(small / "imagelabels.mat")["labels"].ravel()
    names = json.loads((small / "cat_to_name.json").read_text())
    rows = []
    for number in numbers:
        label = int(labels[number - 1])
        rows.append([f"image_{number:05d}.jpg", label - 1, names[str(label)]])
    return rows


@pytest.fixture
def coop(small, tmp_path):
    """A split in CoOp's form: images 1-30 train, 31-36 val, 37-48 test."""
    contents = {
        "train": coop_rows(small, range(1, 31)),
        "val": coop_rows(small, range(31, 37)),
        "test": coop_rows(small, range(37, 49)),
    }
    return write_json(tmp_path / "split_zhou_OxfordFlowers.json", contents)


def test_coop_s_split_against_a_plain_loop(small, coop, capsys):
    contents = json.loads(coop.read_text())
    data = open_flowers(small, coop, holdout=True)
    for part in PARTS:
        expected = {(name, label, title) for name, label, title in contents[part]}
        assert {(file.name, *rest) for file, *rest in triples(data, part)} == expected
    assert (data.protocol, data.convention) == ("CoOp's", "file")
    # Used as it is: val is not trained on.
    without = open_flowers(small, coop)
    assert len(without.splits["train"]) == 30 and len(without.splits["val"]) == 0
    # Neither is it swapped, and that is said.
    assert capsys.readouterr().err == ""
    named = open_flowers(small, coop, splits="official")
    assert np.array_equal(named.splits["test"], data.splits["test"])
    assert "the split is CoOp's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda c: c["test"][0].__setitem__(1, 5), "label 5"),
        (lambda c: c["test"][0].__setitem__(2, "daisy"), "a daisy"),
        (lambda c: c["test"].append(c["train"][0]), "more than once"),
        (lambda c: c["test"].append(["image_00099.jpg", 0, "rose"]), "missing image image_00099"),
        (lambda c: c["test"].append(["image_00001.jpg", "0", "rose"]), "its rows are"),
        (lambda c: c["test"].append("image_00001.jpg"), "its rows are"),
        (lambda c: c.pop("test"), "no image under train or test"),
        (lambda c: c.update(train={"a": 1}), "train is no list"),
        (lambda c: c.update(valid=c.pop("val")), "under valid: call it val"),
    ],
)
def test_a_split_of_coop_s_form_is_checked(small, coop, change, word):
    contents = json.loads(coop.read_text())
    change(contents)
    write_json(coop, contents)
    with pytest.raises(UserError, match=word):
        open_flowers(small, coop)


def test_coop_s_split_of_class_folders(tmp_path):
    """Its labels are Oxford's, also where the copy has fewer classes; all spellings are known."""
    path_of = write_oxford_classes(tmp_path / "data")
    labels = official_labels()
    contents = {part: [] for part in PARTS}
    for k, number in enumerate(sorted(path_of)):
        label = int(labels[number - 1])
        name = "lotus lotus" if label == 78 else OXFORD_NAMES[str(label)]
        contents[PARTS[k % 3]].append([f"image_{number:05d}.jpg", label - 1, name])
    path = write_json(tmp_path / "split_zhou_OxfordFlowers.json", contents)
    data = open_flowers(tmp_path / "data", path, holdout=True)
    for part in PARTS:
        expected = {path_of[int(row[0][6:11])] for row in contents[part]}
        assert {file for file, _, _ in triples(data, part)} == expected


def test_which_splits_go_together(small, tmp_path, coop, capsys):
    write_oxford_classes(tmp_path / "data")
    own = write_own_classes(tmp_path / "own")
    swapped = open_flowers(tmp_path / "data", splits="swapped")
    assert swapped.convention == "folder"
    assert "the split is the folder's own" in capsys.readouterr().err
    for root, path, splits, word in (
        (small, None, "folder", "trnid, valid and tstid"),
        (small, None, "file", "trnid, valid and tstid"),
        (small, coop, "random", "give one of them"),
        (small, coop, "folder", "CoOp's"),
        (own, small / "setid.mat", None, "not numbered"),
    ):
        with pytest.raises(UserError, match=word):
            open_flowers(root, path, splits)


# -----------------------------------------------------------------------------
# what ids count from


def write_ids(path: Path, first: int, last: int, **more) -> Path:
    ids = list(range(first, last + 1))
    split = {"trnid": ids[::3], "valid": ids[1::3], "tstid": ids[2::3]}
    return write_json(path, split | more)


@pytest.mark.parametrize(
    "first, last, in_file, flag, expected",
    [
        # The labels are those of the ids 1 to 48.
        (0, 40, None, None, 0),
        (5, 48, None, None, 1),
        (5, 40, 0, None, 0),
        (5, 40, 1, None, 1),
        (5, 40, None, 0, 0),
        (5, 40, None, 1, 1),
        (5, 40, 0, 0, 0),
        (5, 40, None, None, "--splits_base"),
        (5, 40, 0, 1, "one is wrong"),
        (5, 40, "zero", None, "from 0 or from 1"),
        (5, 40, True, None, "from 0 or from 1"),
        (0, 48, None, None, "image id 48, which has no label"),
        (0, 40, 1, None, "image id 0, which has no label"),
        (5, 48, None, 0, "image id 48, which has no label"),
    ],
)
def test_what_the_ids_count_from(small, tmp_path, capsys, first, last, in_file, flag, expected):
    more = {} if in_file is None else {"base": in_file}
    path = write_ids(tmp_path / "split.json", first, last, **more)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            open_flowers(small, path, splits_base=flag)
        return
    data = open_flowers(small, path, splits_base=flag)
    numbers = [int(file.stem[6:]) for file in data.files]
    assert numbers == [i + 1 - expected for i in range(first, last + 1)]
    assert f"count from {expected}" in capsys.readouterr().err


def test_the_base_of_other_files(small, coop):
    with pytest.raises(UserError, match="--splits_base"):
        open_flowers(small, small / "setid.mat", splits_base=0)
    with pytest.raises(UserError, match="--splits_base"):
        open_flowers(small, coop, splits_base=0)


def test_json_with_a_byte_order_mark(small, tmp_path):
    root = shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    mark = b"\xef\xbb\xbf"
    names = root / "cat_to_name.json"
    names.write_bytes(mark + names.read_bytes())
    split = write_ids(tmp_path / "split.json", 1, 48)
    split.write_bytes(mark + split.read_bytes())
    data = open_flowers(root, split)
    assert data.class_names[0] == "rose"
    lines = [json.dumps({"file": file.name, "captions": ["red"]}) for file in data.files]
    (tmp_path / "captions.jsonl").write_bytes(mark + "\n".join(lines).encode())
    assert read_captions(tmp_path / "captions.jsonl", data.files)[0] == ["red"]


# -----------------------------------------------------------------------------
# which picture it is


def test_ids_are_the_same_in_every_copy_of_oxford_s(tmp_path):
    path_of = write_oxford_classes(tmp_path / "classes")
    jpg = tmp_path / "oxford" / "jpg"
    jpg.mkdir(parents=True)
    for path in path_of.values():
        shutil.copy(path, jpg / path.name)
    numbers = sorted(path_of)
    split = {"trnid": numbers[::3], "valid": numbers[1::3], "tstid": numbers[2::3]}
    scipy.io.savemat(tmp_path / "oxford" / "setid.mat", split)
    scipy.io.savemat(tmp_path / "oxford" / "imagelabels.mat", {"labels": official_labels()[None]})
    expected = tuple(f"oxford-flowers-102:{number:05d}" for number in numbers)
    for name in ("classes", "oxford"):
        data = open_flowers(tmp_path / name)
        assert image_ids(data, range(len(numbers))) == expected
        assert data.name == "Oxford Flowers 102"


def test_ids_of_other_pictures_are_their_bytes(small, tmp_path):
    data = open_flowers(small)
    digest = hashlib.sha256(data.files[3].read_bytes()).hexdigest()[:16]
    assert image_ids(data, [3]) == (digest,) and data.name == "small"
    own = open_flowers(write_own_classes(tmp_path / "own"), needs_split=False)
    assert len(set(image_ids(own, range(30)))) == 30


# -----------------------------------------------------------------------------
# pictures


def test_content_says_what_a_picture_is(tmp_path):
    """A PNG named .jpg is read as Pillow reads it; what is no JPEG, PNG or WebP is named."""
    for form in ("PNG", "WEBP"):
        path = tmp_path / f"{form}.jpg"
        write_picture(path, 1, form)
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(read_jpeg(path).permute(1, 2, 0), expected)
    write_picture(tmp_path / "gif.jpg", 1, "GIF")
    with pytest.raises(UserError, match="it is a GIF"):
        read_jpeg(tmp_path / "gif.jpg")
    deep = Image.fromarray(np.full((9, 9), 40_000, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert (read_jpeg(tmp_path / "deep.png") == 156).all()  # 40,000 of 65,535 in 8 bits


# -----------------------------------------------------------------------------
# where the dataset is


def test_the_default_dataset_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWERS_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    assert default_root() == "data/flowers-102"
    monkeypatch.chdir(tmp_path)
    assert default_root() == str(ROOT / "data" / "flowers-102")
    assert data_folder("sample") == str(ROOT / "data" / "sample")
    (tmp_path / "data" / "flowers-102").mkdir(parents=True)
    assert default_root() == "data/flowers-102"
    monkeypatch.setenv("FLOWERS_DATA", "~/pictures")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == str(tmp_path / "pictures")


def test_paths_as_users_write_them(small, monkeypatch, cli):
    monkeypatch.setenv("HOME", str(small.parent))
    monkeypatch.setenv("SETS", str(small))
    assert user_path("~/x") == f"{small.parent}/x" and user_path("a b") == "a b"
    code, out, err = cli(
        "flowers.data", "--data_root", "~/small", "--splits_path", "$SETS/setid.mat"
    )
    assert code == 0 and "48 images" in out, err


def test_a_dataset_of_ones_own_is_not_downloaded_into(tmp_path, monkeypatch, cli):
    write_own_classes(tmp_path)
    monkeypatch.setenv("FLOWERS_DATA", str(tmp_path))
    assert "--splits random" in error_line(cli("flowers.data"))
    code, out, err = cli("flowers.data", "--splits", "random")
    assert code == 0 and "train 24, val 0, test 6" in out, err


def test_a_download_that_broke_off_is_not_read(small, tmp_path):
    root = shutil.copytree(small, tmp_path / "flowers-102")
    (root / ".downloading").touch()
    for given in (root, tmp_path):
        with pytest.raises(UserError, match="broke off"):
            open_flowers(given)


# -----------------------------------------------------------------------------
# scripts


def test_scripts_on_flowers_of_ones_own(tmp_path, cli):
    """Trained and evaluated by paths, as names occur in each folder; args.json says the split."""
    root = write_own_classes(tmp_path / "own flowers")
    data = ("--data_root", root, "--splits", "random")
    common = ("--runs", tmp_path / "runs", "--wandb", "disabled")
    tiny = ("--architecture", "tiny", "--epochs", 1, "--batch_size", 12, "--name", "tuned")
    code, _, err = cli("train.py", *data, *tiny, *common)
    assert code == 0, err
    model = ("--architecture", tmp_path / "runs" / "tuned", "--name", "again")
    code, _, err = cli("baseline_eval.py", *data, *model, *common)
    assert code == 0, err

    results = []
    for name in ("tuned", "again"):
        folder = tmp_path / "runs" / name
        arguments = json.loads((folder / "args.json").read_text())
        assert arguments["splits"] == "random"
        lines = (folder / "predictions.csv").read_text().splitlines()
        files = [line.split(",")[0] for line in lines]
        assert len(set(files)) == len(files) and any("tulip/" in file for file in files)
        results.append(json.loads((folder / "result.json").read_text())["test/top1"])
    assert results[0] == results[1]

    for script in ("dataset_Description.py", "isomap.py"):
        neighbours = ("--n_neighbors", 2) if script == "isomap.py" else ()
        out = ("--output", tmp_path / "figures")
        code, out, err = cli(f"data_Exploration/{script}", "--data_root", root, *out, *neighbours)
        assert code == 0, err


def test_a_run_on_oxford_s_layout_records_swapped(small, tmp_path, cli):
    options = ("--architecture", "tiny", "--runs", tmp_path, "--name", "e", "--wandb", "disabled")
    code, _, err = cli("baseline_eval.py", "--data_root", small, *options)
    assert code == 0, err
    assert json.loads((tmp_path / "e" / "args.json").read_text())["splits"] == "swapped"


# -----------------------------------------------------------------------------
# the real images


def test_the_real_images_in_class_folders(real, tmp_path):
    """The same pictures, labels and names as in torchvision's folder, in each of its splits."""
    expected = open_flowers(real, holdout=True)
    part_of = {"train": "train", "val": "valid", "test": "test"}
    for part, folder in part_of.items():
        for i in expected.splits[part]:
            label = expected.labels[i] + 1
            link = tmp_path / "data" / folder / str(label) / expected.files[i].name
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(expected.files[i], link)
    shutil.copy(real / "cat_to_name.json", tmp_path / "data")
    data = open_flowers(tmp_path / "data", holdout=True)
    assert data.class_names == expected.class_names
    assert np.array_equal(data.labels, expected.labels)
    assert data.file_names == expected.file_names
    everything = range(len(data.files))
    assert image_ids(data, everything) == image_ids(expected, everything)
    for part in PARTS:
        assert np.array_equal(data.splits[part], expected.splits[part])

    # The same split once more, in CoOp's form.
    contents = {}
    for part in PARTS:
        rows = []
        for i in expected.splits[part].tolist():
            label = int(expected.labels[i])
            rows.append([expected.files[i].name, label, expected.class_names[label]])
        contents[part] = rows
    path = write_json(tmp_path / "split_zhou_OxfordFlowers.json", contents)
    for root in (real, tmp_path / "data"):
        data = open_flowers(root, path, holdout=True)
        for part in PARTS:
            assert np.array_equal(data.splits[part], expected.splits[part])
