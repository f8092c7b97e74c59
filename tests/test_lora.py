"""LoRA students: adapters on the teacher's own weights learn, and nothing else changes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from momatch.config import AlternatingConfig, InstantConfig
from momatch.config import files as config_files
from momatch.config.schema import (
    AdapterConfig,
    DistillConfig,
    GuidanceConfig,
    MonitorConfig,
    OptimConfig,
    ScheduleConfig,
    StoppingConfig,
    TeacherConfig,
    TrainConfig,
    to_json,
)
from momatch.data.images import ImageSet, Split
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.interop import lora_files as lora
from momatch.interop.load import load_student
from momatch.methods.alternating import Alternating
from momatch.methods.base import Batch
from momatch.methods.transition import Transition
from momatch.models.model import Model
from momatch.networks.configs import DiffusersConfig, UNetConfig, UViTConfig
from momatch.networks.lora import AdaptedNetwork, target_layers
from momatch.networks.registry import build
from momatch.training import plan as planning
from momatch.training.build import distillation
from momatch.training.monitor import Look
from momatch.training.optim import Optimizer
from momatch.utils.errors import UsageError

UNET = UNetConfig(channels=(8, 16), attention_levels=(1,), num_classes=3, embedding_dim=16)
UVIT = UViTConfig(channels=(8,), width=16, depth=1, num_classes=3, embedding_dim=16)
BLOCKS = dict(
    sample_size=8, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, attention_head_dim=4
)
DIFFUSERS = DiffusersConfig(
    "UNet2DModel",
    dict(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        **BLOCKS,
    ),
)
TEXT = DiffusersConfig(
    "UNet2DConditionModel",
    dict(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        **BLOCKS,
    ),
)
ADAPTER = AdapterConfig(rank=2, alpha=3.0)
CONFIG = DistillConfig(
    adapter=ADAPTER,
    train=TrainConfig(num_steps=6, batch_size=4, log_every=1, checkpoint_every=2),
    monitor=MonitorConfig(every=0),
)
METHODS = {"alternating": AlternatingConfig(), "instant": InstantConfig(lambda_steps=2)}
LOGSNR = torch.tensor([-8.0, -1.0, 2.0])


def shaken(network: torch.nn.Module, seed: int = 0, size: float = 0.05) -> torch.nn.Module:
    """Every parameter moved at random, so that no layer is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return network


def make_teacher(network=UNET) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = shaken(build(network))
    labels = isinstance(network, UNetConfig | UViTConfig)
    denoiser = Denoiser(net, "v", {"label": 3} if labels else {})
    shape = (4, 8, 8) if network == TEXT else (1, 8, 8)
    cond_shapes = {"encoder_hidden_states": (-1, 16)} if network == TEXT else {}
    info = {"role": "teacher"}
    steps, classes = 64, 3 if labels else 0
    return Model(denoiser, network, schedules.cosine(), shape, steps, classes, info, cond_shapes=cond_shapes)


def inputs(network=UNET, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 4 if network == TEXT else 1, 8, 8, generator=generator)
    if network == TEXT:
        return z, LOGSNR, {"encoder_hidden_states": torch.randn(3, 5, 16, generator=generator)}
    return z, LOGSNR, None if network == DIFFUSERS else {"label": torch.tensor([0, 2, 1])}


@pytest.fixture
def data():
    images = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = ImageSet(images, torch.arange(90) % 3, 3, "random")
    return Split(pictures, pictures)


def run_of(config, data, directory=None, network=UNET):
    return distillation(make_teacher(network), data, config, directory)


def dense(network: AdaptedNetwork, plain: torch.nn.Module) -> torch.nn.Module:
    """W + (alpha / rank) B A by hand, in a plain network."""
    inner = getattr(plain, "model", plain)
    state = dict(network.named_parameters())
    for name in network.layers:
        a = state[f"adapter.{name}.lora_A.default.weight"]
        b = state[f"adapter.{name}.lora_B.default.weight"]
        change = (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
        inner.get_submodule(name).weight.data += 3.0 / 2 * change.detach()
    return plain


NETWORKS = pytest.mark.parametrize(
    "network", [UNET, UVIT, DIFFUSERS, TEXT], ids=["unet", "uvit", "UNet2DModel", "UNet2DConditionModel"]
)


@NETWORKS
def test_an_adapter_starts_as_nothing_adds_ba_and_merges(network):
    teacher = make_teacher(network)
    net, before = teacher.denoiser.network, teacher.fingerprint()
    adapted = AdaptedNetwork(net, 2, 3.0)
    with torch.no_grad():
        # B is 0. Not bit for bit: where it is added, a convolution may choose other kernels.
        assert all(not p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
        torch.testing.assert_close(adapted(*inputs(network)), net(*inputs(network)), atol=2e-6, rtol=0)
        shaken(adapted, 3, 0.2)
        by_hand, merged = dense(adapted, make_teacher(network).denoiser.network), adapted.merged()
        for seed in range(3):
            found = adapted(*inputs(network, seed))
            assert (found - net(*inputs(network, seed))).abs().max() > 1e-3
            torch.testing.assert_close(found, by_hand(*inputs(network, seed)), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found, merged(*inputs(network, seed)), atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == net.state_dict().keys()
    mine = {p.data_ptr() for p in net.parameters()}
    assert not mine & {p.data_ptr() for p in merged.parameters()}
    assert teacher.fingerprint() == before
    assert {p.data_ptr() for p in adapted.whole.parameters()} >= mine
    learning = {id(p) for p in adapted.whole.parameters() if p.requires_grad}
    assert learning == {id(p) for p in adapted.parameters()}
    names = [name for name, _ in adapted.named_parameters()]
    assert names == list(adapted.state_dict()) and all("lora_" in name for name in names)


@pytest.mark.parametrize("method", ["alternating", "instant"])
@pytest.mark.parametrize("guided", [False, True])
def test_the_gradient_of_b_is_the_whole_network_s_times_a(method, guided, data):
    """∂L/∂B = (alpha / rank) ∂L/∂W Aᵀ with the gradient of a whole student on the same draws."""
    config = replace(CONFIG, method=METHODS[method], guidance=GuidanceConfig(1.0 if guided else 0.0))
    full = run_of(replace(config, adapter=AdapterConfig()), data)
    whole_auxiliary = replace(ADAPTER, auxiliary="full" if method == "alternating" else "adapter")
    run = run_of(replace(config, adapter=whole_auxiliary), data)
    for each in (full, run):
        if method == "alternating":  # which starts with a student that has nothing to learn
            shaken(each.method.trainable["auxiliary"], 4)
        each.method.step(1, each.batches(1)).losses["student"].backward()
    network = run.model.denoiser.network
    plain = full.model.denoiser.network
    for name, layer in network.layers.items():
        whole = plain.get_submodule(name).weight.grad.flatten(1)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        wanted = 1.5 * whole @ a.detach().flatten(1).T
        torch.testing.assert_close(b.grad.flatten(1), wanted, atol=1e-6, rtol=1e-3)
        assert b.grad.abs().max() > 0 and a.grad.abs().max() == 0, name


def test_each_loss_reaches_every_weight_of_its_own_adapter_and_nothing_else(data):
    run = run_of(replace(CONFIG, method=AlternatingConfig("joint")), data)
    roles = dict(run.method.trainable)
    frozen = {id(p) for p in run.method.teacher.parameters()}
    assert not frozen & {id(p) for role in roles.values() for p in role.parameters()}
    for network in roles.values():
        shaken(network, 5)
    losses = run.method.step(0, run.batches(0)).losses
    for role, other in (("student", "auxiliary"), ("auxiliary", "student")):
        losses[role].backward()
        assert all(p.grad.abs().max() > 0 for p in roles[role].parameters())
        assert all(p.grad is None for p in roles[other].parameters())
        assert all(p.grad is None for p in run.method.teacher.parameters())
        roles[role].zero_grad()


def test_two_steps_teach_b_then_a(data):
    run = run_of(replace(CONFIG, method=METHODS["instant"]), data)
    start = {k: p.detach().clone() for k, p in run.model.denoiser.named_parameters()}
    moved = []
    for event in run:
        now = dict(run.model.denoiser.named_parameters())
        moved.append({k for k in now if not torch.equal(now[k], start[k])})
        if event.record.step == 2:
            break
    assert moved[0] == {k for k in start if "lora_B" in k}
    assert moved[1] == set(start)


OPTIONS = {
    "alternating": {},
    "joint": dict(method=AlternatingConfig("joint"), source="rollout", steps=3),
    "full auxiliary": dict(adapter=replace(ADAPTER, auxiliary="full")),
    "dropout": dict(student_dropout=0.3, adapter=replace(ADAPTER, dropout=0.2)),
    "targets": dict(adapter=replace(ADAPTER, targets=("qkv", ".*conv1"))),
    "instant": dict(method=InstantConfig(lambda_steps=2, product="forward")),
    "difference": dict(method=InstantConfig("difference", 2, centre=True)),
    "guided": dict(guidance=GuidanceConfig(1.0, -5, 5, "dynamic"), steps=2),
    "warm start": dict(warm_start_steps=3, schedule=ScheduleConfig("cosine", shift=-1.0)),
}


@pytest.mark.parametrize("option", list(OPTIONS))
def test_every_option_resumes_bit_for_bit_and_leaves_the_teacher_alone(option, data, tmp_path):
    config = replace(CONFIG, **OPTIONS[option])
    unbroken = run_of(config, data, tmp_path / "a")
    teacher = next(
        n for n in (unbroken.method, getattr(unbroken.method, "method", None)) if hasattr(n, "teacher")
    )
    teacher = teacher.teacher.unwrapped
    weights = {k: v.clone() for k, v in teacher.state_dict().items()}
    before = teacher(*inputs())
    list(unbroken)
    events = run_of(config, data, tmp_path / "b").events()
    for event in events:
        if event.record.step == 3:
            break
    events.close()
    resumed = run_of(config, data, tmp_path / "b")
    list(resumed)
    states = [r.model.denoiser.state_dict() for r in (unbroken, resumed)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert torch.equal(teacher(*inputs()), before)
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items())

    saved = load_file(tmp_path / "a" / "checkpoints" / "step-00000006.safetensors")
    whole = option == "full auxiliary"
    assert all("lora_" in k or k.endswith(".step") or (whole and "auxiliary" in k) for k in saved)
    model, student = resumed.finish(), load_student(tmp_path / "b")
    for each in (model, student):
        assert each.denoiser.state_dict().keys() == teacher.state_dict().keys()
    resumed.model.denoiser.eval()
    with torch.no_grad():
        for each in (model, student):
            each.denoiser.eval()
            torch.testing.assert_close(
                each.denoiser(*inputs()), resumed.model.denoiser(*inputs()), atol=1e-5, rtol=1e-5
            )
        assert not torch.equal(model.denoiser(*inputs()), before)


@pytest.mark.parametrize("method", ["alternating", "instant"])
def test_a_network_of_diffusers_is_distilled_too(method, data, tmp_path):
    run = run_of(replace(CONFIG, method=METHODS[method]), data, tmp_path, DIFFUSERS)
    list(run)
    run.finish()
    torch.testing.assert_close(
        run.model.sample(2, 2), load_student(tmp_path).sample(2, 2), atol=1e-5, rtol=1e-4
    )
    assert not torch.equal(run.model.sample(2, 2), make_teacher(DIFFUSERS).sample(2, 2))


def test_a_text_to_image_network_learns_in_algorithm_2():
    teacher = make_teacher(TEXT)
    networks = [Denoiser(AdaptedNetwork(teacher.denoiser.network, 2), "v") for _ in range(2)]
    method = Alternating(teacher.denoiser, *networks, Transition(schedules.cosine(), 4))
    z, _, cond = inputs(TEXT)
    losses = method.step(1, Batch(z, cond, torch.Generator().manual_seed(0))).losses
    assert losses["student"] == 0  # student, auxiliary and teacher agree
    losses = method.step(0, Batch(z, cond, torch.Generator().manual_seed(0))).losses
    losses["auxiliary"].backward()
    grads = {k: p.grad.abs().max() for k, p in networks[1].named_parameters()}
    assert all(v > 0 for k, v in grads.items() if "lora_B" in k)
    assert all(p.grad is None for p in networks[0].parameters())


def test_full_rank_can_learn_another_network_and_rank_1_of_few_layers_cannot():
    z, logsnr, cond = inputs()
    other = shaken(make_teacher().denoiser.network, 7, 0.1)
    with torch.no_grad():
        wanted = other(z, logsnr, cond)
    left = {}
    for rank, targets in ((16, ()), (1, ("qkv",))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = AdaptedNetwork(make_teacher().denoiser.network, rank, targets=targets)
        optimizer = Optimizer(network, OptimConfig(beta1=0.9, beta2=0.999, eps=1e-8, clip_norm=100.0))
        losses = []
        for _ in range(80):
            loss = (network(z, logsnr, cond) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.set_learning_rate(3e-3)
            optimizer.step()
            losses.append(float(loss.detach()))
        left[rank] = losses[-1] / losses[0]
    assert left[16] < 0.05 < left[1] < 1


def test_the_plan_counts_one_network_and_adapters(data):
    teacher = make_teacher()
    net = teacher.denoiser.network
    weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    own = sum(2 * (w[0].numel() + len(w)) for w in weights)  # rank 2: A is 2 × inputs, B is outputs × 2
    whole = sum(p.numel() for p in net.parameters())
    plans = {
        name: planning.plan(config, make_teacher(), data, probe_seconds=0)
        for name, config in (
            ("adapters", CONFIG),
            ("full auxiliary", replace(CONFIG, adapter=replace(ADAPTER, auxiliary="full"))),
            ("whole", replace(CONFIG, adapter=AdapterConfig())),
        )
    }
    sizes = {name: [n.parameters for n in found.networks] for name, found in plans.items()}
    assert sizes["adapters"] == [whole, own, own] and sizes["full auxiliary"] == [whole, own, whole]
    memory = {name: sum(n.memory for n in found.networks) for name, found in plans.items()}
    assert memory["adapters"] == 4 * whole + 2 * 12 * own < memory["whole"] == 28 * whole
    assert len({found.forward_units for found in plans.values()}) == 1


@pytest.mark.parametrize("auxiliary", ["adapter", "full"])
def test_an_outline_of_adapters_agrees_with_a_plan(auxiliary, data):
    config = replace(CONFIG, adapter=replace(ADAPTER, auxiliary=auxiliary))
    measured = planning.plan(config, make_teacher(UVIT), data, probe_seconds=0)
    outlined = planning.outline(config, TeacherConfig(network=UVIT, image_size=8))
    assert outlined.networks == measured.networks
    assert outlined.activations == pytest.approx(measured.activations, rel=0.15)


def test_dropout_is_the_student_s_alone(data):
    teacher = make_teacher(replace(UNET, dropout=0.5))
    config = replace(CONFIG, adapter=replace(ADAPTER, dropout=0.5))
    run = distillation(teacher, data, config)
    student, auxiliary = run.method.trainable.values()
    for network in (student, auxiliary):
        shaken(network, 2, 0.3).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for network, same in ((teacher.denoiser, True), (auxiliary, True), (student, False)):
            assert torch.equal(network(*inputs()), network(*inputs())) is same
        student.eval()
        assert torch.equal(student(*inputs()), student(*inputs()))


def test_adapters_differ_by_seed_and_role_and_touch_no_global_random_numbers(data):
    before = torch.get_rng_state()
    runs = [run_of(replace(CONFIG, train=TrainConfig(seed=seed)), data) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    a, again, b = (next(r.model.denoiser.parameters()) for r in runs)
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert not torch.equal(a, next(runs[0].method.trainable["auxiliary"].parameters()))


def test_the_best_adapter_is_kept_and_restored(data, tmp_path, monkeypatch):
    from momatch.training import run as runs

    values = iter([5.0, 2.0, 3.0, 4.0])

    class Looks(runs.Monitor):
        def look(self, step):
            assert not torch.equal(self.model.sample(2, 2), make_teacher().sample(2, 2))
            return Look(step, next(values), 100, "pixels", "held back", None), []

    monkeypatch.setattr(runs, "Monitor", Looks)
    config = replace(
        CONFIG,
        train=TrainConfig(num_steps=40, batch_size=4, log_every=1),
        monitor=MonitorConfig(every=2),
        stopping=StoppingConfig(patience=2, held_back=0.2),
    )
    run = run_of(config, data, tmp_path)
    after = {}
    for event in run:
        after[event.record.step] = {k: v.clone() for k, v in run.model.denoiser.state_dict().items()}
    run.finish()
    assert max(after) == 8
    assert all(torch.equal(v, after[4][k]) for k, v in run.model.denoiser.state_dict().items())
    assert all("lora_" in k or "frechet" in k for k in load_file(tmp_path / "best.safetensors"))


@pytest.mark.parametrize("network", [UNET, DIFFUSERS], ids=["unet", "UNet2DModel"])
def test_peft_loads_the_saved_adapter(network, tmp_path):
    from peft import PeftModel

    teacher = make_teacher(network)
    adapted = shaken(AdaptedNetwork(teacher.denoiser.network, 2, 3.0), 3, 0.2)
    model = replace(teacher, denoiser=Denoiser(adapted, "v"))
    lora.save_adapter(model, tmp_path)
    plain = make_teacher(network).denoiser.network
    if network == DIFFUSERS:
        plain.model = PeftModel.from_pretrained(plain.model, tmp_path)
    else:
        plain = PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        found = plain(*inputs(network))
        torch.testing.assert_close(found, adapted(*inputs(network)), atol=1e-5, rtol=1e-5)


def test_diffusers_loads_the_saved_adapter_into_a_pipeline(tmp_path):
    """By `load_lora_weights` with no more than the folder, and by the network's own `load_lora_adapter`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    teacher = make_teacher(TEXT)
    adapted = shaken(AdaptedNetwork(teacher.denoiser.network, 2, 3.0), 3, 0.2)
    lora.save_adapter(replace(teacher, denoiser=Denoiser(adapted, "v")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    plain = make_teacher(TEXT).denoiser.network
    schedule = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        None, None, None, plain.model, schedule, None, None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(str(tmp_path))
    other = make_teacher(TEXT).denoiser.network
    other.model.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix="unet")
    with torch.no_grad():
        wanted = adapted(*inputs(TEXT))
        for network in (plain, other):
            torch.testing.assert_close(network(*inputs(TEXT)), wanted, atol=1e-5, rtol=1e-5)
        pipeline.fuse_lora()
        torch.testing.assert_close(plain(*inputs(TEXT)), wanted, atol=1e-5, rtol=1e-5)


def test_an_unmerged_student_that_is_saved_is_merged(data, tmp_path):
    run = run_of(CONFIG, data)
    shaken(run.model.denoiser, 4, 0.2)
    run.model.save(tmp_path)
    cond = {"label": torch.tensor([0, 1])}
    torch.testing.assert_close(
        load_student(tmp_path).sample(2, 2, cond), run.model.sample(2, 2, cond), atol=1e-4, rtol=1e-4
    )
    assert lora.merged(make_teacher()).denoiser.network is not None
    plain = make_teacher()
    assert lora.merged(plain) is plain


def test_targets_are_ends_of_names_or_expressions():
    net = make_teacher().denoiser.network
    linear = (torch.nn.Linear, torch.nn.Conv2d)
    assert target_layers(net) == [k for k, m in net.named_modules() if isinstance(m, linear)]
    assert target_layers(net, ["qkv"]) == ["down_levels.1.1.qkv"]
    assert target_layers(net, ["stem", r"up.*\.conv\d"]) == [
        "stem",
        "up_levels.0.0.conv1",
        "up_levels.0.0.conv2",
    ]
    text = make_teacher(TEXT).denoiser.network.model
    assert all(".attn" in name for name in target_layers(text, ["to_q", "to_out.0"]))
    adapted = AdaptedNetwork(net, 2, targets=["skip", "project"])
    assert list(adapted.layers) == target_layers(net, ["skip", "project"])


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            dict(adapter=replace(ADAPTER, auxiliary="full"), method="instant"),
            "leave it out with method=instant",
        ),
        (dict(adapter=replace(ADAPTER, targets=("to_q",))), "'to_q', which fits no.*conditioning.linear1"),
        (dict(adapter=replace(ADAPTER, targets=("(",))), "no regular expression"),
    ],
)
def test_impossible_adapters_are_refused_in_a_sentence(changes, says, data):
    with pytest.raises(UsageError, match=says):
        run_of(replace(CONFIG, **changes), data)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(rank=-1), "adapter.rank is -1"),
        (dict(rank=2, alpha=-1.0), "adapter.alpha is -1"),
        (dict(rank=2, dropout=1.0), "adapter.dropout is 1"),
        (dict(targets=("qkv",)), "adapter.targets is .*needs adapter.rank"),
        (dict(auxiliary="full"), "adapter.auxiliary is 'full'; it needs"),
    ],
)
def test_an_impossible_adapter_is_refused_when_it_is_made(fields, says):
    with pytest.raises(UsageError, match=says):
        AdapterConfig(**fields)


def test_without_peft_the_remedy_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"peft cannot be imported .* pip install -U 'momatch\[lora\]'"):
        run_of(CONFIG, data)
    run_of(replace(CONFIG, adapter=AdapterConfig()), data)


def test_adapters_survive_json():
    config = replace(CONFIG, adapter=replace(ADAPTER, targets=("to_q", "to_k"), auxiliary="full"))
    assert config_files.from_json(to_json(config), DistillConfig) == config
