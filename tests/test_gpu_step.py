"""A training step as a GPU sees it, without a GPU: what it would have to wait for.

The step runs on torch's meta device, whose tensors have a shape and no values: to read one fails,
as `.item()`, `.tolist()`, `bool()`, `torch.unique`, `nonzero` and an index of booleans do. A copy
from the CPU, and an index that lies there, a GPU would wait for without a word: those are counted.
"""

import json
from types import SimpleNamespace

import numpy as np
import pretended_gpu
import pytest
import torch
from conftest import error_line
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from flowers import devices, frozen, losses, models, training
from flowers.choices import STRATEGIES, context_template, cut_points

META = torch.device("meta")
CPU = torch.device("cpu")
N_CLASSES = 6
BATCH = 8


class Waits(TorchDispatchMode):
    """Counts what a GPU (here meta) is waited for, by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        out = function(*args, **kwargs)
        on_device = [t for t in (*tensors, *tree_leaves(out)) if getattr(t, "is_meta", False)]
        elsewhere = [t for t in tensors if t.device == CPU]
        # A number of the CPU travels with the kernel, if it has no dimension.
        mixes = any(t.dim() for t in elsewhere) and on_device
        is_sent = kwargs.get("non_blocking", False)
        if mixes and not is_sent:
            self.found.append(function.overloadpacket.__name__)
        return out


@pytest.fixture
def pinned(monkeypatch):
    """devices.send as it is on a GPU, but for the pinning, which needs a driver."""
    monkeypatch.setattr(
        devices, "send", lambda tensor, device: tensor.to(device, non_blocking=True)
    )


def a_step(strategy="full", architecture="tiny", device=META, **options):
    """Batches, and one step of a run on random images: next_batch(), step(batch), the objective."""
    defaults = {"blocks": 1, "rank": 2, "context_tokens": 4, "augment": "crop", "seed": 0}
    defaults |= {"loss": "info_nce", "logit_bias": -10.0, "temperature": 0.05, "compile": False}
    defaults |= {"learn_temperature": True, "chunk_size": 0, "pull": 0.0, "captions": None}
    defaults |= {"no_cache": False, "positives": "class", "records_steps": False}
    config = SimpleNamespace(strategy=strategy, **defaults | options)
    torch.manual_seed(0)
    model = models.build(architecture)
    train.prepare_model(model, config)
    names = [f"flower {i}" for i in range(N_CLASSES)]
    labels = torch.arange(3 * BATCH) % N_CLASSES
    flowers = SimpleNamespace(labels=labels.numpy(), class_names=names)
    templates = ["{} flower", "a {}"]
    if strategy == "prompt":
        templates = [context_template(4)]
    texts = train.make_texts(flowers, None, templates, None, 77)
    side = model.visual.input_resolution
    pixels = torch.randint(0, 256, (len(labels), 3, side, side), dtype=torch.uint8)

    # What frozen.py would read from the cache.
    image_cut, text_blocks = cut_points(strategy, config.blocks)
    views = text_activations = None
    if image_cut is not None and not config.no_cache:
        trunk, _ = models.split_image_tower(model, image_cut)
        views = [trunk(pixels.float() / 255)]
    if text_blocks is not None and not config.no_cache:
        trunk, _ = models.split_text_tower(model, text_blocks)
        text_activations = trunk(texts.tokens).to(device)

    model = models.to_device(model, device)
    processes = devices.Processes(0, 1, device)
    index = torch.arange(len(labels))
    data = train.TrainingData(flowers, index, texts, pixels, views, model, config)
    encoders = train.make_encoders(model, views, texts, text_activations, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    objective = train.make_objective(model, encoders, trained, processes, config)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    average = training.copies(trained)
    batches = data.batches(0, BATCH, processes)

    def step():
        batch = next(batches)
        numbers = train.training_step(objective, batch, optimizer, scaler, processes)
        training.update_average(average, trained, 0.9, 0)
        return numbers | train.loss_parameters(model)

    return step


STEPS = [{"strategy": name} for name in STRATEGIES if name != "linear"]
STEPS += [{"loss": name} for name in ("cross_entropy", "sigmoid")]
STEPS += [{"architecture": "tiny-rn", "strategy": name} for name in ("full", "last_blocks")]
STEPS += [
    {"chunk_size": 3},
    {"pull": 0.1},
    {"positives": "pair", "augment": "flip"},
    {"strategy": "last_blocks", "no_cache": True},
]


@pytest.mark.parametrize("options", STEPS, ids=str)
def test_a_step_waits_for_nothing(options, pinned):
    step = a_step(**options)
    step()  # the first may make what stays
    waits = Waits()
    with waits:
        numbers = step()
    assert waits.found == []
    assert all(number.device == META for number in numbers.values())


def test_a_wait_is_counted():
    """So that an empty list says something."""
    weights, index = torch.zeros(4, 3, device=META), torch.tensor([0, 2])
    waits = Waits()
    with waits:
        index.to(META)
        weights[index]
        weights.copy_(torch.ones(4, 3))
        weights * torch.tensor(2.0)  # a number needs no copy
        index.to(META, non_blocking=True)
    assert waits.found == ["_to_copy", "index", "copy_"]
    with pytest.raises(RuntimeError):
        weights.sum().item()


class Reads(TorchDispatchMode):
    """Counts the numbers that are read."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ == "_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def test_no_number_is_read_in_a_step_of_fp16():
    """The scale of the loss stays where it is, and the fused AdamW skips a step by itself."""
    model = torch.nn.Linear(4, 4)
    trained = dict(model.named_parameters())
    x = torch.randn(8, 4)
    objective = train.Objective(trained, (model, lambda rows: rows), lambda a, b, _: a.sum())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    batch = train.Batch(x, torch.zeros(1), torch.zeros(1), None)
    alone = devices.Processes(0, 1, CPU)
    expected = model(x).sum().item()
    reads = Reads()
    with reads:
        numbers = train.training_step(objective, batch, optimizer, scaler, alone)
    assert reads.count == 0
    assert numbers["loss"].item() == expected, "not multiplied by the scale"
    # A step without finite gradients leaves the weights, and the loss is that of before it.
    before = {name: p.detach().clone() for name, p in trained.items()}
    batch = train.Batch(torch.full_like(x, 1e38), *[torch.zeros(1)] * 2, None)
    with reads:
        train.training_step(objective, batch, optimizer, scaler, alone)
    assert reads.count == 0
    assert all(torch.equal(before[name], p) for name, p in trained.items())
    assert scaler.get_scale() == 32768


# -----------------------------------------------------------------------------
# recorded steps


@pytest.fixture
def graphs(monkeypatch):
    """The CUDA graphs of a pretended GPU, for tensors of the CPU; a list of those that are made."""
    made = []

    class Counted(pretended_gpu.Graph):
        def __init__(self):
            super().__init__()
            made.append(self)

    for name in ("graph", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, pretended_gpu.ANSWERS[name])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    return made


RECORDED = [{"strategy": name} for name in STRATEGIES if name != "linear"]
RECORDED += [{"loss": name} for name in ("cross_entropy", "sigmoid")]
RECORDED += [{"architecture": "tiny-rn"}, {"pull": 0.1}, {"positives": "pair"}]
RECORDED += [{"strategy": "last_blocks", "no_cache": True}]


@pytest.mark.parametrize("options", RECORDED, ids=str)
def test_recorded_steps_are_the_plain_ones(options, graphs):
    """Each step has other images, and another number of distinct texts."""
    plain, recorded = (a_step(device=CPU, records_steps=choice, **options) for choice in (0, 1))
    for _ in range(3):
        expected, numbers = plain(), recorded()
        assert expected.keys() == numbers.keys()
        for name, number in expected.items():
            torch.testing.assert_close(numbers[name], number, rtol=2e-5, atol=2e-6)
    assert len(graphs) == 1, "recorded once"


def test_a_recorded_step_has_as_many_texts_as_a_batch_can_have():
    """Of images of two classes, with prompts of one and of three texts."""
    texts = train.Texts(torch.zeros(4, 5), torch.tensor([0, 1] * 4), torch.tensor([1, 3] * 4))
    flowers = SimpleNamespace(labels=np.arange(8) % 2)
    config = SimpleNamespace(records_steps=True, loss="info_nce", positives="pair", seed=0)
    views = [torch.zeros(8, 2)]
    alone = devices.Processes(0, 1, CPU)
    for batch_size, n_rows in ((2, 2), (8, 4)):
        data = train.TrainingData(flowers, torch.arange(8), texts, None, views, None, config)
        for batch in data.batches(0, batch_size, alone):
            assert len(batch.text_rows) == n_rows
            n_used = len(batch.text_of_image.unique())
            assert int(batch.text_of_image.max()) == n_used - 1, "the rows of images come first"


def test_a_recording_refuses_another_shape(graphs):
    weight = torch.nn.Parameter(torch.ones(2))
    recorded = training.RecordedGradients([weight])

    def work(x):
        (weight * x).sum().backward()
        return {"loss": x.sum()}

    recorded(work, [torch.ones(2)])
    recorded(work, [torch.tensor([3.0, 4.0])])
    assert weight.grad.tolist() == [3, 4]
    with pytest.raises(ValueError, match="recording"):
        recorded(work, [torch.ones(1)])


def test_what_is_waited_for_is_not_recorded(graphs):
    weight = torch.nn.Parameter(torch.ones(2))

    def work(x):
        (weight * x.sum().item()).sum().backward()
        return {"loss": x.sum()}

    with pytest.raises(RuntimeError, match="capturing"):
        training.RecordedGradients([weight])(work, [torch.ones(2)])


# -----------------------------------------------------------------------------
# numbers that are read late


@pytest.mark.parametrize("delay", [0, 2])
def test_late_numbers_are_those_of_their_step(delay, monkeypatch):
    monkeypatch.setitem(training.LATE_STEPS, "cpu", delay)
    late = training.LateNumbers("cpu")
    number, other = torch.tensor(0.0), torch.tensor(5.0, requires_grad=True)
    came = []
    for step in range(4):
        number.fill_(step)
        late.put(step, {"a": number, "b": other})
        came.append([label for label, _ in late.take()])
    number.fill_(9)
    rest = list(late.take(everything=True))
    if delay == 0:
        assert came == [[0], [1], [2], [3]] and rest == []
    else:
        assert came == [[], [], [0], [1]]
        assert rest == [(2, {"a": 2.0, "b": 5.0}), (3, {"a": 3.0, "b": 5.0})]


class Scalars:
    """Numbers on a pretended GPU, which write down how they are copied."""

    is_cuda = True

    def __init__(self, numbers, events):
        self.numbers, self.events = torch.tensor(numbers), events

    def to(self, *args, **kwargs):
        self.events.append(("copy", args, kwargs))
        return self.numbers


def test_a_log_on_a_gpu_copies_without_waiting_and_reads_two_steps_later(monkeypatch):
    events = []
    arrival = SimpleNamespace(
        record=lambda: events.append("record"), synchronize=lambda: events.append("wait")
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: arrival)
    monkeypatch.setattr(
        torch, "stack", lambda numbers: Scalars([n.item() for n in numbers], events)
    )
    late = training.LateNumbers("cuda:0")
    came = []
    for step in range(3):
        late.put(step, {"loss": torch.tensor(float(step))})
        came.append(list(late.take()))
    copied = [("copy", ("cpu",), {"non_blocking": True}), "record"]
    assert events == 3 * copied + ["wait"], "for the oldest, after two more steps were given"
    assert came == [[], [], [(0, {"loss": 0.0})]]
    assert [step for step, _ in late.take(everything=True)] == [1, 2]


def run_train(cli, small, folder, name, *options):
    place = ("--data_root", small, "--runs", folder, "--name", name, "--wandb", "disabled")
    return cli("train.py", *place, "--architecture", "tiny", "--batch_size", 4, *options)


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [list(json.loads(line).items()) for line in lines]


def test_a_late_log_is_that_of_reading_at_once(small, tmp_path, cli, monkeypatch):
    options = ("--epochs", 2, "--holdout", "--eval_every", 1, "--pull", 0.1, "--learn_temperature")
    for name, delay in (("once", 0), ("late", 2)):
        monkeypatch.setitem(training.LATE_STEPS, "cpu", delay)
        code, _, err = run_train(cli, small, tmp_path, name, *options)
        assert code == 0, err
    logs = [rows(tmp_path / name) for name in ("once", "late")]
    assert len(logs[0]) == 2 * 6 + 2
    for once, late in zip(*logs, strict=True):
        for (key, value), (other_key, other_value) in zip(once, late, strict=True):
            assert key == other_key
            assert value == other_value or key == "train/images_per_s"
    for epoch in (1, 2):
        # The seconds of the epoch so far, which the last steps, read at once, don't turn back.
        steps = [row for row in map(dict, logs[1]) if row["epoch"] == epoch and "train/loss" in row]
        passed = [4 * n / row["train/images_per_s"] for n, row in enumerate(steps, start=1)]
        assert passed == sorted(passed)
    once, late = (torch.load(tmp_path / name / "model.pt") for name in ("once", "late"))
    assert all(torch.equal(once[name], late[name]) for name in once)


@pytest.mark.parametrize(("broken", "bad_step"), [("loss", 12), ("weights", 17)])
def test_what_is_no_number_is_found_late_and_named_by_its_step(
    broken, bad_step, small, tmp_path, cli, monkeypatch
):
    """In the second epoch, of steps 9 ... 17: the checkpoint of the first is left, and no other."""
    loss_of, update = losses.info_nce, training.update
    loss_steps, update_steps = iter(range(18)), iter(range(18))

    def broken_loss(*arguments):
        is_bad = next(loss_steps) == bad_step and broken == "loss"
        return loss_of(*arguments) * (float("nan") if is_bad else 1)

    def broken_update(optimizer, parameters, scaler):
        update(optimizer, parameters, scaler)
        if next(update_steps) == bad_step and broken == "weights":
            parameters[0].detach().fill_(float("nan"))

    monkeypatch.setitem(training.LATE_STEPS, "cpu", 2)
    monkeypatch.setattr(losses, "info_nce", broken_loss)
    monkeypatch.setattr(training, "update", broken_update)
    outcome = run_train(cli, small, tmp_path, "bad", "--epochs", 2)
    assert f"at step {bad_step}, or a weight" in error_line(outcome)
    checkpoint = torch.load(tmp_path / "bad" / "checkpoint.pt")
    assert checkpoint["epoch"] == 1
    assert all(p.isfinite().all() for p in checkpoint["model"].values())
    assert not (tmp_path / "bad" / "model.pt").exists()
    assert len(rows(tmp_path / "bad")) == 9


# -----------------------------------------------------------------------------
# how a GPU is given its work


def test_a_tensor_goes_to_a_gpu_through_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: calls.append((*a, k)) or self)
    tensor = torch.zeros(3)
    devices.send(tensor, "cuda:0")
    assert calls == ["pinned", (torch.device("cuda", 0), {"non_blocking": True})]
    calls.clear()
    devices.send(tensor, CPU)
    assert calls == [(CPU, {})]


def test_a_resnet_with_its_channels_last_is_the_same_model(monkeypatch):
    torch.manual_seed(0)
    model = models.build("tiny-rn")
    images = torch.randn(2, 3, model.visual.input_resolution, model.visual.input_resolution)
    expected = models.encode_images(model, images)
    fingerprint = frozen.fingerprint(model.state_dict())

    # A device that says CUDA, and keeps the tensors where they are.
    monkeypatch.setattr(torch.nn.Module, "to", to_pretended_gpu(torch.nn.Module.to))
    monkeypatch.setattr(torch.Tensor, "to", to_pretended_gpu(torch.Tensor.to))
    model = models.to_device(model, torch.device("cuda", 0))
    monkeypatch.undo()
    kernel = model.visual.layer1[0].conv2.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert frozen.fingerprint(model.state_dict()) == fingerprint
    assert models.encode_images(model, images).allclose(expected, atol=1e-5)


@pytest.mark.parametrize("written_by", ["gpu", "cpu"])
def test_a_resnet_goes_on_with_the_moments_of_another_layout(written_by, tmp_path):
    """A checkpoint of a GPU on a CPU and the other way round: one step is that of its own place."""
    layouts = {"gpu": torch.channels_last, "cpu": torch.contiguous_format}
    (resumed_by,) = layouts.keys() - {written_by}

    def start(layout):
        torch.manual_seed(0)
        model = models.build("tiny-rn")
        model.visual.to(memory_format=layout)
        parameters = dict(model.named_parameters())
        groups = training.parameter_groups(parameters, 0.01, 0.1)
        return parameters, torch.optim.AdamW(groups, lr=0.01, fused=True)

    def step(parameters, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in parameters.values():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()

    expected, optimizer = start(layouts[written_by])
    step(expected, optimizer, 1)
    training.save_checkpoint(tmp_path / "checkpoint.pt", expected, optimizer)
    step(expected, optimizer, 2)
    resumed, optimizer = start(layouts[resumed_by])
    training.load_checkpoint(tmp_path / "checkpoint.pt", resumed, optimizer)
    for p, state in optimizer.state.items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == p.stride()
    step(resumed, optimizer, 2)
    for name, p in resumed.items():
        assert torch.allclose(p, expected[name], atol=1e-7), name


def to_pretended_gpu(to):
    def stay(self, *args, **kwargs):
        device = args and isinstance(args[0], torch.device) and args[0].type == "cuda"
        return self if device else to(self, *args, **kwargs)

    return stay


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {}),
        ("eager", {"strategy": "lora"}),
        ("eager", {"strategy": "prompt"}),
        ("eager", {"strategy": "last_blocks", "no_cache": True}),
    ],
    ids=str,
)
def test_a_compiled_step_is_the_plain_one(backend, options, monkeypatch):
    """Each tower is one graph, also where the number of distinct texts changes."""
    shape = models.SHAPES["tiny"]._replace(image_layers=2)
    monkeypatch.setitem(models.SHAPES, "tiny", shape)  # half as long to trace
    compiler = CompileCounterWithBackend(backend)
    plain_compile = torch.compile

    def compile_whole(function):
        return plain_compile(function, backend=compiler, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_whole)
    torch._dynamo.reset()
    plain, compiled = (a_step(device=CPU, compile=choice, **options) for choice in (False, True))
    for _ in range(3):
        expected, numbers = plain(), compiled()
        assert numbers["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    torch._dynamo.reset()
    # The texts' once more for any number of them. A frozen tower has nothing to compile.
    at_least = 1 if options.get("strategy") == "prompt" else 2
    assert at_least <= compiler.frame_count <= 3
