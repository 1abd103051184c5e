"""The tiny random model, built offline: its ranking against one plain forward a name, its loss by hand, and the real scripts."""

import csv
import json
import os
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("peft")
pytest.importorskip("transformers")

from flowers import files, runs
from flowers.data import open_flowers
from flowers.layouts import read_captions
from flowers.models import count_flops
from flowers.qwen import answers as qwen
from flowers.qwen import models as qwen_models

with open(qwen_models.__file__.replace("qwen_models.py", "cat_to_name.json")) as file:
    OXFORD = list(json.load(file).values())
NESTED = [
    "rose",
    "rose",
    "rosemallow",
    "rose mallow",
    "rose mallow tree",
    "mallow",
    "tree mallow",
    "r",
]  # prefixes of one another, a name twice
BRIEF = qwen_models.QUESTIONS["brief"]


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def plain(processor, images, answer=None, question=BRIEF):
    """The library's own encoding of conversations; with an answer, up to its end token."""
    turns = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": i}, {"type": "text", "text": question}],
            }
        ]
        for i in images
    ]
    if answer is not None:
        turns = [
            t + [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            for t in turns
        ]
    return processor.apply_chat_template(
        turns,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=answer is None,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.no_grad()
def naive(model, processor, image, names, question=BRIEF):
    """One whole forward a name, of the conversation as the library writes it: log-likelihood of the name and the end token."""
    prompt = plain(processor, [image], question=question)["input_ids"].shape[1]
    found = []
    for name in names:
        inputs = plain(processor, [image], name, question)
        ids = inputs["input_ids"][0]
        end = (
            prompt
            + (ids[prompt:] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")).nonzero()[
                0, 0
            ]
            + 1
        )
        logs = qwen.base(model)(**inputs).logits[0].log_softmax(-1)
        found.append(sum(logs[t - 1, ids[t]] for t in range(prompt, end)))
    return torch.stack(found)


def ours(model, processor, images, names, question=BRIEF):
    image = qwen.patches(processor, images)
    return qwen.rank(
        model,
        qwen.NameTree(processor, names),
        qwen.encode(processor, question, image["image_grid_thw"]),
        image,
    )


def small_family(family, folder):
    """A random Qwen2.5-VL or Qwen3-VL of two layers, written to a folder as a download would be."""
    import transformers

    _, processor = qwen_models.build("tiny")
    tokens = {
        k: processor.tokenizer.convert_tokens_to_ids(t)
        for k, t in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "patch_size": 8,
    }
    if family == "qwen3_vl":
        text |= {"head_dim": 16}
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    else:
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    kinds = {
        "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    }[family]
    kind, video = (getattr(transformers, k) for k in kinds)
    size = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
    kind(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=8, **size),
        tokenizer=processor.tokenizer,
        video_processor=video(patch_size=8),
        chat_template=qwen_models.TEMPLATE,
    ).save_pretrained(folder)
    config = transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens
    )
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    return qwen_models.load("tiny", "cpu")


def with_adapter(name, folder):
    """The model with LoRA that does something, saved and loaded again as qwen_eval.py loads it; and the sums before saving."""
    model, processor = qwen_models.load(name, "cpu")
    model = qwen_models.add_adapter(model, rank=4, alpha=8.0)
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.2)
    model.eval().save_pretrained(folder / "adapter")
    return model, *qwen_models.load(name, "cpu", folder)


def test_encoding_is_the_librarys_own(tiny):
    _, processor = tiny
    images = pictures((70, 90), (64, 64), (160, 50))
    image = qwen.patches(processor, images)
    mine = {**image, **qwen.encode(processor, BRIEF, image["image_grid_thw"])}
    theirs = plain(processor, images)
    assert (mine["attention_mask"] == 0).any() and set(mine) == set(theirs)
    for key, value in theirs.items():
        assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("names", [OXFORD, NESTED, ["rose"], ["r"]])
def test_ranking_equals_a_forward_a_name(tiny, names):
    model, processor = tiny
    images = pictures((70, 90), (160, 50))
    expected = torch.stack([naive(model, processor, image, names) for image in images])
    assert (ours(model, processor, images, names) - expected).abs().max() < 1e-4
    assert (ours(model, processor, images[1:], names)[0] - expected[1]).abs().max() < 1e-4
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the image matters


def test_ranking_in_chunks_of_the_vocabulary(tiny, monkeypatch):
    model, processor = tiny
    images = pictures((70, 90))
    whole = ours(model, processor, images, OXFORD)
    heads = []
    hook = model.lm_head.register_forward_hook(lambda m, i, o: heads.append(o.shape[1]))
    monkeypatch.setattr(model.config.get_text_config(), "vocab_size", 2**26 // 7)
    torch.testing.assert_close(ours(model, processor, images, OXFORD), whole, rtol=0, atol=1e-5)
    hook.remove()
    assert max(heads) == 7 and len(heads) > 10


@pytest.mark.parametrize("family", ["tiny", "qwen2_5_vl", "qwen3_vl"])
def test_ranking_after_an_adapter_was_loaded(family, tmp_path):
    name = family if family == "tiny" else str(small_family(family, tmp_path / family))
    trained, model, processor = with_adapter(name, tmp_path)
    images = pictures((70, 90), (64, 64))
    found = ours(model, processor, images, NESTED)
    for i, image in enumerate(images):
        assert (found[i] - naive(model, processor, image, NESTED)).abs().max() < 1e-4
    torch.testing.assert_close(found, ours(trained, processor, images, NESTED))
    base_model, _ = qwen_models.load(name, "cpu")
    assert (ours(base_model, processor, images, NESTED) - found).abs().max() > 1e-2
    assert not [n for n, _ in trained.named_parameters() if "lora" in n and "visual" in n]


def test_text_only_questions_rank_as_a_plain_forward(tiny):
    model, processor = tiny
    found = qwen.rank(model, qwen.NameTree(processor, NESTED), qwen.encode(processor, BRIEF, None))[
        0
    ]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": BRIEF}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    for name, value in zip(NESTED, found):
        prompt, ids = (
            processor.tokenizer(t, return_tensors="pt")["input_ids"][0]
            for t in (chat, chat + name + "<|im_end|>")
        )
        logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        assert abs(sum(logs[t - 1, ids[t]] for t in range(len(prompt), len(ids))) - value) < 1e-4


@pytest.mark.parametrize(
    "extra, ratio", [("", 30), (" Look at the petals, the leaves and the stamens." * 8, 45)]
)
def test_ranking_takes_few_operations(tiny, extra, ratio):
    """Counted, not timed: image and question once, and two forwards of the language model, against one a name (benchmarks/qwen.py has the clock)."""
    model, processor = tiny
    images, tree = pictures((64, 64)), qwen.NameTree(processor, OXFORD)
    image = qwen.patches(processor, images)
    inputs = qwen.encode(processor, BRIEF + extra, image["image_grid_thw"])
    assert not extra or 200 < inputs["input_ids"].shape[1] < 300

    def plain():
        with torch.inference_mode():
            for name in OXFORD:
                ids = torch.tensor([processor.tokenizer(name + "<|im_end|>")["input_ids"]])
                model(
                    **image,
                    input_ids=torch.cat([inputs["input_ids"], ids], 1),
                    mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], 0 * ids], 1),
                    logits_to_keep=ids.shape[1] + 1,
                )

    calls = []
    hook = model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    ours = count_flops(lambda: qwen.rank(model, tree, inputs, image))
    hook.remove()
    assert len(calls) == 2 and count_flops(plain) / ours >= ratio


def test_loss_is_the_cross_entropy_of_exactly_the_answers_tokens(tiny):
    model, processor = tiny
    images, answers = (
        pictures((70, 90), (64, 64), (160, 50)),
        ["rose", "white petals, a yellow centre.\ntree mallow", "globe-flower"],
    )
    image = qwen.patches(processor, images)
    loss, count = qwen.answer_loss(
        model, processor, qwen.encode(processor, BRIEF, image["image_grid_thw"]), image, answers
    )
    by_hand, tokens = 0.0, 0
    for picture, answer in zip(images, answers):
        inputs = plain(processor, [picture], answer)
        text = processor.tokenizer(answer + "<|im_end|>")["input_ids"]
        ids = inputs["input_ids"][0].tolist()
        begin = len(plain(processor, [picture])["input_ids"][0])
        assert (
            ids[begin : begin + len(text)] == text
            and processor.tokenizer.decode(ids[begin + len(text) :]) == "\n"
        )
        logits = model(**inputs).logits[0].double()
        by_hand -= sum(
            (logits[t - 1].exp()[ids[t]] / logits[t - 1].exp().sum()).log()
            for t in range(begin, begin + len(text))
        )
        tokens += len(text)
    assert count == tokens == sum(qwen.answer_length(processor, a) for a in answers)
    assert abs(loss.item() - by_hand.item()) < 1e-4 * tokens


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model, processor = qwen_models.load("tiny", "cpu")
        torch.manual_seed(0)
        model = qwen_models.add_adapter(model, 4, 8.0, ["merger"], recompute).train()
        assert base_recomputes(model) == recompute
        image = qwen.patches(processor, pictures((70, 90), (64, 64)))
        loss, count = qwen.answer_loss(
            model,
            processor,
            qwen.encode(processor, BRIEF, image["image_grid_thw"]),
            image,
            ["rose", "tree mallow"],
        )
        (loss / count).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in gradients[0] if "lora_B" in n} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert any("merger.modules_to_save" in n for n in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert all(
        g.abs().max() > 0 for n, g in gradients[0].items() if "lora_A" not in n
    )  # B starts at zero, so A has none yet


def base_recomputes(model):
    return all(
        layer.gradient_checkpointing for layer in qwen.base(model).model.language_model.layers
    )


def test_features_of_the_vision_tower_stand_for_pixels(tiny, small, tmp_path, monkeypatch):
    model, processor = tiny
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flowers = open_flowers(small)
    index = flowers.splits["test"][:5]
    features, begins, grids = qwen.image_features(
        model, processor, flowers, index, "x", batch_size=2
    )
    image = qwen.patches(processor, qwen.open_images([flowers.files[i] for i in index]))
    assert torch.equal(grids, image["image_grid_thw"]) and begins[-1] == len(features)
    inputs = qwen.encode(processor, BRIEF, grids)
    with torch.no_grad():
        pixels, _ = qwen.hidden_states(model, inputs, image)
        kept, _ = qwen.hidden_states(model, inputs, {"features": features, "image_grid_thw": grids})
    torch.testing.assert_close(kept[:, -1], pixels[:, -1], rtol=0, atol=1e-4)
    assert qwen_models.identity(model) == qwen_models.identity(qwen_models.load("tiny", "cpu")[0])


def test_kept_features_of_a_bf16_model_do_not_overflow(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, processor = qwen_models.build("tiny", torch.bfloat16)
    with torch.no_grad():
        model.model.visual.merger.mlp[2].bias += 1e5  # beyond what fp16 can hold
    features, *_ = qwen.image_features(
        model, processor, open_flowers(small), np.arange(3), "large", batch_size=2
    )
    assert features.dtype == torch.bfloat16 and features.isfinite().all() and features.max() > 9e4


def test_a_matched_answer_is_the_whole_name():
    names = ["rose", "lenten rose", "globe-flower", "colt's foot", "prince of wales feathers"]
    for answer, c in (
        ("Rose.", 0),
        ("A rose", 0),
        ("lenten rose", 1),
        ("Globe flower", 2),
        ("globe-flower!", 2),
        ("Colt\u2019s Foot", 3),
        ("pink petals\n\nThe Rose\n", 0),
        ("Prince of Wales  feathers", 4),
        ("a kind of rose", None),
        ("", None),
        ("rose\npink", None),
        ("the", None),
        ("roses", None),
        ("rose, lenten rose", None),
    ):
        assert qwen.match(answer, names) == c, answer


def test_memory_counts_the_parameters_of_the_released_shape():
    parts = qwen_models.memory(qwen_models.configuration("random-2b"), 8, 334, 50, rank=8)
    assert parts["weights"] == pytest.approx(
        2 * 2_208_985_600 / 1e9, rel=1e-9
    )  # the count of Qwen/Qwen2-VL-2B-Instruct on the hub
    assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k != "total"))
    # LoRA on 28 blocks: q and o 1536 x 1536, k and v 1536 x 256, gate, up and down 1536 x 8960; weight, gradient and two moments in fp32
    lora = 28 * 8 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert parts["adapter"] == pytest.approx(16 * lora / 1e9)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run of qwen_train.py on the small dataset, val held out."""
    folder = tmp_path_factory.mktemp("qwen") / "runs"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            sys,
            "argv",
            [
                "qwen_train.py",
                "--data_root",
                str(small),
                "--model",
                "tiny",
                "--holdout",
                "--epochs",
                "20",
                "--batch_size",
                "12",
                "--runs",
                str(folder),
                "--name",
                "train",
                "--wandb",
                "disabled",
            ],
        )
        runpy.run_path(str(ROOT / "qwen_train.py"), run_name="__main__")
    return folder / "train"


def test_the_learning_rate_rises_over_a_twentieth_of_the_steps(trained):
    shares = [row["train/lr"] / 1e-3 for row in files.read_lines(trained / "metrics.jsonl")]
    rise = len(shares) // 20
    assert (
        rise >= 2
        and shares[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
        and shares[rise:] == sorted(shares[rise:], reverse=True)
    )


def test_training_teaches_and_evaluation_leaves_what_clip_leaves(trained, small, cli):
    arguments = [
        "--data_root",
        small,
        "--adapter",
        trained,
        "--runs",
        trained.parent,
        "--wandb",
        "disabled",
    ]
    code, out, err = cli("qwen_eval.py", *arguments, "--holdout", "--name", "rank")
    assert code == 0, err
    assert "GB for 8 images" in out and "is reported" in out
    result = json.loads((trained.parent / "rank" / "result.json").read_text())
    assert result["job"] == "qwen_eval" and result["model"] == "tiny" and result["test/n"] == 12
    assert result["test/top1_low"] > 100 / 6  # chance
    on_val = {k: result[f"val/{k}_top1"] for k in ("sum", "token", "calibrated")}
    assert on_val[result["reported_score"]] == max(on_val.values())
    assert result["test/top1"] == result[f"test/{result['reported_score']}_top1"]
    kept = np.load(trained.parent / "rank" / "scores.npz")
    model, processor = qwen_models.load("tiny", "cpu", trained)
    flowers = open_flowers(small, holdout=True)
    tree = qwen.NameTree(processor, flowers.class_names)
    blank = qwen.rank(model, tree, qwen.encode(processor, BRIEF, None))[0].numpy()
    np.testing.assert_allclose(kept["calibrated"], kept["sum"] - blank, atol=1e-4)
    np.testing.assert_allclose(
        kept["token"] * [qwen.answer_length(processor, n) for n in flowers.class_names],
        kept["sum"],
        rtol=1e-4,
    )
    i = flowers.splits["test"][3]
    assert kept["files"][3] == flowers.files[i].name
    np.testing.assert_allclose(
        kept["sum"][3],
        naive(model, processor, qwen.open_images([flowers.files[i]])[0], flowers.class_names),
        atol=1e-3,
    )

    code, _, err = cli(
        "baseline_eval.py",
        "--data_root",
        small,
        "--architecture",
        "tiny",
        "--runs",
        trained.parent,
        "--name",
        "clip",
        "--wandb",
        "disabled",
    )
    assert code == 0, err
    tables = [
        list(csv.DictReader((trained.parent / name / "predictions.csv").open()))
        for name in ("rank", "clip")
    ]
    assert tables[0][0].keys() == tables[1][0].keys() and [r["file"] for r in tables[0]] == [
        r["file"] for r in tables[1]
    ]
    assert result["test/top1"] == pytest.approx(
        100 * np.mean([r["label"] == r["top1"] for r in tables[0]])
    )
    clip = json.loads((trained.parent / "clip" / "result.json").read_text())
    assert {"test/top1", "test/top1_low", "test/top3", "test/top5", "test/mean_per_class"} <= set(
        clip
    ) & set(result)
    assert "rank" in [row["name"] for row in files.read_lines(trained.parent / "results.jsonl")]


def test_evaluation_goes_on_where_it_was_killed(trained, small, cli):
    arguments = [
        "--data_root",
        small,
        "--adapter",
        trained,
        "--runs",
        trained.parent,
        "--wandb",
        "disabled",
        "--batch_size",
        5,
    ]
    assert cli("qwen_eval.py", *arguments, "--name", "whole")[0] == 0
    assert cli("qwen_eval.py", *arguments, "--name", "killed")[0] == 0
    folder = trained.parent / "killed"
    wanted = (folder / "predictions.csv").read_text()
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    marked = json.loads(lines[0])
    marked["sum"] = [
        x + (100 if c == 0 else 0) for c, x in enumerate(marked["sum"])
    ]  # shows that it is kept, not made again
    (folder / "answers.jsonl").write_text(
        json.dumps(marked) + "\n" + "".join(lines[1:6]) + lines[6][:20]
    )
    for name in ("result.json", "predictions.csv"):
        (folder / name).unlink()
    code, out, err = cli("qwen_eval.py", "--resume", folder, "--wandb", "disabled")
    assert code == 0 and "50%" in err, err
    found = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    assert found[0]["top1"] == "rose" and float(found[0]["score1"]) == 1.0
    assert [r["top1"] for r in found[1:]] == [
        r["top1"] for r in csv.DictReader(wanted.splitlines())
    ][1:]
    assert "nothing to do" in cli("qwen_eval.py", "--resume", folder)[1]


def test_generated_answers_are_matched_whole(trained, small, cli, monkeypatch):
    told = iter(["Rose", "a lenten rose", "mallow\n", "", "tree mallow", "Ball moss."] * 2)
    monkeypatch.setattr(
        qwen,
        "generate",
        lambda model, processor, inputs, image, most: [next(told) for _ in image["image_grid_thw"]],
    )
    code, out, err = cli(
        "qwen_eval.py",
        "--data_root",
        small,
        "--adapter",
        trained,
        "--runs",
        trained.parent,
        "--name",
        "generate",
        "--protocol",
        "generate",
        "--list_names",
        "--wandb",
        "disabled",
    )
    assert code == 0, err
    rows = list(csv.DictReader((trained.parent / "generate" / "predictions.csv").open()))
    assert [r["label"] for r in rows[:6]] == [
        "rose",
        "lotus",
        "ball moss",
        "tree mallow",
        "mallow",
        "globe-flower",
    ]
    assert [r["top1"] for r in rows[:6]] == [
        "rose",
        "(outside the list)",
        "mallow",
        "(outside the list)",
        "tree mallow",
        "ball moss",
    ]
    assert {r["top2"] for r in rows} == {""}
    result = json.loads((trained.parent / "generate" / "result.json").read_text())
    assert (
        result["test/top1"] == pytest.approx(100 / 6)
        and result["test/outside_list"] == pytest.approx(100 / 3)
        and "test/top5" not in result
    )


def test_trained_model_generates_what_it_ranks_first(trained, small):
    model, processor = qwen_models.load("tiny", "cpu", trained)
    flowers = open_flowers(small, holdout=True)
    image = qwen.patches(
        processor, qwen.open_images([flowers.files[i] for i in flowers.splits["test"]])
    )
    inputs = qwen.encode(processor, BRIEF, image["image_grid_thw"])
    told = [
        qwen.match(text, flowers.class_names)
        for text in qwen.generate(model, processor, inputs, image, 20)
    ]
    best = (
        qwen.rank(model, qwen.NameTree(processor, flowers.class_names), inputs, image)
        .argmax(1)
        .tolist()
    )
    assert np.mean([a == b for a, b in zip(told, best)]) > 0.9


def test_training_goes_on_where_it_was_killed(small, tmp_path, cli, monkeypatch):
    arguments = [
        "--data_root",
        small,
        "--model",
        "tiny",
        "--epochs",
        2,
        "--batch_size",
        12,
        "--save_every",
        2,
        "--runs",
        tmp_path,
        "--wandb",
        "disabled",
    ]
    assert cli("qwen_train.py", *arguments, "--name", "whole")[0] == 0
    save = files.save_tensors

    def killed(path, state):
        save(path, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(runs, "save_tensors", killed)
        assert cli("qwen_train.py", *arguments, "--name", "killed")[0] == 130
    code, out, err = cli("qwen_train.py", "--resume", tmp_path / "killed", "--wandb", "disabled")
    assert code == 0 and "after step 4 of 6" in out, err
    from safetensors.torch import load_file

    whole, resumed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys() and any("visual" in k for k in whole)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    losses = [
        [r["train/loss"] for r in files.read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_chunks_give_the_same_losses_and_features_are_kept(small, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = [
        "--data_root",
        small,
        "--model",
        "tiny",
        "--also_train",
        "--epochs",
        1,
        "--batch_size",
        12,
        "--runs",
        tmp_path,
        "--wandb",
        "disabled",
    ]
    losses, before = [], set(small.glob(".cache/qwen-*.npy"))
    for name, chunk in (("whole", 0), ("chunks", 5)):
        code, out, err = cli("qwen_train.py", *arguments, "--name", name, "--chunk_size", chunk)
        assert code == 0 and "vision features once" in out, err
        losses.append(
            [r["train/loss"] for r in files.read_lines(tmp_path / name / "metrics.jsonl")]
        )
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(set(small.glob(".cache/qwen-*.npy")) - before) == 1


def test_described_answers(small, tmp_path, cli, monkeypatch):
    common = ["--data_root", small, "--model", "tiny", "--runs", tmp_path, "--wandb", "disabled"]
    code, out, err = cli(
        "qwen_eval.py",
        *common,
        "--describe",
        "--split",
        "train",
        "--name",
        "words",
        "--most_tokens",
        4,
    )
    assert code == 0, err
    captions = tmp_path / "words" / "descriptions.jsonl"
    flowers = open_flowers(small)
    assert len(captions.read_text().splitlines()) == 36
    captions.write_text(
        "".join(
            json.dumps({"file": flowers.files[i].name, "captions": [f"a disc {i}"]}) + "\n"
            for i in flowers.splits["train"]
        )
    )
    assert (
        len(read_captions(captions, tuple(flowers.files[i] for i in flowers.splits["train"]))) == 36
    )
    seen, loss = [], qwen.answer_loss
    monkeypatch.setattr(qwen, "answer_loss", lambda *a: (seen.extend(a[4]), loss(*a))[1])
    code, out, err = cli(
        "qwen_train.py",
        *common,
        "--answer",
        "described",
        "--captions",
        captions,
        "--epochs",
        1,
        "--batch_size",
        12,
        "--name",
        "train",
    )
    assert code == 0, err
    assert sorted(seen) == sorted(
        f"a disc {i}\n{flowers.class_names[flowers.labels[i]]}" for i in flowers.splits["train"]
    )
    code, out, err = cli(
        "qwen_eval.py",
        "--data_root",
        small,
        "--adapter",
        tmp_path / "train",
        "--runs",
        tmp_path,
        "--name",
        "eval",
        "--images",
        3,
        "--most_tokens",
        6,
        "--wandb",
        "disabled",
    )
    assert code == 0, err
    model, processor = qwen_models.load("tiny", "cpu", tmp_path / "train")
    for row in files.read_lines(tmp_path / "eval" / "answers.jsonl"):
        assert "\n" not in row["description"]
        file = next(f for f in flowers.files if f.name == row["file"])
        image = qwen.patches(processor, qwen.open_images([file]))
        inputs = qwen.encode(
            processor,
            qwen_models.QUESTIONS["described"],
            image["image_grid_thw"],
            [row["description"] + "\n"],
        )
        sums = qwen.rank(model, qwen.NameTree(processor, flowers.class_names), inputs, image)[0]
        np.testing.assert_allclose(row["sum"], sums, atol=1e-3)


def test_mistakes_end_in_one_line(trained, small, tmp_path, cli):
    common = ["--data_root", small, "--runs", tmp_path, "--wandb", "disabled"]
    assert "no adapter in" in error_line(
        cli("qwen_eval.py", *common, "--model", "tiny", "--adapter", tmp_path)
    )
    assert "needs the network once" in error_line(
        cli("qwen_eval.py", *common, "--model", "no/such-model")
    )
    assert "go together" in error_line(
        cli("qwen_train.py", *common, "--model", "tiny", "--answer", "described")
    )
    assert "no module of that name" in error_line(
        cli("qwen_train.py", *common, "--model", "tiny", "--also_train", "towers")
    )
    assert "val is empty" in error_line(
        cli("qwen_eval.py", *common, "--model", "tiny", "--split", "val")
    ).replace("the val split is", "val is")
    assert (
        cli(
            "qwen_train.py",
            *common,
            "--model",
            "tiny",
            "--epochs",
            1,
            "--batch_size",
            36,
            "--name",
            "all",
        )[0]
        == 0
    )
    assert "trained on the val images" in error_line(
        cli("qwen_eval.py", *common, "--adapter", tmp_path / "all", "--holdout")
    )
    (tmp_path / "all" / "args.json").write_text("{")
    assert "args.json is damaged" in error_line(
        cli("qwen_eval.py", *common, "--adapter", tmp_path / "all")
    )
    assert not list(tmp_path.glob("tiny-qwen_eval-*/result.json"))
