"""accelerate, the Trainer of transformers and Lightning shard with FSDP2, and train as one process.

accelerate, and with it the Trainer, takes FSDP2 only where it finds GPUs, and DDP on CPUs. So
:func:`shards` tells it that it shards; all calls after that are the library's own, on CPUs. How
accelerate decides, and what GPUs change, is not tested. Lightning shards on CPUs by itself.
"""

import logging
import os
import re
from pathlib import Path

import pytest
import test_fsdp2 as fsdp2
import torch
import torch.distributed as dist
from test_trainers import tokens
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import grass_fx
from ranks import spawn

STEPS = 6
PAGE = Path(__file__).parent.parent / "docs/distributed.md"
options = fsdp2.OPTIONS

# What the log says of a graph: the page has these lines.
OF_A_BLOCK = "2 weights taken, 0 left; 2 selections pushed, 0 stopped"
OF_A_LLAMA_LAYER = "7 weights taken, 0 left; 7 selections pushed, 0 stopped"

CONFIGURATION = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Block
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""


class Lines(logging.Handler):
    """What grass_fx tells about the graphs that it compiles, without the time that it took."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logger = logging.getLogger("grass_fx.backend")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record):
        self.lines += re.findall(r"^(\d+ weights taken.*); \d+ ms; graph ", record.getMessage())


def as_torchrun(rank):
    ranks = str(dist.get_world_size())
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")


def alone():
    """One process on whole batches, with the optimizer of the page's snippets."""
    model = fsdp2.build()
    fsdp2.compile_blocks(model, **fsdp2.options())
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        model(fsdp2.batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return fsdp2.whole(model)


# --- accelerate -----------------------------------------------------------------------------------


def launched(folder):
    """The environment that ``accelerate launch --config_file`` gives its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = Path(folder) / f"of {os.environ['RANK']}.yaml"
    file.write_text(CONFIGURATION, encoding="utf-8")
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.use_fsdp and arguments.num_processes == fsdp2.RANKS
    environment = prepare_multi_gpu_env(arguments)
    return {k: v for k, v in environment.items() if k.startswith(("FSDP_", "ACCELERATE_"))}


def shards(accelerator, **plugin):
    """On CPUs it would take DDP; what follows is what it does where there are GPUs."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    for state in (accelerator.state, PartialState()):  # as AcceleratorState does
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
    assert accelerator.is_fsdp2
    return accelerator


def prepared(accelerator, model):
    for block in model.blocks:
        block.compile(backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def trained(accelerator, model, optimizer, rank, steps):
    for step in steps:
        accelerator.backward(model(fsdp2.batch(step, rank, 2)).square().mean())
        assert fsdp2.taken(model) == 4
        optimizer.step()
        optimizer.zero_grad()
    return fsdp2.whole(model)


def with_accelerate(rank, folder):
    from accelerate import Accelerator

    as_torchrun(rank)
    want, told = alone(), Lines()
    os.environ.update(launched(folder))
    accelerator = shards(Accelerator(cpu=True))
    model, optimizer = prepared(accelerator, fsdp2.build())
    got = trained(accelerator, model, optimizer, rank, range(STEPS))
    fsdp2.check(got, want, "accelerate")
    assert told.lines[0] == OF_A_BLOCK


@pytest.mark.slow
def test_accelerate_with_its_configuration_file(tmp_path):
    pytest.importorskip("accelerate")
    spawn(with_accelerate, fsdp2.RANKS, str(tmp_path))


# --- What is left dense ---------------------------------------------------------------------------


class Uneven(fsdp2.Block):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 33), nn.Linear(33, 16)


def says_what_is_left(rank):
    page, told = PAGE.read_text(encoding="utf-8"), Lines()
    model = fsdp2.build(Uneven)
    fsdp2.compile_then_shard(model, fsdp2.options())
    model(fsdp2.batch(0, rank, 2))
    assert f"```text\n{told.lines[0]}\n```" in page and "up.weight" in told.lines[0]
    model = fsdp2.build()
    fsdp2.compile_blocks(model, **fsdp2.options())
    fsdp2.shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    with pytest.warns(grass_fx.GrassWarning) as warned:
        model(fsdp2.batch(0, rank, 2))
    begins, _, _ = str(warned[0].message).partition(" If one should")
    assert f"```text\n{begins}\n```" in page and "offloaded" in begins


@pytest.mark.slow
def test_the_page_has_what_is_told_of_dense_weights():
    spawn(says_what_is_left, fsdp2.RANKS)


# --- transformers ---------------------------------------------------------------------------------


def llama(transformers):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def trainers(transformers):
    """The Trainer, which shards on CPUs, and counts the compact gradients of each step."""

    class Counts(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **rest):
            self.of.taken.append(fsdp2.taken(model))

    class Sharding(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.taken, counts = [], Counts()
            counts.of = self
            self.add_callback(counts)
            self.remove_callback(transformers.PrinterCallback)

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if self.args.fsdp_plugin_args is not None:
                shards(self.accelerator, **self.args.fsdp_plugin_args)
                self.is_fsdp_enabled = True

    return Sharding


def arguments_of_a_run(**more):
    """Two micro-batches a step, clipping, the Trainer's own schedule and parameter groups."""
    rows = 4 if not dist.is_initialized() else 4 // dist.get_world_size()
    return {
        "use_cpu": True, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5, "max_steps": STEPS, "weight_decay": 0.1, "report_to": [],
        "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", **more,
    }  # fmt: skip


def weights(model):
    return dict(zip(dict(model.named_parameters()), fsdp2.whole(model), strict=True))


def one_trainer(folder):
    """Without a process group: one process."""
    import transformers

    model = llama(transformers)
    for block in model.model.layers:
        block.compile(backend="grass", options=options)
    trainer = trainers(transformers)(
        model,
        transformers.TrainingArguments(folder, **arguments_of_a_run()),
        train_dataset=tokens(),
        optimizer_cls_and_kwargs=(grass_fx.AdamW, {"lr": 1e-3}),
    )
    trainer.train()
    return trainer


def sharding_trainer(folder, resume=None, **more):
    import transformers
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    AcceleratorState._reset_state(True)
    Trainer, model, data = trainers(transformers), llama(transformers), tokens()
    more = {"output_dir": folder, **arguments_of_a_run(ddp_backend="gloo", **more)}
    for block in model.model.layers:
        block.compile(backend="grass", options=options)
    arguments = TrainingArguments(
        fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        **more,
    )

    class Resuming(Trainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            if resume is not None:
                grass_fx.lay_out_from(optimizer, f"{resume}/optimizer.bin", self.model)
            return optimizer

    built_there = (grass_fx.AdamW, {"lr": 1e-3})
    trainer = Resuming(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=built_there)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def with_the_trainer(rank, folder):
    as_torchrun(rank)
    want, told = torch.load(f"{folder}/alone.pt"), Lines()
    trainer = sharding_trainer(folder)
    assert trainer.taken == [14] * STEPS
    assert told.lines[0] == OF_A_LLAMA_LAYER
    got = weights(trainer.model)
    assert list(got) == list(want)
    fsdp2.check(got.values(), want.values(), "Trainer")
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert len(norms) == STEPS and max(norms) > 0.5, "nothing was clipped"


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trainer = one_trainer(str(tmp_path))
    assert trainer.taken == [14] * STEPS
    torch.save(weights(trainer.model), tmp_path / "alone.pt")
    spawn(with_the_trainer, fsdp2.RANKS, str(tmp_path))


# --- Lightning ------------------------------------------------------------------------------------


def with_lightning(rank):
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    as_torchrun(rank)
    want, told = alone(), Lines()

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = fsdp2.build()

        def configure_model(self):
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks:
                block.compile(backend="grass", options=options)
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

        def configure_optimizers(self):
            return grass_fx.AdamW(self.parameters(), lr=1e-3)

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def on_before_optimizer_step(self, optimizer):
            assert fsdp2.taken(self) == 4

    ranks = dist.get_world_size()
    several = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=ranks, strategy=several,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    data = torch.cat([fsdp2.batch(step) for step in range(STEPS)])
    mine = DistributedSampler(data, fsdp2.RANKS, rank, shuffle=False)
    module = Training()
    trainer.fit(module, DataLoader(data, batch_size=4, sampler=mine))
    assert trainer.global_step == STEPS and told.lines[0] == OF_A_BLOCK
    fsdp2.check(fsdp2.whole(module.net), want, "Lightning")


@pytest.mark.slow
def test_lightning():
    pytest.importorskip("lightning")
    spawn(with_lightning, fsdp2.RANKS)
