"""Architectures against the published counts, open_clip and transformers with the same weights."""

import urllib.error
import warnings

import clip
import pytest
import torch
from conftest import COUNTS, error_line

from flowers import UserError, models, weights

# OpenAI's names and those of transformers.
NORMS = [
    ("ln_final", "text_model.final_layer_norm"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
]
BLOCKS = [
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
]
LAYERS = [
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
]
TEXTS = ["an image of the rose flower", "a photo of a globe thistle, a type of flower."]


@pytest.fixture(scope="module")
def vit():
    """ViT-B/32 with random weights; tests do not change it."""
    torch.manual_seed(0)
    return models.build("ViT-B/32")


def test_parameter_counts_of_all_nine():
    with torch.device("meta"):
        nine = {name: models.build(name) for name in COUNTS}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in nine.items()}
    assert counts == COUNTS
    assert set(COUNTS) == set(clip.available_models())


@pytest.mark.parametrize("name", ["tiny", "tiny-16", "tiny-rn", "RN50", "ViT-B/32"])
def test_a_state_dict_is_enough_to_build_the_model(name, vit):
    model = vit if name == "ViT-B/32" else models.build(name)
    again = weights.from_state_dict(model.state_dict())
    for before, after in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(before, after)

    side = model.visual.input_resolution
    assert again.visual.input_resolution == side
    assert not again.training
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), again.encode_image(images))


def test_cut_text_gives_the_features_of_77_tokens(vit):
    short = models.tokenize(TEXTS)
    assert short.shape[1] < 20
    with torch.no_grad():
        features = vit.encode_text(short)
        padded_features = vit.encode_text(clip.tokenize(TEXTS))
    assert (features - padded_features).abs().max() < 1e-4


def logits_of(model, images):
    """Logits of images against TEXTS, (B, 2), by this project's functions."""
    image = models.encode_images(model, images)
    text = models.encode_texts(model, models.tokenize(TEXTS))
    return model.logit_scale.exp() * image @ text.t()


def test_features_equal_those_of_open_clip(vit):
    from open_clip.model import build_model_from_openai_state_dict

    state = dict(vit.state_dict())
    other = build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float().eval()
    other.load_state_dict(vit.state_dict())  # its builder rounded them to fp16
    images = torch.randn(3, 3, 224, 224)
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        ours = logits_of(vit, images)
        image = other.encode_image(images, normalize=True)
        text = other.encode_text(tokens, normalize=True)
        theirs = other.logit_scale.exp() * image @ text.t()
    assert (ours - theirs).abs().max() < 1e-4


def hugging_face(state):
    """A ViT's state dict with the names of transformers' CLIPModel instead of OpenAI's."""
    out = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].t(),
        "visual_projection.weight": state["visual.proj"].t(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    for part in ("weight", "bias"):
        for ours, theirs in NORMS:
            out[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
        for ours, theirs in BLOCKS:
            for i in range(12):
                ours_block, theirs_block = f"{ours}.{i}", f"{theirs}.{i}"
                # OpenAI keeps query, key and value in one matrix.
                qkv = state[f"{ours_block}.attn.in_proj_{part}"].chunk(3)
                for letter, matrix in zip("qkv", qkv):
                    out[f"{theirs_block}.self_attn.{letter}_proj.{part}"] = matrix
                for ours_layer, theirs_layer in LAYERS:
                    value = state[f"{ours_block}.{ours_layer}.{part}"]
                    out[f"{theirs_block}.{theirs_layer}.{part}"] = value
    return out


def test_logits_equal_those_of_transformers(vit):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=49408,
        projection_dim=512,
        hidden_act="quick_gelu",
        eos_token_id=49407,
        bos_token_id=49406,
        pad_token_id=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=32,
        projection_dim=512,
        hidden_act="quick_gelu",
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=512
    )
    other = CLIPModel(config).eval()
    missing, unexpected = other.load_state_dict(hugging_face(vit.state_dict()), strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)

    images = torch.randn(3, 3, 224, 224)
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        theirs = other(input_ids=tokens, pixel_values=images).logits_per_image
        ours = logits_of(vit, images)
    assert (ours - theirs).abs().max() < 1e-4


def test_the_stock_package_opens_what_we_save(tmp_path):
    model = models.build("tiny")
    path = str(tmp_path / "model.pt")
    torch.save(model.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, _ = clip.load(path, device="cpu")
    loaded = weights.load_model(path)

    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.encode_image(images)
        # clip.load rounds to fp16, ours does not.
        assert (stock.encode_image(images) - features).abs().max() < 1e-2
        assert torch.equal(loaded.encode_image(images), features)


def test_wrong_models_end_with_one_line(small, tmp_path, cli):
    def evaluate(architecture):
        arguments = ["--data_root", small, "--architecture", architecture]
        arguments += ["--runs", tmp_path / "runs", "--wandb", "disabled"]
        return error_line(cli("baseline_eval.py", *arguments))

    assert "RN50" in evaluate("resnet50")
    (tmp_path / "text.pt").write_text("no tensors")
    assert "text.pt" in evaluate(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "not the state dict of a CLIP" in evaluate(tmp_path / "other.pt")
    torch.save({"model": {}, "optimizer": {}}, tmp_path / "checkpoint.pt")
    assert "give model.pt" in evaluate(tmp_path / "checkpoint.pt")
    # The end of a zip archive that claims more than there is.
    (tmp_path / "zip.pt").write_bytes(b"PK\x05\x06" + 18 * b"\xff")
    assert "zip.pt" in evaluate(tmp_path / "zip.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "list" in evaluate(tmp_path / "list.pt")
    assert not (tmp_path / "runs").exists()


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError) as raised:
        weights.load_model("ViT-B/32")
    message = str(raised.value)
    assert "ViT-B-32.pt" in message
    assert "tiny" in message
    assert ".cache/clip" in message
