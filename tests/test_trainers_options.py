"""The transformers Trainer with what people add to it: arguments, peft, TRL.

At full rank, and without warm-up, a run with grass is the run without it: that is the comparison.
"""

import pytest
import test_trainers
import torch
from test_trainers import fresh, hf_trainer

import grass_fx
from grass_fx.errors import CompactGradError

accelerate, transformers = test_trainers.accelerate, test_trainers.transformers  # fixtures

FULL_RANK = {"compiler": "aot_eager", "rank": 16, "refresh_every": 1000}
LOW_RANK = {"compiler": "aot_eager", "rank": 4, "refresh_every": 2}


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def compact_state(model, optimizer):
    return {name for name, p in model.named_parameters() if "indices" in optimizer.state.get(p, ())}


def run(transformers, folder, build, options, steps_of=None, **arguments):
    """A run with grass and ``options``, or without it if they are None; what is taken, its norms.

    ``steps_of`` makes the Trainer's ``training_step`` from its own.
    """
    model = fresh(lambda: build(transformers))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if options is None:
        model.compile(backend="aot_eager")
        optimizer = torch.optim.AdamW(named, lr=1e-2)
    else:
        model.compile(backend="grass", options=options)
        optimizer = grass_fx.AdamW(named, lr=1e-2, warmup_steps=0)
    trainer = hf_trainer(transformers, folder, model, optimizer, **{"bf16": False, **arguments})
    if steps_of is not None:
        trainer.training_step = steps_of(trainer.training_step)
    torch.manual_seed(0)
    trainer.train()
    norms = [r["grad_norm"] for r in trainer.state.log_history if "grad_norm" in r]
    return model, compact_state(model, optimizer), norms


def assert_as_without_grass(transformers, folder, build, **how):
    """Returns what was taken."""
    model, taken, norms = run(transformers, folder / "grass", build, FULL_RANK, **how)
    plain, _, plain_norms = run(transformers, folder / "plain", build, None, **how)
    assert norms == pytest.approx(plain_norms, rel=1e-4) and len(norms) == 6
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: name + m)
    return taken


@pytest.mark.slow
def test_arguments_of_the_trainer_do_what_they_do_without_grass(transformers, tmp_path):
    """Noise on embeddings, an emptied cache, and a batch size that is too large after all.

    With another one the run starts anew; weights and optimizer go on as they are.
    """

    def limited(training_step):
        sizes = []

        def step(model, inputs, *args, **kwargs):
            sizes.append(len(inputs["input_ids"]))
            loss = training_step(model, inputs, *args, **kwargs)
            if sizes[-1] > 1 and len(sizes) > 4:  # in the middle of an accumulation
                raise RuntimeError("CUDA out of memory.")
            return loss

        return step

    taken = assert_as_without_grass(
        transformers, tmp_path, llama, steps_of=limited, auto_find_batch_size=True,
        torch_empty_cache_steps=1, neftune_noise_alpha=5.0,
    )  # fmt: skip
    assert len(taken) == 8


def test_optimizers_that_the_trainer_makes_by_name_are_errors(transformers, tmp_path):
    model = fresh(lambda: llama(transformers))
    model.compile(backend="grass", options=LOW_RANK)
    tokens = torch.randint(32, (2, 12))
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        optimizer = hf_trainer(transformers, tmp_path, model, optim=name).create_optimizer()
        with pytest.raises(CompactGradError, match="grass_fx.AdamW"):
            optimizer.step()


# --- peft -----------------------------------------------------------------------------------------


def adapted(trainable_base=False, **config):
    peft = pytest.importorskip("peft")

    def build(transformers):
        lora = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0, task_type="CAUSAL_LM",
            init_lora_weights=False, **config,
        )  # fmt: skip
        model = peft.get_peft_model(llama(transformers), lora)
        if trainable_base:
            model.requires_grad_()
        return model

    return build


def test_adapters_on_a_frozen_base_and_a_whole_module_beside_them(transformers, tmp_path):
    taken = assert_as_without_grass(
        transformers, tmp_path, adapted(modules_to_save=["lm_head"])
    )  # B reads 4 features, fewer than the rank
    prefix = "base_model.model."
    assert taken == {
        f"{prefix}lm_head.modules_to_save.default.weight",
        f"{prefix}model.layers.0.self_attn.q_proj.lora_A.default.weight",
        f"{prefix}model.layers.0.mlp.down_proj.lora_A.default.weight",
    }


def test_adapters_and_a_base_that_trains(transformers, tmp_path):
    build = adapted(trainable_base=True)
    assert len(assert_as_without_grass(transformers, tmp_path, build)) == 8 + 2
    low = {**LOW_RANK, "exclude": ["*lora*"]}
    _, taken, _ = run(transformers, tmp_path / "low", build, low)
    assert len(taken) == 8 and not any("lora" in name for name in taken)


# --- TRL ------------------------------------------------------------------------------------------


def test_a_fused_head_of_trl_trains_dense_with_the_gradient_it_has_without_grass(transformers):
    """Its kernel writes with ``out=``, where Dynamo breaks the graph: it runs in no graph."""
    trl = pytest.importorskip("trl.trainer.utils")

    def build():
        model = llama(transformers)
        trl.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        return model

    model, plain = fresh(build), fresh(build)
    tokens = torch.randint(32, (2, 12))
    batch = {"input_ids": tokens, "labels": tokens, "fused_lm_head": True}
    report = grass_fx.explain(model, **batch, options=LOW_RANK)
    assert "lm_head.weight" in str(report) and "in no compiled training graph" in str(report)
    model.compile(backend="grass", options=LOW_RANK)
    for each in (model, plain):
        each(**batch).loss.backward()
    compact = 0
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        got, want = p.grad, q.grad
        if isinstance(got, grass_fx.CompactGrad):
            compact, got, want = compact + 1, got.compact, got.selection.project(want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: name)
    assert compact == 7 and type(model.lm_head.weight.grad) is torch.Tensor
