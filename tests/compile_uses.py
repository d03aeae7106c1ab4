"""What people do with torch.compile: 60 ways to train a model, here and in backward_uses.py.

Each use is a function of a :class:`~compile_world.World`, which says with which backend and which
optimizer, and returns its losses. What it tells beside them it asserts.
"""

import contextlib

import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as functorch
import torch._inductor.config as inductor

from compile_world import USES, under, use


def growing(k):
    return 4 + k


OTHER_SHAPES = "its batches grow"
ANEW = "what has trained dense for a step starts its moments anew in the subspace"
COUNTS = 1e-5  # torch's AdamW, compiled, counts steps in float32

# --- shapes ---------------------------------------------------------------------------------------


@use(OTHER_SHAPES)
def dynamic(w):
    return w.train(w.compile(dynamic=True), tokens=growing)


@use(OTHER_SHAPES)
def dynamic_at_the_second_shape(w):
    return w.train(w.compile(), tokens=growing)


@use(OTHER_SHAPES)
def mark_dynamic(w):
    call = w.compile()

    def marked(x):
        torch._dynamo.mark_dynamic(x, 0)
        return call(x)

    return w.train(marked, tokens=growing)


@use(OTHER_SHAPES)
def mark_unbacked(w):
    call = w.compile()

    def marked(x):
        torch._dynamo.decorators.mark_unbacked(x, 0)
        return call(x)

    return w.train(marked, tokens=growing)


# --- what is compiled -----------------------------------------------------------------------------


@use()
def fullgraph(w):
    return w.train(w.compile(fullgraph=True))


@use()
def a_loss_function(w):
    compiled = w.compile(lambda x: w.loss(w.model, x))

    def backward(x):
        loss = compiled(x)
        loss.backward()
        return loss

    return w.steps(backward)


@use(rounding=COUNTS)
def a_whole_training_step(w):
    @w.compile
    def step(x):
        w.optimizer.zero_grad()
        loss = w.loss(w.model, x)
        loss.backward()
        w.optimizer.step()
        return loss

    return w.steps(step, step=lambda: None)


@use(rounding=COUNTS)
def the_optimizers_step_too(w):
    return w.train(w.compile(), step=torch.compile(w.optimizer.step, backend="aot_eager"))


@use()
def gradients_of_autograd_grad_inside(w):
    @w.compile
    def forward_backward(x):
        loss = w.loss(w.model, x)
        return loss, *torch.autograd.grad(loss, w.parameters())

    def backward(x):
        loss, *grads = forward_backward(x)
        for p, grad in zip(w.parameters(), grads, strict=True):
            p.grad = grad
        return loss

    return w.steps(backward)


@use(quick=True)
def gradients_of_autograd_grad_outside(w):
    call = w.compile()

    def backward(x):
        loss = w.loss(call, x)
        for p, grad in zip(w.parameters(), torch.autograd.grad(loss, w.parameters()), strict=True):
            p.grad = grad
        return loss

    return w.steps(backward)


@use()
def regions(w):
    for layer in w.model.layers:
        layer.compile(**w.how)
    return w.train(w.model)


@use()
def regions_with_fullgraph(w):
    for layer in w.model.layers:
        layer.compile(fullgraph=True, **w.how)
    return w.train(w.model)


@use()
def a_compiled_layer_in_a_compiled_model(w):
    w.model.layers[1].compile(**w.how)
    return w.train(w.compile())


@use()
def nested_compile_region(w):
    call = torch.compiler.nested_compile_region(lambda layer, x: layer(x))

    def blocks(x):
        for layer in w.model.layers:
            x = call(layer, x)
        return x

    return w.train(w.compile(blocks))


@use("what is not compiled trains dense", compact=2, quick=True)
def a_disabled_layer(w):
    w.model.layers[1].forward = torch.compiler.disable(w.model.layers[1].forward)
    return w.train(w.compile())


@use()
def modules_not_inlined(w):
    with dynamo.patch(inline_inbuilt_nn_modules=False):
        return w.train(w.compile())


# --- stances --------------------------------------------------------------------------------------


@use("eager gradients are full ones, and are projected", quick=True, warns="came dense")
def stance_force_eager(w):
    call = w.compile()
    losses = w.train(call, 4)
    with torch.compiler.set_stance("force_eager"):
        losses += w.train(call, 2)
    return losses + w.train(call, 2)


@use()
def stance_fail_on_recompile(w):
    call = w.compile()
    losses = w.train(call, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        return losses + w.train(call, 3)


@use("eager gradients are full ones, and are projected", warns="came dense")
def stance_eager_on_recompile(w):
    call = w.compile()
    losses = w.train(call, 4)
    with torch.compiler.set_stance("eager_on_recompile"):
        return losses + w.train(call, 2) + w.train(call, 2, tokens=lambda k: 9)


@use("its first call is eager", differs=ANEW, warns="dense until now")
def stance_eager_then_compile(w):
    call = w.compile()
    with torch.compiler.set_stance("eager_then_compile"):
        return w.train(call, 5, tokens=growing)


@use("its first call has torch's backend", differs=ANEW, warns="dense until now")
def stance_aot_eager_then_compile(w):
    call = w.compile()
    with torch.compiler.set_stance("aot_eager_then_compile"):
        return w.train(call, 5, tokens=growing)


@use()
def stance_force_backend(w):
    call = torch.compile(w.model, backend="aot_eager")
    with torch.compiler.set_stance("default", force_backend=w.force):
        return w.train(call)


@use()
def stance_skip_guard_eval(w):
    call = w.compile()
    losses = w.train(call, 4)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        return losses + w.train(call, 3)


@use()
def error_on_recompile(w):
    call = w.compile()
    losses = w.train(call, 2)
    with dynamo.patch(error_on_recompile=True):
        return losses + w.train(call, 5)


# --- configurations -------------------------------------------------------------------------------


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def patched(config, **values):
    return lambda: config.patch(**values)


USES |= {
    "nothing in particular": under(),
    "freezing": under(patched(inductor, freezing=True)),
    "activation_memory_budget": under(patched(functorch, activation_memory_budget=0.3)),
    "both caches": under(
        patched(functorch, enable_autograd_cache=True), patched(inductor, fx_graph_cache=True)
    ),
    "no caches": under(patched(inductor, force_disable_caches=True)),
    "cpp_wrapper": under(patched(inductor, cpp_wrapper=True)),
    "caching_precompile": under(patched(dynamo, caching_precompile=True)),
    "repro_after": under(patched(dynamo, repro_after="aot")),
    "verify_correctness": under(patched(dynamo, verify_correctness=True)),
    "suppress_errors": under(patched(dynamo, suppress_errors=True)),
    "fake_tensor_crossref": under(patched(functorch, fake_tensor_crossref=True)),
    "donated_buffer": under(patched(functorch, donated_buffer=True)),
    "deterministic": under(deterministic),
}
