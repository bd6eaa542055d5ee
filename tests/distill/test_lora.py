import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imf_kernels import Batch, IntMeanFlow, Teacher, sampler
from imf_kernels.distill.lora import TARGETS, adapters, add_lora, merge_lora
from imf_kernels.models import (
    CausalUNet,
    CausalUNetConfig,
    TimeEmbedMixer,
    load_student,
    save_student,
)
from imf_kernels.models.linears import FusedLinears
from tests.hosts.cosyvoice_host import small
from tests.models.tools import conditions, small_model

pytest.importorskip("peft")


def teachers():
    return {"f5_v1": small_model("f5_v1"), "cosyvoice2": small("unet")}


@pytest.fixture(params=["f5_v1", "cosyvoice2"])
def teacher(request):
    return teachers()[request.param]


def evaluated(model, given, grad):
    torch.manual_seed(0)
    x = torch.randn_like(given["prompt"])
    t, r = torch.tensor([0.1, 0.3]), torch.tensor([0.8, 0.4])
    with torch.set_grad_enabled(grad):
        return model(x, t, r, model.prepare(**given)).detach()


def trained(teacher, updates=3, fuse=True, **options):
    """An adapted student, every adapter and the mixer moved by a few real updates."""
    given = conditions(teacher, [20, 13])
    lengths = given.pop("lengths")
    batch = Batch(torch.randn_like(given["prompt"]), lengths, given)
    student = teacher.student()
    if fuse:
        student.fuse_weights()
    add_lora(student, 4, **options)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    objective = IntMeanFlow(Teacher(teacher, 2.0), nfe=2)
    for _ in range(updates):
        loss, _ = objective(student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def test_a_new_adapter_changes_nothing_and_only_adapters_and_mixer_train(teacher):
    student = add_lora(teacher.student(), 4)
    given = conditions(teacher, [20, 13])
    for grad in (True, False):
        torch.testing.assert_close(
            evaluated(student, given, grad), evaluated(teacher, given, grad), rtol=1e-5, atol=1e-5
        )
    free = [name for name, p in student.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name == "time_embed_mixer.weight" for name in free)
    config = teacher.config
    blocks = config.blocks - (len(teacher.text_embed.text_blocks) if hasattr(config, "text") else 0)
    assert len(free) == 1 + 2 * 6 * blocks, "q, k, v, out and both of the MLP, of every block"


@pytest.mark.parametrize("fuse", [False, True])
def test_all_adapters_learn_and_the_base_stays(teacher, fuse):
    original = {name: value.clone() for name, value in teacher.student().state_dict().items()}
    student = trained(teacher, fuse=fuse)
    for name, value in student.state_dict().items():
        if "lora_" in name:
            assert value.abs().max() > 0, name
        elif name != "time_embed_mixer.weight":
            assert torch.equal(value, original[name.replace(".base_layer", "")]), name
    moved = student.state_dict()["time_embed_mixer.weight"]
    assert not torch.equal(moved, original["time_embed_mixer.weight"])


class Held(TorchDispatchMode):
    """The most bytes within that lay in storages made since, and not freed yet."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {self._address(tensor) for tensor in tree_leaves((args, kwargs))}
        for tensor in tree_leaves(made):
            address = self._address(tensor)
            if address is not None and address not in given | self.alive.keys():
                storage = tensor.untyped_storage()
                self.alive[address] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, address)
                self.most = max(self.most, sum(self.alive.values()))
        return made

    def _address(self, tensor):
        return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None


@pytest.mark.parametrize("name", ["f5_v1", "cosyvoice2"])
def test_recomputed_activations_are_not_held(name):
    """Though the inputs of the blocks need no gradient but through their modulation."""
    model = small_model("f5_v1", depth=8)
    if name == "cosyvoice2":
        sizes = {"dim": 32, "mid_blocks": 6, "depth": 1, "heads": 2, "head_dim": 16, "time_dim": 48}
        model = CausalUNet(CausalUNetConfig(**sizes))
    given = conditions(model, [120, 120])
    x, t, r = torch.randn_like(given["prompt"]), torch.tensor([0.1, 0.3]), torch.tensor([0.8, 0.4])
    held, gradients = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        student = add_lora(model.student(), 4)
        student.checkpoint_activations = checkpointed
        with Held() as counted:
            student(x, t, r, student.prepare(**given)).square().mean().backward()
        held.append(counted.most)
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.requires_grad})
    assert held[1] < 0.5 * held[0]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_every_adapter_counts_with_and_without_gradients(teacher):
    """No path reads a weight past its adapter: neither fused products nor tables."""
    student, given = trained(teacher, updates=1), conditions(teacher, [20, 13])
    for name in adapters(student):
        without = copy.deepcopy(student)
        with torch.no_grad():
            without.get_submodule(name).lora_B["default"].weight.zero_()
            student.get_submodule(name).lora_B["default"].weight.add_(0.1)
        for grad in (True, False):
            assert not torch.equal(
                evaluated(student, given, grad), evaluated(without, given, grad)
            ), name


@pytest.mark.parametrize("alpha", [None, 16])
def test_merged_equals_adapted(teacher, alpha, tmp_path):
    student, given = trained(teacher, alpha=alpha).eval(), conditions(teacher, [20, 13])
    merged = merge_lora(student)
    assert list(merged.state_dict()) == list(teacher.student().state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in teacher.student().modules()]
    assert adapters(student), "the adapted one goes on"
    for grad in (True, False):
        expected = evaluated(student, given, grad)
        distance = (evaluated(merged, given, grad) - expected).abs().max()
        assert distance <= 1e-6 * expected.abs().max().clamp(min=1)
    noise = torch.randn_like(given["prompt"])
    mels = [
        sampler.sample(model, noise, model.prepare(**given), nfe=2).detach()
        for model in (student, merged)
    ]
    torch.testing.assert_close(*mels, rtol=1e-5, atol=1e-5)
    save_student(merged, tmp_path / "student.pt", guidance=2.0)
    loaded = load_student(tmp_path / "student.pt").model
    assert torch.equal(evaluated(loaded, given, False), evaluated(merged, given, False))


def test_an_adapter_where_a_weight_is_read_is_an_error(teacher):
    """Those of `all-linear` and the like, which would be skipped without a word."""
    from peft import LoraConfig, inject_adapter_in_model

    given = conditions(teacher, [20, 13])
    targets = ["linear", "linear_1", "mlp.1", "proj", "time_mlp.0"]
    student = teacher.student()
    linears = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and any(name.endswith(f".{end}") for end in targets)
    ]
    called = tuple(end for ends in TARGETS.values() for end in ends)
    linears = [name for name in linears if not name.endswith(called)]
    assert len(linears) >= 3
    for name in linears:
        adapted = inject_adapter_in_model(
            LoraConfig(r=2, target_modules=[name]), copy.deepcopy(student)
        )
        with pytest.raises(TypeError, match="expected a plain layer"):
            evaluated(adapted, given, False)


def test_fused_storage_refuses_adapters():
    layers = [nn.Linear(4, 4), add_lora(Own(), targets=["inner"]).inner]
    with pytest.raises(TypeError, match="expected a plain layer"):
        FusedLinears().fuse(layers)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.inner = TimeEmbedMixer(4), nn.Linear(4, 4)


def test_your_own_student():
    own = add_lora(Own(), 2, targets=["inner"])
    assert adapters(own) == ["inner"]
    assert own.mixer.weight.requires_grad
    assert not own.inner.weight.requires_grad


def test_errors(teacher):
    student = teacher.student()
    for options, message in (
        ({"rank": 0}, "rank: expected an integer >= 1, got 0"),
        ({"targets": []}, "targets: expected one or more"),
        ({"targets": ["norm_out.linear"]}, "targets: expected one of attention, feed_forward"),
        ({"alpha": 0}, "alpha: expected an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(student, **options)
    with pytest.raises(ValueError, match="student: expected one with a mixer"):
        add_lora(teacher)
    with pytest.raises(ValueError, match="student: expected one with adapters, got none"):
        merge_lora(student)
    with pytest.raises(ValueError, match="student: expected one without adapters"):
        add_lora(add_lora(student))
