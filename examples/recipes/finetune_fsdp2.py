"""Fine-tune all weights of a pretrained language model on several GPUs, with torch's FSDP2.

    pip install transformers
    torchrun --nproc-per-node 8 examples/recipes/finetune_fsdp2.py --model PATH_OR_NAME \
        --data my/text.txt --out runs/tuned
    torchrun --nproc-per-node 8 examples/recipes/finetune_fsdp2.py ... --resume
    torchrun --nproc-per-node 2 examples/recipes/finetune_fsdp2.py --smoke    # on CPUs, with gloo

The loop is a plain one. Each layer is compiled with `backend="grass"` and then sharded. Options are
those of finetune_hf.py; --batch and --accumulate are of each process.
"""

import argparse
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_hf as hf
import grass_fx


def load(args: argparse.Namespace) -> nn.Module:
    """The pretrained model: its layers compiled, then everything sharded."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hf.freeze(model, args.freeze)
    options = {"rank": args.rank, "refresh_every": args.refresh_every, "compiler": args.compiler}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.model.layers:
        layer.compile(backend="grass", options=options)
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy).train()


def batch_of(rows: Tensor, step: int, micro: int, args: argparse.Namespace) -> Tensor:
    """This process's sequences of a micro-batch, by the number of the step alone."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    of_step = ranks * args.batch * args.accumulate
    first = step * of_step + (micro * ranks + rank) * args.batch
    places = torch.arange(first, first + args.batch)
    epochs = places // len(rows)
    shuffled = {
        epoch: torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + epoch))
        for epoch in set(epochs.tolist())
    }
    chosen = [shuffled[e][p % len(rows)] for e, p in zip(epochs.tolist(), places, strict=True)]
    return rows[torch.stack(chosen)].long()


def rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over a twentieth of the run, then half a cosine."""
    warm = max(1, args.steps // 20)
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


def train(args: argparse.Namespace, device: str) -> tuple[nn.Module, list[float]]:
    """Train to the end, from the last checkpoint if --resume; the losses of the steps made."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = hf.blocks(args, tokenizer)[0].rows
    model = load(args)
    optimizer = grass_fx.AdamW(hf.groups_of(model, args.weight_decay), lr=args.lr, seed=args.seed)
    done, losses = resume(model, optimizer, args) if args.resume else 0, []
    for step in range(done, args.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        total = torch.zeros((), device=device)
        for micro in range(args.accumulate):
            ids = batch_of(rows, step, micro, args).to(device)
            loss = model(input_ids=ids, labels=ids).loss / args.accumulate
            loss.backward()
            total += loss.detach()
        if step == done and dist.get_rank() == 0:
            compact = [p for p in model.parameters() if isinstance(p.grad, grass_fx.CompactGrad)]
            print(f"{len(compact)} compact gradients")
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}: loss {losses[-1]:.4f}, {seconds:.2f} s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(model, optimizer, args.out / f"checkpoint-{step + 1}")
    write(model, tokenizer, args.out / "model")
    return model, losses


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Every process writes its part; a folder with a .metadata is complete."""
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder)


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> int:
    """Load the last checkpoint; the steps that it has behind it."""
    complete = [path.parent for path in args.out.glob("checkpoint-*/.metadata")]
    if not complete:
        raise SystemExit(f"--resume: there is no checkpoint in {args.out}")
    last = max(complete, key=lambda path: int(path.name.split("-")[1]))
    grass_fx.lay_out_from(optimizer, str(last), model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=last)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )
    return int(last.name.split("-")[1])


def write(model: nn.Module, tokenizer, folder: Path) -> None:
    """The whole model in one folder, as save_pretrained writes it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)  # all processes take part
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        print(f"wrote {folder}")
    dist.barrier()


def smoke(args: argparse.Namespace, device: str) -> None:
    """The same with a small model in a folder: a resumed run has the same losses and weights."""
    import small_model

    torch.set_num_threads(1)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        small_model.save(Path(folder[0]))
    dist.barrier()
    vars(args).update(hf.SMOKE, model=f"{folder[0]}/model", data=Path(folder[0], "text.txt"))
    vars(args).update(accumulate=2, compiler="aot_eager", out=Path(folder[0], "out"))
    model, first = train(args, device)
    dist.barrier()
    if dist.get_rank() == 0:
        (args.out / f"checkpoint-{args.steps}").rename(Path(folder[0], "end"))
    dist.barrier()
    args.resume = True
    resumed, again = train(args, device)
    assert again == first[args.save_every :], (again, first)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
    if dist.get_rank() == 0:
        print(f"resumed after step {args.save_every}: the same losses, the same weights")
        shutil.rmtree(folder[0])


def main() -> None:
    made = hf.parser(__doc__.splitlines()[0])
    args = made.parse_args()
    hf.quiet_in_a_file()
    if args.lookups or args.signs or args.tensorboard:
        made.error("--lookups, --signs and --tensorboard are not for this script")
    if not args.smoke and (args.model is None or args.data is None):
        made.error("--model and --data are needed (or --smoke)")
    if "RANK" not in os.environ:
        made.error("start it with torchrun --nproc-per-node N")
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group()
    try:
        smoke(args, device) if args.smoke else train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
