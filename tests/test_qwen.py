"""The tiny random model, built offline: its ranking against one plain forward a name, its loss by
hand, and the real scripts."""

import json
import os
import runpy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call, error_line, read_csv
from scipy.special import softmax
from sklearn.metrics import log_loss

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("peft")
pytest.importorskip("transformers")

from qwen_helpers import with_adapter
from qwen_scorer import forward_a_name, library_encoding, pictures, small_family
from safetensors.torch import load_file, save_file

from flowers import UserError, cache, files, runs
from flowers.data import open_flowers
from flowers.layouts import read_captions
from flowers.models import count_flops
from flowers.qwen import answers
from flowers.qwen import features as kept_features
from flowers.qwen.adapters import add_adapter, base_model, modules_to_train, trains_vision
from flowers.qwen.answers import answer_length, answer_loss, generate, match
from flowers.qwen.features import digest_to_keep, image_features, load_images
from flowers.qwen.models import (
    hidden_states,
    load_config,
    load_model,
    vision_digest,
    vision_features,
)
from flowers.qwen.offline import CLASS_NAMES_FILE, build
from flowers.qwen.prompts import END, encode, open_images, patches
from flowers.qwen.ranking import PackedNames, new_cache, rank, rank_after_answers
from flowers.qwen_settings import QUESTIONS

# Matrices this small gain nothing from a second thread, and lose much on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")

OXFORD = list(json.loads(CLASS_NAMES_FILE.read_text()).values())
# prefixes of one another, and a name twice
NESTED = [
    "rose",
    "rose",
    "rosemallow",
    "rose mallow",
    "rose mallow tree",
    "mallow",
    "tree mallow",
    "r",
]
BRIEF = QUESTIONS["brief"]


# -----------------------------------------------------------------------------
# the plain way to do the same


def rank_images(model, processor, images, names, question=BRIEF):
    image = patches(processor, images)
    inputs = encode(processor, question, image["image_grid_thw"])
    return rank(model, PackedNames(processor, names), inputs, image)


# -----------------------------------------------------------------------------
# models


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


# -----------------------------------------------------------------------------
# prompts and ranking


def test_encoding_is_the_librarys_own(tiny):
    _, processor = tiny
    images = pictures((70, 90), (64, 64), (160, 50))
    image = patches(processor, images)
    inputs = image | encode(processor, BRIEF, image["image_grid_thw"])
    expected = library_encoding(processor, images)
    # images of different size: some prompts are padded
    assert (inputs["attention_mask"] == 0).any()
    assert set(inputs) == set(expected)
    for key, value in expected.items():
        assert torch.equal(inputs[key], value), key


def test_a_prompt_and_the_beginning_of_its_answer_are_the_tokens_of_training(tiny):
    """Also of an empty description, which is what stands before the name without an image."""
    _, processor = tiny
    question = QUESTIONS["described"]
    start = encode(processor, question, None)["input_ids"][0].tolist()
    for description in ("", "white petals, a yellow centre."):
        answer = processor.tokenizer(f"{description}\nrose{END}")["input_ids"]
        name = processor.tokenizer(f"rose{END}")["input_ids"]
        inputs = encode(processor, question, None, [f"{description}\n"])
        assert inputs["input_ids"][0].tolist() + name == start + answer
        assert inputs["attention_mask"].all()


@pytest.mark.parametrize("names", [OXFORD, NESTED, ["rose"], ["r"]])
def test_ranking_equals_a_forward_a_name(tiny, names):
    model, processor = tiny
    images = pictures((70, 90), (160, 50))
    expected = torch.stack([forward_a_name(model, processor, image, names) for image in images])
    together = rank_images(model, processor, images, names)
    alone = rank_images(model, processor, images[1:], names)
    assert (together - expected).abs().max() < 1e-4
    assert (alone[0] - expected[1]).abs().max() < 1e-4
    # the image matters
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_two_packed_names():
    """The example of PackedNames' docstring: a token a word."""
    rose, end, mallow = 1, 2, 3
    ids = {"rose": [rose, end], "rose mallow": [rose, mallow, end]}

    def tokenizer(text, add_special_tokens):
        return {"input_ids": ids[text.removesuffix(END)]}

    names = PackedNames(SimpleNamespace(tokenizer=tokenizer), ["rose", "rose mallow"])
    assert names.tokens.tolist() == [rose, rose, mallow]
    assert names.places.tolist() == [0, 0, 1]
    assert names.sees.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert names.targets.tolist() == [rose, rose, end, mallow, end]
    assert names.sources.tolist() == [0, 0, 1, 2, 3]
    assert names.names.tolist() == [0, 1, 0, 1, 1]
    assert names.lengths.tolist() == [2, 3]


def test_ranking_in_chunks_of_the_vocabulary(tiny, monkeypatch):
    model, processor = tiny
    images = pictures((70, 90))
    expected = rank_images(model, processor, images, OXFORD)
    chunks = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: chunks.append(output.shape[1])
    )
    monkeypatch.setattr(model.config.get_text_config(), "vocab_size", 2**26 // 7)
    sums = rank_images(model, processor, images, OXFORD)
    hook.remove()
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-5)
    assert max(chunks) == 7 and len(chunks) > 10


@pytest.mark.parametrize("family", ["tiny", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_ranking_after_an_adapter_was_loaded(family, tmp_path):
    name = family if family == "tiny" else str(small_family(family, tmp_path / family))
    trained, model, processor = with_adapter(name, tmp_path)
    images = pictures((70, 90), (64, 64))
    sums = rank_images(model, processor, images, NESTED)
    for i, image in enumerate(images):
        expected = forward_a_name(model, processor, image, NESTED)
        assert (sums[i] - expected).abs().max() < 1e-4
    torch.testing.assert_close(sums, rank_images(trained, processor, images, NESTED))

    without_adapter, _ = load_model(name, "cpu")
    sums_without = rank_images(without_adapter, processor, images, NESTED)
    assert (sums_without - sums).abs().max() > 1e-2
    assert not [n for n, _ in trained.named_parameters() if "lora" in n and "visual" in n]


def rewrite_adapter(folder, rename=lambda key: key, keep=lambda key: True, **settings):
    """Change the keys of a saved adapter, leave some out, and change its adapter_config.json."""
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = {rename(key): tensor for key, tensor in load_file(path).items() if keep(key)}
    save_file(tensors, path)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_adapter_with_the_names_of_other_versions(tmp_path):
    """As transformers called the layers up to 4.51, in 4.52 to 4.5x, and other tools do."""
    trained, _, processor = with_adapter("tiny", tmp_path)
    images = pictures((70, 90))
    expected = rank_images(trained, processor, images, NESTED)
    # A layer with an alpha of its own, which is found by its name.
    here = "model.language_model.layers."
    rewrite_adapter(tmp_path, alpha_pattern={f"{here}0.mlp.up_proj": 40})
    model, _ = load_model("tiny", "cpu", tmp_path)
    with_alpha = rank_images(model, processor, images, NESTED)
    assert (with_alpha - expected).abs().max() > 1e-2

    for there in (
        "model.layers.",
        "language_model.model.layers.",
        "language_model.layers.",
        "model.language_model.model.layers.",
        "layers.",
        here,
    ):
        alpha = {f"{there}0.mlp.up_proj": 40}
        rewrite_adapter(tmp_path, lambda key: key.replace(here, there), alpha_pattern=alpha)  # noqa: B023
        model, _ = load_model("tiny", "cpu", tmp_path)
        torch.testing.assert_close(rank_images(model, processor, images, NESTED), with_alpha)
        here = there


def test_an_adapter_that_fits_in_part_is_refused(tmp_path):
    with_adapter("tiny", tmp_path)
    whole = tmp_path / "adapter"
    layer = "layers.0.self_attn.q_proj"
    for i, (change, message) in enumerate(
        (
            ({"rename": lambda key: key.replace("layers", "stages")}, "the model has no"),
            ({"rename": lambda key: key.replace(layer, "layers.7.self_attn.q_proj")}, "has no"),
            ({"keep": lambda key: layer not in key}, "the adapter lacks"),
            ({"alpha_pattern": {"model.layers.7.mlp.up_proj": 4}}, "another rank or alpha"),
            ({"peft_type": "IA3"}, "no plain LoRA"),
            ({"peft_type": "PREFIX_TUNING"}, "no plain LoRA"),
        )
    ):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder / "adapter")
        rewrite_adapter(folder, **change)
        with pytest.raises(UserError, match=f"does not fit tiny: .*{message}"):
            load_model("tiny", "cpu", folder)

    # cut off by a full disk
    path = whole / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="does not fit tiny"):
        load_model("tiny", "cpu", tmp_path)


def test_a_model_whose_files_lack_weights_is_refused(tmp_path):
    name = str(small_family("qwen2_5_vl", tmp_path))
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    removed = next(key for key in whole if key.endswith("layers.1.mlp.up_proj.weight"))
    for tensors, message in (
        ({key: whole[key] for key in whole if key != removed}, "lack .*layers.1.mlp.up_proj"),
        (whole | {removed: whole[removed][:5].clone()}, "layers.1.mlp.up_proj|mismatch"),
        (whole | {"model.layers.0.mlp.up_proj.lora_A.weight": whole[removed].clone()}, "lora_A"),
    ):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_model(name, "cpu")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(name, "cpu")


def test_other_families_are_refused(tmp_path):
    """Of another kind, and kinds that would run, but whose layers no mask of ours can reach."""
    base = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 64}
    sliding = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    for config, message in (
        ({"model_type": "qwen2"} | base, "type qwen2:"),
        ({"model_type": "clip"}, "type clip:"),
        ({"model_type": "qwen3_5", "text_config": base}, "type qwen3_5:"),
        ({"model_type": "qwen9_vl"}, "can't be loaded"),
        ({"model_type": "qwen2_vl", "text_config": base | sliding}, "sliding_attention"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for load in (load_config, lambda name: load_model(name, "cpu")):
            with pytest.raises(UserError, match=message):
                load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="give it with --adapter"):
        load_config(str(tmp_path))


def test_names_after_a_generated_text_are_ranked_without_reading_the_prompt_again(tiny):
    model, processor = tiny
    image = patches(processor, pictures((70, 90), (64, 64), (160, 50)))
    inputs = encode(processor, BRIEF, image["image_grid_thw"])
    names = PackedNames(processor, NESTED)
    # Of different length, and other texts than what the cache has seen.
    texts = ["a white flower with a yellow centre.\n", "\n", "red, in a line\n"]
    prefixed = encode(processor, BRIEF, image["image_grid_thw"], texts)
    expected = rank(model, names, prefixed, image)

    kv_cache = new_cache(model)
    assert generate(model, processor, inputs, image, 9, kv_cache) == generate(
        model, processor, inputs, image, 9
    )
    calls = []
    hook = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    features = {"image_grid_thw": image["image_grid_thw"]}  # it is not looked at again
    sums = rank_after_answers(model, processor, names, inputs, features, kv_cache, texts)
    hook.remove()
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-4)
    assert not calls and (sums[0] - sums[1]).abs().max() > 1e-2


def test_text_only_questions_rank_as_a_plain_forward(tiny):
    model, processor = tiny
    names = PackedNames(processor, NESTED)
    sums = rank(model, names, encode(processor, BRIEF, None))[0]
    turn = {"role": "user", "content": [{"type": "text", "text": BRIEF}]}
    chat = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    start = len(processor.tokenizer(chat)["input_ids"])
    for name, value in zip(NESTED, sums):
        ids = processor.tokenizer(chat + name + END, return_tensors="pt")["input_ids"][0]
        log_probabilities = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected = sum(log_probabilities[t - 1, ids[t]] for t in range(start, len(ids)))
        assert abs(expected - value) < 1e-4


@pytest.mark.parametrize(
    "extra, ratio", [("", 30), (" Look at the petals, the leaves and the stamens." * 8, 45)]
)
def test_ranking_takes_few_operations(tiny, extra, ratio):
    """Counted, not timed: image and question once and two forwards of the language model, against
    one forward a name (benchmarks/qwen.py has the clock)."""
    model, processor = tiny
    names = PackedNames(processor, OXFORD)
    image = patches(processor, pictures((64, 64)))
    inputs = encode(processor, BRIEF + extra, image["image_grid_thw"])
    assert not extra or 200 < inputs["input_ids"].shape[1] < 300

    @torch.inference_mode()
    def one_forward_a_name():
        for name in OXFORD:
            ids = torch.tensor([processor.tokenizer(name + END)["input_ids"]])
            no_image = torch.zeros_like(ids)
            model(
                **image,
                input_ids=torch.cat([inputs["input_ids"], ids], 1),
                mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], no_image], 1),
                logits_to_keep=ids.shape[1] + 1,
            )

    calls = []
    hook = model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    operations = count_flops(lambda: rank(model, names, inputs, image))
    hook.remove()
    assert len(calls) == 2
    assert count_flops(one_forward_a_name) / operations >= ratio


def test_answers_are_the_likeliest_tokens_whatever_the_model_ships(tmp_path):
    """One token after the other by hand, against the settings that a release is sampled with."""
    name = str(small_family("qwen2_5_vl", tmp_path))
    path = tmp_path / "generation_config.json"
    model, processor = load_model(name, "cpu")
    [image] = pictures((70, 90))
    inputs = library_encoding(processor, [image])
    length = inputs["input_ids"].shape[1]
    end = processor.tokenizer.convert_tokens_to_ids(END)
    with torch.no_grad():
        for _ in range(8):
            token = model(**inputs).logits[0, -1].argmax()
            for key, value in (("input_ids", token), ("attention_mask", 1)):
                column = torch.full_like(inputs[key][:, :1], int(value))
                inputs[key] = torch.cat([inputs[key], column], 1)
            no_image = torch.zeros_like(inputs["mm_token_type_ids"][:, :1])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], no_image], 1)
    expected = inputs["input_ids"][0, length:].tolist()
    assert end not in expected
    expected_text = processor.tokenizer.decode(expected, skip_special_tokens=True)

    released = {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1}
    for settings in (
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": [expected[0]]},
        {"bad_words_ids": [[expected[1]]], "num_beams": 4},
        {"max_length": 2, "max_new_tokens": 1},
    ):
        path.write_text(json.dumps(released | settings))
        model, processor = load_model(name, "cpu")
        patched = patches(processor, [image])
        prompts = encode(processor, BRIEF, patched["image_grid_thw"])
        assert generate(model, processor, prompts, patched, 8) == [expected_text], settings
    assert end in model.generation_config.eos_token_id


# -----------------------------------------------------------------------------
# training


def test_loss_is_the_cross_entropy_of_exactly_the_answers_tokens(tiny):
    model, processor = tiny
    images = pictures((70, 90), (64, 64), (160, 50))
    texts = ["rose", "white petals, a yellow centre.\ntree mallow", "globe-flower"]
    image = patches(processor, images)
    inputs = encode(processor, BRIEF, image["image_grid_thw"])
    loss, count = answer_loss(model, processor, inputs, image, texts)

    expected = 0.0
    n_tokens = 0
    for picture, text in zip(images, texts):
        inputs = library_encoding(processor, [picture], text)
        ids = inputs["input_ids"][0].tolist()
        start = len(library_encoding(processor, [picture])["input_ids"][0])
        answer_ids = processor.tokenizer(text + END)["input_ids"]
        end = start + len(answer_ids)
        # The answer stands where it is looked for, and what follows END does not count.
        assert ids[start:end] == answer_ids
        assert processor.tokenizer.decode(ids[end:]) == "\n"
        logits = model(**inputs).logits[0].double()
        for t in range(start, end):
            probability = logits[t - 1].exp()[ids[t]] / logits[t - 1].exp().sum()
            expected -= probability.log()
        n_tokens += len(answer_ids)
    assert count == n_tokens == sum(answer_length(processor, text) for text in texts)
    assert abs(loss.item() - expected.item()) < 1e-4 * n_tokens


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model, processor = load_model("tiny", "cpu")
        torch.manual_seed(0)
        model = add_adapter(model, 4, 8.0, ["merger"], recompute).train()
        layers = base_model(model).model.language_model.layers
        assert all(layer.gradient_checkpointing for layer in layers) == recompute
        image = patches(processor, pictures((70, 90), (64, 64)))
        inputs = encode(processor, BRIEF, image["image_grid_thw"])
        loss, count = answer_loss(model, processor, inputs, image, ["rose", "tree mallow"])
        (loss / count).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})

    kept, recomputed = gradients
    lora_layers = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in kept if "lora_B" in n}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert lora_layers == attention | mlp
    assert any("merger.modules_to_save" in n for n in kept)
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
        # B starts at zero, so A has no gradient yet.
        if "lora_A" not in name:
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("name, n_modules", [("qkv", 4), ("patch_embed", 1), ("blocks.3", 1)])
def test_any_part_of_the_vision_tower_is_really_trained(name, n_modules, tmp_path):
    model, processor = load_model("tiny", "cpu")
    assert trains_vision(model, [name])
    model = add_adapter(model, 4, 8.0, [name]).train()
    trained = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    prefixes = {n.split(".modules_to_save")[0] for n in trained}
    assert len(prefixes) == n_modules
    assert all(prefix.endswith(f"visual.{name}") or name == "qkv" for prefix in prefixes)
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    image = patches(processor, pictures((70, 90)))
    inputs = encode(processor, BRIEF, image["image_grid_thw"])
    loss, _ = answer_loss(model, processor, inputs, image, ["rose"])
    loss.backward()
    optimizer.step()
    moved = [n for n, p in trained.items() if not torch.equal(p, before[n])]
    assert len(moved) == len(trained)

    model.eval().save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model("tiny", "cpu", tmp_path)
    images = pictures((64, 64))
    expected = rank_images(model, processor, images, NESTED)
    torch.testing.assert_close(rank_images(loaded, processor, images, NESTED), expected)


def test_modules_that_can_not_be_trained_whole_are_refused(tiny):
    model, _ = tiny
    for names, message in (
        (["towers"], "no module of that name"),
        (["isual"], "no module of that name"),
        (["language_model"], "holds layers that LoRA changes"),
        (["model"], "holds layers that LoRA changes"),
        ([""], "holds layers that LoRA changes"),
        (["q_proj"], "holds layers that LoRA changes"),
        (["blocks"], "is a list of modules"),
        (["rotary_emb"], "has no weights"),
        (["visual", "merger"], "is a part of model.visual"),
        (["merger", "visual"], "is a part of model.visual"),
    ):
        with pytest.raises(UserError, match=message):
            modules_to_train(model, names)
    assert modules_to_train(model, ["visual", "visual"]) == ["model.visual"]
    # Not every module whose path ends with these letters.
    assert modules_to_train(model, ["norm"]) == ["model.language_model.norm"]
    assert not trains_vision(model, ["norm", "lm_head"])


# -----------------------------------------------------------------------------
# features of the vision tower


@pytest.mark.parametrize("family", ["tiny", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_features_of_the_vision_tower_stand_for_pixels(family, small, tmp_path, monkeypatch):
    """Also for the layers that Qwen3-VL feeds from inside its vision tower."""
    name = family if family == "tiny" else str(small_family(family, tmp_path / family))
    model, processor = load_model(name, "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flowers = open_flowers(small)
    index = flowers.splits["test"][:5]
    features = image_features(model, processor, flowers, index, "x", batch_size=2)
    image = patches(processor, open_images([flowers.files[i] for i in index]))
    assert torch.equal(features.grids, image["image_grid_thw"])
    assert [len(tokens) for tokens in features.tokens] == (features.grids.prod(1) // 4).tolist()

    inputs = encode(processor, BRIEF, features.grids)
    kept = features.batch(list(range(5)))
    with torch.no_grad():
        from_pixels, _ = hidden_states(model, inputs, image)
        from_features, _ = hidden_states(model, inputs, kept)
    torch.testing.assert_close(from_features[:, -1], from_pixels[:, -1], rtol=0, atol=1e-4)
    in_words = generate(model, processor, inputs, image, 6)
    assert generate(model, processor, inputs, kept, 6) == in_words
    again, _ = load_model(name, "cpu")
    assert vision_digest(model) == vision_digest(again)

    # What is kept is whole: each part of it changes the answer.
    width = model.config.get_text_config().hidden_size
    for start in range(0, kept["features"].shape[1], width):
        damaged = kept | {"features": kept["features"].clone()}
        damaged["features"][:, start : start + width] *= 2
        with torch.no_grad():
            states, _ = hidden_states(model, inputs, damaged)
        assert (states[:, -1] - from_pixels[:, -1]).abs().max() > 1e-3


def test_kept_features_of_a_bf16_model_do_not_overflow(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, processor = build("tiny", torch.bfloat16)
    with torch.no_grad():
        model.model.visual.merger.mlp[2].bias += 1e5  # beyond what fp16 can hold
    flowers = open_flowers(small)
    features = image_features(model, processor, flowers, np.arange(3), "large", batch_size=2)
    tokens = torch.cat(features.tokens)
    assert tokens.dtype == torch.bfloat16
    assert tokens.isfinite().all() and tokens.max() > 9e4


def test_features_are_kept_by_the_image_and_within_bounds(tiny, small, tmp_path, monkeypatch):
    model, processor = tiny
    root = shutil.copytree(small, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    flowers = open_flowers(root)
    computed = []

    def counting_patches(processor, images):
        computed.append(len(images))
        return patches(processor, images)

    monkeypatch.setattr(kept_features, "patches", counting_patches)

    def check(index, n_computed):
        computed.clear()
        features = image_features(model, processor, flowers, np.array(index), "x", batch_size=2)
        assert sum(computed) == n_computed
        alone = patches(processor, open_images([flowers.files[i] for i in index]))
        with torch.no_grad():
            expected = model.model.get_image_features(**alone, return_dict=True).pooler_output
        for tokens, of_image in zip(features.tokens, expected):
            torch.testing.assert_close(tokens, of_image, rtol=0, atol=1e-4)
        return features

    check([0, 1, 2], 3)
    check([4, 2, 0, 3], 2)
    whole = check([3, 1, 4], 0)

    # A damaged pack is made anew, and so is what a changed image was in.
    first = min((root / ".cache").glob("qwen-*.npy"), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(first.read_bytes())
    data[300] ^= 1
    n_images = len(json.loads(first.with_suffix(".json").read_text())["images"])
    first.write_bytes(data)
    check([0, 1, 2, 3, 4], n_images)
    os.utime(flowers.files[3], (1, 1))
    check([0, 3], 1)
    # Other pixels of the same images, as another model's processor makes them.
    monkeypatch.setattr(processor.image_processor, "image_mean", [0.0, 0.0, 0.0])
    check([0], 1)

    # Where the room is used up, the oldest go; who has them open keeps them.
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    before = [tokens.clone() for tokens in whole.tokens]
    check([7], 1)
    assert len(list((root / ".cache").glob("qwen-*"))) == 2
    assert all(map(torch.equal, whole.tokens, before))


def test_evaluation_takes_features_in_portions_or_pixels(tiny, small, tmp_path, monkeypatch):
    model, processor = tiny
    root = shutil.copytree(small, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    flowers = open_flowers(root)
    monkeypatch.setattr(kept_features, "PORTION", 4)
    index = [5, 3, 11, 0, 7, 2, 9]
    seen = []
    digest = digest_to_keep(model, processor, flowers, index)
    assert digest == vision_digest(model)
    for image, batch in load_images(model, processor, flowers, index, 3, digest):
        seen += batch
        pixels = patches(processor, open_images([flowers.files[i] for i in batch]))
        expected = vision_features(model, pixels)
        torch.testing.assert_close(image["features"], expected, rtol=0, atol=1e-4)
        assert torch.equal(image["image_grid_thw"], pixels["image_grid_thw"])
    assert seen == index and len(list((root / ".cache").glob("qwen-*.npy"))) == 2
    seen = [batch for _, batch in load_images(model, processor, flowers, index, 3, None)]
    assert seen == [[5, 3, 11], [0, 7, 2], [9]]

    # What no other run can use, or what would crowd out everything else.
    trained = add_adapter(load_model("tiny", "cpu")[0], 4, 8.0, ["merger"])
    assert digest_to_keep(trained, processor, flowers, index) is None
    monkeypatch.setattr(cache, "MAX_BYTES", 1000)
    assert digest_to_keep(model, processor, flowers, index) is None


# -----------------------------------------------------------------------------
# matching


def test_a_matched_answer_is_the_whole_name():
    names = ["rose", "lenten rose", "globe-flower", "colt's foot", "prince of wales feathers"]
    for answer, expected in (
        ("Rose.", 0),
        ("A rose", 0),
        ("lenten rose", 1),
        ("Globe flower", 2),
        ("globe-flower!", 2),
        ("Colt\u2019s Foot", 3),
        ("pink petals\n\nThe Rose\n", 0),
        ("Prince of Wales  feathers", 4),
        # in quotation marks; an apostrophe within a name is a part of it
        ("'Rose'", 0),
        ("\u2018Rose\u2019.", 0),
        ("\u201cA rose\u201d", 0),
        ("'Colt's foot'", 3),
        ("colts foot", None),
        ("colt s foot", None),
        # what is not seen parts no word
        ("ro\u00adse", 0),
        ("a kind of rose", None),
        ("", None),
        ("rose\npink", None),
        ("the", None),
        ("roses", None),
        ("rose, lenten rose", None),
    ):
        assert match(answer, names) == expected, answer


# -----------------------------------------------------------------------------
# the scripts


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run of qwen_train.py on the small dataset, val held out."""
    folder = tmp_path_factory.mktemp("qwen") / "runs"
    flags = ["--data_root", small, "--model", "tiny", "--holdout", "--epochs", 20]
    flags += ["--batch_size", 12, "--runs", folder, "--name", "train", "--wandb", "disabled"]
    call("qwen_train.py", *flags)
    return folder / "train"


def read_losses(run):
    return [row["train/loss"] for row in files.read_lines(run / "metrics.jsonl")]


def test_the_learning_rate_rises_over_a_twentieth_of_the_steps(trained):
    factors = [row["train/lr"] / 1e-3 for row in files.read_lines(trained / "metrics.jsonl")]
    rise = len(factors) // 20
    assert rise >= 2
    assert factors[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert factors[rise:] == sorted(factors[rise:], reverse=True)


def test_training_teaches_and_evaluation_leaves_what_clip_leaves(trained, small, cli):
    common = ["--data_root", small, "--runs", trained.parent, "--wandb", "disabled"]
    code, out, err = cli(
        "qwen_eval.py", *common, "--adapter", trained, "--holdout", "--name", "rank"
    )
    assert code == 0, err
    assert "GB for 8 images" in out and "is reported" in out
    folder = trained.parent / "rank"
    result = json.loads((folder / "result.json").read_text())
    assert result["job"] == "qwen_eval" and result["model"] == "tiny" and result["test/n"] == 12
    assert result["test/top1_low"] > 100 / 6  # chance

    # The score that is best on val is reported.
    on_val = {score: result[f"val/{score}_top1"] for score in ("sum", "token", "pmi")}
    reported = result["reported_score"]
    assert on_val[reported] == max(on_val.values())
    assert result["test/top1"] == result[f"test/{reported}_top1"]

    # All three scores are what they are said to be.
    scores = np.load(folder / "scores.npz")
    class_names = scores["class_names"].tolist()
    labels = [class_names.index(row["label"]) for row in read_csv(folder / "predictions.csv")]
    nll = log_loss(labels, softmax(scores[reported].astype(float), axis=1), labels=range(6))
    assert result["test/nll"] == pytest.approx(nll, rel=1e-4)
    model, processor = load_model("tiny", "cpu", trained)
    flowers = open_flowers(small, holdout=True)
    names = PackedNames(processor, flowers.class_names)
    without_image = rank(model, names, encode(processor, BRIEF, None))[0].numpy()
    np.testing.assert_allclose(scores["pmi"], scores["sum"] - without_image, atol=1e-4)
    lengths = [answer_length(processor, name) for name in flowers.class_names]
    np.testing.assert_allclose(scores["token"] * lengths, scores["sum"], rtol=1e-4)
    i = flowers.splits["test"][3]
    assert scores["files"][3] == flowers.files[i].name
    [image] = open_images([flowers.files[i]])
    expected = forward_a_name(model, processor, image, flowers.class_names)
    np.testing.assert_allclose(scores["sum"][3], expected, atol=1e-3)

    # CLIP's evaluation leaves the same columns, rows and keys.
    code, _, err = cli("baseline_eval.py", *common, "--architecture", "tiny", "--name", "clip")
    assert code == 0, err
    rows = read_csv(folder / "predictions.csv")
    clip_rows = read_csv(trained.parent / "clip" / "predictions.csv")
    assert rows[0].keys() == clip_rows[0].keys()
    assert [row["file"] for row in rows] == [row["file"] for row in clip_rows]
    accuracy = np.mean([row["label"] == row["top1"] for row in rows])
    assert result["test/top1"] == pytest.approx(100 * accuracy)
    clip_result = json.loads((trained.parent / "clip" / "result.json").read_text())
    keys = {"test/top1", "test/top1_low", "test/top3", "test/top5", "test/mean_per_class"}
    assert keys <= set(clip_result) & set(result)
    table = files.read_lines(trained.parent / "results.jsonl")
    assert "rank" in [row["name"] for row in table]


def test_evaluation_goes_on_where_it_was_killed(trained, small, cli):
    arguments = ["--data_root", small, "--adapter", trained, "--batch_size", 5]
    arguments += ["--runs", trained.parent, "--wandb", "disabled"]
    assert cli("qwen_eval.py", *arguments, "--name", "whole")[0] == 0
    assert cli("qwen_eval.py", *arguments, "--name", "killed")[0] == 0
    folder = trained.parent / "killed"
    expected = read_csv(folder / "predictions.csv")

    # As after a kill: six images are done, and the line of the seventh is cut off. The first record
    # is marked, to show that it is kept, and not made again.
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    marked = json.loads(lines[0])
    marked["sum"][0] += 100
    remaining = json.dumps(marked) + "\n" + "".join(lines[1:6]) + lines[6][:20]
    (folder / "answers.jsonl").write_text(remaining)
    for name in ("result.json", "predictions.csv"):
        (folder / name).unlink()

    code, out, err = cli("qwen_eval.py", "--resume", folder, "--wandb", "disabled")
    # 6 of 24: the run holds val out, so its images are asked about too
    assert code == 0 and "25%" in err, err
    rows = read_csv(folder / "predictions.csv")
    assert rows[0]["top1"] == "rose" and float(rows[0]["score1"]) == 1.0
    assert [row["top1"] for row in rows[1:]] == [row["top1"] for row in expected[1:]]
    assert "nothing to do" in cli("qwen_eval.py", "--resume", folder)[1]


def test_the_old_name_of_pmi_is_understood(capfd):
    """As a flag, and in the args.json of a resumed run, which goes through `resolve` too."""
    script = runpy.run_path(str(ROOT / "qwen_eval.py"))
    args = script["make_parser"]().parse_args(["--model", "tiny", "--score", "calibrated"])
    assert script["resolve"](args).score == "pmi"
    assert "now called pmi" in capfd.readouterr().err


def test_generated_answers_are_matched_whole(trained, small, cli, monkeypatch):
    texts = iter(["Rose", "a lenten rose", "mallow\n", "", "tree mallow", "Ball moss."] * 2)

    def scripted(model, processor, inputs, image, max_tokens, kv_cache=None):
        return [next(texts) for _ in image["image_grid_thw"]]

    monkeypatch.setattr(answers, "generate", scripted)
    arguments = ["--data_root", small, "--adapter", trained, "--runs", trained.parent]
    arguments += ["--name", "generate", "--protocol", "generate", "--list_names"]
    code, out, err = cli("qwen_eval.py", *arguments, "--wandb", "disabled")
    assert code == 0, err
    folder = trained.parent / "generate"
    rows = read_csv(folder / "predictions.csv")
    labels = ["rose", "lotus", "ball moss", "tree mallow", "mallow", "globe-flower"]
    assert [row["label"] for row in rows[:6]] == labels
    outside = "(outside the list)"
    matched = ["rose", outside, "mallow", outside, "tree mallow", "ball moss"]
    assert [row["top1"] for row in rows[:6]] == matched
    assert {row["top2"] for row in rows} == {""}
    result = json.loads((folder / "result.json").read_text())
    assert result["test/top1"] == pytest.approx(100 / 6)
    assert "test/nll" not in result, "free answers have no probabilities"
    assert not (folder / "reliability.png").exists()
    assert result["test/outside_list"] == pytest.approx(100 / 3)
    assert "test/top5" not in result


def test_trained_model_generates_what_it_ranks_first(trained, small):
    model, processor = load_model("tiny", "cpu", trained)
    flowers = open_flowers(small, holdout=True)
    test_files = [flowers.files[i] for i in flowers.splits["test"]]
    image = patches(processor, open_images(test_files))
    inputs = encode(processor, BRIEF, image["image_grid_thw"])
    texts = generate(model, processor, inputs, image, 20)
    generated = [match(text, flowers.class_names) for text in texts]
    names = PackedNames(processor, flowers.class_names)
    first = rank(model, names, inputs, image).argmax(1).tolist()
    assert np.mean([a == b for a, b in zip(generated, first)]) > 0.9


def test_training_goes_on_where_it_was_killed(small, tmp_path, cli, monkeypatch):
    arguments = ["--data_root", small, "--model", "tiny", "--epochs", 2, "--batch_size", 12]
    arguments += ["--save_every", 2, "--runs", tmp_path, "--wandb", "disabled"]
    assert cli("qwen_train.py", *arguments, "--name", "whole")[0] == 0
    save_tensors = files.save_tensors

    def save_and_die(path, state):
        save_tensors(path, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(files, "save_tensors", save_and_die)
        assert cli("qwen_train.py", *arguments, "--name", "killed")[0] == 130
    code, out, err = cli("qwen_train.py", "--resume", tmp_path / "killed", "--wandb", "disabled")
    assert code == 0 and "after step 4 of 6" in out, err

    adapter_file = "adapter/adapter_model.safetensors"
    whole = load_file(tmp_path / "whole" / adapter_file)
    resumed = load_file(tmp_path / "killed" / adapter_file)
    assert whole.keys() == resumed.keys() and any("visual" in key for key in whole)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    losses = read_losses(tmp_path / "whole")
    assert losses == read_losses(tmp_path / "killed") and len(losses) == 6


def test_chunks_give_the_same_losses_and_features_are_kept(small, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # --also_train without a module: the vision tower is frozen
    arguments = ["--data_root", small, "--model", "tiny", "--also_train"]
    arguments += ["--epochs", 1, "--batch_size", 12, "--runs", tmp_path, "--wandb", "disabled"]
    before = set(small.glob(".cache/qwen-*.npy"))
    losses = []
    for name, chunk_size in (("whole", 0), ("chunks", 5)):
        code, out, err = cli(
            "qwen_train.py", *arguments, "--name", name, "--chunk_size", chunk_size
        )
        assert code == 0 and "vision features once" in out, err
        losses.append(read_losses(tmp_path / name))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(set(small.glob(".cache/qwen-*.npy")) - before) == 1


def test_described_answers(small, tmp_path, cli, monkeypatch):
    common = ["--data_root", small, "--runs", tmp_path, "--wandb", "disabled"]
    flowers = open_flowers(small)
    train = flowers.splits["train"]

    # a generated sentence for each training image ...
    arguments = ["--model", "tiny", "--describe", "--split", "train", "--most_tokens", 4]
    code, out, err = cli("qwen_eval.py", *common, *arguments, "--name", "words")
    assert code == 0, err
    captions = tmp_path / "words" / "descriptions.jsonl"
    assert len(captions.read_text().splitlines()) == 36

    # ... and in their place sentences that can be told apart
    rows = [{"file": flowers.files[i].name, "captions": [f"a disc {i}"]} for i in train]
    files.write_lines(captions, rows)
    assert len(read_captions(captions, tuple(flowers.files[i] for i in train))) == 36
    seen = []

    def recording_loss(model, processor, inputs, image, texts):
        seen.extend(texts)
        return answer_loss(model, processor, inputs, image, texts)

    monkeypatch.setattr(answers, "answer_loss", recording_loss)
    arguments = ["--model", "tiny", "--answer", "described", "--captions", captions]
    arguments += ["--epochs", 1, "--batch_size", 12, "--name", "train"]
    code, out, err = cli("qwen_train.py", *common, *arguments)
    assert code == 0, err
    expected = [f"a disc {i}\n{flowers.class_names[flowers.labels[i]]}" for i in train]
    assert sorted(seen) == sorted(expected)

    # Names are ranked after the model's own description.
    arguments = ["--adapter", tmp_path / "train", "--images", 3, "--most_tokens", 6]
    code, out, err = cli("qwen_eval.py", *common, *arguments, "--name", "eval")
    assert code == 0, err
    model, processor = load_model("tiny", "cpu", tmp_path / "train")
    names = PackedNames(processor, flowers.class_names)
    path_of = {path.name: path for path in flowers.files}
    for row in files.read_lines(tmp_path / "eval" / "answers.jsonl"):
        assert "\n" not in row["description"]
        image = patches(processor, open_images([path_of[row["file"]]]))
        prefix = row["description"] + "\n"
        inputs = encode(processor, QUESTIONS["described"], image["image_grid_thw"], [prefix])
        sums = rank(model, names, inputs, image)[0]
        np.testing.assert_allclose(row["sum"], sums, atol=1e-3)


def test_mistakes_end_in_one_line(small, tmp_path, cli):
    common = ["--data_root", small, "--runs", tmp_path, "--wandb", "disabled"]
    tiny = [*common, "--model", "tiny"]

    outcome = cli("qwen_eval.py", *tiny, "--adapter", tmp_path)
    assert "no adapter in" in error_line(outcome)
    outcome = cli("qwen_eval.py", *common, "--model", "no/such-model", "--adapter", tmp_path)
    assert "no adapter in" in error_line(outcome)
    outcome = cli("qwen_eval.py", *common, "--model", "no/such-model")
    assert "needs the network once" in error_line(outcome)
    outcome = cli("qwen_train.py", *tiny, "--answer", "described")
    assert "go together" in error_line(outcome)
    outcome = cli("qwen_train.py", *tiny, "--also_train", "towers")
    assert "no module of that name" in error_line(outcome)
    for pixels in (-5, 0, 100, 255):  # a token of tiny is 16 x 16
        for script in ("qwen_eval.py", "qwen_train.py"):
            outcome = cli(script, *tiny, "--max_pixels", pixels)
            assert "give at least 256" in error_line(outcome)
    outcome = cli("qwen_eval.py", *tiny, "--split", "val")
    assert "the val split is empty" in error_line(outcome)

    arguments = ["--epochs", 1, "--batch_size", 36, "--name", "all"]
    assert cli("qwen_train.py", *tiny, *arguments)[0] == 0
    outcome = cli("qwen_eval.py", *common, "--adapter", tmp_path / "all", "--holdout")
    assert "trained on the val images" in error_line(outcome)
    (tmp_path / "all" / "args.json").write_text("{")
    outcome = cli("qwen_eval.py", *common, "--adapter", tmp_path / "all")
    assert "args.json is damaged" in error_line(outcome)
    assert not list(tmp_path.glob("tiny-qwen_eval-*/result.json"))


def eval_arguments(*words):
    """What qwen_eval.py makes of a command line, up to its Config."""
    script = runpy.run_path(str(ROOT / "qwen_eval.py"))
    return script["resolve"](script["make_parser"]().parse_args([str(word) for word in words]))


def test_an_adapter_knows_its_model(trained, tmp_path, capfd):
    """In its run by args.json, also as the folder adapter/; elsewhere by its own config."""
    for path in (trained, trained / "adapter"):
        config = eval_arguments("--adapter", path)
        assert config.model == "tiny"
        assert f"--model tiny, which {path} was made for" in capfd.readouterr().out

    damaged = shutil.copytree(trained, tmp_path / "damaged")
    arguments = json.loads((trained / "args.json").read_text())
    for damage in ({"model": 3}, {"max_pixels": "x"}, {"answer": "long"}, {"answer": ["brief"]}):
        files.write_json(damaged / "args.json", arguments | damage)
        with pytest.raises(UserError, match="is damaged"):
            eval_arguments("--adapter", damaged)

    copied = shutil.copytree(trained / "adapter", tmp_path / "copied")
    with pytest.raises(UserError, match="does not say which model"):
        eval_arguments("--adapter", copied)
    family = str(small_family("qwen2_5_vl", tmp_path / "family"))
    trained_on_it = add_adapter(load_model(family, "cpu")[0], 4, 8.0)
    trained_on_it.save_pretrained(tmp_path / "other")
    assert eval_arguments("--adapter", tmp_path / "other").model == family

    # A model of other shapes is refused, another one of the same shapes said.
    with pytest.raises(UserError, match="does not fit .* it lacks"):
        load_model(family, "cpu", copied)
    with_adapter("tiny", tmp_path / "lora")
    with pytest.raises(UserError, match="does not fit .* size mismatch"):
        load_model(family, "cpu", tmp_path / "lora")
    capfd.readouterr()
    assert eval_arguments("--adapter", trained, "--model", family).model == family
    assert f"--model {family}: {trained} was trained with tiny" in capfd.readouterr().err


def test_a_question_that_training_did_not_ask_is_said(trained, capfd):
    options = ["--answer", "described", "--max_pixels", 512, "--list_names"]
    config = eval_arguments("--adapter", trained, *options)
    assert config.answer == "described" and config.max_pixels == 512
    lines = capfd.readouterr().err.splitlines()
    said = [line.split()[1] for line in lines if line.startswith("note: ")]
    assert said == ["--max_pixels", "--answer", "--list_names"]
    eval_arguments("--adapter", trained, "--answer", "brief")
    assert "note: " not in capfd.readouterr().err


def test_what_a_damaged_args_json_says_is_checked_as_what_is_typed(tmp_path, cli):
    for script, job, damages in (
        ("qwen_train.py", "qwen_train", [{"save_every": "x"}, {"also_train": 3}, {"rank": 0}]),
        ("qwen_eval.py", "qwen_eval", [{"most_tokens": [8]}, {"protocol": "x"}, {"images": -1}]),
    ):
        for i, damage in enumerate(damages):
            folder = tmp_path / f"{job}-{i}"
            folder.mkdir()
            stored = {"job": job, "name": folder.name, "model": "tiny", "data_root": "sample"}
            files.write_json(folder / "args.json", stored | damage)
            code, _, err = cli(script, "--resume", folder)
            assert code == 2 and "Traceback" not in err, err
            assert next(iter(damage)) in err, err


def test_an_evaluation_without_an_answer_is_begun_anew(tmp_path):
    """A crash before the first batch leaves nothing that --resume would save."""
    config = {"job": "qwen_eval", "architecture": "tiny"}
    folder = runs.new_run(tmp_path, "killed", config, {})
    (folder / "answers.jsonl").write_text("")
    assert runs.new_run(tmp_path, "killed", config, {}) == folder
    with pytest.raises(UserError, match="is a run already"):
        runs.new_run(tmp_path, "killed", config | {"job": "qwen_train"}, {})
    files.append_line(folder / "answers.jsonl", {"file": "a.jpg", "answer": "rose"})
    with pytest.raises(UserError, match="--resume"):
        runs.new_run(tmp_path, "killed", config, {})
