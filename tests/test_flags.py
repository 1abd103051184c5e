"""Flags that would change nothing are refused, and not passed over: nobody should compare the runs
of two values of a flag that has no part in either. Others of the kind are tested beside their
scripts (test_train.py, test_qwen_protocols.py, test_ablate.py)."""

import pytest
from conftest import error_line

from flowers import typed_flags
from flowers.settings import make_parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("baseline_eval.py --seed 1", "nothing is drawn"),
        ("baseline_eval.py --soup a b --seed 1", "nothing is drawn"),
        ("qwen_probe.py --model tiny --seed 1 --holdout", "here is neither"),
        ("qwen_probe.py --model tiny --val_shots 2 --holdout --inverse_penalty 1", "leave out one"),
        ("test_models.py --batch_size 0", "at least 1"),
        ("test_models.py --batch_size 4", "is of --measure"),
        ("test_models.py --device cpu", "is of --measure"),
        ("test_models.py --strategy full --rank 3", "is of --strategy lora"),
        ("test_models.py --strategy lora --blocks 2", "is of --strategy last_blocks"),
        ("data_Exploration/isomap.py --mask none --features clip", "no part in --features clip"),
        ("data_Exploration/isomap.py --architecture tiny", "no part in --features hsv"),
        ("data_Exploration/isomap.py --images 9", "needs --level image"),
        ("data_Exploration/dataset_Description.py --levels nan", "from 0 to 256"),
        ("data_Exploration/dataset_Description.py --hash_bits -1", "from 0 to 64"),
        ("data_Exploration/dataset_Description.py --sheet a.jpg", "must end in .png"),
        ("report.py --bootstrap 0", "at least 1"),
        ("ablate.py strategy --seeds 0 -1", "--seed -1"),
        ("ablate.py strategy --times 1 nan", "--times"),
        ("ablate.py strategy --times -1", "--times"),
        ("ablate.py shared_rate --lr inf", "--lr"),
        ("ablate.py qwen --seeds -1", "--seed -1"),
        ("ablate.py qwen --max_pixels 0", "--max_pixels"),
    ],
)
def test_a_flag_without_effect_is_refused_at_the_door(words, message, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_line(cli(*words.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a/b", "..", "/tmp/a", "a\nb", "a\\b"])
def test_a_run_lies_in_the_folder_of_the_runs(name, capsys):
    """Elsewhere report and page would not find it."""
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--name", name])
    assert "no name of a folder" in capsys.readouterr().err
    assert make_parser().parse_args(["--name", "a b, é"]).name == "a b, é"


def test_results_never_take_the_place_of_what_is_read(small, cli, tmp_path):
    picture = tmp_path / "rose.png"
    picture.write_bytes((small / "jpg" / "image_00001.jpg").read_bytes())
    names = tmp_path / "names.txt"
    names.write_text("rose\nlily\n")
    before = {path: path.read_bytes() for path in (picture, names)}
    predict = ("predict.py", "--architecture", "tiny", tmp_path, "--names", names)
    twice = ("--csv", tmp_path / "a", "--json", tmp_path / "." / "a")
    for flags, message in (
        (twice, "to be written twice"),
        (("--csv", names), "written over"),
        (("--sheet", picture), "written over"),
    ):
        assert message in error_line(cli(*predict, *flags))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_was_typed_is_known_whatever_its_value():
    words = ["--lr", "0.1", "--holdout=false", "--seed", "0", "--prompt_template", "a {}"]
    typed = typed_flags(make_parser(), words)
    assert typed == {"lr": 0.1, "holdout": False, "seed": 0, "prompt_template": ["a {}"]}
    assert typed_flags(make_parser(), []) == {}
