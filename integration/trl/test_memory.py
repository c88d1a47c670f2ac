"""What saves memory or time in training changes nothing: losses and tensors are those of the straight road."""

import pytest
import torch
from by_hand import make_llama
from torch.autograd.graph import save_on_cpu
from trainers import assert_equal_tensors, losses, make_trainer, reft, trained_tensors
from transformers import TrainerCallback
from transformers.utils import is_liger_kernel_available
from trl.models import enable_selective_activation_checkpointing

needs_accelerator = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is None, reason="TRL's offloading needs an accelerator to offload from"
)
needs_liger = pytest.mark.skipif(
    not (is_liger_kernel_available() and torch.cuda.is_available()),
    reason="Liger's kernels are Triton's: they need liger-kernel and a GPU",
)


class SomeLayers(TrainerCallback):
    """Leaves the checkpointing of the middle layer alone switched on."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        for layer in (0, 2):
            model.get_base_model().model.layers[layer].gradient_checkpointing = False


def train(folder, data, tokenizer, callbacks=(), context=None, selective=False, layers=3, **options):
    """Three steps of SGD: losses, tensors, and how often the MLP of each layer ran."""
    options = dict(max_steps=3, optim="sgd", learning_rate=0.5, gradient_checkpointing=False) | options
    config = reft(init_weights=False)
    trainer_options = dict(callbacks=list(callbacks))
    trainer = make_trainer(make_llama(layers), folder, data, tokenizer, None, config, trainer_options, **options)
    blocks = trainer.model.get_base_model().model.layers
    if context is not None:
        trainer.maybe_activation_offload_context = context
    if selective:
        # What gradient_checkpointing_kwargs={"selective": True} does to a model without an adapter. With one, of any
        # PEFT method, TRL 1.16 replaces a method that transformers 5.23 no longer calls.
        enable_selective_activation_checkpointing(trainer.model.get_base_model())
    calls = [0] * layers
    if not options.get("torch_compile"):
        for number, layer in enumerate(blocks):
            layer.mlp.register_forward_pre_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    before = trained_tensors(trainer.model)
    trainer.train()
    tensors = trained_tensors(trainer.model)
    unchanged = {name for name, tensor in tensors.items() if torch.equal(before[name], tensor)}
    assert all(
        f"layers.{layers - 1}._reft._reft_prefix" in name for name in unchanged
    )  # after which no attention reads it
    assert not selective or "context_fn" in blocks[0]._gradient_checkpointing_func.function.keywords
    return losses(trainer), tensors, calls


DATA = {
    "chats": ("chats", dict(assistant_only_loss=True)),
    "packing": ("pairs", dict(packing=True, max_length=40, per_device_train_batch_size=1)),
}
CHECKPOINTING = dict(gradient_checkpointing=True)
REENTRANT = CHECKPOINTING | dict(gradient_checkpointing_kwargs={"use_reentrant": True})
ROADS = {
    "checkpointing": (CHECKPOINTING, [6, 6, 6]),
    "checkpointing, reentrant": (REENTRANT, [6, 6, 6]),
    "checkpointing, not reentrant": (
        CHECKPOINTING | dict(gradient_checkpointing_kwargs={"use_reentrant": False}),
        [6, 6, 6],
    ),
    "checkpointing, selective": (CHECKPOINTING | dict(selective=True), [6, 6, 6]),
    "checkpointing of one layer": (CHECKPOINTING | dict(callbacks=[SomeLayers()]), [3, 6, 3]),
    "checkpointing of one layer, reentrant": (REENTRANT | dict(callbacks=[SomeLayers()]), [3, 6, 3]),
    "offloading": (dict(context=save_on_cpu()), [3, 3, 3]),
    "offloading, checkpointing": (CHECKPOINTING | dict(context=save_on_cpu()), [6, 6, 6]),
    "offloading, reentrant": (REENTRANT | dict(context=save_on_cpu()), [6, 6, 6]),
    "accumulation": (dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), [6, 6, 6]),
    "accumulation, checkpointing": (
        CHECKPOINTING | dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
        [24, 24, 24],
    ),
}


@pytest.fixture(scope="module")
def straight(request, tmp_path_factory, tokenizer):
    """Gives the straight road's outcome for each kind of data, found once."""
    found = {}

    def get(kind):
        if kind not in found:
            name, options = DATA[kind]
            data = request.getfixturevalue(name)
            found[kind] = train(tmp_path_factory.mktemp("straight"), data, tokenizer, **options)
        return found[kind]

    return get


def assert_same_road(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_equal_tensors(found[1], expected[1])


@pytest.mark.parametrize(
    ("road", "kind"),
    [(road, "chats") for road in ROADS]
    + [(road, "packing") for road in ("checkpointing", "checkpointing, reentrant", "offloading, reentrant")],
)
def test_same_as_the_straight_road(request, tmp_path, tokenizer, straight, road, kind):
    options, calls = ROADS[road]
    expected = straight(kind)
    assert expected[2] == [3, 3, 3]
    name, data_options = DATA[kind]
    found = train(tmp_path, request.getfixturevalue(name), tokenizer, **data_options | options)
    assert found[2] == calls
    assert_same_road(found, expected)


@needs_accelerator
def test_activation_offloading(tmp_path, tokenizer, pairs):
    expected = train(tmp_path, pairs, tokenizer, use_cpu=False)
    found = train(tmp_path, pairs, tokenizer, use_cpu=False, activation_offloading=True, gradient_checkpointing=True)
    assert_same_road(found, expected)


@needs_liger
def test_liger_kernel(tmp_path, tokenizer, pairs):
    expected = train(tmp_path, pairs, tokenizer, use_cpu=False)
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        found = train(tmp_path, pairs, tokenizer, use_cpu=False, use_liger_kernel=True)
    assert_same_road(found, expected)


@pytest.mark.slow
def test_compiled(tmp_path, tokenizer, pairs):
    """Rows of one length, so that it is compiled once."""
    torch.compiler.reset()
    options = dict(layers=2, max_steps=2, pad_to_multiple_of=32)
    expected = train(tmp_path, pairs, tokenizer, **options)
    options |= dict(torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_road(train(tmp_path, pairs, tokenizer, **options), expected)
