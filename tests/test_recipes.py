"""The recipes: what a run saves and resumes, the tokens it reads, what it prints into a file."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoints
import data
import pretrain
import progress
import token_files
from checkpoints import Checkpoints
from grass_fx import AdamW, CompactGrad

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "examples" / "recipes"
SETTINGS = pretrain.Settings(**pretrain.SMOKE, compiler="aot_eager")
SETTINGS = replace(SETTINGS, dtype="bfloat16", checkpoint_activations=True, accumulate=2)


@pytest.fixture(scope="module")
def corpus():
    return data.from_path(ROOT / "docs" / "method.md")


@pytest.fixture
def recipes(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(RECIPES)


# --- pretrain.py ----------------------------------------------------------------------------------


def states(path):
    """What a file has: weights and every tensor of the optimizer, flat."""
    saved = torch.load(path, weights_only=True)
    leaves, _ = torch.utils._pytree.tree_flatten([saved["model"], saved["optimizer"]])
    return saved["step"], leaves


@pytest.mark.parametrize("method", ["grass", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(method, corpus, tmp_path):
    """Selections change in steps 2 and 4; the run stops after 3, between two of them."""
    settings = replace(SETTINGS, method=method)
    torch._dynamo.reset()
    whole = pretrain.train(settings, corpus, kept=Checkpoints(tmp_path / "whole.pt"))
    run = pretrain.training(settings, corpus, kept=Checkpoints(tmp_path / "half.pt", every=3))
    for record in run:
        if record["step"] == 3:
            run.close()  # as if the process had died
    assert states(tmp_path / "half.pt")[0] == 3
    kept = Checkpoints(tmp_path / "resumed.pt", resume=tmp_path / "half.pt")
    log = tmp_path / "log.jsonl"
    log.write_text("earlier\n")
    again = pretrain.train(settings, corpus, log, kept=kept)
    assert [r["step"] for r in again] == [4, 5, 6]
    assert [r["loss"] for r in again] == [r["loss"] for r in whole[3:]]
    assert again[-1]["held_out"] == whole[-1]["held_out"]
    assert len(log.read_text().splitlines()) == 4  # it goes on with the log, too
    step, first = states(tmp_path / "whole.pt")
    assert step == 6 and first[0].dtype == torch.bfloat16
    for a, b in zip(first, states(tmp_path / "resumed.pt")[1], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_micro_batches_add_up_to_the_batch(corpus):
    settings = replace(SETTINGS, dtype="float32", checkpoint_activations=False, batch=4, steps=3)
    losses = []
    for count in (1, 2):
        run = pretrain.training(replace(settings, accumulate=count), corpus)
        losses.append([v for r in run for v in (r["loss"], r.get("held_out", 0))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(SystemExit, match="--accumulate 3 does not divide the 4 sequences"):
        next(pretrain.training(replace(settings, accumulate=3), corpus))


def test_what_cannot_be_resumed_is_told(corpus, tmp_path):
    path = tmp_path / "run.pt"
    settings = replace(SETTINGS, steps=2, method="full")
    parts = pretrain.set_up(settings)
    given = {"model": parts[0], "optimizer": parts[2]}
    checkpoints.write(path, settings, 2, len(corpus.train), given)
    for change, message in (
        ({"rank": 0.5, "seq": 16}, "the saved run had --seq 32, --rank 0.25"),
        ({"parallel": "sharded"}, "not with --parallel sharded"),
        ({"device": "cpu"}, "that run is at its end, after 2 steps"),
    ):
        with pytest.raises(SystemExit, match=message):
            checkpoints.read(path, replace(settings, **change), len(corpus.train), given)
    with pytest.raises(SystemExit, match="tokens of text, not 7"):
        checkpoints.read(path, settings, 7, given)
    with pytest.raises(SystemExit, match="other.pt: there is no such file"):
        checkpoints.read(tmp_path / "other.pt", settings, len(corpus.train), given)
    pretrain.save(parts[0], path)
    with pytest.raises(SystemExit, match="no state of an optimizer"):
        checkpoints.read(path, settings, 7, given)


def test_a_file_gets_lines_and_no_bar(monkeypatch, capsys):
    flags = ["--smoke", "--compiler", "aot_eager", "--method", "full"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags])
    pretrain.main()
    printed, errors = capsys.readouterr()
    assert "it/s" not in errors + printed and "\r" not in errors + printed
    lines = [line for line in printed.splitlines() if line.startswith("full: step")]
    assert [line.split(", loss")[0] for line in lines] == [f"full: step {n} of 6" for n in (3, 6)]


def test_records_are_what_tensorboard_shows(corpus, tmp_path):
    settings = replace(SETTINGS, method="full", steps=1)
    (record,) = pretrain.training(settings, corpus)
    shown = dict(progress.scalars_of(record, tokens=64))
    assert shown["loss/train"] == record["loss"] and shown["learning rate"] == settings.linear_lr
    assert shown["tokens per second"] == 64 / record["seconds"]
    assert shown["MB/weights"] == record["bytes"]["weights"] / 1e6
    try:
        scalars = progress.Scalars(tmp_path)
    except SystemExit as error:
        assert "pip install tensorboard" in str(error)
        return
    scalars.add(record, tokens=64)
    scalars.close()
    (file,) = tmp_path.iterdir()
    assert b"tokens per second" in file.read_bytes()


# --- tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json of 300 tokens, in a folder as Hugging Face has them."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_file_of_tokens_is_the_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "PIECE", 1000)  # several pieces
    made, text = token_files.load_tokenizer(tokenizer), ROOT / "docs" / "logs.md"
    out = tmp_path / "tokens.bin"
    count = token_files.write(text, made, out, "<|end|>")
    assert out.stat().st_size == 2 * count
    corpus = token_files.from_file(out, 300)
    ids = torch.cat([corpus.train, corpus.held_out]).long().tolist()
    assert ids[-1] == made.token_to_id("<|end|>") and len(ids) == count
    assert made.decode(ids[:-1]) == text.read_text(encoding="utf-8")
    assert len(corpus.held_out) == count // token_files.HELD_OUT_EVERY
    with pytest.raises(SystemExit, match="is none of a vocabulary of 256"):
        token_files.from_file(out, 256)
    with pytest.raises(SystemExit, match="the tokenizer has no such token"):
        token_files.write(text, made, out, "<|no|>")


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokens, path = torch.tensor([5, 70_000, 128_255] * 20), tmp_path / "tokens.bin"
    path.write_bytes(tokens.to(torch.uint32).numpy().tobytes())
    corpus = token_files.from_file(path, 128_256)
    assert corpus.train.dtype == torch.uint32
    batches = data.Batches(corpus.train, batch=2, seq=8, seed=0)
    drawn, targets = next(batches)
    assert set(drawn.flatten().tolist()) <= {5, 70_000, 128_255}
    assert drawn[:, 1:].equal(targets[:, :-1])
    path.write_bytes(b"123")
    with pytest.raises(SystemExit, match="its size is not that of"):
        token_files.from_file(path, 128_256)


def test_a_tokenizer_makes_the_vocabulary_of_the_model(tokenizer):
    text = str(ROOT / "docs" / "logs.md")
    settings = replace(SETTINGS, tokenizer=str(tokenizer), data=text, seq=600)
    model = pretrain.new_model(settings)
    assert model.embed.weight.shape[0] == 300 and model.embed.weight.dtype == torch.bfloat16
    assert len(model.cos) == 600  # longer than the size's own
    corpus = token_files.corpus_of(settings)
    assert int(corpus.train.long().max()) < 300 < len(corpus.train) < len(Path(text).read_bytes())
    assert token_files.unit(settings) == "nats/token"
    assert token_files.unit(SETTINGS) == "nats/byte"
    with pytest.raises(SystemExit, match=r"there is no file .*none"):
        token_files.load_tokenizer("none")


# --- finetune_*.py --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:grass has taken")
def test_what_trains_and_in_which_group(recipes, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import finetune_hf
    import small_model

    small_model.save(tmp_path, hidden=16, layers=1, vocab=300)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    finetune_hf.freeze(model, ["*embed_tokens*", "model.norm*"])
    groups = finetune_hf.groups_of(model, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(8, 0.1), (2, 0.0)]
    model.requires_grad_()
    groups = finetune_hf.groups_of(model, weight_decay=0.1)
    assert [p for p, _ in groups[-1]["params"]] == ["model.embed_tokens.weight"]
    assert groups[-1]["scale"] == 1.0
    with pytest.raises(SystemExit, match="--freeze 'embed': no parameter"):
        finetune_hf.freeze(model, ["embed"])

    given = ["--model", f"{tmp_path}/model", "--rank", "0.25", "--signs", "--compiler", "aot_eager"]
    model = finetune_hf.load(finetune_hf.parser("").parse_args(given))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(64).reshape(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    matrix, head = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
    columns = {name: isinstance(p.grad, CompactGrad) for name, p in model.named_parameters()}
    assert columns[matrix] and not columns[head] and sum(columns.values()) == 7
    AdamW(finetune_hf.groups_of(model, 0.0), lr=1e-2).step()
    moved = {name: (p != before[name]).any(0) for name, p in model.named_parameters()}
    assert moved[matrix].all() and moved[head].all()
    model.lm_head.weight = model.get_input_embeddings().weight
    assert finetune_hf.signs(model, lookups=False)["exclude"] == ["model.embed_tokens.weight"]
    with pytest.raises(SystemExit, match="omit --lookups"):
        finetune_hf.signs(model, lookups=True)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    train, held_out = finetune_hf.tokens_of(tmp_path / "text.txt", tokenizer)
    whole = torch.cat([train, held_out]).tolist()
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole[:-1]) == (tmp_path / "text.txt").read_text(encoding="utf-8")
    blocks = finetune_hf.Blocks(train, 16)
    assert len(blocks) == len(train) // 16
    assert blocks[1]["input_ids"].tolist() == train[16:32].tolist()
    with pytest.raises(SystemExit, match="no folder with"):
        finetune_hf.tokens_of(tmp_path / "model", tokenizer)


def smoke(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--smoke"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RESUMED = "resumed after step 3: the same losses, the same weights"


@pytest.mark.slow
@pytest.mark.parametrize("more, count", [((), 15), (("--signs",), 14)])
def test_the_trainer(recipes, more, count):
    printed = smoke(str(RECIPES / "finetune_hf.py"), *more)
    assert RESUMED in printed and f"{count} of 21 parameters train by columns" in printed


@pytest.mark.slow
def test_the_trainer_of_trl(recipes):
    printed = smoke(str(RECIPES / "finetune_trl.py"))
    if "skipped" in printed:
        pytest.skip(printed)
    assert RESUMED in printed and "14 of 21 parameters train by columns" in printed


@pytest.mark.slow
def test_fsdp2_on_two_processes(recipes):
    start = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "--")
    printed = smoke(*start, str(RECIPES / "finetune_fsdp2.py"))
    assert RESUMED in printed and printed.count("14 compact gradients") == 2
