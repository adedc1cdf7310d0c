"""LoRA: only adapters train, everyone else sees an ordinary model with the weights they make."""

import functools
import itertools
import signal
import sys
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlzoo.callbacks.gvm import gradient_norms
from rlzoo.diagnosis.probe import probe_sequences
from rlzoo.engines.base import weights_checksum
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.errors import UserError
from rlzoo.export import export
from rlzoo.launch.configuration import conf_dir
from rlzoo.launch.training import build as build_run
from rlzoo.launch.training import check_same_lora
from rlzoo.models import lora as adapters
from rlzoo.models.logprobs import sequence_logprobs
from rlzoo.models.policy import load_policy
from tests.conftest import make_tiny_model
from tests.recorded import recorded_rollouts
from tests.test_runs import UNIFORM, assert_same_run, finish, start, summary_of, wait_for, weights
from tests.zoo import build, gradient

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    make_tiny_model(spread=0.1).save_pretrained(path)
    return path


def factory(folder: Path, **changes):
    lora = changes.pop("lora", {"r": 4, "alpha": 8})
    return functools.partial(load_policy, str(folder), lora=lora, **changes)


def stirred(policy):
    """The policy, adapters moved off the zero change that they start as."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if adapters.is_adapter(name):
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return policy.eval()


def scores(policy) -> torch.Tensor:
    return torch.cat(sequence_logprobs(policy, probe_sequences(policy), CPU))


def plain_with(folder: Path, state) -> torch.nn.Module:
    model = load_policy(str(folder))
    model.load_state_dict(dict(state))
    return model.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.down_proj"]])
def test_an_engine_gets_the_merged_weights_by_the_names_of_the_plain_model(folder, targets):
    policy_factory = factory(folder, lora={"r": 4, "alpha": 6, "target_modules": targets})
    policy = stirred(policy_factory())
    plain = load_policy(str(folder)).eval()
    merged = dict(adapters.whole_weights_of(policy))
    assert {n: (w.shape, w.dtype) for n, w in merged.items()} == {
        n: (w.shape, w.dtype) for n, w in plain.named_parameters()
    }
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    assert (scores(policy) - scores(plain)).abs().max() > 0.01
    ours, theirs = scores(policy), scores(plain_with(folder, merged))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    engine = TransformersEngine(policy_factory, eos_token_ids=[0], pad_token_id=1)
    engine.load_weights(adapters.whole_weights_of(policy), 3)
    assert engine.checksum() == weights_checksum(adapters.whole_weights_of(policy))
    probe = torch.cat(engine.score(probe_sequences(policy)))
    torch.testing.assert_close(probe, scores(policy), atol=1e-5, rtol=0)


def test_the_sum_of_half_precision_weights_is_rounded_once(folder):
    policy = stirred(factory(folder, dtype="bfloat16")())
    layer = policy.model.layers[0].mlp.up_proj
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    exact = layer.base_layer.weight.float() + 2.0 * (
        layer.lora_B.default.weight @ layer.lora_A.default.weight
    )
    merged = dict(adapters.whole_weights_of(policy))["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.bfloat16())


@pytest.mark.parametrize("name", ["grpo", "ppo"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_train(folder, name, checkpointing):
    policy = factory(folder, gradient_checkpointing=checkpointing)
    algo = build(name, policy=lambda: stirred(policy()).train(), kl_coef=0.1)
    if name == "ppo":
        algo.critic.head.weight.data.fill_(0.1)  # it starts at 0, and nothing learns through it
    gradient(algo, recorded_rollouts((3, 1, 4, 2)))
    groups = algo.configure_optimizers()["optimizer"].param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    for name, parameter in algo.named_parameters():
        learns = adapters.is_adapter(name) or name.startswith("critic.head.")
        assert (id(parameter) in trained) == learns
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(folder):
    policy = stirred(factory(folder)())
    lora = build("grpo", policy=lambda: policy)
    state = {n: w.clone() for n, w in lora.named_weights()}
    plain = build("grpo", policy=lambda: plain_with(folder, state))
    rollouts = recorded_rollouts((3, 1, 4, 2))
    gradient(lora, rollouts)
    gradient(plain, rollouts)
    layer = policy.model.layers[1].self_attn.v_proj
    whole = plain.policy.model.layers[1].self_attn.v_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    torch.testing.assert_close(a.grad, 2.0 * b.T @ whole.weight.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(b.grad, 2.0 * whole.weight.grad @ a.T, atol=1e-6, rtol=1e-4)


def test_the_reference_is_the_same_network_with_adapters_off(folder):
    algo = build("grpo", policy=lambda: stirred(factory(folder)()), kl_coef=0.1)
    assert algo.side_models == []
    plain, before = load_policy(str(folder)), scores(algo.policy)
    with adapters.adapters_off(algo.policy) as reference:
        assert torch.equal(scores(reference), scores(plain))
        named = reference.named_parameters()
        assert all(p.requires_grad for name, p in named if adapters.is_adapter(name))
    assert torch.equal(scores(algo.policy), before) and not torch.equal(before, scores(plain))
    rollouts = recorded_rollouts((3, 1, 4, 2))
    other = build("grpo", policy=lambda: load_policy(str(folder)), kl_coef=0.1)
    for one in (algo, other):
        gradient(one, rollouts)
        one.found = torch.cat(rollouts.scores["ref_logprobs"])
    assert torch.equal(algo.found, other.found)


def test_gradient_norms_are_those_of_the_merged_model(folder):
    policy = stirred(factory(folder)())
    merged = plain_with(folder, adapters.whole_weights_of(policy))
    rollouts = recorded_rollouts((3, 1, 4, 2))
    ours, theirs = (
        gradient_norms(model, rollouts, [0, 4, 5], temperature=1.0, max_tokens=60)
        for model in (policy, merged)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_passes_with_gradient_alone(folder):
    policy = factory(folder, lora={"r": 4, "dropout": 0.5})()
    policy = stirred(policy).train()
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(policy(tokens).logits, policy(tokens).logits)
    assert not torch.equal(policy(tokens).logits, policy(tokens).logits)


def test_adapters_start_from_the_runs_seed_alone(folder):
    def first_weights(seed: int, draws: int) -> torch.Tensor:
        torch.manual_seed(seed)
        torch.rand(draws)  # what a rank may have drawn before
        policy = factory(folder)()
        return torch.cat([p.flatten() for p in policy.parameters() if p.requires_grad])

    assert torch.equal(first_weights(3, 0), first_weights(3, 5))
    assert not torch.equal(first_weights(3, 0), first_weights(4, 0))


# --- bad input ----------------------------------------------------------------------------------


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose("train", overrides=["run_dir=unused", *overrides])


@pytest.mark.parametrize(
    "override, words",
    [
        ("{rank: 8}", "no key rank; it has r, alpha"),
        ("{r: 0}", "model.lora.r must be a whole number, at least 1, got 0"),
        ("{r: 1.5}", "whole number"),
        ("{r: many}", "model.lora.r must be a whole number, at least 1, got 'many'"),
        ("{alpha: 0}", "model.lora.alpha must be a number, above 0"),
        ("{dropout: 1.0}", "model.lora.dropout must be a number, at least 0, below 1"),
        ("{target_modules: [q_proj, querry]}", "querry.*They are: down_proj, .*q_proj"),
        ("{target_modules: [lm_head]}", "lm_head.*They are"),
        ("{target_modules: [proj]}", "proj, but Qwen2ForCausalLM has no linear layer"),
        ("{target_modules: []}", "'all-linear', or a list, each text"),
        ("yes", "model.lora must be"),
    ],
)
def test_bad_settings_fail_at_start_up(override, words):
    with pytest.raises(UserError, match=words):
        build_run(compose(f"model.lora={override}"), None)


def test_a_missing_peft_is_named_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"rlzoo\[peft\]"):
        build_run(compose("model.lora={r: 8}"), None)


def test_a_model_without_linear_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="GPT2LMHeadModel.*They are: none"):
        adapters.add_lora(model, {})


def test_a_resume_under_other_adapters_is_refused():
    saved = adapters.lora_settings({"r": 8})
    check_same_lora(compose("model.lora={r: 8, dropout: 0.1}"), Path("x.ckpt"), saved)
    for override, state in (("{r: 4}", saved), ("null", saved), ("{r: 8}", None)):
        with pytest.raises(UserError, match="model.lora.*init_from"):
            check_same_lora(compose(f"model.lora={override}"), Path("x.ckpt"), state)


# --- whole runs ---------------------------------------------------------------------------------


def test_a_run_killed_in_the_middle_resumes_to_the_same_adapters_and_its_policy_loads(tmp_path):
    options = (
        *UNIFORM,
        "model.lora={r: 4, alpha: 8, dropout: 0.1}",
        "model.gradient_checkpointing=true",
        "algo.kl_coef=0.01",
        "lr=1e-2",
        "sampler=gvm",
        "sampler.callback.pilots=2",
        "limits.max_responses=96",  # pilots, and two rollout steps
        "val_every=0",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(killed, *options)
    wait_for(killed / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "policy").exists()
    for process in [start(whole, *options), start(killed, *options, "ckpt_path=last")]:
        finish(process)
    assert_same_run(killed, whole)
    assert summary_of(whole)["updates"] == 4

    state = {n.removeprefix("policy."): w for n, w in weights(whole).items()}
    plain = dict(load_policy("tiny").named_parameters())
    frozen = {n.replace(".base_layer.", "."): w for n, w in state.items()}
    assert all(torch.equal(frozen[name], plain[name]) for name in plain)
    moved = [w for n, w in state.items() if ".lora_B." in n]
    assert moved and all(w.any() for w in moved)

    policy = AutoModelForCausalLM.from_pretrained(whole / "policy").eval()
    assert (scores(policy) - scores(load_policy("tiny"))).abs().max() > 1e-3
    with_adapter = PeftModel.from_pretrained(load_policy("tiny"), whole / "adapter").eval()
    model = with_adapter.get_base_model()
    torch.testing.assert_close(scores(model), scores(policy), atol=1e-5, rtol=1e-5)
    checkpoint = whole / "checkpoints" / "last.ckpt"
    export(checkpoint, tmp_path / "exported")
    started = load_policy("tiny", init_from=str(checkpoint))
    for other in (load_policy(str(tmp_path / "exported")), started):
        pairs = itertools.zip_longest(other.named_parameters(), policy.named_parameters())
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
