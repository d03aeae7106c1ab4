"""Runs that accelerate and the Trainer shard with FSDP2 go on from what they saved.

A new model and a new optimizer load before their first forward, as in a new process.
"""

import pytest
import test_fsdp2 as fsdp2
import test_fsdp2_libraries as libraries

import grass_fx
from grass_fx.errors import GrassWarning, StateError
from ranks import spawn

STEPS, SAVED_AT = libraries.STEPS, 3


def with_accelerate(rank, folder):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    libraries.as_torchrun(rank)
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        AcceleratorState._reset_state(True)
        how = {
            "fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap",
            "transformer_cls_names_to_wrap": ["Block"], "state_dict_type": kind,
            "cpu_ram_efficient_loading": False,
        }  # fmt: skip
        accelerator = libraries.shards(Accelerator(cpu=True), **how)
        model, optimizer = libraries.prepared(accelerator, fsdp2.build())
        libraries.trained(accelerator, model, optimizer, rank, range(SAVED_AT))
        accelerator.save_state(f"{folder}/{kind}")
        want = libraries.trained(accelerator, model, optimizer, rank, range(SAVED_AT, STEPS))
        AcceleratorState._reset_state(True)
        accelerator = libraries.shards(Accelerator(cpu=True), **how)
        model, optimizer = libraries.prepared(accelerator, fsdp2.build())
        told, failed = pytest.warns(GrassWarning), pytest.raises((StateError, AssertionError))
        with told, failed:  # ours, or one of torch
            accelerator.load_state(f"{folder}/{kind}")
        saved = "optimizer_0" if kind == "SHARDED_STATE_DICT" else "optimizer.bin"
        grass_fx.lay_out_from(optimizer, f"{folder}/{kind}/{saved}", model)
        accelerator.load_state(f"{folder}/{kind}")
        got = libraries.trained(accelerator, model, optimizer, rank, range(SAVED_AT, STEPS))
        fsdp2.check(got, want, f"accelerate, {kind}")


def with_the_trainer(rank, folder):
    libraries.as_torchrun(rank)
    how = {"save_strategy": "steps", "save_steps": SAVED_AT}
    whole = libraries.sharding_trainer(f"{folder}/whole", **how)
    saved = f"{folder}/whole/checkpoint-{SAVED_AT}"
    resumed = libraries.sharding_trainer(f"{folder}/resumed", resume=saved, **how)
    assert len(resumed.taken) == STEPS - SAVED_AT
    got, want = (libraries.weights(trainer.model) for trainer in (resumed, whole))
    fsdp2.check(got.values(), want.values(), "Trainer")


@pytest.mark.slow
def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    spawn(with_accelerate, fsdp2.RANKS, str(tmp_path))


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    spawn(with_the_trainer, fsdp2.RANKS, str(tmp_path))
