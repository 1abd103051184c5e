"""The Qwen-VL models: the released ones through transformers' Auto classes, or random weights without a download; adapters; memory."""

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from flowers import UserError, reason

try:
    import peft
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache  # noqa: F401  (for qwen.py)
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: F401
except ImportError as missing:
    print(f"error: {missing}: Qwen needs pip install -r requirements-qwen.txt", file=sys.stderr)
    sys.exit(2)

QUESTIONS = {
    "brief": "What kind of flower is this? Answer with its name only.",
    "described": "Describe this flower in one line, then give its name alone on a second line.",
}
DESCRIBE = "Describe the flower's colours, petals and centre in one sentence, without naming it."
DEFAULT = "Qwen/Qwen2-VL-2B-Instruct"
END, IMAGE = "<|im_end|>", "<|image_pad|>"
warnings.filterwarnings(
    "ignore", "`(is_)?gradient_checkpointing", FutureWarning
)  # peft still calls transformers' former names
# the linear layers of the language model: every block's attention and MLP, none of the vision tower
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# Random weights. tiny: its vision tower has the size of CLIP's `tiny`. random-2b: the shape of Qwen/Qwen2-VL-2B-Instruct, to measure with.
# text: width, MLP, layers, heads, key-value heads, vocabulary; vision: width, layers, heads, MLP ratio, patch; fewest and most pixels
SHAPES = {
    "tiny": ((128, 256, 2, 4, 2, None), (128, 4, 4, 4, 8), (64 * 64, 64 * 64)),
    "random-2b": ((1536, 8960, 28, 12, 2, 151936), (1280, 32, 16, 4, 14), (56 * 56, 512 * 512)),
}
# the chat format of the released models: a system turn, then the turns, images as one placeholder between two marks
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}{% for turn in messages %}"
    "<|im_start|>{{ turn.role }}\n{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "peft": peft.__version__}


def build_processor(pixels: tuple[int, int], patch: int):
    """A Qwen2-VL processor made here: a byte-level BPE of the flower names, the released special tokens and chat format."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    names = json.loads(Path(__file__).with_name("cat_to_name.json").read_text())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [
        *names.values(),
        *QUESTIONS.values(),
        DESCRIBE,
        "You are a helpful assistant.",
        "system\n",
        "user\n",
        "assistant\n",
    ]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=700,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learned["merges"]]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=learned["vocab"], merges=merges, eos_token=END, pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                "<|endoftext|>",
                "<|im_start|>",
                END,
                "<|vision_start|>",
                "<|vision_end|>",
                "<|vision_pad|>",
                IMAGE,
                "<|video_pad|>",
            ]
        }
    )
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, min_pixels=pixels[0], max_pixels=pixels[1]
    )
    video = transformers.Qwen2VLVideoProcessor(patch_size=patch)
    return transformers.Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=video, chat_template=TEMPLATE
    )


def build(name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """A model of SHAPES and its processor, without any download; the weights are random but the same each time."""
    (
        (width, mlp, layers, heads, kv_heads, vocabulary),
        (v_width, v_layers, v_heads, v_ratio, patch),
        pixels,
    ) = SHAPES[name]
    processor = build_processor(pixels, patch)
    ids = {
        t: processor.tokenizer.convert_tokens_to_ids(t)
        for t in (
            "<|endoftext|>",
            END,
            IMAGE,
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
        )
    }
    half = (
        width // heads // 2
    )  # rotary frequencies of a head, shared out to time, height and width 1 : 1.5 : 1.5 as in the released models
    side = half * 3 // 8
    text = {
        "vocab_size": vocabulary or len(processor.tokenizer),
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids[END],
        "pad_token_id": ids["<|endoftext|>"],
        "initializer_range": 0.02
        if vocabulary
        else 0.1,  # tied to the logits: 0.02 would leave tiny's flat
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half - 2 * side, side, side],
        },
    }
    vision = {
        "depth": v_layers,
        "embed_dim": v_width,
        "num_heads": v_heads,
        "hidden_size": width,
        "mlp_ratio": v_ratio,
        "patch_size": patch,
    }
    config = AutoConfig.for_model(
        "qwen2_vl",
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        ids[END],
        ids["<|endoftext|>"],
    )
    return model.eval(), processor


def configuration(name: str):
    """The shape of a model before its weights are there. Raises UserError if it can't be had."""
    if name in SHAPES:
        return build(name, device="meta")[0].config
    return _from_hub(AutoConfig, name)


def load(
    name: str,
    device: torch.device | str,
    adapter: str | Path | None = None,
    max_pixels: int | None = None,
):
    """A model in eval mode (bf16 on CUDA, fp32 on a CPU) and its processor: one of SHAPES, a name on the hub, or a folder; adapter: a run or
    its adapter/ folder. Larger images are scaled down to max_pixels. Raises UserError for what can't be loaded."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if name in SHAPES:
        model, processor = build(name, dtype, device)
    else:
        processor = _from_hub(AutoProcessor, name)
        model = (
            _from_hub(AutoModelForImageTextToText, name, dtype=dtype, attn_implementation="sdpa")
            .eval()
            .to(device)
        )
    processor.tokenizer.padding_side = "left"
    if max_pixels and name != "tiny":
        size = dict(processor.image_processor.size)
        processor.image_processor.size = {
            "shortest_edge": min(size["shortest_edge"], max_pixels),
            "longest_edge": max_pixels,
        }
    if adapter:
        folder = (
            Path(adapter) / "adapter" if (Path(adapter) / "adapter").is_dir() else Path(adapter)
        )
        if not (folder / "adapter_config.json").is_file():
            raise UserError(f"no adapter in {adapter}: give a finished run of qwen_train.py")
        try:
            model = peft.PeftModel.from_pretrained(model, folder).eval()
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{folder} does not fit {name}: {reason(error)}") from None
    return model, processor


def _from_hub(kind, name: str, **options):
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} can't be loaded ({reason(error)}): it needs the network once, or a folder with its files; "
            "--model tiny needs neither"
        ) from None


def base(model):
    """The Qwen model itself, with an adapter's layers in place."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def add_adapter(
    model, rank: int, alpha: float, also_train: Sequence[str] = (), recompute: bool = False
):
    """LoRA on the language model (Hu et al. 2022), the modules of `also_train` whole, all else frozen; what is trained is kept in fp32.
    recompute: blocks are computed again in the backward pass rather than kept. Raises UserError if there is no such module."""
    last = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    unknown = [name for name in also_train if name not in last]
    if unknown:
        raise UserError(f"--also_train {unknown[0]}: the model has no module of that name")
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=LORA_TARGETS,
            modules_to_save=list(also_train) or None,
        ),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if recompute:
        enable = (
            getattr(base(model), "activation_checkpointing_enable", None)
            or base(model).gradient_checkpointing_enable
        )  # the name up to 5.22
        enable({"use_reentrant": False})
    return model


def identity(model) -> str:
    """A digest of the vision tower's weights: what image features depend on besides the images."""
    digest = hashlib.sha256()
    for parameter in base(model).model.visual.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def memory(
    config, batch_size: int, image_tokens: int, text_tokens: int, rank: int = 0
) -> dict[str, float]:
    """Estimated gigabytes (1e9 bytes) on a GPU in bf16. rank: that of LoRA, for training with checkpointed blocks; 0 for ranking.

    weights: 2 bytes a parameter; adapter: 16 bytes a parameter (weight, gradient, two moments of Adam, all fp32); activations: for ranking keys and
    values and one block's, for training each block's input and one block recomputed; the logits of at most 32 answer tokens, fp32 and their gradient.
    """
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    weights = 2 * sum(p.numel() for p in model.parameters())
    width, mlp, layers, places = (
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        batch_size * (image_tokens + text_tokens),
    )
    linear = [
        m
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "language_model.layers" in n
    ]
    block = places * (8 * width + 4 * mlp) * 2
    head = text.hidden_size // text.num_attention_heads
    kept = (
        layers * places * width * 2
        if rank
        else layers * places * 2 * text.num_key_value_heads * head * 2
    )
    logits = batch_size * 32 * text.vocab_size * (8 if rank else 4)
    adapter = 16 * rank * sum(m.in_features + m.out_features for m in linear)
    parts = {
        "weights": weights,
        "adapter": adapter,
        "activations": kept + block * (3 if rank else 1),
        "logits": logits,
    }
    return {**{k: v / 1e9 for k, v in parts.items()}, "total": sum(parts.values()) / 1e9}


def memory_line(
    name: str, batch_size: int, max_pixels: int, text_tokens: int, rank: int = 0
) -> str:
    """What to expect, before the weights are there."""
    config = configuration(name)
    vision = config.vision_config
    pixels = SHAPES[name][2][1] if name == "tiny" else max_pixels
    parts = memory(
        config,
        batch_size,
        pixels // (vision.patch_size * vision.spatial_merge_size) ** 2,
        text_tokens,
        rank,
    )
    total = parts.pop("total")
    line = (
        f"{name}: about {total:.3g} GB for {batch_size} images at a time in bf16 ("
        + ", ".join(f"{k} {v:.2g}" for k, v in parts.items() if v)
        + ")"
    )
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] / 1e9
        line += f"; {free:.1f} GB are free on the GPU" + (
            ": too few, lower the batch or --max_pixels" if free < total else ""
        )
    return line
