"""Weights that people have: loaded as their own libraries load them, or refused with a line.

All weights are random. The shapes are the published ones, or those with fewer layers.
"""

import json
import sys
import warnings
from copy import deepcopy

import clip
import numpy as np
import open_clip
import pytest
import torch
from conftest import error_line
from PIL import Image
from safetensors.torch import save_file

from flowers import UserError, evaluate, files, frozen, models, runs, strategies, weights
from flowers.data import open_flowers
from flowers.pixels import CLIP_MEAN, CLIP_STD, get_batch, load_pixels, resize_and_crop

TEXTS = ["an image of the rose flower", "a photo of a globe thistle, a type of flower."]
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of some of LAION's models

# Text towers are mostly vocabulary: a narrow one is quick.
NARROW_TEXT = {"width": 128, "heads": 2, "layers": 2}
# Published configs, and what is changed in them to have fewer layers. The first two are whole.
PUBLISHED = {
    "RN50": ("RN50", {}, {}),
    "ViT-B-32": ("ViT-B-32", {}, {}),
    "ViT-B-32 cut": ("ViT-B-32", {"layers": 2}, NARROW_TEXT),
    "RN50-quickgelu": ("RN50-quickgelu", {"layers": [1, 1, 1, 1], "width": 32}, NARROW_TEXT),
    "ViT-B-32-quickgelu": ("ViT-B-32-quickgelu", {"layers": 2}, NARROW_TEXT),
    "ViT-L-14": ("ViT-L-14", {"layers": 1, "image_size": 56}, NARROW_TEXT),
    "ViT-H-14": ("ViT-H-14", {"layers": 1, "image_size": 56}, NARROW_TEXT),
    "ViT-g-14": ("ViT-g-14", {"layers": 1, "image_size": 56}, NARROW_TEXT),
}
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 64,
        "layers": 2,
        "width": 160,
        "head_width": 80,
        "patch_size": 16,
        "mlp_ratio": 4.9231,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}


def config_of(name):
    """An open_clip config: SMALL, or a published one with fewer layers."""
    if name.startswith("small"):
        config = deepcopy(SMALL)
        if name == "small 80 of 320":
            config["vision_cfg"]["width"] = 320  # OpenAI's class would give it five heads of 64
        if name == "small 40":
            config["vision_cfg"] |= {"width": 200, "head_width": 40}  # no multiple of 64
        return config
    published, vision, text = PUBLISHED[name]
    config = open_clip.get_model_config(published)
    config["vision_cfg"] |= vision
    config["text_cfg"] |= text
    return config


def open_clip_model(config, seed=0):
    """open_clip's model of a config, with random weights that make every part matter."""
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**config).eval()
    for module in model.modules():
        # A new ResNet has zeros there, and its bottlenecks would do nothing.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def registered(monkeypatch):
    """registered(name, config): make open_clip know a model of this name, for this test."""

    def register(name, config, **tags):
        configs = open_clip.factory._MODEL_CONFIGS
        monkeypatch.setitem(configs, name, config)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)

    return register


@torch.no_grad()
def logits_of(model, images):
    """(images, texts): our way, with texts cut to their length and fp32 features."""
    image_features = models.encode_images(model, images)
    text_features = models.encode_texts(model, models.tokenize(TEXTS))
    return model.logit_scale.exp() * image_features @ text_features.t()


@torch.no_grad()
def logits_of_open_clip(model, images):
    image_features = model.encode_image(images, normalize=True)
    text_features = model.encode_text(clip.tokenize(TEXTS), normalize=True)
    return model.logit_scale.exp() * image_features @ text_features.t()


def random_images(model, n=3):
    side = model.visual.input_resolution
    return torch.randn(n, 3, side, side)


def lora_step(model, images):
    """One large step of low-rank training, so that the weights change visibly."""
    strategies.prepare(model, "lora", rank=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):  # the first step moves one factor only
        image_features = models.encode_images(model, images[:2])
        text_features = models.encode_texts(model, models.tokenize(TEXTS))
        loss = (image_features @ text_features.t()).diagonal().sum()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients):
                if gradient is not None and gradient.norm() > 0:
                    parameter -= 0.3 * gradient / gradient.norm()


def assert_survives_training(model, tmp_path):
    """A step of LoRA, model.pt, and the same model again; the stock package opens it or fails."""
    images = random_images(model)
    before = logits_of(model, images)
    lora_step(model, images)
    after = logits_of(model, images)
    assert (after - before).abs().max() > 1e-2, "the step did nothing"

    state, _ = strategies.export(model)
    path = tmp_path / "model.pt"
    files.save_tensors(path, state)
    again = weights.load_model(str(path))
    assert (logits_of(again, images) - after).abs().max() < 1e-4
    assert models.settings_of(again) == models.settings_of(model)

    if models.settings_of(model) == models.OPENAI:
        assert weights.SETTINGS_KEY not in state
        stock = stock_load(path)
        with torch.no_grad():
            theirs = stock(images, clip.tokenize(TEXTS))[0]
        # clip.load rounds to fp16.
        assert (theirs - after).abs().max() < 0.1
    else:
        # It has no heads for some widths, and otherwise fails at the tensor that it does not know.
        said = "flowers_config|size mismatch|divisible"
        with pytest.raises((RuntimeError, AssertionError), match=said):
            stock_load(path)


def stock_load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = clip.load(str(path), device="cpu")
    return model


# -----------------------------------------------------------------------------
# open_clip


@pytest.mark.parametrize("name", [*PUBLISHED, "small 80", "small 80 of 320", "small 40"])
def test_open_clip_models_give_open_clip_s_logits(name, registered, tmp_path, capsys):
    config = config_of(name)
    theirs = open_clip_model(config)
    registered("Model", config)
    path = tmp_path / "weights.pt"
    torch.save(theirs.state_dict(), path)

    ours = weights.load_model(f"open_clip:Model/{path}")
    assert ours.activation == ("quickgelu" if "quickgelu" in name else "gelu")
    images = random_images(ours)
    expected = logits_of_open_clip(theirs, images)
    del theirs
    assert (logits_of(ours, images) - expected).abs().max() < 1e-4
    assert ours.origin == f"open_clip Model/{path}"

    if name in ("RN50", "ViT-B-32"):
        return  # the rest is for those with fewer layers

    # The test could fail: with other settings the logits are others.
    others = [models.settings_of(ours)._replace(activation="quickgelu")]
    if "quickgelu" in name:
        others = [models.settings_of(ours)._replace(activation="gelu")]
    if name == "small 80 of 320":
        others.append(models.settings_of(ours)._replace(image_head_width=64))
        others.append(models.settings_of(ours)._replace(text_head_width=64))
    for settings in others:
        wrong = weights.from_state_dict(ours.state_dict(), settings=settings)
        assert (logits_of(wrong, images) - expected).abs().max() > 2e-4
    assert_survives_training(ours, tmp_path)


def test_every_config_of_open_clip_is_built_in_its_shape_or_refused(registered):
    """Against open_clip's own models on the meta device; nothing is left out."""
    built, refused = [], {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        try:
            settings = weights._open_clip_settings(config, {}, name)
        except UserError as error:
            refused[name] = str(error)
            continue
        # One layer is enough: all are alike.
        is_resnet = isinstance(config["vision_cfg"]["layers"], list)
        config["vision_cfg"]["layers"] = [1, 1, 1, 1] if is_resnet else 1
        config["text_cfg"]["layers"] = 1
        with torch.device("meta"):
            theirs = open_clip.model.CLIP(**config)
            state = theirs.state_dict()
            ours = models.build_shape(weights.read_shape(state, settings), settings=settings)
        assert shapes(ours) == shapes(theirs), name
        assert heads(ours) == heads(theirs), name
        built.append(name)
    assert {"RN50x64", "ViT-B-16", "ViT-L-14-336-quickgelu", "ViT-bigG-14", "ViT-e-14"} <= set(
        built
    )
    assert len(built) > 35
    reasons = {
        "ViT-B-16-SigLIP": "SigLIP",
        "coca_ViT-B-32": "CoCa",
        "convnext_base_w": "timm",
        "EVA02-B-16": "timm",
        "MobileCLIP-S1": "timm",
        "ViTamin-B": "timm",
        "PE-Core-B-16": "timm",
        "xlm-roberta-base-ViT-B-32": "Hugging Face",
        "ViT-H-14-CLIPA": "tokenizer",
        "ViT-H-14-worldwide": "tokenizer",
        "ViT-M-16-alt": "ls_init_value",
    }
    for name, reason in reasons.items():
        assert name in refused[name] and reason in refused[name], refused[name]


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def heads(model):
    """The numbers of heads of all attention layers, by kind of tower."""
    counts = []
    for module in model.modules():
        if hasattr(module, "num_heads"):
            counts.append(module.num_heads)
    return sorted(counts)


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "pos_embed_type", "sin_cos_2d"),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "final_ln_after_pool", True),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "ls_init_value", 1e-4),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
        ("vision_cfg", "act_kwargs", {"approximate": "tanh"}),
        ("vision_cfg", "a_key_of_tomorrow", 1),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "proj_bias", True),
        ("text_cfg", "pool_type", "eos"),
        ("text_cfg", "vocab_size", 32000),
        ("text_cfg", "context_length", 32),
    ],
)
def test_a_config_that_openai_s_module_can_t_compute_is_refused(part, key, value, registered):
    config = deepcopy(SMALL)
    config[part][key] = value
    registered("Model", config, tag={"file": "nowhere"})
    with pytest.raises(UserError, match="open_clip:Model/tag can't be made a CLIP"):
        weights.load_model("open_clip:Model/tag")


def test_patch_dropout_is_harmless(registered, tmp_path):
    config = deepcopy(SMALL)
    config["vision_cfg"]["patch_dropout"] = 0.5
    torch.save(open_clip_model(config).state_dict(), tmp_path / "a.pt")
    registered("Model", config)
    assert weights.load_model(f"open_clip:Model/{tmp_path / 'a.pt'}").activation == "gelu"


def test_the_tag_says_the_activation_and_the_normalisation(registered, tmp_path):
    """open_clip itself only warns where a tag's QuickGELU meets a config without it."""
    theirs = open_clip_model(SMALL | {"quick_gelu": True})
    file = tmp_path / "a.pt"
    torch.save(theirs.state_dict(), file)
    tag = {"file": str(file), "mean": HALF, "std": HALF, "quick_gelu": True}
    registered("Model", SMALL, tag=tag, squashed=tag | {"resize_mode": "squash"})

    ours = weights.load_model("open_clip:Model/tag")
    images = random_images(ours)
    assert (logits_of(ours, images) - logits_of_open_clip(theirs, images)).abs().max() < 1e-4
    assert (ours.activation, ours.mean, ours.std) == ("quickgelu", HALF, HALF)
    assert ours.origin == "open_clip Model/tag"
    assert_survives_training(ours, tmp_path)

    with pytest.raises(UserError, match="resize_mode squash"):
        weights.load_model("open_clip:Model/squashed")
    with pytest.raises(UserError, match="trained with quickgelu"):
        weights.load_model("open_clip:Model/tag", activation="gelu")


def test_all_tags_that_say_quickgelu_are_believed():
    """The facts behind it: a config of QuickGELU has no tag without, but for a refused model."""
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(name)
        if config.get("quick_gelu") and not open_clip.get_pretrained_cfg(name, tag).get(
            "quick_gelu"
        ):
            with pytest.raises(UserError):
                weights._open_clip_settings(config, {}, name)


def test_unknown_names_of_open_clip_are_answered_with_known_ones(monkeypatch):
    with pytest.raises(UserError, match="laion2b_s34b_b79k"):
        weights.load_model("open_clip:ViT-B-32/laion2b")
    with pytest.raises(UserError, match="it has .*ViT-B-32"):
        weights.load_model("open_clip:ViT-B32/laion2b")
    with pytest.raises(UserError, match="laion2b_s34b_b79k"):
        weights.load_model("open_clip:ViT-B-32")

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(UserError, match="no network.*laion/CLIP-ViT-B-32.*open_clip:ViT-B-32/FILE"):
        weights.load_model("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_weights_of_another_shape_than_the_name_are_refused(registered, tmp_path):
    torch.save(open_clip_model(SMALL).state_dict(), tmp_path / "a.pt")
    other = deepcopy(SMALL)
    other["vision_cfg"]["layers"] = 3
    registered("Other", other)
    with pytest.raises(UserError, match="layers is 2, not 3"):
        weights.load_model(f"open_clip:Other/{tmp_path / 'a.pt'}")


@pytest.fixture
def open_clip_folder(tmp_path):
    """A folder as on the hub: config and weights."""
    folder = tmp_path / "folder"
    folder.mkdir()
    preprocessing = {"mean": list(HALF), "std": list(HALF), "interpolation": "bicubic"}
    config = {"model_cfg": SMALL, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = open_clip_model(SMALL).state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "given", ["{}", "open_clip:{}", "open_clip:{}/open_clip_model.safetensors"]
)
def test_a_folder_of_open_clip_s(given, open_clip_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # it takes no package
    ours = weights.load_model(given.format(open_clip_folder))
    assert models.settings_of(ours) == models.Settings("gelu", 80, 32, HALF, HALF)
    images = random_images(ours)
    expected = logits_of_open_clip(open_clip_model(SMALL), images)
    assert (logits_of(ours, images) - expected).abs().max() < 1e-4


def test_a_path_of_open_clip_s_without_a_config_needs_the_activation(tmp_path, capfd):
    config = deepcopy(SMALL)
    config["vision_cfg"] |= {"head_width": 64, "width": 128, "mlp_ratio": 4.0}
    config["text_cfg"]["heads"] = 1
    theirs = open_clip_model(config)
    path = tmp_path / "epoch_1.pt"
    training = {
        "epoch": 1,
        "name": "2026-model_ViT-B-32",
        "state_dict": {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()},
        "optimizer": torch.optim.AdamW(theirs.parameters()).state_dict(),
    }
    torch.save(training, path)
    with pytest.raises(UserError, match="--activation"):
        weights.load_model(f"open_clip:{path}")
    for architecture in (f"open_clip:{path}", str(path)):
        ours = weights.load_model(architecture, activation="gelu")
        images = random_images(ours)
        assert (logits_of(ours, images) - logits_of_open_clip(theirs, images)).abs().max() < 1e-4
    assert capfd.readouterr().err == ""


def test_missing_packages_are_named(monkeypatch, tmp_path):
    for package in ("open_clip", "huggingface_hub", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    architectures = (
        "open_clip:ViT-B-32/openai",
        "hf:openai/clip-vit-base-patch32",
        str(tmp_path / "a.safetensors"),
    )
    for architecture in architectures:
        with pytest.raises(UserError, match="pip install -r requirements-openclip.txt"):
            weights.load_model(architecture)


# -----------------------------------------------------------------------------
# Hugging Face


def hugging_face_model(activation="quick_gelu", **vision):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "hidden_act": activation}
    text = small | {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
    vision = (
        small
        | {
            "hidden_size": 96,
            "intermediate_size": 200,
            "num_attention_heads": 3,
            "image_size": 64,
            "patch_size": 16,
        }
        | vision
    )
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    model = CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        # transformers starts with weights so small that the layers do nothing.
        if parameter.ndim > 1 and "layers" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def image_processor(side=64, **options):
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side, **options)


@torch.no_grad()
def logits_of_hugging_face(model, images):
    return model(input_ids=clip.tokenize(TEXTS), pixel_values=images).logits_per_image


@pytest.mark.parametrize(
    "kind, activation",
    [
        ("safetensors", "quick_gelu"),
        ("safetensors", "gelu"),
        ("bin", "quick_gelu"),
        ("shards", "gelu"),
        ("hub", "gelu"),
    ],
)
def test_hugging_face_models_give_transformers_logits(kind, activation, tmp_path, monkeypatch):
    theirs = hugging_face_model(activation)
    folder = tmp_path / "clip"
    theirs.save_pretrained(folder, max_shard_size="200KB" if kind == "shards" else "5GB")
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        # As old versions wrote it.
        position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        torch.save(theirs.state_dict() | position_ids, folder / "pytorch_model.bin")
    image_processor(image_mean=HALF, image_std=HALF).save_pretrained(folder)
    architecture = str(folder)
    if kind == "hub":
        architecture = "hf:someone/clip"
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))

    ours = weights.load_model(architecture)
    images = random_images(ours)
    expected = logits_of_hugging_face(theirs, images)
    assert (logits_of(ours, images) - expected).abs().max() < 1e-4
    ours_name = {"quick_gelu": "quickgelu", "gelu": "gelu"}[activation]
    assert models.settings_of(ours) == models.Settings(ours_name, 32, 32, HALF, HALF)
    assert ours.origin == f"Hugging Face {architecture.removeprefix('hf:')}"
    with pytest.raises(UserError, match="leave out --activation"):
        other = "gelu" if ours_name == "quickgelu" else "quickgelu"
        weights.load_model(architecture, activation=other)
    # The test could fail: heads of 64, or the other activation.
    for wrong in ({"image_head_width": 48}, {"text_head_width": 64}, {"activation": other}):
        settings = models.settings_of(ours)._replace(**wrong)
        wrong_model = weights.from_state_dict(ours.state_dict(), settings=settings)
        assert (logits_of(wrong_model, images) - expected).abs().max() > 2e-4
    assert_survives_training(ours, tmp_path)


@torch.no_grad()
def test_pixels_are_normalised_as_the_model_was_trained(tmp_path):
    """From a picture to logits, against transformers' own image processor."""
    theirs = hugging_face_model("gelu")
    theirs.save_pretrained(tmp_path)
    processor = image_processor(image_mean=(0.3, 0.4, 0.5), image_std=(0.2, 0.3, 0.4))
    processor.save_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pixel_values = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    expected = logits_of_hugging_face(theirs, pixel_values)

    ours = weights.load_model(str(tmp_path))
    pixels = resize_and_crop(torch.from_numpy(picture).permute(2, 0, 1), 64)[None]
    features = models.image_features(ours, pixels, torch.tensor([0]))
    text_features = models.text_features(ours, TEXTS)
    logits = ours.logit_scale.exp() * features @ text_features.t()
    assert (logits - expected).abs().max() < 1e-4
    plain = get_batch(pixels, torch.tensor([0]), "cpu")
    assert (plain - pixel_values).abs().max() > 0.1


def edit_json(path, *keys, value):
    """Set a value within nested objects of a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, keys, value, said",
    [
        ("config.json", ["model_type"], "siglip", "siglip"),
        ("config.json", ["model_type"], "chinese_clip", "chinese_clip"),
        ("config.json", ["text_config", "hidden_act"], "gelu", "different activations"),
        ("config.json", ["text_config", "vocab_size"], 21128, "tokenizer"),
        ("config.json", ["text_config", "eos_token_id"], 1, "tokenizer"),
        ("config.json", ["vision_config", "layer_norm_eps"], 1e-6, "layer_norm_eps"),
        ("config.json", ["vision_config", "image_size"], 128, "other images"),
        ("config.json", ["vision_config"], 5, "damaged"),
        ("preprocessor_config.json", ["resample"], 2, "resample is 2"),
        ("preprocessor_config.json", ["size"], {"height": 64, "width": 64}, "another way"),
        ("preprocessor_config.json", ["size"], 72, "another way"),
        ("preprocessor_config.json", ["image_mean"], "white", "damaged"),
        ("preprocessor_config.json", ["do_normalize"], False, "do_normalize"),
    ],
)
def test_other_models_of_hugging_face_are_refused(file, keys, value, said, tmp_path):
    hugging_face_model().save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    size = 64 if keys == ["vision_config", "image_size"] else None
    edit_json(tmp_path / file, *keys, value=value)
    if size:  # the picture's size agrees: only the weights do not
        edit_json(tmp_path / "preprocessor_config.json", "size", value=value)
        edit_json(tmp_path / "preprocessor_config.json", "crop_size", value=value)
    with pytest.raises(UserError, match=said):
        weights.load_model(str(tmp_path))


def test_a_folder_without_an_image_processor_says_what_is_assumed(tmp_path, capfd):
    hugging_face_model().save_pretrained(tmp_path)
    model = weights.load_model(str(tmp_path))
    assert (model.mean, model.std) == (CLIP_MEAN, CLIP_STD)
    assert "OpenAI's normalisation is assumed" in capfd.readouterr().err


def test_the_hub_out_of_reach_ends_with_one_line(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(UserError, match="hf:openai/clip could not be downloaded .no network."):
        weights.load_model("hf:openai/clip")


# -----------------------------------------------------------------------------
# files of state dicts


def changed(state, prefix="", dtype=torch.float32):
    """A state dict as training programs leave it."""
    return {f"{prefix}{name}": tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", [".pt", ".pth", ".safetensors", ".bin"])
def test_precisions_and_endings(dtype, ending, tmp_path):
    model = models.build("tiny")
    state = changed(model.state_dict(), dtype=dtype)
    path = tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    loaded = weights.load_model(str(path))
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float()), name


@pytest.mark.parametrize("key", [None, *weights.WRAPPERS, "model, state_dict"])
@pytest.mark.parametrize(
    "prefix",
    [*weights.PREFIXES, "module._orig_mod.", "_orig_mod.module.", "model.clip.", "module.model."],
)
@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
def test_wrapped_state_dicts(key, prefix, name, tmp_path):
    model = models.build(name)
    state = changed(model.state_dict(), prefix)
    # What training programs keep beside the weights.
    others = {"epoch": 3, "best": 0.5, "name": "a", "optimizer": {"state": {}, "param_groups": []}}
    for wrapper in reversed((key or "").split(", ")):
        state = {wrapper: state} | others if wrapper else state
    torch.save(state, tmp_path / "a.pt")
    loaded = weights.load_model(str(tmp_path / "a.pt"), activation="quickgelu")
    images = random_images(model)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"logit_bias": torch.zeros(())}, "SigLIP"),
        ({"visual.trunk.stem.weight": torch.zeros(2)}, "timm"),
        ({"text_decoder.weight": torch.zeros(2)}, "CoCa"),
        ({"text.transformer.weight": torch.zeros(2)}, "text tower"),
        ({"vision_model.post_layernorm.bias": torch.zeros(2)}, "config.json"),
        ({"head.weight": torch.zeros(2)}, "it also has head.weight"),
        ({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(128)}, "it also has .*ls_1"),
        ({"visual.ln_pre.weight": None}, "it has no visual.ln_pre.weight"),
        ({"token_embedding.weight": torch.zeros(50000, 128)}, "tokenizer"),
    ],
)
def test_other_state_dicts_are_refused_by_name(change, said, tmp_path):
    state = models.build("tiny").state_dict()
    for name, tensor in change.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt is not the state dict of a CLIP.*{said}"):
        weights.load_model(str(tmp_path / "a.pt"))


def test_what_is_no_model_is_said_in_words_of_its_own(tmp_path):
    state = models.build("tiny").state_dict()
    torch.save({"ema": state, "args": 1}, tmp_path / "ema.pt")
    with pytest.raises(UserError, match="no positional_embedding; it begins with ema, args"):
        weights.load_model(str(tmp_path / "ema.pt"))
    # torch's own message advises to run what is in the file.
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text('{"test/top1": 5}')
    for name in ("whole.pt", "text.pt"):
        with pytest.raises(UserError, match="give a state dict") as caught:
            weights.load_model(str(tmp_path / name))
        assert "weights_only" not in str(caught.value) and "two options" not in str(caught.value)
    # The run of an evaluation, say.
    (tmp_path / "eval").mkdir()
    with pytest.raises(UserError, match="eval holds no model: a run of train.py has a model.pt"):
        weights.load_model(str(tmp_path / "eval"))


def test_a_file_that_says_nothing_is_told_as_what_it_is_taken(tmp_path, capfd):
    path = tmp_path / "a.pt"
    torch.save(models.build("tiny").state_dict(), path)
    assumed = weights.load_model(str(path))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "QuickGELU" in lines[0] and "--activation gelu" in lines[0] and str(path) in lines[0]
    assert assumed.activation == "quickgelu" and "taken as" in assumed.origin

    told = weights.load_model(str(path), activation="gelu")
    assert capfd.readouterr().err == ""
    assert told.activation == "gelu"
    images = random_images(told)
    assert (logits_of(told, images) - logits_of(assumed, images)).abs().max() > 2e-4


@pytest.mark.parametrize("width", [1280, 1408, 1664])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_wide_towers_without_a_config_are_refused(width, activation, tmp_path):
    shape = models.SHAPES["tiny"]._replace(image_width=width, image_layers=1)
    torch.save(models.build_shape(shape).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"width {width}.*open_clip:NAME/"):
        weights.load_model(str(tmp_path / "a.pt"), activation=activation)


def test_other_mlps_without_a_config_are_refused(tmp_path):
    shape = models.SHAPES["tiny"]._replace(image_hidden=500)
    torch.save(models.build_shape(shape).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="open_clip:NAME/"):
        weights.load_model(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    "settings",
    [
        models.OPENAI._replace(activation="gelu"),
        models.OPENAI._replace(image_head_width=32),
        models.OPENAI._replace(text_head_width=32),
        models.OPENAI._replace(mean=HALF),
        models.OPENAI._replace(std=HALF),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
def test_a_saved_model_keeps_its_settings_and_the_stock_package_fails(settings, name, tmp_path):
    model = models.build_shape(models.SHAPES[name], settings=settings)
    if settings.text_head_width == 32:
        shape = models.SHAPES[name]._replace(text_heads=4)
        model = models.build_shape(shape, settings=settings)
    assert_survives_training(model, tmp_path)


def test_damaged_settings_are_refused(tmp_path):
    model = models.build("tiny", "gelu")
    state = weights.state_for_saving(model)
    text = bytes(state[weights.SETTINGS_KEY].tolist())
    damages = (
        text[:-3],
        text.replace(b"gelu", b"silu"),
        text.replace(b"64", b"0"),
        text.replace(b"std", b"dts"),
        b"[]",
        b"\xff",
    )
    for damage in damages:
        state[weights.SETTINGS_KEY] = torch.tensor(list(damage), dtype=torch.uint8)
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(UserError, match="not the state dict of a CLIP"):
            weights.load_model(str(tmp_path / "a.pt"))


def test_a_checkpoint_to_resume_from_is_refused_though_its_weights_are_whole(tmp_path):
    state = models.build("tiny").state_dict()
    checkpoint = {"model": state, "optimizer": {}, "start": "ab", "epoch": 1, "seconds": 2.0}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="give model.pt"):
        weights.load_model(str(tmp_path / "checkpoint.pt"))


def test_contradictions_and_origins(monkeypatch):
    stock = models.build("tiny")
    monkeypatch.setattr(clip, "load", lambda *_, **__: (stock, None))
    assert weights.load_model("ViT-B/32").origin == "OpenAI ViT-B/32"
    with pytest.raises(UserError, match="ViT-B/32 was trained with quickgelu"):
        weights.load_model("ViT-B/32", activation="gelu")
    assert weights.load_model("tiny").origin == "random (tiny)"
    assert weights.load_model("tiny", activation="gelu").activation == "gelu"


# -----------------------------------------------------------------------------
# through the scripts


def test_caches_of_frozen_parts_tell_the_settings_apart(small, tmp_path):
    flowers = open_flowers(small)
    pixels = load_pixels(flowers, 64)
    index = torch.arange(4)
    tokens = models.tokenize(TEXTS)
    state = models.build("tiny").state_dict()
    seen = []
    for settings in (
        models.OPENAI,
        models.OPENAI._replace(activation="gelu"),
        models.OPENAI._replace(image_head_width=32),
        models.OPENAI._replace(mean=HALF, std=HALF),
    ):
        model = weights.from_state_dict(state, settings=settings)
        features = frozen.image_activations(model, flowers, pixels, index)
        assert torch.equal(features, models.image_features(model, pixels, index))
        for other in seen:
            assert (features - other).abs().max() > 1e-4
        seen.append(features)
    gelu = weights.from_state_dict(state, settings=models.OPENAI._replace(activation="gelu"))
    quick = weights.from_state_dict(state)
    texts = [frozen.text_activations(model, flowers, tokens) for model in (quick, gelu)]
    assert (texts[0] - texts[1]).abs().max() > 1e-5


def test_runs_keep_what_they_started_from(small, tmp_path, cli):
    """Training, a chain of it, and WiSE-FT, from a GELU model with a normalisation of its own."""
    config = deepcopy(SMALL)
    folder = tmp_path / "start"
    folder.mkdir()
    preprocessing = {"mean": list(HALF), "std": list(HALF)}
    content = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(open_clip_model(config).state_dict(), folder / "open_clip_model.safetensors")
    expected = models.Settings("gelu", 80, 32, HALF, HALF)

    common = ["--data_root", small, "--runs", tmp_path / "runs", "--wandb", "disabled"]
    training = [*common, "--epochs", 1, "--batch_size", 8, "--lr", 1e-4]
    start, first = folder, tmp_path / "runs" / "first"
    for strategy, source, name in (
        ("full", start, "first"),
        ("lora", first, "second"),
    ):
        options = ["--architecture", source, "--strategy", strategy, "--name", name]
        if strategy != "full":
            options += ["--rank", 2]
        code, _, err = cli("train.py", *training, *options)
        assert code == 0 and "assumed" not in err, err
        model = weights.load_model(str(tmp_path / "runs" / name))
        assert models.settings_of(model) == expected
        assert model.origin == f"{tmp_path / 'runs' / name} (from {source})"

    # At alpha 0 WiSE-FT is the start itself, at 1 the run.
    options = ["--architecture", first, "--wise_ft", 0, "--wise_ft", 1, "--name", "wise"]
    assert cli("baseline_eval.py", *common, *options)[0] == 0
    options = ["--architecture", start, "--name", "alone"]
    assert cli("baseline_eval.py", *common, *options)[0] == 0
    curve = files.read_lines(tmp_path / "runs" / "wise" / "metrics.jsonl", "alpha")
    for row, name in zip(curve, ("alone", "first")):
        metrics = runs.read_metrics(tmp_path / "runs" / name, "test")
        assert row["test/top1"] == metrics["top1"]


def test_activation_on_the_command_line(small, tmp_path, cli):
    torch.manual_seed(0)
    path = tmp_path / "a.pt"
    torch.save(models.build("tiny").state_dict(), path)
    common = ["--data_root", small, "--runs", tmp_path / "runs", "--wandb", "disabled"]
    common += ["--architecture", path]
    training = [*common, "--epochs", 1, "--batch_size", 8]
    code, _, err = cli("train.py", *training, "--activation", "gelu", "--name", "gelu")
    assert code == 0 and "--activation" not in err
    assert weights.load_model(str(tmp_path / "runs" / "gelu")).activation == "gelu"
    start = evaluate.load_starting_weights(str(tmp_path / "runs" / "gelu"))
    assert torch.equal(start["visual.proj"], torch.load(path)["visual.proj"])
    arguments = json.loads((tmp_path / "runs" / "gelu" / "args.json").read_text())
    assert arguments["activation"] == "gelu"

    code, _, err = cli("baseline_eval.py", *common, "--name", "plain")
    assert code == 0 and "note:" in err and "--activation" in err
    outcome = cli("baseline_eval.py", *common, "--activation", "relu")
    assert outcome[0] == 2
    # A run knows its own.
    options = ["--data_root", small, "--runs", tmp_path / "runs", "--wandb", "disabled"]
    options += ["--architecture", tmp_path / "runs" / "gelu", "--activation", "quickgelu"]
    assert "trained with gelu" in error_line(cli("baseline_eval.py", *options))
