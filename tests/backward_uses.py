"""What people do with torch.compile, continued: transforms, other backwards, between two steps."""

import functools
import threading

import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from compile_world import use

# --- transforms of functions ----------------------------------------------------------------------

TRANSFORMED = "functorch differentiates inside the graph: its gradients are full ones"


@use("vmap batches the products: its gradients are full ones", compact=0)
def vmap_inside(w):
    return w.train(w.compile(lambda x: torch.vmap(w.model)(x)))


@use(TRANSFORMED, compact=0)
def func_grad_inside(w):
    named = dict(w.model.named_parameters())

    def loss(given, x):
        return w.loss(lambda x: torch.func.functional_call(w.model, given, (x,)), x)

    compiled = w.compile(lambda given, x: torch.func.grad_and_value(loss)(given, x))

    def backward(x):
        grads, value = compiled(named, x)
        for name, p in named.items():
            p.grad = grads[name]
        return value

    return w.steps(backward)


@use()
def functional_call(w):
    named = dict(w.model.named_parameters())
    return w.train(w.compile(lambda x: torch.func.functional_call(w.model, named, (x,))))


@use("branches of cond are graphs of their own, and train dense", compact=2)
def cond_inside(w):
    first, second = w.model.layers

    def call(x):
        return second(torch.cond(x.sum() > 0, lambda x: first(x), lambda x: 2 * first(x), (x,)))

    return w.train(w.compile(call))


@use("the body of scan is a graph of its own, and trains dense", compact=0, quick=True)
def scan_inside(w):
    from torch._higher_order_ops.scan import scan

    first, second = w.model.layers

    def call(x):
        last, each = scan(lambda c, x: (first(c + x) / 4, second(x)), torch.zeros_like(x[0]), x)
        return each + last

    return w.train(w.compile(call))


# --- checkpointing, hooks, other backwards --------------------------------------------------------


def checkpointed(layers, **more):
    def call(x):
        for layer in layers:
            x = checkpoint(layer, x, **more)
        return x

    return call


@use(quick=True)
def checkpoint_inside(w):
    return w.train(w.compile(checkpointed(w.model.layers, use_reentrant=False)))


@use()
def selective_checkpoint_inside(w):
    saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    call = checkpointed(w.model.layers, use_reentrant=False, context_fn=contexts)
    return w.train(w.compile(call))


@use()
def checkpoint_around_regions(w):
    for layer in w.model.layers:
        layer.compile(**w.how)
    return w.train(checkpointed(w.model.layers, use_reentrant=False))


@use()
def reentrant_checkpoint_around_regions(w):
    for layer in w.model.layers:
        layer.compile(**w.how)
    call = checkpointed(w.model.layers, use_reentrant=True)
    return w.train(lambda x: call(x.clone().requires_grad_()))


@use("its gradients are twice as large")
def backward_twice(w):
    call = w.compile()

    def backward(x):
        loss = w.loss(call, x)
        loss.backward(retain_graph=True)
        loss.backward()
        return loss

    return w.steps(backward)


@use(quick=True)
def save_on_cpu(w):
    call = w.compile()

    def backward(x):
        with torch.autograd.graph.save_on_cpu():
            loss = w.loss(call, x)
            loss.backward()
        return loss

    return w.steps(backward)


@use()
def anomaly_mode(w):
    with torch.autograd.detect_anomaly():
        return w.train(w.compile())


@use()
def hooks_of_parameters(w):
    seen = []
    for p in w.parameters():
        p.register_hook(lambda grad: seen.append("gradient"))
        p.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    losses = w.train(w.compile(), 3)
    count = 3 * len(w.parameters())
    assert (seen.count("gradient"), seen.count("accumulated")) == (count, count)
    return losses


@use()
def backward_hooks_of_modules(w):
    seen = []
    for layer in w.model.layers:
        layer.register_full_backward_hook(lambda *given: seen.append(1))
    losses = w.train(w.compile(), 3)
    assert len(seen) == 3 * len(w.model.layers)
    return losses


@use()
def compiled_autograd_of_a_model(w):
    with dynamo.patch(compiled_autograd=True):
        return w.train(w.compile())


@use()
def compiled_autograd_of_a_step(w):
    with dynamo.patch(compiled_autograd=True):

        @w.compile
        def step(x):
            loss = w.loss(w.model, x)
            loss.backward()
            return loss

        return w.steps(step)


def enabled(w, compiler):
    call = w.compile()

    def backward(x):
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss = w.loss(call, x)
            loss.backward()
        return loss

    return w.steps(backward)


@use()
def compiled_autograd_by_another_backend(w):
    return enabled(w, lambda graph: torch.compile(graph, backend="aot_eager"))


@use()
def compiled_autograd_run_eagerly(w):
    return enabled(w, lambda graph: graph)


# --- between steps --------------------------------------------------------------------------------


@use()
def inference_mode_between(w):
    call = w.compile()
    losses = w.train(call, 3)
    with torch.inference_mode():
        call(w.batch())
    return losses + w.train(call, 4)


@use()
def another_thread(w):
    call, losses = w.compile(), []
    losses += w.train(call, 3)
    thread = threading.Thread(target=lambda: losses.extend(w.train(call, 4)))
    thread.start()
    thread.join()
    return losses


@use()
def export_between(w):
    call = w.compile()
    losses, x = w.train(call, 3), w.batch()
    for model in (w.model, call):
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), w.model(x))
    exported.run_decompositions()
    return losses + w.train(call, 4)


@use()
def explain_between(w):
    call = w.compile()
    losses = w.train(call, 3)
    found = torch._dynamo.explain(w.model)(w.batch())
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    return losses + w.train(call, 4)


@use()
def frozen_for_evaluation(w):
    """Constants of a frozen graph would be the weights of before."""
    with inductor.patch(freezing=True):
        call, losses = w.compile(), []
        for steps in (3, 4):
            losses += w.train(call, steps)
            w.model.eval()
            with torch.no_grad():
                torch.testing.assert_close(call(w.batch()), w.model(w.batch()))
            w.model.train()
        return losses
