"""The trainers people already have run unmodified: transformers, accelerate, Lightning, a loop.

Every run takes 6 steps with a refresh after each second one. A checkpoint is written after step 3,
so selections have changed before it and change again after it.
"""

import itertools
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import grass_fx
from grass_fx.errors import CompactGradError
from grass_fx.state.registry import registry

STEPS, SAVED_AT, ACCUMULATED, BATCH, RANK = 6, 3, 2, 2, 4
CYCLIC = {"compiler": "aot_eager", "rank": RANK, "refresh_every": 2}
TOP = {**CYCLIC, "selection": "top"}


def adamw(parameters):
    return grass_fx.AdamW(parameters, lr=1e-2, warmup_steps=2)


def sgd(parameters):
    return grass_fx.subspace(torch.optim.SGD)(parameters, lr=0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def _without_complaints(caplog):
    """No GrassWarning, and none in the log either: every selection reached its product."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", grass_fx.GrassWarning)
        yield
    assert [r.message for r in caplog.get_records("call") if r.name.startswith("grass_fx")] == []


def pairs(steps=STEPS):
    x = torch.randn(steps * ACCUMULATED * BATCH, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.roll(1, 1)), batch_size=BATCH)


class Net(nn.Module):  # one linear weight selected by columns, one by rows, and a norm
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.norm(self.up(x))))


def loss_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def fresh(build):
    torch._dynamo.reset()
    torch.manual_seed(0)  # the same weights each time
    return build()


def assert_linear_weights_are_compact(model, optimizer, refreshes=STEPS // 2):
    """Every linear weight has only compact state and was refreshed; all else trained dense."""
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        moments = {k: v.shape for k, v in state.items() if k.startswith(("exp_avg", "momentum"))}
        assert moments and ("indices" in state) == (p in linear), name
        shape = list(p.shape)
        if p in linear:
            selection = registry.get(p).selection
            shape[selection.dim] = RANK
            assert state["indices"].shape == (RANK,) and selection.draw >= refreshes, name
        assert {*moments.values()} == {torch.Size(shape)}, name


def assert_same_weights(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


# --- transformers -----------------------------------------------------------------------------


def tokens():
    drawn = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in drawn]


def tiny_llama(transformers, options=CYCLIC):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = fresh(lambda: transformers.LlamaForCausalLM(config))
    model.compile(backend="grass", options=options)
    return model


def hf_trainer(transformers, folder, model, optimizer=None, how=None, **options):
    arguments = {
        "use_cpu": True, "bf16": True, "per_device_train_batch_size": BATCH, "max_grad_norm": 0.5,
        "gradient_accumulation_steps": ACCUMULATED, "max_steps": STEPS, "save_steps": SAVED_AT,
        "report_to": [], "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**arguments, **options}),
        train_dataset=tokens(),
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=how,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    return accelerate


@pytest.fixture
def transformers(accelerate):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.mark.parametrize(
    "make, options",
    [
        pytest.param(adamw, CYCLIC, id="AdamW"),
        pytest.param(sgd, TOP, id="SGD, top", marks=pytest.mark.slow),
    ],
)
def test_the_transformers_trainer_trains_in_the_subspace_and_resumes(
    transformers, tmp_path, make, options
):
    def trained(folder, resume=None):
        model = tiny_llama(transformers, options)
        optimizer = make(model.named_parameters())
        trainer = hf_trainer(transformers, folder, model, optimizer)
        trainer.train(resume_from_checkpoint=resume)
        norms = [r["grad_norm"] for r in trainer.state.log_history if "grad_norm" in r]
        assert len(norms) == STEPS and max(norms) > 0.5, "nothing was clipped"
        assert_linear_weights_are_compact(model, optimizer)
        return model, norms

    whole, norms = trained(tmp_path / "whole")
    resumed, again = trained(tmp_path / "resumed", str(tmp_path / f"whole/checkpoint-{SAVED_AT}"))
    assert_same_weights(whole, resumed)
    assert again == norms  # its first half was read from the checkpoint


def test_the_transformers_trainer_builds_our_optimizer_itself(transformers, tmp_path):
    model = tiny_llama(transformers)
    how = {"how": (grass_fx.AdamW, {"lr": 1e-2}), "weight_decay": 0.1}
    trainer = hf_trainer(transformers, tmp_path, model, **how)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert_linear_weights_are_compact(model, optimizer)


def test_an_optimizer_that_the_transformers_trainer_chooses_is_an_error(transformers, tmp_path):
    model = tiny_llama(transformers)
    with pytest.raises(CompactGradError, match="use grass_fx.AdamW"):
        hf_trainer(transformers, tmp_path, model, optim="adamw_torch").train()


# --- accelerate -------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled, make", [("before prepare", adamw), ("after prepare", sgd)])
def test_an_accelerate_loop_trains_in_the_subspace_and_resumes(
    accelerate, tmp_path, compiled, make
):
    def trained(resume=False):
        net, options = fresh(Net), {"cpu": True, "mixed_precision": "bf16"}
        acc = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATED, **options)
        if compiled == "before prepare":
            net.compile(backend="grass", options=CYCLIC)
        inner = make(net.named_parameters())
        model, optimizer, loader, schedule = acc.prepare(
            net, inner, pairs(), CosineAnnealingLR(inner, 20)
        )
        if compiled == "after prepare":
            model.compile(backend="grass", options=CYCLIC)
        done = 0
        if resume:
            acc.load_state(str(tmp_path))
            done, loader = SAVED_AT, acc.skip_first_batches(loader, SAVED_AT * ACCUMULATED)
        norms = []
        for batch in loader:
            with acc.accumulate(model):
                acc.backward(loss_of(model, batch))
                if acc.sync_gradients:
                    norms.append(acc.clip_grad_norm_(model.parameters(), 0.1).item())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if acc.sync_gradients:
                done += 1
                if done == SAVED_AT and not resume:
                    acc.save_state(str(tmp_path))
        assert done == STEPS and min(norms) > 0.1, "nothing was clipped"
        assert_linear_weights_are_compact(net, inner)
        return net

    assert_same_weights(trained(), trained(resume=True))


# --- Lightning --------------------------------------------------------------------------------


def lightning_run(lightning, make, folder, resume=None):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.kinds = Net(), []
            self.net.compile(backend="grass", options=CYCLIC)

        def training_step(self, batch, index):
            return loss_of(self.net, batch)

        def on_before_optimizer_step(self, optimizer):
            self.kinds.append(type(self.net.up.weight.grad))

        def configure_optimizers(self):
            optimizer = make(self.named_parameters())
            schedule = {"scheduler": CosineAnnealingLR(optimizer, 20), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    module = fresh(Module)
    save = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, precision="bf16-mixed", callbacks=[save],
        accumulate_grad_batches=ACCUMULATED, gradient_clip_val=0.1, default_root_dir=folder,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, pairs(SAVED_AT), ckpt_path=resume)
    assert trainer.global_step == STEPS
    assert module.kinds == [grass_fx.CompactGrad] * (STEPS if resume is None else STEPS - SAVED_AT)
    return module, trainer


@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_lightning_module_trains_in_the_subspace_and_resumes(tmp_path, make):
    """From the end of the first epoch; inside one: tests/test_trainers_lightning.py."""
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    whole, trainer = lightning_run(lightning, make, tmp_path / "whole")
    assert_linear_weights_are_compact(whole.net, trainer.optimizers[0])
    saved = tmp_path / f"whole/step={SAVED_AT}.ckpt"
    resumed, _ = lightning_run(lightning, make, tmp_path / "resumed", saved)
    assert_same_weights(whole, resumed)


# --- a plain loop -----------------------------------------------------------------------------


def test_a_plain_loop_with_a_grad_scaler_accumulates_skips_clips_and_resumes(tmp_path):
    def trained(resume=False):
        net = fresh(Net)
        net.compile(backend="grass", options=CYCLIC)
        optimizer = adamw(net.named_parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too large: early steps overflow
        parts, batches, start, scales = (net, optimizer, scaler), itertools.cycle(pairs()), 0, []
        if resume:
            start, states = torch.load(tmp_path / "saved.pt")
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
            batches = itertools.islice(batches, start * ACCUMULATED, None)
        for step in range(start + 1, 17):
            for batch in itertools.islice(batches, ACCUMULATED):
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(net, batch) / ACCUMULATED
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            if step == 13 and not resume:
                torch.save((step, [part.state_dict() for part in parts]), tmp_path / "saved.pt")
        return net, optimizer, scales

    net, optimizer, scales = trained()
    skipped = sum(a > b for a, b in itertools.pairwise([2.0**24, *scales]))
    assert 0 < skipped < 11
    assert registry.get(net.up.weight).step == 16 - skipped
    assert_linear_weights_are_compact(net, optimizer, (16 - skipped) // 2)
    assert_same_weights(net, trained(resume=True)[0])
