"""Prompts that are too long, names that CLIP reads alike, and sentences of each class in a file."""

import gzip
import json
import shutil

import clip
import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, error_line, write_dataset

from flowers import UserError, evaluate, files, layouts, models, runs
from flowers.choices import context_template
from flowers.data import open_flowers
from flowers.gallery import predictions as gallery
from flowers.study import comparable

SHARED = ROOT.parent / "shared" / "prompts"
TINY = ("--architecture", "tiny", "--wandb", "disabled")


def sentences_of(names=NAMES) -> dict[str, list[str]]:
    """A prompts file as CuPL's: classes have different numbers of sentences."""
    contents = {}
    for i, name in enumerate(names):
        contents[name] = [f"a {name} has {n + 3} petals." for n in range(1 + i % 3)]
    return contents


def write(path, contents, encoding="utf-8"):
    path.write_text(json.dumps(contents, ensure_ascii=False), encoding=encoding)
    return path


@pytest.fixture
def job(small, tmp_path, cli):
    """job("train.py", "--epochs", 0) runs a script on the small dataset with `tiny`."""

    def run(script, *options):
        return cli(script, "--data_root", small, *TINY, "--runs", tmp_path / "runs", *options)

    return run


# -----------------------------------------------------------------------------
# tokens


def test_tokens_are_those_of_the_stock_package():
    texts = ["rose", "", "A photo of a ROSE, 50% &amp; more…", "süß \u6a31", "word " * 100]
    texts += ["word " * 75, "word " * 76, "an <|endoftext|> within"]
    ours = models.tokenize(texts)
    assert ours.shape == (len(texts), 77)
    assert torch.equal(ours, clip.tokenize(texts, truncate=True).long())
    # A model with a shorter context, as some of open_clip have.
    assert torch.equal(
        models.tokenize(texts, context_length=32),
        clip.tokenize(texts, context_length=32, truncate=True).long(),
    )
    assert [len(models.encode(text)) for text in texts[-3:-1]] == [77, 78]


# -----------------------------------------------------------------------------
# prompts that would lose their end


@pytest.mark.parametrize("script", ["train.py", "baseline_eval.py"])
def test_a_template_is_refused_only_if_tokens_are_lost(job, script):
    options = ("--epochs", 0) if script == "train.py" else ()
    # "globe-flower" has three tokens, the most of all names; start and end make 5.
    longest = max(len(models.encode(name)) for name in NAMES)
    fits = "word " * (77 - longest) + "{}"
    assert job(script, *options, "--prompt_template", fits)[0] == 0

    line = error_line(job(script, *options, "--prompt_template", "word " + fits))
    assert "word {}" in line and "has 78 tokens" in line and "reads 77" in line
    # One of several is enough.
    both = ("--prompt_template", "a {}", "--prompt_template", "word " * 80 + "{}")
    assert "tokens" in error_line(job(script, *options, *both))
    # The feature is read at the first end token, whatever comes after it.
    cut = ("--prompt_template", "a flower <|endoftext|> {}")
    assert "<|endoftext|>" in error_line(job(script, *options, *cut))


def test_a_prompt_is_refused_wherever_it_comes_from(job, tmp_path):
    long_sentence = sentences_of() | {"rose": ["a rose.", "word " * 76]}
    path = write(tmp_path / "long.json", long_sentence)
    for script in ("train.py", "baseline_eval.py"):
        line = error_line(job(script, "--prompts", path))
        assert "'rose'" in line and "has 78 tokens" in line

    # A learned context takes up tokens as well.
    names = ["rose", "word " * 40]
    fits = [context_template(34)]  # 34 + 40 words + "flower" + start and end
    assert evaluate.class_prompts(names, fits)[1][0].endswith("flower")
    with pytest.raises(UserError, match="has 78 tokens"):
        evaluate.class_prompts(names, [context_template(35)])
    # The model says how much it reads.
    with pytest.raises(UserError, match="has 43 tokens.*reads 32"):
        evaluate.class_prompts(names, ["a {}"], context_length=32)
    model = models.build_shape(models.SHAPES["tiny"], context_length=8)
    with pytest.raises(UserError, match="reads 8"):
        evaluate.zero_shot_head(model, ["rose", "iris"], ["one two three four five six {}"])


def test_classes_that_clip_reads_alike_are_refused(job, tmp_path, cli):
    for pair in (["rose", "Rose"], ["rose", "rose "], ["iris &amp; co", "iris & co"]):
        with pytest.raises(UserError, match="have the same prompts") as error:
            evaluate.class_prompts(["mallow", *pair], ["a {}", "{} flower"])
        assert all(repr(name) in str(error.value) for name in pair)
    # A shared sentence is no fault, as long as another one differs.
    shared = [["a flower", "a rose"], ["a flower", "an iris"]]
    assert evaluate.class_prompts(["rose", "iris"], None, shared) == shared
    with pytest.raises(UserError, match="have the same prompts"):
        evaluate.class_prompts(["rose", "iris"], None, [["a", "b"], ["B", "A"]])

    root = write_dataset(tmp_path / "alike", names=["rose", "iris", "ROSE"])
    line = error_line(cli("train.py", "--data_root", root, *TINY, "--runs", tmp_path))
    assert "'rose' and 'ROSE'" in line


def test_cut_captions_are_counted_in_one_warning(job, small, tmp_path):
    flowers = open_flowers(small)
    path = tmp_path / "captions.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i, picture in enumerate(flowers.files):
            # 75 words and the ends fit, 76 do not.
            sentences = ["word " * 76 if i < 10 else "word " * 75, "red"]
            file.write(json.dumps({"file": picture.name, "captions": sentences}) + "\n")

    def warnings(outcome):
        assert outcome[0] == 0, outcome[2]
        return [line for line in outcome[2].splitlines() if "captions" in line]

    (line,) = warnings(job("train.py", "--epochs", 1, "--captions", path))
    assert "10 of 96 captions are longer than 77 tokens" in line
    in_test = int((flowers.splits["test"] < 10).sum())
    (line,) = warnings(job("baseline_eval.py", "--captions", path))
    assert f"{in_test} of 12 captions" in line
    (line,) = warnings(job("baseline_eval.py", "--captions", path, "--split", "train"))
    assert f"{10 - in_test} of 36 captions" in line


# -----------------------------------------------------------------------------
# prompts files


def test_all_ways_of_writing_a_name_match(tmp_path, capsys):
    oxford = ["globe-flower", "pink-yellow dahlia", "lotus", "ball moss", "black-eyed susan"]
    openai = ["globe flower", "pink and yellow dahlia", "lotus", "air plant", "black-eyed susan"]
    copies = ["Globe_Flower", "pink yellow dahlia", "lotus lotus", "Ball-Moss", "black eyed Susan"]
    for in_file in (oxford, openai, copies):
        contents = {name: [f"sentence {i}"] for i, name in enumerate(in_file)}
        path = write(tmp_path / "prompts.json", contents)
        for names in (oxford, openai, copies):
            prompts = evaluate.read_prompts(path, names)
            assert prompts == [[f"sentence {i}"] for i in range(5)]
    capsys.readouterr()

    # The very name comes first; without it there must be one.
    both = {"Rose": ["a"], "rose": ["b rose"]}
    assert evaluate.read_prompts(write(path, both), ["rose"]) == [["b rose"]]
    with pytest.raises(UserError, match="'ROSE' more than once: 'Rose', 'rose'"):
        evaluate.read_prompts(path, ["ROSE"])


def test_what_is_missing_is_named_and_what_is_too_much_is_counted(tmp_path, capsys):
    path = write(tmp_path / "p.json", {"roses": ["roses"], "iris": ["an iris"], "oak": ["an oak"]})
    with pytest.raises(UserError) as error:
        evaluate.read_prompts(path, ["rose", "iris", "mallow"])
    assert "2 of 3 classes" in str(error.value)
    assert "'rose' (there is 'roses')" in str(error.value) and "'mallow'" in str(error.value)

    assert evaluate.read_prompts(path, ["iris"]) == [["an iris"]]
    assert "2 of 3 names" in capsys.readouterr().err
    assert evaluate.read_prompts(path, ["iris", "oak", "roses"])
    assert capsys.readouterr().err == ""

    # DCLIP's descriptors, before they are made into prompts.
    write(path, {"iris": ["blue petals"], "oak": ["no petals"]})
    evaluate.read_prompts(path, ["iris", "oak"])
    assert "2 of 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "contents, word",
    [
        ("{", "can't be read"),
        ('["a rose"]', "a list, not an object"),
        ('{"rose": "a rose"}', "no list of sentences for 'rose'"),
        ('{"rose": []}', "no list of sentences"),
        ('{"rose": ["a rose", " "]}', "no list of sentences"),
        ('{"rose": {"question": ["a rose"]}}', "no list of sentences"),
        ('{"rose": ["a {}"]}', "templates are given by --prompt_template"),
    ],
)
def test_other_contents_are_refused(tmp_path, contents, word):
    path = tmp_path / "prompts.json"
    path.write_text(contents)
    with pytest.raises(UserError, match=word.replace("[", r"\[")):
        evaluate.read_prompts(path, ["rose"])


def test_a_class_that_is_there_twice_is_refused(tmp_path):
    """JSON would take the last of them."""
    path = tmp_path / "prompts.json"
    path.write_text('{"rose": ["a rose"], "lily": ["a lily"], "rose": ["another"]}')
    with pytest.raises(UserError, match="the key 'rose' is there twice"):
        evaluate.read_prompts(path, ["rose", "lily"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark_is_read(tmp_path, encoding):
    contents = {"Gänseblümchen": ["ein Gänseblümchen"]}
    path = write(tmp_path / "prompts.json", contents, encoding)
    assert evaluate.read_prompts(path, ["gänseblümchen"]) == [["ein Gänseblümchen"]]


@pytest.mark.parametrize("name", ["cupl", "dclip", "waffle"])
def test_published_prompts_of_these_classes(name):
    path = SHARED / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    names = json.loads((ROOT / "flowers" / "cat_to_name.json").read_text())
    class_names = [names[str(number)] for number in range(1, 103)]
    contents = json.loads(path.read_text())
    expected = [contents[name] for name in class_names]  # Oxford's names, and lotus
    assert evaluate.read_prompts(path, class_names) == expected
    clips = [layouts.OPENAI_NAMES.get(name, name) for name in class_names]
    assert evaluate.read_prompts(path, clips) == expected
    assert evaluate.class_prompts(class_names, None, expected) == expected


def test_the_head_is_the_mean_of_each_class(tmp_path):
    torch.manual_seed(0)
    model = models.build("tiny")
    prompts = list(sentences_of().values())
    classifier = evaluate.zero_shot_classifier(model, NAMES, None, prompts)
    with torch.no_grad():
        for row, sentences in zip(classifier, prompts):
            features = model.encode_text(clip.tokenize(sentences))
            features /= features.norm(dim=-1, keepdim=True)
            mean = features.mean(0)
            assert torch.allclose(row, mean / mean.norm(), atol=1e-5)

    # The same sentences as templates give the same head.
    templates = ["a {}", "the {} flower"]
    filled = [[template.replace("{}", name) for template in templates] for name in NAMES]
    by_template = evaluate.zero_shot_classifier(model, NAMES, templates)
    assert torch.equal(evaluate.zero_shot_classifier(model, NAMES, None, filled), by_template)


def test_training_draws_a_sentence_of_the_class(small):
    import train

    flowers = open_flowers(small)
    prompts = list(sentences_of(flowers.class_names).values())
    texts = train.make_texts(flowers, None, None, prompts, 77)
    drawn = [set() for _ in prompts]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        for label, row in zip(flowers.labels, texts.draw(generator)):
            drawn[label].add(tuple(texts.tokens[row].tolist()))
    for sentences, rows in zip(prompts, drawn):
        tokens = clip.tokenize(sentences)[:, : texts.tokens.shape[1]]
        assert rows == {tuple(row) for row in tokens.tolist()}


def test_a_run_with_a_prompts_file(job, tmp_path):
    path = write(tmp_path / "cupl.json", sentences_of())
    folder = tmp_path / "runs" / "trained"
    options = ("--prompts", path, "--epochs", 2, "--positives", "class")
    code, _, err = job("train.py", *options, "--name", "trained")
    assert code == 0, err
    args = json.loads((folder / "args.json").read_text())
    assert args["prompts"] == str(path) and args["prompt_template"] is None
    assert len(args["prompts_digest"]) == 16
    result = json.loads((folder / "result.json").read_text())

    evaluation = ("baseline_eval.py", "--architecture", folder, "--prompts", path)
    code, _, err = job(*evaluation, "--name", "same", "--wise_ft", 1)
    assert code == 0 and "warning" not in err, err
    same = json.loads((tmp_path / "runs" / "same" / "result.json").read_text())
    assert same["test/top1"] == result["test/top1"]
    predictions = [
        (tmp_path / "runs" / name / "predictions.csv").read_bytes() for name in ("trained", "same")
    ]
    assert predictions[0] == predictions[1]
    curve = files.read_lines(tmp_path / "runs" / "same" / "metrics.jsonl")
    assert curve[0]["test/top1"] == result["test/top1"]

    # A resumed run ends as it would have without the interruption, with the same file only.
    weights = (folder / "model.pt").read_bytes()
    (folder / "result.json").unlink()
    (folder / "model.pt").unlink()
    assert job_resume(job, folder)[0] == 0
    assert (folder / "model.pt").read_bytes() == weights
    (folder / "result.json").unlink()
    write(path, sentences_of() | {"rose": ["a red rose"]})
    assert "has changed" in error_line(job_resume(job, folder))

    code, _, err = job(*evaluation, "--name", "changed")
    assert code == 0 and err.count("has changed since") == 1
    other = write(tmp_path / "other.json", sentences_of())
    code, _, err = job("baseline_eval.py", "--architecture", folder, "--prompts", other)
    assert code == 0 and "has changed" not in err


def job_resume(job, folder):
    return job("train.py", "--resume", folder)


def test_prompts_exclude_other_texts(job, tmp_path):
    path = write(tmp_path / "cupl.json", sentences_of())
    prompts = ("--prompts", path)
    assert "leave out" in error_line(job("train.py", *prompts, "--prompt_template", "a {}"))
    assert "leave out" in error_line(job("train.py", *prompts, "--captions", path))
    assert "leave out" in error_line(job("train.py", *prompts, "--strategy", "prompt"))
    assert "give one" in error_line(job("baseline_eval.py", *prompts, "--prompt_template", "a {}"))
    missing = ("--prompts", tmp_path / "none.json")
    for script in ("train.py", "baseline_eval.py"):
        assert "no prompts at" in error_line(job(script, *missing))
    assert evaluate.describe_prompts(path, list(sentences_of().values())) == (
        "cupl.json (12 sentences)"
    )


# -----------------------------------------------------------------------------
# "lotus lotus"


def test_lotus_is_called_lotus(small, tmp_path):
    packaged = json.loads((ROOT / "flowers" / "cat_to_name.json").read_text())
    assert packaged["78"] == "lotus"
    names = ["lotus lotus" if name == "lotus" else name for name in NAMES]
    old = tmp_path / "old"
    shutil.copytree(small, old, ignore=shutil.ignore_patterns(".cache"))
    write(old / "cat_to_name.json", dict(enumerate(names, 1)))
    assert open_flowers(old).class_names == open_flowers(small).class_names == tuple(NAMES)


def test_runs_that_say_lotus_lotus_are_compared_with_others(job, small, tmp_path):
    for name in ("new", "old"):
        assert job("train.py", "--strategy", "linear", "--name", name)[0] == 0
    folder = tmp_path / "runs" / "old"
    table = (folder / "predictions.csv").read_text().replace("lotus", "lotus lotus")
    (folder / "predictions.csv").write_text(table)
    args = json.loads((folder / "args.json").read_text())
    for key in ("prompts", "prompts_digest"):
        del args[key]  # older runs have none
    (folder / "args.json").write_text(json.dumps(args))
    classifier = files.load_tensors(folder / "classifier.pt")
    index = classifier["class_names"].index("lotus")
    classifier["class_names"][index] = "lotus lotus"
    files.save_tensors(folder / "classifier.pt", classifier)

    new_table = runs.read_predictions(tmp_path / "runs" / "new")
    assert runs.read_predictions(folder).equals(new_table)
    loaded, notes = comparable.load(tmp_path / "runs")
    assert notes == [] and loaded[0].protocol == loaded[1].protocol
    assert len(comparable.grouped(comparable.resolve(loaded)[0])) == 1

    flowers = open_flowers(small)
    guesses = [
        gallery.read_predictions(tmp_path / "runs" / name, flowers).guess for name in ("new", "old")
    ]
    assert np.array_equal(guesses[0], guesses[1]) and (guesses[0] >= 0).sum() == 12
    # The head of an older run is used, not its prompts.
    assert job("baseline_eval.py", "--architecture", folder, "--name", "e")[0] == 0
    evaluated = (tmp_path / "runs" / "e" / "predictions.csv").read_bytes()
    assert evaluated == (tmp_path / "runs" / "new" / "predictions.csv").read_bytes()
