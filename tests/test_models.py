"""The architectures against the published counts, and against open_clip and transformers with the same weights."""

import urllib.error
import warnings

import clip
import pytest
import torch
from conftest import error_line

from flowers import UserError, models, weights

COUNTS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}
TEXTS = ["an image of the rose flower", "a photo of a globe thistle, a type of flower."]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return models.build("ViT-B/32")


def test_parameter_counts_of_all_nine():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in models.build(name).parameters()) for name in COUNTS}
    assert counts == COUNTS and set(COUNTS) == set(clip.available_models())


@pytest.mark.parametrize("name", ["tiny", "tiny-rn", "RN50", "ViT-B/32"])
def test_a_state_dict_is_enough_to_build_the_model(name, vit):
    model = vit if name == "ViT-B/32" else models.build(name)
    again = weights.from_state_dict(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    side = model.visual.input_resolution
    assert again.visual.input_resolution == side and not again.training
    with torch.no_grad():
        x = torch.randn(2, 3, side, side)
        assert torch.equal(model.encode_image(x), again.encode_image(x))


def test_cut_text_gives_the_features_of_77_tokens(vit):
    short = models.tokenize(TEXTS)
    assert short.shape[1] < 20
    with torch.no_grad():
        a, b = vit.encode_text(short), vit.encode_text(clip.tokenize(TEXTS))
    assert (a - b).abs().max() < 1e-4


def test_features_equal_those_of_open_clip(vit):
    from open_clip.model import build_model_from_openai_state_dict

    other = (
        build_model_from_openai_state_dict(dict(vit.state_dict()), cast_dtype=torch.float32)
        .float()
        .eval()
    )
    other.load_state_dict(vit.state_dict())  # its builder rounded them to fp16
    images, tokens = torch.randn(3, 3, 224, 224), clip.tokenize(TEXTS)
    with torch.no_grad():
        ours = (
            vit.logit_scale.exp()
            * models.encode_images(vit, images)
            @ models.encode_texts(vit, models.tokenize(TEXTS)).t()
        )
        theirs = (
            other.logit_scale.exp()
            * other.encode_image(images, normalize=True)
            @ other.encode_text(tokens, normalize=True).t()
        )
    assert (ours - theirs).abs().max() < 1e-4


def hugging_face(state):
    """OpenAI's parameter names to those of transformers' CLIPModel, ViT."""
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
    for ours, theirs in (
        ("ln_final", "text_model.final_layer_norm"),
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
    ):
        out |= {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}
    for ours, theirs in (
        ("transformer.resblocks", "text_model.encoder.layers"),
        ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    ):
        for i in range(12):
            for part in ("weight", "bias"):
                q, k, v = state[f"{ours}.{i}.attn.in_proj_{part}"].chunk(3)
                out |= {
                    f"{theirs}.{i}.self_attn.{n}_proj.{part}": x for n, x in zip("qkv", (q, k, v))
                }
                for a, b in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    out[f"{theirs}.{i}.{b}.{part}"] = state[f"{ours}.{i}.{a}.{part}"]
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
    other = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=512)
    ).eval()
    missing, unexpected = other.load_state_dict(hugging_face(vit.state_dict()), strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    images, tokens = torch.randn(3, 3, 224, 224), clip.tokenize(TEXTS)
    with torch.no_grad():
        theirs = other(input_ids=tokens, pixel_values=images).logits_per_image
        ours = (
            vit.logit_scale.exp()
            * models.encode_images(vit, images)
            @ models.encode_texts(vit, models.tokenize(TEXTS)).t()
        )
    assert (ours - theirs).abs().max() < 1e-4


def test_the_stock_package_opens_what_we_save(tmp_path):
    model = models.build("tiny")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, _ = clip.load(str(tmp_path / "model.pt"), device="cpu")
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        assert (
            stock.encode_image(x) - model.encode_image(x)
        ).abs().max() < 1e-2  # clip.load rounds to fp16
    assert torch.equal(
        weights.load_model(str(tmp_path / "model.pt")).encode_image(x), model.encode_image(x)
    )


def test_wrong_models_end_with_one_line(small, tmp_path, cli):
    def evaluate(architecture):
        return error_line(
            cli(
                "baseline_eval.py",
                "--data_root",
                small,
                "--architecture",
                architecture,
                "--runs",
                tmp_path / "runs",
                "--wandb",
                "disabled",
            )
        )

    assert "RN50" in evaluate("resnet50")
    (tmp_path / "text.pt").write_text("no tensors")
    assert "text.pt" in evaluate(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "not the state dict of a CLIP" in evaluate(tmp_path / "other.pt")
    torch.save({"model": {}, "optimizer": {}}, tmp_path / "checkpoint.pt")
    assert "give model.pt" in evaluate(tmp_path / "checkpoint.pt")
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
    assert (
        "ViT-B-32.pt" in str(raised.value)
        and "tiny" in str(raised.value)
        and ".cache/clip" in str(raised.value)
    )
