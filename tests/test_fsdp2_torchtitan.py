"""torchtitan's calls for its llama3, in its order: two processes train as one.

torchtitan is not among the libraries that the tests need. ``parallelize`` and ``Training`` make the
calls of its version 0.3.0 (``models/llama3/parallelize.py``, ``distributed/fsdp.py``,
``components/optimizer``, ``trainer.py``), with a small model that has its names. If torchtitan is
installed, the last test calls its own functions, with its debug model.

Gloo cannot multiply as it sums, which NCCL does for a divide factor. So sums are forced.
"""

import dataclasses

import pytest
import test_fsdp2 as fsdp2
import test_fsdp2_libraries as libraries
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import grass_fx
from ranks import spawn

STEPS, VOCABULARY, SIZE, IGNORED = 6, 40, 16, -100
BACKEND = "grass_of_8"
OF_A_BLOCK = "5 weights taken, 0 left; 5 selections pushed, 0 stopped"
grass_fx.register_backend(BACKEND, rank=8, refresh_every=2, compiler="aot_eager")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wqkv, self.wo = (
            nn.Linear(SIZE, 3 * SIZE, bias=False),
            nn.Linear(SIZE, SIZE, bias=False),
        )

    def forward(self, x):
        q, k, v = self.wqkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(*size, bias=False) for size in ((SIZE, 32), (32, SIZE), (SIZE, 32))
        )

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)

    def forward(self, x):
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, SIZE)
        self.layers = nn.ModuleDict({str(k): TransformerBlock() for k in range(2)})
        self.norm, self.lm_head = nn.RMSNorm(SIZE), nn.Linear(SIZE, VOCABULARY, bias=False)

    def forward(self, tokens):
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h)
        return self.lm_head(self.norm(h))


def selective_checkpoint(block):
    """The products are kept, but for every second one: those are recomputed."""

    def contexts():
        count = {True: 0, False: 0}

        def policy(ctx, func, *args, **kwargs):
            if func != torch.ops.aten.mm.default:
                return CheckpointPolicy.PREFER_RECOMPUTE
            count[ctx.is_recompute] += 1
            even = count[ctx.is_recompute] % 2 == 0
            return CheckpointPolicy.PREFER_RECOMPUTE if even else CheckpointPolicy.MUST_SAVE

        return create_selective_checkpoint_contexts(policy)

    return checkpoint_wrapper(
        block, context_fn=contexts, preserve_rng_state=True, determinism_check="default",
        early_stop=False, debug=False,
    )  # fmt: skip


def full_checkpoint(block):
    return checkpoint_wrapper(block, preserve_rng_state=True, early_stop=False)


def parallelize(model, checkpoint, param_dtype, reduce_dtype):
    if checkpoint is not None:
        for name, block in model.layers.named_children():
            model.layers.register_module(name, checkpoint(block))
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for _, block in model.layers.named_children():
        block.compile(backend=BACKEND, fullgraph=True)
    if not dist.is_initialized():
        return model
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    how = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), "mp_policy": policy}
    fully_shard(model.tok_embeddings, **how, reshard_after_forward=True)
    fully_shard([model.norm, model.lm_head], **how, reshard_after_forward=False)
    for block in model.layers.values():
        fully_shard(block, **how, reshard_after_forward=True)
    fully_shard(model, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


class Training:
    def __init__(self, checkpoint, dtype=torch.float64, **dtypes):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.dtypes = {"param_dtype": None, "reduce_dtype": None, **dtypes}
        self.model = parallelize(Decoder().to(dtype), checkpoint, **self.dtypes)
        names = [name for name, _ in self.model.named_parameters()]
        group = {"params": [*self.model.parameters()], "param_names": names, "fused": True,
                 "foreach": False, "lr": 1e-2, "weight_decay": 0.1}  # fmt: skip
        self.optimizer = grass_fx.AdamW([group])
        self.schedule = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 2))

    def batch(self, step):
        """Tokens and labels of this process; it has other numbers of valid labels than another."""
        gen = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (4, 13), generator=gen)
        inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[0, : 3 + step] = IGNORED
        if not dist.is_initialized():
            return inputs, labels
        rank, ranks = dist.get_rank(), dist.get_world_size()
        return inputs.chunk(ranks)[rank], labels.chunk(ranks)[rank]

    def step(self, at):
        self.optimizer.zero_grad(set_to_none=True)
        inputs, labels = self.batch(at)
        valid = (labels != IGNORED).sum()
        if dist.is_initialized():
            dist.all_reduce(valid)
        logits = self.model(inputs)
        loss = F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
            labels.flatten(), reduction="sum", ignore_index=IGNORED,
        ) / valid  # fmt: skip
        loss.backward()
        parameters = list(self.model.parameters())
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, 2.0, False, True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, norm, True)
        assert norm > 0.5 and fsdp2.taken(self.model) == 10
        self.optimizer.step()
        self.schedule.step()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
        return loss

    def run(self):
        self.losses = torch.stack([self.step(at) for at in range(STEPS)])
        return fsdp2.whole(self.model)


def two(rank, folder):
    want = torch.load(f"{folder}/alone.pt")
    for checkpoint in (None, full_checkpoint, selective_checkpoint):
        fsdp2.check(Training(checkpoint).run(), want["weights"], f"{checkpoint}")
    low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    told = libraries.Lines()
    training = Training(selective_checkpoint, torch.float32, **low)
    training.run()
    assert told.lines == [OF_A_BLOCK]
    torch.testing.assert_close(training.losses.double(), want["losses"], rtol=2e-2, atol=0)
    for p in training.model.parameters():
        state = training.optimizer.state[p]
        assert p.dtype == state["exp_avg"].dtype == torch.float32
        assert ("indices" in state) == (p.dim() == 2 and p.shape[0] != VOCABULARY)


@pytest.mark.slow
def test_blocks_and_heads_with_checkpoints_and_low_precision(tmp_path):
    training = Training(None)
    torch.save({"weights": training.run(), "losses": training.losses}, tmp_path / "alone.pt")
    spawn(two, fsdp2.RANKS, str(tmp_path))


# --- torchtitan itself ----------------------------------------------------------------------------


def optimizers():
    from torchtitan.components.optimizer import OptimizersContainer

    class GrassOptimizers(OptimizersContainer):
        """torchtitan's optimizers, and one more that it finds by its name."""

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(OptimizersContainer.Config):
            pass

        @staticmethod
        def _resolve_optimizer_factory(name):
            if name == "GrassAdamW":
                return grass_fx.AdamW
            return OptimizersContainer._resolve_optimizer_factory(name)

    return GrassOptimizers


def with_torchtitan(rank):
    from torch.nn.attention import SDPBackend
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims, parallel_dims
    from torchtitan.distributed import utils as of_titan
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    libraries.as_torchrun(rank)
    parallel_dims.device_type = "cpu"
    parallelism, told = ParallelismConfig(spmd_backend="partial_dtensor"), libraries.Lines()
    of_titan.set_spmd_backend(parallelism.spmd_backend)
    dims = ParallelDims(
        dp_replicate=1, dp_shard=2, cp=1, tp=1, pp=1, ep=1, world_size=2,
        spmd_backend=parallelism.spmd_backend,
    )  # fmt: skip
    dims.build_mesh()

    def parallel(model, components=("model", "loss")):
        compiles = CompileConfig(enable=True, components=[*components], backend=BACKEND)
        return spec.parallelize_fn(
            model, parallel_dims=dims, training=TrainingConfig(seq_len=12), parallelism=parallelism,
            compile_config=compiles, ac_config=SelectiveAC.Config(), dump_folder="",
        )  # fmt: skip

    spec = model_registry("debugmodel")
    with pytest.raises(ValueError, match="Model uses FlexAttention but compile backend"):
        parallel(spec.model.build())
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:  # its own attention, varlen as well as flex, needs a GPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    ScaledDotProductAttention.sdpa_backends = [SDPBackend.MATH]
    set_llama3_sharding_config(spec.model, enable_sp=True)
    by_itself = training_of(parallel(spec.model.build()), of_titan)
    assert told.lines == [OF_A_BLOCK]
    torch._dynamo.reset()
    spec = dataclasses.replace(spec, parallelize_fn=parallelize_llama_and_compile)
    assert training_of(parallel(spec.model.build(), ["loss"]), of_titan) == by_itself
    assert told.lines == [OF_A_BLOCK] * 2


def parallelize_llama_and_compile(model, **how):
    from torchtitan.models.llama3 import parallelize_llama

    model = parallelize_llama(model, **how)
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for block in model.layers.children():
        block.compile(backend=BACKEND, fullgraph=True)
    return model


def training_of(model, of_titan):
    from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    model.init_states(buffer_device=torch.device("cpu"))
    group = ParamGroupConfig(
        pattern=".*", optimizer_name="GrassAdamW", optimizer_kwargs={"lr": 1e-3}
    )
    built = optimizers().Config(param_groups=[group]).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=2).build(
        optimizers=built, training_steps=STEPS
    )
    tokens = torch.randint(2048, (2, 13), generator=torch.Generator().manual_seed(dist.get_rank()))
    losses = []
    for _ in range(STEPS):
        built.zero_grad()
        logits = model(tokens[:, :-1], positions=torch.arange(12).expand(2, -1))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()) / 2
        loss.backward()
        of_titan.clip_grad_norm_(list(model.parameters()), 1.0, foreach=True)
        assert fsdp2.taken(model) == 10
        built.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert "state.layers.0.attention.wo.weight.indices" in built.state_dict()
    return losses


@pytest.mark.slow
def test_the_functions_of_torchtitan():
    pytest.importorskip("torchtitan", minversion="0.3.0")
    spawn(with_torchtitan, fsdp2.RANKS)


def test_the_page_has_the_lines_of_the_log():
    page = libraries.PAGE.read_text(encoding="utf-8")
    for line in (OF_A_BLOCK, libraries.OF_A_BLOCK, libraries.OF_A_LLAMA_LAYER):
        assert f"| `{line}`" in page
